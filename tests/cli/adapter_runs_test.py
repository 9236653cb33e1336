# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The runs of `gin/runs/` that train adapters on tasks of local tables.

Each begins from what the one before wrote, at small sizes.
"""

import json
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest
import jax
import numpy as np
import one_command
import pytest

import gin
import mergejax as mj
from mergejax import models
from mergejax import partition
from mergejax.cli import training_scores
from mergejax.core import tree
from mergejax.data import tables
from mergejax.evaluation import ranked

SIZES = dict(
  vocab_size=384, emb_dim=8, num_heads=2, head_dim=8, mlp_dim=32,
  num_encoder_layers=1, num_decoder_layers=1,
)  # fmt: skip
TARGET = '.*/(query|wo)/kernel'
TASKS = {
  'add': {'inputs': '{a} plus one', 'targets': '{b}'},
  'parity': {
    'inputs': '{a}?', 'choices': {'0': 'even', '1': 'odd'}, 'label': '{odd}',
  },
  'size': {
    'inputs': '{a} is', 'choices': ['small', 'large', 'huge'], 'label': '{size}',
  },
  'less': {'inputs': '{b} minus one', 'targets': '{a}'},
}  # fmt: skip


class AdapterRunsTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.addClassCleanup(gin.clear_config)
    cls.folder = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    # Not over the eight devices: that is compiled in twice the time.
    meshes, one = partition.make_mesh, jax.devices()[:1]
    cls.enterClassContext(
      mock.patch.object(
        partition, 'make_mesh', lambda **sizes: meshes(devices=one, **sizes)
      )
    )
    # optax's AdamW mixes dtypes.
    cls.enterClassContext(jax.numpy_dtype_promotion('standard'))
    for task in TASKS:
      (cls.folder / task).mkdir()
      rows = [
        f'{i}\t{i + 1}\t{i % 2}\t{("small", "large")[i > 9]}' for i in range(20)
      ]
      for split in ('train', 'validation'):
        text = '\n'.join(['a\tb\todd\tsize', *rows])
        (cls.folder / task / f'{split}.tsv').write_text(text)
    cls.module = models.build({'model_type': 't5x', **SIZES})
    cls.family = models.family_of(cls.module)
    rng = np.random.default_rng(0)
    cls.base = tree.unflatten({
      path: rng.normal(0, 0.2, spec.shape).astype(np.float32)
      for path, spec in cls.family.specs().items()
    })  # fmt: skip
    mj.save_checkpoint(
      cls.folder / 'base', cls.base, config=models.describe(cls.module)
    )

  def train(self, recipe, out, tasks, *flags, code=0):
    """Runs a recipe on some of the tasks; gives its folder, and what it says."""
    given = {
      task: {'files': str(self.folder / task), **TASKS[task]} for task in tasks
    }
    file = self.folder / f'{out}.gin'
    file.write_text(
      'from __gin__ import dynamic_registration\n'
      'from mergejax.nn import t5\n'
      f"include 'runs/{recipe}.gin'\n"
      't5.T5Config:\n'
      + ''.join(f'  {name} = {value}\n' for name, value in SIZES.items())
    )
    found, _, err = one_command.run(
      'train',
      f'--gin_file={file}',
      f'--gin.TASKS={given}',
      f"--gin.MODEL_DIR='{self.folder / out}'",
      f"--gin.INITIAL_CHECKPOINT='{self.folder / 'base'}'",
      '--gin.TRAIN_STEPS=2',
      '--gin.BATCH_SIZE=8',
      '--gin.LEARNING_RATE=0.1',
      "--gin.LENGTHS={'inputs': 16, 'targets': 8}",
      *flags,
    )
    self.assertEqual(found, code, err)
    self.assertNotIn('Traceback', err)
    return self.folder / out, err

  def leaves(self, path):
    """Of an adapter on disk, whichever files it has."""
    if (path / 'adapter_config.json').exists():
      return tree.flatten(mj.adapters.load(path, self.module, self.base)[1])
    return tree.flatten(mj.open_checkpoint(path).read())

  def assert_moved(self, before, after, which=lambda path: True):
    """The leaves of some paths learned, and no others."""
    self.assertEqual(before.keys(), after.keys())
    for path, leaf in before.items():
      moved = np.abs(np.asarray(after[path]) - np.asarray(leaf)).max() > 0
      self.assertEqual(moved, which(path), path)

  def test_t_few(self):
    first, _ = self.train('ia3_pretrain', 'ia3', ['add'])
    ones = {
      p: np.ones_like(x) for p, x in self.leaves(first / 'adapter').items()
    }
    self.assert_moved(ones, self.leaves(first / 'adapter'))
    start = (
      '--gin.ADAPTER_START=@adapters.from_saved()',
      f"--gin.ADAPTER_PATH='{first / 'adapter'}'",
    )
    out, _ = self.train(
      't_few', 't_few', ['parity', 'size'], *start,
      '--gin.LEARNING_RATE=1e-3',
      '--gin.CALLBACKS=[@training_scores.ranked()]',
    )  # fmt: skip
    # Two small steps from where the first run ended.
    before, after = (self.leaves(x / 'adapter') for x in (first, out))
    self.assert_moved(before, after)
    for path, leaf in before.items():
      self.assertLess(np.abs(after[path] - leaf).max(), 3e-3, path)
    lines = (out / 'train' / 'metrics.jsonl').read_text().splitlines()
    told = [json.loads(line) for line in lines]
    scores = {
      name.rsplit('_', 1)[0]: value
      for line in told for name, value in line.items() if 'eval/' in name
    }  # fmt: skip
    self.assertEqual({*scores}, {'eval/parity', 'eval/size'})
    self.assertTrue(all(0 <= score <= 1 for score in scores.values()))
    self.assertTrue(any('mc_loss' in line for line in told))
    _, err = self.train('t_few', 'plain', ['add'], code=2)
    self.assertIn('have one answer, and no choices', err)

  def test_tasks_are_numbered_as_in_training(self):
    """Also where some of them alone are scored."""
    made = lambda *names: tables.add_mixture({
      name: {'files': str(self.folder / name), **TASKS[name]} for name in names
    })  # fmt: skip
    trained, scored = made('parity', 'size'), made('size')
    poly = mj.adapters.poly(tasks=2, skills=2, targets=TARGET)
    adapted = mj.adapters.adapt(self.family, poly)
    seen = {}

    def evaluator(family, data, **_):
      seen.update(data)
      return lambda params: {}

    def start(**named):
      callback = training_scores.ranked(
        scored, lengths={'inputs': 16, 'targets': 8}, every=1, batch_size=4,
        **named,
      )  # fmt: skip
      callback.on_start(mock.MagicMock(family=adapted))

    with mock.patch.object(ranked, 'rank_evaluator', evaluator):
      start(trained=trained)
      (batches,) = seen.values()
      for batch in batches:
        np.testing.assert_array_equal(batch['task_ids'], 1)
      for message, named in (
        ('name it as `trained`', {}),
        ('Unknown task, of training,', {'trained': made('parity')}),
      ):
        with self.assertRaisesRegex(mj.ConfigError, message):
          start(**named)

  def test_poly(self):
    flags = ('--gin.SKILLS=2', '--gin.RANK=2', f'--gin.POLY_TARGETS={[TARGET]}')
    first, err = self.train(
      'poly', 'poly', ['add', 'less'], '--gin.NUM_TASKS=2', *flags
    )
    self.assertRegex(err, 'task_ids: 0 add_.*, 1 less_')
    before = self.leaves(first / 'adapter')
    # Both tasks chose, at a rate of their own.
    logits = {p: x for p, x in before.items() if p.endswith('poly_logits')}
    for path, leaf in logits.items():
      self.assertEqual(leaf.shape, (2, 2), path)
      self.assertGreater(np.abs(leaf).max(), 2e-3, path)
    # The LoRA of each is a library of adapters of this base.
    library = mj.adapters.Library(first / 'adapters')
    self.assertEqual(
      [name.split('_')[0] for name in library.cards], ['add', 'less']
    )
    poly = mj.adapters.poly(tasks=2, skills=2, rank=2, targets=TARGET)
    specs = self.family.specs()
    tasks = [poly.of_task(specs, tree.unflatten(before), i) for i in (0, 1)]
    for own, name in zip(tasks, library.cards):
      _, found = library.load(name, self.module, self.base)
      found = tree.flatten(found)
      for path, leaf in tree.flatten(own).items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-6, err_msg=path)
    start = f"--gin.INVENTORY='{first / 'adapter'}'"
    out, _ = self.train(
      'poly_mu', 'mu', ['size'], start, '--gin.INVENTORY_TASKS=2', *flags,
      '--gin.LEARNING_RATE=0.0', '--gin.train.train_model.choices=False',
    )  # fmt: skip
    mean = poly.collapsed(specs, tree.unflatten(before))
    found = self.leaves(out / 'adapter')
    for path, leaf in tree.flatten(mean).items():
      np.testing.assert_allclose(found[path], leaf, atol=1e-7, err_msg=path)
    # What does not fit is told before anything is trained.
    for recipe, more, message in (
      ('poly', ('--gin.NUM_TASKS=1',), 'there are 1 tasks'),
      ('poly', ('--gin.NUM_TASKS=2', '--gin.PACK=True'), 'pack=False'),
      ('poly_adapt', (start, '--gin.RANK=1', '--gin.NUM_TASKS=2'), 'its rank'),
      ('poly_mu', (start, '--gin.INVENTORY_TASKS=3'), 'poly_logits'),
    ):
      _, err = self.train(
        recipe, 'refused', ['add', 'less'], *flags, *more, code=2
      )
      self.assertIn(message, err)
    self.assertFalse((self.folder / 'refused' / 'train').exists())

  @pytest.mark.slow  # the run; what it begins from is tested beside it
  def test_poly_adapt(self):
    flags = ('--gin.SKILLS=2', '--gin.RANK=2', f'--gin.POLY_TARGETS={[TARGET]}')
    first, _ = self.train(
      'poly', 'poly_before', ['add', 'less'], '--gin.NUM_TASKS=2', *flags
    )
    before = self.leaves(first / 'adapter')
    out, _ = self.train(
      'poly_adapt', 'adapt', ['add'], *flags, '--gin.LEARN=routing',
      f"--gin.INVENTORY='{first / 'adapter'}'",
    )  # fmt: skip
    after = self.leaves(out / 'adapter')
    self.assertEqual(before.keys(), after.keys())
    for path, leaf in after.items():
      if path.endswith('poly_logits'):
        self.assertEqual(leaf.shape, (1, 2), path)
      else:  # Z alone learns
        np.testing.assert_array_equal(leaf, before[path], path)

  @pytest.mark.slow  # four runs of what is tested one by one elsewhere
  def test_attempt(self):
    flags = ('--gin.WARMUP=1', '--gin.PROMPT_LENGTH=3')
    sources = [
      self.train('prompt', f'prompt_{task}', [task], *flags)[0] / 'adapter'
      for task in ('add', 'less')
    ]
    told = f'--gin.SOURCES={[str(path) for path in sources]}'
    spot, _ = self.train(
      'prompt', 'spot', ['add'], *flags, f"--gin.SOURCES=['{sources[0]}']",
      '--gin.ADAPTER_START=@adapters.from_spot()', '--gin.LEARNING_RATE=0.0',
    )  # fmt: skip
    (begun,) = self.leaves(spot / 'adapter').values()
    given = [self.leaves(path)['prompts/target'] for path in sources]
    np.testing.assert_allclose(begun, given[0], rtol=1e-4)
    out, _ = self.train(
      'attempt', 'attempt', ['add', 'less'], *flags, told,
      '--gin.NUM_SOURCES=2', '--gin.NUM_TASKS=2',
    )  # fmt: skip
    leaves = self.leaves(out / 'adapter')
    np.testing.assert_array_equal(leaves['prompts/source'], given)
    for target in leaves['prompts/target']:  # of each task, from the first
      moved = np.abs(target - given[0]).max()
      self.assertTrue(0 < moved < 1, moved)
    # Its attention goes on in another run.
    again, _ = self.train(
      'attempt', 'again', ['less'], *flags, told, '--gin.NUM_SOURCES=2',
      f"--gin.SUB_NETWORK='{out / 'adapter'}'", '--gin.LEARNING_RATE=0.0',
    )  # fmt: skip
    for path, leaf in self.leaves(again / 'adapter').items():
      if path.startswith('attempt/'):
        np.testing.assert_allclose(leaf, leaves[path], atol=1e-4)


if __name__ == '__main__':
  absltest.main()
