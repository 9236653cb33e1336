# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0

import pathlib

from absl.testing import absltest

from mergejax.evaluation import base
from mergejax.evaluation import metrics
from mergejax.evaluation import plots
from mergejax.evaluation import report


def score(value):
  return base.Score(value, value - 0.1, value + 0.1, metrics.BITS_PER_BYTE)


ROWS = {
  'seed': {'a': score(3.0), 'b': score(3.0)},
  'expert a': {'a': score(1.0), 'b': score(4.0)},
  'expert b': {'a': score(4.0), 'b': score(1.0)},
  'dense': {'a': score(2.0), 'b': score(2.0)},
  'average': {'a': score(2.5), 'b': score(2.6)},
  'ensemble': {'a': score(1.1), 'b': score(1.1)},
}
TABLE = base.Table(ROWS)
ROLES = report.Roles(
    seed='seed', dense='dense', ensemble='ensemble',
    experts={'a': 'expert a', 'b': 'expert b'}, merges=('average',),
    best_merge='average',
)  # fmt: skip


class ReportTest(absltest.TestCase):
  def test_everything_held(self):
    self.assertTrue(all(report.expectations(TABLE, ROLES).values()))

  def test_what_fails_is_said(self):
    worse = base.Table(
      {
        **ROWS,
        'expert b': {'a': score(0.5), 'b': score(1.0)},
        'ensemble': {'a': score(2.1), 'b': score(2.1)},
        'average': {'a': score(3.1), 'b': score(3.1)},
      }
    )
    self.assertEqual(
      list(report.expectations(worse, ROLES).values()), [False] * 3
    )

  def test_equal_experts_are_not_the_best(self):
    alike = base.Table({**ROWS, 'expert b': ROWS['expert a']})
    at_home, *others = report.expectations(alike, ROLES).values()
    self.assertFalse(at_home)
    self.assertTrue(all(others))
    tied = base.Table({**ROWS, 'expert b': {'a': score(1.0), 'b': score(1.0)}})
    self.assertFalse(next(iter(report.expectations(tied, ROLES).values())))

  def test_markdown_marks_the_best(self):
    text = TABLE.to_markdown()
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
