# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Draws against probabilities worked out in NumPy."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import small_decoders

from mergejax.core import errors
from mergejax.evaluation import decode
from mergejax.evaluation import sampling

END, LENGTH = 4, 5
PROMPTS = [[], [3, 2], [5], [2, 2, 5, 3], [5, 5, 5], [2]]


def by_loops(logits, temperature, top_k, top_p):
  """`<float64>[vocab]`: the probabilities that are drawn from."""
  weights = np.exp(np.float64(logits) / temperature)
  order = sorted(range(len(logits)), key=lambda i: (-weights[i], i))
  order = order[: top_k or len(order)]
  total = sum(weights[i] for i in order)
  left, before = [], 0.0
  for i in order:
    if before < top_p:
      left.append(i)
    before += weights[i] / total
  result = np.zeros(len(logits))
  result[left] = weights[left] / weights[left].sum()
  return result


@functools.cache
def decoder(**words):
  return decode.make_decoder(
    small_decoders.family(), length=LENGTH, end=END,
    method=decode.method_of(words),
  )  # fmt: skip


class SamplingTest(parameterized.TestCase):
  @parameterized.parameters(
    (1.0, 0, 1.0), (0.5, 3, 1.0), (2.0, 0, 0.7), (0.8, 4, 0.6), (1.0, 99, 0.01)
  )
  def test_draws_have_these_probabilities(self, temperature, top_k, top_p):
    method = sampling.Sample(temperature=temperature, top_k=top_k, top_p=top_p)
    rng = np.random.default_rng(int(10 * temperature))
    count = 4000
    choose = jax.jit(lambda x, keys: sampling.choose(x, keys, method))
    keys = jax.random.split(jax.random.key(3), count)
    for _ in range(3):
      logits = rng.normal(size=7).astype(np.float32) * 1.5
      logits[5] = logits[2]  # equal ones: the first of them is the likelier
      expected = by_loops(logits, temperature, top_k, top_p)
      drawn = np.asarray(choose(np.tile(logits, (count, 1)), keys))
      found = np.bincount(drawn, minlength=7) / count
      self.assertFalse(found[expected == 0].any())
      sigma = np.sqrt(expected * (1 - expected) / count)
      np.testing.assert_array_less(np.abs(found - expected), 4 * sigma + 1e-12)

  def test_no_cold_draw_is_a_draw(self):
    params, batch = small_decoders.table(), small_decoders.batch(PROMPTS)
    greedy = decoder()(params, batch)
    key = jax.random.key(0)
    for words in ({'temperature': 0, 'top_k': 2}, {'top_k': 1}):
      found = decoder(**words)(params, batch, key=key)
      np.testing.assert_array_equal(found, greedy)
    many = decoder(temperature=0, samples=2).answers(params, batch)
    np.testing.assert_array_equal(many.tokens[:, 0], greedy)
    np.testing.assert_array_equal(many.tokens[:, 1], greedy)

  def test_a_draw_depends_on_its_row_and_place_alone(self):
    params, key = small_decoders.table(scale=0.5), jax.random.key(7)
    batch = small_decoders.batch
    two = decoder(temperature=1.3, samples=2)
    whole = two.answers(params, batch(PROMPTS), key=key)
    again = two.answers(params, batch(PROMPTS), key=key)
    np.testing.assert_array_equal(again.tokens, whole.tokens)
    other = two.answers(params, batch(PROMPTS), key=jax.random.key(8))
    self.assertTrue((other.tokens != whole.tokens).any(axis=(1, 2)).all())
    self.assertTrue((whole.tokens[:, 0] != whole.tokens[:, 1]).any())
    # In another batch, of another width, among other rows.
    part = two.answers(
      params, batch([PROMPTS[4], PROMPTS[1]], 11), key=key, rows=[4, 1]
    )
    np.testing.assert_array_equal(part.tokens, whole.tokens[[4, 1]])
    # Equal rows are drawn for apart, and so are places.
    same = two.answers(params, batch([[5]] * 9), key=key).tokens
    self.assertGreater(len({tuple(row) for row in same.reshape(18, -1)}), 9)
    three = decoder(temperature=1.3, samples=3)
    found = three.answers(params, batch(PROMPTS), key=key)
    np.testing.assert_array_equal(found.tokens[:, :2], whole.tokens)
    np.testing.assert_array_equal(
      two(params, batch(PROMPTS), key=key), whole.tokens[:, 0]
    )

  def test_scores_are_log_likelihoods(self):
    params = small_decoders.table(seed=4)
    found = decoder(temperature=1.3, samples=2).answers(
      params, small_decoders.batch(PROMPTS), key=jax.random.key(1)
    )
    ended = 0
    for prompt, answers, scores in zip(PROMPTS, found.tokens, found.scores):
      for said, score in zip(answers.tolist(), scores):
        if END in said:
          self.assertFalse(any(said[said.index(END) + 1 :]))
          said = said[: said.index(END) + 1]
          ended += 1
        expected = small_decoders.log_likelihood(params, prompt, said)
        self.assertAlmostEqual(score, expected, places=4)
    self.assertBetween(ended, 1, 11)

  def test_mistakes(self):
    for words, said in (
      ({'temperature': -1}, 'temperature must be a number of 0 or more'),
      ({'temperature': float('nan')}, 'temperature must be a number'),
      ({'top_k': 2.5}, 'top_k must be a whole number of 0 or more, not 2.5'),
      ({'top_p': 0}, 'top_p must be a number above 0 and 1 at most, not 0'),
      ({'top_p': 1.1}, 'top_p must be'),
      ({'samples': 0}, 'samples must be'),
      ({'temprature': 1}, 'temperature'),
      ({'beams': 2, 'top_k': 3}, 'beams and top_k are of different ways'),
    ):
      with self.assertRaisesRegex(errors.ConfigError, said):
        decode.method_of(words)
    with self.assertRaisesRegex(errors.ConfigError, 'give a key'):
      decoder(top_k=2)(small_decoders.table(), small_decoders.batch([[2]]))


if __name__ == '__main__':
  absltest.main()
