# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Ladder Side-Tuning: a narrow network beside a backbone that only runs forward."""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax.adapters import base as base_lib
from mergejax.adapters import ladder_calls
from mergejax.adapters import one_by_one
from mergejax.adapters import pruning
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing

_STACKS = ('encoder', 'decoder')
_GATES = ('learned', 'fixed', 'sum')
_RESIDUALS = ('before', 'after')
_STARTS = ('pruned', 'random')
# Axes of parameters that are narrower in the side network.
_NARROW = ('embed', 'joined_kv', 'mlp')
_TABLE = 'relpos_bias/rel_embedding'
_STD = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder(base_lib.Adapter):
  """See `ladder`."""

  reduction: int = 8
  encoder_layers: Sequence[int] | None = None
  decoder_layers: Sequence[int] | None = None
  gates: str = 'learned'
  gate: float = 0.5
  temperature: float = 0.1
  residual: str = 'before'
  merge_last: bool = False
  start: str = 'pruned'
  rounds: int = 1
  backbone_dropout: bool = False

  def __post_init__(self):
    errors.check_whole('reduction', self.reduction)
    errors.check_whole('rounds', self.rounds)
    errors.check_number('temperature', self.temperature, 0, open_below=True)
    if not 0 < self.gate < 1:
      raise errors.ConfigError(
        f'gate must be above 0 and below 1, the share of the side state, not '
        f'{self.gate!r}.'
      )
    for name, value, known in (
      ('gates', self.gates, _GATES),
      ('residual', self.residual, _RESIDUALS),
      ('start', self.start, _STARTS),
    ):
      if value not in known:
        raise errors.ConfigError(errors.near(value, known, name))
    for stack in _STACKS:
      name = f'{stack}_layers'
      given = getattr(self, name)
      if given is not None:
        object.__setattr__(self, name, _checked_layers(name, given))

  # Leaves ----------------------------------------------------------------------

  def kept(self, base: typing.SpecTree, stack: str) -> tuple[int, ...]:
    """The layers of a stack, 'encoder' or 'decoder', that are read.

    Raises:
      ConfigError: one that the stack does not have.
    """
    depth = pruning.depth(base, stack)
    given = getattr(self, f'{stack}_layers')
    if given is None:
      return tuple(range(depth))
    if given[-1] >= depth:
      raise errors.ConfigError(
        f'{stack}_layers names layer {given[-1]}, but the {stack} of this model '
        f'has {depth} layers, numbered from 0'
        + (': leave it out.' if not depth else f' to {depth - 1}: the list is for '
           'a stack of another depth.')
      )  # fmt: skip
    return tuple(given)

  def learns(self, path):
    return self.gates != 'fixed' or '/gate_' not in path

  def specs(self, base):
    base = one_by_one.specs(base)
    _check_base(base)
    _check_dense(base)
    width = _check_sizes(base, self.reduction)
    narrow = width // self.reduction
    found = {}
    for stack in _STACKS:
      kept = self.kept(base, stack)
      if not kept:
        continue
      sources = _sources(base, stack, kept)
      found |= {
        f'side/{path}': self._narrow(base[source])
        for path, source in sources.items()
      }
      for name in ('first', *(f'down_{i}' for i in kept)):
        found[f'side/{stack}/{name}/kernel'] = _whole(width, narrow)
        found[f'side/{stack}/{name}/bias'] = _whole(narrow)
      if self.gates != 'sum':
        found |= {f'side/{stack}/gate_{i}': _whole() for i in kept}
    if self.merge_last:
      found['side/gate_last'] = _whole()
    return {
      **found,
      'side/up/kernel': _whole(narrow, width),
      'side/up/bias': _whole(width),
    }

  def _narrow(self, spec):
    sizes = [
      size // self.reduction if name in _NARROW else size
      for size, name in zip(spec.shape, spec.axes)
    ]
    return _whole(*sizes)

  def init(self, base, key, params=None):
    return self._begun(base, key, params, None)

  def begin(
    self,
    base: typing.SpecTree,
    key: jax.Array,
    params: typing.Tree,
    importance: typing.Tree,
  ) -> typing.Tree:
    """Fresh leaves whose blocks are pruned by a given importance.

    Args:
      base: specs of the base.
      key: of the down- and up-projections.
      params: of the base.
      importance: of every weight, a tree as `params`; the paper's is the sum over
        1024 training examples of squared gradients: `mj.stats.fisher`, whose
        mean over examples prunes alike.

    Raises:
      StructureError: it lacks a leaf, see `pruning.prune`.
    """
    return self._begun(base, key, params, importance)

  def _begun(self, base, key, params, importance):
    specs = self.specs(base)
    keys = dict(zip(specs, jax.random.split(key, len(specs))))
    heads = next(s.shape[0] for p, s in specs.items() if p.endswith(_TABLE))
    made = {p: _fresh(keys[p], p, s.shape, heads) for p, s in specs.items()}
    alpha = self.temperature * math.log(self.gate / (1 - self.gate))
    gates = [path for path in specs if '/gate_' in path]
    made |= {path: jnp.full((), alpha, jnp.float32) for path in gates}
    if params is not None and (
      self.start == 'pruned' or importance is not None
    ):
      pruned = pruning.prune(
        base, params, self.reduction, importance, rounds=self.rounds
      )
      leaves = one_by_one.leaves(base, params)
      base = one_by_one.specs(base)
      for stack in _STACKS:
        kept = self.kept(base, stack)
        for path, source in _sources(base, stack, kept).items():
          table = jnp.asarray(leaves[source], jnp.float32)
          made[f'side/{path}'] = pruned.get(source, table)
    return tree.unflatten(made)

  # At work ---------------------------------------------------------------------

  @contextlib.contextmanager
  def at_work(self, call):
    ladder_calls.check_module(call.family)
    with nn.intercept_methods(ladder_calls.Calls(self, call)):
      yield

  def collect(
    self, call: base_lib.Call, variables: Mapping[str, Any]
  ) -> dict[str, jax.Array]:
    """See `ladder_files.collect`."""
    ladder_calls.check_module(call.family)
    return ladder_calls.collect(self, call, variables)

  def check_batch(self, batch, source):
    names = (ladder_calls.ENCODER, ladder_calls.DECODER, ladder_calls.LAST)
    there = [name for name in names if name in batch]
    if there and self.backbone_dropout:
      raise errors.DataError(
        f'{source} brings ladders ({", ".join(there)}), which are the same at '
        'every step, but backbone_dropout draws new ones: set it to False.'
      )


