# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax cache`: what Beam wrote is what streams would have made."""

import importlib.util
import json
import pathlib
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import one_command
import seqio
import tensorflow as tf

from mergejax.cli import cache
from mergejax.core import errors
from mergejax.data import cached
from mergejax.data import features
from mergejax.data import pretraining
from mergejax.data import stream
from mergejax.data import t5_tasks
from mergejax.data import tasks
from mergejax.data import tfds_sets

OPTIONS = dict(
  lengths={'inputs': 32, 'targets': 16}, batch_size=4, kind='encoder_decoder'
)


def run(*arguments):
  return one_command.run('cache', *arguments)


class CacheTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    texts = [f'text {i} of all ' * (i + 1) for i in range(12)]
    file = self.folder / 'train.jsonl'
    file.write_text('\n'.join(json.dumps({'text': text}) for text in texts))
    self.texts = texts
    self.task = pretraining.add_unlabelled_task(
      'cached', {'train': file}, by_content=True
    )
    before = list(seqio.get_global_cache_dirs())
    self.addCleanup(seqio.set_global_cache_dirs, before)

  def test_what_is_written_is_read(self):
    if importlib.util.find_spec('apache_beam') is None:
      self.skipTest('apache-beam is not installed')
    out = self.folder / 'cache'
    code, said, err = run(self.task.name, '--out', out, '--shards', 2)
    self.assertEqual(code, 0, err)
    self.assertIn('train in', said)
    self.assertLen(list(out.rglob('*.tfrecord-*')), 2)
    code, said, _ = run(self.task.name, '--out', out)
    self.assertIn('already', said)
    seqio.set_global_cache_dirs([str(out)])
    stats = self.task.get_cached_stats('train')
    self.assertEqual(stats['examples'], len(self.texts))
    rows = self.task.get_dataset(
      {'inputs': 64, 'targets': 32}, use_cached=True, shuffle=False
    )
    self.assertNotEmpty(list(rows))
    first = stream.SeqioStream(self.task.name, cached=True, **OPTIONS)
    next(first)
    saved, expected = first.state(), next(first)
    again = stream.SeqioStream(self.task.name, cached=True, **OPTIONS)
    again.restore(saved)
    for name, leaf in next(again).items():
      np.testing.assert_array_equal(leaf, expected[name])

  def test_what_is_not_cached_is_told(self):
    with self.assertRaisesRegex(errors.DataError, 'mergejax cache cached_'):
      stream.SeqioStream(self.task.name, cached=True, **OPTIONS)

  def write(self, out, shift=0):
    """A cache of the task as seqio has it; `shift` makes other tokens."""
    folder = out / self.task.name
    folder.mkdir(parents=True)
    vocabulary = self.task.output_features['targets'].vocabulary
    rows = [
      seqio.utils.dict_to_tfexample({
        'targets': np.array(vocabulary.encode(text)) + shift,
        'targets_pretokenized': text,
      })
      for text in self.texts
    ]  # fmt: skip
    record = str(folder / 'train.tfrecord-00000-of-00001')
    with tf.io.TFRecordWriter(record) as writer:
      for row in rows:
        writer.write(row.SerializeToString())
    (folder / 'stats.train.json').write_text('{"examples": 12}')
    (folder / 'COMPLETED').touch()

  def test_tokens_of_another_vocabulary_are_refused(self):
    name = self.task.name
    for shift, path in enumerate((self.folder / 'ours', self.folder / 'other')):
      self.write(path, shift)
    code, said, _ = run(name, '--out', self.folder / 'ours')
    self.assertEqual(code, 0)
    self.assertIn('already', said)
    code, _, err = run(name, '--out', self.folder / 'other')
    self.assertEqual(code, 2)
    self.assertRegex(err, r'tokens of another vocabulary: targets .*ByteVoc')
    seqio.set_global_cache_dirs([str(self.folder / 'other')])
    with self.assertRaisesRegex(errors.DataError, 'that it was cached with'):
      stream.SeqioStream(name, cached=True, **OPTIONS)
    other = pretraining.add_unlabelled_task(
      'cached', {'train': self.folder / 'train.jsonl'}, by_content=True
    )  # seqio's tasks remember where their cache is
    seqio.set_global_cache_dirs([str(self.folder / 'ours')])
    self.assertIs(stream.find(name, 'train', cached=True), other)

  def test_tokens_that_are_changed_before_the_cache_are_not_compared(self):
    steps = list(self.task.preprocessors)
    changed = seqio.TaskRegistry.add(
      f'{self.task.name}_turned', source=self.task.source,
      preprocessors=[*steps[:2], lambda rows: rows, *steps[2:]],
      output_features=self.task.output_features,
    )  # fmt: skip
    self.addCleanup(seqio.TaskRegistry.remove, changed.name)
    self.write(self.folder, shift=1)
    folder = str(self.folder / self.task.name)
    cached.check_tokens(changed, folder, 'train')
    with self.assertRaisesRegex(errors.DataError, 'another vocabulary'):
      cached.check_tokens(self.task, folder, 'train')

  def test_a_cache_is_not_added_to(self):
    name = t5_tasks.add('glue_sst2_v002').name
    self.addCleanup(seqio.TaskRegistry.remove, name)
    (self.folder / name).mkdir()
    for file in ('stats.train.json', 'COMPLETED'):
      (self.folder / name / file).touch()
    self.enter_context(mock.patch.object(tfds_sets, 'check'))
    code, said, _ = run(name, '--out', self.folder, '--split', 'train')
    self.assertEqual(code, 0)
    self.assertIn('already', said)
    code, _, err = run(name, '--out', self.folder)
    self.assertEqual(code, 2)
    self.assertRegex(err, "has no split 'validation'")

  def test_what_is_no_cache_is_left_alone(self):
    folder = self.folder / self.task.name
    (folder / 'beam-temp-train').mkdir(parents=True)
    (folder / 'train.tsv').touch()
    code, _, err = run(self.task.name, '--out', self.folder)
    self.assertEqual(code, 2)
    self.assertRegex(err, 'has train.tsv, which is no part of a cache')
    self.assertTrue((folder / 'train.tsv').exists())

  def test_machines_of_a_runner_know_the_suite(self):
    for _ in range(2):  # once a shard
      cache._prepare(['math'], 'glue_sst2_v002', 'bytes', 100)
    found = seqio.TaskRegistry.get('glue_sst2_v002')
    self.addCleanup(seqio.TaskRegistry.remove, found.name)
    vocabulary = found.output_features['targets'].vocabulary
    self.assertEqual(vocabulary, features.vocabulary(extra_ids=100))

  def test_without_beam(self):
    with mock.patch.dict(sys.modules, {'apache_beam': None}):
      code, _, err = run(self.task.name, '--out', self.folder / 'cache')
    self.assertEqual(code, 2)
    self.assertRegex(err, r"pip install 'mergejax\[beam\]'")
    self.assertNotIn('Traceback', err)

  def test_mistakes(self):
    plain = tasks.add_text_task(
      'uncached', {'train': self.folder / 'train.jsonl'}, by_content=True
    ).name
    name = self.task.name
    for arguments, message in (
      (['glue_rt_v002'], "mean 'glue_rte_v002'"),
      ([plain], 'no seqio.CacheDatasetPlaceholder'),
      ([name, '--split', 'trian'], "mean 'train'"),
      ([name, '--shards', 0], '--shards'),
      (['glue_rte_v002'], 'tfds build glue/rte'),
    ):
      code, _, err = run(*arguments, '--out', self.folder / 'cache')
      self.assertEqual(code, 2)
      self.assertRegex(err, message)
      self.assertFalse((self.folder / 'cache').exists())
    seqio.TaskRegistry.remove('glue_rte_v002')


if __name__ == '__main__':
  absltest.main()
