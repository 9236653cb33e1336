# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters of linear maps: where they sit, and what all of them share.

A site is a kernel that is adapted. Leaves of an adapter there have the logical
axes of the kernel's own inputs or outputs, so that they lie on a mesh as it
does, and axes of stacked layers where the kernel has them.
"""

import abc
from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import hashlib
import math
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax.adapters import base as base_lib
from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.intercept import linear
from mergejax.intercept import replace

# One layer's leaves of an adapter, by their own names.
Parts = Mapping[str, jax.Array]


class Part(NamedTuple):
  """A leaf of an adapter at one layer.

  Attributes:
    shape: without stacked axes.
    axes: logical name of every axis.
    init: `(key, shape) -> <float32>[shape]`.
  """

  shape: tuple[int, ...]
  axes: tuple[str, ...]
  init: Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Site:
  """A linear map that is adapted.

  Attributes:
    path: of its kernel.
    spec: of its kernel, with axes where they are known.
    view: which of the kernel's axes are stacked, inputs, outputs.
  """

  path: typing.Path
  spec: typing.LeafSpec
  view: axes_lib.View

  @property
  def inputs(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """`(sizes, names)` of the kernel's input axes."""
    return self._side(self.view.inputs, axes_lib.INPUTS)

  @property
  def outputs(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """`(sizes, names)` of the kernel's output axes."""
    return self._side(self.view.outputs, axes_lib.OUTPUTS)

  def _side(self, which, unknown):
    names = self.spec.axes
    return (
      tuple(self.spec.shape[i] for i in which),
      tuple(names[i] if names else unknown for i in which),
    )

  @property
  def module(self) -> typing.Path:
    """Path of the module; empty for the outermost."""
    return self.path.rpartition('/')[0]

  def leaf(self, name: str) -> typing.Path:
    """Path of a leaf of an adapter: beside the kernel."""
    return f'{self.module}/{self.own(name)}'.lstrip('/')

  def own(self, name: str) -> str:
    """Name of a leaf in the module's scope, which may have more kernels."""
    kernel = self.path.rpartition('/')[2]
    return name if kernel == 'kernel' else f'{kernel}_{name}'

  def stacked(self, part: Part) -> typing.LeafSpec:
    """The spec of a part, with the kernel's stacked axes where it has them."""
    shape, names = list(part.shape), list(part.axes)
    for at in sorted(self.view.stack):
      if at > len(shape):
        raise errors.StructureError(
          f'{self.path} {list(self.spec.shape)} stacks layers along axis {at}, '
          f'where a leaf of shape {list(part.shape)} has no place for them: '
          'stack them along axis 0 or 1.'
        )
      shape.insert(at, self.spec.shape[at])
      names.insert(at, (self.spec.axes or ())[at])
    return typing.LeafSpec(tuple(shape), np.dtype('float32'), tuple(names))

  def by_layer(self, leaf: typing.Array) -> jax.Array:
    """`[..., layers, ...] -> [layers, ...]`; one layer where none is stacked."""
    stack = sorted(self.view.stack)
    moved = jnp.moveaxis(jnp.asarray(leaf), stack, range(len(stack)))
    return moved.reshape(-1, *moved.shape[len(stack) :])

  def of_layers(self, leaf: typing.Array) -> jax.Array:
    """The inverse of `by_layer`."""
    stack = sorted(self.view.stack)
    sizes = [self.spec.shape[i] for i in stack]
    leaf = jnp.reshape(leaf, (*sizes, *leaf.shape[1:]))
    return jnp.moveaxis(leaf, range(len(stack)), stack)

  def matrix(self, kernel: typing.Array) -> typing.Array:
    """A kernel of one layer as `[in, out]`."""
    return axes_lib.lay(kernel, self._layer_view(), 'matrix')

  def unmatrix(self, matrix: typing.Array) -> typing.Array:
    """The inverse of `matrix`."""
    shape = [
      n for i, n in enumerate(self.spec.shape) if i not in self.view.stack
    ]
    return axes_lib.unlay(matrix, shape, self._layer_view(), 'matrix')

  def _layer_view(self):
    rest = [i for i in range(len(self.spec.shape)) if i not in self.view.stack]
    at = lambda which: tuple(rest.index(i) for i in which)
    return axes_lib.View((), at(self.view.inputs), at(self.view.outputs))


def find(base: typing.SpecTree, targets: Sequence[str]) -> list[Site]:
  """The kernels that are adapted.

  Args:
    base: specs of the base.
    targets: regular expressions over whole paths.

  Raises:
    ConfigError: an expression that matches nothing, or what is no kernel.
    StructureError: it is not known which axes of a kernel are what.
  """
  if isinstance(targets, str):
    targets = (targets,)
  wanted = {}
  for pattern in targets:
    matches = tree.expression(pattern, 'target').fullmatch
    found = [path for path in base if matches(path)]
    if not found:
      kernels = [p for p, spec in base.items() if len(spec.shape) > 1]
      raise errors.ConfigError(
        f'The target {pattern!r} matches no parameter; an expression must match '
        f'the whole path. Kernels begin with:\n{errors.listed(kernels, 5)}'
      )
    wanted |= dict.fromkeys(found)
  sites = []
  for path in wanted:
    view = axes_lib.view(path, base[path])
    if not view.outputs or path.endswith('embedding'):
      raise errors.ConfigError(
        f'The target {path} {list(base[path].shape)} is not the kernel of a '
        'linear map: adapters change those alone. Give other targets.'
      )
    sites.append(Site(path, base[path], view))
  if not sites:
    raise errors.ConfigError('An adapter needs targets, and none are given.')
  return sites


class LayerAdapter(base_lib.Adapter):
  """An adapter of linear maps.

  A subclass says its `parts` at a site, what it does `before` and `after` the
  map, row by row, and how it is `folded`.

  Attributes:
    kernels: further modules with linear maps, `{class: describe}`; see
      `intercept.linear.Describe`.
    dropout: share of what it is given that is dropped in training.
  """

  kernels: ClassVar[Mapping[type, linear.Describe]] = {}
  dropout: float = 0.0

  @abc.abstractmethod
  def sites(self, base: typing.SpecTree) -> list[Site]:
    """The kernels that are adapted."""

  @abc.abstractmethod
  def parts(self, site: Site) -> dict[str, Part]:
    """The leaves of one layer."""

  @property
  def scales_inputs(self) -> bool:
    """Whether there is a `before`, which not every layer has a place for."""
    return type(self).before is not LayerAdapter.before

  def before(self, site: Site, parts: Parts, inputs: jax.Array) -> jax.Array:
    """`<float>[..., in] -> <float>[..., in]`, of the same dtype."""
    del site, parts
    return inputs

  def after(
    self,
    site: Site,
    parts: Parts,
    inputs: jax.Array,
    outputs: jax.Array,
    key: jax.Array | None = None,
  ) -> jax.Array:
    """What goes on in the place of a map's outputs.

    Args:
      site: of the map.
      parts: one layer's leaves, float32.
      inputs: `<float>[..., in]`.
      outputs: `<float>[..., *out]`.
      key: for dropout; None drops nothing.

    Returns:
      Of the shape and dtype of `outputs`.
    """
    del site, parts, inputs, key
    return outputs

  def folded(
    self, site: Site, own: Parts, parts: Parts
  ) -> dict[str, jax.Array]:
    """Changed leaves of one layer's module: `kernel`, and `bias` if any.

    Args:
      site: of the map.
      own: the module's leaves, float32: the kernel by its name, and `bias`.
      parts: of the adapter.

    Raises:
      ConfigError: no parameters of the base compute what the adapter does.
    """
    raise base_lib.not_folded(self)

  # What follows from these -----------------------------------------------------

  def specs(self, base):
    return {
      site.leaf(name): site.stacked(part)
      for site in self.sites(base)
      for name, part in self.parts(site).items()
    }

  def init(self, base, key, params=None):
    del params
    leaves = {}
    for site in self.sites(base):
      count = math.prod(site.spec.shape[i] for i in site.view.stack)
      for name, part in self.parts(site).items():
        path = site.leaf(name)
        keys = jax.random.split(of_path(key, path), count)
        make = functools.partial(part.init, shape=part.shape)
        leaves[path] = site.of_layers(
          jax.vmap(lambda k, make=make: make(k))(keys)
        )
    return tree.unflatten(leaves)

  def rng_streams(self, *, train):
    return ('dropout',) if train and self.dropout else ()

  @contextlib.contextmanager
  def at_work(self, call):
    sites = self.sites(call.base)
    edits = {site.path: self.edit(site, call) for site in sites}
    seen: set[typing.Path] = set()
    with nn.intercept_methods(
      replace.replacing(edits, kernels=self.kernels, seen=seen)
    ):
      yield
    missing = [site.path for site in sites if site.path not in seen]
    if call.whole and missing:
      raise errors.StructureError(
        f'{len(missing)} of {len(sites)} adapted kernels were never seen at '
        f'work:\n{errors.listed(missing)}\nNo nn.Dense, nn.DenseGeneral or '
        'nn.Conv works with them. Tell what their layers are given with '
        '`kernels={MyLayer: describe}`, or leave them out of the targets.'
      )

  def edit(self, site: Site, call: base_lib.Call) -> replace.Edit:
    """What is done at a site in one call of the model."""

    def before(module, inputs):
      return self.before(site, self.read(site, module), inputs)

    def after(module, inputs, outputs):
      key = self.key(module, call)
      return self.after(site, self.read(site, module), inputs, outputs, key)

    return replace.Edit(before if self.scales_inputs else None, after)

  def read(self, site: Site, module: nn.Module) -> dict[str, jax.Array]:
    """The adapter's leaves in the scope of a module at work."""
    return {
      name: module.get_variable('params', site.own(name))
      for name in self.parts(site)
    }

  def key(self, module: nn.Module, call: base_lib.Call) -> jax.Array | None:
    """A key for dropout, of this layer and call alone; None drops nothing."""
    drops = call.train and self.dropout and module.has_rng('dropout')
    return module.make_rng('dropout') if drops else None

  def fold(self, base, params, adapter):
    leaves = dict(tree.flatten(params))
    mine = base_lib.own_leaves(adapter, self.specs(base))
    for site in self.sites(base):
      for path, leaf in self.fold_site(site, leaves, mine).items():
        leaves[path] = leaf.astype(leaves[path].dtype)
    return tree.unflatten(leaves)

  def leaves_of(
    self, site: Site, base: Mapping[typing.Path, Any]
  ) -> dict[str, typing.Path]:
    """`{name: path}` of what `folded` is given of a module, and may change."""
    names = {site.path.rpartition('/')[2]: site.path}
    bias = f'{site.module}/bias'.lstrip('/')
    if 'kernel' in names and bias in base:
      names['bias'] = bias
    return names

  def fold_site(
    self,
    site: Site,
    leaves: Mapping[typing.Path, typing.Array],
    mine: Mapping[typing.Path, typing.Array],
  ) -> dict[typing.Path, jax.Array]:
    """`{path: <float32> changed leaf}` of one module, all its layers.

    Args:
      site: of the map.
      leaves: of the base, those of the module at least.
      mine: of the adapter, likewise.
    """
    names = self.leaves_of(site, leaves)
    wide = lambda leaf: jnp.asarray(leaf, jnp.float32)
    own = {n: site.by_layer(wide(leaves[p])) for n, p in names.items()}
    parts = {
      name: site.by_layer(wide(mine[site.leaf(name)]))
      for name in self.parts(site)
    }
    changed = jax.vmap(functools.partial(self.folded, site))(own, parts)
    return {names[n]: site.of_layers(leaf) for n, leaf in changed.items()}


def of_path(key: jax.Array, path: typing.Path) -> jax.Array:
  """A key of one leaf, whatever other leaves there are."""
  digest = hashlib.blake2b(path.encode(), digest_size=4).digest()
  return jax.random.fold_in(key, int.from_bytes(digest, 'little'))


def last(vector: typing.Array, like: typing.Array) -> jax.Array:
  """A float32 vector against the last axes of `like`, to be multiplied."""
  vector = jnp.asarray(vector, jnp.float32)
  return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


def product(inputs: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
  """`[..., in] x [in, out] -> <float32>[..., out]` from operands of a dtype."""
  # One product of two axes, as in `nn.layers.flat_dot_general`.
  flat = inputs.reshape(-1, kernel.shape[0]).astype(dtype)
  found = jnp.dot(
    flat, kernel.astype(dtype), preferred_element_type=jnp.float32
  )
  return found.reshape(*inputs.shape[:-1], kernel.shape[1])
