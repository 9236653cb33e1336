# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A batch of mixed experts is each expert's own answer."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax
import small_adapted
import tiers

import mergejax as mj
from mergejax import partition
from mergejax.core import errors
from mergejax.core import tree

EXPERTS = {
  'lora': mj.adapters.lora(rank=2, targets='.*/(query|wo)/kernel'),
  'ia3': mj.adapters.ia3(),
  'bottleneck': mj.adapters.bottleneck(width=2),
}
IDS = np.int32([2, 0, 0, 1, 2, 1, 0, 2])


def build(name, **changes):
  """`(bank, adapted family, leaves of three experts, all parameters)`."""
  family, base = small_adapted.build('t5', head_dim=4, mlp_dim=8, **changes)
  bank = mj.adapters.bank(EXPERTS[name], experts=3)
  adapted = mj.adapters.adapt(family, bank)
  specs = bank.expert.specs(adapted.base_specs)
  leaves = [small_adapted.leaves(specs, seed) for seed in range(3)]
  params = adapted.joined(base, bank.stack(adapted.base_specs, leaves))
  return bank, adapted, leaves, params


@tiers.slow('test_mixed_.*[12]', 'test_choices_.*1')
class BankTest(parameterized.TestCase):
  @parameterized.parameters(*EXPERTS)
  def test_mixed_batch_is_each_expert_alone(self, name):
    scanned = dict(scan_layers=True) if name == 'lora' else {}
    bank, adapted, leaves, params = build(name, **scanned)
    batch = small_adapted.batch()
    mixed = jax.jit(adapted.logits)(params, {**batch, 'expert_ids': IDS})
    alone = mj.adapters.adapt(adapted.plain, bank.expert)
    base, stacked = adapted.split(params)
    answer = jax.jit(alone.logits)
    for number, own in enumerate(leaves):
      picked = bank.pick(adapted.base_specs, stacked, number)
      jax.tree.map(np.testing.assert_array_equal, picked, own)
      found = answer(alone.joined(base, own), batch)
      np.testing.assert_allclose(
        mixed[number == IDS], found[number == IDS], rtol=2e-4, atol=2e-4
      )

  def test_on_a_mesh_and_trained(self):
    _, adapted, _, params = build('lora')
    batch = {**small_adapted.batch(), 'expert_ids': IDS % 2}
    mesh = partition.make_mesh(data=4, model=2)
    axes = {path: spec.axes for path, spec in adapted.specs().items()}
    layout = partition.shardings(mesh, params, axes, partition.standard())
    path = 'encoder/layers_0/attention/query/lora_b'
    self.assertEqual(
      tuple(tree.flatten(layout)[path].spec), (None, None, 'model')
    )
    trainer = mj.training.Trainer(adapted, optax.sgd(0.1), mesh=mesh)
    state = trainer.fit([batch], steps=1, params=params)
    after, before = tree.flatten(state.params), tree.flatten(params)
    moved = np.abs(np.asarray(after[path]) - before[path]).max(axis=(1, 2))
    # The third expert has no row of this batch.
    np.testing.assert_array_equal(moved > 0, [True, True, False])

  def test_answers_keep_their_expert(self):
    bank, adapted, leaves, params = build('ia3')
    batch = small_adapted.batch(2)
    ids = np.int32([1, 2])

    tokens = jnp.int32([3, 4, 5, 6])
    steps = lambda family, params, batch: small_adapted.decoded(
      family, params, batch, tokens, 2
    )
    run = jax.jit(lambda p, b: steps(adapted, p, b))
    mixed = run(params, {**batch, 'expert_ids': ids})
    base, _ = adapted.split(params)
    alone = mj.adapters.adapt(adapted.plain, bank.expert)
    answer = jax.jit(lambda p: steps(alone, p, batch))
    for row, number in enumerate(ids):
      found = answer(alone.joined(base, leaves[number]))
      rows = slice(2 * row, 2 * row + 2)
      np.testing.assert_allclose(mixed[rows], found[rows], rtol=5e-4, atol=5e-4)

  @parameterized.parameters('ia3', 'prompt')
  def test_choices_of_a_row_are_its_expert_s(self, name):
    small = dict(num_encoder_layers=1, num_decoder_layers=1)
    if name == 'prompt':
      many = mj.adapters.prompt(length=2, tasks=3)
      family, base = small_adapted.build('t5', **small)
      adapted = mj.adapters.adapt(family, many)
      leaves = small_adapted.leaves(adapted.adapter_specs)
      params = adapted.joined(base, leaves)
    else:
      many, adapted, _, params = build(name, **small)
    batch, ids = small_adapted.batch(3), np.int32([2, 0, 1])
    choices = np.int32([[[3, 1], [4, 1]], [[5, 1], [3, 1]], [[7, 6], [8, 1]]])
    (reads,) = many.reads
    answer = lambda family: jax.jit(
      lambda p, b, c: family.choice_logits(family.variables(p), b, c)
    )
    found = answer(adapted)(params, {**batch, reads: ids}, choices)
    base, own = adapted.split(params)
    kinds = {}
    for row, number in enumerate(ids):
      expert, leaves = many.alone(adapted.base_specs, own, int(number))
      alone = mj.adapters.adapt(adapted.plain, expert)
      score = kinds.setdefault(expert, answer(alone))
      expected = score(alone.joined(base, leaves), batch, choices)
      np.testing.assert_allclose(
        found[row], expected[row], rtol=2e-4, atol=2e-4
      )

  def test_dropout_of_every_row(self):
    family, base = small_adapted.build('lm', num_layers=1)
    lora = mj.adapters.lora(rank=2, dropout=0.5, targets='.*/wo/kernel')
    adapted = mj.adapters.adapt(family, mj.adapters.bank(lora, 2))
    params = adapted.joined(base, small_adapted.leaves(adapted.adapter_specs))
    batch = {
      n: np.repeat(x[:1], 4, 0) for n, x in small_adapted.batch().items()
    }
    batch['expert_ids'] = np.zeros(4, np.int32)
    run = jax.jit(
      lambda key, train: adapted.call(
        adapted.variables(params), batch, train=train, rngs={'dropout': key}
      )[0],
      static_argnums=1,
    )
    still = np.asarray(run(jax.random.key(0), False))
    np.testing.assert_array_equal(still, np.repeat(still[:1], 4, 0))
    one = np.asarray(run(jax.random.key(0), True))
    np.testing.assert_array_equal(one, run(jax.random.key(0), True))
    for row in range(1, 4):
      self.assertGreater(np.abs(one[row] - one[0]).max(), 1e-3)

  def test_ids_outside_of_the_bank(self):
    bank, adapted, _, params = build('ia3')
    batch = small_adapted.batch(2)
    with self.assertRaisesRegex(errors.DataError, "not 'expert_ids'"):
      adapted.check_batch(batch)
    for wrong in (3, -1):
      given = {**batch, 'expert_ids': np.int32([0, wrong])}
      with self.assertRaisesRegex(
        errors.DataError, f'the number {wrong},.*0 to 2'
      ):
        adapted.check_batch(given)
      with self.assertRaisesRegex(errors.DataError, 'there are 3 experts'):
        adapted.logits(params, given)
    # A compiled program cannot refuse them; it does not take another's.
    given = {**batch, 'expert_ids': np.int32([-1, 3])}
    self.assertTrue(np.isnan(jax.jit(adapted.logits)(params, given)).all())
    with self.assertRaisesRegex(errors.ConfigError, 'fold one of them'):
      mj.adapters.fold(adapted, params)
    with self.assertRaisesRegex(errors.ConfigError, 'not 3'):
      bank.pick(adapted.base_specs, adapted.split(params)[1], 3)
    with self.assertRaisesRegex(errors.StructureError, '2 are given'):
      bank.stack(adapted.base_specs, [{}, {}])


if __name__ == '__main__':
  absltest.main()
