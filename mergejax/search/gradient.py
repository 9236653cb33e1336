# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Coefficients by gradient: learned soups and AdaMerging.

The gradient of a loss at `theta = theta_0 + sum_k w_k v_k` with respect to a
coefficient is an inner product, `dL/dw_k = <dL/dtheta, v_k>`. So one backward
pass at the merged point and K inner products, leaf by leaf, are enough: K
models are never on the device at once.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mergejax.checkpoints import base as store_base
from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import resume
from mergejax.core import stop as stop_lib
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.merging import in_memory
from mergejax.merging import streaming
from mergejax.methods import arithmetic
from mergejax.methods import base as merge_base
from mergejax.methods import mean
from mergejax.names import known
from mergejax.search import base

_HIGHEST = jax.lax.Precision.HIGHEST
# `sum_k w_k theta_k`, and `theta_0 + sum_k w_k (theta_k - theta_0)`.
_MIX = streaming.Stream(mean.linear(normalize=False))
_MIX_OF_DELTAS = streaming.Stream(arithmetic.task_arithmetic())


@dataclasses.dataclass(frozen=True)
class Learned:
  """Learned coefficients.

  Attributes:
    params: the merge.
    coefficients: `{group: <float>[K]}`, what multiplies each model.
    raw: the same before the constraint.
    temperature: what the logits were multiplied with.
    losses: before each update.
    metrics: what the loss told beside it, before each update.
  """

  params: typing.Tree
  coefficients: Mapping[str, np.ndarray]
  raw: Mapping[str, np.ndarray]
  temperature: float
  losses: tuple[float, ...]
  metrics: tuple[Mapping[str, float], ...]


