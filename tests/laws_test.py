# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The laws of merge methods, for every row of the table in `laws`."""

import dataclasses

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import laws
import ml_dtypes
import numpy as np
import tiers

import mergejax as mj
from mergejax import partition
from mergejax.core import tree as tree_lib
from mergejax.merging import in_memory
from mergejax.merging import on_mesh
from mergejax.methods import named

# Every option meets its oracle; the other laws are of methods.
FURTHER = '|'.join(name for name, _ in laws.FURTHER)


@tiers.slow(f'test_(?!oracle).*_({FURTHER})')
class LawsTest(parameterized.TestCase):
  def test_the_table_has_every_method(self):
    self.assertEqual({row.name for row in laws.ROWS}, set(named.METHODS))

  @parameterized.named_parameters(laws.ALL)
  def test_oracle(self, row):
    base, *models = laws.make(row.models + 1)
    laws.assert_close(
      laws.run(row, models, base),
      laws.expected(row, models, base),
      row.tolerance,
    )

  @parameterized.named_parameters(laws.ALL)
  def test_one_model_agrees_with_the_oracle(self, row):
    if named.resolve(row.name, **row.options).counts[0] > 1:
      self.skipTest('takes several models')
    base, model = laws.make(2)
    options = {
      name: value[:1] if isinstance(value, list) else value
      for name, value in row.options.items()
    }
    row = dataclasses.replace(row, options=options)
    laws.assert_close(
      laws.run(row, [model], base),
      laws.expected(row, [model], base),
      row.tolerance,
    )

  @parameterized.named_parameters(laws.ALL)
  def test_bfloat16_in_float32_inside(self, row):
    base, *models = laws.make(row.models + 1, dtype=ml_dtypes.bfloat16)
    answer = laws.expected(row, models, base)
    merged = laws.run(row, models, base)
    for path, leaf in merged.items():
      self.assertEqual(leaf.dtype, jnp.bfloat16)
      # One rounding at the end, from a float32 result: half a unit in the last
      # place, and a hair for the float32 sum.
      rounded = answer[path].astype(ml_dtypes.bfloat16).astype(np.float64)
      unit = np.maximum(np.abs(answer[path]), 1e-3) * 2.0**-8
      off = np.abs(np.asarray(leaf).astype(np.float64) - answer[path])
      self.assertTrue(np.all(off <= np.abs(rounded - answer[path]) + unit / 64))

  @parameterized.named_parameters(laws.ALL)
  def test_copies_merge_to_the_model(self, row):
    base, model = laws.make(2)
    merged = laws.run(row, [model] * row.models, base)
    if row.moves_copies:
      moved = [
        not np.allclose(merged[path], model[path], atol=1e-6) for path in model
      ]
      self.assertTrue(any(moved), 'the row claims that copies move')
    else:
      laws.assert_close(merged, model, row.tolerance)

  @parameterized.named_parameters(laws.ALL)
  def test_order_does_not_matter(self, row):
    base, *models = laws.make(row.models + 1)
    turned = models[1:] + models[:1]
    weights = row.weights and row.weights[1:] + row.weights[:1]
    stats = laws.make_stats(row, models)
    a = laws.run(row, models, base)
    b = laws.run(
      row, turned, base, weights, stats=stats and stats[1:] + stats[:1]
    )
    if row.ordered:
      self.assertFalse(np.allclose(a['a/kernel'], b['a/kernel']))
    else:
      laws.assert_close(a, b, row.tolerance)

  @parameterized.named_parameters(laws.ALL)
  def test_zero_weight_is_absence(self, row):
    fixed = named.resolve(row.name, **row.options).counts[1]
    if row.weights is None or fixed is not None:
      self.skipTest('takes no weights, or a fixed number of models')
    base, *models = laws.make(row.models + 2)
    options = {
      name: [*value, 0.5] if isinstance(value, list) else value
      for name, value in row.options.items()
    }
    stats = laws.make_stats(row, models)
    more = dataclasses.replace(row, options=options)
    laws.assert_close(
      laws.run(more, models, base, (*row.weights, 0.0)),
      laws.run(row, models[:-1], base, stats=stats and stats[:-1]),
      row.tolerance,
    )

  @parameterized.named_parameters(laws.ONE)
  def test_leaf_by_leaf_equals_whole_tree(self, row):
    base, *models = laws.make(row.models + 1)
    method = named.resolve(row.name, **row.options)
    self.assertTrue(method.separable)
    given = base if row.base or method.base == 'required' else None
    merge = lambda m: in_memory.merge(
      models, m, base=given, weights=row.weights, axes=laws.AXES,
      stats=laws.make_stats(row, models),
    )  # fmt: skip
    laws.assert_close(
      merge(method), merge(method._replace(separable=False)), 1e-7
    )

  @parameterized.named_parameters(laws.ALL)
  def test_states_add(self, row):
    base, *models = laws.make(row.models + 1)
    method = named.resolve(row.name, **row.options)
    self.assertEqual(method.additive, not row.gathered)
    if row.gathered:
      self.skipTest('states do not add')
    states = []

    def split(state, params, **kwargs):
      """Keeps the state of each model alone; `finish` adds them."""
      states.append(
        method.update(method.init(tree_lib.specs(params)), params, **kwargs)
      )
      return state

    def finish(state, *, base):
      del state
      total = states[0]
      for one in states[1:]:
        total = jax.tree.map(jnp.add, total, one)
      states.clear()
      return method.finish(total, base=base)

    alone = method._replace(update=split, finish=finish)
    added = in_memory.merge(
      models, alone, weights=row.weights, axes=laws.AXES,
      base=base if row.base or method.base == 'required' else None,
      stats=laws.make_stats(row, models),
    )  # fmt: skip
    laws.assert_close(added, laws.run(row, models, base), row.tolerance)

  @parameterized.named_parameters(laws.ONE)
  def test_jit_equals_eager_and_compiles_once(self, row):
    base, *models = laws.make(row.models + 1)
    weights = jnp.asarray(row.weights or (1.0,) * row.models)
    traces = []

    @jax.jit
    def merge(m, b, w):
      traces.append(1)
      return laws.run(row, m, b, None if row.weights is None else list(w))

    jitted = merge(models, base, weights)
    merge(models, base, 2 * weights)
    self.assertLen(traces, 1)
    laws.assert_close(jitted, laws.run(row, models, base), row.tolerance)

  @parameterized.named_parameters(laws.ONE)
  def test_gradients_reach_the_weights(self, row):
    if row.weights is None:
      self.skipTest('the weights are part of the method')
    # Kernels alone, one of them stacked: of small leaves `grad` knows no more.
    base, *models = [
      {p: leaf for p, leaf in model.items() if p.endswith('kernel')}
      for model in laws.make(row.models + 1)
    ]

    def loss(w):
      merged = laws.run(row, models, base, list(w))
      return sum(jnp.sum(jnp.square(leaf)) for leaf in merged.values())

    weights = np.asarray(row.weights, np.float32)
    # One program, where many small ones would be compiled.
    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(weights))
    np.testing.assert_allclose(value, loss(weights), rtol=1e-5)
    step = np.float32(1e-2)
    for i in range(row.models):
      bump = step * np.eye(row.models, dtype=np.float32)[i]
      numeric = (loss(weights + bump) - loss(weights - bump)) / (2 * step)
      np.testing.assert_allclose(gradient[i], numeric, rtol=2e-2, atol=2e-3)

  @parameterized.named_parameters(laws.ALL)
  def test_sharded_equals_unsharded_and_keeps_the_sharding(self, row):
    mesh = partition.make_mesh(data=2, model=4)
    rng = np.random.default_rng(2)
    base, *models = [
      {'mlp/wi/kernel': rng.normal(size=(6, 24)).astype(np.float32)}
      for _ in range(row.models + 1)
    ]
    stats = None
    if row.stats == 'fisher':
      stats = [
        {p: {'fisher': np.square(leaf)} for p, leaf in m.items()}
        for m in models
      ]
    elif row.stats == 'gram':
      stats = [
        {p: {'gram': leaf @ leaf.T} for p, leaf in m.items()} for m in models
      ]
    layout = partition.sharding(mesh, ('batch', 'mlp'))
    put = lambda tree: jax.device_put(tree, layout)
    plain = laws.run(row, models, base, stats=stats)
    sharded = laws.run(row, [put(m) for m in models], put(base), stats=stats)
    leaf = sharded['mlp/wi/kernel']
    self.assertTrue(leaf.sharding.is_equivalent_to(layout, leaf.ndim))
    laws.assert_close(sharded, plain, row.tolerance)

  @parameterized.named_parameters(laws.ALL)
  def test_on_the_branch_axis_equals_the_list(self, row):
    if row.stats is not None:
      self.skipTest('experts in training bring no statistics')
    base, *models = laws.make(row.models + 1)
    for k, model in enumerate((base, *models)):
      model['ids'] = np.arange(3, dtype=np.int32) + k
      model['none'] = np.zeros((0, 2), np.float32)
    method = named.resolve(row.name, **row.options)
    with_base = row.base or method.base == 'required'
    merged = on_mesh.merge_experts(
      jax.tree.map(lambda *leaves: np.stack(leaves), *models),
      method,
      base=base if with_base else None,
      weights=row.weights,
      axes=laws.AXES,
    )
    laws.assert_close(merged, laws.run(row, models, base), 2e-7)
    first = base if with_base else models[0]
    np.testing.assert_array_equal(merged['ids'], first['ids'])
    self.assertEqual(merged['ids'].dtype, np.int32)
    self.assertEqual(merged['none'].shape, (0, 2))

  @parameterized.named_parameters(laws.ONE)
  def test_float8_in_float32_inside(self, row):
    kind = ml_dtypes.float8_e4m3fn
    base, *models = laws.make(row.models + 1, dtype=kind)
    answer = laws.expected(row, models, base)
    for path, leaf in laws.run(row, models, base).items():
      self.assertEqual(leaf.dtype, kind)
      wide = answer[path].astype(np.float32)
      near = [(wide * np.float32(1 + e)).astype(kind) for e in (-4e-6, 4e-6)]
      found = np.asarray(leaf).astype(np.float32)
      between = [np.minimum(*near), np.maximum(*near)]
      low, high = (one.astype(np.float32) for one in between)
      self.assertTrue(np.all((low <= found) & (found <= high)), path)

  @parameterized.named_parameters(laws.ONE)
  def test_structure_dtype_and_other_leaves_are_kept(self, row):
    base, *models = laws.make(row.models + 1)
    stats = laws.make_stats(row, models)
    nest = lambda m: {
      **tree_lib.unflatten(m),
      'step': np.int32(7),
      'none': {'kernel': np.zeros((0, 3), np.float32)},
    }
    merged = laws.run(
      row, [nest(m) for m in models], nest(base), axes=laws.AXES, stats=stats
    )
    self.assertEqual(jax.tree.structure(merged), jax.tree.structure(nest(base)))
    self.assertEqual(merged['step'], 7)
    self.assertEqual(merged['step'].dtype, np.int32)
    self.assertEqual(merged['none']['kernel'].shape, (0, 3))

  @parameterized.named_parameters(laws.ONE)
  def test_stores_equal_trees(self, row):
    base, *models = laws.make(row.models + 1)
    folder = self.create_tempdir().full_path
    paths = []
    for i, model in enumerate([base, *models]):
      paths.append(f'{folder}/{i}.safetensors')
      mj.save_checkpoint(paths[-1], model)
    method = named.resolve(row.name, **row.options)
    merged = mj.merge(
      paths[1:],
      method,
      base=paths[0] if row.base or method.base == 'required' else None,
      weights=row.weights,
      axes=laws.AXES,
      stats=laws.make_stats(row, models),
    )
    expected = tree_lib.unflatten(laws.run(row, models, base))
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
