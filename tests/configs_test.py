# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Every recipe that is shipped runs, on models as the quickstart makes them."""

import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import drawn
import jax
import numpy as np

import mergejax as mj
from mergejax import models
from mergejax.cli import main as main_lib
from mergejax.core import tree as tree_lib
from mergejax.methods import named

FOLDER = pathlib.Path(__file__).parent.parent / 'configs' / 'merge'
FILES = sorted(FOLDER.glob('*.yaml'))
SEARCHES = sorted(FOLDER.parent.glob('search/*.yaml'))
EXPERTS = ('c_headers', 'licences', 'python', 'reference', 'unicode')


class ConfigsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(absltest.get_default_test_tmpdir()) / 'configs'
    cls.folder.mkdir(parents=True, exist_ok=True)
    module = models.build(
      dict(model_type='lm', vocab_size=20, emb_dim=8, num_heads=2, head_dim=4,
           mlp_dim=12, num_layers=2)
    )  # fmt: skip
    checkpoints = cls.folder / 'quickstart' / 'checkpoints'
    for k, name in enumerate(('seed', *(f'experts/{e}' for e in EXPERTS))):
      if not (checkpoints / name).exists():
        mj.save_checkpoint(
          checkpoints / name,
          drawn.params(models.family_of(module), k),
          config=models.describe(module),
        )
    rng = np.random.default_rng(0)
    specs = models.family_of(module).specs()
    for name in ('python', 'c_headers'):
      fisher = {
        f'{p}/fisher': rng.gamma(1.0, size=s.shape) for p, s in specs.items()
      }
      gram = {}
      for path, spec in specs.items():
        if 'mlp/' in path:
          x = rng.normal(size=(50, spec.shape[0]))
          gram[f'{path}/gram'] = x.T @ x / 50
      for kind, leaves in (('fisher', fisher), ('gram', gram)):
        leaves = {p: leaf.astype(np.float32) for p, leaf in leaves.items()}
        mj.save_checkpoint(
          cls.folder / f'{name}.{kind}.safetensors', leaves, overwrite=True
        )

  def test_there_is_one_for_every_method(self):
    methods = [mj.load_recipe(file).method for file in FILES]
    self.assertCountEqual(set(methods), set(named.METHODS))

  @parameterized.parameters(*FILES)
  def test_runs(self, file):
    previous = os.getcwd()
    os.chdir(self.folder)
    self.addCleanup(os.chdir, previous)
    text = file.read_text()
    self.assertIn('# Paper: ', text)
    self.assertIn(f'mergejax merge configs/merge/{file.name} OUT', text)
    plan = mj.plan(file)
    out = pathlib.Path(self.create_tempdir().full_path) / 'out'
    mj.execute(plan, out)
    module, params = mj.load_model(out)
    tree_lib.check_same(
      models.family_of(module).specs(),
      tree_lib.specs(params),
      expected_name='its configuration',
      given_name='the merged model',
    )
    self.assertTrue(
      all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))
    )

  def test_plans_are_the_same_in_every_process(self):
    """Resuming goes by a plan's identity, so no order of a set may be in it."""
    code = (
      'import sys\n'
      'import mergejax as mj\n'
      'for file in sys.argv[1:]:\n'
      '  print(file, mj.plan(file).identity)\n'
    )
    processes = [
      subprocess.Popen(
        [sys.executable, '-c', code, *map(str, FILES)],
        cwd=self.folder, stdout=subprocess.PIPE, text=True,
        env={**os.environ, 'PYTHONHASHSEED': str(seed)},
      )
      for seed in (1, 2)
    ]  # fmt: skip
    found = [process.communicate()[0] for process in processes]
    self.assertLen(found[0].splitlines(), len(FILES))
    self.assertEqual(*found)

  @parameterized.parameters(*SEARCHES)
  def test_search_is_understood(self, file):
    previous = os.getcwd()
    os.chdir(self.folder)
    self.addCleanup(os.chdir, previous)
    text = file.read_text()
    self.assertIn('# Paper: ', text)
    self.assertIn(f'mergejax search configs/search/{file.name} OUT', text)
    for name in EXPERTS:
      corpus = self.folder / 'quickstart' / 'corpora' / name
      corpus.mkdir(parents=True, exist_ok=True)
      for split in ('train', 'validation', 'test'):
        (corpus / f'{split}.jsonl').write_text('{"text": "a"}\n')
    out = pathlib.Path(self.create_tempdir().full_path) / 'out'
    code = main_lib.main(['search', str(file), str(out), '--dry_run'])
    self.assertEqual(code, 0)
    self.assertFalse(out.exists())


if __name__ == '__main__':
  absltest.main()
