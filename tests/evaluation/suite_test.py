# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Suites: text tasks, mixtures, tables, and what is refused."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import drawn
import jax
import numpy as np
import seqio

from mergejax import models
from mergejax.core import errors
from mergejax.data import tasks
from mergejax.evaluation import expert_table
from mergejax.evaluation import metrics
from mergejax.evaluation import suite as suite_lib

SIZES = dict(vocab_size=384, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=8)


def greedy(module, params, inputs, length):
  """Whole answers by greedy decoding, one token a pass, without a cache."""
  answer = np.zeros((len(inputs), length), np.int32)
  logits = jax.jit(lambda p, b: models.family_of(module).logits(p, b))
  for t in range(length):
    batch = {
      'encoder_input_tokens': inputs,
      'decoder_input_tokens': np.pad(answer, ((0, 0), (1, 0)))[:, :-1],
      'decoder_target_tokens': np.ones_like(answer),
    }
    answer[:, t] = np.asarray(logits(params, batch))[:, t].argmax(axis=-1)
  return answer


class SuiteTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    rows = [('good food', 'a'), ('bad film', 'b'), ('fine', 'a'), ('poor', 'b')]
    for split in ('train', 'validation', 'test'):
      (self.folder / f'{split}.tsv').write_text(
        'text\tlabel\n' + ''.join(f'{t} {split}\t{y}\n' for t, y in rows)
      )
    self.corpus = self.folder / 'corpus.txt'
    self.corpus.write_text('some words of text\nand a second line\n')

  def suite(self, **task):
    fields = {
      'files': str(self.folder), 'inputs': 'mood: {text}', 'targets': '{label}',
      **task,
    }  # fmt: skip
    fields = {n: v for n, v in fields.items() if v is not None}
    return suite_lib.load({
        'tasks': {'mood': fields}, 'lengths': {'inputs': 32, 'targets': 4},
        'batch_size': 3,
    })  # fmt: skip

  def test_accuracy_is_that_of_greedy_decoding(self):
    module = models.build(
      dict(
        model_type='t5x', num_encoder_layers=1, num_decoder_layers=1, **SIZES
      )
    )
    params = drawn.params(models.family_of(module))
    inputs = np.random.default_rng(0).integers(3, 250, (4, 6))
    said = greedy(module, params, inputs, 3)
    self.assertTrue((said > 0).all())
    targets = said.copy()
    targets[1, 2] += 1  # the last token differs
    targets[2, 0] += 1  # the first one does
    targets[3, 1:] = 0  # padding is not asked for
    batch = {
      'encoder_input_tokens': inputs,
      'decoder_target_tokens': targets,
      'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    }
    up, down = metrics.example_scores(module, params, batch, 'accuracy')
    np.testing.assert_array_equal(up, [1, 0, 0, 1])
    np.testing.assert_array_equal(down, [1, 1, 1, 1])

  def test_filled_rows_do_not_count(self):
    suite = self.suite()
    module = models.build(
      dict(
        model_type='t5x', num_encoder_layers=1, num_decoder_layers=1, **SIZES
      )
    )
    params = drawn.params(models.family_of(module))
    batches = suite.batches('mood', 'test')
    self.assertEqual([len(b['decoder_target_tokens']) for b in batches], [3, 3])
    pairs = [
      metrics.example_scores(module, params, b, 'accuracy') for b in batches
    ]
    self.assertEqual(sum(float(down.sum()) for _, down in pairs), 4)
    found = suite.table([('m', module, params)])['m']['mood']
    compiled = suite.evaluator(module, 'test')
    self.assertAlmostEqual(float(compiled(params)['mood']), found.value)

  def test_bits_per_byte_are_those_of_the_corpora(self):
    suite = suite_lib.load({
        'tasks': {'words': {'text': str(self.corpus)}},
        'lengths': {'targets': 16}, 'batch_size': 1,
    })  # fmt: skip
    module = models.build(dict(model_type='lm', num_layers=1, **SIZES))
    params = drawn.params(models.family_of(module))
    found = suite.table([('m', module, params)])['m']['words']
    batches = suite.batches('words', 'test')
    scorer = expert_table.Scorer(module)
    expected = expert_table.score(
      scorer.log_likelihood(params, batches), batches
    )
    self.assertAlmostEqual(found.value, expected.value, places=4)
    compiled = suite.evaluator(module, 'test')
    self.assertAlmostEqual(
      float(compiled(params)['words']), -found.value, places=4
    )

  def test_mixtures_of_seqio(self):
    task = tasks.add_table_task(
        'mood_of_mixture', {'test': self.folder / 'test.tsv'},
        inputs='mood: {text}', targets='{label}',
    )  # fmt: skip
    self.addCleanup(seqio.TaskRegistry.remove, task.name)
    seqio.MixtureRegistry.add('moods_for_test', [(task.name, 1.0)])
    self.addCleanup(seqio.MixtureRegistry.remove, 'moods_for_test')
    suite = suite_lib.load({
        'mixture': 'moods_for_test', 'metric': 'loss',
        'experts': {'mood_of_mixture': 'path/to/expert'},
    })  # fmt: skip
    self.assertEqual(suite.tasks['mood_of_mixture'].metric, 'loss')
    self.assertEqual(suite.tasks['mood_of_mixture'].expert, 'path/to/expert')
    self.assertEqual(suite.lower_is_better(), ['mood_of_mixture'])
    self.assertEqual(suite.describe_metrics(), 'loss (lower is better)')
    with self.assertRaisesRegex(errors.UserError, "'mood_of_mixture'"):
      suite_lib.load(
        {'mixture': 'moods_for_test', 'experts': {'mood_of_mixtur': 'x'}}
      )
    with self.assertRaisesRegex(errors.UserError, 'for a mixture'):
      suite_lib.load({'tasks': {}, 'experts': {}})
    with self.assertRaisesRegex(errors.UserError, "'moods_for_test'"):
      suite_lib.load({'mixture': 'moods_for_tests'})
    with self.assertRaisesRegex(errors.UserError, 'cannot be imported'):
      suite_lib.load({'mixture': 'x', 'import': 'no_such_module'})

  def test_mistakes(self):
    for message, call in (
      ("'accuracy'", lambda: self.suite(metric='acuracy')),
      ('of language models', lambda: self.suite(metric='bits_per_byte')),
      ("lacks the template 'targets'", lambda: self.suite(targets=None)),
      ("'label'", lambda: self.suite(targets='{labl}')),
      ('There is no', lambda: self.suite(files='nowhere')),
      ("'expert'", lambda: self.suite(exprt='x')),
      ('one of', lambda: self.suite(files=None)),
      ('at least one task', lambda: suite_lib.load({'tasks': {}})),
      ("either 'tasks'", lambda: suite_lib.load({})),
      ('no suite', lambda: suite_lib.load(self.folder / 'none.yaml')),
      ("'mood'", lambda: self.suite().batches('moood', 'test')),
      ("'test'", lambda: self.suite().batches('mood', 'tset')),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        call()


if __name__ == '__main__':
  absltest.main()
