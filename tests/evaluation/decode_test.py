# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding against full forward passes, on one device and on several."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import tiers

from mergejax import models
from mergejax import partition
from mergejax.core import errors
from mergejax.evaluation import beam
from mergejax.evaluation import decode
from mergejax.evaluation import sampling

SIZES = dict(vocab_size=12, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=8)
LENGTH = 7


def build(kind, size=4, **changes):
  layers = {'num_layers': 2, **changes}
  if kind == 't5x':
    layers = {'num_encoder_layers': 1, 'num_decoder_layers': 2, **changes}
  module = models.build(dict(model_type=kind, **SIZES, **layers))
  params = jax.jit(models.family_of(module).init)(jax.random.key(3))
  # Larger logits, so that answers differ from row to row.
  return module, jax.tree.map(lambda leaf: size * leaf, params)


@functools.cache
def forward(module):
  family = models.family_of(module)
  return jax.jit(lambda params, batch: family.logits(params, batch))


def slowly(module, params, row, end=decode.END):
  """One answer, by a full forward pass of one padded row for every token."""
  prompt = [int(t) for t in row.get('prompt', ())]
  padded = lambda tokens: np.array([[*tokens, *[0] * (14 - len(tokens))]])
  said = []
  while len(said) < LENGTH:
    known = [*prompt, *said]
    batch = {
      'decoder_input_tokens': padded([0, *known]),
      'decoder_target_tokens': padded([*known, 1]),
    }
    if 'inputs' in row:
      batch['encoder_input_tokens'] = np.array([row['inputs']])
    if row.get('both_ways'):
      batch['decoder_causal_attention'] = padded([1] * (len(prompt) + 1))
    logits = np.asarray(forward(module)(params, batch))[0, len(known)]
    said.append(int(logits.argmax()))
    if said[-1] == end:
      break
  return said + [0] * (LENGTH - len(said))


def likelihood(module, params, inputs, prompt, said):
  """Log-likelihood of an answer, by a forward pass of one padded row."""
  known = [*prompt, *said] if inputs is None else said
  padded = lambda tokens: np.array([[*tokens, *[0] * (14 - len(tokens))]])
  batch = {
    'decoder_input_tokens': padded([0, *known[:-1]]),
    # Padding that is said counts as a token before the end.
    'decoder_target_tokens': padded(np.maximum(known, 1)),
  }
  if inputs is not None:
    batch['encoder_input_tokens'] = np.array([inputs])
  logits = np.asarray(forward(module)(params, batch), np.float64)[0]
  log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  first = len(known) - len(said)
  return sum(log_p[first + i, token] for i, token in enumerate(said))


def prefix_batch(prompts, width, both_ways):
  """As seqio's prefix features: the prompt, then a target of one token."""
  tokens = np.zeros((len(prompts), width), np.int32)
  weights = np.zeros_like(tokens)
  marks = np.zeros_like(tokens)
  for i, prompt in enumerate(prompts):
    tokens[i, : len(prompt) + 1] = [*prompt, 5]
    weights[i, len(prompt)] = 1
    marks[i, : len(prompt) + 1] = 1
  batch = {
    'decoder_input_tokens': np.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': tokens,
    'decoder_loss_weights': weights,
  }
  return {**batch, 'decoder_causal_attention': marks} if both_ways else batch


