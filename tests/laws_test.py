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
from mergejax import partition
from mergejax.core import tree as tree_lib
from mergejax.merging import in_memory
from mergejax.merging import on_mesh
from mergejax.methods import named


@dataclasses.dataclass(frozen=True)
class Row:
  """A method, its oracle, and the laws that it does not obey, with the reason."""

  name: str
  options: dict
  oracle: Callable
  models: int = 3
  # None: weights play no part in the method, or are part of it.
  weights: tuple | None = (0.5, 2.0, 1.0)
  # Run with a base though the method would run without.
  base: bool = False
  # Copies of one model do not merge to it: the method moves beyond or away.
  moves_copies: bool = False
  # The order of the models is part of the question, or seeds their masks.
  ordered: bool = False
  # Masks are random, by the name of the leaf.
  drawn: bool = False
  # A model of weight 0 still counts: its magnitude, count or sign is looked at.
  counts_zero_weight: bool = False
  # Copies of every leaf are held: states do not add.
  gathered: bool = False
  # Statistics that the models bring.
  stats: str | None = None
  # Largest difference to the float64 oracle, where float32 cannot give 1e-6.
  tolerance: float = 1e-6


TRIMMED = dict(moves_copies=True)  # what is trimmed or dropped does not return
# Every model has its own mask.
DRAWN = dict(moves_copies=True, ordered=True, drawn=True)
PAIR = dict(models=1, weights=None, moves_copies=True)
EACH = [0.4, 0.7, 1.0]  # a density for each model

ROWS = (
    Row('linear', {}, oracles.linear),
    Row('linear', {'normalize': False}, oracles.linear, moves_copies=True),
    Row('interpolate', {'alpha': 0.3}, oracles.interpolate, moves_copies=True),
    Row('passthrough', {}, oracles.passthrough, models=1, weights=None),
    Row('task_arithmetic', {'scale': 0.4}, oracles.task_arithmetic,
        moves_copies=True),
    Row('task_arithmetic', {'normalize': True}, oracles.task_arithmetic),
    Row('negate', {'scale': 0.5}, oracles.negate, **PAIR),
    Row('analogy', {'scale': 0.7}, oracles.analogy, weights=None,
        moves_copies=True, ordered=True),
    Row('ties', {'density': 0.4}, oracles.ties, **TRIMMED),
    Row('ties', {'density': 1.0, 'trim_scope': 'tensor'}, oracles.ties),
    Row('ties', {'density': EACH, 'trim_scope': 'tensor', 'scale': 0.5,
                 'normalize': False, 'consensus': 'count'}, oracles.ties,
        **TRIMMED, ordered=True),
    Row('ties', {'density': 0.5, 'aggregate': 'max', 'trim_scope': 'tensor'},
        oracles.ties, **TRIMMED, gathered=True),
    Row('breadcrumbs', {'density': 0.5, 'gamma': 0.2}, oracles.breadcrumbs,
        **TRIMMED),
    Row('breadcrumbs_ties', {'density': EACH, 'gamma': 0.1, 'normalize': True},
        oracles.breadcrumbs_ties, ordered=True),
    Row('dare_linear', {'density': 0.5}, oracles.dare_linear, **DRAWN),
    Row('dare_linear', {'density': EACH, 'rescale': 'l1', 'normalize': True},
        oracles.dare_linear, **DRAWN),
    Row('dare_ties', {'density': 0.5, 'rescale': 'l2'}, oracles.dare_ties,
        **DRAWN),
    Row('dare_ties', {'density': 0.7, 'rescale': 'linf', 'normalize': True},
        oracles.dare_ties, **DRAWN),
    Row('della', {'density': 0.5}, oracles.della, **DRAWN),
    Row('della_linear', {'density': [0.3, 0.6, 1.0], 'epsilon': 0.1,
                         'rescale': 'none'}, oracles.della_linear, **DRAWN),
    Row('sce', {}, oracles.sce, weights=None, gathered=True),
    Row('sce', {'select_topk': 0.5}, oracles.sce, weights=None, gathered=True,
        **TRIMMED),
    Row('slerp', {'t': 0.3}, oracles.slerp, **PAIR),
    Row('nuslerp', {}, oracles.nuslerp, models=2, weights=(0.5, 2.0)),
    Row('nuslerp', {'flatten': False}, oracles.nuslerp, models=2,
        weights=(0.5, 2.0), base=True, gathered=True),
    Row('nuslerp', {'flatten': False, 'axis': 'input_feature'},
        oracles.nuslerp, models=2, weights=(0.5, 2.0), gathered=True),
    Row('multislerp', {}, oracles.multislerp),
    Row('multislerp', {'normalize_weights': False}, oracles.multislerp,
        base=True, moves_copies=True),
    Row('karcher', {}, oracles.karcher, weights=None, tolerance=4e-6),
    Row('model_stock', {}, oracles.model_stock, weights=None),
    Row('model_stock', {'filter_wise': True, 'clamp_t': True},
        oracles.model_stock, weights=None, gathered=True),
    Row('nearswap', {'t': 0.2}, oracles.nearswap, **PAIR),
    Row('arcee_fusion', {}, oracles.arcee_fusion, **PAIR),
    Row('ram', {'epsilon': 0.5}, oracles.ram, weights=None, moves_copies=True),
    Row('ram_plus', {'epsilon': 1.2}, oracles.ram_plus, weights=None,
        moves_copies=True),
    Row('fisher', {}, oracles.fisher, stats='fisher', ordered=True),
    Row('fisher', {'favor_first': False, 'normalize_fishers': 'leaf',
                   'floor': 1e-3}, oracles.fisher, stats='fisher'),
    Row('regmean', {'alpha': 0.9}, oracles.regmean, stats='gram',
        tolerance=2e-5),
    Row('regmean', {'alpha': 0.5, 'ridge': 0.1}, oracles.regmean, stats='gram',
        tolerance=2e-5),
)  # fmt: skip
ALL = [(f'{row.name}_{i}', row) for i, row in enumerate(ROWS)]
# One row a method, for laws of the machinery rather than of the numbers.
ONE = list({row.name: (name, row) for name, row in reversed(ALL)}.values())
AXES = (('b/kernel', ('layers', 'embed', 'mlp')),)


