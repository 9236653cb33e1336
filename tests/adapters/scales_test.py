# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""(IA)^3 against PEFT's numbers, and how many numbers an adapter has."""

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import jax
import numpy as np
import small_adapted

import mergejax as mj
from mergejax import models
from mergejax.core import tree
from mergejax.training import losses

CLOSE = dict(rtol=1e-4, atol=2e-5)
T_FEW = ((r'.*/(key|value|wi_1)/kernel', 'outputs'),)


class GoldensTest(parameterized.TestCase):
  @parameterized.parameters(
    ('ia3_t5_v10', mj.adapters.ia3()),
    ('ia3_t5_v11', mj.adapters.ia3(rules=T_FEW)),
  )
  def test_logits_and_losses(self, name, adapter):
    arrays = goldens.load(name)
    family, base = small_adapted.of_golden(arrays, tied=name.endswith('v10'))
    adapted = mj.adapters.adapt(family, adapter)
    leaves = small_adapted.scales_of_golden(arrays, 'ia3/')
    params = adapted.joined(base, leaves)
    counted = arrays['labels'] != -100
    labels = np.where(counted, arrays['labels'], 0)
    batch = {
      'encoder_input_tokens': arrays['input_ids'],
      'decoder_input_tokens': np.pad(labels, ((0, 0), (1, 0)))[:, :-1],
      # There the decoder masks nothing but the future.
      'decoder_target_tokens': np.maximum(labels, 1),
    }
    logits = jax.jit(adapted.logits)(params, batch)
    np.testing.assert_allclose(logits, arrays['logits'], **CLOSE)
    loss, _ = losses.token_cross_entropy(logits, labels)
    np.testing.assert_allclose(
      np.where(counted, loss, 0), arrays['token_loss'], **CLOSE
    )
    answer = jax.jit(family.logits)
    np.testing.assert_allclose(
      answer(base, batch), arrays['base_logits'], **CLOSE
    )
    folded = mj.adapters.fold(adapted, params)
    np.testing.assert_allclose(answer(folded, batch), arrays['logits'], **CLOSE)

  def test_place_in_the_feed_forward_block(self):
    # Behind wi_1 is before wo in a gated block; behind wi is before the ReLU.
    outputs = [('.*/(wi|wi_1)/kernel', 'outputs')]
    inputs = [('.*/wo/kernel', 'inputs')]
    for activations, same in ((('gelu', 'linear'), True), (('relu',), False)):
      family, base = small_adapted.build('lm', mlp_activations=activations)
      found = []
      for rules in (outputs, inputs):
        adapted = mj.adapters.adapt(family, mj.adapters.ia3(rules=rules))
        draw = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32)
        leaves = {
          path: draw[i] for i, path in enumerate(sorted(adapted.adapter_specs))
        }
        params = adapted.joined(base, tree.unflatten(leaves))
        found.append(jax.jit(adapted.logits)(params, small_adapted.batch(2)))
      gap = np.abs(found[0] - found[1]).max()
      self.assertEqual(gap < 1e-4, same)


class CountsTest(parameterized.TestCase):
  def test_from_shapes_alone(self):
    count = mj.adapters.count
    t0 = dict(
      model_type='t5x', vocab_size=32128, emb_dim=2048, num_heads=32,
      head_dim=64, mlp_dim=5120, num_encoder_layers=24, num_decoder_layers=24,
      scan_layers=True,
    )  # fmt: skip
    specs = models.family_of(models.build(t0)).specs()
    self.assertEqual(count(mj.adapters.ia3(), specs), 540_672)
    t0 |= dict(num_heads=64, mlp_dim=10240, head_dim=64)
    bigger = models.family_of(models.build(t0)).specs()
    self.assertEqual(count(mj.adapters.ia3(), bigger), 1_081_344)
    # r (d + A) a query or value: 24 of the encoder, 2 x 24 of the decoder.
    self.assertEqual(
      count(mj.adapters.lora(rank=4), specs), 2 * 72 * 4 * (2048 + 2048)
    )
    self.assertEqual(
      count(mj.adapters.bank(mj.adapters.ia3(), 5), specs), 5 * 540_672
    )
    # Behind 72 attentions and 48 feed-forward blocks: 2 d w + w + d.
    self.assertEqual(
      count(mj.adapters.bottleneck(width=16), specs),
      120 * (2 * 2048 * 16 + 16 + 2048),
    )


if __name__ == '__main__':
  absltest.main()
