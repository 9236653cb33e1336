# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of generated text, against one forward pass and plain Python."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import seqio
import small_talkers
import tiers

from mergejax.core import errors
from mergejax.data import samples
from mergejax.data import tasks
from mergejax.evaluation import suite as suite_lib

INPUTS = [f'{word} {i}' for i in range(4) for word in ('good', 'bad', 'fine')]


@tiers.slow('test_exact_match_.*1')
class GeneratedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def files(self, targets):
    path = self.folder / f'{len(list(self.folder.iterdir()))}.tsv'
    rows = ''.join(f'{x}\t{y}\n' for x, y in zip(INPUTS, targets))
    path.write_text('text\tlabel\n' + rows)
    return path

  def suite(self, targets, metric, **top):
    return suite_lib.load({
        'tasks': {'t': {'files': str(self.files(targets)), 'inputs': '{text}',
                        'targets': '{label}', 'metric': metric}},
        'lengths': {'inputs': 10, 'targets': 6}, 'batch_size': 5, **top,
    })  # fmt: skip

  def answers(self, module, params):
    """What a model says to every input."""
    suite = self.suite(['a'] * len(INPUTS), 'exact_match')
    batches = suite.batches('t', 'test', kind=suite.kind_for('t', module))
    scored = suite.by_generation('t', 'test')
    return scored.predictions(module, params, batches)

  @parameterized.parameters('t5x', 'lm')
  def test_exact_match_is_the_accuracy_of_one_forward_pass(self, kind):
    module, params = small_talkers.build(kind)
    said = self.answers(module, params)
    self.assertGreater(len(set(said)), 1)
    self.assertTrue(all(set(text) <= set('ab') for text in said))
    # Some as they are, some too long, some that begin in another way. What did
    # not end in time is no answer.
    wanted = [
      text if len(text) < 6 and i % 3 == 0 else text[:4] + 'b' if i % 3 == 1
      else 'b' + text[1:4]
      for i, text in enumerate(said)
    ]  # fmt: skip
    found = {
      metric: self.suite(wanted, metric).table([('m', module, params)])['m'][
        't'
      ]
      for metric in ('exact_match', 'accuracy')
    }
    expected = np.mean([a == b for a, b in zip(said, wanted)])
    self.assertBetween(expected, 0.05, 0.95)
    for score in found.values():
      self.assertAlmostEqual(score.value, expected)
    self.assertEqual(found['exact_match'].low, found['accuracy'].low)
    # A sample, in batches of another size.
    some = self.suite(wanted, 'exact_match', max_examples=7, batch_size=4)
    chosen = samples.numbers(len(said), 7)
    self.assertAlmostEqual(
      some.table([('m', module, params)])['m']['t'].value,
      np.mean([said[i] == wanted[i] for i in chosen]),
    )

  def register(self, **functions):
    table = tasks.add_table_task(
        'functions_source', {'test': self.files(['a', 'b'] * 6)},
        inputs='{text}', targets='{label}', by_content=True,
    )  # fmt: skip
    seqio.TaskRegistry.add(
      'with_functions', source=table.source, preprocessors=table.preprocessors,
      output_features=table.output_features, **functions,
    )  # fmt: skip
    self.addCleanup(seqio.TaskRegistry.remove, 'with_functions')

  def test_functions_of_seqio(self):
    seen = {}

    def matches(targets, predictions):
      seen.setdefault('first', (targets, predictions))
      hits = [t == p for t, p in zip(targets, predictions)]
      return {'em': np.mean(hits), 'misses': 12 - sum(hits), 'note': 'words'}

    def likelihood(targets, scores):
      del targets
      return {'log_p': seqio.metrics.Scalar(np.mean(scores))}

    def upper(text, example, is_target):
      seen.setdefault('example', example)
      return text.upper() if is_target else f'{text[:1]}'.upper()

    self.register(metric_fns=[matches, likelihood], postprocess_fn=upper)
    lengths = {'inputs': 10, 'targets': 6}
    suite = suite_lib.load({
        'mixture': 'with_functions', 'metric': 'seqio', 'lengths': lengths,
        'lower_is_better': ['misses'], 'batch_size': 5,
        'experts': {'with_functions': 'x'},
    })  # fmt: skip
    module, params = small_talkers.build('t5x')
    table = suite.table([('m', module, params)])
    row = table['m']
    self.assertEqual(
      table.tasks, [f'with_functions/{n}' for n in ('em', 'misses', 'log_p')]
    )
    said = self.answers(module, params)
    targets, predictions = seen['first']
    self.assertEqual(targets, ['A', 'B'] * 6)
    self.assertEqual(predictions, [text[:1].upper() for text in said])
    hits = np.mean([t == p for t, p in zip(targets, predictions)])
    self.assertEqual(row['with_functions/em'].value, hits)
    self.assertLessEqual(row['with_functions/em'].low, hits)
    self.assertFalse(row['with_functions/misses'].metric.higher_is_better)
    self.assertEqual(seen['example']['inputs_pretokenized'], b'good 0')
    self.assertFalse(table.has_mean)
    self.assertEqual(set(suite.experts(table).values()), {'x'})
    self.assertLen(suite.experts(table), 3)
    self.assertEqual(suite.describe_metrics(), "seqio's own metrics")
    # The log-likelihood of whole targets, in nats.
    losses = suite_lib.of_mixture(
      'with_functions', lengths=lengths, metric='loss'
    ).table([('m', module, params)])['m']['with_functions']
    # Two tokens each, the end included.
    self.assertAlmostEqual(
      row['with_functions/log_p'].value, -2 * losses.value, places=5
    )

  def test_as_decoding_says(self):
    module, params = small_talkers.build('t5x')
    targets = ['a'] * len(INPUTS)
    said = {}
    for words in (
      {}, {'temperature': 0}, {'beams': 2}, {'temperature': 2.0, 'seed': 1},
    ):  # fmt: skip
      suite = self.suite(targets, 'exact_match', decoding=words)
      batches = suite.batches('t', 'test', kind=suite.kind_for('t', module))
      found = suite.by_generation('t', 'test')
      said[str(words)] = found.predictions(module, params, batches)
      self.assertEqual(
        suite.content('t', 'test').get('decoding', {}), words, 'in searches'
      )
    greedy, cold, beams, drawn = said.values()
    self.assertEqual(cold, greedy)
    self.assertNotEqual(beams, greedy)
    self.assertNotEqual(drawn, greedy)
    # In batches of another size, the same draws.
    suite = self.suite(
      targets, 'exact_match', decoding={'temperature': 2.0, 'seed': 1},
      batch_size=7,
    )  # fmt: skip
    batches = suite.batches('t', 'test', kind=suite.kind_for('t', module))
    found = suite.by_generation('t', 'test')
    self.assertEqual(found.predictions(module, params, batches), drawn)

  def test_mistakes_of_decoding(self):
    for words, said in (
      (4, 'must be a mapping, such as {beams: 4}'),
      ({'beam': 4}, "'beams'"),
      ({'beams': 4, 'top_p': 0.5}, 'different ways'),
      ({'beams': 4, 'seed': 1}, 'a seed is for what is drawn'),
      ({'temperature': 1.0, 'samples': 2}, 'one answer'),
    ):
      with self.assertRaisesRegex(errors.ConfigError, said):
        self.suite(['a'] * 12, 'exact_match', decoding=words)
    with self.assertRaisesRegex(errors.ConfigError, 'no task of the suite'):
      self.suite(['a'] * 12, 'accuracy', decoding={'beams': 4})

  def test_mistakes(self):
    with self.assertRaisesRegex(errors.UserError, 'of files has none'):
      self.suite(['a'] * 12, 'seqio')
    (self.folder / 'text.txt').write_text('some text\n')
    plain = {'text': str(self.folder / 'text.txt'), 'metric': 'exact_match'}
    with self.assertRaisesRegex(errors.UserError, 'plain text does not have'):
      suite_lib.load({'tasks': {'t': plain}})
    self.register()
    with self.assertRaisesRegex(errors.UserError, 'has no metric_fns'):
      suite_lib.load({'mixture': 'with_functions', 'metric': 'seqio'})
    with self.assertRaisesRegex(errors.UserError, 'lower_is_better'):
      suite_lib.load({'mixture': 'with_functions', 'lower_is_better': ['x']})
    suite = self.suite(['a'] * 12, 'exact_match')
    with self.assertRaisesRegex(errors.ConfigError, 'cannot be compiled'):
      suite.evaluator(small_talkers.build('t5x')[0], 'test')


if __name__ == '__main__':
  absltest.main()