def _checked_layers(name: str, given: Sequence[int]) -> tuple[int, ...]:
  """A list of layers, ascending."""
  listed = isinstance(given, Sequence) and not isinstance(given, str)
  if not listed or not given:
    raise errors.ConfigError(
      f'{name} must list at least one layer, as in [1, 3, 5], not {given!r}; '
      'None keeps all.'
    )
  for number in given:
    errors.check_whole(f'Every layer of {name}', number, least=0)
  if len({*given}) != len(given):
    raise errors.ConfigError(f'{name} names a layer twice: {list(given)}.')
  return tuple(sorted(int(number) for number in given))


def _check_base(base: typing.SpecTree) -> None:
  """Raises unless the layers of a model are known, with axes."""
  layers = [p for p in base if p.startswith('decoder/layers_0/')]
  if not layers or any(base[path].axes is None for path in layers):
    raise errors.ConfigError(
      'A ladder needs layers that are called decoder/layers_0/... (and '
      'encoder/layers_0/...), or scanned decoder/decoder/..., of T5 or the '
      'decoder-only model, and their axes; '
      f'the parameters begin with:\n{errors.listed(list(base), 3)}'
    )


def _check_dense(base: typing.SpecTree) -> None:
  """Raises for a model with experts, whose blocks have no narrow form."""
  sparse = [p for p, spec in base.items() if 'expert' in (spec.axes or ())]
  if sparse:
    raise errors.ConfigError(
      "The side network of a ladder has blocks like the backbone's, and none "
      f'with experts, as this model has ({errors.some(sparse, 1)}): take a dense '
      'backbone, or another adapter, such as lora().'
    )


def _check_sizes(base: typing.SpecTree, reduction: int) -> int:
  """The width of the backbone, when r divides that and the other sizes."""
  sizes: dict[str, int] = {}
  for spec in base.values():
    sizes |= dict(zip(spec.axes or (), spec.shape))
  heads = sizes['joined_kv'] // sizes['heads']
  for what, size in (
    ('the width (emb_dim)', sizes['embed']),
    ('the size of a head (head_dim)', heads),
    ('the hidden layer (mlp_dim)', sizes['mlp']),
  ):
    if size % reduction:
      raise errors.ConfigError(
        f'reduction={reduction} does not divide {what}, {size}: the side network '
        f'divides each of them. All are divisible by '
        f'{math.gcd(sizes["embed"], heads, sizes["mlp"])} and what divides that.'
      )
  return sizes['embed']


def _sources(
  base: typing.SpecTree, stack: str, kept: Sequence[int]
) -> dict[typing.Path, typing.Path]:
  """`{path below 'side/': path in the base}` of blocks, norms and the table.

  The side stack has one table of positions, of the backbone's first layer
  whatever is kept.
  """
  if not kept:
    return {}
  found = {}
  for i in kept:
    inside = f'{stack}/layers_{i}/'
    paths = [p for p in base if p.startswith(inside) and _TABLE not in p]
    found |= {path: path for path in paths}
  shared, own = f'{stack}/{_TABLE}', f'{stack}/layers_0/{_TABLE}'
  found[shared] = shared if shared in base else own
  norm = f'{stack}/{stack}_norm/scale'
  return {**found, norm: norm}


