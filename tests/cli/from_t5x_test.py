# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The files and commands of docs/from_t5x.md work, but for the training."""

import contextlib
import io
import os
import pathlib
import re
import shlex
import sys

from absl.testing import absltest
import jax

import mergejax as mj
from mergejax import models
from mergejax.cli import main as main_lib
from mergejax.cli import t5x_gin
from mergejax.evaluation import suite as suite_lib
from mergejax.nn import t5

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'from_t5x.md'
# What the page takes from T5X: a run that asks for what its own ask for.
BASE = """
from __gin__ import dynamic_registration
from t5x import models
from t5x.examples.t5 import network
DROPOUT_RATE = %gin.REQUIRED
MODEL = @models.EncoderDecoderModel()
models.EncoderDecoderModel.module = @network.Transformer()
network.Transformer.config = @network.T5Config()
network.T5Config.dropout_rate = %DROPOUT_RATE
"""
RUN = """
import __main__ as train_script
from t5x import utils
MODEL_DIR = %gin.REQUIRED
INITIAL_CHECKPOINT_PATH = %gin.REQUIRED
MIXTURE_OR_TASK_NAME = %gin.REQUIRED
TASK_FEATURE_LENGTHS = %gin.REQUIRED
TRAIN_STEPS = %gin.REQUIRED
MIXTURE_OR_TASK_MODULE = None
RANDOM_SEED = None
BATCH_SIZE = 128
DROPOUT_RATE = 0.1
train_script.train:
  model = %MODEL
  model_dir = %MODEL_DIR
  total_steps = %TRAIN_STEPS
  random_seed = %RANDOM_SEED
train/utils.DatasetConfig:
  mixture_or_task_name = %MIXTURE_OR_TASK_NAME
  task_feature_lengths = %TASK_FEATURE_LENGTHS
  batch_size = %BATCH_SIZE
  module = %MIXTURE_OR_TASK_MODULE
utils.RestoreCheckpointConfig.path = %INITIAL_CHECKPOINT_PATH
"""


def blocks():
  """`{file: text}` of the page, and its commands."""
  text = PAGE.read_text()
  flags = re.S | re.M
  named = re.findall(r'`([\w.]+)`:\n\n```\w*\n(.*?)^```$', text, flags)
  fenced = [
    body
    for kind, body in re.findall(r'^```(\w*)\n(.*?)^```$', text, flags)
    if not kind
  ]
  lines = '\n'.join(fenced).replace('\\\n', ' ').splitlines()
  return dict(named), [line.strip() for line in lines if 'mergejax ' in line]


class FromT5XTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.files, self.commands = blocks()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    for name in ('my_task.py', 'tiny.gin', 'suite.yaml', 'merge.yaml'):
      (self.folder / name).write_text(self.files[name])
    self.addCleanup(os.chdir, os.getcwd())
    os.chdir(self.folder)
    sys.path.insert(0, str(self.folder))
    self.addCleanup(sys.path.remove, str(self.folder))

  def test_its_training_is_understood(self):
    for place, text in (
      ('examples/t5/t5_1_1/base', BASE), ('configs/runs/finetune', RUN)
    ):  # fmt: skip
      file = self.folder / 't5x' / f'{place}.gin'
      file.parent.mkdir(parents=True)
      file.write_text(text)
    (command,) = (c for c in self.commands if c.startswith('mergejax train'))
    command = command.replace('$T5X', '.').replace('$seed', '1')
    flags = [flag.partition('=')[::2] for flag in shlex.split(command)[2:]]
    text, _ = t5x_gin.translate(
      [value for name, value in flags if name == '--gin_file'],
      [(n[6:], value) for n, value in flags if n.startswith('--gin.')],
      ['.'],
    )
    shown = [
      line
      for line in self.page_lines()
      if line.startswith('train.train_model.')
    ]
    self.assertLen(shown, 3)
    for line in shown:
      self.assertIn(line, text)

  def page_lines(self):
    return PAGE.read_text().splitlines()

  def test_its_commands_run(self):
    module = t5.Transformer(
      t5.T5Config(
        vocab_size=384, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=24,
        num_encoder_layers=1, num_decoder_layers=1,
      )
    )  # fmt: skip
    for i in (1, 2):
      mj.save_checkpoint(
        f'run_{i}/model', models.family_of(module).init(jax.random.key(i)),
        config=models.describe(module),
      )  # fmt: skip
    ran = []
    for command in self.commands:
      words = shlex.split(command)
      if words[0] == 'mergejax' and '--gin_file' not in command:
        ran.append(words[1])
        if words[1] == 'evaluate':  # other tests generate text
          self.assertIn('sums', suite_lib.load('suite.yaml').tasks)
          continue
        with contextlib.redirect_stdout(io.StringIO()):
          self.assertEqual(main_lib.main(words[1:]), 0, command)
    self.assertEqual(ran, ['merge', 'evaluate', 'convert', 'convert', 'export'])
    self.assertTrue((self.folder / 'served' / 'manifest.json').exists())
    for folder in ('merged_hf', 'merged_t5x/checkpoint_60'):
      self.assertNotEmpty(mj.open_checkpoint(folder).specs())


if __name__ == '__main__':
  absltest.main()
