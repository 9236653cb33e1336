# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""One table of all methods, and the laws they obey."""

from collections.abc import Callable
import dataclasses

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from reference import merging as oracles

import mergejax as mj
from mergejax import mesh as mesh_lib
from mergejax import tree as tree_lib
from mergejax.experts import branch
from mergejax.merging import base as merging
from mergejax.merging import named


@dataclasses.dataclass(frozen=True)
class Row:
  """A method, its oracle, and the laws that it does not obey, with the reason."""

  name: str
  options: dict
  oracle: Callable
  models: int = 3
  weights: tuple | None = (0.5, 2.0, 1.0)
  # Copies of one model do not merge to it: the method moves beyond or away.
  moves_copies: bool = False
  # The order of the models is part of the question.
  ordered: bool = False


ROWS = (
    Row('linear', {}, oracles.linear),
    Row('linear', {'normalize': False}, oracles.linear, moves_copies=True),
    Row('interpolate', {'alpha': 0.3}, oracles.interpolate, moves_copies=True),
    Row('task_arithmetic', {'scale': 0.4}, oracles.task_arithmetic,
        moves_copies=True),
    Row('task_arithmetic', {'normalize': True}, oracles.task_arithmetic),
    Row('negate', {'scale': 0.5}, oracles.negate, models=1, weights=None,
        moves_copies=True),
    Row('analogy', {'scale': 0.7}, oracles.analogy, weights=None,
        moves_copies=True, ordered=True),
)  # fmt: skip
ALL = [(f'{row.name}_{i}', row) for i, row in enumerate(ROWS)]


def make(count, seed=0, dtype=np.float32):
  """Models of odd shapes, with zeros, ties and a stacked kernel."""
  rng = np.random.default_rng(seed)
  shapes = {'a/kernel': (5, 3), 'a/bias': (3,), 'b/stack': (2, 4, 1), 'c': ()}
  models = []
  for _ in range(count):
    model = {p: np.asarray(rng.normal(size=s)) for p, s in shapes.items()}
    model['a/kernel'][0] = 0.0
    model['a/kernel'][1] = 0.25
    models.append({p: leaf.astype(dtype) for p, leaf in model.items()})
  return models


def run(row, models, base, weights=None, **kwargs):
  method = named.resolve(row.name, **row.options)
  weights = row.weights if weights is None else weights
  return merging.merge(
    models,
    method,
    base=base if method.needs_base else None,
    weights=weights,
    **kwargs,
  )


def assert_close(actual, expected, rtol=1e-6, atol=1e-6):
  assert sorted(tree_lib.flatten(actual)) == sorted(tree_lib.flatten(expected))
  for path, leaf in tree_lib.flatten(actual).items():
    np.testing.assert_allclose(
      np.asarray(leaf, np.float64),
      np.asarray(tree_lib.flatten(expected)[path], np.float64),
      rtol=rtol,
      atol=atol,
      err_msg=path,
    )