@tiers.slow('test_scores_.*1')
class DecodeTest(parameterized.TestCase):
  def test_an_encoder_decoder(self):
    module, params = build('t5x')
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, 12, (8, 6))
    inputs[::2, 4:] = 0
    expected = [
      slowly(module, params, {'inputs': row}, end=4) for row in inputs
    ]
    ends = [4 in row for row in expected]
    self.assertTrue(any(ends) and not all(ends), expected)
    found = decode.make_decoder(module, length=LENGTH, end=4)
    whole = found(params, {'encoder_input_tokens': inputs})
    np.testing.assert_array_equal(whole, expected)
    # No row depends on the others, or on how many there are.
    part = found(params, {'encoder_input_tokens': inputs[1:4]})
    np.testing.assert_array_equal(part, whole[1:4])

  @parameterized.parameters(False, True)
  def test_a_language_model_goes_on_after_its_prompt(self, both_ways):
    module, params = build('lm')
    prompts = [[7], [3, 9, 4, 1], [8, 2, 6], [9, 9, 5, 4, 2], [4], [11, 10]]
    batch = prefix_batch(prompts, 8, both_ways)
    expected = [
      slowly(module, params, {'prompt': prompt, 'both_ways': both_ways})
      for prompt in prompts
    ]
    self.assertGreater(len(set(map(tuple, expected))), 1)
    found = decode.make_decoder(module, length=LENGTH)(params, batch)
    np.testing.assert_array_equal(found, expected)
    alone = prefix_batch(prompts[2:3], 8, both_ways)
    np.testing.assert_array_equal(
      decode.make_decoder(module, length=LENGTH)(params, alone), expected[2:3]
    )

  @parameterized.parameters(('t5x', False), ('t5x', True), ('lm', False))
  def test_scores_are_those_of_full_forward_passes(self, kind, scan):
    """Of beams, which the cache follows from one place to another."""
    # Four times as large, an ulp of the weights moves a logit by 6e-4.
    module, params = build(kind, size=3, scan_layers=scan)
    rng, length = np.random.default_rng(1), 6
    inputs = rng.integers(2, 12, (5, 6))
    prompts = [[], [3, 9, 4, 1], [8, 2, 6], [9], [4]]
    batch = {'encoder_input_tokens': inputs}
    if kind == 'lm':
      batch = prefix_batch(prompts, 6, False)
    decoder = decode.make_decoder(
      module, length=length, end=4, method=beam.Beam(beams=3, alpha=1.0)
    )
    found = decoder.answers(params, batch)
    parts = set()
    for row, (answers, scores) in enumerate(zip(*found)):
      self.assertEqual(scores.tolist(), sorted(scores))
      self.assertLen(
        {tuple(said) for said in answers[scores > -np.inf]},
        np.sum(scores > -np.inf),
      )
      for said, score in zip(answers.tolist(), scores):
        if score == -np.inf:  # an empty place
          self.assertFalse(any(said))
          continue
        ended = 4 in said
        said = said[: said.index(4) + 1] if ended else said
        given = inputs[row] if kind == 't5x' else None
        log_p = likelihood(module, params, given, prompts[row], said)
        penalty = (5 + len(said)) / 6 if ended else 1.0
        self.assertAlmostEqual(score * penalty, log_p, places=4)
        parts.add((ended, len(said)))
    self.assertGreater(len(parts), 3)

  def test_on_a_mesh(self):
    """Rows over `data`, parameters over `model`."""
    module, params = build('t5x', num_decoder_layers=1)
    family = models.family_of(module)
    mesh = partition.make_mesh(data=4, model=2)
    axes = {path: spec.axes for path, spec in family.specs().items()}
    spread = jax.device_put(
      params, partition.shardings(mesh, params, axes, partition.standard())
    )
    self.assertFalse(
      spread['decoder']['layers_0']['mlp']['wo']['kernel'].is_fully_replicated
    )
    inputs = np.random.default_rng(2).integers(2, 12, (4, 6))
    batch = {'encoder_input_tokens': inputs}
    key = jax.random.key(0)
    for method in (beam.Beam(beams=3), sampling.Sample(top_k=5, samples=2)):
      named = dict(length=5, end=4, method=method)
      expected = decode.make_decoder(module, **named).answers(
        params, batch, key=key
      )
      found = decode.make_decoder(module, mesh=mesh, **named).answers(
        spread, batch, key=key
      )
      np.testing.assert_array_equal(found.tokens, expected.tokens)
      np.testing.assert_allclose(
        found.scores, expected.scores, rtol=1e-5, atol=1e-4
      )

  def test_rows_that_fill_a_batch_stay_empty(self):
    module, params = build('t5x')
    inputs = np.array([[4, 5, 6], [0, 0, 0], [7, 8, 9]])
    batch = {
      'encoder_input_tokens': inputs,
      'decoder_input_tokens': np.zeros((3, 2), np.int32),
      'decoder_target_tokens': np.array([[3, 1], [0, 0], [3, 1]]),
    }
    found = decode.make_decoder(module, length=LENGTH)(params, batch)
    self.assertEqual(found[1].tolist(), [0] * LENGTH)
    for row in (0, 2):
      expected = slowly(module, params, {'inputs': inputs[row]})
      self.assertEqual(found[row].tolist(), expected)
    module, params = build('lm')
    batch = prefix_batch([[3, 4], []], 4, False)
    batch['decoder_loss_weights'][1] = 0
    batch['decoder_target_tokens'][1] = 0
    found = decode.make_decoder(module, length=LENGTH)(params, batch)
    self.assertEqual(found[1].tolist(), [0] * LENGTH)
    self.assertEqual(
      found[0].tolist(), slowly(module, params, {'prompt': [3, 4]})
    )

  def test_one_program_a_shape(self):
    module, params = build('t5x')
    traced = []

    class Counted(type(models.family_of(module))):
      model_type = 'counted'

      def decode_step(self, *arguments):
        traced.append(1)
        return super().decode_step(*arguments)

    found = decode.make_decoder(Counted(module), length=3)
    found(params, {'encoder_input_tokens': np.array([[3, 4]])})
    count = len(traced)
    found(
      jax.tree.map(lambda leaf: -leaf, params),
      {'encoder_input_tokens': np.array([[5, 6]])},
    )
    self.assertLen(traced, count)

  def test_what_does_not_decode_is_told(self):
    module = models.build(
      dict(model_type='mlp', hidden=(4,), image_shape=(2, 2, 1), classes=2)
    )
    with self.assertRaisesRegex(errors.ConfigError, 'mlp models do not decode'):
      decode.make_decoder(module, length=2)(
        {}, {'images': np.zeros((1, 2, 2, 1))}
      )


if __name__ == '__main__':
  absltest.main()
