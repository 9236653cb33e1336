# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Codes and scales are told from weights, shown, and never merged."""

import contextlib
import io
import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import ml_dtypes
import numpy as np

import mergejax as mj
from mergejax.checkpoints import quantised
from mergejax.checkpoints import safetensors
from mergejax.cli import inspect
from mergejax.core import tree as tree_lib

F8 = ml_dtypes.float8_e4m3fn
P = 'model.layers.0.mlp.up_proj.'
Q = 'model.layers.0.mlp.experts.gate_up_proj'


def zeros(dtype, *shape):
  return np.zeros(shape, dtype)


# Arrays as they lie in published checkpoints: (scheme, configuration's name).
STORED = {
  'nf4': ('bitsandbytes', {
    P + 'weight': zeros(np.uint8, 32, 1),
    P + 'weight.absmax': zeros(np.float32, 1),
    P + 'weight.quant_map': zeros(np.float32, 16),
    P + 'weight.quant_state.bitsandbytes__nf4': zeros(np.uint8, 20),
  }),
  'int8': ('bitsandbytes', {
    P + 'weight': zeros(np.int8, 4, 4), P + 'SCB': zeros(np.float32, 4),
    P + 'weight_format': zeros(np.uint8),
  }),
  'gptq': ('gptq', {
    P + 'qweight': zeros(np.int32, 2, 8), P + 'qzeros': zeros(np.int32, 1, 1),
    P + 'scales': zeros(np.float16, 1, 8), P + 'g_idx': zeros(np.int32, 16),
  }),
  'awq': ('awq', {
    P + 'qweight': zeros(np.int32, 8, 1), P + 'qzeros': zeros(np.int32, 1, 1),
    P + 'scales': zeros(np.float16, 1, 8),
  }),
  'hqq': ('hqq', {
    P + 'W_q': zeros(np.uint8, 8, 4), P + 'scale': zeros(np.float16, 1, 8),
    P + 'zero': zeros(np.float16, 1, 8),
  }),
  'mxfp4': ('mxfp4', {
    Q + '_blocks': zeros(np.uint8, 2, 4, 1, 16),
    Q + '_scales': zeros(np.uint8, 2, 4, 1),
    Q + '_bias': zeros(ml_dtypes.bfloat16, 2, 4),
  }),
  'fp8_blocks': ('fp8', {
    P + 'weight': zeros(F8, 8, 8), P + 'weight_scale_inv': zeros(np.float32, 1, 1),
  }),
  'fp8_tensor': ('fp8', {
    P + 'weight': zeros(F8, 8, 8), P + 'weight_scale': zeros(np.float32),
    P + 'input_scale': zeros(np.float32),
  }),
  'fp8_scale_weight': ('fp8', {
    P + 'weight': zeros(F8, 8, 8), P + 'scale_weight': zeros(np.float32),
  }),
  'fp8_fused_experts': ('fp8', {
    Q: zeros(F8, 2, 8, 8), Q + '_scale': zeros(np.float32, 2, 1, 8),
  }),
  'power_of_two_scales': ('mx', {
    P + 'weight': zeros(F8, 8, 32),
    P + 'scale': np.ones((8, 1), ml_dtypes.float8_e8m0fnu),
  }),
  'w4a16': ('compressed-tensors', {
    P + 'weight_packed': zeros(np.int32, 8, 1),
    P + 'weight_scale': zeros(np.float16, 8, 1),
    P + 'weight_shape': zeros(np.int64, 2),
  }),
  'w8a8': ('packed', {
    P + 'weight': zeros(np.int8, 8, 8), P + 'weight_scale': zeros(np.float32, 8, 1),
  }),
  'integers_alone': ('packed', {'wi/kernel': zeros(np.int32, 8, 1)}),
  'aqlm': ('aqlm', {
    P + 'codes': zeros(np.int16, 8, 1, 1), P + 'scales': zeros(np.float16, 8, 1),
    P + 'codebooks': zeros(np.float16, 1, 256, 1, 8),
  }),
  'flax': ('qwix', {
    'mlp/wi/kernel/array/qvalue': zeros(np.int8, 4, 4),
    'mlp/wi/kernel/array/scale': zeros(np.float32, 1, 4),
  }),
}  # fmt: skip


def config(method):
  return {'quantization_config': {'quant_method': method}}


def printed(arguments):
  with contextlib.redirect_stdout(io.StringIO()) as text:
    inspect.main(arguments)
  return text.getvalue()


class QuantisedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def model(self, name, leaves, settings=None):
    mj.save_checkpoint(
      self.folder / name, leaves, 'safetensors', config=settings
    )
    return str(self.folder / name)

  @parameterized.parameters(*STORED)
  def test_stored_schemes_are_told_by_their_arrays(self, name):
    expected, leaves = STORED[name]
    specs = tree_lib.specs(leaves)
    self.assertEqual(quantised.scheme(specs), expected)
    self.assertEqual(quantised.scheme(specs, config('mine')), 'mine')

  @parameterized.parameters(
    # Buffers of vision models, scales of norms, weights of packages.
    ({'a.position_ids': zeros(np.int64, 1, 9), 'logit_scale': zeros('f4')},),
    ({'attn.relative_position_index': zeros(np.int64, 9, 9),
      'attn.logit_scale': zeros(np.float32, 2, 1, 1)},),
    ({'bn.num_batches_tracked': zeros(np.int64), 'bn.weight': zeros('f4', 3)},),
    ({'norm/scale': zeros('f4', 3), 'count': zeros(np.uint32)},),
    ({'lin.weight': zeros('f4', 3, 3), 'lin.weight_scale': zeros('f4', 3)},),
    ({'attn.W_q': zeros('f4', 3, 3), 'attn.scales': zeros('f4', 3)},),
    # Of every width.
    ({'a.weight': zeros('f8', 3, 3), 'a/scale': zeros('f8', 3)},),
    ({'a.weight': zeros('f2', 3, 3), 'a/kernel': zeros('bfloat16', 3)},),
    # Weights that were only cast to 8 bits are weights.
    ({'a.weight': zeros(F8, 3, 3), 'logit_scale': zeros('f4')},),
    ({'n/scale': zeros(F8, 3), 'n/bias': zeros(F8, 3)},),
  )  # fmt: skip
  def test_plain_weights_pass(self, leaves):
    self.assertIsNone(quantised.scheme(tree_lib.specs(leaves)))

  def test_the_configuration_matters_where_arrays_are_packed(self):
    plain = tree_lib.specs({'a.weight': zeros('f4', 3, 3)})
    unknown = tree_lib.specs({'a.blob': zeros(np.int16, 3, 3)})
    cast = tree_lib.specs({'a.weight': zeros(F8, 3, 3)})
    nested = {'text_config': config('new')}
    # A model that was dequantised and kept its configuration.
    self.assertIsNone(quantised.scheme(plain, config('fp8')))
    self.assertEqual(quantised.scheme(unknown, nested), 'new')
    self.assertIsNone(quantised.scheme(unknown))
    self.assertEqual(quantised.scheme(cast, config('fp8')), 'fp8')

  def test_a_merge_is_refused_and_told_how_to_go_on(self):
    names = [
      self.model(name, STORED['nf4'][1], config('bitsandbytes'))
      for name in ('a', 'b')
    ]
    recipe = {
      'merge_method': 'linear',
      'models': [{'model': name} for name in names],
    }
    for ask in (
      lambda: mj.plan(recipe),
      lambda: mj.merge(names, 'linear'),
      lambda: mj.merge([mj.open_checkpoint(n) for n in names], 'linear'),
    ):
      with self.assertRaises(mj.UserError) as caught:
        ask()
      self.assertIn('a is quantised (bitsandbytes)', str(caught.exception))
      self.assertIn(
        f'from_pretrained({names[0]!r}).dequantize().save_pretrained(NEW)',
        str(caught.exception),
      )
    loaded = [mj.open_checkpoint(name).read() for name in names]
    with self.assertRaisesRegex(mj.UserError, 'codes and scales'):
      mj.merge(loaded, 'linear')
    with self.assertRaisesRegex(mj.UserError, 'codes and scales'):
      mj.load_model(names[0])

  def test_an_adapter_on_a_quantised_model_is_refused(self):
    base = self.model('base', STORED['gptq'][1], config('gptq'))
    adapter = self.folder / 'adapter'
    adapter.mkdir()
    (adapter / 'adapter_config.json').write_text('{"peft_type": "LORA"}')
    safetensors.write(
      adapter / 'adapter_model.safetensors', {'w': np.zeros(2, np.float32)}
    )
    models = [{'model': f'{base}+{adapter}'}]
    with self.assertRaisesRegex(mj.UserError, r'base is quantised \(gptq\)'):
      mj.plan({'merge_method': 'linear', 'models': models})
    with self.assertRaisesRegex(mj.UserError, r'base is quantised \(gptq\)'):
      mj.plan({
        'merge_method': 'task_arithmetic', 'base_model': base,
        'models': [{'model': str(adapter)}],
      })  # fmt: skip

  def test_gguf_is_told_by_its_name(self):
    file = self.folder / 'x' / 'model-q4.gguf'
    file.parent.mkdir()
    file.write_bytes(b'GGUF')
    for path in (file, file.parent):
      with self.assertRaisesRegex(mj.UserError, 'GGUF, .* gguf_file='):
        mj.open_checkpoint(path)

  def test_it_can_be_looked_at(self):
    path = self.model('a', STORED['fp8_blocks'][1], config('fp8'))
    self.assertIn('quantised (fp8)', printed([path]))
    self.assertEqual(json.loads(printed([path, '--json']))['quantised'], 'fp8')

  def test_float8_without_scales_is_merged_as_weights(self):
    paths = [
      self.model(name, {'w.weight': np.array([[v, 2.0]], F8)})
      for name, v in (('a', 1.0), ('b', 3.0))
    ]
    merged = mj.merge(paths, 'linear')['w.weight']
    np.testing.assert_array_equal(np.asarray(merged, np.float32), [[2.0, 2.0]])
    self.assertEqual(merged.dtype, F8)


if __name__ == '__main__':
  absltest.main()
