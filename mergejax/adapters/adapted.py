# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A model with an adapter is a family, like that of the model.

Its parameters are those of the base, under their own names, and the adapter's
leaves beside them. The base does not learn: no gradient, no moment.
"""

from collections.abc import Mapping
import functools
from typing import Any

import flax.linen as nn
import jax

from mergejax import models
from mergejax.adapters import base as base_lib
from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import tree
from mergejax.core import typing


class Adapted(models.ModelFamily):
  """What `adapt` puts in front of a family; see there.

  Attributes:
    adapter: its description.
    plain: the family of the base.
    base_specs: of the base's parameters.
    adapter_specs: of the adapter's leaves.
  """

  adapter: base_lib.Adapter
  plain: models.ModelFamily
  base_specs: typing.SpecTree
  adapter_specs: typing.SpecTree

  @property
  def program_key(self):
    return super().program_key, self.adapter

  def learns(self, path):
    return path in self.adapter_specs and self.adapter.learns(path)

  @property
  def groups(self) -> dict[typing.Path, str]:
    """`{leaf that learns: 'adapter', or 'router' of what routes}`.

    For rates of their own, see `optim.by_group`: logits of `poly` route, and the
    sub-network of `attempt`.
    """
    learned = [path for path in self.adapter_specs if self.learns(path)]
    return {path: self.adapter.group(path) for path in learned}

  # Parameters ------------------------------------------------------------------

  def init(self, key):
    return self.start(super().init(key), jax.random.fold_in(key, 1))

  def start(self, params: typing.Tree, key: jax.Array) -> typing.Tree:
    """The base's parameters with fresh leaves of the adapter beside them."""
    fresh = self.adapter.init(self.base_specs, key, params)
    return self.joined(params, fresh)

  def joined(self, params: typing.Tree, adapter: typing.Tree) -> typing.Tree:
    """The base's parameters with an adapter's leaves beside them.

    Raises:
      StructureError: the leaves are not those of this adapter on this base.
    """
    base_lib.own_leaves(adapter, self.adapter_specs)
    return tree.unflatten({**tree.flatten(params), **tree.flatten(adapter)})

  def split(self, params: typing.Tree) -> tuple[typing.Tree, typing.Tree]:
    """`(the base's parameters, the adapter's leaves)`."""
    own = base_lib.own_leaves(params, self.adapter_specs)
    rest = {p: x for p, x in tree.flatten(params).items() if p not in own}
    return tree.unflatten(rest), tree.unflatten(own)

  def specs(self, shapes=None):
    if shapes is None:
      return {**self.base_specs, **self.adapter_specs}
    return {**super().specs(self.split(shapes)[0]), **self.adapter_specs}

  def stored_as(self, specs):
    # A base of another form has the adapter's leaves in that form too.
    plain = self.plain.stored_as(specs)
    return self if plain is self.plain else adapt(plain, self.adapter)

  def variables(self, params):
    found = super().variables(params)
    kept = lambda path, leaf: (
      leaf if path in self.adapter_specs else jax.lax.stop_gradient(leaf)
    )
    return {**found, 'params': tree.map_paths(kept, found['params'])}

  def updated(self, params, mutable):
    # Running statistics are the base's, and the base stays as it is.
    del mutable
    return params

  # Calling it ------------------------------------------------------------------

  def rng_streams(self, *, train):
    streams = super().rng_streams(train=train)
    own = self.adapter.rng_streams(train=train)
    return (*streams, *(name for name in own if name not in streams))

  def check_batch(self, batch, source='the data'):
    super().check_batch(batch, source)
    self.adapter.check_batch(batch, source)

  def call(self, variables, batch, *, train=False, rngs=None, mutable=()):
    at = self._at(variables['params'], batch, train=train)
    with self.adapter.at_work(at):
      logits, changed = super().call(
        variables, self.adapter.widened(at), train=train, rngs=rngs,
        mutable=mutable,
      )  # fmt: skip
    return self.adapter.narrowed(at, logits), changed

  def choice_logits(self, variables, batch, choices, *, train=False, rngs=None):
    at = self._at(variables['params'], batch, train=train)
    with self.adapter.at_work(at):
      return super().choice_logits(
        variables, self.adapter.widened(at), choices, train=train, rngs=rngs
      )

  def answer_logits(self, answers):
    plain = super().answer_logits(answers)

    def fn(params, batch):
      at = self._at(params, batch)
      with self.adapter.at_work(at):
        return plain(params, self.adapter.widened(at))

    return fn

  def init_cache(self, params, batch, length):
    at = self._at(params, batch, whole=False)
    length += self.adapter.ahead(at)
    plain = super().decode_step
    with self.adapter.at_work(at):
      cache = super().init_cache(params, self.adapter.widened(at), length)
      step = lambda cache, tokens: plain(params, cache, tokens)
      cache = self.adapter.begun(at, cache, step)
    return {**cache, **{name: batch[name] for name in self.adapter.reads}}

  def decode_step(self, params, cache, tokens):
    kept = {name: cache[name] for name in self.adapter.reads}
    inner = {name: x for name, x in cache.items() if name not in kept}
    with self.adapter.at_work(self._at(params, kept, whole=False)):
      logits, inner = super().decode_step(params, inner, tokens)
    return logits, {**inner, **kept}

  def cache_rows(self, path, leaf):
    # The numbers of rows of inputs: answers side by side share them.
    if path in self.adapter.reads:
      return None
    rows = super().cache_rows(path, leaf)
    # Layers of an adapter lie one by one where the base's are scanned, too.
    return 0 if rows is not None and '/layers_' in path else rows

  def _at(self, params, batch, *, train=False, whole=True):
    leaves = tree.flatten(params)
    missing = [path for path in self.adapter_specs if path not in leaves]
    if missing:
      raise errors.StructureError(
        'The parameters lack leaves of the adapter '
        f'({errors.some(missing)}): begin with `family.start(params, key)`, or '
        'put a stored adapter beside them with `family.joined(params, adapter)`.'
      )
    reads = self.adapter.reads
    # A compiled program cannot refuse what it is given.
    if reads and not any(numerics.is_traced(batch.get(n)) for n in reads):
      self.adapter.check_batch(batch, 'the batch')
    own = {path: leaves[path] for path in self.adapter_specs}
    return base_lib.Call(
      self.plain, self.base_specs, own, batch, train=train, whole=whole
    )


