# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Polytropon and multi-head routing, against two libraries' numbers."""

from absl.testing import absltest
from absl.testing import parameterized
import environments
import flax.linen as nn
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax
import small_adapted
import tiers

import mergejax as mj
from mergejax import models
from mergejax.core import errors
from mergejax.core import tree

CLOSE = dict(rtol=1e-4, atol=2e-5)
VARIANTS = {
  'poly': dict(),
  'mhr': dict(),
  'l2norm': dict(selector='l2'),
  'avgcorr': dict(selector='average'),
  'shared_skill': dict(shared_skill=True),
  'straight_through': dict(selector='straight_through'),
  'alpha16': dict(),
}


class Linear(nn.Module):
  """One linear map, as the goldens are of."""

  features: int

  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.features, name='map')(x)


def around(weight, bias, x, **settings):
  """`(adapted family, base)` of PyTorch's linear map `[out, in]`."""
  example = {'inputs': x, 'labels': np.zeros(len(x), np.int32)}
  family = models.Classifier(Linear(len(weight)), example=example)
  base = {'map': {'kernel': weight.T, 'bias': bias}}
  adapter = mj.adapters.poly(targets='map/kernel', **settings)
  return mj.adapters.adapt(family, adapter), base


def leaves(a, b, logits):
  return {'map': {'poly_a': a, 'poly_b': b, 'poly_logits': logits}}


@tiers.slow('test_peft0')
class GoldenTest(parameterized.TestCase):
  @parameterized.parameters('poly_linear', 'poly_multihead_linear')
  def test_peft(self, name):
    arrays = goldens.load(name)
    size = {
      n: int(arrays[f'config/n_{n}']) for n in ('splits', 'skills', 'tasks')
    }
    rank = int(arrays['config/rank'])
    family, base = around(
      arrays['base_weight'], arrays['base_bias'], arrays['x'],
      tasks=size['tasks'], skills=size['skills'], heads=size['splits'], rank=rank,
    )  # fmt: skip
    own = leaves(arrays['lora_A'], arrays['lora_B'], arrays['module_logits'])
    params = family.joined(base, own)
    batch = {'inputs': arrays['x'], 'task_ids': arrays['task_ids']}
    np.testing.assert_allclose(
      family.logits(params, batch), arrays['output'], **CLOSE
    )
    fresh = family.start(base, jax.random.key(0))
    plain = family.logits(fresh, batch)
    np.testing.assert_allclose(plain, arrays['base_output'], **CLOSE)
    np.testing.assert_array_equal(plain, family.plain.logits(base, batch))
    # A task's own LoRA, which folds.
    task, row = int(arrays['task_ids'][1]), arrays['x'][1:2]
    poly = family.adapter
    lora = poly.of_task(family.base_specs, own, task)
    folded = poly.expert.fold(family.base_specs, base, lora)
    np.testing.assert_allclose(
      family.plain.logits(folded, {'inputs': row}),
      arrays['output'][1:2],
      **CLOSE,
    )

  @parameterized.parameters(*VARIANTS)
  def test_variants_of_the_original(self, name):
    arrays = goldens.load('poly_reference_variants')
    a, b = arrays[f'{name}/lora_a'], arrays[f'{name}/lora_b']
    heads, skills, _, rank = a.shape
    alpha = float(arrays[f'{name}/scaling']) * rank
    settings = (
      dict(tasks=5, skills=skills, heads=heads, rank=rank, alpha=alpha)
      | VARIANTS[name]
    )
    given = arrays['base_weight'], arrays['base_bias'], arrays['x']
    family, base = around(*given, **settings)
    logits = arrays[f'{name}/module_logits']
    params = family.joined(base, leaves(a, b, logits))
    batch = {'inputs': arrays['x'], 'task_ids': arrays['task_ids']}
    np.testing.assert_allclose(
      family.logits(params, batch), arrays[f'{name}/output'], **CLOSE
    )
    own = logits[arrays['task_ids']].reshape(-1, heads, skills)
    chosen = {n: x for n, x in VARIANTS[name].items()}
    np.testing.assert_allclose(
      mj.adapters.gates(jnp.asarray(own), **chosen),
      arrays[f'{name}/routing_weights'], **CLOSE,
    )  # fmt: skip
    if f'{name}/mu_output' in arrays:
      expected = arrays[f'{name}/mu_output']
      uniform, _ = around(*given, **settings | dict(selector='uniform'))
      np.testing.assert_allclose(
        uniform.logits(params, batch), expected, **CLOSE
      )
      mean = family.adapter.collapsed(family.base_specs, leaves(a, b, logits))
      one = mj.adapters.adapt(family.plain, family.adapter.expert)
      np.testing.assert_allclose(
        one.logits(one.joined(base, mean), batch), expected, **CLOSE
      )


