# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA and its relatives against float64, written from the papers."""

from absl.testing import absltest
from absl.testing import parameterized
import adapters_on_disk
import ml_dtypes
import numpy as np

import mergejax as mj

Q = 'layers.0.q'


def wide(array):
  return np.asarray(array, np.float64)


class LoraTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.disk = adapters_on_disk.Folder(self.create_tempdir().full_path)
    self.random = self.disk.random

  def pair(self, outputs, inputs, rank=2, module=Q):
    return {
      f'{module}.lora_A.weight': self.random(rank, inputs),
      f'{module}.lora_B.weight': self.random(outputs, rank),
    }

  def close(self, got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-6)

  def product(self, adapter, module=Q):
    return wide(adapter[f'{module}.lora_B.weight']) @ wide(
      adapter[f'{module}.lora_A.weight']
    )

  @parameterized.parameters(
    ({'lora_alpha': 3}, 3 / 2),
    ({'lora_alpha': 3, 'use_rslora': True}, 3 / np.sqrt(2)),
    ({'lora_alpha': 3, 'alpha_pattern': {'layers.1.q': 9, 'q': 5}}, 5 / 2),
    ({'lora_alpha': 3, 'r': 7, 'rank_pattern': {'^layers.0.q': 2}}, 3 / 2),
    ({}, 8 / 2),  # PEFT's own alpha
  )
  def test_scale(self, config, scale):
    base = {f'{Q}.weight': self.random(6, 5), 'norm.weight': self.random(5)}
    adapter = self.pair(6, 5)
    got = self.disk.folded(base, adapter, **config)
    delta = scale * self.product(adapter)
    self.close(got[f'{Q}.weight'], wide(base[f'{Q}.weight']) + delta)
    np.testing.assert_array_equal(got['norm.weight'], base['norm.weight'])

  @parameterized.parameters(
    10, 6
  )  # and a square table, which shapes leave open
  def test_embedding(self, tokens):
    base = {'embed.weight': self.random(tokens, 6)}
    a, b = self.random(2, tokens), self.random(6, 2)
    adapter = {'embed.lora_embedding_A': a, 'embed.lora_embedding_B': b}
    got = self.disk.folded(base, adapter, lora_alpha=2)['embed.weight']
    self.close(got, wide(base['embed.weight']) + (wide(b) @ wide(a)).T)

  @parameterized.parameters((6, 5), (6, 5, 3), (6, 5, 3, 2))
  def test_dora_and_convolutions(self, outputs, inputs, *window):
    base = {f'{Q}.weight': self.random(outputs, inputs, *window)}
    ones = (1,) * len(window)
    adapter = {
      f'{Q}.lora_A.weight': self.random(2, inputs, *window),
      f'{Q}.lora_B.weight': self.random(outputs, 2, *ones),
    }
    a = wide(adapter[f'{Q}.lora_A.weight'])
    b = wide(adapter[f'{Q}.lora_B.weight']).reshape(outputs, 2)
    total = wide(base[f'{Q}.weight']) + 3 / 2 * np.einsum('or,r...->o...', b, a)
    got = self.disk.folded(base, adapter, lora_alpha=3)
    self.close(got[f'{Q}.weight'], total)

    size = self.random(outputs)
    shape = (1, outputs, *ones) if window else (outputs,)
    adapter[f'{Q}.lora_magnitude_vector'] = size.reshape(shape)
    other = adapters_on_disk.Folder(self.create_tempdir().full_path)
    got = other.folded(base, adapter, lora_alpha=3, use_dora=True)
    for row in range(outputs):
      length = np.sqrt(np.sum(total[row] ** 2))
      self.close(got[f'{Q}.weight'][row], size[row] * total[row] / length)

  def test_dora_of_an_embedding_normalises_columns(self):
    base = {'embed.weight': self.random(10, 6)}
    a, b, size = self.random(2, 10), self.random(6, 2), self.random(6)
    adapter = {
      'embed.lora_embedding_A': a,
      'embed.lora_embedding_B': b,
      'embed.lora_magnitude_vector': size,
    }
    got = self.disk.folded(base, adapter, lora_alpha=2, use_dora=True)
    total = wide(base['embed.weight']) + (wide(b) @ wide(a)).T
    length = np.sqrt(np.sum(total**2, axis=0))
    self.close(got['embed.weight'], total * size / length)

  @parameterized.parameters((4, 12), (4, 4), (16, 4))
  def test_kernels_of_gpt2_are_inputs_by_outputs(self, inputs, outputs):
    # c_attn tells; fan_in_fan_out of the settings may be that of another layer.
    name = 'h.0.c_proj' if outputs == 4 else 'h.0.c_fc'
    base = {
      'h.0.c_attn.weight': self.random(4, 12),
      f'{name}.weight': self.random(inputs, outputs),
      'score.weight': self.random(4, 4),
    }
    adapter = self.pair(outputs, inputs, module=name)
    adapter |= self.pair(4, 4, module='score')
    got = self.disk.folded(base, adapter, lora_alpha=2, fan_in_fan_out=False)
    delta = self.product(adapter, name)
    self.close(got[f'{name}.weight'], wide(base[f'{name}.weight']) + delta.T)
    delta = self.product(adapter, 'score')
    self.close(got['score.weight'], wide(base['score.weight']) + delta)

  def test_principal_parts_leave_the_base(self):
    base = {f'{Q}.weight': self.random(6, 5)}
    adapter = self.pair(6, 5)
    kernel, change = wide(base[f'{Q}.weight']), 3 / 2 * self.product(adapter)
    u, s, v = np.linalg.svd(kernel, full_matrices=False)
    q, r = np.linalg.qr(kernel)
    rests = {
      'pissa': kernel - u[:, :2] @ np.diag(s[:2]) @ v[:2],
      'olora': kernel - 3 / 2 * q[:, :2] @ r[:2],
    }
    for start, rest in rests.items():
      disk = adapters_on_disk.Folder(self.create_tempdir().full_path)
      got = disk.folded(base, adapter, lora_alpha=3, init_lora_weights=start)
      self.close(got[f'{Q}.weight'], rest + change)
    diagonal = self.random(2)
    adapter[f'{Q}.lora_diag'] = diagonal
    got = self.disk.folded(
      base, adapter, lora_alpha=3, kasa_config={'beta': 1.0}
    )
    change = 3 / 2 * sum(
      float(diagonal[k])
      * np.outer(adapter[f'{Q}.lora_B.weight'][:, k], adapter[f'{Q}.lora_A.weight'][k])
      for k in range(2)
    )  # fmt: skip
    rest = kernel - u[:, 3:] @ np.diag(s[3:]) @ v[3:]
    self.close(got[f'{Q}.weight'], rest + change)

  @parameterized.parameters(
    'gaussian', 'orthogonal', 'eva', 'mica', True, False
  )
  def test_other_beginnings_leave_the_base(self, start):
    base = {f'{Q}.weight': self.random(6, 5)}
    adapter = self.pair(6, 5)
    got = self.disk.folded(base, adapter, init_lora_weights=start, lora_alpha=2)
    self.close(got[f'{Q}.weight'], base[f'{Q}.weight'] + self.product(adapter))

  def test_adalora_divides_by_the_first_rank(self):
    base = {f'{Q}.weight': self.random(6, 5)}
    adapter = {
      f'{Q}.lora_A': self.random(2, 5),
      f'{Q}.lora_B': self.random(6, 2),
      f'{Q}.lora_E': self.random(2, 1),
    }
    config = {'peft_type': 'ADALORA', 'init_r': 4, 'lora_alpha': 3}
    got = self.disk.folded(base, adapter, **config)
    change = sum(
      np.outer(wide(adapter[f'{Q}.lora_B'])[:, k], wide(adapter[f'{Q}.lora_A'])[k])
      * float(adapter[f'{Q}.lora_E'][k, 0])
      for k in range(2)
    )  # fmt: skip
    expected = wide(base[f'{Q}.weight']) + change * 3 / (4 + 1e-5)
    self.close(got[f'{Q}.weight'], expected)