def make(count, seed=0, dtype=np.float32):
  """Models of odd shapes, with zeros, ties and a stacked kernel."""
  rng = np.random.default_rng(seed)
  shapes = {'a/kernel': (5, 3), 'a/bias': (3,), 'b/kernel': (2, 4, 1), 'c': ()}
  models = []
  for _ in range(count):
    model = {p: np.asarray(rng.normal(size=s)) for p, s in shapes.items()}
    model['a/kernel'][0] = 0.0
    model['a/kernel'][1] = 0.25
    models.append({p: leaf.astype(dtype) for p, leaf in model.items()})
  return models


def make_stats(row, models):
  """Statistics as the row wants them, with entries that nobody knows."""
  if row.stats is None:
    return None
  rng = np.random.default_rng(1)
  result = []
  for model in models:
    if row.stats == 'fisher':
      one = {
        p: {'fisher': rng.gamma(1.0, size=leaf.shape)}
        for p, leaf in sorted(model.items())
      }
      one['a/kernel']['fisher'][2] = 0.0
    else:
      x = rng.normal(size=(20, 5))
      x[:, 3] = 0.0  # a dead input feature
      y = rng.normal(size=(2, 20, 4))
      one = {
        'a/kernel': {'gram': x.T @ x / 20},
        'b/kernel': {'gram': np.swapaxes(y, 1, 2) @ y / 20},
      }
    result.append(jax.tree.map(lambda leaf: leaf.astype(np.float32), one))
  return result


def run(row, models, base, weights=None, **kwargs):
  method = named.resolve(row.name, **row.options)
  weights = row.weights if weights is None else weights
  stats = None if 'stats' in kwargs else make_stats(row, models)
  if 'axes' not in kwargs:
    kwargs['axes'] = [rule for rule in AXES if rule[0] in models[0]]
  return in_memory.merge(
    models,
    method,
    base=base if row.base or method.base == 'required' else None,
    weights=weights[: len(models)] if weights is not None else None,
    **{'stats': stats, **kwargs},
  )