def entropy(
  logits: typing.Array, weights: typing.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Mean entropy of predictions, `-sum p ln(p + 1e-8)`: AdaMerging's loss.

  Args:
    logits: <float>[batch, classes].
    weights: <float>[batch], 0 for rows that are padding; all 1 by default.

  Returns:
    `(<float32>[], metrics)`; `largest_class`, the share of the class that is
    predicted most, tells of a collapse: entropy is least where one class wins
    everywhere.
  """
  p = jax.nn.softmax(logits)
  if weights is None:
    weights = jnp.ones(p.shape[0], p.dtype)
  total = jnp.sum(weights)
  share = weights / jnp.where(total > 0, total, 1.0)
  p = jnp.where(share[:, None] > 0, p, 0.0)
  value = -jnp.vdot(share, jnp.sum(p * jnp.log(p + 1e-8), axis=-1))
  largest = jnp.max(jnp.einsum('b,bc->c', share, p))
  return value, {'largest_class': largest}


def learn(
  models: Sequence[typing.Tree | store_base.ParamStore],
  loss: Callable[..., Any],
  batches: Iterable[Any],
  *,
  base_model: typing.Tree | store_base.ParamStore | None = None,
  granularity: str | Callable[[typing.Path], str] = 'model',
  constraint: str = 'softmax',
  initial: float | None = None,
  temperature: bool = True,
  optimizer: optax.GradientTransformation | None = None,
  journal: os.PathLike | str | None = None,
  settings: Mapping[str, Any] | None = None,
  save_every: int = 20,
  progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Learned:
  """Learns coefficients of models by gradient descent on a loss.

  Without `base_model` a learned soup, `theta_l = sum_k softmax(a_l)_k
  theta_lk`; with it task arithmetic with learned scales, `theta_l = theta_l0 +
  sum_k a_lk (theta_lk - theta_l0)`, as AdaMerging. `l` runs over the groups of
  `granularity`.

  Args:
    models: trees or stores, K of them. Of stores, and of host arrays, one leaf
      of one model is on the device at a time; sharded leaves stay sharded.
    loss: `(params, batch, temperature) -> number`, or `(number, metrics)`;
      differentiated with respect to params and temperature, which multiplies
      the logits.
    batches: one an update; their number is that of the updates.
    base_model: the common ancestor, for task vectors.
    granularity: 'model' has one coefficient a model, 'block' one for each layer
      (see `search.base.blocks_of`), 'leaf' one for each array (the released
      "by layer"), or a function from path to group. Layers must not be stacked
      in one array for 'block' and 'leaf'; stores that tell axes are checked.
    constraint: 'softmax' keeps the coefficients of a group on the simplex,
      'none' leaves them free, 'clip' cuts them to [0, 1].
    initial: first value of every coefficient before the constraint; by default
      1 / K, and 0.3 with a base (AdaMerging).
    temperature: learn one temperature of the logits as well, from 1.
    optimizer: AdamW with rate 0.05 by default (learned soups); AdaMerging uses
      `optax.adam(1e-3)`.
    journal: a file that keeps what is done; the same call continues from it.
    settings: what else must be the same for a journal to be continued: names
      of models, batches, optimizer.
    save_every: updates between two saves of the journal.
    progress: called with the updates done and the loss.

  Returns:
    Coefficients and their merge.

  Raises:
    UserError: no model, models that differ, a loss that is not finite, a
      journal of something else.
    errors.Stopped: SIGTERM came; the journal has every update so far.

  Source: Wortsman et al. (2022), https://arxiv.org/abs/2203.05482, appendix I;
  Yang et al., "AdaMerging" (2024), https://arxiv.org/abs/2310.02575.
  """
  merge_base.check_choice('constraint', constraint, tuple(_CONSTRAINTS))
  if not models:
    raise errors.ConfigError('There must be at least one model to mix.')
  mixer = _Mixer(models, base_model, granularity)
  if initial is None:
    initial = 1 / len(models) if base_model is None else 0.3
  optimizer = optimizer or optax.adamw(0.05, weight_decay=0.0)
  wide = numerics.accumulation_dtype(mixer.dtype)
  raw = {g: jnp.full(len(models), initial, wide) for g in mixer.groups}
  variables = {'raw': raw, 'temperature': jnp.ones((), wide)}
  state = optimizer.init(variables)

  constrained = _CONSTRAINTS[constraint]
  backward = _backward(loss)
  update = _update(optimizer, constrained, temperature)

  about = {'constraint': constraint, 'initial': initial, **(settings or {})}
  record = resume.Journal(
    journal, 'gradient', {'groups': mixer.groups, **about}
  )
  losses, metrics = [], []
  found = record.load()
  if found is not None:
    variables, state = _restored((variables, state), found[0])
    losses, metrics = found[1]['losses'], found[1]['metrics']
  done = len(losses)
  with stop_lib.StopRequest() as stop:
    for i, batch in enumerate(batches):
      if i < done:
        continue
      params = mixer.mix(constrained(variables['raw']))
      (value, told), (gradient, by_temperature) = backward(
        params, variables['temperature'], batch
      )
      value = float(value)
      if not np.isfinite(value):
        raise errors.DataError(
          f'The loss of update {i} is {value}. Check the models and the batch, '
          'or lower the learning rate.'
        )
      products = mixer.products(gradient)
      del params, gradient
      variables, state = update(variables, state, products, by_temperature)
      losses.append(value)
      metrics.append({name: float(metric) for name, metric in told.items()})
      progress(len(losses), value)
      if stop.received or len(losses) % save_every == 0:
        _save(record, (variables, state), losses, metrics)
      stop.check(f'Stopped after {len(losses)} updates.')
  coefficients = constrained(variables['raw'])
  params = mixer.mix(coefficients)
  record.forget()
  return Learned(
    params,
    jax.device_get(coefficients),
    jax.device_get(variables['raw']),
    float(variables['temperature']),
    tuple(losses),
    tuple(metrics),
  )


def folded(head: typing.Tree, temperature: float) -> typing.Tree:
  """A head (kernel and bias) that multiplies its logits by a temperature.

  Example:
    >>> folded({'kernel': jnp.ones(1)}, 2.0)
    {'kernel': Array([2.], dtype=float32)}
  """
  return jax.tree.map(
    lambda leaf: leaf * jnp.asarray(temperature, leaf.dtype), head
  )


_CONSTRAINTS = {
  'softmax': lambda raw: jax.tree.map(jax.nn.softmax, raw),
  'none': lambda raw: raw,
  'clip': lambda raw: jax.tree.map(lambda a: jnp.clip(a, 0.0, 1.0), raw),
}


def _backward(loss):
  """`(params, temperature, batch) -> ((loss, metrics), gradients)`."""

  def with_metrics(params, temperature, batch):
    result = loss(params, batch, temperature)
    return result if isinstance(result, tuple) else (result, {})

  return jax.jit(jax.value_and_grad(with_metrics, argnums=(0, 1), has_aux=True))


def _update(optimizer, constrained, learn_temperature):
  """A step of the optimizer from the products of the gradient, compiled."""

  @jax.jit
  def update(variables, state, products, by_temperature):
    _, pull = jax.vjp(constrained, variables['raw'])
    if not learn_temperature:
      by_temperature = jnp.zeros_like(by_temperature)
    gradient = {'raw': pull(products)[0], 'temperature': by_temperature}
    # optax counts in integers and multiplies them with floats.
    with jax.numpy_dtype_promotion('standard'):
      steps, state = optimizer.update(gradient, state, variables)
      return optax.apply_updates(variables, steps), state

  return update


@jax.jit
def _product(gradient, leaf, origin):
  """`<gradient, leaf - origin>`."""
  wide = numerics.widen(leaf)
  if origin is not None:
    wide = wide - numerics.widen(origin)
  return jnp.vdot(gradient.astype(wide.dtype), wide, precision=_HIGHEST)


# The group of a leaf, by granularity.
_GROUPS: dict[str, Callable[[typing.Path], str]] = {
  'model': lambda path: '*',
  'block': lambda path: known.block_of(path) or '*',
  'leaf': lambda path: path,
}


class _Mixer:
  """Models as vectors: their mix, and their products with a gradient."""

  def __init__(self, models, base_model, granularity):
    self._sources = [in_memory.Source(m, f'model {i}') for i, m in enumerate(models)]  # fmt: skip
    self._base = None
    if base_model is not None:
      self._base = in_memory.Source(base_model, 'the base')
    first = self._base or self._sources[0]
    for source in self._sources:
      tree_lib.check_same(
        first.specs, source.specs,
        expected_name=first.name, given_name=source.name,
      )  # fmt: skip
    self._first = first
    self._mixed = [
      p for p, s in first.specs.items() if numerics.is_averaged(s.dtype)
    ]
    if not self._mixed:
      raise errors.StructureError(
        'These models have no floating parameters to mix.'
      )
    self.dtype = max(
      (first.specs[p].dtype for p in self._mixed), key=lambda d: d.itemsize
    )
    if granularity in ('block', 'leaf'):
      for source in (first, *self._sources):
        base.check_unstacked(source.specs)
    if callable(granularity):
      group_of = granularity
    else:
      merge_base.check_choice('granularity', granularity, tuple(_GROUPS))
      group_of = _GROUPS[granularity]
    self._group = {path: group_of(path) for path in self._mixed}
    self.groups = list(dict.fromkeys(self._group.values()))

  def _origin(self, path):
    return None if self._base is None else self._base.leaf(path)

  def mix(self, coefficients):
    """The merged tree, in the dtypes of the first model."""
    leaves = {}
    for path, spec in self._first.specs.items():
      origin = self._origin(path)
      if path not in self._group:
        leaf = self._first.leaf(path)
      else:
        weights = coefficients[self._group[path]]
        stream, state = _MIX if origin is None else _MIX_OF_DELTAS, None
        for k, source in enumerate(self._sources):
          state = stream.add(state, source.leaf(path), weights[k], origin)
        leaf = stream.result(state, spec.dtype, origin)
      leaves[path] = leaf
    if self._first.structure is not None:
      return jax.tree.unflatten(self._first.structure, list(leaves.values()))
    return tree_lib.unflatten(leaves)

  def products(self, gradient):
    """`{group: <float>[K]}`: sums over the group's leaves."""
    gradient = tree_lib.flatten(gradient)
    sums = {}
    for path in self._mixed:
      origin = self._origin(path)
      products = jnp.stack([
        _product(gradient[path], source.leaf(path), origin)
        for source in self._sources
      ])  # fmt: skip
      group = self._group[path]
      wide = products.astype(numerics.accumulation_dtype(self.dtype))
      sums[group] = wide if group not in sums else sums[group] + wide
    return sums


def _restored(fresh, arrays):
  """Coefficients and optimizer state as a journal holds them."""
  leaves, structure = jax.tree.flatten(fresh)
  saved = [
    jnp.asarray(arrays[str(i)].astype(leaf.dtype))
    for i, leaf in enumerate(leaves)
  ]
  return jax.tree.unflatten(structure, saved)


def _save(journal, kept, losses, metrics):
  # float64 holds every number of the optimizer exactly, and NumPy has it.
  arrays = {
    str(i): np.asarray(leaf, np.float64)
    for i, leaf in enumerate(jax.tree.leaves(kept))
  }
  journal.save(arrays, {'losses': losses, 'metrics': metrics})
