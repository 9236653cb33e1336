# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters in PEFT's files: there and back, and as a merge folds them."""

import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import small_adapted
import tiers

import mergejax as mj
from mergejax.checkpoints import safetensors
from mergejax.checkpoints.peft import fold
from mergejax.core import errors
from mergejax.core import tree
from mergejax.models import t5_hf

ADAPTERS = {
  'lora': mj.adapters.lora(rank=2, alpha=3),
  'rslora': mj.adapters.lora(rank=2, alpha=3, rank_stabilised=True),
  'ranks': mj.adapters.lora(
    rank=[('decoder/.*', 3), ('.*', 2)], alpha=3, targets='.*/(query|wo)/kernel'
  ),
  'ia3': mj.adapters.ia3(),
  'prompt': mj.adapters.prompt(length=3),
}


@tiers.slow('test_there_and_back[023569]')
class SavedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def adapted(self, name, **changes):
    family, base = small_adapted.build('t5', **changes)
    adapted = mj.adapters.adapt(family, ADAPTERS[name])
    params = adapted.joined(base, small_adapted.leaves(adapted.adapter_specs))
    return adapted, base, params

  @parameterized.product(name=list(ADAPTERS), scanned=(False, True))
  def test_there_and_back(self, name, scanned):
    adapted, base, params = self.adapted(name, scan_layers=scanned)
    mj.adapters.save(self.folder / 'a', adapted, params)
    again, leaves = mj.adapters.load(self.folder / 'a', adapted.plain, base)
    expected = tree.flatten(adapted.split(params)[1])
    self.assertCountEqual(tree.flatten(leaves), expected)
    if name == 'prompt':
      np.testing.assert_array_equal(
        leaves['prompts']['target'], params['prompts']['target']
      )
      return
    found = mj.adapters.fold(again, again.joined(base, leaves))
    folded = mj.adapters.fold(adapted, params)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
      found, folded,
    )  # fmt: skip
    if name in ('lora', 'ia3'):
      for path, leaf in tree.flatten(leaves).items():
        np.testing.assert_array_equal(leaf, expected[path], path)
    # Of layers one by one and scanned, one file.
    other, _ = small_adapted.build('t5', scan_layers=not scanned)
    laid = other.arranged(
      tree.flatten(base), {p: s.axes for p, s in adapted.base_specs.items()}
    )
    laid = tree.unflatten(laid)
    crossed, leaves = mj.adapters.load(self.folder / 'a', other, laid)
    crossed = mj.adapters.fold(crossed, crossed.joined(laid, leaves))
    back = adapted.plain.arranged(
      tree.flatten(crossed), {p: s.axes for p, s in other.specs().items()}
    )
    for path, leaf in tree.flatten(folded).items():
      np.testing.assert_allclose(back[path], leaf, rtol=1e-6, atol=1e-6)

  @parameterized.parameters('lora', 'rslora', 'ranks', 'ia3')
  def test_a_merge_folds_it_as_we_do(self, name):
    # The base in Hugging Face's files, the adapter in PEFT's: read by names.
    adapted, base, params = self.adapted(name)
    stored = t5_hf.to_hf(
      {p: np.asarray(x) for p, x in tree.flatten(base).items()}
    )
    (self.folder / 'base').mkdir()
    safetensors.write(self.folder / 'base' / 'model.safetensors', stored)
    mj.adapters.save(self.folder / 'a', adapted, params)
    plain = mj.open_checkpoint(self.folder / 'base')
    store = fold.AdapterStore(plain, str(self.folder / 'a'))
    found = t5_hf.from_hf(store.leaves(list(store.specs())), tied_head=False)
    for path, leaf in tree.flatten(mj.adapters.fold(adapted, params)).items():
      np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=1e-6)

  @parameterized.parameters(False, True)
  def test_scales_of_square_kernels_keep_their_side(self, scanned):
    # By its shape such a vector is one of inputs as well as of outputs.
    family, base = small_adapted.build('t5', mlp_dim=8, scan_layers=scanned)
    adapter = mj.adapters.ia3(
      rules=[('encoder/.*wo/kernel', 'inputs'),
             ('decoder/.*wo/kernel', 'outputs')]
    )  # fmt: skip
    adapted = mj.adapters.adapt(family, adapter)
    params = adapted.joined(base, small_adapted.leaves(adapted.adapter_specs))
    mj.adapters.save(self.folder / 'a', adapted, params)
    again, leaves = mj.adapters.load(self.folder / 'a', family, base)
    for site in adapter.sites(adapted.base_specs):
      self.assertEqual(
        again.adapter.place_at(site.path), adapter.place_at(site.path)
      )
    jax.tree.map(
      np.testing.assert_array_equal, leaves, adapted.split(params)[1]
    )

  def test_layers_that_differ_are_not_one_stack(self):
    family, base = small_adapted.build('t5', mlp_dim=8)
    adapter = mj.adapters.ia3(
      rules=[('(.*)layers_0/mlp/wo/kernel', 'inputs'),
             ('.*/mlp/wo/kernel', 'outputs')]
    )  # fmt: skip
    adapted = mj.adapters.adapt(family, adapter)
    params = adapted.joined(base, small_adapted.leaves(adapted.adapter_specs))
    mj.adapters.save(self.folder / 'a', adapted, params)
    scanned, _ = small_adapted.build('t5', mlp_dim=8, scan_layers=True)
    with self.assertRaisesRegex(errors.StructureError, 'scan_layers=False'):
      mj.adapters.load(self.folder / 'a', scanned)

  def test_dense_kernels_of_a_sparse_model(self):
    # T5 has no names for experts elsewhere, but those are not adapted.
    moe = dict(num_experts=2, group_size=8)
    family, base = small_adapted.build('t5', moe=moe)
    adapted = mj.adapters.adapt(family, mj.adapters.lora(rank=2))
    params = adapted.joined(base, small_adapted.leaves(adapted.adapter_specs))
    mj.adapters.save(self.folder / 'a', adapted, params)
    _, leaves = mj.adapters.load(self.folder / 'a', family, base)
    jax.tree.map(
      np.testing.assert_array_equal, leaves, adapted.split(params)[1]
    )

  @parameterized.parameters(False, True)
  def test_an_inventory(self, scanned):
    family, base = small_adapted.build('t5', scan_layers=scanned)
    poly = mj.adapters.poly(tasks=3, skills=4, heads=2, rank=2)
    adapted = mj.adapters.adapt(family, poly)
    params = adapted.joined(base, small_adapted.leaves(adapted.adapter_specs))
    mj.adapters.save(self.folder / 'p', adapted, params, tasks=['a', 'b', 'c'])
    again, leaves = mj.adapters.load(self.folder / 'p', family, base)
    read = again.adapter
    self.assertEqual(
      (read.tasks, read.skills, read.heads, read.rank), (3, 4, 2, 2)
    )
    own = tree.flatten(leaves)
    expected = tree.flatten(adapted.split(params)[1])
    self.assertCountEqual(own, expected)
    for path, leaf in expected.items():
      np.testing.assert_array_equal(own[path], leaf, path)
    card = mj.adapters.card(self.folder / 'p')
    self.assertEqual((card.kind, card.ranks), ('poly', (2,)))
    # What PEFT would compute otherwise is not written as if it were PEFT's.
    for changes in (
      dict(alpha=2.0), dict(shared_skill=True), dict(selector='uniform'),
      dict(selectors='stack'),
    ):  # fmt: skip
      other = mj.adapters.poly(tasks=3, skills=4, heads=2, rank=2, **changes)
      self.assertFalse(mj.adapters.has_layout(other), changes)
    # An inventory goes on with its own tasks, or with fresh logits.
    other = mj.adapters.poly(tasks=2, skills=4, heads=2, rank=2)
    fewer = mj.adapters.adapt(family, other)
    key = jax.random.key(0)
    with self.assertRaisesRegex(errors.ConfigError, 'of 3 tasks.*it is of 2'):
      mj.adapters.from_saved(self.folder / 'p')(fewer, base, key)
    begun = mj.adapters.from_inventory(self.folder / 'p')(fewer, base, key)
    for path, leaf in tree.flatten(begun).items():
      same = np.array_equal(leaf, expected[path])
      self.assertEqual(same, not path.endswith('poly_logits'), path)
    file = self.folder / 'p' / 'adapter_config.json'
    config = json.loads(file.read_text())
    for changes, message in (
      (dict(poly_type='other'), "poly_type is 'other'"),
      (dict(n_skills=3), 'would be'),
    ):
      file.write_text(json.dumps({**config, **changes}))
      with self.assertRaisesRegex(errors.UserError, message):
        mj.adapters.load(self.folder / 'p', family)

  def test_task_in_the_file(self):
    for kind, task in (('t5', 'SEQ_2_SEQ_LM'), ('lm', 'CAUSAL_LM')):
      self.assertEqual(self.config(small_adapted.build(kind)[0]), task)
    classifier = mj.models.build({'model_type': 'mlp', 'hidden': (4,)})
    family = mj.models.family_of(classifier)
    self.assertIsNone(self.config(family, targets='dense_0/kernel'))

  def config(self, family, **settings):
    """The task that a fresh LoRA's file names."""
    adapted = mj.adapters.adapt(family, mj.adapters.lora(rank=1, **settings))
    params = small_adapted.leaves(adapted.specs())
    mj.adapters.save(self.folder / 'task', adapted, params, overwrite=True)
    file = self.folder / 'task' / 'adapter_config.json'
    return json.loads(file.read_text())['task_type']

  def test_card(self):
    adapted, base, params = self.adapted('ranks')
    mj.adapters.save(self.folder / 'a', adapted, params, base_name='t5/base')
    card = mj.adapters.card(self.folder / 'a')
    self.assertEqual((card.kind, card.ranks), ('lora', (2, 3)))
    self.assertEqual(card.base, ('t5/base', mj.stats.fingerprint(base)))
    self.assertEqual(
      card.parameters, mj.adapters.count(adapted.adapter, adapted.base_specs)
    )
    self.assertEqual(card.targets, 10)
    self.assertIn('10 modules\nbase: t5/base (fingerprint', str(card))

  def test_mistakes(self):
    adapted, base, params = self.adapted('lora')
    path = self.folder / 'a'
    mj.adapters.save(path, adapted, params)
    with self.assertRaisesRegex(errors.UserError, 'exists'):
      mj.adapters.save(path, adapted, params)
    other = jax.tree.map(lambda x: x + 1, base)
    with self.assertRaisesRegex(errors.CheckpointError, 'another base'):
      mj.adapters.load(path, adapted.plain, other)
    narrow, _ = small_adapted.build('t5', emb_dim=6)
    with self.assertRaisesRegex(errors.StructureError, 'of another model'):
      mj.adapters.load(path, narrow)
    flat, _ = small_adapted.build('lm')
    with self.assertRaisesRegex(errors.StructureError, 'Unknown module'):
      mj.adapters.load(path, flat)
    with self.assertRaisesRegex(errors.CheckpointError, 'no adapter_config'):
      mj.adapters.load(self.folder, adapted.plain)
    bank = mj.adapters.adapt(
      adapted.plain, mj.adapters.bank(ADAPTERS['ia3'], 2)
    )
    banked = bank.joined(base, small_adapted.leaves(bank.adapter_specs))
    with self.assertRaisesRegex(errors.ConfigError, 'save one expert'):
      mj.adapters.save(self.folder / 'b', bank, banked)
    self.assertFalse((self.folder / 'b').exists())
    file = path / 'adapter_config.json'
    config = json.loads(file.read_text())
    for changes, message in (
      (dict(use_dora=True), 'use_dora is set'),
      (dict(bias='all'), "bias is 'all'"),
      (dict(init_lora_weights='pissa'), 'changed by it'),
      (dict(peft_type='VERA'), "kind 'VERA'"),
      (dict(r=5), 'factors of rank 2, but'),
      (dict(lora_alpha='much'), "'much' as lora_alpha"),
      (dict(alpha_pattern={'.*': 'much'}), "'much' as alpha_pattern"),
    ):
      file.write_text(json.dumps({**config, **changes}))
      with self.assertRaisesRegex(errors.CheckpointError, message):
        mj.adapters.load(path, adapted.plain)


if __name__ == '__main__':
  absltest.main()
