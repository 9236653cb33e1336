# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Streamed merges equal merges in memory and on a mesh, for every method."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import laws
import ml_dtypes
import models_on_disk
import numpy as np
import process_groups
import pytest
import tiers

import mergejax as mj
from mergejax import partition
from mergejax.core import tree as tree_lib
from mergejax.methods import base as base_lib
from mergejax.methods import named

ODD_AXES = (('model.experts.kernel', ('embed', 'expert', 'mlp')),)


def odd_leaves(rng, number):
  """Stacks, scalars, float8, leaves of no numbers, and counters."""
  return {
    'model.experts.kernel': rng.normal(size=(12, 2, 12)).astype(np.float32),
    'model.temperature': np.float32(rng.normal()).reshape(()),
    'model.small.weight': rng.normal(size=(12, 12)).astype(
      ml_dtypes.float8_e4m3fn
    ),
    'model.none.weight': np.zeros((0, 12), np.float32),
    'model.none.bias': np.zeros((0,), ml_dtypes.bfloat16),
    'model.ids': np.arange(3) + number,
  }


# One method of every way to compute: a sum, masks, norms of a leaf, all models
# at once, statistics, a search. That every method says on disk what it says in
# memory is also of `scanned_test`, of plainer leaves; ties is below, on a mesh.
KINDS = '|'.join((
  'linear', 'della_linear', 'slerp', 'sce', 'model_stock', 'fisher', 'regmean',
  'karcher',
))  # fmt: skip


# A kernel and a vector: every further shape is compiled again for the mesh.
SHARDED = (
  'model.layers.0.self_attn.q_proj.weight',
  'model.layers.0.input_layernorm.weight',
)


def sharded(model):
  """Every leaf over the eight devices, in the way its sizes allow."""
  mesh = partition.make_mesh(data=2, model=4)
  specs = {
    3: ('layers', 'batch', 'mlp'), 2: ('batch', 'mlp'), 1: ('mlp',), 0: (),
  }  # fmt: skip
  return {
    p: jax.device_put(
      leaf, partition.sharding(mesh, specs[leaf.ndim], leaf.shape)
    )
    for p, leaf in model.items()
  }


@tiers.slow(rf'test_streamed_equals_in_memory_(?!({KINDS})_\d+$|and_).*')
class EqualityTest(parameterized.TestCase):
  @parameterized.named_parameters(laws.ONE)
  def test_streamed_equals_in_memory(self, row):
    self.check(row, odd=True)

  def test_streamed_equals_sharded(self):
    """Of other methods `laws_test` says the same, of plainer leaves."""
    (row,) = [row for _, row in laws.ONE if row.name == 'ties']
    self.check(row, odd=True, on_mesh=True)

  @parameterized.named_parameters(laws.ONE)
  @pytest.mark.slow
  def test_streamed_equals_sharded_by_every_method(self, row):
    self.check(row, odd=True, on_mesh=True)

  @parameterized.named_parameters(laws.FURTHER)
  @pytest.mark.slow
  def test_streamed_equals_in_memory_and_sharded_by_other_options(self, row):
    self.check(row, odd=False, on_mesh=True)

  def check(self, row, *, odd, on_mesh=False):
    rng = np.random.default_rng(0)
    names = ['base', *'abc'[: row.models]]
    folder = pathlib.Path(self.create_tempdir().full_path)
    # Few shapes: most of the time goes into compiling for each.
    models = {n: models_on_disk.llama(rng, vocab=25, layers=2) for n in names}
    for k, model in enumerate(models.values() if odd else ()):
      model.update(odd_leaves(rng, k))
    axes = ODD_AXES if odd else ()
    for name, model in models.items():
      models_on_disk.save(folder / name, model)
    stats, stats_paths = None, []
    if row.stats is not None:
      stats = [
        models_on_disk.statistics(row.stats, models[n], rng) for n in names[1:]
      ]
      for name, one in zip(names[1:], stats):
        stats_paths.append(str(folder / f'{name}.stats.safetensors'))
        flat = {
          f'{p}/{kind}': leaf
          for p, own in one.items()
          for kind, leaf in own.items()
        }
        mj.save_checkpoint(stats_paths[-1], flat)
    method = named.resolve(row.name, **row.options)
    with_base = row.base or method.base == 'required'
    recipe = laws.recipe_of(
      row,
      str(folder / 'base') if with_base else None,
      [str(folder / n) for n in names[1:]],
      stats_paths,
    )
    recipe['axes'] = [[path, list(names)] for path, names in axes]
    # Before the cast: of two roundings to float8, a last bit of float32 decides.
    recipe['dtype'] = 'float32'
    with process_groups.small_pieces():
      mj.execute(mj.plan(recipe), folder / 'out')
      if odd:  # so many processes that most leaves are divided, the stack too
        process_groups.execute(7, recipe, folder / 'together')
    for file in (folder / 'out').iterdir() if odd else ():
      same = file.read_bytes() == (folder / 'together' / file.name).read_bytes()
      self.assertTrue(same, f'{file.name} differs from that of one process')
    streamed = tree_lib.flatten(mj.open_checkpoint(folder / 'out').read())
    arguments = dict(
      weights=row.weights, stats=stats, axes=axes, dtype=np.float32
    )
    plain = mj.merge(
      [models[n] for n in names[1:]],
      method,
      base=models['base'] if with_base else None,
      **arguments,
    )
    laws.assert_close(streamed, plain, max(row.tolerance, 2e-6))
    lead = models['base' if with_base else 'a']
    for path, leaf in lead.items():
      ids = path == 'model.ids'
      self.assertEqual(streamed[path].dtype, leaf.dtype if ids else np.float32)
      self.assertEqual(streamed[path].shape, leaf.shape)
    if odd:
      np.testing.assert_array_equal(streamed['model.ids'], lead['model.ids'])
    if not on_mesh:
      return
    chosen = [*SHARDED, *(odd_leaves(rng, 0) if odd else ())]
    some = lambda tree: {p: tree[p] for p in chosen if p in tree}
    arguments['stats'] = stats and [some(one) for one in stats]
    plain, on_devices = (
      mj.merge(
        [put(some(models[n])) for n in names[1:]],
        method,
        base=put(some(models['base'])) if with_base else None,
        **arguments,
      )
      for put in (dict, sharded)
    )
    laws.assert_close(on_devices, plain, max(row.tolerance, 2e-6))

  def test_bfloat16_bit_for_bit(self):
    self.check_bits(
      ('ties', dict(density=0.3, trim_scope='tensor')),
      ('dare_ties', dict(density=0.4, rescale='paper')),
    )

  @pytest.mark.slow
  def test_bfloat16_bit_for_bit_by_further_methods(self):
    self.check_bits(
      ('ties', dict(density=0.3, trim_scope='global')),
      ('breadcrumbs', dict(density=0.5, gamma=0.1)),
    )

  def check_bits(self, *methods):
    """Random and trimming methods pick the same entries in both worlds."""
    rng = np.random.default_rng(0)
    folder = pathlib.Path(self.create_tempdir().full_path)
    base = models_on_disk.llama(rng, ml_dtypes.bfloat16)
    models = [
      {
        # Few distinct differences: many ties in magnitude.
        p: (leaf + rng.integers(-2, 3, leaf.shape) * leaf * 2.0**-7).astype(
          leaf.dtype
        )
        for p, leaf in base.items()
      }
      for _ in range(3)
    ]
    paths = [str(folder / n) for n in ('base', 'a', 'b', 'c')]
    for path, model in zip(paths, [base, *models]):
      models_on_disk.save(pathlib.Path(path), model)
    for method, options in methods:
      out = folder / f'{method}-{options.get("trim_scope")}'
      recipe = {
        'merge_method': method,
        'base_model': paths[0],
        'models': paths[1:],
        'parameters': options,
      }
      with process_groups.small_pieces():
        mj.execute(mj.plan(recipe), out)
        process_groups.execute(4, recipe, folder / 'together' / out.name)
      self.assertEqual(
        (folder / 'together' / out.name / 'model.safetensors').read_bytes(),
        (out / 'model.safetensors').read_bytes(),
      )
      streamed = tree_lib.flatten(mj.open_checkpoint(out).read())
      plain = mj.merge(models, method, base=base, **options)
      for path, leaf in plain.items():
        np.testing.assert_array_equal(
          np.asarray(leaf).view(np.uint16), streamed[path].view(np.uint16), path
        )


