# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for a module: other forms, other padding, in part."""

import dataclasses
import pathlib

from absl.testing import absltest
import goldens
import jax
import numpy as np

import mergejax as mj
from mergejax import models
from mergejax.core import errors
from mergejax.core import tree
from mergejax.nn import t5

FOLDER = goldens.FOLDER / 't5x_tiny_complete'
SIZES = dict(
  vocab_size=64, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16,
  num_encoder_layers=2, num_decoder_layers=2,
)  # fmt: skip
SCANNED = dict(scan_layers=True, param_scan_axis=0)


def module(**changes):
  return t5.Transformer(t5.T5Config(**SIZES | changes))


def same_bits(a, b):
  jax.tree.map(np.testing.assert_array_equal, dict(a), dict(b))


class LoadingTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def test_a_t5x_checkpoint_for_a_scanned_module(self):
    # T5X's own numbers, through stacked layers.
    with np.load(FOLDER / 'expected.npz') as golden:
      batch = [golden[f'batch/{name}'] for name in (
        'encoder_input_tokens', 'decoder_input_tokens', 'decoder_target_tokens'
      )]  # fmt: skip
      logits = golden['logits']
    apart = models.load_params(FOLDER / 't5x_legacy', module())
    scanned = module(**SCANNED)
    stacked = models.load_params(FOLDER / 't5x_legacy', scanned)
    self.assertIn('encoder', stacked['encoder'])
    found = jax.jit(scanned.apply)({'params': stacked}, *batch)
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)
    # Both ways from the disk.
    for name, model, params in (
      ('stacked', scanned, stacked), ('apart', module(), apart)
    ):  # fmt: skip
      mj.save_checkpoint(
        self.folder / name, params, config=models.describe(model)
      )
    same_bits(models.load_params(self.folder / 'stacked', module()), apart)
    same_bits(models.load_params(self.folder / 'apart', scanned), stacked)
    # A configuration that says another form than the weights have.
    config = models.describe(scanned)
    mj.save_checkpoint(self.folder / 'mixed', apart, config=config)
    loaded, params = mj.load_model(self.folder / 'mixed')
    self.assertTrue(loaded.config.scan_layers)
    same_bits(params, stacked)
    models.check_not_converted(self.folder / 'stacked')
    with self.assertRaisesRegex(errors.CheckpointError, '--scan_layers true'):
      models.check_not_converted(self.folder / 'mixed')
    self.assertEqual(
      models.axes(self.folder / 'mixed'), models.axes(self.folder / 'stacked')
    )

  def test_layers_on_another_axis(self):
    first = models.load_params(FOLDER / 't5x_legacy', module(**SCANNED))
    second = module(scan_layers=True)  # T5X's axis 1
    specs = models.family_of(module(**SCANNED)).specs()
    mj.save_checkpoint(
      self.folder / 'first', first, axes={p: s.axes for p, s in specs.items()}
    )
    found = models.load_params(self.folder / 'first', second)
    there = found['encoder']['encoder']['mlp']['wo']['kernel']
    here = first['encoder']['encoder']['mlp']['wo']['kernel']
    np.testing.assert_array_equal(np.moveaxis(here, 0, 1), there)

  def test_parameters_have_the_module_s_dtype(self):
    params = models.load_params(FOLDER / 't5x_legacy_bf16', module())
    exact = models.load_params(FOLDER / 't5x_legacy', module())
    for path, leaf in tree.flatten(params).items():
      self.assertEqual(leaf.dtype, np.float32)
      rounded = tree.flatten(exact)[path].astype(jax.numpy.bfloat16)
      np.testing.assert_array_equal(leaf, rounded.astype(np.float32))

  def test_versions_are_told_apart(self):
    old = module(mlp_activations=('relu',))
    with self.assertRaisesRegex(
      errors.UserError, r'(?s)T5 1\.0.*T5 1\.1.*relu'
    ):
      models.load_params(FOLDER / 't5x_legacy', old)

  def test_padding_of_the_vocabulary(self):
    larger = module(vocab_size=100)
    with self.assertRaisesRegex(
      errors.UserError,
      r'(?s)embedding \[100, 8\] exp.*\[64, 8\] given.*pad_vocabulary',
    ):
      models.load_params(FOLDER / 't5x_legacy', larger)
    padded = models.load_params(
      FOLDER / 't5x_legacy', larger, pad_vocabulary=True
    )
    exact = models.load_params(FOLDER / 't5x_legacy', module())
    table = padded['token_embedder']['embedding']
    self.assertEqual(table.shape, (100, 8))
    given = exact['token_embedder']['embedding']
    np.testing.assert_array_equal(table[:64], given)
    np.testing.assert_allclose(
      table[64:], np.tile(given.mean(0), (36, 1)), rtol=1e-5, atol=1e-6
    )
    self.assertEqual(
      padded['decoder']['logits_dense']['kernel'].shape, (8, 100)
    )
    # And back: what was added is cut.
    mj.save_checkpoint(self.folder / 'padded', padded)
    cut = models.load_params(
      self.folder / 'padded', module(), pad_vocabulary=True
    )
    same_bits(cut, exact)
    # Another multiple of 128 is another vocabulary.
    with self.assertRaisesRegex(errors.UserError, r'\[200, 8\] expected'):
      models.load_params(
        FOLDER / 't5x_legacy', module(vocab_size=200), pad_vocabulary=True
      )

  def test_in_part_by_other_names(self):
    deeper = module(num_decoder_layers=3)
    rules = [
      (r'decoder/layers_([12])/(.*)', r'decoder/layers_1/\2'),
      (r'decoder/layers_0/(.*)', r'decoder/layers_0/\1'),
    ]
    source = FOLDER / 't5x_legacy'
    params = models.load_params(source, deeper, rules=rules)
    exact = models.load_params(source, module())
    same_bits(params['encoder'], exact['encoder'])
    for there, here in enumerate((0, 1, 1)):
      same_bits(
        params['decoder'][f'layers_{there}'], exact['decoder'][f'layers_{here}']
      )
    with self.assertRaisesRegex(errors.UserError, 'nothing for 14 of 66'):
      models.load_params(source, deeper, rules=[])
    with self.assertRaisesRegex(errors.UserError, r'! .*wo/kernel \[16, 8\]'):
      models.load_params(
        source, module(), fallback_to_scratch=True,
        rules=[('encoder/layers_0/mlp/wo/kernel', 'decoder/logits_dense/kernel')],
      )  # fmt: skip

  def test_fresh_ones_are_those_of_a_fresh_run(self):
    sizes = dict(model_type='mlp', hidden=(5,), image_shape=(2, 2, 1))
    old, new = (models.build(dict(sizes, classes=n)) for n in (3, 4))
    key = jax.random.key(3)
    params = models.family_of(old).init(jax.random.key(0))
    fresh = models.family_of(new).init(key)
    mj.save_checkpoint(self.folder / 'old', params)
    head = [path for path in tree.flatten(params) if path.startswith('head')]
    self.assertNotEmpty(head)
    found = models.load_params(
      self.folder / 'old', new, rules=[('head/.*', None)], key=key
    )
    fit = models.fit_params(self.folder / 'old', new, rules=[('head/.*', None)])
    self.assertCountEqual(fit.fresh, head)
    self.assertCountEqual(fit.left, head)
    fit = models.fit_params(self.folder / 'old', old)
    self.assertEmpty([*fit.fresh, *fit.left])
    for path, leaf in tree.flatten(found).items():
      source = fresh if path in head else params
      np.testing.assert_array_equal(leaf, tree.flatten(source)[path])
    del params['head']
    mj.save_checkpoint(self.folder / 'part', params)
    with self.assertRaisesRegex(errors.UserError, r'- head/kernel'):
      models.load_params(self.folder / 'part', new)
    again = models.load_params(
      self.folder / 'part', new, fallback_to_scratch=True, key=key
    )
    same_bits(again, found)

  def test_float16_is_not_trained(self):
    half = module(dtype='float16')
    with self.assertRaisesRegex(errors.UserError, "65504.*dtype='bfloat16'"):
      mj.training.Trainer(half, mj.training.optim.adafactor(0.1))
    mj.training.Trainer(
      half, mj.training.optim.adafactor(0.1), allow_float16=True
    )
    brain = dataclasses.replace(half.config, dtype='bfloat16')
    mj.training.Trainer(t5.Transformer(brain), mj.training.optim.adafactor(0.1))


if __name__ == '__main__':
  absltest.main()
