# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What names prove of stacks: ordinary checkpoints pass, unknown ones do not."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

import mergejax as mj
from mergejax import models
from mergejax.core import axes
from mergejax.core import errors
from mergejax.core import stacks
from mergejax.core import typing


def spec(*shape, names=None):
  return typing.LeafSpec(shape, np.dtype('float32'), names)


# Published checkpoints, one parameter an array.
SINGLE = {
  # Hugging Face, PyTorch
  'model.embed_tokens.weight': (32, 8),
  'model.layers.3.mlp.up_proj.weight': (16, 8),
  'model.layers.3.input_layernorm.weight': (8,),
  'model.layers.3.self_attn.q_norm.weight': (2, 4),
  'model.layers.3.self_attn.q_proj.bias': (8,),
  'model.layers.3.self_attn.sinks': (4,),
  'model.layers.3.mlp.experts.5.w1.weight': (16, 8),
  'model.layers.3.mlp.shared_experts.up_proj.weight': (16, 8),
  'model.layers.3.block_sparse_moe.gate.weight': (4, 8),
  'model.layers.3.mlp.router.weight': (4, 8),
  'model.layers.3.mlp.gate.e_score_correction_bias': (4,),
  'transformer.h.0.attn.bias': (1, 1, 16, 16),
  'transformer.h.0.attn.c_attn.weight': (8, 24),
  'backbone.layers.0.mixer.conv1d.weight': (8, 1, 4),
  'backbone.layers.0.mixer.A_log': (8, 16),
  'model.encoder.conv1.weight': (8, 80, 3),
  'vision_model.embeddings.patch_embedding.weight': (8, 3, 14, 14),
  'visual.patch_embed.proj.weight': (8, 3, 2, 14, 14),
  'layer1.0.downsample.0.weight': (64, 32, 1, 1),
  'decoder.upsampler.0.weight': (8, 4, 16),
  'encoder.pos_conv_embed.conv.weight_v': (8, 2, 128),
  'vit.embeddings.position_embeddings': (1, 197, 8),
  'vit.embeddings.cls_token': (1, 1, 8),
  'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight': (32, 4),  # fmt: skip
  'text_projection': (8, 8),
  'final_logits_bias': (1, 32),
  'model.layers.3.mlp.moe_statics.e_score_correction_bias': (1, 4),
  'logit_scale': (),
  # flax
  'token_embedder/embedding': (32, 8),
  'encoder/relpos_bias/rel_embedding': (4, 32),
  'encoder/layers_3/attention/query/kernel': (8, 16),
  'encoder/encoder_norm/scale': (8,),
  'Transformer/encoderblock_3/MultiHeadDotProductAttention_0/query/kernel': (8, 2, 4),  # fmt: skip
  'Transformer/encoderblock_3/MultiHeadDotProductAttention_0/key/bias': (2, 4),
  'model/layers/3/self_attn/q_proj/kernel': (8, 2, 4),
  'Transformer/posembed_input/pos_embedding': (1, 197, 8),
  'cls': (1, 1, 8),
  'ResNetBlock_0/Conv_0/kernel': (3, 3, 8, 8),
  'conv_init/kernel': (7, 7, 3, 64),
  'embedding/kernel': (16, 16, 3, 8),
  'img/embedding/kernel': (2, 16, 16, 3, 8),
  'block1/unit01/conv1/kernel': (1, 1, 8, 8),
  'Conv_1/kernel': (5, 4, 8),
  'Conv3D_0/conv/kernel': (3, 3, 3, 4, 8),
  'stem/kernel': (7, 7, 3, 8),
  'Dense_0/kernel': (8, 16),
  'w': (4, 8),
}  # fmt: skip
# Stacks, or arrays whose names do not tell.
UNKNOWN = {
  'layers/mlp/wi/kernel': (3, 8, 16),
  'decoder/layers/mlp/wi/kernel': (8, 3, 16),
  'decoder/decoder/mlp/wi/kernel': (8, 3, 16),
  'encoder/encoder/pre_attention_layer_norm/scale': (8, 3),
  'encoder/encoder/conv/kernel': (5, 3, 4, 8),
  'layers/attn/query/kernel': (3, 8, 2, 4),
  'layers/attn/query/bias': (3, 8),
  'layers/norm/scale': (3, 8),
  'layers/temperature': (3,),
  'layers/input_layernorm/weight': (3, 8),
  'model.layers.self_attn.q_proj.weight': (3, 8, 8),
  'ScanBlock_0/Dense_0/kernel': (3, 8, 16),
  'CheckpointScanBlock_0/Conv_0/kernel': (3, 5, 8, 16),
  'VmapMlp_0/Dense_0/bias': (3, 16),
  'Transformer/encoderblock/MlpBlock_0/Dense_0/kernel': (3, 8, 16),
  'body/MlpBlock_0/Dense_0/kernel': (3, 8, 16),
  'scanned_blocks/layers_0/attention/query/kernel': (8, 3, 2, 4),
  'layers/ConvBlock_0/Conv_0/kernel': (3, 3, 3, 8, 8),
  'Dense_0/kernel': (3, 8, 16),
  'Attention_0/query/kernel': (8, 2, 4),
  'Attention_0/query/bias': (2, 4),
  'LayerNorm_0/scale': (3, 8),
  'attention/query/kernel': (3, 8, 2, 4),
  'encoder/layers_1/mlp/expert/wi/kernel': (4, 8, 16),
  'encoderblock_1/Moe/Mlp/Dense_0/kernel': (4, 8, 16),
  'encoderblock_1/Moe/Mlp/Dense_0/bias': (4, 16),
  'model.layers.3.mlp.experts.gate_up_proj': (4, 8, 16),
  'model.layers.3.mlp.experts.gate_up_proj_bias': (4, 16),
  'model.layers.3.block_sparse_moe.input_linear.weight': (4, 16, 8),
  'model.layers.3.mlp.input_linear.weight': (4, 16, 8),
  'x': (3, 4, 8),
  'embedding/kernel': (3, 4, 8),
  'layers/embedding/kernel': (3, 16, 16, 3, 8),
  'layers/mlp/expert/wi/kernel': (1, 4, 8, 16),
  'layers/experts/bias': (1, 4, 8),
  'model.layers.3.mlp.shared_experts.up_proj': (2, 16, 8),
}


