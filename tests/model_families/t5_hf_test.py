# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""T5, mT5, ByT5, Flan-T5 and umT5 under Hugging Face's names, and back.

`benchmarks/hf_round_trip.py` compares logits with transformers where it is.
"""

import contextlib
import dataclasses
import io
import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

import mergejax as mj
from mergejax import models
from mergejax.checkpoints import ties
from mergejax.cli import convert
from mergejax.core import errors
from mergejax.core import tree
from mergejax.models import architectures
from mergejax.models import layer_stacks
from mergejax.models import t5_hf
from mergejax.nn import t5

GATED = {'mlp_activations': ('gelu', 'linear')}
KINDS = (
  ('t5_1_0', 't5', {'mlp_activations': ('relu',), 'logits_via_embedding': True}),
  ('t5_1_1', 't5', GATED),
  ('mt5', 'mt5', GATED),
  ('byt5', 't5', {**GATED, 'num_encoder_layers': 3}),
  ('umt5', 'umt5', {**GATED, 'relative_per_layer': True}),
)  # fmt: skip


def small(**fields):
  sizes = dict(
    vocab_size=24, emb_dim=8, num_heads=2, head_dim=3, num_encoder_layers=2,
    num_decoder_layers=2, mlp_dim=12,
  )  # fmt: skip
  return t5.T5Config(**{**sizes, **fields})


def random_leaves(config):
  """Random numbers, layers one by one or scanned as the configuration says."""
  specs = models.family_of(t5.Transformer(config)).specs()
  rng = np.random.default_rng(0)
  return {
    path: rng.normal(size=spec.shape).astype(np.float32)
    for path, spec in specs.items()
  }


def configured(kind, config):
  """The `config.json` of a model type, for a configuration of ours."""
  return t5_hf.config_to_hf(dataclasses.asdict(config), kind)


def equal(test, found, expected):
  test.assertEqual(set(found), set(expected))
  for name, leaf in expected.items():
    test.assertEqual(found[name].dtype, leaf.dtype)
    np.testing.assert_array_equal(found[name], leaf, err_msg=name)


class NamesTest(parameterized.TestCase):
  @parameterized.named_parameters(*KINDS)
  def test_the_model_comes_back_bit_for_bit(self, kind, fields):
    config = small(**fields)
    way = t5_hf.CONVERSIONS[f'hf-{kind}']
    leaves = random_leaves(config)
    stored = way.write(leaves)
    written = way.write_config(dataclasses.asdict(config))
    self.assertEqual(written['model_type'], kind)
    self.assertEqual(t5.T5Config(**way.read_config(written)), config)
    equal(self, way.read(stored, written), leaves)
    equal(self, way.write(way.read(stored, written)), stored)
    # Whichever of them the command line takes reads all of them.
    for other in t5_hf.CONVERSIONS.values():
      equal(self, other.read(stored, written), leaves)
      self.assertEqual(other.read_config(written), way.read_config(written))

  @parameterized.named_parameters(*KINDS)
  def test_scanned_layers_are_written_one_by_one(self, kind, fields):
    way = t5_hf.CONVERSIONS[f'hf-{kind}']
    scanned = dataclasses.replace(small(**fields), scan_layers=True)
    leaves = random_leaves(scanned)
    apart = layer_stacks.restack(leaves, small(**fields))
    equal(self, way.write(leaves), way.write(apart))

  def test_names_of_tables_of_relative_positions(self):
    name = 'SelfAttention.relative_attention_bias.weight'
    for kind, expected in (('t5', [0]), ('umt5', [0, 1])):
      fields = {'relative_per_layer': True} if kind == 'umt5' else {}
      config = small(**fields)
      stored = t5_hf.CONVERSIONS[f'hf-{kind}'].write(random_leaves(config))
      for stack in ('encoder', 'decoder'):
        self.assertCountEqual(
          [n for n in stored if n.startswith(stack) and n.endswith(name)],
          [f'{stack}.block.{i}.layer.0.{name}' for i in expected],
        )

  def test_one_table_becomes_one_a_layer_and_back(self):
    leaves = random_leaves(small())
    way = t5_hf.CONVERSIONS['hf-umt5']
    stored = way.write(leaves)
    bias = 'layer.0.SelfAttention.relative_attention_bias.weight'
    np.testing.assert_array_equal(
      stored[f'decoder.block.1.{bias}'], stored[f'decoder.block.0.{bias}']
    )
    apart = way.read(stored, configured('umt5', small()))
    equal(self, t5_hf.to_hf(apart), t5_hf.to_hf(leaves))

  def test_tables_that_differ_are_no_t5(self):
    leaves = random_leaves(small(relative_per_layer=True))
    with self.assertRaisesRegex(errors.StructureError, 'hf-umt5'):
      t5_hf.CONVERSIONS['hf-t5'].write(leaves)

  def test_a_copy_of_what_is_not_there(self):
    stored = t5_hf.to_hf(random_leaves(small()))
    stored['encoder.embed_tokens.weight'] = stored.pop('shared.weight')
    with self.assertRaisesRegex(
      errors.CheckpointError, 'embed_tokens.*not a par'
    ):
      t5_hf.from_hf(stored, tied_head=False)

  def test_the_unused_table_of_old_files_is_left_out(self):
    stored = t5_hf.to_hf(random_leaves(small()))
    unused = np.ones((32, 2), np.float32)
    old = {
      **stored,
      'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight': (
        unused
      ),
    }
    equal(
      self, t5_hf.from_hf(old, tied_head=False),
      t5_hf.from_hf(stored, tied_head=False),
    )  # fmt: skip
    old['decoder.block.1.layer.1.EncDecAttention.relative_attention_bias'] = (
      unused
    )
    with self.assertRaisesRegex(errors.CheckpointError, 'not a parameter'):
      t5_hf.from_hf(old, tied_head=False)


class ConfigTest(parameterized.TestCase):
  @parameterized.parameters(
    ('relu', ('relu',)),
    ('gated-gelu', ('gelu', 'linear')),
    ('gated-gelu_new', ('gelu', 'linear')),
    ('gelu_new', ('gelu',)),
    ('gated-silu', ('silu', 'linear')),
  )
  def test_activations(self, theirs, ours):
    config = {**configured('t5', small()), 'feed_forward_proj': theirs}
    self.assertEqual(t5_hf.config_from_hf(config)['mlp_activations'], ours)

  @parameterized.parameters('gelu', 'gated-mish')
  def test_other_activations_are_refused(self, theirs):
    config = {**configured('t5', small()), 'feed_forward_proj': theirs}
    with self.assertRaisesRegex(errors.ConfigError, theirs):
      t5_hf.config_from_hf(config)

  def test_a_size_that_is_missing_is_told(self):
    config = configured('mt5', small())
    del config['d_kv'], config['num_layers']
    with self.assertRaisesRegex(errors.ConfigError, 'mt5 .*d_kv, num_layers'):
      t5_hf.config_from_hf(config)

  @parameterized.parameters('mt5', 'umt5')
  def test_what_they_mean_without_a_word(self, kind):
    config = configured(kind, small())
    del config['feed_forward_proj']
    found = t5_hf.config_from_hf(config)
    self.assertEqual(found['mlp_activations'], ('gelu', 'linear'))
    given = configured(kind, small())
    self.assertEmpty(architectures.differences(given, config))

  def test_mt5_has_a_head_of_its_own(self):
    config = configured('mt5', small())
    self.assertFalse(config['tie_word_embeddings'])
    # transformers 5 writes true all the same, and never scales.
    config['tie_word_embeddings'] = True
    self.assertFalse(t5_hf.config_from_hf(config)['logits_via_embedding'])
    self.assertIs(ties.flag(config), False)
    tied = dataclasses.asdict(small(logits_via_embedding=True))
    with self.assertRaisesRegex(errors.CheckpointError, 'hf-t5'):
      t5_hf.CONVERSIONS['hf-mt5'].write_config(tied)

  @parameterized.parameters('t5', 'umt5')
  def test_scaling_says_whether_the_head_is_tied(self, kind):
    config = {**configured(kind, small()), 'tie_word_embeddings': True}
    for scaled in (True, False):
      config['scale_decoder_outputs'] = scaled
      self.assertIs(ties.flag(config), scaled)
      found = t5_hf.config_from_hf(config)
      self.assertEqual(found['logits_via_embedding'], scaled)

  def test_an_unscaled_head_that_is_not_stored_is_the_embedding(self):
    leaves = random_leaves(small())
    config = {**configured('mt5', small()), 'tie_word_embeddings': True}
    way = t5_hf.CONVERSIONS['hf-mt5']
    stored = way.write(leaves)
    del stored['lm_head.weight']
    np.testing.assert_array_equal(
      way.read(stored, config)['decoder/logits_dense/kernel'],
      leaves['token_embedder/embedding'].T,
    )
    # Where the file says that they are two, one is missing.
    config['tie_word_embeddings'] = False
    self.assertNotIn('decoder/logits_dense/kernel', way.read(stored, config))

  @parameterized.parameters(('mt5', False), ('umt5', False), ('umt5', True))
  def test_convert_and_load_model(self, kind, scanned):
    fields = {'relative_per_layer': True} if kind == 'umt5' else {}
    config = small(**fields)
    leaves = random_leaves(config)
    form = dataclasses.replace(config, scan_layers=scanned)
    source = pathlib.Path(self.create_tempdir().full_path) / 'source'
    mj.save_checkpoint(
      source,
      tree.unflatten(layer_stacks.restack(leaves, form)),
      config=models.describe(t5.Transformer(form)),
    )
    folder = source.parent / kind
    with contextlib.redirect_stdout(io.StringIO()):
      convert.main([str(source), str(folder), '--format=safetensors',
                    f'--names=hf-{kind}'])  # fmt: skip
    written = json.loads((folder / 'config.json').read_text())
    self.assertEqual(written['model_type'], kind)
    module, params = mj.load_model(folder)
    self.assertEqual(module.config, config)
    equal(self, tree.flatten(jax.device_get(params)), leaves)


if __name__ == '__main__':
  absltest.main()
