# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tasks with several answers: what their batches hold, mixed with others."""

import pathlib
import tempfile

from absl.testing import absltest
import numpy as np
import seqio

from mergejax.core import errors
from mergejax.data import answers
from mergejax.data import mixtures
from mergejax.data import splits
from mergejax.data import stream
from mergejax.training import choices

LENGTHS = {'inputs': 16, 'targets': 6}
ROWS = [
  ('is it', 'y', 'who', 'ann', 'bob', '', 'B'),
  ('or not', 'n', 'where', 'here', 'yon', 'away', 'C'),
  ('so', 'y', 'when', 'now', '', '', 'A'),
]


def text(tokens):
  """Bytes of a row of tokens, up to the end token."""
  tokens = list(tokens)
  return bytes(t - 3 for t in tokens[: tokens.index(1)]).decode()


class AnswersTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    cls.file = cls.write('rows.tsv', ROWS)
    cls.named = cls.add('answers_named', cls.file, inputs='{claim}?',
                        choices={'y': 'Yes', 'n': 'No'}, label='{truth}')  # fmt: skip
    cls.own = cls.add('answers_own', cls.file, inputs='{ask}?',
                      choices={'A': '{a}', 'B': '{b}', 'C': '{c}'},
                      label='{letter}')  # fmt: skip
    cls.mixed = mixtures.add_mixture(
      'answers_mixed', ['answers_named', 'answers_own'], rates='equal'
    )

  @classmethod
  def tearDownClass(cls):
    seqio.MixtureRegistry.remove('answers_mixed')
    for name in ('answers_named', 'answers_own'):
      seqio.TaskRegistry.remove(name)
    super().tearDownClass()

  @classmethod
  def write(cls, name, rows):
    header = ['claim', 'truth', 'ask', 'a', 'b', 'c', 'letter']
    path = cls.folder / name
    path.write_text('\n'.join('\t'.join(row) for row in [header, *rows]))
    return path

  @staticmethod
  def add(name, file, **settings):
    return answers.add_choice_task(name, {'train': file}, **settings)

  def test_a_split(self):
    (batch,) = splits.batches(
      'answers_own', lengths=LENGTHS, batch_size=4, split='train',
      kind='encoder_decoder', choices=True,
    )  # fmt: skip
    self.assertEqual(batch['choice_tokens'].shape, (4, 3, 6))
    mask = batch['choice_mask']
    self.assertEqual(mask.dtype, np.bool_)
    self.assertEqual(mask.astype(int).tolist(),
                     [[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]])  # fmt: skip
    self.assertEqual(batch['labels'].tolist(), [1, 2, 0, 0])
    for row, given in enumerate(ROWS):
      self.assertEqual(text(batch['encoder_input_tokens'][row]), f'{given[2]}?')
      for k, there in enumerate(mask[row]):
        tokens = batch['choice_tokens'][row, k]
        if there:
          self.assertEqual(text(tokens), given[3 + k])
        else:
          self.assertFalse(tokens.any())
      gold = batch['choice_tokens'][row, batch['labels'][row]]
      np.testing.assert_array_equal(batch['decoder_target_tokens'][row], gold)
    choices.check(batch, 'the split', 259)

  def test_a_mixture_with_the_tasks_of_rows(self):
    opened = stream.SeqioStream(
      'answers_mixed', lengths=LENGTHS, batch_size=8, kind='encoder_decoder',
      pack=False, choices=True, row_ids=['task_ids'], seed=1,
    )  # fmt: skip
    batch = next(opened)
    self.assertEqual(set(batch['task_ids'].tolist()), {0, 1})
    self.assertEqual(batch['choice_tokens'].shape, (8, 3, 6))
    choices.check(batch, 'the mixture', 259)
    for row, task in enumerate(batch['task_ids']):
      if task == 0:
        self.assertEqual(batch['choice_mask'][row].tolist(), [1, 1, 0])
        told = [text(x) for x in batch['choice_tokens'][row, :2]]
        self.assertEqual(told, ['Yes', 'No'])
        claim = text(batch['encoder_input_tokens'][row])[:-1]
        truth = {each[0]: each[1] for each in ROWS}[claim]
        self.assertEqual(batch['labels'][row], 'yn'.index(truth))
    # Without choices it is a mixture like any.
    plain = stream.SeqioStream(
      'answers_mixed', lengths=LENGTHS, batch_size=8, kind='encoder_decoder',
      seed=1,
    )  # fmt: skip
    self.assertNotIn('choice_tokens', next(plain))

  def test_mistakes(self):
    def reads(name, rows, targets=6, **settings):
      settings = {'choices': ['y', 'n'], 'label': '{truth}', **settings}
      task = self.add(name, self.write(f'{name}.tsv', rows), inputs='{claim}',
                      by_content=True, **settings)  # fmt: skip
      self.addCleanup(seqio.TaskRegistry.remove, task.name)
      splits.batches(
        task.name, lengths={'inputs': 16, 'targets': targets}, batch_size=2,
        split='train', kind='encoder_decoder', choices=True,
      )  # fmt: skip

    with self.assertRaisesRegex(errors.DataError, 'at least two answers'):
      reads('answers_one', ROWS, choices=['y'])
    wrong = [(*ROWS[0][:1], 'maybe', *ROWS[0][2:])]
    with self.assertRaisesRegex(
      errors.DataError, r'has its label, which is maybe\.'
    ):
      reads('answers_label', wrong)
    with self.assertRaisesRegex(
      errors.DataError, r'does not fit into 4.*has 5\.'
    ):
      reads('answers_long', ROWS, 4, choices={'y': 'sure', 'n': 'no'})
    empty = {'A': '{a}', 'B': '{b}', 'C': '{c}'}
    nothing = [(*ROWS[2][:-1], 'B')]  # of the empty answer
    with self.assertRaisesRegex(errors.DataError, 'has its label.*B'):
      reads('answers_empty', nothing, choices=empty, label='{letter}')
    with self.assertRaisesRegex(errors.ConfigError, 'pack=False'):
      stream.SeqioStream('answers_own', lengths=LENGTHS, batch_size=2,
                         kind='encoder_decoder', choices=True)  # fmt: skip


if __name__ == '__main__':
  absltest.main()
