# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax train` with an adapter, and `mergejax inspect` of what it writes.

Also with the run of `gin/runs/ladder.gin`, at small sizes.
"""

import json
import pathlib

from absl.testing import absltest
import environments
import jax
import numpy as np
from one_command import run

import gin
import mergejax as mj
from mergejax import models
from mergejax.core import tree

SIZES = dict(
  vocab_size=384, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32,
  num_decoder_layers=1,
)  # fmt: skip


class Case(absltest.TestCase):
  """A base on disk, a task, and a run that is included."""

  included = 'runs/text_to_text.gin'
  encoder_layers = 1

  def setUp(self):
    super().setUp()
    self.addCleanup(gin.clear_config)
    self.enter_context(environments.one_device())
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    rows = [f'{i} plus one\t{i + 1}' for i in range(40)]
    (self.folder / 'train.tsv').write_text('\n'.join(['sum\tresult', *rows]))
    sizes = {**SIZES, 'num_encoder_layers': self.encoder_layers}
    (self.folder / 'tiny.gin').write_text(
      'from __gin__ import dynamic_registration\n'
      'from mergejax.nn import t5\n'
      f"include '{self.included}'\n"
      't5.T5Config:\n'
      + ''.join(f'  {name} = {value}\n' for name, value in sizes.items())
    )
    module = models.build({'model_type': 't5x', **sizes})
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
      *flags,
    )

  def refuses(self, cases):
    """Every run of `(flags, message)` ends with 2 and writes nothing."""
    for flags, message in cases:
      code, _, err = self.train(*flags)
      self.assertEqual(code, 2, err)
      self.assertIn(message, err)
      self.assertNotIn('Traceback', err)
    self.assertFalse((self.folder / 'out').exists())


class TrainTest(Case):
  def test_lora(self):
    flags = '--gin.ADAPTER=@adapters.lora()', '--gin.adapters.lora.rank=3'
    code, _, err = self.train(*flags, '--gin.LEARNING_RATE=0.1')
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
    code, _, err = self.train(
      flags[0], '--gin.adapters.lora.rank=2', '--gin.LEARNING_RATE=0.1'
    )
    self.assertEqual(code, 2)
    self.assertIn('adapter:', err)
    self.assertNotIn('Traceback', err)

  def test_mistakes(self):
    lora = '--gin.ADAPTER=@adapters.lora()'
    self.refuses((
      ([lora, "--gin.adapters.lora.targets='.*nothing'"], 'matches no parameter'),
      ([lora, '--gin.adapters.lora.rank=0'], 'rank must be'),
      ([lora, "--gin.train.train_model.restore='state'"], 'an adapter is trained'),
    ))  # fmt: skip


class LadderTest(Case):
  included = 'runs/ladder.gin'
  encoder_layers = 2

  def test_side_network_is_trained_and_written(self):
    # optax's AdamW mixes dtypes.
    with jax.numpy_dtype_promotion('standard'):
      code, _, err = self.train(
        '--gin.ENCODER_LAYERS=[1]', '--gin.WARMUP=1',
        '--gin.t5.T5Config.scan_layers=True',
      )  # fmt: skip
    self.assertEqual(code, 0, err)
    # Beside the same backbone with its layers one by one it has its place, too.
    adapted = mj.adapters.adapt(
      self.family, mj.adapters.ladder(encoder_layers=[1])
    )
    store = mj.open_checkpoint(self.folder / 'out' / 'adapter')
    found = tree.flatten(store.read())
    self.assertEqual({*found}, {*adapted.adapter_specs})
    adapted.joined(self.base, tree.unflatten(found))
    # What begins as zeros has moved.
    self.assertGreater(np.abs(found['side/up/bias']).max(), 0)
    count = sum(leaf.size for leaf in found.values())
    code, told, err = run('inspect', self.folder / 'out' / 'adapter')
    self.assertEqual(code, 0, err)
    self.assertIn(f'ladder: {count:,} numbers in', told)
    mark = mj.stats.fingerprint(self.base)
    self.assertIn(f'base: {self.folder}/base (fingerprint {mark})', told)

  def test_mistakes(self):
    self.refuses((
      (['--gin.ENCODER_LAYERS=[2]'], 'has 2 layers, numbered from 0 to 1'),
      (['--gin.DECODER_LAYERS=[]'], 'at least one layer'),
      (['--gin.adapters.ladder.reduction=3'], 'does not divide the width'),
    ))  # fmt: skip


if __name__ == '__main__':
  absltest.main()
