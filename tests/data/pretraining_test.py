# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Pre-training on local text: tasks, their streams, and the gin file."""

import contextlib
import io
import json
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import environments
import numpy as np
import seqio

import gin
from mergejax.cli import common
from mergejax.cli import main as main_lib
from mergejax.cli import train
from mergejax.core import errors
from mergejax.data import features
from mergejax.data import identity
from mergejax.data import machine_text
from mergejax.data import pretraining
from mergejax.data import splits
from mergejax.data import stream
from mergejax.data import tasks

LENGTHS = {'inputs': 32, 'targets': 32}


def write(folder, count=30, seed=0):
  rng = np.random.default_rng(seed)
  texts = [
    f'{i} of {seed}: ' + ' '.join(map(str, rng.integers(0, 1e6, 5 + i)))
    for i in range(count)
  ]
  folder.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps({'text': text}) for text in texts]
  (folder / f'{seed}.jsonl').write_text('\n'.join(lines))
  return texts


class PretrainingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.enter_context(mock.patch.object(tasks, 'SHUFFLE_BUFFER', 32))

  def task(self, name='spans', **options):
    write(self.folder / 'in')
    return pretraining.add_unlabelled_task(
      name, {'train': self.folder / 'in' / '0.jsonl'}, by_content=True,
      **options,
    ).name  # fmt: skip

  def open(self, name, seed=0, **settings):
    return stream.SeqioStream(
      name,
      **dict(
        lengths=LENGTHS, batch_size=4, kind='encoder_decoder', seed=seed,
        pack=False,
      ) | settings,
    )  # fmt: skip

  def test_a_stream_continues_with_the_very_next_rows(self):
    name = self.task()
    first = self.open(name)
    for _ in range(3):
      next(first)
    saved = first.state()
    rest = [next(first) for _ in range(30)]  # more than an epoch
    again = self.open(name)
    again.restore(saved)
    for batch in rest:
      for key, leaf in next(again).items():
        np.testing.assert_array_equal(leaf, batch[key])
    # The text is the same in every epoch, the noise is not.
    rows = [tuple(row) for b in rest for row in b['encoder_input_tokens']]
    self.assertGreater(len(set(rows)), 0.95 * len(rows))

  def test_rows_end_and_have_sentinels_of_bytes(self):
    batch = next(self.open(self.task()))
    for inputs, targets in zip(
      batch['encoder_input_tokens'], batch['decoder_target_tokens']
    ):
      inputs, targets = inputs[inputs > 0], targets[targets > 0]
      self.assertEqual(inputs[-1], 1)
      self.assertEqual(targets[-1], 1)
      self.assertEqual(targets[0], 358)
      self.assertIn(358, inputs)

  @parameterized.parameters('independent_denoising', 'prefix_lm')
  def test_other_objectives(self, objective):
    name = self.task(objective, objective=objective)
    batch = next(self.open(name, pack=True))
    self.assertEqual(batch['decoder_target_tokens'].shape, (4, 32))
    # Scoring on it does not ask how long its rows would be.
    rows = splits.batches(
      name, lengths=LENGTHS, batch_size=4, split='train',
      kind='encoder_decoder', max_examples=6, answers=True,
    )  # fmt: skip
    self.assertLen(rows, 2)

  def test_language_model(self):
    name = self.task('lm', objective='language_model')
    batch = next(self.open(name, lengths={'targets': 16}, kind='lm'))
    self.assertEqual(batch['decoder_target_tokens'].shape, (4, 16))

  def test_settings_are_part_of_the_content(self):
    names = {self.task(), self.task(options={'density': 0.3}), self.task()}
    self.assertLen(names, 2)

  def test_another_process_knows_the_data(self):
    """Noise is part of the examples by which a run tells its data."""
    name, found = self.task(), []
    for _ in range(2):
      identity._task.cache_clear()
      found.append(identity.describe(name, 'train', LENGTHS))
    self.assertEqual(*found)

  def test_mistakes(self):
    with self.assertRaisesRegex(errors.ConfigError, "mean 'span_corruption'"):
      self.task(objective='span_corrupt')
    with self.assertRaisesRegex(errors.ConfigError, "mean 'density'"):
      self.task(options={'densty': 0.3})
    name = self.task(vocabulary=features.vocabulary())
    with self.assertRaisesRegex(errors.ConfigError, 'has 0 sentinels'):
      self.open(name)
    with self.assertRaisesRegex(errors.ConfigError, 'room for 4'):
      self.open(self.task(), lengths={'inputs': 64, 'targets': 4})

  def test_a_folder_is_a_mixture(self):
    for seed in (1, 2):
      write(self.folder / 'texts', count=20 * seed, seed=seed)
    make = lambda: pretraining.corpora_mixture(
      corpora=self.folder / 'texts', directory=self.folder / 'run'
    )
    mixture = make()
    self.assertLen(mixture.tasks, 2)
    sizes = [tasks.num_examples(task.name) for task in mixture.tasks]
    self.assertEqual([mixture.get_rate(t) for t in mixture.tasks], sizes)
    # The run keeps the text that it began with.
    (self.folder / 'texts' / '1.jsonl').unlink()
    self.assertEqual(make().name, mixture.name)

  def test_the_gin_file_trains(self):
    for seed in (0, 1):
      write(self.folder / 'texts', seed=seed)
    self.enter_context(environments.one_device())
    (self.folder / 'tiny.gin').write_text(
      'from __gin__ import dynamic_registration\n'
      'from mergejax.nn import t5\n'
      'from mergejax.cli import train\n'
      "include 'runs/pretrain.gin'\n"
      't5.T5Config:\n  emb_dim = 8\n  num_heads = 2\n  head_dim = 4\n'
      '  mlp_dim = 16\n  num_encoder_layers = 1\n  num_decoder_layers = 1\n'
      'train.train_model.per_task = True\n'
    )
    errors_told = io.StringIO()
    command = lambda *flags: main_lib.main([
      'train', f'--gin_file={self.folder}/tiny.gin',
      f'--gin.CORPORA={self.folder}/texts', '--gin.TRAIN_STEPS=2',
      '--gin.BATCH_SIZE=8', *flags,
    ])  # fmt: skip
    with contextlib.redirect_stderr(errors_told):
      code = command(
        f'--gin.MODEL_DIR={self.folder}/short',
        "--gin.LENGTHS={'inputs': 32, 'targets': 5}",
      )
    self.assertEqual(code, 2)
    self.assertRegex(errors_told.getvalue(), 'has 8 targets')
    with contextlib.redirect_stderr(errors_told):
      code = command(
        f'--gin.MODEL_DIR={self.folder}/out',
        "--gin.LENGTHS={'inputs': 32, 'targets': 16}",
      )
    self.assertEqual(code, 0, errors_told.getvalue())
    self.assertTrue((self.folder / 'out' / 'model').exists())
    log = (self.folder / 'out/train/metrics.jsonl').read_text().splitlines()
    metrics = json.loads(log[-1])
    losses = [x for n, x in metrics.items() if n.startswith('loss/')]
    counts = [x for n, x in metrics.items() if n.startswith('examples/')]
    self.assertLen(losses, 2)
    self.assertBetween(metrics['loss'], min(losses), max(losses))
    self.assertGreaterEqual(sum(counts), 16)  # two steps of packed rows
    self.assertRegex(errors_told.getvalue(), r'(?m)^corpus_1_\w+ +23 +23 ')

  @parameterized.parameters(
    ('exmix', 'Of 107 tasks of ExMix, 107 cannot be had here'),
    ('t5_tasks', 'Of 1 tasks, 1 have no data here'),
  )
  def test_gin_files_of_mixtures(self, name, message):
    settings = {'CORPORA': 'None', 'MODEL_DIR': str(self.folder)}
    if name == 't5_tasks':
      settings['TASKS'] = "['glue_rte_v002']"
      self.addCleanup(seqio.TaskRegistry.remove, 'glue_rte_v002')
    common.parse_gin(
      ['runs/pretrain.gin', f'mixtures/{name}.gin'], settings.items()
    )
    one_domain = {'a': [('train', 'some text of a domain ' * 9)]}
    with mock.patch.object(machine_text, 'domains', lambda: one_domain):
      with self.assertRaisesRegex(errors.DataError, message):
        gin.get_configurable(train.run)()


if __name__ == '__main__':
  absltest.main()
