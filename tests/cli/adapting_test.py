# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax train` with an adapter, and `mergejax inspect` of what it writes."""

import contextlib
import io
import json
import pathlib

from absl.testing import absltest
import numpy as np

import gin
import mergejax as mj
from mergejax import models
from mergejax.cli import main
from mergejax.core import tree

SIZES = dict(
  vocab_size=384, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32,
  num_encoder_layers=1, num_decoder_layers=1,
)  # fmt: skip


def run(*arguments):
  """`(exit code, stdout, stderr)`."""
  gin.clear_config()
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = main.main([str(a) for a in arguments])
  return code, out.getvalue(), err.getvalue()


class TrainTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.addCleanup(gin.clear_config)
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    rows = [f'{i} plus one\t{i + 1}' for i in range(40)]
    (self.folder / 'train.tsv').write_text('\n'.join(['sum\tresult', *rows]))
    (self.folder / 'tiny.gin').write_text(
      'from __gin__ import dynamic_registration\n'
      'from mergejax.nn import t5\n'
      "include 'runs/text_to_text.gin'\n"
      't5.T5Config:\n'
      + ''.join(f'  {name} = {value}\n' for name, value in SIZES.items())
    )
    module = models.build({'model_type': 't5x', **SIZES})
    rng = np.random.default_rng(0)
    self.family = models.family_of(module)
    self.base = tree.unflatten({
      path: rng.normal(0, 0.2, spec.shape).astype(np.float32)
      for path, spec in self.family.specs().items()
    })  # fmt: skip
    mj.save_checkpoint(
      self.folder / 'base', self.base, config=models.describe(module)
    )

  def train(self, *flags):
    return run(
      'train',
      f'--gin_file={self.folder}/tiny.gin',
      f'--gin.TRAIN_FILE={self.folder}/train.tsv',
      '--gin.INPUTS=what is {sum}',
      '--gin.TARGETS={result}',
      f'--gin.MODEL_DIR={self.folder}/out',
      f'--gin.INITIAL_CHECKPOINT={self.folder}/base',
      '--gin.TRAIN_STEPS=2',
      '--gin.BATCH_SIZE=8',
      "--gin.LENGTHS={'inputs': 32, 'targets': 16}",
      '--gin.LEARNING_RATE=0.1',
      *flags,
    )

  def test_lora(self):
    flags = '--gin.ADAPTER=@adapters.lora()', '--gin.adapters.lora.rank=3'
    code, _, err = self.train(*flags)
    self.assertEqual(code, 0, err)
    out = self.folder / 'out'
    self.assertFalse((out / 'model').exists())
    # Of the base it began from, and trained.
    adapted, leaves = mj.adapters.load(out / 'adapter', self.family, self.base)
    self.assertEqual(adapted.adapter.rank, 3)
    self.assertLen(tree.flatten(leaves), 2 * 2 * 3)
    for path, leaf in tree.flatten(leaves).items():
      self.assertGreater(np.abs(leaf).max(), 0, path)
    code, told, err = run('inspect', out / 'adapter')
    self.assertEqual(code, 0, err)
    self.assertIn('lora: 576 numbers in 6 modules', told)
    self.assertIn('rank: 3', told)
    code, told, _ = run('inspect', '--json', out / 'adapter')
    self.assertEqual(json.loads(told)['adapter']['parameters'], 576)
    # Another adapter is another run.
    code, _, err = self.train(flags[0], '--gin.adapters.lora.rank=2')
    self.assertEqual(code, 2)
    self.assertIn('adapter:', err)
    self.assertNotIn('Traceback', err)

  def test_mistakes(self):
    for flags, message in (
      (["--gin.adapters.lora.targets='.*nothing'"], 'matches no parameter'),
      (['--gin.adapters.lora.rank=0'], 'rank must be'),
      (["--gin.train.train_model.restore='state'"], 'an adapter is trained'),
    ):
      code, _, err = self.train('--gin.ADAPTER=@adapters.lora()', *flags)
      self.assertEqual(code, 2, err)
      self.assertIn(message, err)
      self.assertNotIn('Traceback', err)
    self.assertFalse((self.folder / 'out').exists())


if __name__ == '__main__':
  absltest.main()
