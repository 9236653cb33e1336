# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Two tasks of small images, and three models of them, for commands."""

import pathlib
import tempfile

from absl.testing import absltest
import jax
import numpy as np
import one_command
import yaml

import mergejax as mj
from mergejax import models

CLASSES = 3


class Case(absltest.TestCase):
  """`suite` has the tasks 'left' and 'right'; models are 'base', 'a', 'b'."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    rng = np.random.default_rng(0)
    for task in ('left', 'right'):
      (cls.folder / task).mkdir()
      for split in ('train', 'validation', 'test'):
        labels = rng.integers(0, CLASSES, 60)
        images = rng.integers(0, 90, (60, 4, 4))
        column = labels if task == 'left' else (labels + 1) % CLASSES
        images[np.arange(60), :, column] += 150
        np.savez(
          cls.folder / task / f'{split}.npz',
          images=images.astype(np.uint8), labels=labels.astype(np.uint8),
        )  # fmt: skip
    cls.suite = cls.folder / 'suite.yaml'
    tasks = {t: {'images': str(cls.folder / t)} for t in ('left', 'right')}
    cls.suite.write_text(yaml.safe_dump({'tasks': tasks, 'batch_size': 16}))
    module = models.build(
      dict(model_type='mlp', hidden=(6,), image_shape=(4, 4, 1), classes=CLASSES)
    )  # fmt: skip
    for i, name in enumerate(('base', 'a', 'b')):
      params = models.family_of(module).init(jax.random.key(i))
      mj.save_checkpoint(
        cls.folder / name, params, config=models.describe(module)
      )

  def run_command(self, *arguments, code=0):
    found, out, err = one_command.run(*arguments)
    self.assertEqual(found, code, err)
    return err if code else out

  def path(self, name):
    return self.folder / name

  def recipe(self, name, data):
    path = self.folder / f'{name}.yaml'
    path.write_text(yaml.safe_dump(data))
    return path
