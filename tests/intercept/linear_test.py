# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What linear maps are given, against patches and slices taken by hand."""

import itertools

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import jax
import numpy as np
import small_batches

from mergejax import statistics
from mergejax.core import errors
from mergejax.intercept import capture


def collect(module, params, x, **options):
  batch = {'x': x, 'weights': np.ones(len(x), np.float32)}
  return statistics.collect(
    statistics.gram(apply=small_batches.sown, **options),
    module,
    params,
    [batch],
  )


def patches(x, window, pads, *, mode='constant', stride=1, dilation=1):
  """`[batch, places, in]`: slices of padded `x [batch, *places, channels]`."""
  x = np.pad(np.float64(x), [(0, 0), *pads, (0, 0)], mode=mode)
  reach = [(size - 1) * dilation + 1 for size in window]
  starts = [range(0, n - r + 1, stride) for n, r in zip(x.shape[1:-1], reach)]
  rows = []
  for start in itertools.product(*starts):
    cut = [slice(s, s + r, dilation) for s, r in zip(start, reach)]
    rows.append(x[(slice(None), *cut)].reshape(len(x), -1))
  return np.stack(rows, axis=1)


CONVOLUTIONS = (
  ('number', (3, 3), dict(padding=1), [(1, 1)] * 2, {}),
  ('numbers', (3, 2), dict(padding=(2, 0)), [(2, 2), (0, 0)], {}),
  ('list', (3, 2), dict(padding=[1, (0, 2)]), [(1, 1), (0, 2)], {}),
  ('pairs', (2, 3), dict(padding=((0, 1), (2, 1))), [(0, 1), (2, 1)], {}),
  ('same', (3, 3), dict(padding='SAME', strides=2), [(0, 1), (1, 1)],
   dict(stride=2)),
  ('valid', (2, 2), dict(padding='VALID', kernel_dilation=2), [(0, 0)] * 2,
   dict(dilation=2)),
  ('circular', (2, 3), dict(padding='CIRCULAR'), [(0, 1), (1, 1)],
   dict(mode='wrap')),
  ('circular_dilated', (3, 2), dict(padding='CIRCULAR', kernel_dilation=2),
   [(2, 2), (1, 1)], dict(mode='wrap', dilation=2)),
  ('reflect', (3, 3), dict(padding='REFLECT', strides=(2, 2)), [(1, 1)] * 2,
   dict(mode='reflect', stride=2)),
  ('causal', (3,), dict(padding='CAUSAL', kernel_dilation=2), [(4, 0)],
   dict(dilation=2)),
  ('one', (4,), dict(padding=2, strides=3), [(2, 2)], dict(stride=3)),
  ('three', (2, 1, 3), dict(padding=(0, 0, 1)), [(0, 0), (0, 0), (1, 1)], {}),
)  # fmt: skip


class ConvolutionTest(parameterized.TestCase):
  @parameterized.named_parameters(*CONVOLUTIONS)
  def test_patches(self, window, options, pads, by):
    module = nn.Conv(4, window, use_bias=False, **options)
    shape = (2, *(6, 7, 4)[: len(window)], 3)
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    params = {'kernel': rng.normal(size=(*window, 3, 4)).astype(np.float32)}
    expected = patches(x, window, pads, **by)
    kernel = np.float64(params['kernel']).reshape(-1, 4)
    answer = np.asarray(module.apply({'params': params}, x))
    np.testing.assert_allclose(
      (expected @ kernel).reshape(answer.shape), answer, atol=1e-5
    )
    found = capture.inputs_of(
      module, params, {'x': x}, lambda path, inputs: inputs,
      wanted=lambda path: True, apply=small_batches.sown,
    )['kernel']  # fmt: skip
    self.assertEqual(found.shape[:-1], answer.shape[:-1])
    np.testing.assert_allclose(
      found.reshape(expected.shape), expected, atol=1e-6
    )

  def test_several_batch_axes_and_a_call_by_name(self):
    class Named(nn.Module):
      @nn.compact
      def __call__(self, x):
        return nn.Dense(2, name='dense')(
          inputs=nn.Conv(4, (3,), padding='CIRCULAR', name='conv')(inputs=x)
        )

    x = np.random.default_rng(0).normal(size=(2, 3, 5, 2)).astype(np.float32)
    module = Named()
    params = module.init(jax.random.key(0), x)['params']
    found = collect(module, params, x, conv=True)
    rows = patches(
      x.reshape(6, 5, 2), (3,), [(1, 1)], mode='wrap'
    )  # each of the first two axes is a batch
    np.testing.assert_allclose(
      found['conv/kernel']['gram'],
      small_batches.gram_of(rows),
      rtol=1e-5,
      atol=1e-6,
    )
    self.assertEqual(found['conv/kernel']['count'], 30)
    conv = params['conv']
    hidden = rows @ np.float64(conv['kernel']).reshape(-1, 4) + np.float64(
      conv['bias']
    )
    np.testing.assert_allclose(
      found['dense/kernel']['gram'],
      small_batches.gram_of(hidden),
      rtol=1e-5,
      atol=1e-6,
    )

  @parameterized.parameters(
    dict(feature_group_count=2), dict(mask=np.ones((3, 4, 4), np.float32))
  )
  def test_what_has_no_single_input_is_refused(self, **options):
    class Net(nn.Module):
      @nn.compact
      def __call__(self, x):
        return nn.Dense(2, name='out')(
          nn.Conv(4, (3,), name='odd', **options)(x)
        )

    x = np.ones((2, 5, 4), np.float32)
    params = Net().init(jax.random.key(0), x)['params']
    with self.assertRaisesRegex(errors.UserError, 'odd is a .*exclude'):
      collect(Net(), params, x, conv=True)
    self.assertEqual(
      list(collect(Net(), params, x, conv=True, exclude=['odd/.*'])),
      ['out/kernel'],
    )
    # Not asked for, it does no harm.
    self.assertEqual(list(collect(Net(), params, x)), ['out/kernel'])


