# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters merged by what they change: both drivers, against NumPy."""

import contextlib
import io
import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import adapters_on_disk
import numpy as np
import yaml

import mergejax as mj
from mergejax.adapters import changes
from mergejax.cli import main as main_lib
from mergejax.core import tree as tree_lib

Q, V = 'model.layers.0.self_attn.q_proj', 'model.layers.1.self_attn.v_proj'
# [outputs, inputs], alike so that programs are.
SHAPES = {Q: (7, 5), V: (7, 5)}


class Case(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.disk = adapters_on_disk.Folder(self.create_tempdir().full_path)
    self.base_leaves = {
      f'{m}.weight': self.disk.random(*SHAPES[m]) for m in SHAPES
    }
    self.base = self.disk.model(self.base_leaves)

  def lora(self, name, modules=(Q, V), rank=2, alpha=3.0, **config):
    """`(path, {leaf: product in float64})` of an adapter."""
    leaves, products = {}, {}
    for module in modules:
      rows, columns = SHAPES[module]
      a, b = self.disk.random(rank, columns), self.disk.random(rows, rank)
      leaves[f'{module}.lora_A.weight'] = a
      leaves[f'{module}.lora_B.weight'] = b
      scale = alpha / (np.sqrt(rank) if config.get('use_rslora') else rank)
      products[f'{module}.weight'] = (
        scale * b.astype(np.float64) @ a.astype(np.float64)
      )
    path = self.disk.adapter(
      leaves, name, r=rank, lora_alpha=alpha, task_type='CAUSAL_LM', **config
    )
    return path, products

  def mark(self, path, fingerprint):
    file = pathlib.Path(path) / changes.BESIDE
    file.write_text(json.dumps({'base': fingerprint}))

  def recipe(self, method, models, parameters=None, adapter=None, **more):
    return {
      'merge_method': method, 'base_model': self.base, 'models': models,
      'parameters': parameters or {}, 'format': 'adapter',
      **({'adapter': adapter} if adapter else {}), **more,
    }  # fmt: skip

  def run_recipe(self, *args, **more):
    out = self.disk.path / f'out{len(list(self.disk.path.iterdir()))}'
    report = mj.execute(mj.plan(self.recipe(*args, **more)), out)
    return out, report

  def products_of(self, path):
    """The products of an adapter on disk, by hand from its files."""
    config = json.loads((path / 'adapter_config.json').read_text())
    leaves = tree_lib.flatten(
      mj.open_checkpoint(path / 'adapter_model.safetensors').read()
    )
    found = {}
    for name, a in leaves.items():
      if '.lora_A.' in name:
        module = name.removeprefix('base_model.model.').removesuffix(
          '.lora_A.weight'
        )
        b = leaves[name.replace('lora_A', 'lora_B')]
        rank = config['rank_pattern'].get(
          '^' + module.replace('.', r'\.'), config['r']
        )
        self.assertEqual(len(a), rank)
        found[f'{module}.weight'] = b @ a  # alpha is the rank
    return found

  def close(self, found, expected, tolerance=2e-5):
    self.assertCountEqual(found, expected)
    for path, leaf in expected.items():
      np.testing.assert_allclose(
        found[path], leaf, rtol=tolerance, atol=tolerance, err_msg=path
      )


class LoraTest(Case):
  @parameterized.parameters({}, {'use_rslora': True})
  def test_one_adapter_of_weight_1_is_what_it_was(self, **config):
    path, products = self.lora('a', **config)
    out, report = self.run_recipe(
      'task_arithmetic', [path], {'weight': 1.0, 'lambda': 1.0}
    )
    self.close(self.products_of(out), products)
    self.assertLess(max(one.share for one in report.residuals), 1e-6)
    self.close(mj.merge([changes.ChangeStore(path)], 'linear'), products)

  def test_a_sum_of_products_whatever_the_ranks(self):
    one, products1 = self.lora('one', rank=1)
    two, products2 = self.lora('two', [Q], rank=3, alpha=5)
    weights = [0.5, 2.0]
    models = [
      {'model': path, 'parameters': {'weight': w}}
      for path, w in zip((one, two), weights)
    ]
    expected = {path: 0.5 * leaf for path, leaf in products1.items()}
    expected[f'{Q}.weight'] += 2.0 * products2[f'{Q}.weight']
    for rank, ranks in (('exact', {Q: 4, V: 1}), (4, {Q: 4, V: 4})):
      out, report = self.run_recipe(
        'task_arithmetic', models, adapter={'rank': rank}
      )
      self.close(self.products_of(out), expected)
      self.assertLess(max(r.share for r in report.residuals), 1e-5)
      self.assertEqual(changes.ChangeStore(out).ranks, ranks)
    # The order of models does not matter.
    again, _ = self.run_recipe(
      'task_arithmetic', models[::-1], adapter={'rank': 'exact'}
    )
    self.close(self.products_of(again), expected)
    # No rank but exact: what is missed is told, and the best there is.
    out, report = self.run_recipe(
      'task_arithmetic', models, adapter={'rank': 2}
    )
    found = self.products_of(out)
    for residual in report.residuals:
      wide = expected[residual.path]
      s = np.linalg.svd(wide, compute_uv=False)
      share = np.sqrt(np.sum(s[2:] ** 2) / np.sum(s**2))
      self.assertAlmostEqual(residual.share, share, places=5)
      missed = np.linalg.norm(wide - found[residual.path])
      self.assertAlmostEqual(missed / np.linalg.norm(wide), share, places=5)
    self.assertIn('rank 2: misses', report.describe())
    manifest = json.loads((out / 'manifest.json').read_text())
    self.assertEqual(
      manifest['residuals'], {r.path: r.share for r in report.residuals}
    )

  # Where a method takes norms of whole leaves, pieces add up in another order.
  @parameterized.parameters(
    ('linear', {}, True), ('ties', {'density': 0.5}, True),
    ('model_stock', {}, False), ('slerp', {'t': 0.3}, False),
  )  # fmt: skip
  def test_drivers_agree(self, method, parameters, to_the_bit):
    paths = [self.lora('a', rank=2)[0], self.lora('b', [Q], rank=3)[0]]
    # As in mergekit, one of the two is the base.
    base = paths[0] if method == 'slerp' else self.base
    recipe = self.recipe(method, paths, parameters, {'rank': 'exact'})
    plan = mj.plan({**recipe, 'base_model': base})
    out, again = self.disk.path / 'out', self.disk.path / 'again'
    mj.execute(plan, out)
    stores = [changes.ChangeStore(path) for path in paths]
    merged = mj.merge(
      stores[method == 'slerp' :], method,
      base=stores[0] if method == 'slerp' else base, weights=plan.tasks[0].weights,
      **plan.tasks[0].options,
    )  # fmt: skip
    mj.adapters.write_changes(again, merged, stores, rank='exact')
    if to_the_bit:
      for name in ('adapter_model.safetensors', 'adapter_config.json'):
        self.assertEqual((out / name).read_bytes(), (again / name).read_bytes())
    self.close(self.products_of(out), merged)
    self.close(self.products_of(again), merged)

  def test_folded_and_as_an_adapter_are_one_merge(self):
    paths = [self.lora('a', rank=2)[0], self.lora('b', [V], rank=3)[0]]
    parameters = {'density': 0.6, 'weight': 0.7}
    out, _ = self.run_recipe('ties', paths, parameters, {'rank': 'exact'})
    recipe = self.recipe('ties', paths, parameters) | {'format': 'safetensors'}
    mj.execute(mj.plan(recipe), self.disk.path / 'whole')
    whole = tree_lib.flatten(
      mj.open_checkpoint(self.disk.path / 'whole').read()
    )
    adapter = self.products_of(out)
    for path, leaf in whole.items():
      expected = self.base_leaves[path] + adapter[path]
      np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=2e-5)
    # In memory a base and an adapter, joined by a plus, are a model.
    pairs = [f'{self.base}+{path}' for path in paths]
    memory = mj.merge(pairs, 'ties', base=self.base, density=0.6, weights=[0.7] * 2)  # fmt: skip
    self.assertCountEqual(memory, whole)

  def test_a_plus_in_the_name_of_a_base(self):
    one, products = self.lora('a')
    base = self.disk.model(self.base_leaves, name='base+more')
    expected = {
      path: leaf + products[path] for path, leaf in self.base_leaves.items()
    }
    pair = f'{base}+{one}'
    for name in (pair, pathlib.Path(pair)):
      self.close(mj.merge([name], 'linear'), expected)
    self.assertEqual(changes.parts(base), (base, None))
    recipe = {'merge_method': 'linear', 'models': [pair]}
    mj.execute(mj.plan(recipe), self.disk.path / 'whole')
    whole = mj.open_checkpoint(self.disk.path / 'whole').read()
    self.close(tree_lib.flatten(whole), expected)
    out, _ = self.run_recipe('linear', [pair], base_model=base)
    self.close(self.products_of(out), products)

  def test_factors_only_by_name(self):
    one, two = self.lora('a')[0], self.lora('b')[0]
    out, report = self.run_recipe(
      'linear', [one, two], {}, {'space': 'factors'}
    )
    self.assertEqual(report.residuals, [])
    files = [
      tree_lib.flatten(mj.open_checkpoint(pathlib.Path(p) / 'adapter_model.safetensors').read())
      for p in (one, two, out)
    ]  # fmt: skip
    for name, leaf in files[2].items():
      np.testing.assert_allclose(
        leaf, (files[0][name] + files[1][name]) / 2, rtol=1e-6
      )
    # which is not the mean of the products.
    self.assertEqual(changes.ChangeStore(out).scale(Q), 1.5)
    for other, message in (
      (self.lora('c', rank=3, alpha=4.5)[0], 'different ranks have no mean'),
      (self.lora('d', alpha=8)[0], 'differently'),
    ):
      with self.assertRaisesRegex(mj.UserError, message):
        self.run_recipe('linear', [one, other], {}, {'space': 'factors'})

  def test_rounded_once_to_the_dtype(self):
    path, _ = self.lora('a')
    out, _ = self.run_recipe('linear', [path], dtype='bfloat16')
    specs = mj.open_checkpoint(out / 'adapter_model.safetensors').specs()
    self.assertEqual({s.dtype.name for s in specs.values()}, {'bfloat16'})
    # The factors are, and not the products before them.
    store = changes.ChangeStore(path)
    again = self.disk.path / 'again'
    mj.adapters.write_changes(again, store.read(), [store], dtype='bfloat16')
    name = 'adapter_model.safetensors'
    self.assertEqual((out / name).read_bytes(), (again / name).read_bytes())

  def test_the_same_command_finds_it_done(self):
    path, _ = self.lora('a')
    plan = mj.plan(self.recipe('linear', [path]))
    out = self.disk.path / 'out'
    self.assertEqual(mj.execute(plan, out).computed, 2)
    self.assertEqual(mj.execute(plan, out).computed, 0)
    self.mark(path, 'another')
    with self.assertRaisesRegex(mj.UserError, 'another base'):
      mj.plan(self.recipe('linear', [path]))


