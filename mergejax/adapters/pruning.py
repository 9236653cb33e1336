# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Structured pruning: a narrow network out of the best units of a wide one."""

import re

import jax
import jax.numpy as jnp

from mergejax.adapters import one_by_one
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing

_LAYER = re.compile(r'(encoder|decoder)/layers_(\d+)/')
# Parts of a layer in the order in which it computes: a norm, then its maps.
_PARTS = (
  ('pre_attention_layer_norm', 'attention'),
  ('pre_self_attention_layer_norm', 'self_attention'),
  ('pre_cross_attention_layer_norm', 'encoder_decoder_attention'),
  ('pre_mlp_layer_norm', 'mlp'),
)


def prune(
  base: typing.SpecTree,
  params: typing.Tree,
  reduction: int,
  importance: typing.Tree | None = None,
  *,
  rounds: int = 1,
) -> dict[typing.Path, jax.Array]:
  """Narrow layers and norms, of the units that matter most in the wide ones.

  The matrices are walked in the order of the network, with the set of kept
  inputs: what goes in is cut to that set; of what comes out the units with the
  largest L1 norm of importance over those inputs are kept. Query, key and value
  choose together, by the product of their importances, and so do the maps of a
  gated feed-forward block. Kept units stay in their order.

  Args:
    base: specs of the model, with axes; its layers are scanned or not.
    params: of the model.
    reduction: r; of n units `n - round((1 - 1/r) n)` are kept, at least one.
    importance: of every weight, a tree as `params`: for example the sums of
      squared gradients, `mj.stats.fisher`. By default the weights themselves
      (the L1 norm does not see their signs).
    rounds: R, in how many walks. After walk t are `n - round(t/R (1 - 1/r) n)`
      units left, and the next one weighs what is left by the inputs that are
      left. 1 is the paper's.

  Returns:
    `{path: <float32>}` of layers, one by one, and final norms, by the model's
    names. With r of 1 the model's own.

  Raises:
    StructureError: the importance lacks a leaf, or has one of another shape.
    ConfigError: no round.

  What to know: the kept units of the residual stream differ from matrix to
  matrix, and units of attention are chosen across heads and then cut into heads
  anew. It is a beginning for training, no small model by itself.

  Example:
    >>> from mergejax import models
    >>> family = models.family_of(models.build({'model_type': 't5x',
    ...   'vocab_size': 9, 'emb_dim': 8, 'num_heads': 2, 'head_dim': 4,
    ...   'mlp_dim': 16, 'num_encoder_layers': 1, 'num_decoder_layers': 1}))
    >>> params = family.init(jax.random.key(0))
    >>> narrow = prune(family.specs(), params, 2)
    >>> narrow['encoder/layers_0/attention/query/kernel'].shape
    (4, 4)

  Source: Sung, Cho and Bansal, "LST: Ladder Side-Tuning for Parameter and Memory
  Efficient Transfer Learning" (2022), https://arxiv.org/abs/2206.06522, section
  3.3; the walk is that of the released code's one-shot variant, which knows ReLU
  blocks only. Where that lists kept units in the arbitrary order of a set, they
  are ascending here. Its iterative variant has ten rounds, whose shares of what
  is left it rounds one after the other: sizes may miss 1/r by a unit there.
  """
  errors.check_whole('rounds', rounds)
  leaves = given = one_by_one.leaves(base, params)
  if importance is not None:
    given = one_by_one.leaves(base, _checked(base, importance))
  base = one_by_one.specs(base)
  widths = {
    path: jnp.asarray(given[path], jnp.float32)
    for path in base
    if path in given
  }
  (table,) = (p for p, s in base.items() if s.axes == ('vocab', 'embed'))
  walk = _Walk(leaves, widths)
  for number in range(rounds):
    walk.pruned = (number + 1) / rounds * (1 - 1 / reduction)
    walk.begin(table)
    for stack in ('encoder', 'decoder'):
      for i in range(depth(base, stack)):
        for norm, part in _PARTS:
          walk.part(f'{stack}/layers_{i}', norm, part)
      walk.norm(f'{stack}/{stack}_norm/scale')
  return {path: walk.leaves[path] for path in walk.met}