# Axes that no mesh spreads: every device has the small side network whole.
_AXES = ((), ('outputs',), ('inputs', 'outputs'))


def _whole(*shape: int) -> typing.LeafSpec:
  return typing.LeafSpec(shape, np.dtype('float32'), _AXES[len(shape)])


def _fresh(key, path, shape, heads):
  """A leaf's random beginning: projections near 0, blocks as T5's own."""
  *_, parent, name = path.split('/')
  if name == 'scale':
    return jnp.ones(shape)
  if len(shape) < 2:
    return jnp.zeros(shape)
  projects = parent in ('first', 'up') or parent.startswith('down_')
  fan_in = shape[0]
  if parent == 'query':  # stands for the 1/sqrt(head_dim) of attention, too
    fan_in *= shape[1] // heads
  std = _STD if projects else 1 / math.sqrt(fan_in)
  return std * jax.random.normal(key, shape)


def ladder(
  *,
  reduction: int = 8,
  encoder_layers: Sequence[int] | None = None,
  decoder_layers: Sequence[int] | None = None,
  gates: str = 'learned',
  gate: float = 0.5,
  temperature: float = 0.1,
  residual: str = 'before',
  merge_last: bool = False,
  start: str = 'pruned',
  rounds: int = 1,
  backbone_dropout: bool = False,
) -> Ladder:
  """LST: a network r times narrower reads the backbone's layers and answers.

  In both stacks, with `h_i` the output of the backbone's layer i,
  `s = D_first(h_emb)`, then for every kept layer
  `s = Block_i(mu_i s + (1 - mu_i) D_i(h_i))`, `mu_i = sigmoid(alpha_i / 0.1)`.
  The side decoder attends to the side encoder. The backbone's own head makes
  logits of `U(s)`. No gradient enters the backbone, so that training keeps
  nothing of it but the ladders `h_i`. The backbone's layers are scanned or not;
  the leaves are the same. Leaves, all float32, of T5: for each kept layer
  `side/encoder/layers_i/...` by the backbone's names with width, head size
  and hidden size over r, `side/encoder/down_i/{kernel [embed, embed / r],bias}`,
  `side/encoder/gate_i []`; `side/encoder/first`, norm and table of positions; the
  same of the decoder; `side/up/{kernel,bias}`.

  Args:
    reduction: r, which must divide width, head size and hidden size; 8 is the
      paper's.
    encoder_layers: numbers of the layers that are kept, from 0; None keeps all.
      The paper drops 0, 4 and 8 of T5-base's twelve and every even one of
      T5-large's.
    decoder_layers: likewise.
    gates: 'learned', or 'fixed' where they begin, unless
      `training.ladder_gates.scheduled` moves them; 'sum' has none, and adds
      `s + D_i(h_i)`.
    gate: mu at first; 0.5 is alpha 0, the paper's.
    temperature: of the gates; 0.1 makes them open and shut fast.
    residual: the gate mixes 'before' the block; or 'after'.
    merge_last: the head is given `g U(s) + (1 - g) h`, h the backbone's own
      output, with one more gate `side/gate_last []`.
    start: 'pruned' takes blocks out of the backbone's, see `pruning.prune`, by
      size of weights where `family.start` gives the base's parameters, by the
      Fisher information with `Ladder.begin`; 'random' draws them.
    rounds: of pruning, see there; 1 is the paper's, 10 the released code's
      iterative one.
    backbone_dropout: the backbone drops out in training, as in the released code;
      without it a step is cheaper and ladders can be kept, see
      `ladder_files.save_ladders`.

  Returns:
    An adapter of T5 and of the decoder-only model, for `adapt`. It cannot be
    folded. A fresh one is not the backbone: the side network answers.

  Raises:
    ConfigError: an empty list of layers, one named twice, unknown words. With
      `adapt`: a layer that the stack does not have, an r that does not divide,
      layers with experts. While tracing: remat in the backbone.

  Example:
    >>> ladder(reduction=8, encoder_layers=[1, 3], decoder_layers=[1, 3]).reduction
    8

  Source: Sung, Cho and Bansal, "LST: Ladder Side-Tuning for Parameter and Memory
  Efficient Transfer Learning" (2022), https://arxiv.org/abs/2206.06522, section
  3. Released code also makes gates for dropped layers, which nothing reads; its
  branch with gradient checkpoints ignores gates and is not followed.
  """
  return Ladder(
    reduction=reduction,
    encoder_layers=encoder_layers,
    decoder_layers=decoder_layers,
    gates=gates,
    gate=gate,
    temperature=temperature,
    residual=residual,
    merge_last=merge_last,
    start=start,
    rounds=rounds,
    backbone_dropout=backbone_dropout,
  )
