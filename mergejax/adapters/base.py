# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What an adapter is: a description, a few leaves, and how a call uses them.

An adapter of your own is a subclass of `Adapter`; one that changes linear maps,
as most do, of `sites.LayerAdapter`. Its leaves live beside the base's, under
the path of the module that they change, so that scanned layers slice them as
they slice the kernel.
"""

import abc
from collections.abc import Callable, Mapping
import contextlib
from typing import Any, ClassVar, NamedTuple

import jax

from mergejax import models
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing

# Groups of leaves that learn at rates of their own.
ADAPTER, ROUTER = 'adapter', 'router'


class Call(NamedTuple):
  """What an adapter knows of a call of its model.

  Attributes:
    family: of the base.
    base: specs of the base's parameters, with axes where they are known.
    adapter: `{path: array}`, its own leaves.
    batch: what the model is given; while decoding only what the adapter
      `reads`.
    train: in training mode.
    whole: a full forward pass, in which every adapted layer is at work.
  """

  family: models.ModelFamily
  base: typing.SpecTree
  adapter: Mapping[typing.Path, jax.Array]
  batch: Mapping[str, Any]
  train: bool = False
  whole: bool = True


class Adapter(abc.ABC):
  """A description of what is added to a frozen base.

  Attributes:
    reads: names in a batch that say which row is whose, such as 'expert_ids'.
  """

  reads: ClassVar[tuple[str, ...]] = ()

  @abc.abstractmethod
  def specs(self, base: typing.SpecTree) -> typing.SpecTree:
    """`{path: LeafSpec}` of the adapter's leaves, from shapes alone.

    Args:
      base: specs of the base, with axes where they are known.

    Raises:
      UserError: the adapter does not fit the base.
    """

  @abc.abstractmethod
  def init(
    self,
    base: typing.SpecTree,
    key: jax.Array,
    params: typing.Tree | None = None,
  ) -> typing.Tree:
    """Fresh leaves, nested as the base's.

    With those of layers a model is its base, bit for bit.

    Args:
      base: specs of the base.
      key: of `jax.random`.
      params: of the base, for adapters that begin from them; None where they
        are not at hand.
    """

  def learns(self, path: typing.Path) -> bool:
    """Whether a leaf of the adapter is trained."""
    del path
    return True

  def group(self, path: typing.Path) -> str:
    """'adapter', or 'router' of what decides how much of which is used."""
    del path
    return ADAPTER

  def at_work(self, call: Call) -> contextlib.AbstractContextManager[Any]:
    """While a model is traced inside, it runs with the adapter."""
    del call
    return contextlib.nullcontext()

  def widened(self, call: Call) -> Mapping[str, Any]:
    """The batch that the base is called with; prompts make room in it."""
    return call.batch

  def narrowed(self, call: Call, logits: jax.Array) -> jax.Array:
    """The logits of the batch that was given, from those of `widened`."""
    del call
    return logits

  def ahead(self, call: Call) -> int:
    """Positions that a decoder's cache holds before the first token of a row."""
    del call
    return 0

  def begun(
    self,
    call: Call,
    cache: Any,
    step: Callable[[Any, jax.Array], tuple[jax.Array, Any]],
  ) -> Any:
    """The cache that decoding begins with, those positions filled.

    Args:
      call: of the model; its batch is that of the rows.
      cache: of the base, with room for them.
      step: `(cache, <int32>[rows]) -> (logits, cache)`, the base's.
    """
    del call, step
    return cache

  def rng_streams(self, *, train: bool) -> tuple[str, ...]:
    """Names of the random streams that the adapter draws from."""
    del train
    return ()

  def check_batch(self, batch: Mapping[str, Any], source: str) -> None:
    """Raises a `DataError` for a batch, in host memory, that it cannot use."""
    del batch, source

  def alone(
    self, base: typing.SpecTree, adapter: typing.Tree, number: int
  ) -> tuple['Adapter', typing.Tree]:
    """What the rows of one number in `reads` are computed with, by itself.

    Args:
      base: specs of the base.
      adapter: its leaves.
      number: of a task or an expert, from 0.

    Returns:
      `(adapter, leaves)`, for a base adapted with that one alone.

    Raises:
      ConfigError: there is no such number.
    """
    raise errors.ConfigError(f'{type(self).__name__} is one adapter already.')

  def fold(
    self,
    base: typing.SpecTree,
    params: typing.Tree,
    adapter: typing.Tree,
  ) -> typing.Tree:
    """The base's parameters with the adapter in them; see `adapted.fold`.

    Raises:
      ConfigError: no parameters of the base compute what the adapter does.
    """
    raise not_folded(self)


def not_folded(adapter: Adapter) -> errors.ConfigError:
  """What to raise where parameters of the base do not do what an adapter does."""
  return errors.ConfigError(
    f'{type(adapter).__name__} cannot be folded: no parameters of the base '
    'compute what it does. Keep the adapter, and serve the adapted model.'
  )


def count(adapter: Adapter, base: typing.SpecTree) -> int:
  """How many numbers of an adapter are trained, from shapes alone.

  Args:
    adapter: any.
    base: specs of the base, `family.specs()`.

  Example:
    >>> import mergejax as mj
    >>> module = models.build({'model_type': 't5x', 'emb_dim': 8, 'num_heads': 2,
    ...   'head_dim': 4, 'mlp_dim': 16, 'num_encoder_layers': 1,
    ...   'num_decoder_layers': 1})
    >>> count(mj.adapters.ia3(), models.family_of(module).specs())
    80
  """
  return sum(
    spec.size
    for path, spec in adapter.specs(base).items()
    if adapter.learns(path)
  )


def check_ids(
  batch: Mapping[str, Any], name: str, size: int, what: str, source: str
) -> None:
  """Raises if a batch in host memory has ids that nothing is there for.

  Args:
    batch: arrays in host memory.
    name: of `<int32>[batch]`.
    size: ids are from 0 to below it.
    what: they number: 'expert'.
    source: where the batch comes from.

  Raises:
    DataError: the ids are missing, or one is out of range.
  """
  if name not in batch:
    raise errors.DataError(
      f'{source}: a batch has {errors.some(sorted(batch), 10)}, but not '
      f'{name!r}, <int32>[batch], which says the {what} of every row.'
    )
  for value in (
    (batch[name].min(), batch[name].max()) if len(batch[name]) else ()
  ):
    if not 0 <= value < size:
      raise errors.DataError(
        f'{name} of {source} hold the number {value}, but there are {size} '
        f'{what}s, 0 to {size - 1}.'
      )


def check_number(what: str, number: int, size: int) -> None:
  """Raises a `ConfigError` unless a number is one of `size`, from 0."""
  if not 0 <= number < size:
    raise errors.ConfigError(
      f'There are the {what}s 0 to {size - 1}, not {number}.'
    )


def own_leaves(
  params: typing.Tree, specs: typing.SpecTree
) -> dict[typing.Path, typing.Array]:
  """The leaves of an adapter among parameters, `{path: array}`.

  Raises:
    StructureError: one is missing, or has another shape.
  """
  found = {p: leaf for p, leaf in tree.flatten(params).items() if p in specs}
  tree.check_same(
    specs, tree.specs(found),
    expected_name='the adapter', given_name='the given parameters',
  )  # fmt: skip
  return found
