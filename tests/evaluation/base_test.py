# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tables: means, directions, shares of experts, and what is written."""

import dataclasses
import pathlib

from absl.testing import absltest
import numpy as np

from mergejax.core import errors
from mergejax.evaluation import base
from mergejax.evaluation import metrics
from mergejax.evaluation import plots


class TableTest(absltest.TestCase):
  def table(self, x=metrics.ACCURACY):
    def score(value, metric=metrics.ACCURACY):
      return base.Score(value, value - 0.1, value + 0.1, metric)

    return base.Table({
      'base': {'x': score(0.3, x), 'y': score(0.4)},
      'expert x': {'x': score(0.6, x), 'y': score(0.2)},
      'merge': {'x': score(0.45, x), 'y': score(0.5)},
    })  # fmt: skip

  def test_bootstrap_covers_the_truth(self):
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(40):
      hits = (rng.random(200) < 0.7).astype(float)
      found = metrics.bootstrap(
        hits, np.ones(200), metrics.ACCURACY, resamples=200
      )
      inside += found.low <= 0.7 <= found.high
    self.assertGreater(inside, 32)
    with self.assertRaisesRegex(errors.UserError, 'no example'):
      metrics.bootstrap(np.zeros(0), np.zeros(0), metrics.ACCURACY)

  def test_normalised(self):
    over = self.table().normalised({'x': 'expert x'})
    self.assertAlmostEqual(over['merge']['x'].value, 0.75)
    self.assertEqual(over['expert x']['x'].value, 1.0)
    self.assertNotIn('y', over['merge'])
    with self.assertRaisesRegex(errors.UserError, "'expert x'"):
      self.table().normalised({'x': 'expert'})

  def test_normalised_losses(self):
    over = self.table(metrics.LOSS).normalised({'x': 'expert x'})
    # Half the loss of the expert is twice as good.
    self.assertAlmostEqual(over['base']['x'].value, 2.0)
    self.assertAlmostEqual(over['base']['x'].low, 0.6 / 0.4)
    self.assertAlmostEqual(over['base']['x'].high, 0.6 / 0.2)

  def test_no_mean_of_several_units(self):
    table = self.table(metrics.LOSS)
    self.assertNotIn('mean', table.numbers()['base'])
    self.assertNotIn('mean', table.to_json()['base'])
    self.assertNotIn('mean', table.to_markdown())
    with self.assertRaisesRegex(errors.StructureError, r'x \(loss\), y \(acc'):
      table.mean('base')

  def test_the_best_depends_on_the_direction(self):
    self.assertEqual(self.table().best('x'), 0.6)
    self.assertEqual(self.table(metrics.LOSS).best('x'), 0.3)
    self.assertIn('**0.300 (0.2', self.table(metrics.LOSS).to_markdown())
    self.assertEqual(self.table(metrics.LOSS)['base']['x'].goodness, -0.3)
    self.assertEqual(self.table()['base']['x'].goodness, 0.3)

  def test_rows_are_of_the_same_tasks(self):
    score = self.table()['base']['x']
    for row in ({'y': score}, {'x': dataclasses.replace(score, metric=metrics.LOSS)}):  # fmt: skip
      with self.assertRaisesRegex(errors.StructureError, 'row b of a table'):
        base.Table({'a': {'x': score}, 'b': row})

  def test_the_order_of_tasks_in_a_row_does_not_matter(self):
    rows = dict(self.table())
    rows['merge'] = dict(reversed(rows['merge'].items()))
    self.assertEqual(base.Table(rows).to_markdown(), self.table().to_markdown())

  def test_keys_of_files(self):
    """What is written is read by others: these names stay."""
    found = self.table().to_json()['base']
    self.assertEqual(list(found), ['mean', 'tasks'])
    self.assertEqual(list(found['tasks']['x']), ['value', 'low', 'high'])
    row = self.table().to_json(tasks='domains', value='bits_per_byte')['base']
    self.assertEqual(list(row), ['mean', 'domains'])
    self.assertEqual(
      list(row['domains']['x']), ['bits_per_byte', 'low', 'high']
    )

  def test_tables_and_plots(self):
    text = self.table().to_markdown()
    self.assertIn('**0.600 (0.500-0.700)**', text)
    self.assertIn('merge', self.table().to_text())
    self.assertAlmostEqual(self.table().to_json()['base']['mean'], 0.35)
    folder = self.create_tempdir().full_path
    for kind in ('heatmap', 'bar', 'radar'):
      path = pathlib.Path(folder) / f'{kind}.png'
      plots.table(self.table(), path, kind)
      self.assertGreater(path.stat().st_size, 1000)
    with self.assertRaisesRegex(errors.UserError, "Did you mean 'bar'"):
      plots.table(self.table(), path, 'bars')


if __name__ == '__main__':
  absltest.main()
