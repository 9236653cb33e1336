# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Coefficients by gradient: against autodiff, sharded, killed and resumed."""

import pathlib
import signal
import sys

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mergejax import partition
from mergejax.checkpoints import base as store_base
from mergejax.core import errors
from mergejax.search import gradient

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import small_models  # noqa: E402

make_models = small_models.make_models


def square_loss(params, batch, temperature):
  hidden = jnp.tanh(batch @ params['layers_0']['w'])
  out = temperature * jnp.sum(hidden @ params['layers_1']['w'].T, axis=1)
  return jnp.mean(jnp.square(out - 1)) + jnp.sum(jnp.square(params['norm']))


class GradientTest(parameterized.TestCase):
  @parameterized.parameters(
    ('model', 'none'), ('block', 'softmax'), ('leaf', 'softmax')
  )
  def test_streamed_gradient_equals_autodiff(self, granularity, constraint):
    self.check_gradient(granularity, constraint)

  @parameterized.parameters(
    ('model', 'softmax'), ('block', 'none'), ('leaf', 'none')
  )
  @pytest.mark.slow
  def test_streamed_gradient_by_the_other_constraint(
    self, granularity, constraint
  ):
    self.check_gradient(granularity, constraint)

  def check_gradient(self, granularity, constraint):
    models, origin = make_models(), make_models(1, seed=1)[0]
    batch = jnp.asarray(
      np.random.default_rng(2).normal(size=(5, 4)), jnp.float32
    )
    step = gradient.learn(
        models, square_loss, [batch], granularity=granularity,
        constraint=constraint, base_model=origin, optimizer=optax.sgd(1.0),
        temperature=False,
    )  # fmt: skip
    groups = list(step.raw)
    self.assertLen(groups, {'model': 1, 'block': 3, 'leaf': 3}[granularity])

    def whole(raw):
      mixed = {}
      for path, leaf in {
        'layers_0/w': origin['layers_0']['w'],
        'layers_1/w': origin['layers_1']['w'],
        'norm': origin['norm'],
      }.items():
        if granularity == 'model':
          group = '*'
        elif granularity == 'leaf':
          group = path
        else:
          group = next((g for g in groups if g in path), '*')
        weights = raw[group]
        if constraint == 'softmax':
          weights = jax.nn.softmax(weights)
        get = lambda m, path=path: (
          m['norm'] if path == 'norm' else m[path[:8]]['w']
        )
        mixed[path] = leaf + sum(
          weights[k] * (get(m) - leaf) for k, m in enumerate(models)
        )
      return square_loss({
          'layers_0': {'w': mixed['layers_0/w']},
          'layers_1': {'w': mixed['layers_1/w']}, 'norm': mixed['norm'],
      }, batch, 1.0)  # fmt: skip

    raw = {g: jnp.full(3, 0.3) for g in groups}
    value, expected = jax.value_and_grad(whole)(raw)
    self.assertAlmostEqual(step.losses[0], float(value), places=4)
    for g in groups:
      np.testing.assert_allclose(
        0.3 - step.raw[g], expected[g], rtol=1e-4, atol=2e-6
      )

  def test_a_dominated_model_shrinks(self):
    models = [{'w': np.zeros(3, np.float32)}, {'w': np.full(3, 5, np.float32)}]
    loss = lambda params, batch, temperature: jnp.sum(jnp.square(params['w']))
    learned = gradient.learn(models, loss, [None] * 30, temperature=False)
    weights = learned.coefficients['*']
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    self.assertLess(weights[1], 0.25)
    self.assertLess(learned.losses[-1], learned.losses[0])

  def test_sharded_equals_unsharded(self):
    mesh = partition.make_mesh(data=2, model=4)
    layout = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec('model', 'data')
    )
    rng = np.random.default_rng(0)
    models = [
      {'w': rng.normal(size=(8, 4)).astype(np.float32)} for _ in range(3)
    ]
    loss = lambda p, batch, temperature: jnp.sum(jnp.square(p['w'] - batch))
    one = gradient.learn(models, loss, [1.0] * 5)
    spread = [jax.device_put(m, layout) for m in models]
    many = gradient.learn(spread, loss, [1.0] * 5)
    self.assertEqual(many.params['w'].sharding.device_set, set(jax.devices()))
    np.testing.assert_allclose(one.losses, many.losses, rtol=1e-5)
    np.testing.assert_allclose(
      one.coefficients['*'], many.coefficients['*'], rtol=1e-5
    )

  def test_killed_and_resumed_gives_the_same_bits(self):
    journal = pathlib.Path(self.create_tempdir().full_path) / 'journal'
    models = make_models()
    batches = list(np.random.default_rng(2).normal(size=(9, 5, 4)))
    batches = [jnp.asarray(b, jnp.float32) for b in batches]
    whole = gradient.learn(models, square_loss, batches, granularity='leaf')

    def progress(step, loss):
      if step == 5:
        raise KeyboardInterrupt

    run = lambda **more: gradient.learn(
        models, square_loss, batches, granularity='leaf', journal=journal,
        save_every=2, **more,
    )  # fmt: skip
    with self.assertRaises(KeyboardInterrupt):
      run(progress=progress)
    again = run()
    self.assertEqual(again.losses, whole.losses)
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    self.assertFalse(journal.exists())

    def terminate(step, loss):
      self.assertGreater(step, 0)
      if step == 5:
        signal.raise_signal(signal.SIGTERM)

    with self.assertRaisesRegex(errors.Stopped, 'after 5 updates'):
      run(progress=terminate)
    steps = []
    again = run(progress=lambda step, loss: steps.append(step))
    self.assertEqual(steps, [6, 7, 8, 9])  # all five were kept, not four
    self.assertEqual(again.losses, whole.losses)
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    with self.assertRaises(KeyboardInterrupt):
      run(progress=progress)
    with self.assertRaisesRegex(errors.UserError, 'constraint: softmax there'):
      run(constraint='clip')

  def test_entropy(self):
    self.enterContext(jax.enable_x64(True))
    arrays = goldens.load('ties_global_trim')
    value, told = gradient.entropy(jnp.asarray(arrays['entropy_logits']))
    np.testing.assert_allclose(value, arrays['entropy_loss'], rtol=1e-5)
    self.assertBetween(float(told['largest_class']), 0.2, 1.0)
    padded = np.pad(arrays['entropy_logits'], ((0, 2), (0, 0)))
    weights = jnp.asarray(
      np.arange(len(padded)) < len(padded) - 2, padded.dtype
    )
    # However small the weights are, and whatever stands in rows without any.
    padded[-1] = np.nan
    weights = weights / 64
    again, _ = gradient.entropy(jnp.asarray(padded), weights)
    np.testing.assert_allclose(again, value, rtol=1e-6)

  def test_stacked_layers_are_refused_where_they_would_have_coefficients(self):
    apart = [
      {name: leaf for name, leaf in model.items() if name != 'norm'}
      for model in make_models(2)
    ]
    stacked = [
      store_base.MemoryStore(
        {'layers': {'w': np.stack([m[f'layers_{i}']['w'] for i in range(2)])}},
        axes=[('layers/w', ('layers', 'embed', 'mlp'))],
      )
      for m in apart
    ]
    loss = lambda params, batch, temperature: sum(
      jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params)
    )
    for granularity in ('block', 'leaf'):
      with self.assertRaisesRegex(errors.UserError, r'layers/w \[2, 4, 3\]'):
        gradient.learn(stacked, loss, [None], granularity=granularity)
    # One coefficient a model is the same, however the layers lie.
    np.testing.assert_allclose(
      gradient.learn(stacked, loss, [None]).coefficients['*'],
      gradient.learn(apart, loss, [None]).coefficients['*'],
      rtol=1e-5,
    )

  def test_bad_input(self):
    models = make_models(2)
    nan = lambda params, batch, temperature: jnp.nan * params['norm'][0]
    with self.assertRaisesRegex(errors.UserError, 'loss of update 0'):
      gradient.learn(models, nan, [None])
    with self.assertRaisesRegex(errors.UserError, 'at least one'):
      gradient.learn([], nan, [None])
    with self.assertRaisesRegex(errors.UserError, "'leaf'"):
      gradient.learn(models, nan, [None], granularity='leav')


if __name__ == '__main__':
  absltest.main()
