# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax cache`: what Beam wrote is what streams would have made."""

import contextlib
import importlib.util
import io
import json
import pathlib
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import seqio

from mergejax.cli import main as main_lib
from mergejax.core import errors
from mergejax.data import pretraining
from mergejax.data import stream
from mergejax.data import tasks

OPTIONS = dict(
  lengths={'inputs': 32, 'targets': 16}, batch_size=4, kind='encoder_decoder'
)


def run(*arguments):
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = main_lib.main(['cache', *map(str, arguments)])
  return code, out.getvalue(), err.getvalue()


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
