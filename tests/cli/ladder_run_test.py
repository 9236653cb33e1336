# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax train` with the run of `gin/runs/ladder.gin`, at small sizes."""

import contextlib
import io
import pathlib

from absl.testing import absltest
import jax
import numpy as np

import gin
import mergejax as mj
from mergejax import models
from mergejax.cli import main
from mergejax.core import tree

SIZES = dict(
  vocab_size=384, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32,
  num_encoder_layers=2, num_decoder_layers=1,
)  # fmt: skip


class LadderRunTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.addCleanup(gin.clear_config)
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    rows = [f'{i} plus one\t{i + 1}' for i in range(40)]
    (self.folder / 'train.tsv').write_text('\n'.join(['sum\tresult', *rows]))
    (self.folder / 'tiny.gin').write_text(
      'from __gin__ import dynamic_registration\n'
      'from mergejax.nn import t5\n'
      "include 'runs/ladder.gin'\n"
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
    gin.clear_config()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      code = main.main([
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
        *flags,
      ])  # fmt: skip
    return code, err.getvalue()

  def test_side_network_is_trained_and_written(self):
    # optax's AdamW mixes dtypes.
    with jax.numpy_dtype_promotion('standard'):
      code, err = self.train('--gin.ENCODER_LAYERS=[1]')
    self.assertEqual(code, 0, err)
    adapted = mj.adapters.adapt(
      self.family, mj.adapters.ladder(encoder_layers=[1])
    )
    store = mj.open_checkpoint(self.folder / 'out' / 'adapter')
    found = tree.flatten(store.read())
    self.assertEqual({*found}, {*adapted.adapter_specs})
    adapted.joined(self.base, tree.unflatten(found))
    # What begins as zeros has moved.
    self.assertGreater(np.abs(found['side/up/bias']).max(), 0)

  def test_mistakes(self):
    for flags, message in (
      (['--gin.ENCODER_LAYERS=[2]'], 'has 2 layers, numbered from 0 to 1'),
      (['--gin.DECODER_LAYERS=[]'], 'at least one layer'),
      (['--gin.adapters.ladder.reduction=3'], 'does not divide the width'),
      (['--gin.t5.T5Config.scan_layers=True'], 'scan_layers=False'),
    ):
      code, err = self.train(*flags)
      self.assertEqual(code, 2, err)
      self.assertIn(message, err)
      self.assertNotIn('Traceback', err)
    self.assertFalse((self.folder / 'out').exists())


if __name__ == '__main__':
  absltest.main()
