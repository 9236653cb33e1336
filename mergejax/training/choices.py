# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""T-Few: what is learned, and asked, where a row has several answers.

A batch has `choice_tokens <int32>[batch, choices, length]`, each ended by the
end token and padded with 0, and `labels <int32>[batch]`, which of them is
right. Rows with fewer choices than others say so: `choice_mask <bool>[batch,
choices]` is False where there is none. `batch_of` makes one.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.core import typing
from mergejax.training import losses

TOKENS, MASK, LABELS = 'choice_tokens', 'choice_mask', 'labels'
# Keeps the logarithm of 1 - p finite; T-Few's code.
_GUARD = 0.01


class Ranking(NamedTuple):
  """How likely a model takes the choices of every row to be.

  Attributes:
    scores: `<float32>[batch, choices]` nats, over `n^length_norm`; less is
      better, infinity where there is no choice.
    prediction: `<int32>[batch]`, the lowest; of equal ones the first.
    gold: `<float32>[batch]`, the score of the right choice.
    best_wrong: `<float32>[batch]`, the lowest of the others.
  """

  scores: jax.Array
  prediction: jax.Array
  gold: jax.Array
  best_wrong: jax.Array


def batch_of(
  inputs: typing.Array,
  choices: Sequence[Sequence[Sequence[int]]],
  labels: Sequence[int],
) -> dict[str, np.ndarray]:
  """A batch of rows with choices, of any number and length.

  Args:
    inputs: `<int32>[batch, length]`, padded with 0.
    choices: tokens of every choice of every row, each with its end token.
    labels: which choice of a row is right.

  Returns:
    A batch; its targets are the right choices, so that whoever knows nothing of
    choices takes it for one of an encoder-decoder.

  Raises:
    DataError: see `check`.

  Example:
    >>> batch = batch_of(np.ones((2, 3), np.int32), [[[5, 1], [6, 7, 1]],
    ...                                             [[8, 1]]], [1, 0])
    >>> batch['choice_mask'].tolist(), batch['decoder_target_tokens'].tolist()
    ([[True, True], [True, False]], [[6, 7, 1], [8, 1, 0]])
  """
  most = max((len(row) for row in choices), default=0)
  longest = max((len(each) for row in choices for each in row), default=0)
  tokens = np.zeros((len(choices), most, longest), np.int32)
  mask = np.zeros(tokens.shape[:2], np.bool_)
  for i, row in enumerate(choices):
    for k, each in enumerate(row):
      tokens[i, k, : len(each)] = each
      mask[i, k] = True
  found = {
    'encoder_input_tokens': np.asarray(inputs, np.int32),
    TOKENS: tokens, MASK: mask, LABELS: np.asarray(labels, np.int32),
  }  # fmt: skip
  check(found, 'the choices')
  gold = tokens[np.arange(len(tokens)), found[LABELS]]
  return {
    'decoder_input_tokens': np.pad(gold, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': gold,
    **found,
  }


def check(
  batch: Mapping[str, Any], source: str, vocab_size: int | None = None
) -> None:
  """Raises for a batch, in host memory, whose choices are not choices.

  Rows without a choice do not count, and are padding.

  Args:
    batch: see above.
    source: where it comes from.
    vocab_size: tokens are below it.

  Raises:
    DataError: a name that is missing, arrays of different rows, a choice
      without a token, a label that is no choice of its row, an unknown token.
  """
  missing = [name for name in (TOKENS, LABELS) if name not in batch]
  if missing:
    raise errors.DataError(
      f'A batch of {source} has {errors.some(sorted(batch), 10)}, but not '
      f'{" and ".join(missing)}: `training.choices.batch_of` makes one.'
    )
  rows = {name: len(x) for name, x in batch.items() if np.ndim(x)}
  if len({*rows.values()}) > 1:
    told = ', '.join(f'{name} {count}' for name, count in rows.items())
    raise errors.DataError(
      f'The arrays of a batch of {source} have different numbers of rows '
      f'({told}), but each row has inputs, choices and one label.'
    )
  tokens, labels = np.asarray(batch[TOKENS]), np.asarray(batch[LABELS])
  for token in (tokens.min(), tokens.max()) if tokens.size else ():
    if token < 0 or (vocab_size is not None and token >= vocab_size):
      raise errors.DataError(
        f'{TOKENS} of {source} hold the number {token}, but '
        + ('no token is below 0.' if vocab_size is None
           else f'the model knows 0 to {vocab_size - 1} only.')
      )  # fmt: skip
  mask = np.asarray(batch.get(MASK, np.ones(tokens.shape[:2], np.bool_)))
  bad = np.argwhere(mask & ~(tokens > 0).any(-1))
  if len(bad):
    row, k = map(int, bad[0])
    raise errors.DataError(
      f'Choice {k} of row {row} of {source} has no token: nothing can be its '
      f'likelihood. Where a row has fewer choices, say so with {MASK}.'
    )
  inside = (labels >= 0) & (labels < tokens.shape[1])
  own = mask[np.arange(len(labels)), np.where(inside, labels, 0)]
  bad = np.argwhere(mask.any(-1) & ~(inside & own))
  if len(bad):
    row = int(bad[0][0])
    raise errors.DataError(
      f'The label of row {row} of {source} is {labels[row]}, but the row has '
      f'{mask[row].sum()} choices, numbered from 0.'
    )


def _mask(batch):
  """`<bool>[batch, choices]`."""
  if batch.get(MASK) is not None:
    return jnp.asarray(batch[MASK])
  return jnp.ones(batch[TOKENS].shape[:2], jnp.bool_)


def _log_p(logits, tokens):
  """`log p` of tokens, `<float32>` of their shape."""
  nats, _ = losses.token_cross_entropy(logits, tokens)
  return -nats


def _scores(log_p, valid, mask, length_norm):
  """`nll / n^alpha` of every choice; infinity where there is none."""
  nats = -jnp.sum(jnp.where(valid, log_p, 0.0), axis=-1)
  lengths = jnp.sum(valid, axis=-1).astype(jnp.float32)
  # 1 to the power of anything is 1, with a gradient of 0 where nothing is.
  over = jnp.maximum(lengths, 1.0) ** length_norm
  return jnp.where(mask, nats / over, jnp.inf)


@dataclasses.dataclass(frozen=True)
class TFew:
  """See `t_few`; two with the same numbers are the same objective."""

  mc_loss: float
  unlikely_loss: float
  length_norm: float
  reference_compat: bool

  def check_batch(
    self, family: models.ModelFamily, batch: Mapping[str, Any], source: str
  ) -> None:
    """Raises for a batch that it cannot be computed of; see `check`."""
    check(batch, source, getattr(family.config, 'vocab_size', None))

  def __call__(self, family, params, batch, rngs):
    tokens, mask = jnp.asarray(batch[TOKENS]), _mask(batch)
    logits = family.choice_logits(
      family.variables(params), batch, tokens, train=True, rngs=rngs
    )
    log_p = _log_p(logits, tokens)
    valid = (tokens > 0) & mask[..., None]
    counts = jnp.any(mask, axis=-1)
    gold = jax.nn.one_hot(batch[LABELS], tokens.shape[1], dtype=jnp.bool_)
    gold = gold & counts[:, None]
    of_gold = (valid & gold[..., None]).astype(jnp.float32)
    lm = losses.weighted_mean(-log_p, of_gold)
    scores = _scores(log_p, valid, mask, self.length_norm)
    mc = _choice_loss(scores, gold, counts)
    wrong = (valid & ~gold[..., None]).astype(jnp.float32)
    unlikely = losses.weighted_mean(
      -jnp.log(1 + _GUARD - jnp.exp(log_p)), wrong
    )
    if self.reference_compat:
      included = jnp.sum(wrong)
      excluded = wrong.size - included
      unlikely -= math.log(1 + _GUARD) * excluded / jnp.maximum(included, 1.0)
    value = lm + self.mc_loss * mc + self.unlikely_loss * unlikely
    right = jnp.argmin(scores, axis=-1) == batch[LABELS]
    metrics = {
      'loss': value, 'lm_loss': lm, 'mc_loss': mc, 'unlikely_loss': unlikely,
      'accuracy': losses.weighted_mean(
        right.astype(jnp.float32), counts.astype(jnp.float32)
      ),
      'tokens': jnp.sum(of_gold),
    }  # fmt: skip
    pick = lambda x: jnp.take_along_axis(
      x, batch[LABELS].reshape(-1, *(1,) * (x.ndim - 1)), axis=1
    )[:, 0]
    outputs = models.Outputs(
      pick(logits), pick(tokens), jnp.sum(of_gold, axis=1), metrics=metrics
    )
    return value, outputs


def _choice_loss(scores, gold, counts):
  """Cross entropy of `softmax(-scores)` over the choices of a row, a mean."""
  # A row without choices has nothing but infinities: their gradient is NaN.
  logits = jnp.where(counts[:, None], -scores, 0.0)
  right = jnp.sum(jnp.where(gold, logits, 0.0), axis=-1)
  per_row = jax.nn.logsumexp(logits, axis=-1) - right
  return losses.weighted_mean(per_row, counts.astype(jnp.float32))


def t_few(
  *,
  mc_loss: float = 1.0,
  unlikely_loss: float = 1.0,
  length_norm: float = 1.0,
  reference_compat: bool = False,
) -> TFew:
  """T-Few's loss: `L = L_LM + mc_loss L_LN + unlikely_loss L_UL`.

  `L_LM`: nats per token of the right choices, over all of the batch. `L_LN`:
  the cross entropy of `softmax(-score)`, `score = nll / n^length_norm`, a mean
  over rows. `L_UL`: `-log(1.01 - p)`, a mean over all tokens of wrong choices.
  All in float32.

  Args:
    mc_loss: weight of the choice loss; the paper's 1.
    unlikely_loss: weight of the unlikelihood; the paper's 1.
    length_norm: power of the number of tokens, its end token counted; 1, a mean
      over tokens, as the paper; 0 sums.
    reference_compat: adds to `L_UL` what T-Few's code does: `-log 1.01` for
      every position that is none of a wrong choice, over the number of those
      that are. It is a constant, and has no gradient.

  Returns:
    An objective of batches with choices (see the module), with the metrics
    `loss lm_loss mc_loss unlikely_loss accuracy tokens`. Choices that
    `choice_mask` leaves out have no part. Of a batch worked through in parts
    each part counts by its right tokens.

  Raises:
    ConfigError: a weight below 0. A `DataError` for batches, see `check`.

  Example:
    >>> t_few(unlikely_loss=0.0).length_norm
    1.0

  Source: Liu et al. (2022), https://arxiv.org/abs/2205.05638, section 3.2. The
  0.01, which keeps the logarithm finite, stands in their code alone.
  """
  for name, value in (
    ('mc_loss', mc_loss), ('unlikely_loss', unlikely_loss),
    ('length_norm', length_norm),
  ):  # fmt: skip
    errors.check_number(name, value, 0)
  return TFew(mc_loss, unlikely_loss, length_norm, reference_compat)


def rank(
  model: nn.Module | models.ModelFamily,
  params: typing.Tree,
  batch: Mapping[str, Any],
  *,
  length_norm: float = 1.0,
  parts: int = 1,
) -> Ranking:
  """Rank classification: the choice with the lowest `nll / n^length_norm`.

  Traceable; in evaluation mode.

  Args:
    model: an encoder-decoder, or its family.
    params: of the model.
    batch: see the module.
    length_norm: as in training, see `t_few`.
    parts: in how many parts choices are scored, one after the other, to save
      memory; the scores stay the same.

  Returns:
    A `Ranking`; of rows that are padding the scores are infinity.
  """
  errors.check_whole('parts', parts)
  family = models.family_of(model)
  tokens, mask = jnp.asarray(batch[TOKENS]), _mask(batch)
  variables = family.variables(params)
  found = [
    _log_p(family.choice_logits(variables, batch, some), some)
    for some in jnp.array_split(tokens, min(parts, tokens.shape[1]), axis=1)
  ]
  log_p = jnp.concatenate(found, axis=1)
  scores = _scores(log_p, tokens > 0, mask, length_norm)
  gold = jax.nn.one_hot(batch[LABELS], tokens.shape[1], dtype=jnp.bool_)
  lowest = lambda which: jnp.min(jnp.where(which, scores, jnp.inf), axis=-1)
  prediction = jnp.argmin(scores, axis=-1).astype(jnp.int32)
  return Ranking(scores, prediction, lowest(gold), lowest(~gold))
