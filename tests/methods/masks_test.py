# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The counter hash behind random masks: uniform, independent, keyed by name."""

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

import mergejax as mj
from mergejax.core import numerics
from mergejax.methods import masks

COUNT = 1 << 18


def draw(seed=0, path='layers/0/kernel', model=0, count=COUNT):
  key = masks.mask_key(seed, path, model)
  return np.asarray(
    masks.uniform(key, jnp.arange(count, dtype=jnp.uint32)), np.float64
  )


class UniformTest(absltest.TestCase):
  def test_uniform_in_every_bin_of_every_key(self):
    for model in range(8):
      values = draw(model=model)
      self.assertTrue(np.all((values >= 0) & (values < 1)))
      counts = np.histogram(values, bins=256, range=(0, 1))[0]
      expected = COUNT / 256
      chi2 = np.sum((counts - expected) ** 2 / expected)
      # 255 degrees of freedom: mean 255, standard deviation 22.6.
      self.assertLess(abs(chi2 - 255), 5 * 22.6)

  def test_every_bit_is_fair_and_pairs_of_bits_are_independent(self):
    words = (draw() * 2**24).astype(np.int64)
    bits = (words[:, None] >> np.arange(24)) & 1
    deviation = np.abs(bits.mean(0) - 0.5) * 2 * np.sqrt(COUNT)
    self.assertLess(deviation.max(), 5)
    correlation = np.corrcoef(bits.T) - np.eye(24)
    self.assertLess(np.abs(correlation).max() * np.sqrt(COUNT), 5.5)

  def test_neighbours_rows_models_paths_and_seeds_are_independent(self):
    values = draw() - 0.5
    others = {
      **{
        f'lag {lag}': np.roll(values, lag)
        for lag in (1, 2, 3, 64, 1000, 1024, 4096)
      },
      'model': draw(model=1) - 0.5,
      'path': draw(path='layers/1/kernel') - 0.5,
      'seed': draw(seed=1) - 0.5,
    }
    for name, other in others.items():
      z = np.mean(values * other) * 12 * np.sqrt(COUNT)
      self.assertLess(abs(z), 5, name)

  def test_runs_below_a_density_are_geometric(self):
    kept = draw() < 0.1
    gaps = np.diff(np.flatnonzero(kept))
    for length in range(1, 20):
      share = np.mean(gaps == length)
      expected = 0.1 * 0.9 ** (length - 1)
      error = np.sqrt(expected * (1 - expected) / gaps.size)
      self.assertLess(abs(share - expected), 5 * error)

  def test_an_input_bit_moves_every_output_bit_half_of_the_time(self):
    key = masks.mask_key(0, 'w', 0)
    index = jnp.arange(1 << 14, dtype=jnp.uint32)
    before = np.asarray(masks.uniform(key, index) * 2**24).astype(np.int64)
    for bit in range(32):
      flipped = index ^ jnp.uint32(1 << bit)
      after = np.asarray(masks.uniform(key, flipped) * 2**24).astype(np.int64)
      moved = (((before ^ after)[:, None] >> np.arange(24)) & 1).mean(0)
      self.assertLess(np.abs(moved - 0.5).max() * 2 * np.sqrt(1 << 14), 5.5)

  def test_keys_do_not_depend_on_the_process(self):
    np.testing.assert_array_equal(
      masks.mask_key(0, 'w', 0), masks.mask_key(0, 'w', 0)
    )
    self.assertLen(
      {
        masks.mask_key(s, p, m).tobytes()
        for s in range(4)
        for p in ('a', 'b', 'a/b')
        for m in range(4)
      },
      48,
    )


class DropTest(absltest.TestCase):
  def test_mean_over_seeds_is_the_task_vector(self):
    rng = np.random.default_rng(0)
    base = {'kernel': np.zeros((8, 6), np.float32)}
    model = {'kernel': rng.normal(size=(8, 6)).astype(np.float32)}
    for method, options, share in (
      ('dare_linear', {}, 0.3),
      ('della_linear', {'epsilon': 0.2}, 0.5),
    ):
      merged = np.stack(
        [
          mj.merge(
            [model], method, base=base, density=share, seed=seed, **options
          )['kernel']
          for seed in range(400)
        ]
      )
      low = share - options.get('epsilon', 0.0)
      error = np.abs(model['kernel']) * np.sqrt((1 - low) / low / 400)
      off = np.abs(merged.mean(0) - model['kernel'])
      self.assertLess(np.max(off / error), 5)
      kept = np.mean(merged != 0)
      self.assertLess(abs(kept - share), 5 * np.sqrt(share / merged.size))

  def test_a_larger_entry_is_kept_more_often(self):
    delta = {'bias': np.linspace(0.1, 2, 16, dtype=np.float32)}
    base = {'bias': np.zeros(16, np.float32)}
    kept = np.mean(
      [
        mj.merge([delta], 'della_linear', base=base, density=0.5, epsilon=0.4,
                 seed=seed)['bias'] != 0
        for seed in range(300)
      ],
      axis=0,
    )  # fmt: skip
    self.assertLess(kept[:5].mean() + 0.3, kept[-5:].mean())

  def test_masks_do_not_depend_on_order_or_mesh(self):
    rng = np.random.default_rng(0)
    make = lambda: {
      n: rng.normal(size=(16, 8)).astype(np.float32) for n in 'abc'
    }
    base, model = make(), make()
    run = lambda b, m: mj.merge([m], 'dare_linear', base=b, density=0.5)
    plain = run(base, model)
    turned = run(dict(reversed(base.items())), dict(reversed(model.items())))
    mesh = mj.make_mesh(data=8)
    put = lambda tree: jax.device_put(
      tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    )
    sharded = run(put(base), put(model))
    for name, leaf in plain.items():
      np.testing.assert_array_equal(leaf, turned[name])
      np.testing.assert_array_equal(leaf, sharded[name])


class LargestTest(absltest.TestCase):
  def test_equals_a_sort_with_ties_by_position(self):
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 100):
      for scores in (
        rng.normal(size=size),
        rng.integers(-2, 3, size=size).astype(float),
        np.zeros(size),
        -np.zeros(size),
      ):
        scores = scores.astype(np.float32)
        index = jnp.arange(size, dtype=jnp.uint32)
        order = sorted(range(size), key=lambda i, s=scores: (-s[i], i))
        for rank in {0, 1, size // 3, size - 1, size}:
          (cut,) = numerics.largest([scores], rank, [index])
          kept = np.flatnonzero(numerics.above(scores, cut, index))
          self.assertCountEqual(kept, order[:rank])

  def test_several_arrays_rank_together(self):
    rng = np.random.default_rng(1)
    parts = [rng.integers(0, 4, size=n).astype(np.float32) for n in (5, 1, 9)]
    indices = [jnp.arange(p.size, dtype=jnp.uint32) for p in parts]
    whole = np.concatenate(parts)
    order = sorted(range(15), key=lambda i: (-whole[i], i))
    for rank in range(16):
      cuts = numerics.largest(parts, rank, indices)
      kept = np.concatenate(
        [
          np.asarray(numerics.above(p, c, i))
          for p, c, i in zip(parts, cuts, indices)
        ]
      )
      self.assertCountEqual(np.flatnonzero(kept), order[:rank])


if __name__ == '__main__':
  absltest.main()