class LawsTest(parameterized.TestCase):
  def test_the_table_has_every_method(self):
    self.assertEqual({row.name for row in ROWS}, set(named.METHODS))

  @parameterized.named_parameters(ALL)
  def test_oracle(self, row):
    base, *models = make(row.models + 1)
    weights = row.weights or (1.0,) * row.models
    expected = row.oracle(models, base, weights, **row.options)
    assert_close(run(row, models, base), expected)

  @parameterized.named_parameters(ALL)
  def test_one_model_agrees_with_the_oracle(self, row):
    if row.ordered:
      self.skipTest('takes exactly three models')
    base, model = make(2)
    expected = row.oracle([model], base, (0.5,), **row.options)
    weights = None if row.weights is None else (0.5,)
    assert_close(run(row, [model], base, weights), expected)

  @parameterized.named_parameters(ALL)
  def test_bfloat16_in_float32_inside(self, row):
    base, *models = make(row.models + 1, dtype=ml_dtypes.bfloat16)
    weights = row.weights or (1.0,) * row.models
    expected = row.oracle(models, base, weights, **row.options)
    merged = run(row, models, base)
    for path, leaf in merged.items():
      self.assertEqual(leaf.dtype, jnp.bfloat16)
      # One rounding at the end, from a float32 result: half a unit in the last
      # place, and a hair for the float32 sum.
      rounded = expected[path].astype(ml_dtypes.bfloat16).astype(np.float64)
      unit = np.maximum(np.abs(expected[path]), 1e-3) * 2.0**-8
      off = np.abs(np.asarray(leaf).astype(np.float64) - expected[path])
      self.assertTrue(
        np.all(off <= np.abs(rounded - expected[path]) + unit / 64)
      )

  @parameterized.named_parameters(ALL)
  def test_copies_merge_to_the_model(self, row):
    base, model = make(2)
    merged = run(row, [model] * row.models, base)
    if row.moves_copies:
      moved = [
        not np.allclose(merged[path], model[path], atol=1e-6) for path in model
      ]
      self.assertTrue(any(moved), 'the row claims that copies move')
    else:
      assert_close(merged, model)

  @parameterized.named_parameters(ALL)
  def test_order_does_not_matter(self, row):
    base, *models = make(row.models + 1)
    turned = models[1:] + models[:1]
    weights = row.weights and row.weights[1:] + row.weights[:1]
    a, b = run(row, models, base), run(row, turned, base, weights)
    if row.ordered:
      self.assertFalse(np.allclose(a['a/bias'], b['a/bias']))
    else:
      assert_close(a, b)

  @parameterized.named_parameters(ALL)
  def test_zero_weight_is_absence(self, row):
    if row.weights is None:
      self.skipTest('the weights are part of the method')
    base, *models = make(row.models + 2)
    assert_close(
      run(row, models, base, (*row.weights, 0.0)),
      run(row, models[:-1], base, row.weights),
    )

  @parameterized.named_parameters(ALL)
  def test_leaf_by_leaf_equals_whole_tree(self, row):
    base, *models = make(row.models + 1)
    method = named.resolve(row.name, **row.options)
    self.assertTrue(method.separable)
    given = base if method.needs_base else None
    parts = merging.merge(models, method, base=given, weights=row.weights)
    whole = merging.merge(
      models,
      method._replace(separable=False),
      base=given,
      weights=row.weights,
    )
    jax.tree.map(np.testing.assert_array_equal, parts, whole)

  @parameterized.named_parameters(ALL)
  def test_states_add(self, row):
    base, *models = make(row.models + 1)
    method = named.resolve(row.name, **row.options)
    self.assertTrue(method.additive)
    weights = merging.check_weights(method, row.weights, row.models)
    specs = tree_lib.specs(base)
    states = [
      method.update(method.init(specs), m, base=base, weight=w)
      for m, w in zip(models, weights)
    ]
    total = states[0]
    for state in states[1:]:
      total = merging.add_states(total, state)
    assert_close(method.finish(total, base=base), run(row, models, base))

  @parameterized.named_parameters(ALL)
  def test_jit_equals_eager(self, row):
    base, *models = make(row.models + 1)
    jitted = jax.jit(lambda m, b: run(row, m, b))(models, base)
    assert_close(jitted, run(row, models, base))

  @parameterized.named_parameters(ALL)
  def test_no_recompilation_on_the_second_call(self, row):
    base, *models = make(row.models + 1)
    traces = []

    @jax.jit
    def merge(m, b, w):
      traces.append(1)
      return run(row, m, b, None if row.weights is None else list(w))

    weights = row.weights or (1.0,) * row.models
    merge(models, base, jnp.asarray(weights))
    merge(models, base, 2 * jnp.asarray(weights))
    self.assertLen(traces, 1)

  @parameterized.named_parameters(ALL)
  def test_gradients_reach_the_weights(self, row):
    if row.weights is None:
      self.skipTest('the weights are part of the method')
    base, *models = make(row.models + 1)

    def loss(w):
      merged = run(row, models, base, [w[i] for i in range(row.models)])
      return sum(jnp.sum(jnp.square(leaf)) for leaf in merged.values())

    weights = jnp.asarray(row.weights, jnp.float32)
    gradient = jax.grad(loss)(weights)
    step = 1e-2
    for i in range(row.models):
      bump = step * jax.nn.one_hot(i, row.models)
      numeric = (loss(weights + bump) - loss(weights - bump)) / (2 * step)
      np.testing.assert_allclose(gradient[i], numeric, rtol=2e-2, atol=2e-3)

  @parameterized.named_parameters(ALL)
  def test_sharded_equals_unsharded_and_keeps_the_sharding(self, row):
    mesh = mesh_lib.make_mesh(data=2, model=4)
    base, *models = [
      {'mlp/wi/kernel': m['a/kernel'][:2, :].repeat(8, axis=1)}
      for m in make(row.models + 1)
    ]
    layout = mesh_lib.sharding(mesh, ('batch', 'mlp'))
    put = lambda tree: jax.device_put(tree, layout)
    plain = run(row, models, base)
    sharded = run(row, [put(m) for m in models], put(base))
    leaf = sharded['mlp/wi/kernel']
    self.assertTrue(leaf.sharding.is_equivalent_to(layout, leaf.ndim))
    assert_close(sharded, plain)

  @parameterized.named_parameters(ALL)
  def test_on_the_branch_axis_equals_the_list(self, row):
    base, *models = make(row.models + 1)
    method = named.resolve(row.name, **row.options)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *models)
    merged = branch.merge_experts(
      stacked, method, base=base, weights=row.weights
    )
    assert_close(merged, run(row, models, base))

  @parameterized.named_parameters(ALL)
  def test_structure_dtype_and_other_leaves_are_kept(self, row):
    base, *models = make(row.models + 1)
    nest = lambda m: {**tree_lib.unflatten(m), 'step': np.int32(7)}
    merged = run(row, [nest(m) for m in models], nest(base))
    self.assertEqual(jax.tree.structure(merged), jax.tree.structure(nest(base)))
    self.assertEqual(merged['step'], 7)
    self.assertEqual(merged['step'].dtype, np.int32)

  @parameterized.named_parameters(ALL)
  def test_stores_equal_trees(self, row):
    base, *models = make(row.models + 1)
    folder = self.create_tempdir().full_path
    paths = []
    for i, model in enumerate([base, *models]):
      paths.append(f'{folder}/{i}.safetensors')
      mj.save_checkpoint(paths[-1], model)
    method = named.resolve(row.name, **row.options)
    merged = mj.merge(
      paths[1:],
      method,
      base=paths[0] if method.needs_base else None,
      weights=row.weights,
    )
    expected = tree_lib.unflatten(run(row, models, base))
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