def depth(base: typing.SpecTree, stack: str) -> int:
  """How many layers a stack has, scanned or not; 0 where there is none."""
  paths = one_by_one.specs(base)
  found = {m[2] for m in map(_LAYER.match, paths) if m and m[1] == stack}
  return len(found)


def _checked(base, importance):
  """Leaves of the importance, which must be those of the model."""
  found = tree.flatten(importance)
  wanted = {path: spec.shape for path, spec in base.items()}
  wrong = [
    p for p, s in wanted.items() if p not in found or found[p].shape != s
  ]
  # Tables of positions are not pruned, and have no importance.
  wrong = [path for path in wrong if not path.endswith('rel_embedding')]
  if wrong:
    raise errors.StructureError(
      'The importance for pruning must have every parameter of the base, in its '
      f'shape; missing or of another shape: {errors.some(wrong)}. Collect it of '
      'the whole base, for example with mj.stats.fisher().'
    )
  return found


class _Walk:
  """Through the matrices of a model, with the units that are kept.

  Attributes:
    pruned: share of all units of a matrix that are gone after this walk.
    units: `<int32>[kept]` of what the next matrix is given.
    leaves: of the model, float32 and narrow once they were met.
    importance: of each, narrow alike.
    met: paths of what was met.
  """

  pruned: float
  units: jax.Array

  def __init__(self, leaves, importance):
    self.leaves, self.importance = dict(leaves), dict(importance)
    self.sizes = {path: leaf.shape for path, leaf in self.leaves.items()}
    self.met: dict[typing.Path, None] = {}

  def begin(self, table: typing.Path) -> None:
    """At the embedded tokens; their table is not part of what is made."""
    importance = self.importance[table]
    self.units = self._best(jnp.abs(importance), table)
    self.importance[table] = importance[:, self.units]

  def norm(self, path: typing.Path) -> None:
    if path in self.leaves:
      self._cut(path, self.units)

  def part(self, layer: typing.Path, norm: str, part: str) -> None:
    """A norm and the maps behind it."""
    inside = f'{layer}/{part}/'
    names = [p for p in self.leaves if p.startswith(inside)]
    if not names:
      return
    self.norm(f'{layer}/{norm}/scale')
    last = [p for p in names if p.split('/')[-2] in ('out', 'wo')]
    self._maps([p for p in names if p not in last])
    self._maps(last)

  def _maps(self, paths):
    """Maps of the same inputs that choose their outputs together."""
    together = jnp.ones((), jnp.float32)
    for path in paths:
      each = jnp.abs(self.importance[path][self.units])
      # Products of squared gradients leave float32; a factor changes no order.
      each = each / jnp.maximum(jnp.max(each), jnp.finfo(each.dtype).tiny)
      together = together * each
    outputs = self._best(together, paths[0])
    for path in paths:
      self._cut(path, self.units, outputs)
    self.units = outputs

  def _best(self, importance, path):
    """The best columns of `<float32>[in, out]`, ascending."""
    size = self.sizes[path][1]
    kept = max(1, size - round(self.pruned * size))
    order = jnp.argsort(jnp.sum(importance, axis=0), stable=True)
    return jnp.sort(order[importance.shape[1] - kept :])

  def _cut(self, path, rows, columns=None):
    """Keeps these rows, and columns, of a leaf and of its importance."""
    cut = lambda leaf: leaf[rows] if columns is None else leaf[rows][:, columns]
    self.leaves[path] = cut(jnp.asarray(self.leaves[path], jnp.float32))
    if path in self.importance:
      self.importance[path] = cut(self.importance[path])
    self.met[path] = None
