# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The diagonal Fisher information of a model's parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mergejax import models
from mergejax.core import errors
from mergejax.core import statistic_specs
from mergejax.core import tree as tree_lib
from mergejax.methods import base as merge_base
from mergejax.statistics import base

ESTIMATORS = ('exact', 'sampled', 'empirical')
# Token that ends a sampled answer: that of seqio's vocabularies.
_END = 1


def fisher(
  *,
  estimator: str = 'exact',
  samples: int = 1,
  per_token: bool = False,
  microbatch: int = 4,
  seed: int = 0,
  logits: Callable[..., jax.Array] | None = None,
) -> base.Statistic:
  """The statistic `F = mean over examples of E_y (d log p(y|x) / d theta)^2`.

  The square is that of one example, before any averaging. For sequences the
  example is the whole target: the gradient of its summed log-likelihood, each
  token as often as `decoder_loss_weights` says. Rows that hold several examples
  tell them apart by `decoder_segment_ids`. Images count as often as `weights`
  says: `F = sum_i w_i F_i / sum_i w_i`.

  Args:
    estimator: 'exact' weighs every class by its probability (classifiers, or
      any `logits` over a list of answers); 'sampled' draws labels from the
      model itself, token by token for encoder-decoders, and at every position
      given the text before it for language models; 'empirical' takes the data's
      labels, which is another quantity.
    samples: labels drawn per example by 'sampled'.
    per_token: square the gradient of each target token by itself, and sum.
    microbatch: examples whose gradients are in memory at once, each as large as
      the parameters. 1 is fastest for convolutions on a CPU.
    seed: of the sampled labels, keyed by batch and row, whatever the mesh.
    logits: `(params, batch) -> <float>[batch, (length,) classes]` for models
      that are called otherwise than their family does. See
      `T5Family.answer_logits` for answers of text-to-text models.

  Returns:
    A statistic for `collect`, whose result has `fisher <float32>[...]` of every
    floating parameter, running statistics excepted.

  Raises:
    UserError: an unknown estimator, numbers below 1, 'exact' over sequences,
      'exact' or sampled answers of an encoder-decoder over packed rows.

  Source: Matena and Raffel (2022), https://arxiv.org/abs/2111.09832, section
  3.2; the released code has 'exact' only.
  """
  merge_base.check_choice('estimator', estimator, ESTIMATORS)
  for name, value in (('samples', samples), ('microbatch', microbatch)):
    merge_base.check_option(name, value, lambda v: v >= 1, '1 or above')

  def measure(module, params, batch, number, shards):
    family = models.family_for(module, batch)
    fn = logits or family.logits
    beside = family.collections
    learned = {n: p for n, p in params.items() if n not in beside}
    fixed = {n: p for n, p in params.items() if n in beside}
    _check_packing(family, batch, estimator)
    share, counted = _examples(family, batch)
    key = jax.random.fold_in(jax.random.key(seed), number)
    rows = jnp.arange(len(share), dtype=jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)

    def one(example):
      return _squares(
          family, fn, learned, fixed, example['batch'], example['key'], estimator,
          samples, per_token,
      )  # fmt: skip

    def chunk(total, several):
      squares = jax.vmap(one)(several)

      def add(total, own):
        by = several['share'].reshape(-1, *(1,) * (own.ndim - 1))
        # What padding gives is arbitrary, even infinite.
        return total + jnp.sum(jnp.where(by > 0, by * own, 0.0), axis=0)

      return jax.tree.map(add, total, squares), None

    def shard(own):
      rows = own['share'].shape[0]
      size = max(n for n in range(1, min(microbatch, rows) + 1) if not rows % n)
      chunks = jax.tree.map(
        lambda x: x.reshape(rows // size, size, *x.shape[1:]), own
      )
      zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), learned)
      return jax.lax.scan(chunk, zeros, chunks)[0]

    split = lambda x: x.reshape(shards, -1, *x.shape[1:])
    examples = {'batch': dict(batch), 'key': keys, 'share': share}
    sums = jax.vmap(shard)(jax.tree.map(split, examples))
    count = jnp.sum(split(counted), axis=1)
    return {
      path: {'sum': leaf, 'count': count}
      for path, leaf in tree_lib.flatten(sums).items()
    }

  settings = {
    'estimator': estimator, 'samples': samples, 'per_token': per_token,
    'seed': seed,
  }  # fmt: skip
  return base.Statistic(
    statistic_specs.FISHER,
    measure,
    settings=settings,
    functions={'logits': logits},
  )


def _check_packing(family, batch, estimator):
  """Refuses what does not fit rows of several examples."""
  if family.segments(batch) is None:
    return
  if estimator == 'exact':
    raise errors.DataError(
      'The exact Fisher of a row with `decoder_segment_ids` is not that of its '
      'examples: give batches of one example a row, or another estimator.'
    )
  if estimator == 'sampled' and family.answers:
    raise errors.DataError(
      'Sampled answers may be longer than the places that packed rows '
      '(`decoder_segment_ids`) leave them: give batches of one example a row, '
      "or estimator='empirical'."
    )


