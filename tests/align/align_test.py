# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Git Re-Basin: function equality, planted permutations."""

import functools
import json

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import align
from mergejax import models
from mergejax import partition
from mergejax.align import spec as spec_lib
from mergejax.core import errors
from mergejax.core import tree
from mergejax.intercept import capture

TEXT = dict(vocab_size=20, emb_dim=10, num_heads=3, head_dim=4, mlp_dim=9)
BUILT = (
  ('mlp', dict(model_type='mlp', hidden=(8, 6), image_shape=(4, 4, 1))),
  ('vgg', dict(model_type='vgg', channels=(6, 0, 8, 0), dense=(7,),
               image_shape=(8, 8, 1))),
  ('resnet_batch', dict(model_type='resnet', stages=(1, 1), channels=(4, 6),
                        norm='batch', image_shape=(8, 8, 1))),
  ('resnet50', dict(model_type='resnet', stages=(1, 2), channels=(4, 8),
                    bottleneck=True, large_stem=True, norm='group',
                    image_shape=(16, 16, 1))),
  ('vit', dict(model_type='vit', emb_dim=12, num_heads=3, num_layers=1,
               mlp_dim=9, patch=4, image_shape=(8, 8, 1))),
  ('t5', dict(model_type='t5x', num_encoder_layers=2, num_decoder_layers=1,
              logits_via_embedding=True, **TEXT)),
  ('lm', dict(model_type='lm', num_layers=2, **TEXT)),
)  # fmt: skip


def shaken(params, seed, size=0.3):
  """Parameters with noise, so that no two units are alike."""
  rng = np.random.default_rng(seed)

  def shake(path, leaf):
    noise = size * rng.normal(size=leaf.shape).astype(np.float32)
    return np.abs(leaf + noise) if path.endswith('var') else leaf + noise

  return tree.map_paths(shake, jax.tree.map(np.asarray, params))


def random_batch(module, rows=3, length=5, seed=0):
  rng = np.random.default_rng(seed)
  batch = models.family_of(module).example_batch(rows, length=length)
  batch.pop('labels', None)
  return {
    name: rng.random(x.shape).astype(np.float32)
    if name == 'images'
    else rng.integers(1, 20, x.shape)
    for name, x in batch.items()
  }


@functools.cache
def initial_params(fields, seed):
  module = models.build(json.loads(fields))
  return models.family_of(module).init(jax.random.key(seed))


def built(fields, seed=0):
  """`(module, apply, params, batch)`."""
  module = models.build(fields)
  params = shaken(initial_params(json.dumps(fields), seed), seed)
  apply = lambda params, batch: models.family_of(module).logits(params, batch)
  return module, apply, params, random_batch(module)