class VectorsTest(Case):
  def ia3(self, name, modules):
    leaves = {m: self.disk.random(*shape) for m, shape in modules.items()}
    path = self.disk.adapter(
      {f'{m}.ia3_l': leaf for m, leaf in leaves.items()}, name,
      peft_type='IA3', target_modules=[*modules],
      feedforward_modules=[m for m, s in modules.items() if s[0] == 1],
    )  # fmt: skip
    return path, leaves

  def test_ia3_from_1(self):
    one, leaves1 = self.ia3('one', {Q: (7, 1), V: (1, 5)})
    two, leaves2 = self.ia3('two', {Q: (7, 1)})
    out, _ = self.run_recipe('task_arithmetic', [one, two], {'lambda': 0.5})
    found = mj.open_checkpoint(out / 'adapter_model.safetensors').read()
    q = 1 + 0.5 * (leaves1[Q] - 1 + leaves2[Q] - 1)
    v = 1 + 0.5 * (leaves1[V] - 1)
    for module, leaf in ((Q, q), (V, v)):
      np.testing.assert_allclose(
        found[f'base_model.model.{module}.ia3_l'], leaf, rtol=1e-5, atol=1e-6
      )
    config = json.loads((out / 'adapter_config.json').read_text())
    self.assertEqual(config['target_modules'], [Q, V])
    self.assertEqual(config['feedforward_modules'], [V])

  def prompt(self, name, length=3):
    vectors = self.disk.random(length, 4)
    path = self.disk.adapter(
      {'base_model.prompt_embeddings': vectors}, name,
      peft_type='PROMPT_TUNING', num_virtual_tokens=length,
    )  # fmt: skip
    file = pathlib.Path(path) / 'adapter_model.safetensors'
    mj.save_checkpoint(
      file, {'prompt_embeddings': vectors}, 'safetensors', overwrite=True
    )
    return path, vectors

  def test_prompts(self):
    (one, x), (two, y), (start, z) = map(self.prompt, 'abz')
    out, _ = self.run_recipe('linear', [one, two])
    read = lambda out: mj.open_checkpoint(out / 'adapter_model.safetensors').read()['prompt_embeddings']  # fmt: skip
    np.testing.assert_allclose(read(out), (x + y) / 2, rtol=1e-6)
    with self.assertRaisesRegex(
      mj.UserError, 'no PROMPT_TUNING changes nothing'
    ):
      self.run_recipe('task_arithmetic', [one, two])
    with self.assertRaisesRegex(
      mj.UserError, 'no PROMPT_TUNING changes nothing'
    ):
      mj.merge([changes.ChangeStore(one)], 'task_arithmetic')
    out, _ = self.run_recipe(
      'task_arithmetic', [one, two], {'lambda': 0.5}, base_model=start
    )
    expected = z + 0.5 * (x - z + y - z)
    np.testing.assert_allclose(read(out), expected, rtol=1e-5, atol=1e-6)
    memory = mj.merge(
      [changes.ChangeStore(one), changes.ChangeStore(two)],
      'task_arithmetic', base=changes.ChangeStore(start), scale=0.5,
    )  # fmt: skip
    np.testing.assert_array_equal(memory['prompt_embeddings'], read(out))
    longer, _ = self.prompt('longer', 5)
    with self.assertRaisesRegex(mj.UserError, 'prompts of one length'):
      self.run_recipe('linear', [one, longer])