def recipe_of(row, base, paths, stats=()):
  """The recipe of a row over checkpoints."""
  options = {
    'lambda' if name == 'scale' and row.name != 'passthrough' else name: value
    for name, value in row.options.items()
    if not isinstance(value, list)
  }
  # What a recipe would fill in with mergekit's defaults.
  for name, parameter in named.METHODS.options(row.name).items():
    if name not in row.options and name not in ('scale', 'normalize_weights'):
      if parameter.default is not parameter.empty:
        options.setdefault(name, parameter.default)
  entries = []
  for k, path in enumerate(paths):
    own = {n: v[k] for n, v in row.options.items() if isinstance(v, list)}
    if row.weights is not None:
      own['weight'] = row.weights[k]
    entries.append({'model': path, 'parameters': own})
  recipe = {
    'merge_method': row.name,
    'models': entries,
    'parameters': {
      k: v for k, v in options.items() if not isinstance(v, (list, tuple))
    },
  }
  if base is not None:
    recipe['base_model'] = base
  if stats:
    recipe['stats'] = list(stats)
  return recipe


def expected(row, models, base, weights=None):
  """The oracle's answer; each layer of a stack is a leaf of its own."""

  def split(tree):
    layers = {f'b/kernel[{i}]': tree['b/kernel'][i] for i in range(2)}
    return {
      new: leaf
      for path in tree
      for new, leaf in (
        layers.items() if path == 'b/kernel' else [(path, tree[path])]
      )
    }

  method = named.resolve(row.name, **row.options)
  options = dict(row.options)
  if row.stats is not None:
    options['stats'] = []
    for one in make_stats(row, models):
      if 'b/kernel' in one:
        stacks = one.pop('b/kernel')
        for i in range(2):
          one[f'b/kernel[{i}]'] = {n: s[i] for n, s in stacks.items()}
      options['stats'].append({p: one[p] for p in split(models[0]) if p in one})
  weights = weights or row.weights or (1.0,) * len(models)
  merged = row.oracle(
    [split(m) for m in models],
    split(base) if row.base or method.base == 'required' else None,
    weights[: len(models)],
    **options,
  )
  merged['b/kernel'] = np.stack(
    [merged.pop(f'b/kernel[{i}]') for i in range(2)]
  )
  return {path: merged[path] for path in models[0]}


