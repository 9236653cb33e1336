# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What training with a ladder keeps of the backbone, and ladders on disk."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import environments
import jax
import jax.numpy as jnp
import numpy as np
import optax
import small_adapted
import tiers

import mergejax as mj
from mergejax.adapters import ladder_files
from mergejax.core import errors
from mergejax.core import tree
from mergejax.training import step as step_lib

# Sizes of the backbone that nothing of the side network has: width, joined heads
# and hidden layer.
WIDTH, JOINED, HIDDEN = 40, 24, 112
SIZES = dict(
  emb_dim=WIDTH, num_heads=2, head_dim=JOINED // 2, mlp_dim=HIDDEN,
  vocab_size=64,
)  # fmt: skip
LADDER = mj.adapters.ladder(reduction=4, encoder_layers=[1])
LORA = mj.adapters.lora(rank=2, targets=('.*/(query|value|wi_0)/kernel',))


def built(adapter, **changes):
  family, base = small_adapted.build('t5', **SIZES, **changes)
  adapted = mj.adapters.adapt(family, adapter)
  return adapted, adapted.joined(
    base, small_adapted.leaves(adapted.adapter_specs)
  )


def long_batch(rows=8, inputs=20, targets=16):
  rng = np.random.default_rng(0)
  draw = lambda length: rng.integers(1, 64, (rows, length)).astype(np.int32)
  answer = draw(targets)
  return {
    'encoder_input_tokens': draw(inputs),
    'decoder_input_tokens': np.pad(answer, ((0, 0), (1, 0)))[:, :-1],
    'decoder_target_tokens': answer,
  }


def kept(adapter, batch, **changes):
  """Shapes of what the forward pass keeps for the backward pass."""
  adapted, params = built(adapter, **changes)
  base, own = adapted.split(params)
  own = tree.flatten(own)

  def residuals(own):
    logits = lambda own: adapted.logits(
      adapted.joined(base, tree.unflatten(own)), batch
    )
    return jax.vjp(logits, own)[1]

  leaves = jax.tree.leaves(jax.jit(residuals)(own))
  frozen = {leaf.shape for leaf in jax.tree.leaves(params)}
  # Zeros are constants of the program: gradients that are none.
  return [x.shape for x in leaves if x.shape not in frozen and np.any(x)]


@tiers.slow('test_only_ladders_.*0')
class KeptTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_only_ladders_of_the_backbone_are_kept(self, scanned):
    batch = long_batch()
    rows = (
      batch['encoder_input_tokens'].size,
      batch['decoder_input_tokens'].size,
    )
    of_size = lambda shapes, size: [s for s in shapes if s[-1:] == (size,)]
    shapes = kept(LADDER, batch, scan_layers=scanned)
    # The embedded tokens and the outputs of kept layers: of the encoder one of
    # two, of the decoder both.
    ladders = of_size(shapes, WIDTH)
    sizes = sorted(int(np.prod(s[:-1])) for s in ladders)
    self.assertEqual(sizes, sorted([rows[0]] * 2 + [rows[1]] * 3))
    for size in (JOINED, HIDDEN):
      self.assertEmpty(of_size(shapes, size))
    if not scanned:
      # LoRA keeps what the layers compute.
      self.assertNotEmpty(of_size(kept(LORA, batch), HIDDEN))

  def test_the_compiled_step(self):
    memory, batch = {}, long_batch()
    for name, adapter in (('ladder', LADDER), ('lora', LORA)):
      adapted, params = built(adapter)
      step = step_lib.make_step(adapted, optax.sgd(0.1, momentum=0.9))
      state = step.init(params, jax.random.key(0))
      own = adapted.split(params)[1]
      size = lambda x: sum(leaf.nbytes for leaf in jax.tree.leaves(x))
      # No gradient and no moment but the side network's.
      self.assertEqual(size(state.opt_state), size(own))
      compiled = jax.jit(step.update).lower(state, batch).compile()
      memory[name] = compiled.memory_analysis().temp_size_in_bytes
      if name == 'ladder':
        trained, _ = compiled(state, batch)
    print(
      f'ladder / LoRA, temporaries: {memory["ladder"] / memory["lora"]:.2f}'
    )
    self.assertLess(memory['ladder'], memory['lora'])
    before = tree.flatten(params_of(LADDER))
    for path, leaf in tree.flatten(trained.params).items():
      moved = not np.array_equal(leaf, before[path])
      self.assertEqual(moved, path.startswith('side/'), path)


