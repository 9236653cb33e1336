# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Many experts in one batch: each row of it has an adapter of its own."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax.adapters import base as base_lib
from mergejax.adapters import sites as sites_lib
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.intercept import replace

EXPERT_IDS = 'expert_ids'
_AXIS = 'experts'


def repeated(leaf: jax.Array, rows: int, path: typing.Path) -> jax.Array:
  """What each row of a batch has, for rows of a layer's inputs.

  Args:
    leaf: `[batch, ...]`.
    rows: of what the layer is given: as many, or several side by side to each,
      answers to one input.
    path: of the layer's kernel.

  Raises:
    StructureError: any other number.
  """
  times, over = divmod(rows, leaf.shape[0])
  if over or not times:
    raise errors.StructureError(
      f'{path} is given {rows} rows, but the batch says of {leaf.shape[0]} rows '
      'whose they are: the first axis of what an adapted layer is given must be '
      'that of the batch.'
    )
  return leaf if times == 1 else jnp.repeat(leaf, times, axis=0)


def taken(leaf: jax.Array, ids: typing.Array) -> jax.Array:
  """`leaf[ids]`; NaN where an id is out of range, below 0 too."""
  count = leaf.shape[0]
  # Negative numbers would count from the end.
  ids = jnp.where(ids < 0, count, ids)
  return jnp.take(leaf, ids, axis=0, mode='fill', fill_value=jnp.nan)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bank(sites_lib.LayerAdapter):
  """See `bank`."""

  reads = (EXPERT_IDS,)
  expert: sites_lib.LayerAdapter
  experts: int

  def __post_init__(self):
    errors.check_whole('experts', self.experts)

  @property
  def scales_inputs(self) -> bool:
    return self.expert.scales_inputs

  @property
  def dropout(self) -> float:
    return self.expert.dropout

  @property
  def kernels(self) -> Mapping[type, Any]:
    return self.expert.kernels

  def sites(self, base):
    return self.expert.sites(base)

  def parts(self, site):
    return {
      name: sites_lib.Part(
        (self.experts, *part.shape), (_AXIS, *part.axes), _each(part)
      )
      for name, part in self.expert.parts(site).items()
    }

  def edit(self, site, call):
    def rows(module: nn.Module, like: jax.Array):
      parts = self.read(site, module)
      return {
        name: repeated(
          taken(leaf, call.batch[EXPERT_IDS]), like.shape[0], site.path
        )
        for name, leaf in parts.items()
      }

    def before(module, inputs):
      each = lambda parts, x: self.expert.before(site, parts, x)
      return jax.vmap(each)(rows(module, inputs), inputs)

    def after(module, inputs, outputs):
      each = lambda parts, x, y, key: self.expert.after(site, parts, x, y, key)
      key = self.key(module, call)
      keys = None if key is None else jax.random.split(key, inputs.shape[0])
      return jax.vmap(each, (0, 0, 0, None if key is None else 0))(
        rows(module, inputs), inputs, outputs, keys
      )

    return replace.Edit(before if self.scales_inputs else None, after)

  def check_batch(self, batch, source):
    base_lib.check_ids(batch, EXPERT_IDS, self.experts, 'expert', source)

  def stack(
    self, base: typing.SpecTree, adapters: Sequence[typing.Tree]
  ) -> typing.Tree:
    """The bank's leaves from those of its experts.

    Args:
      base: specs of the base.
      adapters: leaves of `expert`, as many as there are experts.

    Raises:
      StructureError: another number, or leaves of another adapter.
    """
    if len(adapters) != self.experts:
      raise errors.StructureError(
        f'The bank has {self.experts} experts, and {len(adapters)} are given.'
      )
    specs = self.expert.specs(base)
    given = [base_lib.own_leaves(each, specs) for each in adapters]
    return self._by_site(
      base,
      lambda site, path: jnp.stack(
        [site.by_layer(leaves[path]) for leaves in given], axis=1
      ),
    )

  def pick(
    self, base: typing.SpecTree, adapter: typing.Tree, expert: int
  ) -> typing.Tree:
    """The leaves of one expert, for `expert`'s own adapter.

    Raises:
      ConfigError: there is no such expert.
    """
    base_lib.check_number('expert', expert, self.experts)
    own = base_lib.own_leaves(adapter, self.specs(base))
    return self._by_site(
      base, lambda site, path: site.by_layer(own[path])[:, expert]
    )

  def alone(self, base, adapter, number):
    return self.expert, self.pick(base, adapter, number)

  def _by_site(self, base, by_layer):
    """Leaves of `by_layer(site, path)`, each `[layers, ...]`."""
    return tree.unflatten({
      site.leaf(name): site.of_layers(by_layer(site, site.leaf(name)))
      for site in self.sites(base)
      for name in self.expert.parts(site)
    })  # fmt: skip

  def fold(self, base, params, adapter):
    raise errors.ConfigError(
      'A bank of experts is many models: fold one of them, '
      '`bank.expert.fold(base, params, bank.pick(base, leaves, number))`.'
    )


def _each(part):
  """Draws a part for every expert, with a key of its own."""

  def init(key, shape):
    keys = jax.random.split(key, shape[0])
    return jax.vmap(lambda key: part.init(key, part.shape))(keys)

  return init


def bank(adapter: sites_lib.LayerAdapter, experts: int) -> Bank:
  """E adapters of one kind: each row of a batch says which one is its own.

  Row b of a layer is computed with the leaves `bank[expert_ids[b]]`, so that a
  batch may mix tasks in one compiled program. A batch has `expert_ids
  <int32>[batch]`, 0 to E - 1; decoding keeps them. Leaves are those of the
  adapter with an axis `experts` in front (behind that of scanned layers, where
  it is the first); it is not spread over a mesh, the others are as they were.

  Args:
    adapter: of one expert, such as `lora()`.
    experts: E.

  Returns:
    An adapter, for `adapt`; `stack` makes its leaves from those of experts and
    `pick` takes one out, to fold or to share it.

  Raises:
    ConfigError: `experts` is no number. A `DataError` where a batch in host
    memory has no ids, or ids outside of the bank; a compiled program, which
    cannot refuse them, gives NaN.

  Example:
    >>> from mergejax.adapters import scales
    >>> bank(scales.ia3(), experts=8).experts
    8

  Source: Liu et al. (2022), https://arxiv.org/abs/2205.05638, section 3.3,
  which asks for batches of mixed tasks.
  """
  return Bank(expert=adapter, experts=experts)
