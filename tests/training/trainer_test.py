# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The trainer: any model, any layout, from Python."""

import pathlib
import sys
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mergejax import models
from mergejax import partition
from mergejax import training
from mergejax.core import errors
from mergejax.core import tree
from mergejax.nn import lm
from mergejax.training import checkpoints as checkpoints_lib
from mergejax.training import losses
from mergejax.training import objective as objective_lib
from mergejax.training import step as step_lib

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import small_runs  # noqa: E402
import tiers

losses_of, mlp, one_device, pictures = (
  small_runs.losses_of,
  small_runs.mlp,
  small_runs.one_device,
  small_runs.pictures,
)


@tiers.slow('test_image_models_.*1')
class LayoutsTest(parameterized.TestCase):
  def test_sharded_replicated_and_tensor_parallel_are_one(self):
    module = lm.LanguageModel(
      lm.LMConfig(
        vocab_size=32, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16,
        num_layers=1,
      )
    )  # fmt: skip
    rng = np.random.default_rng(0)
    targets = rng.integers(3, 32, (16, 6)).astype(np.int32)
    data = {
      'decoder_input_tokens': np.pad(targets[:, :-1], [(0, 0), (1, 0)]),
      'decoder_target_tokens': targets,
    }
    folder = pathlib.Path(self.create_tempdir().full_path)
    optimizer = training.optim.adafactor(0.1, min_dim_size_to_factor=8)
    run = lambda steps, rules=None, **sizes: losses_of(
      module, steps, data, optimizer=optimizer, rules=rules,
      mesh=partition.make_mesh(**sizes), directory=folder / str(sizes),
    )  # fmt: skip
    replicated, _ = run(4, data=8)
    _, state = run(2, partition.fsdp(), data=2, model=4)
    kernel = state.params['decoder']['layers_0']['mlp']['wi_0']['kernel']
    self.assertEqual(kernel.addressable_shards[0].data.shape, (4, 4))
    moved = [
      leaf.addressable_shards[0].data.shape
      for path, leaf in tree.flatten(state.opt_state).items()
      if path.endswith('v_col/decoder/layers_0/mlp/wi_0/kernel')
    ]
    self.assertEqual(moved, [(4,)])
    # What was saved in these shards continues in others, moments included.
    (folder / str(dict(data=2, model=4))).rename(
      folder / str(dict(data=4, model=2))
    )
    rest, _ = run(4, data=4, model=2)
    np.testing.assert_allclose(rest, replicated[2:], rtol=1e-5)

  @parameterized.parameters(
    (dict(model_type='resnet', stages=(1,), channels=(4,), norm='batch'),),
    (dict(model_type='mlp', hidden=(5,)),),
  )
  def test_image_models_on_one_and_on_eight_devices(self, fields):
    self.check_image_model(fields)

  @parameterized.parameters(
    (dict(model_type='vgg', channels=(4, 0, 4), dense=(5,)),),
    (dict(model_type='vit', patch=4, emb_dim=8, num_heads=2, num_layers=1,
          mlp_dim=8),),
  )  # fmt: skip
  @pytest.mark.slow
  def test_further_image_models_on_one_and_on_eight_devices(self, fields):
    self.check_image_model(fields)

  def check_image_model(self, fields):
    module = models.build(dict(image_shape=(8, 8, 1), classes=3) | fields)
    one, first = losses_of(module, 3, pictures(), mesh=one_device())
    eight, second = losses_of(
      module, 3, pictures(), mesh=partition.make_mesh(data=4, model=2)
    )
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    self.assertNotEqual(one[0], one[1])
    # Running statistics have no moments, and are those of all rows.
    for path, leaf in tree.flatten(first.params).items():
      if 'batch_stats' in path:
        np.testing.assert_allclose(
          leaf, tree.flatten(second.params)[path], rtol=1e-4, atol=1e-6
        )

  def test_a_module_of_ones_own(self):
    class Mine(nn.Module):
      @nn.compact
      def __call__(self, x, *, train=False):
        x = nn.Dropout(0.1)(nn.relu(nn.Dense(4)(x)), deterministic=not train)
        return nn.Dense(3)(x)

    data = {
      'x': pictures()['images'].reshape(16, -1),
      'y': pictures()['labels'],
    }
    family = models.Classifier(
      Mine(), inputs='x', labels='y', example={k: v[:1] for k, v in data.items()},
      train_argument='train', rng_streams=('dropout',),
    )  # fmt: skip
    one, _ = losses_of(family, 3, data, mesh=one_device())
    eight, _ = losses_of(family, 3, data)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    other, _ = losses_of(family, 1, data, key=1)
    self.assertNotEqual(other[0], one[0])

  def test_what_a_classifier_was_not_told(self):
    class Normed(nn.Module):
      @nn.compact
      def __call__(self, x, train=False):
        return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x))

    data = {
      'inputs': pictures(8)['images'].reshape(8, -1),
      'labels': pictures(8)['labels'],
    }
    fit = lambda module, batch, **settings: training.Trainer(
      models.Classifier(module, example=data, **settings), optax.sgd(0.1)
    ).fit([batch], steps=1)
    with self.assertRaisesRegex(errors.StructureError, 'batch norms.*lost'):
      fit(Normed(), data, train_argument='train')
    state = fit(
      Normed(), data, train_argument='train', collections=['batch_stats']
    )
    self.assertIn('batch_stats', state.params)
    other = {'inputs': data['inputs'], 'y': data['labels']}
    with self.assertRaisesRegex(
      errors.DataError, "inputs, y, but not 'labels'"
    ):
      fit(nn.Dense(3), other)
    # To answer, it needs no label.
    family = models.Classifier(nn.Dense(3), example=data)
    params = family.init(jax.random.key(0))
    self.assertEqual(family.logits(params, other).shape, (8, 3))
    # Square, it would be broadcast.
    rows = np.ones((8, 8, 4), np.float32)
    square = {
      'inputs': rows, 'labels': np.zeros((8, 8), np.int32),
      'weights': np.ones(8, np.float32),
    }  # fmt: skip
    with self.assertRaisesRegex(errors.DataError, r'shape \[8\] for targets'):
      training.Trainer(
        models.Classifier(nn.Dense(3), example=square), optax.sgd(0.1)
      ).fit([square], steps=1)

  def test_a_given_state_is_left_as_it_is(self):
    trainer = training.Trainer(mlp(), optax.sgd(0.1))
    state = trainer.fit([pictures(8)], steps=1)
    first, second = [
      trainer.fit([pictures(8)], steps=2, state=state) for _ in range(2)
    ]
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    other = training.Trainer(
      mlp(), optax.sgd(0.1), transforms=[training.ema(0.5)]
    )
    with self.assertRaisesRegex(errors.StructureError, '- extras/ema/taken'):
      other.fit([pictures(8)], steps=2, state=state)

  def test_rows_that_do_not_divide(self):
    with self.assertRaisesRegex(errors.DataError, '6 rows.* over 8 data'):
      losses_of(mlp(), 1, pictures(), batch_size=6)

  def test_a_callback_that_fails_to_close_leaves_nothing_open(self):
    closed = []

    class Failing(training.Callback):
      def close(self):
        closed.append('failing')
        raise OSError('full')

    class Closing(training.Callback):
      def close(self):
        closed.append('closing')

    with (
      mock.patch.object(
        checkpoints_lib.Checkpoints, 'close',
        lambda self: closed.append('checkpoints'),
      ),
      self.assertRaisesRegex(OSError, 'full'),
    ):  # fmt: skip
      losses_of(
        mlp(), 1, pictures(), callbacks=[Failing(), Closing()],
        directory=self.create_tempdir().full_path,
      )  # fmt: skip
    self.assertEqual(closed, ['failing', 'closing', 'checkpoints'])

  def test_batches_that_end(self):
    trainer = training.Trainer(mlp(), optax.sgd(0.1))
    with self.assertRaisesRegex(errors.DataError, 'ended after 2'):
      trainer.fit([pictures(8)] * 2, steps=3)


