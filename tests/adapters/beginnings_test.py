# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What adapters begin with, what they drop, and how they fold into bfloat16."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import small_adapted

import mergejax as mj
from mergejax.adapters import prompts
from mergejax.adapters import sites
from mergejax.core import tree
from mergejax.core import typing

TARGET = 'decoder/decoder/mlp/wi_0/kernel'
INPUTS, LAYERS = 64, 3
SPECS = {
  TARGET: typing.LeafSpec(
    (INPUTS, LAYERS, 96), np.dtype('float32'), ('embed', 'layers', 'mlp')
  ),
  'decoder/token_embedder/embedding': typing.LeafSpec(
    (50, INPUTS), np.dtype('float32'), ('vocab', 'embed')
  ),
}
# `(adapter, {leaf: how it is drawn})`; a number is what all of it is.
UNIFORM, NORMAL = 'uniform', 'normal'
BEGINNINGS = {
  'lora': (
    mj.adapters.lora(rank=8, targets=TARGET),
    {'lora_a': (UNIFORM, 1 / np.sqrt(INPUTS)), 'lora_b': 0.0},
  ),
  'ia3': (mj.adapters.ia3(rules=[(TARGET, 'inputs')]), {'ia3_scale': 1.0}),
  'bottleneck': (
    mj.adapters.bottleneck(width=8, targets=TARGET),
    {'bottleneck_down': (NORMAL, 0.01), 'bottleneck_up': 0.0,
     'bottleneck_down_bias': 0.0, 'bottleneck_up_bias': 0.0},
  ),
  'poly': (
    mj.adapters.poly(tasks=40, heads=2, targets=TARGET),
    {'poly_a': (UNIFORM, 1 / np.sqrt(3 * INPUTS)), 'poly_b': 0.0,
     'poly_logits': (UNIFORM, 1e-3)},
  ),
  'poly as peft': (
    mj.adapters.poly(tasks=40, heads=2, targets=TARGET, start='peft'),
    {'poly_a': (UNIFORM, 1 / np.sqrt(INPUTS / 2)), 'poly_b': 0.0,
     'poly_logits': (UNIFORM, 1e-3)},
  ),
  'bank': (
    mj.adapters.bank(mj.adapters.lora(rank=8, targets=TARGET), experts=2),
    {'lora_a': (UNIFORM, 1 / np.sqrt(INPUTS)), 'lora_b': 0.0},
  ),
  'prompt': (
    mj.adapters.prompt(length=9, tasks=2), {'target': (UNIFORM, 0.5)},
  ),
  'attempt': (
    mj.adapters.attempt(sources=3, length=9, width=20),
    {'down': (NORMAL, 0.01), 'up': (NORMAL, 0.01), 'scale': 1.0, 'bias': 0.0,
     'source': (UNIFORM, 0.5), 'target': (UNIFORM, 0.5)},
  ),
}  # fmt: skip


class BeginningsTest(parameterized.TestCase):
  @parameterized.parameters(*BEGINNINGS)
  def test_draws(self, name):
    adapter, expected = BEGINNINGS[name]
    make = jax.jit(functools.partial(adapter.init, SPECS))
    leaves = tree.flatten(make(jax.random.key(0)))
    again, other = (tree.flatten(make(jax.random.key(k))) for k in (0, 1))
    self.assertEqual({p.split('/')[-1] for p in leaves}, {*expected})
    for path, leaf in leaves.items():
      leaf, drawn = np.asarray(leaf), expected[path.split('/')[-1]]
      self.assertEqual(leaf.dtype, np.float32)
      np.testing.assert_array_equal(leaf, again[path])
      if isinstance(drawn, float):
        np.testing.assert_array_equal(leaf, np.full_like(leaf, drawn))
        continue
      self.assertFalse(np.array_equal(leaf, other[path]))
      # No number twice: layers, experts, tasks are drawn apart.
      if name != 'attempt':
        self.assertGreater(len(np.unique(leaf)), 0.99 * leaf.size)
      kind, size = drawn
      if kind == UNIFORM:
        self.assertBetween(np.abs(leaf).max(), 0.97 * size, size)
        size /= np.sqrt(3)
      np.testing.assert_allclose(leaf.std(), size, rtol=0.1)
      self.assertLess(abs(leaf.mean()), 0.1 * size)

  def test_prompts_begin_as_frequent_tokens(self):
    table = jnp.arange(6000.0)[:, None]
    found = prompts.from_vocabulary(jax.random.key(0), table, 4000)
    rows = np.asarray(found)[:, 0]
    self.assertLen(np.unique(rows), 4000)
    self.assertLess(rows.max(), 5000)
    self.assertFalse(np.array_equal(rows, np.sort(rows)))


def place(d_in, d_out):
  """A site of a kernel of these sizes."""
  spec = typing.LeafSpec((d_in, d_out), np.dtype('float32'), ('embed', 'mlp'))
  (site,) = sites.find({'wi/kernel': spec}, ['wi/kernel'])
  return site


class DropoutTest(absltest.TestCase):
  def test_by_hand(self):
    eye = jnp.eye(4, dtype=jnp.float32)
    lora = mj.adapters.lora(rank=4, dropout=0.75, targets='wi/kernel')
    x = np.random.default_rng(0).uniform(1, 2, (5000, 4)).astype(np.float32)
    parts = {'lora_a': eye, 'lora_b': 2 * eye}
    for dtype in (jnp.float32, jnp.bfloat16):
      given = jnp.asarray(x, dtype)
      y = jnp.zeros(x.shape, dtype)
      apply = functools.partial(lora.after, place(4, 4), parts, given, y)
      still = np.float64(apply())
      np.testing.assert_allclose(still, 2 * np.float64(given), rtol=1e-2)
      found = np.float64(apply(jax.random.key(0)))
      kept = found != 0
      self.assertBetween(kept.mean(), 0.23, 0.27)
      np.testing.assert_allclose(found, kept * 4 * still, rtol=1e-2)


class BFloat16Test(parameterized.TestCase):
  """Deltas are added in float32 and rounded once, whatever the base is in."""

  @parameterized.parameters('lora', 'ia3')
  def test_fold(self, name):
    adapter = {
      'lora': mj.adapters.lora(rank=3, alpha=2, targets='.*/wo/kernel'),
      'ia3': mj.adapters.ia3(rules=[('.*/wo/kernel', 'outputs')]),
    }[name]
    family, base = small_adapted.build('lm')
    adapted = mj.adapters.adapt(family, adapter)
    rounded = tree.map_paths(lambda _, x: jnp.asarray(x, jnp.bfloat16), base)
    own = small_adapted.leaves(adapted.adapter_specs)
    folded = tree.flatten(
      mj.adapters.fold(adapted, adapted.joined(rounded, own))
    )
    changed = 0
    for path, leaf in tree.flatten(rounded).items():
      expected = np.float64(leaf)
      if path.endswith('wo/kernel'):
        changed += 1
        at = lambda part, path=path: np.float64(
          tree.flatten(own)[path.replace('kernel', part)]
        )
        if name == 'lora':
          expected = expected + 2 / 3 * at('lora_a') @ at('lora_b')
        else:
          expected = expected * at('ia3_scale')
      self.assertEqual(folded[path].dtype, jnp.bfloat16)
      np.testing.assert_array_equal(
        np.asarray(folded[path]),
        np.float32(expected).astype(ml_dtypes.bfloat16),
        err_msg=path,
      )
    self.assertEqual(changed, 2)


if __name__ == '__main__':
  absltest.main()
