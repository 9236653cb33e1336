# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters of PEFT in recipes: folded in delta space, extracted again."""

import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import ml_dtypes
import models_on_disk
import numpy as np
import safetensors.numpy

import mergejax as mj
from mergejax.core import tree as tree_lib


class AdapterTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    rng = np.random.default_rng(0)
    self.base = models_on_disk.llama(rng, ml_dtypes.bfloat16)
    models_on_disk.save(self.folder / 'base', self.base)
    self.rng = rng

  def adapter(self, name, leaves, **config):
    folder = self.folder / name
    folder.mkdir()
    (folder / 'adapter_config.json').write_text(json.dumps(config))
    safetensors.numpy.save_file(leaves, folder / 'adapter_model.safetensors')
    return str(folder)

  def lora(self, name, modules, rank=2, **config):
    leaves = {}
    for module in modules:
      rows, columns = self.base[f'{module}.weight'].shape
      prefix = f'base_model.model.{module}'
      leaves[f'{prefix}.lora_A.weight'] = self.rng.normal(size=(rank, columns)).astype(np.float32)  # fmt: skip
      leaves[f'{prefix}.lora_B.weight'] = self.rng.normal(size=(rows, rank)).astype(np.float32)  # fmt: skip
    path = self.adapter(
      name, leaves, peft_type='LORA', r=rank, lora_alpha=3, **config
    )
    deltas = {
      module: leaves[f'base_model.model.{module}.lora_B.weight']
      @ leaves[f'base_model.model.{module}.lora_A.weight']
      * (3 / (np.sqrt(rank) if config.get('use_rslora') else rank))
      for module in modules
    }
    return path, deltas

  @parameterized.parameters({}, {'use_rslora': True})
  def test_lora_is_merged_in_delta_space(self, **config):
    module = 'model.layers.1.mlp.up_proj'
    one, deltas1 = self.lora('one', [module], **config)
    two, deltas2 = self.lora('two', [module, 'model.layers.0.self_attn.q_proj'])
    base = str(self.folder / 'base')
    recipe = {
      'merge_method': 'task_arithmetic',
      'base_model': base,
      'models': [one, f'{base}+{two}'],
      'parameters': {'lambda': 0.5},
    }
    plan = mj.plan(recipe)
    mj.execute(plan, self.folder / 'out')
    merged = tree_lib.flatten(mj.open_checkpoint(self.folder / 'out').read())
    for path, leaf in merged.items():
      self.assertEqual(leaf.dtype, ml_dtypes.bfloat16)
      expected = self.base[path].astype(np.float32)
      name = path.removesuffix('.weight')
      for deltas in (deltas1, deltas2):
        if name in deltas:
          expected = expected + 0.5 * deltas[name]
      np.testing.assert_array_equal(
        leaf, expected.astype(ml_dtypes.bfloat16), err_msg=path
      )

  def test_ia3(self):
    down, q = 'model.layers.0.mlp.down_proj', 'model.layers.0.self_attn.q_proj'
    inputs = self.rng.normal(size=(1, 25)).astype(np.float32)
    outputs = self.rng.normal(size=(12, 1)).astype(np.float32)
    path = self.adapter(
      'ia3',
      {
        f'base_model.model.{down}.ia3_l': inputs,
        f'base_model.model.{q}.ia3_l': outputs,
      },
      peft_type='IA3',
      feedforward_modules=['down_proj'],
    )
    recipe = {
      'merge_method': 'passthrough',
      'base_model': str(self.folder / 'base'),
      'models': [path],
      'dtype': 'float32',
    }
    mj.execute(mj.plan(recipe), self.folder / 'out')
    merged = tree_lib.flatten(mj.open_checkpoint(self.folder / 'out').read())
    wide = {p: leaf.astype(np.float32) for p, leaf in self.base.items()}
    np.testing.assert_array_equal(
      merged[f'{down}.weight'], wide[f'{down}.weight'] * inputs
    )
    np.testing.assert_array_equal(
      merged[f'{q}.weight'], wide[f'{q}.weight'] * outputs
    )

  def test_mistakes(self):
    base = str(self.folder / 'base')
    one, _ = self.lora('one', ['model.layers.0.mlp.up_proj'])
    with self.assertRaisesRegex(mj.UserError, 'is an adapter'):
      mj.plan({'merge_method': 'linear', 'models': [one]})
    strange = self.adapter('p', {}, peft_type='PREFIX_TUNING')
    with self.assertRaisesRegex(mj.UserError, 'PREFIX_TUNING'):
      mj.plan({'merge_method': 'linear', 'models': [f'{base}+{strange}']})
    other = self.adapter(
      'o',
      {'base_model.model.nowhere.lora_A.weight': np.zeros((1, 2), np.float32)},
      peft_type='LORA',
    )
    with self.assertRaisesRegex(mj.UserError, 'belongs to no parameter'):
      mj.plan({'merge_method': 'linear', 'models': [f'{base}+{other}']})

  def test_extracted_lora_is_the_best_and_reports_what_it_misses(self):
    from mergejax.cli import main

    module = 'model.layers.1.mlp.up_proj'
    tuned = {p: leaf.astype(np.float32) for p, leaf in self.base.items()}
    delta = self.rng.normal(size=(25, 12)).astype(np.float32)
    tuned[f'{module}.weight'] = tuned[f'{module}.weight'] + delta
    tuned['model.norm.weight'] = tuned['model.norm.weight'] + 1
    models_on_disk.save(self.folder / 'tuned', tuned)
    base, model, out = (str(self.folder / n) for n in ('base', 'tuned', 'lora'))
    from mergejax.checkpoints.peft import extract

    residuals, missed = extract.extract_lora(model, base, out, rank=3)
    self.assertEqual(missed, ['model.norm.weight'])
    singular = np.linalg.svd(delta, compute_uv=False)
    best = np.sqrt(np.sum(singular[3:] ** 2) / np.sum(singular**2))
    shares = {r.path: r.share for r in residuals}
    np.testing.assert_allclose(shares[f'{module}.weight'], best, rtol=1e-4)
    self.assertEqual(sum(s > 0 for s in shares.values()), 1)
    self.assertEqual(
      main.main(['extract-lora', model, base, f'{out}12', '--rank', '12']), 0
    )
    mj.execute(
      mj.plan({
        'merge_method': 'passthrough', 'base_model': base,
        'models': [f'{out}12'], 'dtype': 'float32',
      }),
      self.folder / 'again',
    )  # fmt: skip
    again = tree_lib.flatten(mj.open_checkpoint(self.folder / 'again').read())
    np.testing.assert_allclose(
      again[f'{module}.weight'], tuned[f'{module}.weight'], atol=1e-5
    )


if __name__ == '__main__':
  absltest.main()
