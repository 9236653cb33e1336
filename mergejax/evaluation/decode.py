# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model says: decoding through its family, compiled.

decode = decode_lib.make_decoder(module, length=32)
tokens = decode(params, batch)  # <int32>[batch, 32], 0 after the end token

decode = decode_lib.make_decoder(module, length=32, method=Beam(beams=4))
tokens, scores = decode.answers(params, batch)  # [batch, 4, 32], [batch, 4]
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from mergejax import models
from mergejax import partition
from mergejax.core import errors
from mergejax.core import typing
from mergejax.evaluation import beam
from mergejax.evaluation import positions
from mergejax.evaluation import sampling
from mergejax.training import batches

# The end token of seqio's vocabularies.
END = 1
GREEDY = sampling.Sample(temperature=0)

is_decoder_only = positions.is_decoder_only


class Answers(NamedTuple):
  """What a model says to a batch.

  Attributes:
    tokens: `<int32>[rows, answers, length]`, 0 after the end token.
    scores: `<float32>[rows, answers]`; see the method for what they are, and
      for the order of the answers.
  """

  tokens: np.ndarray
  scores: np.ndarray


class Decoder:
  """A model and a method, compiled once for every shape; see `make_decoder`.

  An encoder-decoder answers its `encoder_input_tokens`. A decoder-only model
  goes on after its prompt: the tokens of `decoder_target_tokens` with a weight
  of 0, as seqio's prefix features mark the inputs. A prompt that is seen in
  both directions (`decoder_causal_attention`) has no cache: it costs a forward
  pass of the whole row for every token. No row depends on another.
  """

  def __init__(self, family, length, end, method, mesh):
    self._family, self._mesh = family, mesh
    self.method = method

    def run(params, batch, key, rows, scored):
      ready = positions.prepare(
        family, params, batch, length=length, answers=method.answers
      )
      named = dict(end=end, key=key, rows=rows, scored=scored)
      tokens, scores = method.decode(ready, **named)
      return (tokens, scores) if scored else tokens[:, method.best]

    self._run = jax.jit(run, static_argnums=4)

  def __call__(
    self,
    params: typing.Tree,
    batch: Mapping[str, Any],
    *,
    key: jax.Array | None = None,
    rows: typing.Array | None = None,
  ) -> np.ndarray:
    """`<int32>[rows, length]`: of every row, the answer that stands for it.

    Answers have their end token, and 0 after it.

    Args:
      params: of the model.
      batch: what the family takes; targets may be missing. Rows without a
        target that counts only fill a batch and stay empty.
      key: what draws come from; for methods that draw.
      rows: `<int32>[rows]` numbers of the rows, which go into their draws; 0,
        1, ... by default. Rows of one data set, numbered through, have the same
        answers however they are put in batches.

    Raises:
      ConfigError: a model that does not decode, or draws without a key.
      DataError: rows that hold several examples.
    """
    return self._called(params, batch, key, rows, False)

  def answers(
    self,
    params: typing.Tree,
    batch: Mapping[str, Any],
    *,
    key: jax.Array | None = None,
    rows: typing.Array | None = None,
  ) -> Answers:
    """All answers to every row, with their scores; arguments as of a call."""
    return Answers(*self._called(params, batch, key, rows, True))

  def _called(self, params, batch, key, rows, scored):
    batch = dict(batch)
    if self._mesh is None:
      return jax.tree.map(
        np.asarray, self._run(params, batch, key, rows, scored)
      )
    batch = batches.on_mesh(self._mesh, batch)
    with partition.rules_of(self._mesh, partition.standard()):
      found = self._run(params, batch, key, rows, scored)
    return partition.to_host(found)


def make_decoder(
  model: nn.Module | models.ModelFamily,
  *,
  length: int,
  end: int = END,
  method: positions.Method = GREEDY,
  mesh: jax.sharding.Mesh | None = None,
) -> Decoder:
  """`(params, batch) -> tokens`, compiled once for every shape.

  Args:
    model: a module whose family decodes, or the family.
    length: most tokens of an answer, the end token included.
    end: the token after which an answer stops.
    method: `sampling.Sample` or `beam.Beam`; by default the most likely token,
      again and again.
    mesh: spreads the rows of a batch over `data`, where they divide; parameters
      stay where they are. By default nothing is moved.
  """
  errors.check_whole('length', length)
  return Decoder(models.family_of(model), length, end, method, mesh)


# Options of decoding, each with the kind of method that has it.
OPTIONS = {
  word.name: kind
  for kind in (sampling.Sample, beam.Beam)
  for word in dataclasses.fields(kind)
}


def method_and_seed(
  words: Mapping[str, Any],
) -> tuple[positions.Method, int]:
  """`method_of` options, among which may be the `seed` of draws.

  Raises:
    ConfigError: see `method_of`; or a seed of what does not draw.

  Example:
    >>> method_and_seed({'temperature': 0.7, 'seed': 3})[1]
    3
  """
  options = dict(words)
  seed = options.pop('seed', 0)
  errors.check_whole('seed', seed, least=0)
  method = method_of(options)
  if 'seed' in words and not method.draws:
    raise errors.ConfigError(
      'decoding: a seed is for what is drawn, at a temperature above 0. Leave '
      'it out.'
    )
  return method, seed


def method_of(words: Mapping[str, Any]) -> positions.Method:
  """A method from its options: `{'beams': 4, 'alpha': 0.6}`.

  Args:
    words: options of one method, each with its value; greedy without any.

  Raises:
    ConfigError: an unknown option, options of different methods, or a value out
      of its range.

  Example:
    >>> method_of({'temperature': 0.7, 'top_k': 40})
    Sample(temperature=0.7, top_k=40, top_p=1.0, samples=1)
  """
  for word in words:
    if word not in OPTIONS:
      raise errors.ConfigError(errors.near(word, OPTIONS, 'decoding option'))
  kinds = {OPTIONS[word]: word for word in words}
  if len(kinds) > 1:
    a, b = sorted(kinds.values())
    raise errors.ConfigError(
      f'{a} and {b} are of different ways to decode: a beam search (beams, '
      'alpha) finds the most likely answers, sampling (temperature, top_k, '
      'top_p, samples) draws them. Take one of the two.'
    )
  return next(iter(kinds), lambda: GREEDY)(**words)