class ExpertsTest(parameterized.TestCase):
  """Three experts, 4 wide, of 5 inputs; `B` counts rank by rank."""

  def setUp(self):
    super().setUp()
    self.disk = adapters_on_disk.Folder(self.create_tempdir().full_path)
    random = self.disk.random
    # gate_up_proj is wrapped first and lies deepest.
    self.adapter = {
      'mlp.experts.base_layer.lora_A.weight': random(3 * 2, 5),
      'mlp.experts.base_layer.lora_B.weight': random(8, 2 * 3),
      'mlp.experts.lora_A.weight': random(3 * 2, 4),
      'mlp.experts.lora_B.weight': random(5, 2 * 3),
    }
    self.config = {
      'lora_alpha': 3,
      'target_parameters': ['experts.gate_up_proj', 'experts.down_proj'],
    }

  def delta(self, depth, expert):
    prefix = f'mlp.experts.{depth}'
    a = wide(self.adapter[f'{prefix}lora_A.weight'])
    b = wide(self.adapter[f'{prefix}lora_B.weight'])
    return 3 / 2 * sum(
      np.outer(b[:, k * 3 + expert], a[expert * 2 + k]) for k in range(2)
    )  # fmt: skip

  @parameterized.parameters(False, True)
  def test_fused(self, inputs_first):
    random = self.disk.random
    up, down = random(3, 8, 5), random(3, 5, 4)
    if inputs_first:
      up, down = up.swapaxes(1, 2).copy(), down.swapaxes(1, 2).copy()
    base = {'mlp.experts.gate_up_proj': up, 'mlp.experts.down_proj': down}
    got = self.disk.folded(base, self.adapter, **self.config)
    for leaf, depth in (('gate_up_proj', 'base_layer.'), ('down_proj', '')):
      for expert in range(3):
        delta = self.delta(depth, expert)
        expected = wide(base[f'mlp.experts.{leaf}'][expert]) + (
          delta.T if inputs_first else delta
        )
        np.testing.assert_allclose(
          got[f'mlp.experts.{leaf}'][expert], expected, rtol=1e-5, atol=2e-6
        )

  @parameterized.parameters(
    ('mlp', ('gate_proj', 'up_proj', 'down_proj')),
    ('block_sparse_moe', ('w1', 'w3', 'w2')),
  )
  def test_stored_one_by_one(self, place, names):
    random = self.disk.random
    self.adapter = {f'layers.0.{k}': v for k, v in self.adapter.items()}
    base = {}
    for expert in range(3):
      for name, shape in zip(names, ((4, 5), (4, 5), (5, 4)), strict=True):
        path = f'layers.0.{place}.experts.{expert}.{name}.weight'
        base[path] = random(*shape)
    got = self.disk.folded(base, self.adapter, **self.config)
    self.adapter = {
      k.removeprefix('layers.0.'): v for k, v in self.adapter.items()
    }
    for expert in range(3):
      both = self.delta('base_layer.', expert)
      deltas = both[:4], both[4:], self.delta('', expert)
      for name, delta in zip(names, deltas, strict=True):
        path = f'layers.0.{place}.experts.{expert}.{name}.weight'
        np.testing.assert_allclose(
          got[path], wide(base[path]) + delta, rtol=1e-5, atol=2e-6
        )

  def test_square_experts_need_a_model_that_is_known(self):
    random = self.disk.random
    base = {'mlp.experts.down_proj': random(3, 4, 4)}
    adapter = {
      'mlp.experts.lora_A.weight': random(6, 4),
      'mlp.experts.lora_B.weight': random(4, 6),
    }
    config = {'lora_alpha': 3, 'target_parameters': ['experts.down_proj']}
    with self.assertRaisesRegex(mj.UserError, 'nothing tells'):
      self.disk.folded(base, adapter, **config)
    self.adapter = adapter
    disk = adapters_on_disk.Folder(self.create_tempdir().full_path)
    got = disk.folded(base, adapter, {'model_type': 'gpt_oss'}, **config)
    for expert in range(3):
      expected = (
        base['mlp.experts.down_proj'][expert] + self.delta('', expert).T
      )
      np.testing.assert_allclose(
        got['mlp.experts.down_proj'][expert], expected, rtol=1e-5, atol=2e-6
      )


