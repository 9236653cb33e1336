# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""T5's suite: its words, its answers, its scores."""

import functools
import json
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from mergejax.core import errors
from mergejax.data import features
from mergejax.data import postprocessors
from mergejax.data import splits
from mergejax.data import stream
from mergejax.data import t5_tasks
from mergejax.data import text_metrics
from mergejax.data import text_preprocessors as text
from mergejax.data import tfds_sets

TEXTS = json.loads(str(goldens.load('t5_span_corruption')['text_preprocessors_json']))  # fmt: skip
SCORES = json.loads(str(goldens.load('t5_metrics')['json']))


def rows(*examples):
  datasets = [tf.data.Dataset.from_tensors(example) for example in examples]
  return functools.reduce(lambda a, b: a.concatenate(b), datasets)


def plain(row):
  value = lambda x: x.decode() if isinstance(x, bytes) else x.tolist()
  result = {name: value(leaf) for name, leaf in row.items()}
  for name, leaf in result.items():
    if isinstance(leaf, list):
      result[name] = [x.decode() for x in leaf]
  return result


def made(step, example, **options):
  return [plain(r) for r in step(rows(example), **options).as_numpy_iterator()]


class TextTest(parameterized.TestCase):
  def check(self, name, found):
    self.assertEqual(found, TEXTS[name])

  def test_words_are_t5s(self):
    (found,) = made(
      text.translate, {'en': 'That is good.', 'de': 'Das ist gut.'},
      source='en', target='de',
    )  # fmt: skip
    self.check('translate_en_de', found)
    (found,) = made(
      text.summarize, {'a': 'A long article.', 'b': 'Short.'},
      article='a', summary='b',
    )  # fmt: skip
    self.check('summarize', found)
    mnli = {'premise': 'It rains.', 'hypothesis': 'It is wet.', 'label': 1,
            'idx': 0}  # fmt: skip
    labels = ('entailment', 'neutral', 'contradiction')
    (found,) = made(text.classify, mnli, name='mnli', labels=labels)
    self.check('glue_mnli', found)
    sst2 = {'sentence': 'It rains.', 'label': -1, 'idx': 3}
    (found,) = made(text.classify, sst2, name='sst2', labels=('no', 'yes'))
    self.check('glue_sst2_unlabeled', found)

  @parameterized.parameters('0.0', '2.5', '2.62', '2.7', '5.0', '4.499')
  def test_likeness_is_in_fifths(self, score):
    row = {'sentence1': 'a b.', 'sentence2': 'c d.', 'idx': 1,
           'label': np.float32(score)}  # fmt: skip
    self.check(f'stsb_{score}', made(text.similarity, row)[0])

  def test_questions(self):
    row = {
      'question': 'Who?', 'context': 'Bob did it (yes).', 'id': 'q1',
      'answers': {'text': ['Bob', 'bob']},
    }  # fmt: skip
    (found,) = made(text.squad, row)
    self.check('squad', found)

  def test_referents(self):
    row = {
      'text': 'Bob told Tim that he left.', 'span1_text': 'Bob',
      'span2_text': 'he', 'span2_index': 4, 'label': 1, 'idx': 0,
    }  # fmt: skip
    wrong = {**row, 'span1_text': 'Tim', 'label': 0, 'idx': 1}
    dataset = text.referent(rows(row, wrong), true_only=True)
    found = map(plain, dataset.as_numpy_iterator())
    found = [
      {**each, 'label': str(each['label']), 'idx': str(each['idx'])}
      for each in found
    ]
    self.check('wsc_simple', found)
    self.assertLen(list(text.referent(rows(row, wrong))), 2)
    (found,) = made(
      text.definite_pronoun,
      {'sentence': 'Bob hit Tim because he, it seems, can and he did.',
       'pronoun': 'he', 'candidates': ['Bob', 'Tim'], 'label': 0},
    )  # fmt: skip
    self.assertEqual(
      found['inputs'],
      'wsc: Bob hit Tim because *he*, it seems, can and he did.',
    )
    self.assertEqual(found['targets'], 'Bob')

  def test_reading_with_gaps(self):
    row = {
      'query': 'It was @placeholder.', 'entities': ['Bob', 'Tim'],
      'passage': 'Rain fell.\n@highlight\nBob ran\n@highlight\nTim sat',
      'answers': ['Bob', 'Tim'], 'idx': {'passage': 4, 'query': 7},
    }  # fmt: skip
    found = made(text.record, row)
    self.assertEqual([r['targets'] for r in found], ['Bob', 'Tim'])
    self.assertEqual(
      found[1]['inputs'],
      'record query: It was @placeholder. entities: Bob, Tim passage: Rain '
      'fell. Bob ran. Tim sat',
    )
    self.assertEqual((found[1]['idx/passage'], found[1]['idx/query']), (4, 7))
    none = {**row, 'answers': np.zeros([0], 'S1')}
    (found,) = made(text.record, none)
    self.assertEqual(found['targets'], '<unk>')

  def test_markup_goes(self):
    row = {
      'question': 'q<br>', 'answer': 'a', 'paragraph': '<b>Sent 1: </b>p',
      'label': 1, 'idx': {'paragraph': 1, 'question': 2, 'answer': 3},
    }  # fmt: skip
    (found,) = made(
      text.classify, row, name='multirc', labels=('False', 'True'),
      columns=('question', 'answer', 'paragraph'),
    )  # fmt: skip
    self.assertEqual(
      found,
      {
        'inputs': 'multirc question: q  answer: a paragraph: Sent 1: p',
        'targets': 'True',
        'idx/paragraph': 1, 'idx/question': 2, 'idx/answer': 3,
      },
    )  # fmt: skip


class MetricsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('squad', text_metrics.squad),
    ('trivia_qa', text_metrics.trivia_qa),
    ('accuracy', text_metrics.accuracy),
    ('f1_score_with_invalid', text_metrics.f1_with_invalid),
    ('sequence_accuracy', text_metrics.sequence_accuracy),
    ('pearson', text_metrics.pearson),
    ('spearman', text_metrics.spearman),
    ('bleu', text_metrics.bleu),
    ('rouge', text_metrics.rouge),
  )
  def test_scores_are_t5s(self, name, metric):
    library = {'bleu': 'sacrebleu', 'rouge': 'rouge_score'}.get(name)
    if library and library not in sys.modules:
      try:
        __import__(library)
      except ImportError:
        self.skipTest(f'{library} is not installed')
    golden = SCORES[name]
    found = metric(golden['targets'], golden['predictions'])
    self.assertEqual(found.keys(), golden['out'].keys())
    for key, value in golden['out'].items():
      self.assertAlmostEqual(found[key], value, places=6)

  @parameterized.parameters('sacrebleu', 'rouge_score')
  def test_a_library_that_is_missing_is_named(self, library):
    metric = {'sacrebleu': text_metrics.bleu, 'rouge_score': text_metrics.rouge}
    text_metrics._rouge_scorer.cache_clear()
    with mock.patch.dict(sys.modules, {library: None}):
      with self.assertRaisesRegex(errors.ConfigError, r'mergejax\[metrics\]'):
        metric[library](['a new text'], ['another text'])

  def test_answers_are_read(self):
    for said, value in SCORES['post']['float']:
      self.assertEqual(postprocessors.number(said), value)
    for said, value in SCORES['post']['label']:
      self.assertEqual(postprocessors.label(said, ['no', 'yes']), value)

  def test_matthews_of_two_classes_is_the_correlation(self):
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (2, 40))
    self.assertAlmostEqual(
      text_metrics.matthews(a, b)['matthews_corrcoef'],
      100 * np.corrcoef(a, b)[0, 1],
    )
    self.assertEqual(text_metrics.matthews([1, 1], [1, 1]),
                     {'matthews_corrcoef': 0.0})  # fmt: skip

  def test_mean_f1(self):
    # By hand: F1 of 0 and of 1 is 1/2, of 2 it is 0.
    found = text_metrics.mean_f1([0, 0, 1, 1, 2], [0, 1, 1, -1, 0], classes=3)
    self.assertAlmostEqual(found['mean_3class_f1'], 100 * (0.5 + 0.5 + 0) / 3)

  def test_what_is_neither_class_is_the_wrong_one(self):
    found = text_metrics.f1_with_invalid([0, 1], [-1, 1])
    self.assertAlmostEqual(found['f1'], 100 * 2 / 3)

  def test_groups(self):
    pairs = [((0, 0), 1, 1), ((0, 0), 0, 0), ((0, 1), 1, 1), ((0, 1), 1, -1)]
    targets = [{'group': g, 'value': t} for g, t, _ in pairs]
    said = [{'group': g, 'value': p} for g, _, p in pairs]
    found = text_metrics.multirc(targets, said)
    self.assertAlmostEqual(found['exact_match'], 50)
    self.assertAlmostEqual(found['f1'], 100 * 2 * 2 / (2 * 2 + 1))
    targets = [{'group': g, 'value': ['Bob', 'Tim']} for g in (1, 1, 2)]
    said = [{'group': g, 'value': v} for g, v in
            ((1, 'Bob'), (1, 'x'), (2, 'y'))]  # fmt: skip
    self.assertEqual(
      text_metrics.record(targets, said), {'em': 50.0, 'f1': 50.0}
    )

  @parameterized.parameters(
    ('the tree', 1), ('tall', 1), ('The tall TREE', 1), ('', 0), ("tree's", 0),
    ('a bush', 0),
  )  # fmt: skip
  def test_a_referent_is_named_in_part(self, said, value):
    example = {'targets_pretokenized': b'the tall tree', 'label': 1}
    self.assertEqual(postprocessors.same_referent(said, example=example), value)


class TasksTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.addCleanup(self.forget, set(seqio.TaskRegistry.names()))
    self.enter_context(tfds.testing.mock_data(num_examples=3))

  def forget(self, known):
    for name in set(seqio.TaskRegistry.names()) - known:
      seqio.TaskRegistry.remove(name)

  @parameterized.parameters(
    'glue_cola_v002', 'glue_mnli_v002', 'glue_stsb_v002',
    'super_glue_multirc_v102', 'super_glue_record_v102',
    'super_glue_wsc_v102_simple_eval', 'super_glue_axb_v102',
    'dpr_v001_simple', 'squad_v010_allanswers', 'cnn_dailymail_v002',
    'wmt14_ende_v003', 'wmt16_enro_v003',
  )  # fmt: skip
  def test_rows_of_tfds_become_tokens(self, name):
    task = t5_tasks.add(name)
    split = next(iter(task.splits))
    dataset = task.source.get_dataset(split, shuffle=False)
    if name.startswith('super_glue_wsc'):  # places of words are made up
      dataset = dataset.map(lambda row: {**row, 'span2_index': 0})
    dataset = task.preprocess_precache(dataset)
    found = list(
      task.preprocess_postcache(dataset, sequence_length=None).take(2)
    )
    self.assertNotEmpty(found)
    for row in found:
      for feature in ('inputs', 'targets'):
        self.assertEqual(int(row[feature][-1]), 1)

  def test_the_table(self):
    self.assertLen(t5_tasks.TASKS, 31)
    for spec in t5_tasks.TASKS.values():
      self.assertNotEmpty(spec.metrics, spec.name)
      self.assertNotEqual(tfds_sets.state(spec.tfds), 'unknown', spec.tfds)

  def test_rates_are_of_examples_that_the_steps_make(self):
    for name, count in (
      ('super_glue_record_v102', 138_854),
      ('super_glue_wsc_v102_simple_train', 259),
    ):
      task = t5_tasks.add(name)
      self.assertEqual(task.num_input_examples('train'), count)

  def test_a_task_has_one_vocabulary(self):
    first = t5_tasks.add('glue_rte_v002')
    self.assertIs(t5_tasks.add('glue_rte_v002'), first)
    with self.assertRaisesRegex(errors.DataError, 'another vocabulary'):
      t5_tasks.add('glue_rte_v002', vocabulary=features.vocabulary())
    with self.assertRaisesRegex(errors.DataError, "mean 'glue_rte_v002'"):
      t5_tasks.add('glue_rte_v02')

  def test_what_is_not_here_is_told_before_it_is_read(self):
    names = [t5_tasks.add(f'glue_{n}_v002').name for n in ('rte', 'sst2')]
    mixture = seqio.MixtureRegistry.add('not_here', [(n, 1) for n in names])
    self.addCleanup(seqio.MixtureRegistry.remove, 'not_here')
    with self.assertRaisesRegex(errors.DataError, 'Of 2 tasks, 2 have no data'):
      stream.SeqioStream(
        mixture.name, lengths={'inputs': 8, 'targets': 8}, batch_size=2,
        kind='encoder_decoder',
      )  # fmt: skip
    with self.assertRaisesRegex(errors.DataError, 'tfds build glue/rte'):
      splits.batches(
        names[0], lengths={'inputs': 8, 'targets': 8}, batch_size=2,
        kind='encoder_decoder', split='validation',
      )  # fmt: skip
    spec = t5_tasks.TaskSpec('no_such', 'no_such_set:1.0.0', steps=[])
    with self.assertRaisesRegex(errors.DataError, 'TFDS has no no_such_set:1'):
      tfds_sets.check([t5_tasks.add(spec)])


if __name__ == '__main__':
  absltest.main()
