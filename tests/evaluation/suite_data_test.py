# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The data of suites: nothing is cut, shared or sorted without a word."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import drawn
import numpy as np

from mergejax import models
from mergejax.core import errors
from mergejax.evaluation import metrics
from mergejax.evaluation import suite as suite_lib

ANSWERS = ('entailment_yes', 'entailment_no', 'entailment_maybe')


class SuiteDataTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def suite(self, rows, *, name='t', folder='a', task=(), **top):
    (self.folder / folder).mkdir(exist_ok=True)
    (self.folder / folder / 'test.tsv').write_text(
      's\tl\n' + ''.join(f'{s}\t{label}\n' for s, label in rows)
    )
    fields = {
      'files': str(self.folder / folder), 'inputs': '{s}', 'targets': '{l}',
      **dict(task),
    }  # fmt: skip
    return suite_lib.load({
        'tasks': {name: fields}, 'lengths': {'inputs': 24, 'targets': 17},
        'batch_size': 4, **top,
    })  # fmt: skip

  def answers(self, suite):
    rows = np.concatenate(
      [b['decoder_target_tokens'] for b in suite.batches('t', 'test')]
    )
    return {bytes(int(t) - 3 for t in r if t > 2).decode() for r in rows} - {''}

  def test_answers_are_never_cut(self):
    rows = [(f'row {i}', ANSWERS[i % 3]) for i in range(30)]
    self.assertEqual(self.answers(self.suite(rows)), set(ANSWERS))
    for room in (8, 16):  # 16 bytes of the longest need a token more
      suite = self.suite(rows, lengths={'targets': room})
      with self.assertRaisesRegex(
        errors.UserError,
        rf'of 30 targets of .*longer than {room} tokens.*at least 17 tokens',
      ):
        suite.batches('t', 'test')

  def test_a_very_long_answer_is_at_least_so_long(self):
    suite = self.suite([('x', 'y' * 200)], lengths={'targets': 4})
    with self.assertRaisesRegex(errors.UserError, '64 tokens or more'):
      suite.batches('t', 'test')

  def test_what_else_is_cut_is_told(self):
    rows = [('x' * (20 + i), 'y') for i in range(8)]
    with self.assertLogs(level='WARNING') as logs:
      self.suite(rows).batches('t', 'test')
    # 24 tokens hold 23 bytes and the end.
    self.assertRegex(logs.output[0], '4 of 8 inputs .* longer than 24 .*28 tok')
    targets = [('x', 'y' * 20)]
    with self.assertLogs(level='WARNING') as logs:
      self.suite(targets, task={'metric': 'loss'}).batches('t', 'test')
    self.assertRegex(logs.output[0], '1 of 1 targets .*and are cut.*21 tokens')
    with self.assertNoLogs(level='WARNING'):
      self.suite([('x', 'y')]).batches('t', 'test')

  @parameterized.parameters('t5x', 'lm')
  def test_tokens_that_a_model_does_not_have(self, kind):
    """Their logits are NaN: an accuracy of 0, or bits that are no number."""
    sizes = dict(emb_dim=4, num_heads=1, head_dim=4, mlp_dim=4)
    layers = {'num_layers': 1}
    if kind == 't5x':
      layers = {'num_encoder_layers': 1, 'num_decoder_layers': 1}
    suite = self.suite([('x', 'y')])
    if kind == 'lm':
      (self.folder / 'text.txt').write_text('x and y\n')
      suite = suite_lib.load(
        {'tasks': {'t': {'text': str(self.folder / 'text.txt')}}}
      )
    module = models.build(dict(model_type=kind, vocab_size=100, **sizes, **layers))  # fmt: skip
    params = drawn.params(models.family_of(module))
    message = rf'task t .* 12\d, but the {kind} model knows 0 to 99'
    with self.assertRaisesRegex(errors.UserError, message):
      suite.table([('m', module, params)])
    with self.assertRaisesRegex(errors.UserError, message):
      suite.evaluator(module, 'test')
    if kind == 'lm':
      batches = suite.batches('t', 'test')
      with self.assertRaisesRegex(errors.UserError, 'the test set'):
        metrics.make_scorer(module, 'bits_per_byte')(params, batches)

  def test_suites_do_not_share_tasks(self):
    first = self.suite([('x', 'one')], folder='a')
    second = self.suite([('x', 'two')], folder='b')
    third = self.suite([('x', 'one')], folder='a', task={'targets': 'is {l}'})
    self.assertEqual(self.answers(first), {'one'})
    self.assertEqual(self.answers(second), {'two'})
    self.assertEqual(self.answers(third), {'is one'})
    again = self.suite([('x', 'one')], folder='c')
    self.assertEqual(again.tasks['t'].source, first.tasks['t'].source)

  def test_data_is_read_before_the_first_model(self):
    suite = self.suite([('x', 'y' * 40)])

    def rows():
      raise AssertionError('a model was asked for')
      yield

    with self.assertRaisesRegex(errors.UserError, 'longer than 17 tokens'):
      suite.table(rows())

  def test_a_sample_is_of_the_whole_file(self):
    # Sorted by answer: whoever says one of them is right in half of the rows.
    rows = [(f'{i}', 'a' if i < 2500 else 'b') for i in range(5000)]
    suite = self.suite(rows, max_examples=100, lengths={'targets': 2})
    batches = suite.batches('t', 'test')
    share = np.mean(
      [b['decoder_target_tokens'][:, 0] == ord('a') + 3 for b in batches]
    )
    self.assertBetween(share, 0.5 - 4 * 0.05, 0.5 + 4 * 0.05)

  @parameterized.parameters(
    (dict(batch_size=0), 'batch_size must be a whole number of 1 or more'),
    (dict(batch_size='many'), 'batch_size must be a whole number of 1 or more'),
    (dict(max_examples=0), 'max_examples must be a whole number of 1 or more'),
    (dict(max_examples=-1), 'max_examples must be a whole number of 1 or more'),
    (dict(lengths={'targets': 0}), 'lengths: targets must be'),
    (dict(lengths={'target': 8}), "Did you mean 'targets'"),
    (dict(lengths=8), 'must be a mapping'),
  )
  def test_numbers_of_a_suite_are_checked(self, top, message):
    with self.assertRaisesRegex(errors.UserError, message):
      self.suite([('x', 'y')], **top)

  def test_lengths_have_defaults(self):
    batch = self.suite([('x', 'y')], lengths={'inputs': 8}).batches('t', 'test')
    self.assertEqual(batch[0]['encoder_input_tokens'].shape, (4, 8))
    self.assertEqual(batch[0]['decoder_target_tokens'].shape, (4, 64))

  def test_a_limit_of_nothing_is_refused(self):
    suite = self.suite([('x', 'y')])
    with self.assertRaisesRegex(errors.UserError, 'max_examples'):
      suite.batches('t', 'test', 0)

  def test_one_format_a_split(self):
    suite = self.suite([('x', 'y')])
    del suite
    (self.folder / 'a' / 'test.jsonl').write_text('{"s": "x", "l": "y"}\n')
    with self.assertRaisesRegex(errors.UserError, r'more than one test file'):
      self.suite([('x', 'y')])


if __name__ == '__main__':
  absltest.main()
