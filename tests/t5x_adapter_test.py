# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Ours inside T5X, where T5X can be imported: as its own networks, and in gin.

T5X runs in processes of its own: it promotes dtypes, and it warns.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import unittest

from absl.testing import absltest
from absl.testing import parameterized
import environments
import numpy as np

import mergejax as mj
from mergejax.cli import common

HERE = pathlib.Path(__file__).parent
TASK = """
import seqio
import tensorflow as tf

def examples(split, shuffle_files=False, seed=None):
  del split, shuffle_files, seed
  rows = range(16)
  return tf.data.Dataset.from_tensor_slices({
    'inputs': [f'add {i}' for i in rows], 'targets': [str(i + 1) for i in rows]
  })

vocabulary = seqio.ByteVocabulary()
seqio.TaskRegistry.add(
  'toy',
  source=seqio.FunctionDataSource(examples, splits=('train', 'validation')),
  preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
  output_features={
    name: seqio.Feature(vocabulary) for name in ('inputs', 'targets')
  },
)
"""
SMALL = """
from __gin__ import dynamic_registration
import __main__ as train_script
from t5x import utils
import toy_task
from mergejax.nn import t5

t5.T5Config:
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  num_encoder_layers = 2
  num_decoder_layers = 2
  mlp_dim = 32
train_script.train:
  random_seed = 0
  train_eval_dataset_cfg = None
train/utils.DatasetConfig:
  shuffle = False
  seed = 0
utils.SaveCheckpointConfig.period = 2
"""


def t5x_folder():
  """Where T5X lies, or None."""
  found = importlib.util.find_spec('t5x')
  return found and pathlib.Path(found.submodule_search_locations[0]).parent


@unittest.skipIf(t5x_folder() is None, 'T5X is not installed')
class InsideT5XTest(parameterized.TestCase):
  def run_with_t5x(self, *arguments, **paths):
    path = [HERE.parent, *paths.get('path', ()), os.environ.get('PYTHONPATH')]
    done = subprocess.run(
      [sys.executable, *map(str, arguments)],
      env=environments.of(
        PYTHONPATH=os.pathsep.join(str(each) for each in path if each)
      ),
      capture_output=True, text=True,
    )  # fmt: skip
    self.assertEqual(done.returncode, 0, done.stderr[-3000:])
    return done.stdout

  def test_as_its_own_networks(self):
    said = self.run_with_t5x(HERE / 'inside_t5x.py')
    found = json.loads(said.splitlines()[-1])
    self.assertIn('mergejax train', found.pop('refused'))
    for name, one in found.items():
      with self.subTest(name):
        # Scanned, the names are those of T5X's other network.
        self.assertEqual(one['same_axes'], name != 'scanned')
        self.assertTrue(one['axes_of_all'])
        np.testing.assert_allclose(*one['loss'], rtol=1e-5)
        np.testing.assert_allclose(*one['scores'], rtol=1e-4)
        self.assertLen(one['decoded'], 1 if name == 'decoder_only' else 3)
        for theirs, ours in one['decoded'].values():
          self.assertEqual(ours[0], theirs[0])
          np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-5)

  def test_its_train_py_trains_ours(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / 'toy_task.py').write_text(TASK)
    (folder / 'small.gin').write_text(SMALL)
    files = ('models/t5_1_1_tiny.gin', 'inside_t5x/encoder_decoder.gin',
             't5x/configs/runs/pretrain.gin', folder / 'small.gin')  # fmt: skip
    macros = dict(
      MODEL_DIR=str(folder / 'out'), MIXTURE_OR_TASK_NAME='toy',
      TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 8}, TRAIN_STEPS=2,
      BATCH_SIZE=4, DROPOUT_RATE=0.1, USE_CACHED_TASKS=False,
    )  # fmt: skip
    self.run_with_t5x(
      '-m', 't5x.train',
      f'--gin_search_paths={common.gin_folder()},{t5x_folder()}',
      *(f'--gin_file={file}' for file in files),
      *(f'--gin.{name}={value!r}' for name, value in macros.items()),
      path=[folder],
    )  # fmt: skip
    # What it saved is a checkpoint of that model, and was trained.
    first, last = (
      mj.open_checkpoint(folder / 'out' / f'checkpoint_{step}').read()
      for step in (0, 2)
    )
    table = 'token_embedder', 'embedding'
    before, after = (found[table[0]][table[1]] for found in (first, last))
    self.assertEqual(after.shape, (384, 16))
    self.assertGreater(np.abs(np.asarray(after) - np.asarray(before)).max(), 0)


if __name__ == '__main__':
  absltest.main()