class StatisticsTest(absltest.TestCase):
  def test_two_statistics_of_the_shape_of_the_leaf(self):
    """Each model is given its own of each."""

    def first_less_second():
      return base_lib.leafwise(
        lambda zeros: zeros,
        lambda state, leaf, base, weight, context: (
          state + leaf * (context.stats['first'] - 2 * context.stats['second'])
        ),
        lambda state, base: state,
        needs=('first', 'second'),
      )

    named.METHODS.register('first_less_second')(first_less_second)
    self.addCleanup(named.METHODS._entries.pop, 'first_less_second')
    rng = np.random.default_rng(0)
    folder = pathlib.Path(self.create_tempdir().full_path)
    draw = lambda: rng.normal(size=(5, 7)).astype(np.float32)
    models = [{'a/kernel': draw(), 'b/kernel': draw()} for _ in range(3)]
    stats = [
      {p: {'first': draw(), 'second': draw()} for p in model}
      for model in models
    ]
    for k, (model, own) in enumerate(zip(models, stats)):
      mj.save_checkpoint(folder / f'{k}.safetensors', model)
      flat = {f'{p}/{n}': x for p, s in own.items() for n, x in s.items()}
      mj.save_checkpoint(folder / f'{k}.stats.safetensors', flat)
    recipe = {
      'merge_method': 'first_less_second',
      'models': [str(folder / f'{k}.safetensors') for k in range(3)],
      'stats': [str(folder / f'{k}.stats.safetensors') for k in range(3)],
    }
    mj.execute(mj.plan(recipe), folder / 'out.safetensors')
    found = tree_lib.flatten(
      mj.open_checkpoint(folder / 'out.safetensors').read()
    )
    plain = mj.merge(models, 'first_less_second', stats=stats)
    for path in models[0]:
      expected = sum(
        np.float64(m[path]) * (np.float64(s[path]['first']) - 2 * np.float64(s[path]['second']))
        for m, s in zip(models, stats)
      )  # fmt: skip
      np.testing.assert_allclose(found[path], expected, rtol=1e-5, atol=1e-5)
      np.testing.assert_allclose(found[path], plain[path], atol=1e-6)


if __name__ == '__main__':
  absltest.main()