def _examples(family, batch):
  """`(share, counted) <float32>[batch]` of each row.

  By the share its squares are multiplied; it counts as so many examples.
  """
  weights = family.target_weights(batch)
  if weights.ndim == 1:
    return weights, weights
  segments = family.segments(batch)
  if segments is None:
    real = jnp.max(weights, axis=1) > 0
    return (real.astype(jnp.float32),) * 2
  runs = jax.vmap(_runs)(segments)
  each = jax.vmap(
    lambda own, runs: jax.ops.segment_max(own, runs, own.shape[0])
  )(_segment_weights(segments, weights), runs)
  counted = jnp.sum((each > 0).astype(jnp.float32), axis=1)
  return (counted > 0).astype(jnp.float32), counted


def _runs(segments):
  """`<int32>[length]`, numbers of the examples of a packed row, from 0."""
  changes = (segments[1:] != segments[:-1]).astype(jnp.int32)
  return jnp.pad(jnp.cumsum(changes), (1, 0))


def _segment_weights(segments, weights):
  """Weights without what lies between and behind the examples of a row."""
  real = (jnp.asarray(segments) > 0).astype(weights.dtype)
  return weights * real


def _squares(
  family, fn, learned, fixed, example, key, estimator, samples, per_token
):
  """Squared gradients of one example, `{path: <float32>[...]}` nested."""
  batch = jax.tree.map(lambda x: x[None], example)
  segments = family.segments(batch)

  def scores(params, batch):
    wide = fn({**params, **fixed}, batch)[0].astype(jnp.float32)
    return jax.nn.log_softmax(wide)  # [(length,) classes]

  def pulled(batch):
    log_p, pull = jax.vjp(lambda params: scores(params, batch), learned)
    return log_p, lambda cotangent: pull(cotangent)[0]

  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), learned)
  if estimator == 'exact':
    return _over_classes(*pulled(batch), zeros)

  def of_labels(batch, labels, weights):
    """`labels` [(length)] with their weights."""
    log_p, pull = pulled(batch)
    picked = jax.nn.one_hot(labels, log_p.shape[-1], dtype=log_p.dtype)
    # A row of zeros would pass for a label that the model does not have.
    known = (labels >= 0) & (labels < log_p.shape[-1])
    picked = jnp.where(known[..., None], picked, jnp.nan) * weights[..., None]
    if log_p.ndim > 1 and per_token:
      parts = jnp.arange(len(weights), dtype=jnp.int32)
    elif log_p.ndim > 1 and segments is not None:
      parts = _runs(segments[0])
    else:
      return _square(pull(picked))

    def each_part(part, total):
      own = (parts == part).astype(picked.dtype)
      return _sum_up(total, _square(pull(picked * own[:, None])))

    return jax.lax.fori_loop(0, parts[-1] + 1, each_part, zeros)

  weights = family.target_weights(batch)
  if weights.ndim == 1:
    weights = jnp.ones_like(weights)  # an image's own multiplies its square
  if segments is not None:
    weights = _segment_weights(segments, weights)
  weights = weights[0]
  if estimator == 'empirical':
    labels = jnp.asarray(family.targets(batch), jnp.int32)[0]
    return of_labels(batch, labels, weights)

  def each_sample(total, key):
    if family.answers:
      drawn, labels, weighted = _answer(family, scores, learned, batch, key)
    else:
      drawn, weighted = batch, weights
      labels = jax.random.categorical(key, scores(learned, batch))
    return _sum_up(total, of_labels(drawn, labels, weighted)), None

  total, _ = jax.lax.scan(each_sample, zeros, jax.random.split(key, samples))
  return jax.tree.map(lambda s: s / samples, total)


def _square(gradient):
  return jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)), gradient)


def _sum_up(total: Any, own: Any, by: Any = 1.0) -> Any:
  return jax.tree.map(lambda t, o: t + by * o, total, own)


def _over_classes(log_p, pull, zeros):
  """Squares of every class, each by its probability."""
  if log_p.ndim > 1:
    raise errors.DataError(
      'The exact Fisher sums over all answers, and whole sequences are too '
      "many. Use estimator='sampled', or give the answers to choose from: "
      '`logits=models.family_of(module).answer_logits(answers)`.'
    )

  def each_class(total, label):
    cotangent = jax.nn.one_hot(label, log_p.size, dtype=log_p.dtype)
    return _sum_up(total, _square(pull(cotangent)), jnp.exp(log_p[label])), None

  return jax.lax.scan(each_class, zeros, jnp.arange(log_p.size))[0]


def _answer(family, scores, params, batch, key):
  """A target drawn token by token: `(batch, labels, weights)`."""
  given = family.targets(batch)[0]
  as_batch = lambda labels: family.with_targets(batch, labels[None])

  def extend(position, labels):
    log_p = scores(params, as_batch(labels))[position]
    token = jax.random.categorical(jax.random.fold_in(key, position), log_p)
    return labels.at[position].set(token.astype(labels.dtype))

  labels = jax.lax.fori_loop(0, len(given), extend, jnp.zeros_like(given))
  ends = (labels == _END).astype(jnp.int32)
  ended = jnp.cumsum(ends) - ends
  return as_batch(labels), labels, (ended == 0).astype(jnp.float32)