class MistakesTest(Case):
  def refused(self, message, *args, flags=(), **more):
    """`mergejax merge` ends with 2, one message, and leaves nothing."""
    file, out = self.disk.path / 'r.yaml', self.disk.path / 'refused'
    recipe = self.recipe(*args, **more)
    file.write_text(yaml.safe_dump({k: v for k, v in recipe.items() if v}))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
      code = main_lib.main(['merge', str(file), str(out), *flags])
    self.assertEqual(code, 2, said.getvalue())
    self.assertRegex(said.getvalue(), message)
    self.assertStartsWith(said.getvalue(), 'mergejax')
    self.assertNotIn('Traceback', said.getvalue())
    self.assertFalse(out.exists())

  def test_another_base(self):
    (one, _), (two, _) = self.lora('a'), self.lora('b')
    own = mj.stats.fingerprint(self.base_leaves)
    self.mark(one, own)
    self.run_recipe('linear', [one, two])
    self.mark(two, own)
    out, _ = self.run_recipe('linear', [one, two])
    self.assertEqual(changes.ChangeStore(out).base, own)
    self.mark(two, 'f' * 32)
    self.refused('trained on different bases', 'linear', [one, two])
    with self.assertRaisesRegex(mj.CheckpointError, 'different bases'):
      mj.merge(list(map(changes.ChangeStore, (one, two))), 'linear')
    self.mark(one, 'f' * 32)
    self.refused('another base than .*base', 'linear', [one, two])
    # Folded, it is the same mistake.
    self.refused(
      'another base than', 'linear', [one, two], format='safetensors'
    )
    with self.assertRaisesRegex(mj.CheckpointError, 'another base'):
      mj.merge([changes.ChangeStore(one)], 'linear', base=self.base)
    with self.assertRaisesRegex(mj.CheckpointError, 'another base'):
      mj.merge([f'{self.base}+{one}'], 'linear')

  def test_a_base_that_is_no_path(self):
    one, _ = self.lora('a')
    for base in (self.base_leaves, mj.open_checkpoint(self.base)):
      with self.assertRaisesRegex(mj.StructureError, 'give its path'):
        mj.merge([changes.ChangeStore(one)], 'linear', base=base)

  def test_what_does_not_fit(self):
    one, _ = self.lora('a')
    wide = self.disk.adapter(
      {f'{Q}.lora_A.weight': self.disk.random(2, 9),
       f'{Q}.lora_B.weight': self.disk.random(7, 2)}, 'wide', r=2,
    )  # fmt: skip
    scales = self.disk.adapter(
      {f'{Q}.ia3_l': self.disk.random(7, 1)}, 'scales', peft_type='IA3'
    )
    dora, _ = self.lora('dora', use_dora=True)
    kron = self.disk.adapter({}, 'kron', peft_type='LOKR')
    nowhere = self.disk.adapter(
      {'elsewhere.lora_A.weight': self.disk.random(2, 9),
       'elsewhere.lora_B.weight': self.disk.random(7, 2)}, 'nowhere', r=2,
    )  # fmt: skip
    for message, models in (
      ('adapters of different models', [one, wide]),
      ('adapters of one kind', [one, scales]),
      ('use_dora is set', [dora]),
      ('of the kind LOKR', [kron]),
      ('no adapter_config', [self.base + '/model.safetensors']),
      ('names a base of its own', [f'other+{one}']),
      ('elsewhere.* no parameter of', [nowhere]),
    ):
      self.refused(message, 'linear', models)

  def test_words(self):
    one, _ = self.lora('a')
    for message, more in (
      ('whole number of 1 or more', dict(adapter={'rank': 0})),
      ("Did you mean 'exact'|whole number", dict(adapter={'rank': 'exakt'})),
      ('Did you mean .factors', dict(adapter={'space': 'factor'})),
      ('not .vectors', dict(adapter={'space': 'vectors'})),
      ("Did you mean 'rank'", dict(adapter={'rnk': 1})),
      ('format: adapter', dict(adapter={'rank': 1}, format='npz')),
      ("'vocab' is of whole models", dict(vocab='union')),
      ('give .base_model', dict(base_model=None, merge_method='ties')),
    ):
      self.refused(message, 'linear', [one], **more)
    self.refused(
      'directory in its own format', 'linear', [one], flags=['--format', 'npz']
    )

  def test_format_of_the_command(self):
    # Adapters beside a base are folded, unless an adapter is asked for.
    one, products = self.lora('a')
    file, out = self.disk.path / 'r.yaml', self.disk.path / 'out'
    recipe = self.recipe('linear', [one])
    file.write_text(yaml.safe_dump(recipe | {'format': 'safetensors'}))
    with contextlib.redirect_stdout(io.StringIO()) as said:
      main_lib.main(['merge', str(file), str(out), '--format', 'adapter'])
    self.assertIn('rank 2: misses 0.00%', said.getvalue())
    self.close(self.products_of(out), products)


if __name__ == '__main__':
  absltest.main()