def small(seed=0, **settings):
  """A linear map of 8 inputs and 12 outputs with random leaves."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  settings = dict(tasks=3, skills=4, heads=1, rank=2) | settings
  x = draw(6, 5, 8)
  family, base = around(draw(12, 8), draw(12), x, **settings)
  heads, skills = settings['heads'], settings['skills']
  own = leaves(
    draw(heads, skills, 8 // heads, 2), draw(heads, skills, 2, 12 // heads),
    draw(settings['tasks'], heads * skills),
  )  # fmt: skip
  ids = np.int32([0, 2, 1, 1, 0, 2])
  return family, base, own, {'inputs': x, 'task_ids': ids}


class LawsTest(parameterized.TestCase):
  def test_mixture_by_hand_of_factors_and_outputs(self):
    found = {}
    for mix in ('factors', 'outputs'):
      family, base, own, batch = small(mix=mix)
      expected = []
      for x, task in zip(np.float64(batch['inputs']), batch['task_ids']):
        y = x @ base['map']['kernel'] + base['map']['bias']
        a, b, z = (
          np.float64(own['map'][f'poly_{n}']) for n in ('a', 'b', 'logits')
        )
        g = 1 / (1 + np.exp(-z[task]))
        w = g / g.sum()
        if mix == 'factors':
          delta = x @ sum(w[s] * a[0, s] for s in range(4))
          delta = delta @ sum(w[s] * b[0, s] for s in range(4))
        else:
          delta = sum(w[s] * (x @ a[0, s] @ b[0, s]) for s in range(4))
        expected.append(y + delta / 2)
      found[mix] = family.logits(family.joined(base, own), batch)
      np.testing.assert_allclose(found[mix], np.array(expected), **CLOSE)
      lora = family.adapter.of_task(family.base_specs, own, 2)
      one = mj.adapters.adapt(family.plain, family.adapter.expert)
      alone = one.logits(one.joined(base, lora), batch)
      rows = batch['task_ids'] == 2
      np.testing.assert_allclose(alone[rows], found[mix][rows], **CLOSE)
    self.assertGreater(np.abs(found['factors'] - found['outputs']).max(), 0.1)

  def test_equal_rows_of_heads_are_one_head(self):
    one, base, own, batch = small()
    expected = one.logits(one.joined(base, own), batch)
    two, base, _, _ = small(heads=2)
    a, b, z = (own['map'][f'poly_{n}'] for n in ('a', 'b', 'logits'))
    split = leaves(
      np.stack([a[0, :, :4], a[0, :, 4:]]), np.stack([b[0, ..., :6], b[0, ..., 6:]]),
      np.concatenate([z, z], axis=1),
    )  # fmt: skip
    np.testing.assert_allclose(
      two.logits(two.joined(base, split), batch), expected, **CLOSE
    )

  def test_one_skill_alone_is_its_lora(self):
    family, base, own, batch = small()
    own['map']['poly_logits'] = np.float32([[-200, 90, -200, -200]] * 3)
    found = family.logits(family.joined(base, own), batch)
    lora = mj.adapters.lora(rank=2, alpha=1, targets='map/kernel')
    one = mj.adapters.adapt(family.plain, lora)
    skill = {
      'lora_a': own['map']['poly_a'][0, 1],
      'lora_b': own['map']['poly_b'][0, 1],
    }
    np.testing.assert_array_equal(
      found, one.logits(one.joined(base, {'map': skill}), batch)
    )

  def test_mean_of_skills_learns_as_all_of_them(self):
    family, base, own, batch = small(selector='uniform')
    one = mj.adapters.adapt(family.plain, family.adapter.expert)
    mean = family.adapter.collapsed(family.base_specs, own)
    target = np.random.default_rng(1).normal(size=(6, 5, 12)).astype(np.float32)

    def trained(model, leaves, optimizer):
      loss = lambda leaves: jnp.mean(
        (model.logits(model.joined(base, leaves), batch) - target) ** 2
      )
      leaves = jax.tree.map(jnp.asarray, leaves)
      state = optimizer.init(leaves)
      for _ in range(5):
        updates, state = optimizer.update(jax.grad(loss)(leaves), state, leaves)
        leaves = optax.apply_updates(leaves, updates)
      return leaves

    def gap(rate, by=1.0, optimizer=optax.sgd):
      every = trained(family, own, optimizer(rate))
      single = trained(one, mean, optimizer(rate / by))
      found = family.adapter.collapsed(family.base_specs, every)
      return np.abs(found['map']['lora_a'] - single['map']['lora_a']).max()

    adam = lambda rate: optax.adam(rate, eps=1e-20)
    with jax.numpy_dtype_promotion('standard'):  # optax's mixes dtypes
      self.assertLess(gap(0.01, optimizer=adam), 1e-5)
    self.assertLess(gap(0.1, by=4), 1e-5)
    self.assertGreater(gap(0.1), 1e-3)


@tiers.slow('test_mixed_.*1')
class ModelTest(parameterized.TestCase):
  def adapted(self, scan_layers=True, **settings):
    family, base = small_adapted.build(
      't5', head_dim=4, mlp_dim=8, scan_layers=scan_layers
    )
    adapter = mj.adapters.poly(tasks=3, skills=2, heads=2, **settings)
    adapted = mj.adapters.adapt(family, adapter)
    draw = small_adapted.leaves(adapted.adapter_specs)
    return adapted, adapted.joined(base, draw)

  @parameterized.parameters('map', 'sublayer', 'model')
  def test_mixed_tasks_are_each_alone(self, selectors):
    adapted, params = self.adapted(selectors != 'sublayer', selectors=selectors)
    batch = small_adapted.batch(4)
    ids = np.int32([2, 0, 2, 1])
    found = jax.jit(adapted.logits)(params, {**batch, 'task_ids': ids})
    base, own = adapted.split(params)
    specs, poly = adapted.base_specs, adapted.adapter
    one = mj.adapters.adapt(adapted.plain, poly.expert)
    answer = jax.jit(one.logits)
    for task in range(3):
      lora = poly.of_task(specs, own, task)
      alone = answer(one.joined(base, lora), batch)
      np.testing.assert_allclose(
        found[ids == task], alone[ids == task], rtol=5e-4, atol=5e-4
      )

  @parameterized.parameters(
    ('map', 18, 'encoder/encoder/attention/query/poly_logits'),
    ('sublayer', 10, 'routes/decoder/layers_1/encoder_decoder_attention'),
    ('block', 4, 'routes/encoder/layers_1'),
    ('stack', 2, 'routes/encoder'),
    ('model', 1, 'routes/model'),
  )
  def test_who_has_logits_of_its_own(self, selectors, count, one):
    scanned = selectors not in ('sublayer', 'block')
    family, _ = small_adapted.build('t5', scan_layers=scanned)
    poly = mj.adapters.poly(tasks=3, skills=2, selectors=selectors)
    adapted = mj.adapters.adapt(family, poly)
    logits = [p for p in adapted.adapter_specs if poly.group(p) == 'router']
    self.assertLen(logits, count)
    self.assertIn(one, logits)
    if not scanned:
      stacked, _ = small_adapted.build('t5', scan_layers=True)
      with self.assertRaisesRegex(errors.ConfigError, 'scan_layers=False'):
        mj.adapters.adapt(stacked, poly)

  def test_what_learns_and_at_which_rate(self):
    adapted, params = self.adapted(learn='routing')
    batch = {**small_adapted.batch(8), 'task_ids': np.int32([0, 1] * 4)}
    self.enter_context(environments.one_device())
    trainer = mj.training.Trainer(adapted, optax.sgd(0.1))
    state = trainer.fit([batch], steps=1, params=params)
    for path, leaf in tree.flatten(state.params).items():
      same = np.array_equal(leaf, tree.flatten(params)[path])
      self.assertEqual(same, not path.endswith('poly_logits'), path)
    # The task without a row keeps its logits.
    path = 'encoder/encoder/attention/query/poly_logits'
    moved = np.asarray(tree.flatten(state.params)[path]) - params['encoder'][
      'encoder']['attention']['query']['poly_logits']  # fmt: skip
    np.testing.assert_array_equal(
      np.abs(moved).max(axis=(1, 2)) > 0, [True, True, False]
    )
    every, _ = self.adapted()
    still = {'adapter': optax.set_to_zero(), 'router': optax.sgd(0.1)}
    optimizer = mj.training.optim.by_group(every.groups, still)
    learned = {p: jnp.ones(s.shape) for p, s in every.adapter_specs.items()}
    learned = tree.unflatten(learned)
    updates, _ = optimizer.update(learned, optimizer.init(learned), learned)
    for path, leaf in tree.flatten(updates).items():
      self.assertEqual(bool(np.any(leaf)), path.endswith('poly_logits'))
    with self.assertRaisesRegex(errors.ConfigError, 'adapter and router'):
      mj.training.optim.by_group(every.groups, {'adapter': optax.sgd(0.1)})

  def test_each_group_knows_of_its_stacks(self):
    # Leaves of four axes, that Adafactor factors only if told which are stacks.
    adapted, params = self.adapted()
    adafactor = mj.training.optim.adafactor(0.1, min_dim_size_to_factor=1)
    groups = {'adapter': adafactor, 'router': optax.sgd(0.1)}
    batch = {**small_adapted.batch(8), 'task_ids': np.int32([0, 1] * 4)}
    with environments.one_device():
      trainer = mj.training.Trainer(
        adapted, mj.training.optim.by_group(adapted.groups, groups)
      )
      state = trainer.fit([batch], steps=1, params=params)
    self.assertEqual(state.step, 1)

  def test_other_tasks_keep_the_inventory(self):
    adapted, params = self.adapted()
    _, own = adapted.split(params)
    specs = adapted.base_specs
    poly, leaves = adapted.adapter.with_tasks(specs, own, 1, jax.random.key(0))
    self.assertEqual(poly.tasks, 1)
    for path, leaf in tree.flatten(leaves).items():
      if poly.group(path) == 'router':
        self.assertLessEqual(np.abs(leaf).max(), 1e-3)
        self.assertEqual(leaf.shape, poly.specs(specs)[path].shape)
      else:
        np.testing.assert_array_equal(leaf, tree.flatten(own)[path])
    with self.assertRaisesRegex(errors.StructureError, 'expected'):
      mj.adapters.adapt(adapted.plain, poly).joined(
        adapted.split(params)[0], own
      )

  def test_counts(self):
    family, _ = small_adapted.build('t5')
    specs = family.specs()
    maps = [s.shape for p, s in specs.items() if p.endswith('query/kernel')]
    for heads in (1, 2):
      poly = mj.adapters.poly(
        tasks=7, skills=3, heads=heads, rank=2, targets='.*query/kernel'
      )
      expected = sum(3 * 2 * sum(shape) + 7 * heads * 3 for shape in maps)
      self.assertEqual(mj.adapters.count(poly, specs), expected)

  def test_mistakes(self):
    adapted, params = self.adapted()
    batch = small_adapted.batch(2)
    with self.assertRaisesRegex(errors.DataError, "not 'task_ids'"):
      adapted.logits(params, batch)
    for wrong in (3, -1):
      given = {**batch, 'task_ids': np.int32([0, wrong])}
      with self.assertRaisesRegex(
        errors.DataError, f'number {wrong}, .* 3 tasks'
      ):
        adapted.check_batch(given)
    poly = mj.adapters.poly
    for settings, message in (
      (dict(skills=0), 'skills must be'),
      (dict(noise=True, selector='straight_through'), 'none to relax'),
      (dict(mix='outputs', heads=2), 'are slices'),
      (dict(gate_dropout=1), 'drops all'),
      (dict(gate_dropout=0.1, selector='l2'), "'l2' has none"),
      (dict(selector='softmax'), "'softmax'"),
    ):
      with self.assertRaisesRegex(errors.ConfigError, message):
        poly(tasks=2, **settings)
    with self.assertRaisesRegex(
      errors.ConfigError, '3 heads do not divide .*kernel, which has 8 inputs'
    ):
      mj.adapters.adapt(adapted.plain, poly(tasks=2, heads=3))
    with self.assertRaisesRegex(
      errors.ConfigError, 'fold the LoRA of one task'
    ):
      mj.adapters.fold(adapted, params)


if __name__ == '__main__':
  absltest.main()