class WholeTest(parameterized.TestCase):
  """Parameters, rows and biases that are trained as they are."""

  def setUp(self):
    super().setUp()
    self.disk = adapters_on_disk.Folder(self.create_tempdir().full_path)
    random = self.disk.random
    self.base = {
      'embed_tokens.weight': random(10, 4),
      'q.weight': random(4, 4),
      'q.bias': random(4),
      'lm_head.weight': random(10, 4),
    }
    self.pair = {
      'q.lora_A.weight': random(2, 4),
      'q.lora_B.weight': random(4, 2),
    }

  @parameterized.parameters(
    'lm_head.weight',
    'lm_head.modules_to_save.default.weight',
    'base_model.model.lm_head.base_layer.weight',
  )
  def test_saved_whole(self, name):
    head = self.disk.random(10, 4)
    got = self.disk.folded(
      self.base, {**self.pair, name: head}, modules_to_save=['lm_head']
    )
    np.testing.assert_array_equal(got['lm_head.weight'], head)

  def test_a_new_head(self):
    head = self.disk.random(3, 4)
    store = self.disk.open(
      self.base, {**self.pair, 'score.weight': head}, task_type='SEQ_CLS'
    )
    np.testing.assert_array_equal(
      store.leaves(['score.weight'])['score.weight'], head
    )
    self.assertRegex(store.remarks[0], r'score.weight \[3, 4\] comes from')

  @parameterized.parameters([[7, 1]], [{'embed_tokens': [7, 1]}])
  def test_trained_tokens(self, rows):
    new = self.disk.random(2, 4)
    name = 'embed_tokens.token_adapter.trainable_tokens_delta'
    got = self.disk.folded(
      self.base, {**self.pair, name: new}, trainable_token_indices=rows
    )
    expected = self.base['embed_tokens.weight'].copy()
    expected[7], expected[1] = new
    np.testing.assert_array_equal(got['embed_tokens.weight'], expected)

  def test_trained_tokens_alone(self):
    new = self.disk.random(2, 4)
    got = self.disk.folded(
      self.base, {'embed_tokens.trainable_tokens_delta': new},
      peft_type='TRAINABLE_TOKENS', token_indices=[7, 1],
    )  # fmt: skip
    np.testing.assert_array_equal(got['embed_tokens.weight'][7], new[0])

  def test_biases(self):
    bias = self.disk.random(4)
    own = dict(self.pair)
    got = self.disk.folded(
      self.base, {**own, 'q.base_layer.bias': bias}, bias='lora_only'
    )
    np.testing.assert_array_equal(got['q.bias'], bias)
    disk = adapters_on_disk.Folder(self.create_tempdir().full_path)
    got = disk.folded(
      self.base, {**own, 'q.lora_B.bias': bias}, lora_bias=True, lora_alpha=3
    )
    np.testing.assert_allclose(
      got['q.bias'], wide(self.base['q.bias']) + 1.5 * wide(bias), rtol=1e-6
    )

  def test_layer_norms(self):
    base = {**self.base, 'norm.weight': self.disk.random(4)}
    new = self.disk.random(4)
    got = self.disk.folded(
      base, {'norm.ln_tuning_layers.weight': new}, peft_type='LN_TUNING'
    )
    np.testing.assert_array_equal(got['norm.weight'], new)

  def test_a_tied_head_and_embedding_part(self):
    # Training saw the embedding's change in the embedding alone.
    del self.base['lm_head.weight']
    self.base['model.embed_tokens.weight'] = self.base.pop(
      'embed_tokens.weight'
    )
    a, b = self.disk.random(2, 10), self.disk.random(4, 2)
    config = {
      'architectures': ['LlamaForCausalLM'],
      'tie_word_embeddings': True,
    }
    adapter = {
      'model.embed_tokens.lora_embedding_A': a,
      'model.embed_tokens.lora_embedding_B': b,
    }
    base = self.disk.model(self.base, config)
    path = self.disk.adapter(adapter, lora_alpha=2)
    plan = mj.plan({'merge_method': 'linear', 'models': [f'{base}+{path}']})
    self.assertIs(plan.config['tie_word_embeddings'], False)
    out = self.disk.path / 'out'
    mj.execute(plan, out)
    got = mj.open_checkpoint(out)
    self.assertEmpty(got.tied)
    leaves = got.leaves(['lm_head.weight', 'model.embed_tokens.weight'])
    before = self.base['model.embed_tokens.weight']
    np.testing.assert_array_equal(leaves['lm_head.weight'], before)
    np.testing.assert_allclose(
      leaves['model.embed_tokens.weight'],
      wide(before) + (wide(b) @ wide(a)).T, rtol=1e-5, atol=2e-6,
    )  # fmt: skip

  def test_a_tied_head_that_is_stored_too(self):
    self.base['model.embed_tokens.weight'] = self.base.pop(
      'embed_tokens.weight'
    )
    self.base['lm_head.weight'] = self.base['model.embed_tokens.weight'].copy()
    config = {
      'architectures': ['LlamaForCausalLM'],
      'tie_word_embeddings': True,
    }
    base = self.disk.model(self.base, config)
    path = self.disk.adapter(self.pair)
    recipe = {'merge_method': 'linear', 'base_model': base, 'models': [path]}
    mj.execute(mj.plan(recipe), self.disk.path / 'out')
    specs = mj.open_checkpoint(self.disk.path / 'out').specs()
    self.assertNotIn('lm_head.weight', specs)

  @parameterized.product(stored=(True, False), nested=(True, False))
  def test_a_head_of_its_own_beside_a_tied_base(self, stored, nested):
    table = self.base.pop('embed_tokens.weight')
    del self.base['lm_head.weight']
    inner = 'language_model.' if nested else ''
    self.base[f'model.{inner}embed_tokens.weight'] = table
    if stored:
      self.base['lm_head.weight'] = table.copy()
    config = {'tie_word_embeddings': True}
    if nested:
      config['text_config'] = dict(config)
    a, b = self.disk.random(2, 4), self.disk.random(10, 2)
    base = self.disk.model(self.base, config)
    path = self.disk.adapter(
      {'lm_head.lora_A.weight': a, 'lm_head.lora_B.weight': b}, lora_alpha=2
    )
    expected = wide(table) + wide(b) @ wide(a)
    recipe = {
      'merge_method': 'task_arithmetic', 'base_model': base,
      'models': [{'model': f'{base}+{path}', 'parameters': {'weight': 1}}],
    }  # fmt: skip
    with self.assertRaisesRegex(mj.UserError, 'untie: true'):
      mj.plan(recipe)
    alone = {'merge_method': 'linear', 'models': [f'{base}+{path}']}
    for name, one in (('a', alone), ('b', {**recipe, 'untie': True})):
      out = self.disk.path / name
      mj.execute(mj.plan(one), out)
      got = mj.open_checkpoint(out).leaves(['lm_head.weight'])
      np.testing.assert_allclose(
        got['lm_head.weight'], expected, rtol=1e-5, atol=2e-6
      )
      self.assertNotIn('true', (out / 'config.json').read_text())

  def test_trained_tokens_leave_a_head_tied(self):
    del self.base['lm_head.weight']
    self.base['model.embed_tokens.weight'] = self.base.pop(
      'embed_tokens.weight'
    )
    config = {
      'architectures': ['LlamaForCausalLM'],
      'tie_word_embeddings': True,
    }
    name = 'model.embed_tokens.token_adapter.trainable_tokens_delta'
    store = self.disk.open(
      self.base, {name: self.disk.random(2, 4)}, config,
      trainable_token_indices=[7, 1],
    )  # fmt: skip
    self.assertEqual(
      store.tied, {'lm_head.weight': 'model.embed_tokens.weight'}
    )

  def test_result_has_the_dtype_of_the_model(self):
    base = {k: v.astype(ml_dtypes.bfloat16) for k, v in self.base.items()}
    adapter = {**self.pair, 'score.weight': self.disk.random(3, 4)}
    base = self.disk.model(base)
    path = self.disk.adapter(adapter, task_type='SEQ_CLS')
    plan = mj.plan(
      {'merge_method': 'passthrough', 'models': [f'{base}+{path}']}
    )
    mj.execute(plan, self.disk.path / 'out')
    specs = mj.open_checkpoint(self.disk.path / 'out').specs()
    self.assertEqual(
      {p: s.dtype.name for p, s in specs.items()},
      dict.fromkeys([*self.base, 'score.weight'], 'bfloat16'),
    )


if __name__ == '__main__':
  absltest.main()
