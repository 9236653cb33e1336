# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Metrics of examples: ratios of sums, with intervals."""

import pathlib
import warnings

from absl.testing import absltest
import jax
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.data import tasks
from mergejax.evaluation import expert_table
from mergejax.evaluation import metrics
from mergejax.evaluation import suite as suite_lib
from mergejax.nn import lm


def bits_per_byte(log_likelihood, num_bytes, **options):
  return metrics.score(-log_likelihood, num_bytes, 'bits_per_byte', **options)


def tiny_model():
  module = lm.LanguageModel(
    lm.LMConfig(
      vocab_size=256, emb_dim=8, num_heads=2, head_dim=4, num_layers=1,
      mlp_dim=16,
    )
  )  # fmt: skip
  return module, models.family_of(module).init(jax.random.key(0))


class MetricsTest(absltest.TestCase):
  def test_score_is_a_ratio_of_sums(self):
    lp = np.log(2) * -np.array([[1.0, 2.0, 0.0], [4.0, 0.0, 0.0]])
    found = bits_per_byte(lp, np.array([2, 1]))
    self.assertAlmostEqual(found.value, 7 / 3)
    self.assertAlmostEqual(found.low, 1.5)
    self.assertAlmostEqual(found.high, 4.0)

  def test_the_interval_covers_the_truth(self):
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
      lp = -rng.gamma(2.0, 1.0, (60, 1)) * np.log(2)
      found = bits_per_byte(lp, np.ones(60, int), resamples=300)
      covered += found.low <= 2.0 <= found.high
    self.assertBetween(covered, 85, 100)

  def test_bytes_are_counted_without_the_end_token(self):
    path = pathlib.Path(self.create_tempdir().full_path) / 't.txt'
    path.write_text('aé\nb\n')
    task = tasks.add_text_task('counted', {'test': path}, by_content=True)
    suite = suite_lib.of_corpora({'t': task.name}, length=4, batch_size=3)
    batches = suite.batches('t', 'test')
    targets = np.array([[100, 198, 172, 1], [101, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batches[0]['decoder_target_tokens'], targets)
    self.assertEqual(batches[0]['num_bytes'].tolist(), [3, 1, 0])
    module, params = tiny_model()
    mask = expert_table.Scorer(module).mask(batches)
    np.testing.assert_array_equal(mask, targets > 0)
    del batches[0]['num_bytes']
    with self.assertRaisesRegex(errors.UserError, 'how many bytes'):
      metrics.make_scorer(module, 'bits_per_byte')(params, batches)

  def test_the_interval_of_a_small_set_is_a_number(self):
    lp = np.zeros((8, 4))
    lp[0] = -np.log(2)  # one row of text, seven that fill the batch
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      found = bits_per_byte(lp, np.array([4, 0, 0, 0, 0, 0, 0, 0]))
    self.assertEqual((found.value, found.low, found.high), (1.0, 1.0, 1.0))
    # A row of end tokens alone is paid for, and has no ratio of its own.
    lp[1, 0] = -np.log(2)
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      found = bits_per_byte(lp, np.array([4, 0, 0, 0, 0, 0, 0, 0]))
    self.assertAlmostEqual(found.value, 5 / 4)
    self.assertEqual(found.low, 1.0)
    self.assertAlmostEqual(found.high, 5 / 4)
    with self.assertRaisesRegex(errors.UserError, 'no example'):
      bits_per_byte(np.zeros((8, 4)), np.zeros(8, int))

  def test_scorer_equals_log_softmax(self):
    module, params = tiny_model()
    targets = np.array([[5, 6, 7, 0]])
    batch = {
      'decoder_input_tokens': np.array([[0, 5, 6, 0]]),
      'decoder_target_tokens': targets,
    }
    logits = module.apply({'params': params}, *batch.values())
    batch['num_bytes'] = np.array([3])
    found = expert_table.Scorer(module).log_likelihood(params, [batch])
    expected = jax.nn.log_softmax(logits)[0, np.arange(4), targets[0]]
    np.testing.assert_allclose(found[0, :3], expected[:3], rtol=1e-5)
    self.assertEqual(found[0, 3], 0)


if __name__ == '__main__':
  absltest.main()