class Stacked(nn.Module):
  """Scanned gated MLP blocks around a residual stream."""

  @nn.compact
  def __call__(self, x):
    class Block(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        gate = nn.Dense(7, name='wi_0')(x) * nn.tanh(
          nn.Dense(7, name='wi_1')(x)
        )
        return x + nn.Dense(6, name='wo')(gate), None

    x = nn.Dense(6, name='in')(x)
    layers = nn.scan(
      Block, variable_axes={'params': 0, 'intermediates': 0},
      split_rngs={'params': True}, length=3,
    )  # fmt: skip
    return nn.Dense(2, name='out')(layers(name='layers')(x, None)[0])


def stacked_model():
  module = Stacked()
  x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
  params = shaken(module.init(jax.random.key(0), x)['params'], 0)
  apply = lambda params, x: module.apply({'params': params}, x)
  return module, apply, params, x


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


class DeriveTest(parameterized.TestCase):
  @parameterized.named_parameters(*BUILT)
  def test_random_permutations_keep_the_function(self, fields):
    _, apply, params, batch = built(fields)
    spec = align.derive(apply, params, batch)
    permutation = spec_lib.random_permutation(spec, 1)
    moved = align.permute(spec, permutation, params)
    worst = align.check_function(apply, params, moved, batch, tolerance=1e-5)
    self.assertLess(worst, 1e-5)
    changed = jax.tree.map(lambda x, y: not np.array_equal(x, y), params, moved)
    self.assertTrue(any(jax.tree.leaves(changed)))

  @parameterized.named_parameters(
    ('mlp', BUILT[0][1], [8, 6]),
    ('vgg', BUILT[1][1], [6, 8, 7]),
    # a stage's stream, and the middle of each block
    ('resnet', BUILT[2][1], [4, 4, 6, 6]),
    # residual stream; per stack: heads, with dimensions of q, k and of v, out
    # per layer; cross-attention heads per layer; MLPs
    ('t5', BUILT[5][1], [10, 3, 3, 3] + [4] * 8 + [9] * 3),
    ('lm', BUILT[6][1], [10, 3] + [4] * 4 + [9] * 2),
  )
  def test_the_groups_are_those_of_the_architecture(self, fields, sizes):
    _, apply, params, batch = built(fields)
    spec = align.derive(apply, params, batch)
    found = sorted(group.size for group in spec.groups.values())
    expected = [4, 4, 6, 6] if fields['model_type'] == 'resnet' else sizes
    self.assertEqual(found, sorted(expected))

  def test_heads_of_a_stack_move_as_one(self):
    _, apply, params, batch = built(BUILT[6][1])
    spec = align.derive(apply, params, batch)
    (heads,) = [
      name for name in spec.groups
      if 'decoder/relpos_bias/rel_embedding' in spec.leaves_with(name)
    ]  # fmt: skip
    self.assertLen(spec.leaves_with(heads), 1 + 2 * 4)
    inside = [n for n, g in spec.groups.items() if g.parents == (heads,)]
    self.assertLen(inside, 4)

  def test_scanned_layers_have_their_own(self):
    _, apply, params, x = stacked_model()
    spec = align.derive(apply, params, x)
    shapes = sorted(spec_lib.index_shape(spec, name) for name in spec.groups)
    self.assertEqual(shapes, [(3, 7), (6,)])
    moved = align.permute(spec, spec_lib.random_permutation(spec), params)
    align.check_function(apply, params, moved, x, tolerance=1e-5)

  def test_flattened_map(self):
    def apply(params, x):
      y = jnp.maximum(
        jax.lax.conv(x, params['conv'], (1, 1), 'SAME'), 0.0
      )  # [batch, channels, height, width]
      y = jnp.moveaxis(y, 1, 3).reshape(len(x), -1)
      return y @ params['dense']

    rng = np.random.default_rng(0)
    params = {
      'conv': rng.normal(size=(5, 1, 3, 3)).astype(np.float32),
      'dense': rng.normal(size=(4 * 4 * 5, 2)).astype(np.float32),
    }
    x = rng.normal(size=(2, 1, 4, 4)).astype(np.float32)
    spec = align.derive(apply, params, x)
    self.assertEqual([g.size for g in spec.groups.values()], [5])
    moved = align.permute(spec, spec_lib.random_permutation(spec), params)
    align.check_function(apply, params, moved, x, tolerance=1e-5)

  def test_what_tells_positions_apart_is_fixed(self):
    params = {
      'a': np.ones((3, 4), np.float32),
      'b': np.ones((4, 2), np.float32),
    }
    x = np.ones((5, 3), np.float32)
    for change in (
      lambda h: h * jnp.arange(4.0)[None],
      lambda h: jnp.concatenate([h[:, :1], h[:, 1:]], axis=1),
      lambda h: jnp.cumsum(h, axis=1),
      lambda h: jnp.sort(h, axis=1),
      lambda h: h[:, ::-1],
      lambda h: jax.lax.while_loop(lambda h: h[0, 0] < 0, lambda h: h + 1, h),
    ):
      apply = lambda p, x, change=change: change(x @ p['a']) @ p['b']
      with self.assertRaisesRegex(errors.UserError, 'No unit'):
        align.derive(apply, params, x)

  def test_units_on_two_axes_of_a_leaf_stay(self):
    params = {
      'in': np.ones((3, 4), np.float32), 'mix': np.ones((4, 4), np.float32),
      'out': np.ones((4, 2), np.float32), 'w': np.ones((3, 5), np.float32),
      'v': np.ones((5, 4), np.float32),
    }  # fmt: skip

    def apply(p, x):
      h = x @ p['in'] + jnp.tanh(x @ p['w']) @ p['v']
      return (h + h @ p['mix']) @ p['out']

    spec = align.derive(apply, params, np.ones((2, 3), np.float32))
    self.assertEqual([g.size for g in spec.groups.values()], [5])
    self.assertIn('mix', spec.notes[0])

  def test_from_axes(self):
    _, apply, params, batch = built(BUILT[5][1])
    spec = align.from_axes(tree.specs(params))
    self.assertNotEmpty(spec.groups)
    moved = align.permute(spec, spec_lib.random_permutation(spec), params)
    align.check_function(apply, params, moved, batch, tolerance=1e-5)

  def test_bad_specifications(self):
    params = {'a': np.ones((2, 3)), 'b': np.ones((4, 1))}
    with self.assertRaises(errors.UserError) as raised:
      align.permutation_spec(
        {'a': ('P', 'P'), 'b': ('P', None), 'c': ()}, params
      )
    for part in ('two axes', '4 units here', '+ c'):
      self.assertIn(part, raised.exception.message)
    with self.assertRaisesRegex(errors.UserError, '- b'):
      align.permutation_spec({'a': (None, 'P')}, params)
    spec = align.permutation_spec({'a': (None, 'P'), 'b': (None, None)}, params)
    for index in ([0, 0, 1], [0, 1]):
      with self.assertRaisesRegex(errors.UserError, 'no permutation'):
        align.permute(spec, {'P': np.array(index)}, params)
    with self.assertRaisesRegex(errors.UserError, '- b'):
      align.match_weights(spec, params, {'a': params['a']})
    with self.assertRaisesRegex(errors.UserError, 'nothing is written'):
      align.check_function(
        lambda p, x: x @ p['a'], params, {**params, 'a': -params['a']},
        np.ones((1, 2)),
      )  # fmt: skip
    broken = {**params, 'a': np.full((2, 3), np.nan)}
    with self.assertRaisesRegex(errors.UserError, 'not finite'):
      align.match_weights(spec, params, broken)


class MatchTest(parameterized.TestCase):
  @parameterized.named_parameters(*BUILT[:2], *BUILT[3:])
  def test_planted_permutations_are_found(self, fields):
    _, apply, params, batch = built(fields)
    spec = align.derive(apply, params, batch)
    planted = align.permute(
      spec, spec_lib.random_permutation(spec, 3), shaken(params, 7, 0.003)
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
    _, apply, params, x = stacked_model()
    spec = align.derive(apply, params, x)
    planted = align.permute(spec, spec_lib.random_permutation(spec, 3), params)
    found = align.match_weights(spec, params, planted)
    back = align.permute(spec, found, planted)
    jax.tree.map(np.testing.assert_array_equal, back, params)

  def test_sharded_equals_unsharded(self):
    _, apply, params, batch = built(BUILT[0][1])
    spec = align.derive(apply, params, batch)
    other = shaken(params, 5, 1.0)
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
    _, apply, params, batch = built(BUILT[0][1])
    spec = align.derive(apply, params, batch)
    other = shaken(params, 5, 1.0)
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
    _, apply, params, batch = built(fields)
    other = built(fields, seed=1)[2]
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
    near = shaken(params, 5, 0.1)
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
    _, apply, params, batch = built(fields)
    spec = align.derive(apply, params, batch)
    sweeps = []
    align.match_weights(
      spec, params, shaken(params, 5, 1.0),
      progress=lambda sweep, gained: sweeps.append(gained),
    )  # fmt: skip
    self.assertLen(sweeps, 1)


class ActivationsTest(parameterized.TestCase):
  @parameterized.named_parameters(BUILT[1], BUILT[5])
  def test_planted_permutations_are_found(self, fields):
    module, apply, params, batch = built(fields)
    spec = align.derive(apply, params, batch)
    planted = spec_lib.random_permutation(spec, 3)
    other = align.permute(spec, planted, params)
    big = random_batch(module, rows=24, seed=4)
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
    params = shaken(module.init(jax.random.key(0), x)['params'], 0)
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
