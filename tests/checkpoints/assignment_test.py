# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Partial restore by rules over names, and which step of a run is meant."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

import mergejax as mj
from mergejax.checkpoints import assignment
from mergejax.checkpoints import checkpoint
from mergejax.core import errors

NEW = ['encoder/w', 'encoder/b', 'decoder/w', 'head/w']
OLD = ['enc/w', 'encoder/b', 'decoder/w', 'tail/w']


class AssignTest(parameterized.TestCase):
  def test_first_full_match_wins_and_what_is_taken_is_gone(self):
    rules = [
      (r'encoder/(w)', r'enc/\1'),
      (r'head/w', 'decoder/w'),
      (r'(en|de)coder/.', None),
    ]
    found = assignment.assign(NEW, OLD, rules)
    self.assertEqual(list(found), NEW)
    self.assertEqual(
      found,
      {
        'encoder/w': 'enc/w', 'encoder/b': None, 'decoder/w': None,
        'head/w': 'decoder/w',
      },
    )  # fmt: skip
    # A part of a name is no match.
    found = assignment.assign(
      NEW, OLD, [('encoder/w', 'enc/w'), ('head.*', None)]
    )
    self.assertEqual(found['decoder/w'], 'decoder/w')
    self.assertEqual(found['encoder/b'], 'encoder/b')

  def test_a_name_that_a_rule_gave_away_is_not_copied_again(self):
    rules = [('head/w', 'decoder/w'), ('encoder/w', 'enc/w')]
    with self.assertRaisesRegex(
      errors.UserError, 'nothing for 1 of 4.*\n.*decoder/w'
    ):
      assignment.assign(NEW, OLD, rules)
    found = assignment.assign(NEW, OLD, rules, fallback_to_scratch=True)
    self.assertIsNone(found['decoder/w'])
    with self.assertRaisesRegex(errors.UserError, 'Nothing of .*\n.*enc/w'):
      assignment.assign(['other/w'], OLD, fallback_to_scratch=True)

  @parameterized.parameters(
    ([('encoder/w', 'enc/v')], "'enc/v'.*Did you mean 'enc/w'"),
    ([('w', 'enc/w')], 'match no parameter'),
    ([('encoder', None), ('.*/w', None)], 'match no parameter'),
    ([('.*/w', None), ('head/w', None)], 'earlier rule took:\n.*head/w'),
    ([('target/encoder/w', 'enc/w')], 'without "target/"'),
    ([('encoder/(', None)], 'not a regular expression'),
    ([('encoder/w', r'enc/\1')], 'group'),
    ([('encoder/w', r'enc/\g<layer>')], 'layer'),
    ([('encoder/w', 3)], r"\('encoder/w', 3\) is no such pair"),
    (('encoder/w', None), "list of pairs.*'encoder/w' is no such pair"),
    ([], 'nothing for 2 of 4'),
    ([('.*', None)], 'Nothing of the checkpoint would be used: all 4'),
  )
  def test_mistakes(self, rules, message):
    with self.assertRaisesRegex(errors.UserError, message):
      assignment.assign(NEW, OLD, rules)


class StepsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('checkpoint_{}', 't5x'),
    ('checkpoints/{}', 'orbax'),
    ('train/checkpoints/{}', 'orbax'),
  )
  def test_a_step_of_a_run(self, where, form):
    run = pathlib.Path(self.create_tempdir().full_path)
    for step in (0, 5, 10):
      place = run / where.format(step)
      place.parent.mkdir(parents=True, exist_ok=True)
      mj.save_checkpoint(place, {'w': np.full(2, step)}, form)
    (run / 'checkpoint_99.tmp-1').mkdir()
    value = lambda path: checkpoint.open_checkpoint(path).read()['w'][0]
    for step, expected in ((0, 0), (5, 5), (None, 10)):
      self.assertEqual(value(checkpoint.at_step(run, step)), expected)
    with self.assertRaisesRegex(errors.UserError, 'step 7: it has 0, 5, 10'):
      checkpoint.at_step(run, 7)
    alone = run / where.format(5)
    self.assertEqual(checkpoint.at_step(alone), alone)
    with self.assertRaisesRegex(errors.UserError, 'There is no checkpoint'):
      checkpoint.at_step(run / 'nowhere', 7)


if __name__ == '__main__':
  absltest.main()
