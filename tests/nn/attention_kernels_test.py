# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Kernels of attention compute what the definition does, bias gradient too."""

import dataclasses
import functools
import importlib.util
import unittest
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn_lib
from jax.experimental.pallas import tpu as pallas_tpu
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax import partition
from mergejax.core import errors
from mergejax.core import tree
from mergejax.nn import attention_kernels
from mergejax.nn import t5
from mergejax.pods import chips
from mergejax.pods import operations

CONFIG = t5.T5Config(
  vocab_size=32, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=24,
  num_encoder_layers=1, num_decoder_layers=1,
)  # fmt: skip


def batch(rows=4, length=12, targets=6):
  """Rows with padding, two examples packed in each."""
  rng = np.random.default_rng(0)
  inputs = rng.integers(2, 32, (rows, length)).astype(np.int32)
  answers = rng.integers(2, 32, (rows, targets)).astype(np.int32)
  inputs[1, 9:], answers[1, 4:] = 0, 0
  segments = lambda x, cut: np.where(
    x == 0, 0, 1 + (np.arange(x.shape[1]) >= cut)
  ).astype(np.int32)
  return {
    'encoder_input_tokens': inputs,
    'encoder_segment_ids': segments(inputs, 5),
    'decoder_input_tokens': np.pad(answers, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': answers,
    'decoder_segment_ids': segments(answers, 3),
  }


def family_with(kernel, **sizes):
  config = dataclasses.replace(CONFIG, attention_kernel=kernel, **sizes)
  return models.family_of(t5.Transformer(config))


def loss(family, params, data):
  """Of positions that count, as in training; those of padding are arbitrary."""
  logits = family.logits(params, data)
  log_p = jax.nn.log_softmax(logits)
  targets = data['decoder_target_tokens']
  told = jnp.take_along_axis(log_p, targets[..., None], axis=2)[..., 0]
  return -jnp.sum(jnp.where(targets > 0, told, 0.0))


@functools.cache
def reference():
  """`(parameters, loss, gradients)` by the definition."""
  family = family_with('reference')
  params = family.init(jax.random.key(0))
  grad = jax.value_and_grad(functools.partial(loss, family))
  return params, *jax.jit(grad)(params, batch())


class KernelsTest(parameterized.TestCase):
  def assert_same(self, kernel, found):
    params, wanted, wanted_grads = reference()
    value, grads = found
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    wanted_grads = tree.flatten(wanted_grads)
    self.assertEqual(
      tree.flatten(grads).keys(), tree.flatten(params).keys(), kernel
    )
    for path, grad in tree.flatten(grads).items():
      np.testing.assert_allclose(
        grad, wanted_grads[path], rtol=2e-5, atol=2e-5, err_msg=path
      )
    tables = [path for path in wanted_grads if 'rel_embedding' in path]
    self.assertLen(tables, 2)
    for path in tables:  # the gradient of the bias is there at all
      self.assertGreater(np.abs(wanted_grads[path]).max(), 1e-3)

  def test_xla(self):
    grad = jax.value_and_grad(functools.partial(loss, family_with('xla')))
    self.assert_same('xla', jax.jit(grad)(reference()[0], batch()))

  def test_flash_as_a_tpu_would(self):
    family = family_with('flash')
    grad = jax.value_and_grad(functools.partial(loss, family))
    with mock.patch.object(jax, 'default_backend', lambda: 'tpu'):
      with pallas_tpu.force_tpu_interpret_mode():
        self.assert_same('flash', jax.jit(grad)(reference()[0], batch()))

  def test_a_query_that_sees_nothing(self):
    """Attends to all there are alike, not to what fills up the block."""
    rng = np.random.default_rng(1)
    query, key, value = (
      rng.normal(size=(1, 3, 2, 8)).astype(np.float32) for _ in range(3)
    )
    bias = np.zeros((1, 1, 3, 3), np.float32)
    bias[:, :, 1] = attention_kernels.MASKED
    with mock.patch.object(jax, 'default_backend', lambda: 'tpu'):
      with pallas_tpu.force_tpu_interpret_mode():
        found = attention_kernels.attend('flash', query, key, value, bias)
    np.testing.assert_allclose(found[:, 1], value.mean(axis=1), rtol=1e-5)

  def test_its_products_are_counted(self):
    query, key = (jax.ShapeDtypeStruct((3, n, 4, 64), 'bfloat16') for n in (256, 384))  # fmt: skip
    bias = jax.ShapeDtypeStruct((3, 4, 256, 384), 'float32')
    counted = []
    with mock.patch.object(jax, 'default_backend', lambda: 'tpu'):
      for name in ('xla', 'flash'):
        attend = functools.partial(attention_kernels.attend, name)
        counted.append(operations.products(attend, query, key, key, bias))
    self.assertEqual(counted, [4 * 3 * 4 * 64 * 256 * 384] * 2)

  def test_decoding_is_as_ever(self):
    params = reference()[0]
    data = {'encoder_input_tokens': batch()['encoder_input_tokens']}
    token = jnp.zeros(4, jnp.int32)
    logits = []
    for kernel in ('reference', 'xla'):
      family = family_with(kernel)

      def step(params, data, family=family):
        cache = family.init_cache(params, data, 4)
        return family.decode_step(params, cache, token)[0]

      logits.append(jax.jit(step)(params, data))
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5, atol=1e-5)

  def test_weights_do_not_know_of_it(self):
    self.assertEqual(
      models.describe(family_with('xla')),
      models.describe(family_with('reference')),
    )

  def test_refused_by_name(self):
    params, data = reference()[0], batch()
    with self.assertRaisesRegex(errors.ConfigError, "Did you mean 'flash'"):
      family_with('flahs')
    for kernel, kind in (('flash', 'TPU'), ('cudnn', 'GPU')):
      with self.assertRaisesRegex(
        errors.ConfigError, f"'{kernel}' is a kernel of {kind}s, .* for cpu"
      ):
        jax.eval_shape(family_with(kernel).logits, params, data)
    family = family_with('xla', dropout_rate=0.1)
    # In evaluation nothing is dropped.
    jax.eval_shape(family.logits, params, data)
    with self.assertRaisesRegex(errors.ConfigError, "'xla' does not drop"):
      call = functools.partial(family.call, train=True)
      jax.eval_shape(
        lambda key: call(family.variables(params), data, rngs={'dropout': key}),
        jax.random.key(0),
      )
    with mock.patch.object(jax, 'default_backend', lambda: 'gpu'):
      with self.assertRaisesRegex(errors.ConfigError, "'cudnn' does not take"):
        jax.eval_shape(family_with('cudnn').logits, params, data)
    with mock.patch.object(jax, 'default_backend', lambda: 'tpu'):
      x = jnp.ones((1, 2, 1, 192))
      with self.assertRaisesRegex(errors.ConfigError, 'heads of 192'):
        attention_kernels.attend('flash', x, x, x, None)

  def test_cudnn_is_called_and_gives_the_gradient_of_the_bias(self):
    family = family_with('cudnn', dtype='bfloat16')
    grad = jax.jit(jax.grad(functools.partial(loss, family)))
    with (
      mock.patch.object(jax, 'default_backend', lambda: 'gpu'),
      mock.patch.object(cudnn_lib, 'check_cudnn_version', lambda: 91100),
    ):
      traced = grad.trace(reference()[0], batch())
      text = traced.lower(lowering_platforms=('cuda',)).as_text()
    self.assertEqual(text.count('__cudnn$fmhaScaleBiasSoftmax"'), 0)
    for name in ('Softmax', 'SoftmaxBackward'):
      self.assertIn(f'__cudnn$fmhaScaleBias{name}', text)

  @unittest.skipIf(
    importlib.util.find_spec('libtpu') is None, 'libtpu is not installed'
  )
  @parameterized.parameters(((1, 1),), ((8, 2),))
  def test_the_tpu_compiler_takes_the_flash_kernel(self, sizes):
    devices = chips.devices('v5e:4x4')[: sizes[0] * sizes[1]]
    mesh = partition.make_mesh(data=sizes[0], model=sizes[1], devices=devices)
    family = family_with('flash', dtype='bfloat16', head_dim=64)
    rules = partition.standard()
    axes = {path: spec.axes for path, spec in family.specs().items()}
    shapes = jax.eval_shape(lambda: family.init(jax.random.key(0)))
    layout = partition.shardings(mesh, shapes, axes, rules)
    given = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, layout,
    )  # fmt: skip
    data = {
      name: jax.ShapeDtypeStruct(
        x.shape, x.dtype,
        sharding=partition.sharding(mesh, ('batch', None), x.shape),
      )
      for name, x in batch(rows=8).items()
    }  # fmt: skip
    with partition.rules_of(mesh, rules):
      grad = jax.jit(jax.grad(functools.partial(loss, family)))
      text = grad.lower(given, data).compile().as_text()
    # Three attentions, each forward, and backward for keys and for queries.
    calls = [
      line.split(' = ')[0]
      for line in text.splitlines()
      if 'custom_call_target="tpu_custom_call"' in line
    ]
    self.assertLen(calls, 9)
    self.assertLen([name for name in calls if 'bwd_dq' in name], 3)
    self.assertNotIn('all-gather', text)  # each device has its own part


if __name__ == '__main__':
  absltest.main()
