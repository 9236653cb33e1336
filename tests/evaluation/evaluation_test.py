# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0

import dataclasses
import pathlib
import warnings

from absl.testing import absltest
import jax
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.data import stream
from mergejax.data import tasks
from mergejax.evaluation import bits
from mergejax.evaluation import plots
from mergejax.evaluation import report
from mergejax.nn import lm


def score(value):
  return bits.Score(value, value - 0.1, value + 0.1)


TABLE = {
  'seed': {'a': score(3.0), 'b': score(3.0)},
  'expert a': {'a': score(1.0), 'b': score(4.0)},
  'expert b': {'a': score(4.0), 'b': score(1.0)},
  'dense': {'a': score(2.0), 'b': score(2.0)},
  'average': {'a': score(2.5), 'b': score(2.6)},
  'ensemble': {'a': score(1.1), 'b': score(1.1)},
}
ROLES = report.Roles(
    seed='seed', dense='dense', ensemble='ensemble',
    experts={'a': 'expert a', 'b': 'expert b'}, merges=('average',),
    best_merge='average',
)  # fmt: skip


class BitsTest(absltest.TestCase):
  def test_score_is_a_ratio_of_sums(self):
    lp = np.log(2) * -np.array([[1.0, 2.0, 0.0], [4.0, 0.0, 0.0]])
    found = bits.score(lp, np.array([2, 1]))
    self.assertAlmostEqual(found.bits_per_byte, 7 / 3)
    self.assertAlmostEqual(found.low, 1.5)
    self.assertAlmostEqual(found.high, 4.0)

  def test_the_interval_covers_the_truth(self):
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
      lp = -rng.gamma(2.0, 1.0, (60, 1)) * np.log(2)
      found = bits.score(lp, np.ones(60, int), resamples=300)
      covered += found.low <= 2.0 <= found.high
    self.assertBetween(covered, 85, 100)

  def test_bytes_are_counted_without_the_end_token(self):
    path = pathlib.Path(self.create_tempdir().full_path) / 't.txt'
    path.write_text('aé\nb\n')
    task = tasks.add_text_task('counted', {'test': path}, by_content=True)
    batches = stream.evaluation_batches(
      task.name, lengths={'targets': 4}, batch_size=3, split='test'
    )
    targets = np.array([[100, 198, 172, 1], [101, 1, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batches[0]['decoder_target_tokens'], targets)
    test_set = bits.make_test_set(batches)
    self.assertEqual(test_set.num_bytes.tolist(), [3, 1, 0])
    np.testing.assert_array_equal(test_set.mask, targets > 0)
    with self.assertRaisesRegex(errors.UserError, 'how many bytes'):
      bits.make_test_set([{'decoder_target_tokens': targets}])

  def test_the_interval_of_a_small_set_is_a_number(self):
    lp = np.zeros((8, 4))
    lp[0] = -np.log(2)  # one row of text, seven that fill the batch
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      found = bits.score(lp, np.array([4, 0, 0, 0, 0, 0, 0, 0]))
    self.assertEqual(dataclasses.astuple(found), (1.0, 1.0, 1.0))
    # A row of end tokens alone is paid for, and has no ratio of its own.
    lp[1, 0] = -np.log(2)
    with warnings.catch_warnings():
      warnings.simplefilter('error')
      found = bits.score(lp, np.array([4, 0, 0, 0, 0, 0, 0, 0]))
    self.assertAlmostEqual(found.bits_per_byte, 5 / 4)
    self.assertEqual(found.low, 1.0)
    self.assertAlmostEqual(found.high, 5 / 4)
    with self.assertRaisesRegex(errors.UserError, 'no example'):
      bits.score(np.zeros((8, 4)), np.zeros(8, int))

  def test_scorer_equals_log_softmax(self):
    module = lm.LanguageModel(
        lm.LMConfig(vocab_size=20, emb_dim=8, num_heads=2, head_dim=4,
                    num_layers=1, mlp_dim=16)
    )  # fmt: skip
    params = models.init_params(module, jax.random.key(0))
    targets = np.array([[5, 6, 7, 0]])
    batch = {
      'decoder_input_tokens': np.array([[0, 5, 6, 0]]),
      'decoder_target_tokens': targets,
    }
    test_set = bits.TestSet([batch], np.array([3]))
    found = bits.make_scorer(module)(params, test_set)
    logits = module.apply({'params': params}, *batch.values())
    expected = jax.nn.log_softmax(logits)[0, np.arange(4), targets[0]]
    np.testing.assert_allclose(found[0, :3], expected[:3], rtol=1e-5)
    self.assertEqual(found[0, 3], 0)


class ReportTest(absltest.TestCase):
  def test_everything_held(self):
    self.assertTrue(all(report.expectations(TABLE, ROLES).values()))

  def test_what_fails_is_said(self):
    worse = {
      **TABLE,
      'expert b': {'a': score(0.5), 'b': score(1.0)},
      'ensemble': {'a': score(2.1), 'b': score(2.1)},
      'average': {'a': score(3.1), 'b': score(3.1)},
    }
    self.assertEqual(
      list(report.expectations(worse, ROLES).values()), [False] * 3
    )

  def test_markdown_marks_the_best(self):
    text = report.to_markdown(TABLE)
    self.assertIn('**1.000 (0.900-1.100)**', text)
    self.assertIn('| ensemble | 1.100 (1.000-1.200) |', text)
    self.assertIn('**1.100** |', text)
    self.assertLen({line.count('|') for line in text.splitlines()}, 1)

  def test_advice_names_models(self):
    lines = report.advice(TABLE, ROLES)
    self.assertEqual(lines[0], 'a: expert a (1.000 bits per byte)')
    self.assertIn('dense (2.000)', lines[2])
    self.assertIn('average (2.550)', lines[3])
    self.assertIn('ensemble (1.100)', lines[4])

  def test_heatmap_is_a_picture(self):
    path = pathlib.Path(self.create_tempdir().full_path) / 'h.png'
    plots.heatmap(TABLE, 'seed', path)
    self.assertEqual(path.read_bytes()[:8], b'\x89PNG\r\n\x1a\n')


if __name__ == '__main__':
  absltest.main()