def params_of(adapter):
  return built(adapter)[1]


class DiskTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(environments.one_device())
    self.folder = pathlib.Path(self.create_tempdir().full_path) / 'ladders'
    self.family, self.params = built(LADDER)
    self.batches = [small_adapted.batch(8, seed) for seed in (0, 1)]

  def test_training_from_disk(self):
    mj.adapters.save_ladders(
      self.folder, self.family, self.params, self.batches
    )
    found = list(
      mj.adapters.load_ladders(self.folder, self.family, self.params)
    )
    self.assertLen(found, 2)
    self.assertEqual(found[0]['encoder_ladders'].shape, (8, 2, 6, WIDTH))
    trainer = mj.training.Trainer(self.family, optax.sgd(0.1))
    fit = lambda batches: trainer.fit(batches, steps=2, params=self.params)
    one, other = fit(self.batches), fit(found)
    for path, leaf in tree.flatten(one.params).items():
      np.testing.assert_allclose(
        tree.flatten(other.params)[path], leaf, rtol=1e-5, atol=1e-6,
        err_msg=path,
      )  # fmt: skip
      moved = not np.array_equal(leaf, tree.flatten(self.params)[path])
      self.assertEqual(moved, path.startswith('side/'), path)
    self.continued()

  def continued(self):
    """What is there is not collected anew, and what is not is."""
    load = lambda family=self.family, params=self.params: list(
      mj.adapters.load_ladders(self.folder, family, params)
    )
    first, second = sorted(self.folder.glob('*.safetensors'))
    before, stamp = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    with self.assertRaisesRegex(errors.CheckpointError, 'is not whole'):
      load()
    save = lambda batches: mj.adapters.save_ladders(
      self.folder, self.family, self.params, batches
    )
    save(self.batches)
    self.assertEqual(second.read_bytes(), before)
    self.assertEqual(first.stat().st_mtime_ns, stamp)
    with self.assertRaisesRegex(errors.CheckpointError, 'of another batch'):
      save(self.batches[::-1])
    with self.assertRaisesRegex(errors.CheckpointError, 'is not whole'):
      load()  # the call before did not end
    save(self.batches)
    self.assertLen(load(), 2)
    # The same backbone with its layers scanned reads the same.
    scanned, _ = built(LADDER, scan_layers=True)
    base, own = self.family.split(self.params)
    stacked = scanned.plain.arranged(tree.flatten(base))
    params = scanned.joined(tree.unflatten(stacked), own)
    self.assertLen(load(scanned, params), 2)
    moved = tree.map_paths(lambda _, x: x + np.float32(1), self.params)
    with self.assertRaisesRegex(errors.CheckpointError, 'base .*, not '):
      load(params=moved)
    other = mj.adapters.adapt(
      self.family.plain, mj.adapters.ladder(reduction=4, encoder_layers=[0])
    )
    with self.assertRaisesRegex(errors.CheckpointError, r'\[1\], not \[0\]'):
      load(other)

  def test_mistakes(self):
    with self.assertRaisesRegex(errors.CheckpointError, 'no ladders.json'):
      mj.adapters.load_ladders(self.folder, self.family, self.params)
    lora, params = built(LORA)
    with self.assertRaisesRegex(errors.ConfigError, 'not for Lora'):
      mj.adapters.collect_ladders(lora, params, self.batches[0])
    dropping, params = built(
      mj.adapters.ladder(reduction=4, backbone_dropout=True), dropout_rate=0.1
    )
    with self.assertRaisesRegex(errors.ConfigError, 'backbone_dropout=False'):
      ladder_files.save_ladders(self.folder, dropping, params, self.batches)
    self.assertFalse(self.folder.exists())
    with self.assertRaisesRegex(errors.DataError, 'brings ladders'):
      brought = {**self.batches[0], 'decoder_ladders': jnp.zeros((8, 3, 5, 8))}
      dropping.check_batch(brought)


if __name__ == '__main__':
  absltest.main()