class Deep(nn.Module):
  """Scanned attention and convolutions of every kind."""

  @nn.compact
  def __call__(self, x):
    class Layer(nn.Module):
      @nn.compact
      def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2, name='attention')(x)
        return x + nn.Conv(4, (3,), name='conv')(x), None

    x, _ = nn.scan(
      Layer, variable_axes={'params': 0, 'intermediates': 0},
      split_rngs={'params': True}, length=3,
    )(name='layers')(x, None)  # fmt: skip
    x = nn.Conv(4, (3,), name='line')(x)
    x = nn.ConvTranspose(4, (2,), name='transpose')(x)
    x = nn.Conv(4, (1, 1), name='plane')(x[..., None, :])
    return nn.DenseGeneral(2, axis=(-1, -2), name='out')(x)


class LayoutTest(parameterized.TestCase):
  def test_scanned_attention_is_no_convolution(self):
    module = Deep()
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    params = jax.jit(module.init)(jax.random.key(0), x)['params']
    found = collect(module, params, x)
    names = ('query', 'key', 'value', 'out')
    self.assertCountEqual(
      found,
      [*(f'layers/attention/{name}/kernel' for name in names), 'out/kernel'],
    )
    layers, carry = params['layers'], x
    for i in range(3):
      layer = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
      np.testing.assert_allclose(
        found['layers/attention/key/kernel']['gram'][i],
        small_batches.gram_of(carry),
        rtol=1e-4, atol=1e-5,
      )  # fmt: skip
      attention = nn.MultiHeadDotProductAttention(2)
      carry = carry + attention.apply({'params': layer['attention']}, carry)
      carry = carry + nn.Conv(4, (3,)).apply({'params': layer['conv']}, carry)
    self.assertEqual(
      found['layers/attention/out/kernel']['gram'].shape, (3, 4, 4)
    )
    with self.assertRaisesRegex(errors.UserError, r'exclude=.*transpose'):
      collect(module, params, x, conv=True)

  def test_axes_lie_as_flax_sorts_them(self):
    module = nn.DenseGeneral(5, axis=(-1, 1), use_bias=False)
    x = np.random.default_rng(0).normal(size=(3, 2, 4, 6)).astype(np.float32)
    params = module.init(jax.random.key(0), x)['params']
    rows = np.moveaxis(x, 2, 1).reshape(3, 4, 12)
    np.testing.assert_allclose(
      rows @ np.asarray(params['kernel']).reshape(12, 5),
      module.apply({'params': params}, x), atol=1e-5,
    )  # fmt: skip
    np.testing.assert_allclose(
      collect(module, params, x)['kernel']['gram'], small_batches.gram_of(rows),
      rtol=1e-5, atol=1e-6,
    )  # fmt: skip

  def test_a_map_for_each_place_is_refused(self):
    module = nn.DenseGeneral(5, axis=-1, batch_dims=(0,))
    x = np.ones((3, 2, 4), np.float32)
    params = module.init(jax.random.key(0), x)['params']
    with self.assertRaisesRegex(errors.UserError, 'batch_dims'):
      collect(module, params, x)


class AdviceTest(absltest.TestCase):
  """What a message says to do helps."""

  def test_rewritten_kernels(self):
    class Net(nn.Module):
      @nn.compact
      def __call__(self, x):
        x = nn.WeightNorm(nn.Dense(3, name='inner'))(x)
        return nn.Dense(2, name='out')(x)

    x = np.ones((2, 4), np.float32)
    params = Net().init(jax.random.key(0), x)['params']
    with self.assertRaises(errors.UserError) as raised:
      collect(Net(), params, x)
    self.assertIn('nn.WeightNorm computes', raised.exception.message)
    self.assertIn("exclude=['inner/kernel']", raised.exception.message)
    self.assertNotIn('nn.scan', raised.exception.message)
    found = collect(Net(), params, x, exclude=['inner/kernel'])
    self.assertEqual(list(found), ['out/kernel'])

  def test_layers_of_other_kinds(self):
    class Mine(nn.Module):
      @nn.compact
      def __call__(self, x):
        return x @ self.param('kernel', nn.initializers.ones, (4, 2))

    x = np.ones((2, 4), np.float32)
    params = Mine().init(jax.random.key(0), x)['params']
    with self.assertRaisesRegex(errors.UserError, 'kernels={MyLayer: describe'):
      collect(Mine(), params, x)
    describe = lambda module, method, arguments: [('kernel', arguments[0])]
    found = collect(Mine(), params, x, kernels={Mine: describe})
    np.testing.assert_allclose(found['kernel']['gram'], np.ones((4, 4)))


if __name__ == '__main__':
  absltest.main()
