# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax convert` keeps the configuration, in the words of the new names."""

import contextlib
import io
import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

import mergejax as mj
from mergejax import models
from mergejax.checkpoints import checkpoint
from mergejax.cli import convert
from mergejax.core import tree
from mergejax.names import t5 as t5_names
from mergejax.nn import t5


def command(*arguments):
  with contextlib.redirect_stdout(io.StringIO()) as text:
    convert.main([str(one) for one in arguments])
  return text.getvalue()


def small(**fields):
  return t5.Transformer(
    t5.T5Config(
      vocab_size=32, emb_dim=8, num_heads=2, head_dim=4, num_encoder_layers=1,
      num_decoder_layers=2, mlp_dim=16, relative_buckets=8,
      relative_max_distance=20, **fields,
    )
  )  # fmt: skip


class ConvertT5Test(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def saved(self, module):
    rng = np.random.default_rng(0)
    params = tree.unflatten(
      {
        path: rng.normal(size=spec.shape).astype(spec.dtype)
        for path, spec in models.family_of(module).specs().items()
      }
    )
    source = self.folder / 'source'
    mj.save_checkpoint(source, params, config=models.describe(module))
    return source, params

  @parameterized.parameters(
    ({'mlp_activations': ('relu',), 'logits_via_embedding': True}, 'relu'),
    ({'mlp_activations': ('gelu', 'linear')}, 'gated-gelu'),
    ({'mlp_activations': ('silu', 'linear'), 'logits_via_embedding': True},
     'gated-silu'),
  )  # fmt: skip
  def test_the_model_comes_back(self, fields, activation):
    module = small(**fields)
    source, params = self.saved(module)
    hf = self.folder / 'hf'
    command(source, hf, '--format', 'safetensors', '--names', 'hf-t5')
    config = json.loads((hf / 'config.json').read_text())
    tied = fields.get('logits_via_embedding', False)
    expected = {
      'model_type': 't5', 'vocab_size': 32, 'd_model': 8, 'num_heads': 2,
      'd_kv': 4, 'd_ff': 16, 'num_layers': 1, 'num_decoder_layers': 2,
      'feed_forward_proj': activation, 'tie_word_embeddings': tied,
      'relative_attention_num_buckets': 8,
      'relative_attention_max_distance': 20, 'is_encoder_decoder': True,
      'architectures': ['T5ForConditionalGeneration'], 'pad_token_id': 0,
      'eos_token_id': 1, 'decoder_start_token_id': 0,
    }  # fmt: skip
    self.assertEqual(config, config | expected)
    loaded, restored = mj.load_model(hf)
    self.assertEqual(loaded.config, module.config)
    jax.tree.map(np.testing.assert_array_equal, restored, dict(params))
    head = {'lm_head.weight': 'shared.weight'} if tied else {}
    self.assertEqual(checkpoint.open_checkpoint(hf).tied, head)

  def test_without_a_configuration_it_says_so(self):
    source, _ = self.saved(small())
    (source / 'config.json').unlink()
    hf = self.folder / 'hf'
    said = command(source, hf, '--format', 'safetensors', '--names', 'hf-t5')
    self.assertIn('config.json is not written', said)
    self.assertFalse((hf / 'config.json').exists())

  def test_activations_without_a_name_are_refused_before_writing(self):
    source, _ = self.saved(small(mlp_activations=('gelu', 'relu')))
    hf = self.folder / 'hf'
    with self.assertRaisesRegex(
      mj.UserError, "mlp_activations .*'gelu', 'relu'"
    ):
      command(source, hf, '--format', 'safetensors', '--names', 'hf-t5')
    self.assertFalse(hf.exists())

  def test_configurations_of_transformers_5(self):
    # It writes `tie_word_embeddings: true` for models with a head of their own.
    source, params = self.saved(small())
    hf = self.folder / 'hf'
    command(source, hf, '--format', 'safetensors', '--names', 'hf-t5')
    file = hf / 'config.json'
    config = json.loads(file.read_text())
    config |= {'tie_word_embeddings': True, 'scale_decoder_outputs': False}
    file.write_text(json.dumps(config))
    self.assertEqual(checkpoint.open_checkpoint(hf).tied, {})
    _, restored = mj.load_model(hf)
    jax.tree.map(np.testing.assert_array_equal, restored, dict(params))
    command(hf, self.folder / 'back', '--names', 't5x')
    again, restored = mj.load_model(self.folder / 'back')
    self.assertFalse(again.config.logits_via_embedding)
    jax.tree.map(np.testing.assert_array_equal, restored, dict(params))
    config['scale_decoder_outputs'] = True
    self.assertTrue(t5_names.has_tied_head(config))

  def test_layers_are_stacked_and_back(self):
    module = small()
    source, params = self.saved(module)
    files = []
    for axis, form in ((1, 'orbax'), (0, 'safetensors'), (1, 't5x')):
      there = self.folder / f'stacked_{axis}_{form}'
      command(
        source, there, '--format', form, '--scan_layers', 'true',
        '--param_scan_axis', axis,
      )  # fmt: skip
      loaded, stacked = mj.load_model(there)
      self.assertEqual(
        (loaded.config.scan_layers, loaded.config.param_scan_axis), (True, axis)
      )
      kernel = stacked['decoder']['decoder']['mlp']['wi_0']['kernel']
      self.assertEqual(kernel.shape, [(2, 8, 16), (8, 2, 16)][axis])
      axes = checkpoint.open_checkpoint(there).axes()
      names = axes['decoder/decoder/mlp/wi_0/kernel']
      self.assertEqual(names.index('layers'), axis)
      files.append(there)
    for i, there in enumerate(files):
      back = self.folder / f'back_{i}'
      command(there, back, '--scan_layers', 'false')
      again, restored = mj.load_model(back)
      self.assertEqual(again.config, module.config)
      jax.tree.map(np.testing.assert_array_equal, restored, dict(params))
      self.assertEqual(
        (back / 'config.json').read_text(), (source / 'config.json').read_text()
      )
    # Hugging Face's layers are one by one.
    hf = self.folder / 'hf'
    command(files[0], hf, '--format', 'safetensors', '--names', 'hf-t5')
    _, restored = mj.load_model(hf)
    jax.tree.map(np.testing.assert_array_equal, restored, dict(params))
    command(
      hf, self.folder / 'theirs', '--names', 't5x', '--scan_layers', 'true'
    )
    _, again = mj.load_model(self.folder / 'theirs')
    jax.tree.map(
      np.testing.assert_array_equal, again, mj.load_model(files[0])[1]
    )

  def test_mistakes_in_stacking(self):
    source, params = self.saved(small())
    out = self.folder / 'out'
    with self.assertRaisesRegex(mj.UserError, 'add --scan_layers true'):
      command(source, out, '--param_scan_axis', '0')
    (source / 'config.json').unlink()
    with self.assertRaisesRegex(mj.UserError, 'needs a config.json'):
      command(source, out, '--scan_layers', 'true')
    pictures = models.build({'model_type': 'mlp', 'hidden': (4,)})
    mj.save_checkpoint(
      self.folder / 'mlp', {'w': np.ones(2)}, config=models.describe(pictures)
    )
    with self.assertRaisesRegex(mj.UserError, 'mlp models do not stack'):
      command(self.folder / 'mlp', out, '--scan_layers', 'true')
    self.assertFalse(out.exists())

  def test_what_is_not_copied_is_told(self):
    state = {'params': {'w': np.ones(2)}, 'opt_state': {'mu': np.ones(2)}}
    mj.save_checkpoint(self.folder / 'run', state)
    said = command(self.folder / 'run', self.folder / 'x.npz')
    self.assertIn('x.npz: 1 arrays\nnot copied: opt_state', said)
    source, _ = self.saved(small())
    said = command(source, self.folder / 'y.safetensors')
    self.assertIn('config.json is not written', said)


if __name__ == '__main__':
  absltest.main()