def assert_close(actual, expected, atol=1e-6):
  rtol = atol
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
    assert_close(
      run(row, models, base), expected(row, models, base), row.tolerance
    )

  @parameterized.named_parameters(ALL)
  def test_one_model_agrees_with_the_oracle(self, row):
    if named.resolve(row.name, **row.options).counts[0] > 1:
      self.skipTest('takes several models')
    base, model = make(2)
    options = {
      name: value[:1] if isinstance(value, list) else value
      for name, value in row.options.items()
    }
    row = dataclasses.replace(row, options=options)
    assert_close(
      run(row, [model], base), expected(row, [model], base), row.tolerance
    )

  @parameterized.named_parameters(ALL)
  def test_bfloat16_in_float32_inside(self, row):
    base, *models = make(row.models + 1, dtype=ml_dtypes.bfloat16)
    answer = expected(row, models, base)
    merged = run(row, models, base)
    for path, leaf in merged.items():
      self.assertEqual(leaf.dtype, jnp.bfloat16)
      # One rounding at the end, from a float32 result: half a unit in the last
      # place, and a hair for the float32 sum.
      rounded = answer[path].astype(ml_dtypes.bfloat16).astype(np.float64)
      unit = np.maximum(np.abs(answer[path]), 1e-3) * 2.0**-8
      off = np.abs(np.asarray(leaf).astype(np.float64) - answer[path])
      self.assertTrue(np.all(off <= np.abs(rounded - answer[path]) + unit / 64))

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
      assert_close(merged, model, row.tolerance)

  @parameterized.named_parameters(ALL)
  def test_order_does_not_matter(self, row):
    base, *models = make(row.models + 1)
    turned = models[1:] + models[:1]
    weights = row.weights and row.weights[1:] + row.weights[:1]
    stats = make_stats(row, models)
    a = run(row, models, base)
    b = run(row, turned, base, weights, stats=stats and stats[1:] + stats[:1])
    if row.ordered:
      self.assertFalse(np.allclose(a['a/kernel'], b['a/kernel']))
    else:
      assert_close(a, b, row.tolerance)

  @parameterized.named_parameters(ALL)
  def test_zero_weight_is_absence(self, row):
    fixed = named.resolve(row.name, **row.options).counts[1]
    if row.weights is None or fixed is not None:
      self.skipTest('takes no weights, or a fixed number of models')
    base, *models = make(row.models + 2)
    options = {
      name: [*value, 0.5] if isinstance(value, list) else value
      for name, value in row.options.items()
    }
    stats = make_stats(row, models)
    more = dataclasses.replace(row, options=options)
    assert_close(
      run(more, models, base, (*row.weights, 0.0)),
      run(row, models[:-1], base, stats=stats and stats[:-1]),
      row.tolerance,
    )

  @parameterized.named_parameters(ONE)
  def test_leaf_by_leaf_equals_whole_tree(self, row):
    base, *models = make(row.models + 1)
    method = named.resolve(row.name, **row.options)
    self.assertTrue(method.separable)
    given = base if row.base or method.base == 'required' else None
    merge = lambda m: in_memory.merge(
      models, m, base=given, weights=row.weights, axes=AXES,
      stats=make_stats(row, models),
    )  # fmt: skip
    assert_close(merge(method), merge(method._replace(separable=False)), 1e-7)

  @parameterized.named_parameters(ALL)
  def test_states_add(self, row):
    base, *models = make(row.models + 1)
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
      models, alone, weights=row.weights, axes=AXES,
      base=base if row.base or method.base == 'required' else None,
      stats=make_stats(row, models),
    )  # fmt: skip
    assert_close(added, run(row, models, base), row.tolerance)

  @parameterized.named_parameters(ONE)
  def test_jit_equals_eager(self, row):
    base, *models = make(row.models + 1)
    jitted = jax.jit(lambda m, b: run(row, m, b))(models, base)
    assert_close(jitted, run(row, models, base), row.tolerance)

  @parameterized.named_parameters(ONE)
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

  @parameterized.named_parameters(ONE)
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
    plain = run(row, models, base, stats=stats)
    sharded = run(row, [put(m) for m in models], put(base), stats=stats)
    leaf = sharded['mlp/wi/kernel']
    self.assertTrue(leaf.sharding.is_equivalent_to(layout, leaf.ndim))
    assert_close(sharded, plain, row.tolerance)

  @parameterized.named_parameters(ALL)
  def test_on_the_branch_axis_equals_the_list(self, row):
    if row.stats is not None:
      self.skipTest('experts in training bring no statistics')
    base, *models = make(row.models + 1)
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
      axes=AXES,
    )
    assert_close(merged, run(row, models, base), 2e-7)
    first = base if with_base else models[0]
    np.testing.assert_array_equal(merged['ids'], first['ids'])
    self.assertEqual(merged['ids'].dtype, np.int32)
    self.assertEqual(merged['none'].shape, (0, 2))

  @parameterized.named_parameters(ONE)
  def test_float8_in_float32_inside(self, row):
    kind = ml_dtypes.float8_e4m3fn
    base, *models = make(row.models + 1, dtype=kind)
    answer = expected(row, models, base)
    for path, leaf in run(row, models, base).items():
      self.assertEqual(leaf.dtype, kind)
      wide = answer[path].astype(np.float32)
      near = [(wide * np.float32(1 + e)).astype(kind) for e in (-4e-6, 4e-6)]
      found = np.asarray(leaf).astype(np.float32)
      between = [np.minimum(*near), np.maximum(*near)]
      low, high = (one.astype(np.float32) for one in between)
      self.assertTrue(np.all((low <= found) & (found <= high)), path)

  @parameterized.named_parameters(ONE)
  def test_structure_dtype_and_other_leaves_are_kept(self, row):
    base, *models = make(row.models + 1)
    stats = make_stats(row, models)
    nest = lambda m: {
      **tree_lib.unflatten(m),
      'step': np.int32(7),
      'none': {'kernel': np.zeros((0, 3), np.float32)},
    }
    merged = run(
      row, [nest(m) for m in models], nest(base), axes=AXES, stats=stats
    )
    self.assertEqual(jax.tree.structure(merged), jax.tree.structure(nest(base)))
    self.assertEqual(merged['step'], 7)
    self.assertEqual(merged['step'].dtype, np.int32)
    self.assertEqual(merged['none']['kernel'].shape, (0, 3))

  @parameterized.named_parameters(ONE)
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
      base=paths[0] if row.base or method.base == 'required' else None,
      weights=row.weights,
      axes=AXES,
      stats=make_stats(row, models),
    )
    expected = tree_lib.unflatten(run(row, models, base))
    jax.tree.map(np.testing.assert_array_equal, merged, expected)
