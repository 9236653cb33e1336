# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Git Re-Basin: planted permutations are found by weights and by activations."""

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import jax
import numpy as np
import small_networks
import tiers

from mergejax import align
from mergejax import partition
from mergejax.align import spec as spec_lib
from mergejax.core import errors
from mergejax.core import tree
from mergejax.intercept import capture


def noisy_pair(widths, noise, seed):
  """Two MLPs, the second a noisy copy with its units shuffled."""
  rng = np.random.default_rng(seed)
  a, names = {}, {}
  last = len(widths) - 2
  for i in range(last + 1):
    a[f'dense_{i}'] = {
      'kernel': rng.normal(size=widths[i : i + 2]) / np.sqrt(widths[i]),
      'bias': 0.1 * rng.normal(size=widths[i + 1]),
    }
    before = f'P_{i - 1}' if i else None
    after = f'P_{i}' if i < last else None
    names[f'dense_{i}/kernel'] = (before, after)
    names[f'dense_{i}/bias'] = (after,)
  a = jax.tree.map(np.float32, a)
  spec = align.permutation_spec(names, a)
  b = jax.tree.map(
    lambda leaf: (
      leaf + np.float32(noise * leaf.std() * rng.normal(size=leaf.shape))
    ),
    a,
  )
  shuffle = spec_lib.random_permutation(spec, seed)
  return a, align.permute(spec, shuffle, b), spec


@tiers.slow('test_planted_.*_resnet50')
class MatchTest(parameterized.TestCase):
  @parameterized.named_parameters(
    *small_networks.BUILT[:2], *small_networks.BUILT[3:]
  )
  def test_planted_permutations_are_found(self, fields):
    _, apply, params, batch = small_networks.built(fields)
    spec = align.derive(apply, params, batch)
    planted = align.permute(
      spec,
      spec_lib.random_permutation(spec, 3),
      small_networks.shaken(params, 7, 0.003),
    )
    best = 0.0
    for key in range(3):  # a local search
      found = align.match_weights(spec, params, planted, key)
      back = align.permute(spec, found, planted)
      best = max(best, align.objective(spec, params, planted, found))
    distance = max(
      np.abs(np.asarray(x) - np.asarray(y)).max()
      for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(back))
    )
    norm = sum(np.vdot(x, x) for x in jax.tree.leaves(params))
    np.testing.assert_allclose(best, norm, rtol=2e-3)
    self.assertLess(distance, 0.05)

  def test_scanned(self):
    _, apply, params, x = small_networks.stacked_model()
    spec = align.derive(apply, params, x)
    planted = align.permute(spec, spec_lib.random_permutation(spec, 3), params)
    found = align.match_weights(spec, params, planted)
    back = align.permute(spec, found, planted)
    jax.tree.map(np.testing.assert_array_equal, back, params)

  def test_sharded_equals_unsharded(self):
    _, apply, params, batch = small_networks.built(small_networks.BUILT[0][1])
    spec = align.derive(apply, params, batch)
    other = small_networks.shaken(params, 5, 1.0)
    mesh = partition.make_mesh(data=8)
    layout = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec('data')
    )
    spread = lambda tree_: tree.map_paths(
      lambda path, leaf: jax.device_put(
        leaf,
        layout if leaf.shape[0] % 8 == 0 else partition.replicated(mesh),
      ),
      tree_,
    )
    one = align.match_weights(spec, params, other, 1)
    many = align.match_weights(spec, spread(params), spread(other), 1)
    jax.tree.map(np.testing.assert_array_equal, one, many)

  def test_inputs_stay_and_fixed_groups_too(self):
    _, apply, params, batch = small_networks.built(small_networks.BUILT[0][1])
    spec = align.derive(apply, params, batch)
    other = small_networks.shaken(params, 5, 1.0)
    copy = jax.tree.map(np.copy, other)
    start = spec_lib.random_permutation(spec, 2)
    begun = {n: x.copy() for n, x in start.items()}
    names = list(spec.groups)
    found = align.match_weights(
      spec, params, other, initial=start, fixed=[names[0]]
    )
    np.testing.assert_array_equal(found[names[0]], begun[names[0]])
    jax.tree.map(np.testing.assert_array_equal, start, begun)
    jax.tree.map(np.testing.assert_array_equal, other, copy)
    with self.assertRaisesRegex(errors.UserError, 'matches no permutation'):
      align.match_weights(spec, params, other, fixed=['nothing'])
    with self.assertRaisesRegex(errors.ConfigError, 'not a regular expression'):
      align.match_weights(spec, params, other, fixed=['('])

  def test_a_start_from_what_is_settled(self):
    """Apart from each other, models gain nothing from a start at identity."""
    fields = dict(model_type='mlp', hidden=(16,) * 8, image_shape=(8, 8, 1))
    _, apply, params, batch = small_networks.built(fields)
    other = small_networks.built(fields, seed=1)[2]
    spec = align.derive(apply, params, batch)
    before = align.objective(spec, params, other)
    gained = lambda initial: np.mean([
      align.objective(
        spec, params, other,
        align.match_weights(spec, params, other, key, initial=initial),
      ) - before
      for key in range(5)
    ])  # fmt: skip
    self.assertGreater(gained(None), 1.02 * gained(align.identity(spec)))
    # Near each other, the identity is found again.
    near = small_networks.shaken(params, 5, 0.1)
    found = align.match_weights(spec, params, near)
    jax.tree.map(np.testing.assert_array_equal, found, align.identity(spec))

  @parameterized.parameters(
    ((4, 12, 12, 12, 12, 3), 1.0, 3), ((4, 12, 12, 12, 12, 3), 1.0, 5),
    ((6, 10, 10, 10, 4), 4.0, 3), ((6, 10, 10, 10, 4), 4.0, 5),
  )  # fmt: skip
  def test_no_order_ends_below_ascent_from_the_identity(
    self, widths, noise, seed
  ):
    a, b, spec = noisy_pair(widths, noise, seed)

    def objective(index):
      total = 0.0
      for i in range(len(widths) - 1):
        kernel, bias = (
          np.float64(b[f'dense_{i}'][name]) for name in ('kernel', 'bias')
        )
        if i:
          kernel = kernel[index[f'P_{i - 1}']]
        if f'P_{i}' in index:
          kernel, bias = kernel[:, index[f'P_{i}']], bias[index[f'P_{i}']]
        total += (a[f'dense_{i}']['kernel'] * kernel).sum()
        total += (a[f'dense_{i}']['bias'] * bias).sum()
      return total

    identity = align.identity(spec)
    for key in range(12):
      default = align.match_weights(spec, a, b, key)
      plain = align.match_weights(spec, a, b, key, initial=identity)
      self.assertGreaterEqual(objective(default), objective(plain) - 1e-4)
      self.assertGreater(objective(plain), objective(identity))

  def test_one_hidden_layer_needs_one_sweep(self):
    fields = dict(model_type='mlp', hidden=(8,), image_shape=(3, 3, 1))
    _, apply, params, batch = small_networks.built(fields)
    spec = align.derive(apply, params, batch)
    sweeps = []
    align.match_weights(
      spec, params, small_networks.shaken(params, 5, 1.0),
      progress=lambda sweep, gained: sweeps.append(gained),
    )  # fmt: skip
    self.assertLen(sweeps, 1)


class ActivationsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    small_networks.BUILT[1], small_networks.BUILT[5]
  )
  def test_planted_permutations_are_found(self, fields):
    module, apply, params, batch = small_networks.built(fields)
    spec = align.derive(apply, params, batch)
    planted = spec_lib.random_permutation(spec, 3)
    other = align.permute(spec, planted, params)
    big = small_networks.random_batch(module, rows=24, seed=4)
    found = align.match_activations(
      spec, module, params, other, [big], similarity='pearson'
    )
    back = align.permute(spec, found, other)
    align.check_function(apply, params, back, batch, tolerance=1e-5)
    with self.assertRaisesRegex(errors.StructureError, 'model b.*\n.*- '):
      lacking = {**other, next(iter(other)): {}}
      align.match_activations(spec, module, params, lacking, [big])
    start = align.objective(spec, params, other)
    self.assertGreater(align.objective(spec, params, other, found), start)
    if fields['model_type'] == 'vgg':
      jax.tree.map(np.testing.assert_array_equal, back, params)

  def test_kernels_whose_rank_does_not_tell(self):
    """A convolution over a line, and a dense layer with four axes."""

    class Net(nn.Module):
      @nn.compact
      def __call__(self, x):
        x = nn.tanh(nn.Conv(6, (3,), name='first')(x))
        x = nn.tanh(nn.Conv(5, (2,), name='second')(x))
        x = nn.tanh(nn.DenseGeneral((2, 3), name='split')(x))
        x = nn.DenseGeneral((2, 2), axis=(-2, -1), name='join')(x)
        return x.mean(axis=1)

    module = Net()
    x = np.random.default_rng(0).normal(size=(16, 7, 3)).astype(np.float32)
    params = small_networks.shaken(
      module.init(jax.random.key(0), x)['params'], 0
    )
    forward = lambda params, x: module.apply({'params': params}, x)
    spec = align.derive(forward, params, x)
    planted = spec_lib.random_permutation(spec, 3)
    # Two groups that one kernel reads mixed with each other stay, as is told.
    mixed = {n for n in spec.groups if 'join/kernel' in spec.leaves_with(n)}
    self.assertLen(mixed, 2)
    self.assertLen(spec.groups, 4)
    planted |= {n: align.identity(spec)[n] for n in mixed}
    other = align.permute(spec, planted, params)
    apply = lambda module, params, batch: module.apply(
      {'params': params}, batch['x'], mutable=[capture.COLLECTION]
    )[1]
    batch = {'x': x, 'weights': np.ones(16, np.float32)}
    found = align.match_activations(
      spec, module, params, other, [batch], similarity='pearson', apply=apply
    )
    back = align.permute(spec, found, other)
    jax.tree.map(np.testing.assert_array_equal, back, params)


if __name__ == '__main__':
  absltest.main()
