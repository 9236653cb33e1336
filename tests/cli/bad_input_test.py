# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Bad input to the commands of T5X's users: one message, exit code 2, no rest."""

import contextlib
import io
import pathlib
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import seqio
import tensorflow as tf

from mergejax.cli import main as main_lib

CHECKPOINTS = pathlib.Path(__file__).parents[1] / 'testdata/t5x_tiny_complete'
LENGTHS = "{'inputs': 8, 'targets': 4}"
SIZES = {
  'emb_dim': 8, 'num_heads': 2, 'head_dim': 4, 'mlp_dim': 16,
  'num_encoder_layers': 1, 'num_decoder_layers': 1,
}  # fmt: skip


def register(name, source, *steps):
  """A task of a user's, of bytes."""
  vocabulary = seqio.ByteVocabulary()
  names = ('inputs', 'targets')
  return seqio.TaskRegistry.add(
    name, source=source,
    preprocessors=[
      *steps, seqio.preprocessors.tokenize, seqio.CacheDatasetPlaceholder(),
      seqio.preprocessors.append_eos,
    ],
    output_features={n: seqio.Feature(vocabulary) for n in names},
  )  # fmt: skip


@seqio.map_over_dataset
def of_label(row):
  return {'inputs': row['inputs'], 'targets': row['label']}


@seqio.map_over_dataset
def of_inputs(row):
  return {'inputs': row['inputs']}


def examples(split, shuffle_files=False, seed=None):
  del split, shuffle_files, seed
  texts = ['one', 'two'] * 8
  return tf.data.Dataset.from_tensor_slices({'inputs': texts, 'targets': texts})


class BadInputTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    source = seqio.FunctionDataSource(examples, ['train'])
    register('good', source)
    register('no_targets', source, of_inputs)
    register('no_label', source, of_label)
    register('no_train', seqio.FunctionDataSource(examples, ['validation']))
    register(
      'no_set', seqio.TfdsDataSource('no_such_set:1.0.0', splits=['train'])
    )

  def setUp(self):
    super().setUp()
    self.out = pathlib.Path(self.create_tempdir().full_path) / 'out'

  def mistake(self, *arguments):
    """What a command says that must fail, and leave nothing behind."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
      with contextlib.redirect_stderr(err):
        code = main_lib.main([str(each) for each in arguments])
    said = err.getvalue()
    self.assertEqual(code, 2, said)
    self.assertNotIn('Traceback', said)
    self.assertEqual(said.count('mergejax: '), 1, said)
    left = [*self.out.rglob('*')] if self.out.exists() else []
    self.assertEmpty(left)
    return said

  def train(self, task='good', **settings):
    settings = {
      'MODEL_DIR': self.out, 'TRAIN_FILE': '/nowhere', 'INPUTS': '{a}',
      'TARGETS': '{b}', 'BATCH_SIZE': 8, 'TRAIN_STEPS': 1, 'LENGTHS': LENGTHS,
      'train.train_model.mixture_or_task': task,
      **{f't5.T5Config.{name}': size for name, size in SIZES.items()},
      **settings,
    }  # fmt: skip
    return self.mistake(
      'train', '--gin_file=gin/runs/text_to_text.gin',
      *(f'--gin.{name}={value}' for name, value in settings.items()),
    )  # fmt: skip

  @parameterized.named_parameters(
    ('vocabulary', {'t5.T5Config.vocab_size': 128},
     r'vocab_size of 128.*259|259.*vocab_size'),
    ('shapes', {'INITIAL_CHECKPOINT': CHECKPOINTS / 't5x_legacy/checkpoint_3'},
     r'embedding.*\[384, 8\]'),
    ('no checkpoint', {'INITIAL_CHECKPOINT': '/nowhere/at_all'}, 'nowhere/at_all'),
    ('split', {'task': 'no_train'}, "no_train has no split 'train'.*validation"),
    ('TFDS set', {'task': 'no_set'}, 'no_such_set'),
    ('feature', {'task': 'no_targets'}, 'no_targets.* missing .*targets'),
    ('field', {'task': 'no_label'}, r'no_label: .* asks for a field .*\(label\)'),
    ('length', {'LENGTHS': "{'inputs': 8}"}, 'inputs and targets'),
    ('rows', {'BATCH_SIZE': 6}, '6 rows does not divide over 8 data slices'),
    ('mesh', {'MESH': "{'data': 3, 'model': 2}"}, 'does not fit 8 device'),
    ('task', {'task': 'goood'}, "Did you mean 'good'"),
  )  # fmt: skip
  def test_training(self, settings, message):
    said = self.train(**settings)
    self.assertRegex(said.replace('\n', ' '), message)

  def test_topology(self):
    said = self.mistake(
      'compile', '--topology=v5x:4x4', '--gin_file=gin/runs/text_to_text.gin'
    )
    self.assertRegex(said, r'v5x.*Known')

  def test_no_beam(self):
    with mock.patch.dict(sys.modules, {'apache_beam': None}):
      said = self.mistake('cache', 'good', '--out', self.out)
    self.assertIn("pip install 'mergejax[beam]'", said)


if __name__ == '__main__':
  absltest.main()
