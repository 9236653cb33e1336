# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Groups that are derived permute units, and keep the function."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import small_networks
import tiers

from mergejax import align
from mergejax.align import spec as spec_lib
from mergejax.core import errors
from mergejax.core import tree


@tiers.slow('test_random_.*_resnet50')
class DeriveTest(parameterized.TestCase):
  @parameterized.named_parameters(*small_networks.BUILT)
  def test_random_permutations_keep_the_function(self, fields):
    _, apply, params, batch = small_networks.built(fields)
    spec = align.derive(apply, params, batch)
    permutation = spec_lib.random_permutation(spec, 1)
    moved = align.permute(spec, permutation, params)
    worst = align.check_function(apply, params, moved, batch, tolerance=1e-5)
    self.assertLess(worst, 1e-5)
    changed = jax.tree.map(lambda x, y: not np.array_equal(x, y), params, moved)
    self.assertTrue(any(jax.tree.leaves(changed)))

  @parameterized.named_parameters(
    ('mlp', small_networks.BUILT[0][1], [8, 6]),
    ('vgg', small_networks.BUILT[1][1], [6, 8, 7]),
    # a stage's stream, and the middle of each block
    ('resnet', small_networks.BUILT[2][1], [4, 4, 6, 6]),
    # residual stream; per stack: heads, with dimensions of q, k and of v, out
    # per layer; cross-attention heads per layer; MLPs
    ('t5', small_networks.BUILT[5][1], [10, 3, 3, 3] + [4] * 8 + [9] * 3),
    ('lm', small_networks.BUILT[6][1], [10, 3] + [4] * 4 + [9] * 2),
  )
  def test_the_groups_are_those_of_the_architecture(self, fields, sizes):
    _, apply, params, batch = small_networks.built(fields)
    spec = align.derive(apply, params, batch)
    found = sorted(group.size for group in spec.groups.values())
    expected = [4, 4, 6, 6] if fields['model_type'] == 'resnet' else sizes
    self.assertEqual(found, sorted(expected))

  def test_heads_of_a_stack_move_as_one(self):
    _, apply, params, batch = small_networks.built(small_networks.BUILT[6][1])
    spec = align.derive(apply, params, batch)
    (heads,) = [
      name for name in spec.groups
      if 'decoder/relpos_bias/rel_embedding' in spec.leaves_with(name)
    ]  # fmt: skip
    self.assertLen(spec.leaves_with(heads), 1 + 2 * 4)
    inside = [n for n, g in spec.groups.items() if g.parents == (heads,)]
    self.assertLen(inside, 4)

  def test_scanned_layers_have_their_own(self):
    _, apply, params, x = small_networks.stacked_model()
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
    _, apply, params, batch = small_networks.built(small_networks.BUILT[5][1])
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


if __name__ == '__main__':
  absltest.main()