def adapt(
  model: nn.Module | models.ModelFamily, adapter: base_lib.Adapter
) -> Any:
  """The family of a model with an adapter; a drop-in for the model's own.

  The module, its source and its parameters' names stay as they are: calls are
  intercepted. With fresh leaves the logits are the base's, bit for bit.

  Args:
    model: a module that a family knows, or a family; for your own linen module
      `models.Classifier(module, example=batch)`, and `kernels=` of the adapter
      where its layers are not flax's.
    adapter: such as `lora()`.

  Returns:
    A `ModelFamily` with the methods of `Adapted`: `start`, `joined`, `split`.

  Raises:
    UserError: the adapter does not fit the model; it has one already.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> import mergejax as mj
    >>> module = models.build({'model_type': 'mlp', 'hidden': (4,)})
    >>> family = adapt(module, mj.adapters.lora(rank=2, targets='.*/kernel'))
    >>> base = models.family_of(module).init(jax.random.key(0))
    >>> params = family.start(base, jax.random.key(1))
    >>> batch = family.example_batch(8)
    >>> trained = mj.training.Trainer(family, optax.sgd(0.1)).fit(
    ...     [batch] * 2, steps=2, params=params)
    >>> kept, adapter = family.split(trained.params)
    >>> sorted(adapter['dense_0'])
    ['lora_a', 'lora_b']
  """
  family = models.family_of(model)
  if isinstance(family, Adapted):
    raise errors.ConfigError(
      'The model has an adapter already: fold that into its parameters first, '
      'or adapt the plain model.'
    )
  kind = _kind(type(family))
  adapted = kind.__new__(kind)
  adapted.__dict__.update(family.__dict__)
  adapted.adapter, adapted.plain = adapter, family
  adapted.base_specs = family.specs()
  adapted.adapter_specs = adapter.specs(adapted.base_specs)
  taken = [path for path in adapted.adapter_specs if path in adapted.base_specs]
  if taken:
    raise errors.StructureError(
      f'The base has parameters where the adapter has its own: '
      f'{errors.some(taken)}. It was adapted before: take the plain base.'
    )
  return adapted


@functools.cache
def _kind(family: type[models.ModelFamily]) -> type[Adapted]:
  """One class a family, so that two adapted models of it are of one type."""
  return type(f'Adapted{family.__name__}', (Adapted, family), {})


def fold(family: Adapted, params: Mapping[str, Any]) -> typing.Tree:
  """The base's parameters with the adapter in them, for the plain model.

  Args:
    family: from `adapt`.
    params: of the adapted model.

  Returns:
    Parameters of the base's names, shapes and dtypes; computed in float32 and
    cast once.

  Raises:
    ConfigError: no parameters of the base compute what the adapter does.
  """
  base, own = family.split(params)
  return family.adapter.fold(family.base_specs, base, own)
