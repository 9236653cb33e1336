# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A statistic of its own shape, from outside the package, all the way."""

import json
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import jax.numpy as jnp
import numpy as np

import mergejax as mj
from mergejax import statistics
from mergejax.core import errors
from mergejax.core import registry
from mergejax.core import statistic_specs
from mergejax.core import typing
from mergejax.methods import base as merge_base

# Two numbers for each input feature of a kernel: sums of x and of x^2.
MOMENTS = statistics.StatisticSpec(
  'moments', 'inputs x 2', required='some', combines=True
)


def moments():
  """The statistic `mean (x, x^2)` of the inputs of the only kernel."""

  def measure(module, params, batch, number, shards):
    del module, params, number
    rows = jnp.asarray(batch['x'], jnp.float32).reshape(shards, -1, 4)
    total = jnp.stack([rows, jnp.square(rows)], axis=-1)
    count = jnp.full((shards,), rows.shape[1], jnp.float32)
    return {'kernel': {'sum': jnp.sum(total, axis=1), 'count': count}}

  return statistics.Statistic(MOMENTS, measure)


def by_energy(view='input') -> merge_base.Merge:
  """Averages each input row by the second moment of its feature."""

  def update(state, leaf, base, weight, context):
    del base
    share = jnp.ones_like(leaf)
    if context.stats and 'moments' in context.stats:
      energy = context.stats['moments'][:, 1].astype(leaf.dtype)
      share = share * (energy[:, None] if view == 'input' else energy[None])
    share = weight * share
    return {'sum': state['sum'] + share * leaf, 'share': state['share'] + share}

  return merge_base.leafwise(
    lambda zeros: {'sum': zeros, 'share': zeros},
    update,
    lambda state, base: state['sum'] / state['share'],
    needs=(MOMENTS,),
    view=view,
  )


def by_size() -> merge_base.Merge:
  """Averages models by one number that each brings of each leaf."""

  def update(state, leaf, base, weight, context):
    del base
    return state + weight * context.stats['size'].astype(leaf.dtype) * leaf

  return merge_base.leafwise(
    lambda zeros: zeros,
    update,
    lambda state, base: state,
    needs=(statistics.StatisticSpec('size', 'scalar'),),
  )


class SpecsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    rng = np.random.default_rng(0)
    self.inputs = [
      rng.normal(size=(6, 4)).astype(np.float32) * (k + 1) for k in range(2)
    ]
    self.models = [
      {
        'kernel': rng.normal(size=(4, 3)).astype(np.float32),
        'bias': rng.normal(size=(3,)).astype(np.float32),
      }
      for _ in range(2)
    ]
    self.paths = [str(self.folder / f'stats_{k}') for k in range(2)]
    self.found = [
      statistics.collect(moments(), nn.Dense(3), model, [{'x': x}], out=path)
      for model, x, path in zip(self.models, self.inputs, self.paths)
    ]

  def expected(self):
    a, b = self.models
    energy = [np.square(x.astype(np.float64)).mean(axis=0) for x in self.inputs]
    top = energy[0][:, None] * a['kernel'] + energy[1][:, None] * b['kernel']
    return {
      'kernel': top / (energy[0] + energy[1])[:, None],
      'bias': (a['bias'] + b['bias']) / 2,
    }

  def check(self, merged):
    for path, leaf in self.expected().items():
      np.testing.assert_allclose(merged[path], leaf, rtol=1e-5, atol=1e-6)

  def test_it_is_saved_and_loaded(self):
    for x, path in zip(self.inputs, self.paths):
      loaded = statistics.load(path)
      self.assertEqual(loaded.spec, MOMENTS)
      self.assertEqual(loaded.kind, 'moments')
      wanted = np.stack([x.mean(axis=0), np.square(x).mean(axis=0)], axis=-1)
      np.testing.assert_allclose(
        loaded['kernel']['moments'], wanted, rtol=1e-5, atol=1e-6
      )

  def on_disk(self, method, stats):
    files = []
    for k, model in enumerate(self.models):
      files.append(str(self.folder / f'{k}.safetensors'))
      mj.save_checkpoint(files[-1], model)
    plan = mj.plan(
      {
        'merge_method': method,
        'models': [{'model': file} for file in files],
        'stats': stats,
      }
    )
    out = self.folder / 'out.safetensors'
    mj.execute(plan, out)
    return mj.open_checkpoint(out).leaves(['kernel', 'bias'])

  @parameterized.parameters('input', 'unit')
  def test_it_merges_in_memory_and_on_disk(self, view):
    merged = mj.merge(self.models, by_energy(view), stats=self.found)
    self.check(merged)
    for path, leaf in self.on_disk(by_energy(view), self.paths).items():
      np.testing.assert_array_equal(leaf, merged[path])

  def test_one_number_a_leaf(self):
    stats, paths = [], []
    for k in range(2):
      sizes = {'kernel': 2.0 + k, 'bias': 0.5 + k}
      own = {
        path: {'size': np.float32(size), 'count': np.float64(1)}
        for path, size in sizes.items()
      }
      spec = by_size().statistics[0]
      paths.append(str(self.folder / f'sizes_{k}'))
      stats.append(statistics.Statistics(own, spec, None, {}))
      stats[-1].save(paths[-1])
    merged = mj.merge(self.models, by_size(), stats=stats)
    a, b = self.models
    np.testing.assert_allclose(
      merged['kernel'], 2 * a['kernel'] + 3 * b['kernel'], rtol=1e-6
    )
    for path, leaf in self.on_disk(by_size(), paths).items():
      np.testing.assert_allclose(leaf, merged[path], rtol=1e-6)

  def test_it_merges_layer_by_layer_of_a_stack(self):
    stack = lambda trees: {n: np.stack([t[n] for t in trees]) for n in trees[0]}
    models = [stack([m, m]) for m in self.models]
    stats = [
      {'kernel': {'moments': np.stack([s['kernel']['moments']] * 2)}}
      for s in self.found
    ]
    axes = (
      ('kernel', ('layers', 'inputs', 'outputs')),
      ('bias', ('layers', 'mlp')),
    )
    merged = mj.merge(models, by_energy(), stats=stats, axes=axes)
    for layer in range(2):
      self.check({path: leaf[layer] for path, leaf in merged.items()})

  def test_another_shape_or_none_is_refused(self):
    wrong = [{'kernel': {'moments': np.ones((3, 2), np.float32)}}] * 2
    with self.assertRaisesRegex(errors.DataError, 'moments .* does not fit'):
      mj.merge(self.models, by_energy(), stats=wrong)
    with self.assertRaisesRegex(errors.DataError, 'moments statistics'):
      mj.merge(self.models, by_energy())
    lacking = [self.found[0], {}]
    with self.assertRaisesRegex(errors.DataError, 'lacks its moments'):
      mj.merge(self.models, by_energy(), stats=lacking)

  def test_a_collection_of_another_source_is_not_continued(self):
    batches = [{'x': x} for x in np.split(self.inputs[0], 3)]
    collect = lambda progress=lambda done: None: statistics.collect(
      moments(), nn.Dense(3), self.models[0], batches,
      out=self.folder / 'again', save_every=1, progress=progress,
    )  # fmt: skip

    def stop(done):
      if done == 2:
        raise KeyboardInterrupt

    with self.assertRaises(KeyboardInterrupt):
      collect(stop)
    with mock.patch.object(registry, 'source_digest', lambda _: 'another'):
      with self.assertRaisesRegex(errors.ConfigError, 'source: .* another'):
        collect()
    np.testing.assert_allclose(
      collect()['kernel']['moments'], self.found[0]['kernel']['moments'],
      rtol=1e-6,
    )  # fmt: skip

  def test_it_combines_as_it_says(self):
    merged = mj.merge(self.models, by_energy(), stats=self.found)
    both = statistics.combine(self.found, merged, weights=[1.0, 3.0])
    first, second = (one['kernel']['moments'] for one in self.found)
    np.testing.assert_allclose(
      both['kernel']['moments'], (first + 3 * second) / 4, rtol=1e-6
    )
    self.assertEqual(both.spec, MOMENTS)
    with self.assertRaisesRegex(errors.ConfigError, 'sum to 0'):
      statistics.combine(self.found, merged, weights=[1.0, -1.0])
    # Parts that were saved tell their own model; the result has another.
    for k, part in enumerate(self.found):
      part.save(self.folder / f'part{k}')
    parts = [statistics.load(self.folder / f'part{k}') for k in range(2)]
    statistics.combine(parts, merged).save(self.folder / 'both')
    self.assertEqual(
      statistics.load(self.folder / 'both').fingerprint,
      statistics.fingerprint(merged),
    )

  @parameterized.parameters('gram', 'fisher')
  def test_files_without_a_spec_open_by_the_names_of_their_leaves(self, name):
    means = {
      'kernel': {name: np.ones((4, 4), np.float32), 'count': np.ones(())}
    }
    spec = statistic_specs.named(name)
    statistics.Statistics(means, spec, 'f', {'kind': name}).save(
      self.folder / 'old'
    )
    file = self.folder / 'old' / 'statistics.json'
    about = json.loads(file.read_text())
    self.assertEqual(about.pop('statistic')['name'], name)
    file.write_text(json.dumps(about))
    loaded = statistics.load(self.folder / 'old')
    self.assertEqual((loaded.spec, loaded.fingerprint), (spec, 'f'))
    file.unlink()
    self.assertEqual(statistics.load(self.folder / 'old').spec, spec)

  def test_shapes(self):
    kernel = typing.LeafSpec((5, 3), np.dtype('float32'))
    stack = typing.LeafSpec(
      (2, 5, 3), np.dtype('float32'), ('layers', 'inputs', 'outputs')
    )
    for layout, one, many in (
      ('leaf', (5, 3), (2, 5, 3)),
      ('scalar', (), (2,)),
      ('inputs x inputs', (5, 5), (2, 5, 5)),
      ('outputs', (3,), (2, 3)),
      ('inputs x 2', (5, 2), (2, 5, 2)),
      ('* x outputs', (None, 3), (2, None, 3)),
    ):
      spec = statistics.StatisticSpec('x', layout)
      spec.check()
      self.assertEqual(spec.shape('kernel', kernel), one, layout)
      self.assertEqual(spec.shape('kernel', stack), many, layout)
    self.assertTrue(spec.fits((7, 3), 'kernel', kernel))
    self.assertFalse(spec.fits((7, 5), 'kernel', kernel))
    for wrong in ('inputs x rows', 'inputsxinputs', ''):
      with self.assertRaisesRegex(ValueError, 'layout'):
        statistics.StatisticSpec('x', wrong).check()


if __name__ == '__main__':
  absltest.main()