class StacksTest(parameterized.TestCase):
  def test_ordinary_checkpoints_are_one_parameter_an_array(self):
    wrong = [p for p, s in SINGLE.items() if stacks.may_be_stack(p, spec(*s))]
    self.assertEmpty(wrong)

  def test_what_may_be_a_stack(self):
    right = [p for p, s in UNKNOWN.items() if stacks.may_be_stack(p, spec(*s))]
    self.assertEqual(right, list(UNKNOWN))

  def test_axes_and_emptiness_leave_no_doubt(self):
    path = 'layers/mlp/wi/kernel'
    for known in (
      spec(3, 8, 16, names=('layers', 'embed', 'mlp')),
      spec(3, 8, 16, names=('a', 'b', 'c')),
      spec(0, 8, 16),
    ):
      self.assertFalse(stacks.may_be_stack(path, known))

  @parameterized.parameters(
    dict(model_type='vit', num_layers=1, emb_dim=4, mlp_dim=4, num_heads=2),
    dict(model_type='resnet', stages=[1, 1], channels=[2, 4], large_stem=True),
    dict(model_type='vgg', channels=[2, 0], dense=[4]),
    dict(model_type='mlp', hidden=[4]),
    dict(model_type='lm', vocab_size=8, emb_dim=4, num_layers=1),
    dict(model_type='t5x', vocab_size=8, emb_dim=4),
  )
  def test_own_models_need_no_axes(self, **config):
    specs = models.family_of(models.build(config)).specs()
    for path, named in specs.items():
      one = typing.LeafSpec(named.shape, named.dtype)
      self.assertFalse(stacks.may_be_stack(path, one), path)
      view = axes.view(path, one)
      # Those that a checkpoint stores change nothing either.
      self.assertIsNotNone(named.axes)
      self.assertEqual(axes.view(path, named), view, path)
      self.assertCountEqual(
        view.inputs + view.outputs, range(len(one.shape)), path
      )

  def test_the_lines_to_add_are_taken_as_they_stand(self):
    rng = np.random.default_rng(0)
    shapes = {
      p: s for p, s in UNKNOWN.items() if '/' in p and 'scanned' not in p
    }
    make = lambda: {
      p: rng.normal(size=s).astype(np.float32)
      for p, s in list(shapes.items())[:9]
    }
    trees = [make(), make()]
    with self.assertRaises(errors.UserError) as raised:
      mj.merge(trees, 'karcher')
    text = raised.exception.message
    lines = text[text.index('axes=[') :].removeprefix('axes=')
    rules = eval(lines)  # pylint: disable=eval-used
    self.assertEqual([path for path, _ in rules], sorted(trees[0]))
    merged = mj.merge(trees, 'karcher', axes=rules)
    path = 'encoder/encoder/pre_attention_layer_norm/scale'
    for i in range(3):
      one = mj.merge([{'w': t[path][:, i]} for t in trees], 'karcher')['w']
      np.testing.assert_allclose(merged[path][:, i], one, rtol=1e-6)

  def test_a_plan_asks_before_anything_is_read(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    rng = np.random.default_rng(0)
    paths = []
    for name in 'abc':
      paths.append(str(folder / f'{name}.safetensors'))
      leaves = {
        'layers/mlp/wi/kernel': rng.normal(size=(3, 8, 16)),
        'encoder/encoder/norm/scale': rng.normal(size=(8, 3)),
        'logits_dense/kernel': rng.normal(size=(8, 4)),
      }
      mj.save_checkpoint(
        paths[-1], {p: leaf.astype(np.float32) for p, leaf in leaves.items()}
      )
    base, *rest = paths
    recipe = lambda method, **options: {
      'merge_method': method, 'base_model': base, 'models': rest,
      'parameters': options,
    }  # fmt: skip
    for method, options in (
      ('ties', {'density': 0.5}),  # by tensor, as mergekit
      ('model_stock', {}),
      ('dare_linear', {'density': 0.5}),  # the norm of every leaf is restored
      ('della', {'density': 0.5, 'epsilon': 0.1}),
    ):
      with self.assertRaises(mj.UserError) as raised:
        mj.plan(recipe(method, **options))
      text = raised.exception.message
      for line in (
        "('layers/mlp/wi/kernel', ('layers', 'embed', 'mlp'))",
        "('encoder/encoder/norm/scale', ('embed', 'layers'))",
      ):
        self.assertIn(line, text)
      self.assertNotIn('logits_dense', text)
    named = [
      ['layers/.*', ['layers', 'embed', 'mlp']],
      ['encoder/.*', ['embed', 'layers']],
    ]
    mj.plan({**recipe('model_stock'), 'axes': named})
    # The same numbers either way, or only other draws.
    for method, options in (
      ('task_arithmetic', {}),
      ('ties', {'density': 0.5, 'trim_scope': 'global'}),
      ('dare_linear', {'density': 0.5, 'rescale': 'paper'}),
    ):
      mj.plan(recipe(method, **options))


if __name__ == '__main__':
  absltest.main()
