# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding against step by step argmax of full forward passes."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.evaluation import decode

SIZES = dict(vocab_size=12, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=8)
LENGTH = 7


def build(kind):
  layers = {'num_layers': 2}
  if kind == 't5x':
    layers = {'num_encoder_layers': 1, 'num_decoder_layers': 2}
  module = models.build(dict(model_type=kind, **SIZES, **layers))
  params = jax.jit(models.family_of(module).init)(jax.random.key(3))
  # Larger logits, so that answers differ from row to row.
  return module, jax.tree.map(lambda leaf: 4 * leaf, params)


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
      decode.greedy(module, {}, {'images': np.zeros((1, 2, 2, 1))}, length=2)


if __name__ == '__main__':
  absltest.main()
