# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Statistics of a model's behaviour on data: collected in one stream, saved.

A statistic is a sum over examples. Every device of the mesh axis `data` sums
its own examples; the sums meet once, when they are fetched. On the host they
are kept in float64, so a long stream loses nothing.
"""

from collections.abc import Callable, Iterable, Mapping
import os
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from mergejax import partition
from mergejax.checkpoints import fingerprints
from mergejax.core import errors
from mergejax.core import registry
from mergejax.core import statistic_specs
from mergejax.core import stop as stop_lib
from mergejax.core import typing
from mergejax.statistics import progress as progress_lib
from mergejax.statistics import saved


class MeasureFn(Protocol):
  """Measures one batch: `{path: {'sum': arrays, 'count': array}}`.

  Every array has a leading axis of `shards` parts of the batch, whose number in
  the stream is `number`. It raises if something asked for was not seen.
  """

  def __call__(
    self,
    module: nn.Module,
    params: typing.Tree,
    batch: Mapping[str, Any],
    number: Any,
    shards: int,
    /,
  ) -> dict[typing.Path, dict[str, Any]]: ...


class Statistic(NamedTuple):
  """A mean over examples of something a model does.

  Attributes:
    spec: its name and shape, which methods list in `Merge.needs`.
    measure: what one batch adds to the sums, see `MeasureFn`.
    whole: `sum -> array`, from what devices add up, without the axis of shards
      and fetched, to the sum itself.
    settings: what a reader of the file should know.
    functions: `{option: function of the caller, or None}`. Their source is part
      of what an interrupted collection must share with the one that continues
      it.
  """

  spec: statistic_specs.StatisticSpec
  measure: MeasureFn
  whole: Callable[[Any], np.ndarray] = lambda total: total
  settings: Mapping[str, Any] = {}
  functions: Mapping[str, Callable[..., Any] | None] = {}


def collect(
  statistic: Statistic,
  module: nn.Module,
  params: typing.Tree,
  batches: Iterable[Mapping[str, Any]],
  *,
  mesh: jax.sharding.Mesh | None = None,
  out: os.PathLike | str | None = None,
  save_every: int = 64,
  progress: Callable[[int], None] = lambda batches: None,
) -> saved.Statistics:
  """Collects a statistic of a model over batches, in evaluation mode.

  Args:
    statistic: `gram(...)`, `fisher(...)` or one of your own.
    module: the model.
    params: its parameters; left as they are.
    batches: dicts of arrays of equal shapes. `images` with `labels`, and
      `weights <float>[batch]` where rows are padding (0) or count in part; or
      text by seqio's names: `decoder_input_tokens`, `decoder_target_tokens`,
      `encoder_input_tokens` for encoder-decoders, `decoder_loss_weights`, and
      `decoder_segment_ids` (`encoder_segment_ids`) where rows hold several
      examples. With `gram(apply=...)` or `fisher(logits=...)` whatever these
      take, and `weights`.
    mesh: its axis `data` shares the rows of a batch, `model` the rows of Gram
      matrices; one device by default. Every process of several gives whole
      batches.
    out: where to save; also keeps what is done beside it, and the same call
      continues from there to the same bits. Positions are numbers of whole
      batches: on another mesh or number of processes a collection continues
      too, to the same numbers up to rounding.
    save_every: batches after which device sums (float32) are added to those of
      the host (float64), and progress is saved.
    progress: called with the number of batches done.

  Returns:
    The means and counts, with the model's fingerprint.

  Raises:
    UserError: a parameter asked for that was never seen at work, no batch at
      all or none with a real row, rows that do not divide over the mesh, sums
      that are not finite; a collection to be continued that was begun with
      another model, other settings or other data.

  Example:
    >>> from mergejax.statistics import gram
    >>> module, params = nn.Dense(1), {'kernel': jnp.ones((2, 1))}
    >>> params['bias'] = jnp.zeros(1)
    >>> means = collect(
    ...     gram(apply=lambda m, p, batch: m.apply(
    ...         {'params': p}, batch['x'], mutable=['intermediates'])[1]),
    ...     module, params, [{'x': jnp.array([[1.0, 2.0]])}])
    >>> means['kernel']['gram'].tolist()
    [[1.0, 2.0], [2.0, 4.0]]
  """
  mesh = mesh or partition.make_mesh(devices=jax.devices()[:1])
  shards = mesh.shape['data']
  fingerprint = fingerprints.fingerprint(params)
  settings = {'kind': statistic.spec.name, **statistic.settings}
  work = {**settings, 'model': fingerprint, **_sources(statistic)}
  journal = progress_lib.Progress(out, work)
  totals, done, aliases = journal.load()
  batches = journal.after(done, batches)
  params = jax.device_put(params, _param_layout(mesh, params))
  zeros: Callable[[], Any] = dict
  step = None

  @jax.jit
  def measure(params, batch, number):
    found = statistic.measure(module, params, batch, number, shards)
    unique, own = distinct(found)
    aliases.update(own)
    return unique

  def add(sums, params, batch, number):
    return jax.tree.map(jnp.add, sums, measure(params, batch, number))

  sums, number = None, done
  with stop_lib.StopRequest() as stop:
    for number, batch in enumerate(batches, done + 1):
      batch = _placed(mesh, batch)
      index = np.uint32(number - 1)
      if step is None:
        shapes = jax.eval_shape(measure, params, batch, index)
        layout = _sum_layout(mesh, statistic.spec, shapes)
        zeros = jax.jit(
          lambda shapes=shapes: jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), shapes
          ),
          out_shardings=layout,
        )
        step = jax.jit(add, donate_argnums=0, out_shardings=layout)
      sums = step(zeros() if sums is None else sums, params, batch, index)
      progress(number)
      if number % save_every == 0:
        totals, sums = _fetched(statistic, totals, sums), None
        journal.save(totals, number, aliases)
      # What came after the last save is not kept: sums are added up in the same
      # groups however often a collection is interrupted.
      stop.check(f'Stopped after {number} batches.')
  if sums is not None:
    totals = _fetched(statistic, totals, sums)
  if totals is None:
    raise errors.DataError('There was no batch to collect statistics from.')
  result = _means(
    statistic.spec, totals, aliases, fingerprint, settings, number
  )
  if out is not None and not jax.process_index():
    result.save(out)
  journal.forget()
  return result


def _sources(statistic):
  """sha256 of the code from outside the package that a statistic runs.

  The package's is a part of what every journal states.
  """
  digests = {
    f'source of {name}': registry.source_digest(function)
    for name, function in statistic.functions.items()
    if function is not None
  }
  if not statistic.measure.__module__.startswith('mergejax.'):
    digests['source'] = registry.source_digest(statistic.measure)
  return digests


def distinct(
  found: Mapping[typing.Path, Mapping[str, jax.Array]],
) -> tuple[dict[typing.Path, Any], dict[typing.Path, typing.Path]]:
  """What is different, and which parameter has the same as which.

  Query, key and value of a layer are given one input: its Gram matrix is summed
  once.

  Args:
    found: what a statistic measured, while tracing.

  Returns:
    `({path: measured}, {path: path of the same})`.
  """
  first: dict[int, typing.Path] = {}
  unique, aliases = {}, {}
  for path, own in found.items():
    leader = first.setdefault(id(jax.tree.leaves(own['sum'])[0]), path)
    if leader == path:
      unique[path] = own
    else:
      aliases[path] = leader
  return unique, aliases


def _param_layout(mesh, params):
  """Parameters stay where they are on this mesh, else go to all devices."""

  def of(leaf):
    layout = getattr(leaf, 'sharding', None)
    if isinstance(layout, NamedSharding) and layout.mesh == mesh:
      return layout
    return partition.replicated(mesh)

  return jax.tree.map(of, params)


def _placed(mesh, batch):
  """A batch with its rows spread over `data`."""
  shards = mesh.shape['data']
  rows = NamedSharding(mesh, PartitionSpec('data'))
  result = {}
  for name, leaf in batch.items():
    leaf = jnp.asarray(leaf)
    if leaf.ndim and leaf.shape[0] % shards:
      raise errors.DataError(
        f'{name} of a batch has {leaf.shape[0]} rows, which do not divide over '
        f'{shards} data slices of the mesh.'
      )
    result[name] = jax.device_put(
      leaf, rows if leaf.ndim else partition.replicated(mesh)
    )
  return result


def _sum_layout(mesh, spec, shapes):
  """One part a data slice; rows of a matrix over `model`."""

  def of(shape):
    parts = ['data'] + [None] * (len(shape.shape) - 1)
    if len(spec.sizes) == 2 and len(shape.shape) >= 3:
      if shape.shape[-2] % mesh.shape['model'] == 0:
        parts[-2] = 'model'
    return NamedSharding(mesh, PartitionSpec(*parts))

  return jax.tree.map(of, shapes)


def _fetched(statistic, totals, sums):
  """Totals in host float64 with the sums of all data slices added."""
  joined = jax.jit(
    lambda tree: jax.tree.map(lambda x: jnp.sum(x, axis=0), tree)
  )(sums)
  host = {}
  for path, own in partition.to_host(joined).items():
    host[f'{path}/sum'] = statistic.whole(own['sum']).astype(np.float64)
    host[f'{path}/count'] = own['count'].astype(np.float64)
  if totals is None:
    return host
  return {path: totals[path] + leaf for path, leaf in host.items()}


def _means(spec, totals, aliases, fingerprint, settings, batches):
  if not any(leaf.any() for n, leaf in totals.items() if n.endswith('/count')):
    raise errors.DataError(
      'No batch had a real row to collect statistics from: all weights are 0, or '
      'all tokens are padding.'
    )
  result, bad = {}, []
  paths = [name.rsplit('/', 1)[0] for name in totals]
  for path in sorted({*paths, *aliases}):
    leader = aliases.get(path, path)
    count = totals[f'{leader}/count']
    summed = totals[f'{leader}/sum']
    # Counts are sums of weights, which may stay below 1; 0 is an idle expert.
    known = np.where(count > 0, count, 1.0)
    mean = summed / known.reshape(
      known.shape + (1,) * (summed.ndim - known.ndim)
    )
    if not np.isfinite(mean).all():
      bad.append(path)
    result[path] = {spec.name: mean.astype(np.float32), 'count': count}
  if bad:
    raise errors.DataError(
      f'The {spec.name} statistics of these parameters are not finite; does the '
      'model give finite outputs on this data, and has it all of its tokens '
      f'and labels?\n{errors.listed(bad)}'
    )
  return saved.Statistics(
    result, spec, fingerprint, {**settings, 'batches': batches}
  )