class CompilationsTest(parameterized.TestCase):
  """Of one trainer, what is the same is compiled once."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.compiled = []
    jax.monitoring.register_event_duration_secs_listener(
      lambda event, *_, **__: (
        cls.compiled.append(event) if 'backend_compile' in event else None
      )
    )

  def count(self, trainer, rows=8, **settings):
    """`(the state, compilations)` of a run."""
    batches = [{n: leaf[:rows] for n, leaf in pictures().items()}] * 3
    before = len(self.compiled)
    state = trainer.fit(batches, **dict(steps=3, log_every=3) | settings)
    return state, len(self.compiled) - before

  def test_a_second_run_compiles_nothing(self):
    trainer = training.Trainer(mlp(), optax.sgd(0.1, momentum=0.9))
    first, count = self.count(trainer)
    self.assertGreater(count, 0)
    before = jax.tree.map(np.array, first)
    again, count = self.count(trainer)
    self.assertEqual(count, 0)
    jax.tree.map(np.testing.assert_array_equal, again, before)
    # The step of a plain optimizer is the same whatever the number of steps,
    # and what a run gave is nobody else's: donation leaves it whole.
    _, count = self.count(trainer, steps=2)
    self.assertEqual(count, 0)
    given = jax.tree.map(np.array, first)
    self.count(trainer, steps=5, state=first)
    on, count = self.count(trainer, steps=5, state=first)
    self.assertEqual(count, 0)
    self.assertEqual(int(on.step), 5)
    jax.tree.map(np.testing.assert_array_equal, first, given)

  def test_what_differs_is_compiled_again(self):
    trainer = training.Trainer(mlp(), lambda steps: optax.sgd(1 / steps))
    ends = [self.count(trainer, steps=steps) for steps in (1, 2, 1)]
    for _, count in ends:
      self.assertGreater(count, 0)
    kernel = lambda i: np.asarray(jax.tree.leaves(ends[i][0].params)[1])
    np.testing.assert_array_equal(kernel(0), kernel(2))
    self.assertGreater(np.abs(kernel(1) - kernel(0)).max(), 1e-6)
    # Other rows: the step alone. Another layout: all.
    self.assertEqual(self.count(trainer, steps=1, rows=16)[1], 1)
    trainer.rules = partition.fsdp()
    self.assertGreater(self.count(trainer, steps=1)[1], 1)
    trainer.mesh = one_device()
    state, count = self.count(trainer, steps=1)
    self.assertGreater(count, 1)
    self.assertLen(state.step.sharding.device_set, 1)


class GradientsTest(parameterized.TestCase):
  @parameterized.parameters(*losses.NORMALIZERS, None, 3.0)
  def test_parts_of_a_batch_add_up_to_the_whole(self, kind):
    self.check_parts(kind, 4)

  @parameterized.parameters(*losses.NORMALIZERS, None, 3.0)
  @pytest.mark.slow
  def test_halves_of_a_batch_add_up_to_the_whole(self, kind):
    self.check_parts(kind, 2)

  def check_parts(self, kind, parts):
    batch = pictures(8)
    # Parts of other weight, one of them of none.
    batch['weights'] = np.array([1, 0, 0.5, 1, 1, 0, 2, 0], np.float32)
    objective = objective_lib.cross_entropy(normalizing_factor=kind)
    found = []
    for accumulate in (1, parts):
      step = step_lib.make_step(
        mlp(), optax.sgd(1.0), objective=objective, accumulate=accumulate
      )
      params = models.family_of(mlp()).init(jax.random.key(0))
      state = step.init(params, jax.random.key(0))
      found.append(jax.jit(step.update)(state, batch))
    (whole, metrics), (summed, others) = found
    for path, leaf in tree.flatten(whole.params).items():
      np.testing.assert_allclose(
        tree.flatten(summed.params)[path], leaf, rtol=1e-5, atol=1e-6
      )
    for name, value in metrics.items():
      np.testing.assert_allclose(others[name], value, rtol=1e-5, err_msg=name)

  def test_parts_read_the_model_once(self):
    calls = []

    def counted(*arguments):
      calls.append(arguments)
      return objective_lib.cross_entropy()(*arguments)

    step = step_lib.make_step(
      mlp(), optax.sgd(1.0), objective=counted, accumulate=4
    )
    params = models.family_of(mlp()).init(jax.random.key(0))
    state = step.init(params, jax.random.key(0))
    jax.eval_shape(step.update, state, pictures(8))
    self.assertLen(calls, 1)

  @parameterized.parameters(*losses.NORMALIZERS, None, 3.0)
  def test_losses_of_the_model_count_once_in_parts_too(self, kind):
    data = dict(
      inputs=pictures(8)['images'].reshape(8, -1), labels=pictures(8)['labels']
    )
    family = Auxiliary(nn.Dense(3), example=data)
    params = family.init(jax.random.key(0))
    objective = objective_lib.cross_entropy(normalizing_factor=kind)
    found = []
    for accumulate in (1, 4):
      step = step_lib.make_step(
        family, optax.sgd(1.0), objective=objective, accumulate=accumulate
      )
      found.append(
        jax.jit(step.update)(step.init(params, jax.random.key(0)), data)
      )
    (whole, metrics), (summed, others) = found
    for name in params:
      np.testing.assert_allclose(
        summed.params[name], whole.params[name], rtol=1e-5, atol=1e-6
      )
    for name in ('size', 'grad_norm'):
      np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5)

  def test_running_statistics_stay_where_told_to(self):
    module = models.build(
      dict(model_type='resnet', stages=(1,), channels=(4,), norm='batch',
           image_shape=(8, 8, 1), classes=3)
    )  # fmt: skip
    params = models.family_of(module).init(jax.random.key(0))
    before = tree.flatten(params)
    step = step_lib.make_step(
      module, optax.sgd(0.1), freeze=['batch_stats/stem_norm/.*', 'stem.*']
    )
    state = step.init(params, jax.random.key(0))
    after, _ = jax.jit(step.update)(state, pictures(8))
    for path, leaf in tree.flatten(after.params).items():
      stays = path.startswith(('stem', 'batch_stats/stem'))
      self.assertEqual(not np.any(leaf != before[path]), stays, path)

  def test_clipping(self):
    step = lambda clip: step_lib.make_step(mlp(), optax.sgd(1.0), clip=clip)
    params = models.family_of(mlp()).init(jax.random.key(0))
    moved = {}
    for clip in (None, 0.01, 1e6):
      state = step(clip).init(params, jax.random.key(0))
      state, metrics = jax.jit(step(clip).update)(state, pictures(8))
      delta = jax.tree.map(jnp.subtract, state.params, params)
      moved[clip] = float(optax.tree.norm(delta))
    np.testing.assert_allclose(moved[None], metrics['grad_norm'], rtol=1e-4)
    np.testing.assert_allclose(moved[1e6], moved[None], rtol=1e-6)
    np.testing.assert_allclose(moved[0.01], 0.01, rtol=1e-3)

  def test_what_is_frozen_has_no_moments(self):
    module = mlp(hidden=(5, 4))
    family = models.family_of(module)
    step = step_lib.make_step(
      module, optax.adam(0.1), freeze=['dense_0/.*', '.*bias']
    )
    params = family.init(jax.random.key(0))
    state = step.init(params, jax.random.key(0))
    moments = {
      path for path in tree.flatten(state.opt_state) if 'mu' in path.split('/')
    }
    self.assertEqual(
      {path.split('mu/')[1] for path in moments},
      {'dense_1/kernel', 'head/kernel'},
    )
    with jax.numpy_dtype_promotion('standard'):
      after, _ = jax.jit(step.update)(state, pictures(8))
    for path, leaf in tree.flatten(after.params).items():
      changed = bool(np.any(leaf != tree.flatten(params)[path]))
      self.assertEqual(changed, path in ('dense_1/kernel', 'head/kernel'), path)
    for pattern, message in (
      ('dense', 'matches no parameter'), ('(dense', 'not a regular expression'),
    ):  # fmt: skip
      with self.assertRaisesRegex(errors.ConfigError, message):
        step_lib.make_step(module, optax.adam(0.1), freeze=[pattern]).init(
          params, jax.random.key(0)
        )


class Auxiliary(models.Classifier):
  """A model that brings a loss and a metric of its own."""

  def apply(self, variables, batch, **settings):
    outputs = super().apply(variables, batch, **settings)
    return outputs._replace(
      losses={'size': 0.1 * jnp.mean(outputs.logits**2)},
      metrics={'largest': jnp.max(outputs.logits)},
    )


class ObjectiveTest(absltest.TestCase):
  def test_losses_of_the_model_are_added(self):
    data = {'inputs': pictures()['images'].reshape(16, -1)[:8],
            'labels': pictures()['labels'][:8]}  # fmt: skip
    family = Auxiliary(nn.Dense(3), example=data)
    params = family.init(jax.random.key(0))
    value, metrics = objective_lib.make_loss(family)(params, data)
    outputs = family.apply(family.variables(params), data)
    np.testing.assert_allclose(
      value,
      metrics['loss'] + metrics['z_loss'] + 0.1 * jnp.mean(outputs.logits**2),
      rtol=1e-5,
    )
    self.assertIn('largest', metrics)
    np.testing.assert_allclose(metrics['size'], outputs.losses['size'])

  def test_one_of_ones_own(self):
    def squares(family, params, batch, rngs):
      outputs = family.apply(
        family.variables(params), batch, train=True, rngs=rngs
      )
      return jnp.mean(outputs.logits**2), outputs

    seen, _ = losses_of(mlp(), 3, pictures(), objective=squares)
    self.assertLess(seen[-1], seen[0])


if __name__ == '__main__':
  absltest.main()
