# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models with experts: flaxformer's numbers, decoding, training, merging."""

import dataclasses
import functools
import json
import pathlib
import sys

from absl.testing import absltest
from absl.testing import parameterized
import drawn
import flax.serialization
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergejax as mj
from mergejax import models
from mergejax import partition
from mergejax import statistics
from mergejax import training
from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.training import objective
from mergejax.training import t5x_state

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / 'training'))
import small_runs  # noqa: E402

SIZES = dict(
  vocab_size=40, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16
)  # fmt: skip
MOE = dict(num_experts=4, group_size=8, min_capacity=1)


def t5_family(**moe):
  return models.family_of(
    models.build(
      dict(model_type='t5x', num_encoder_layers=2, num_decoder_layers=2,
           **SIZES, moe={**MOE, **moe})
    )
  )  # fmt: skip


def lm_family(moe, layers=2, **settings):
  return models.family_of(
    models.build(
      dict(model_type='lm', num_layers=layers, **SIZES, **settings,
           moe={**MOE, **moe})
    )
  )  # fmt: skip


def rows(count, length=8, seed=0):
  """A batch of a decoder-only model, the ends of some rows padding."""
  rng = np.random.default_rng(seed)
  targets = rng.integers(3, 40, (count, length)).astype(np.int32)
  targets[::2, -2:] = 0
  return {
    'decoder_input_tokens': np.pad(targets[:, :-1], [(0, 0), (1, 0)]),
    'decoder_target_tokens': targets,
  }


class GoldenTest(absltest.TestCase):
  """flaxformer's encoder-decoder, its loss as T5X computes it."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.arrays = goldens.load('moe_flaxformer_model')
    cls.family = t5_family(
      top_k=2, group_size=64, batch_prioritised=True, z_loss=1e-3,
      legacy_padding='routed', train_capacity_factor=2.0,
    )  # fmt: skip
    cls.params = goldens.subtree(cls.arrays, 'params/')
    cls.batch = goldens.subtree(cls.arrays, 'batch/')

    @jax.jit
    def outputs(params, batch):
      # The golden loss was computed with dropout disabled: in evaluation.
      loss, outputs = objective.cross_entropy()(cls.family, params, batch, {})
      _, left = cls.family.call(
        {'params': params}, batch, mutable=['intermediates']
      )
      return loss, outputs.logits, left['intermediates'], outputs.metrics

    cls.loss, cls.logits, cls.left, cls.metrics = outputs(cls.params, cls.batch)

  def test_tree_and_axes(self):
    specs = self.family.specs()
    names = self.arrays['axes_names'].tolist()
    axes = self.arrays['axes_values'].tolist()
    wanted = {
      name.removesuffix('_axes'): tuple(own.split(','))
      for name, own in zip(names, axes)
    }
    self.assertEqual({path: spec.axes for path, spec in specs.items()}, wanted)
    shapes = {p: x.shape for p, x in tree_lib.flatten(self.params).items()}
    self.assertEqual({p: spec.shape for p, spec in specs.items()}, shapes)

  def test_logits_and_loss(self):
    np.testing.assert_allclose(
      self.logits, self.arrays['logits'], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(self.loss, self.arrays['loss'], rtol=1e-5)

  def test_metrics(self):
    left = tree_lib.flatten(self.left)
    names = [name for name in self.arrays if name.startswith('metrics/')]
    self.assertLen(names, 10)
    for name in names:
      np.testing.assert_allclose(
        left[name.removeprefix('metrics/')], self.arrays[name], rtol=1e-4,
        atol=1e-5, err_msg=name,
      )  # fmt: skip
    means = np.mean([self.arrays[n] for n in names if n.endswith('usage')])
    np.testing.assert_allclose(
      self.metrics['moe/expert_usage'], means, rtol=1e-5
    )
    np.testing.assert_allclose(
      self.metrics['router_balance_loss'],
      0.01 * self.metrics['moe/auxiliary_loss'], rtol=1e-6,
    )  # fmt: skip

  def test_a_checkpoint_of_t5x(self):
    """Written as T5X does, it opens with its axes."""
    path = pathlib.Path(self.create_tempdir().full_path) / 'checkpoint_1'
    mj.save_checkpoint(path, self.params, 't5x')
    file = path / 'checkpoint'
    data = flax.serialization.msgpack_restore(file.read_bytes())
    axes = {
      name: {'names': {str(i): n for i, n in enumerate(own.split(','))}}
      for name, own in zip(
        self.arrays['axes_names'].tolist(), self.arrays['axes_values'].tolist()
      )
    }
    data['optimizer']['flax_mutables'] = {
      'params_axes': tree_lib.unflatten(axes)
    }
    file.write_bytes(flax.serialization.msgpack_serialize(data))
    store = mj.open_checkpoint(path)
    wanted = {p: (s.shape, s.axes) for p, s in self.family.specs().items()}
    found = {p: (s.shape, s.axes) for p, s in store.specs().items()}
    self.assertEqual(found, wanted)
    leaf = 'encoder/layers_1/mlp/expert/wo/kernel'
    np.testing.assert_array_equal(
      tree_lib.flatten(store.read([leaf]))[leaf],
      tree_lib.flatten(self.params)[leaf],
    )

  def test_a_config_tells_it_all(self):
    told = json.loads(json.dumps(models.describe(self.family)))
    self.assertEqual(models.build(told).config, self.family.config)
    dense = models.build(dict(model_type='t5x', **SIZES))
    self.assertNotIn('moe', models.describe(dense))


class ChoicesTest(absltest.TestCase):
  def test_padding_behind_an_answer_takes_no_room(self):
    family = t5_family(
      encoder_layers=0, eval_capacity_factor=1.0, group_size=64
    )
    params = drawn.params(family)
    rng = np.random.default_rng(0)
    choices = rng.integers(3, 40, (2, 4, 4)).astype(np.int32)
    choices[:, ::2, 2:] = 0
    inputs = rng.integers(3, 40, (2, 4)).astype(np.int32)
    answers = choices.reshape(-1, 4)

    @jax.jit
    def both(params):
      found = family.choice_logits(
        family.variables(params), {'encoder_input_tokens': inputs}, choices
      )
      batch = {
        'encoder_input_tokens': np.repeat(inputs, 4, 0),
        'decoder_input_tokens': np.pad(answers[:, :-1], [(0, 0), (1, 0)]),
        'decoder_target_tokens': answers,
      }
      return found.reshape(*answers.shape, -1), family.logits(params, batch)

    found, wanted = both(params)
    real = answers > 0
    np.testing.assert_allclose(found[real], wanted[real], rtol=1e-4, atol=1e-4)


class DecodingTest(parameterized.TestCase):
  @parameterized.parameters('tokens_choose', 'gshard')
  def test_with_a_cache_it_says_the_same(self, router):
    """Where nothing is dropped, position by position is all at once."""
    family = lm_family(
      dict(router=router, top_k=2, eval_capacity_factor=None, decoder_layers=1),
      layers=1,
    )
    params = drawn.params(family)
    batch = rows(3, 5)
    batch['decoder_target_tokens'] = np.maximum(
      batch['decoder_target_tokens'], 1
    )
    whole = jax.jit(family.logits)(params, batch)
    cache = family.init_cache(params, batch, 5)
    step = jax.jit(family.decode_step)
    for i in range(5):
      tokens = jnp.asarray(batch['decoder_input_tokens'][:, i])
      found, cache = step(params, cache, tokens)
      np.testing.assert_allclose(found, whole[:, i], rtol=1e-4, atol=1e-4)


class TrainingTest(absltest.TestCase):
  @pytest.mark.slow  # meshes: of the layer `moe_test`, of training `trainer_test`
  def test_a_mesh_learns_what_one_device_learns(self):
    """The ordinary trainer; losses of the router among its own."""
    moe = dict(
      top_k=2, z_loss=1e-3, train_capacity_factor=1.0, decoder_layers=1
    )
    module = lm_family(moe, layers=1).module
    data = rows(16)
    folder = pathlib.Path(self.create_tempdir().full_path)
    optimizer = training.optim.adafactor(0.03, min_dim_size_to_factor=8)
    run = lambda **sizes: small_runs.losses_of(
      module, 3, data, optimizer=optimizer, mesh=partition.make_mesh(**sizes),
      directory=folder / str(sizes),
    )  # fmt: skip
    one, _ = run(data=1, devices=jax.devices()[:1])
    many, _ = run(data=2, expert=2, model=2)
    np.testing.assert_allclose(many, one, rtol=2e-4)
    self.assertLess(one[-1], one[0])

  def test_losses_and_metrics_are_told(self):
    family = lm_family(dict(z_loss=1e-3, balance_loss=0.5))
    params = drawn.params(family)
    loss = objective.make_loss(family)
    value, metrics = jax.jit(loss)(params, rows(4), jax.random.key(1))
    extra = metrics['router_balance_loss'] + metrics['router_z_loss']
    self.assertGreater(float(extra), 0.5)
    self.assertAlmostEqual(
      float(value), float(metrics['loss'] + metrics['z_loss'] + extra), places=4
    )
    for name in ('dropped_pairs', 'router_entropy', 'expert_load/3'):
      self.assertEqual(metrics[f'moe/{name}'].shape, ())

  def test_experts_are_factored_each_by_itself(self):
    family = lm_family({})
    specs = family.specs()
    path = 'decoder/layers_1/mlp/expert/wi_0/kernel'
    rules = training.factors.Factors(training.factors.STANDARD)
    found = training.factors.layouts(specs, rules)[path]
    self.assertEqual((found.stack, found.rows, found.columns),
                     ((0,), (1,), (2,)))  # fmt: skip


class T5xStateTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_moments_of_experts_there_and_back(self, rules):
    """`expert` is a stack: a row and a column of moments for each."""
    family = t5_family()
    specs = family.specs()
    optimizer = training.optim.adafactor(
      0.03, min_dim_size_to_factor=4,
      logical_factor_rules=training.factors.STANDARD if rules else None,
    )  # fmt: skip
    trainer = training.Trainer(family, optimizer)
    rng = np.random.default_rng(0)
    begun = trainer.begin(9, drawn.params(family), jax.random.key(0))
    drawn_like = lambda x: (
      rng.random(x.shape).astype(x.dtype)
      if x.shape[-1:] != (1,) and jnp.issubdtype(x.dtype, jnp.floating)
      else np.asarray(x)
    )
    state = begun.replace(
      step=np.int32(0), opt_state=jax.tree.map(drawn_like, begun.opt_state)
    )
    moments = t5x_state.to_t5x(state.opt_state, specs, optimizer)
    path = 'decoder/layers_1/mlp/expert'
    for name, row, column in (('wi_0', 8, 16), ('wo', 8, 16)):
      at = f'{path}/{name}/kernel'
      shapes = [moments[f'{at}/v_{n}'].shape for n in ('row', 'col')]
      self.assertCountEqual(shapes, [(4, row), (4, column)])
    out = t5x_state.save(
      self.create_tempdir().full_path, family, optimizer, state
    )
    again = trainer.begin(
      9, mj.open_checkpoint(out).read(), jax.random.key(0),
      mj.checkpoints.checkpoint.open_state(out),
    )  # fmt: skip
    for part in ('params', 'opt_state'):
      found, wanted = (getattr(each, part) for each in (again, state))
      jax.tree.map(np.testing.assert_array_equal, found, wanted)


class ScannedTest(absltest.TestCase):
  def test_all_layers_sparse(self):
    moe = dict(decoder_layers=2, eval_capacity_factor=1.0)
    apart, scanned = lm_family(moe), lm_family(moe, scan_layers=True)
    params = drawn.params(apart)
    batch = rows(4)
    stacked = tree_lib.unflatten(scanned.arranged(tree_lib.flatten(params)))
    self.assertEqual(
      {p: s.shape for p, s in scanned.specs().items()},
      {p: x.shape for p, x in tree_lib.flatten(stacked).items()},
    )
    run = lambda family, params: jax.jit(
      lambda params: family.apply(family.variables(params), batch)
    )(params)
    one, other = run(apart, params), run(scanned, stacked)
    np.testing.assert_allclose(one.logits, other.logits, rtol=1e-4, atol=1e-5)
    self.assertEqual(set(one.metrics), set(other.metrics))
    for name in one.metrics:
      np.testing.assert_allclose(
        one.metrics[name], other.metrics[name], rtol=1e-4, atol=1e-6
      )


class MergingTest(absltest.TestCase):
  """Axes travel with leaves: experts are merged each by itself."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    # Room for every token in any expert.
    cls.family = lm_family(dict(eval_capacity_factor=4.0), layers=2)
    cls.base, *cls.trees = [drawn.params(cls.family, k) for k in range(3)]

  def test_ties_of_a_stack_is_that_of_its_slices(self):
    path = 'decoder/layers_1/mlp/expert/wi_0/kernel'
    pick = lambda tree, e=None: {
      'kernel': tree_lib.flatten(tree)[path][slice(None) if e is None else e]
    }
    axes = [('kernel', ('expert', 'mlp_embed', 'expert_mlp'))]
    merge = functools.partial(
      mj.merge, method='ties', density=0.3, trim_scope='tensor'
    )
    whole = merge(
      [pick(t) for t in self.trees], base=pick(self.base), axes=axes
    )
    for e in range(4):
      own = merge([pick(t, e) for t in self.trees], base=pick(self.base, e))
      np.testing.assert_array_equal(whole['kernel'][e], own['kernel'])

  def test_grams_are_of_the_tokens_of_an_expert(self):
    batch = rows(4)
    found = statistics.collect(
      statistics.gram(include=[r'.*/mlp/expert/.*', r'.*/router_weights/.*']),
      self.family.module, self.base, [batch],
    )  # fmt: skip
    at = 'decoder/layers_1/mlp'
    router = found[f'{at}/router/router_weights/w/kernel']['gram']
    counts = found[f'{at}/expert/wi_0/kernel']['count']
    grams = found[f'{at}/expert/wi_0/kernel']['gram']
    self.assertEqual(grams.shape, (4, 8, 8))
    real = float(np.sum(batch['decoder_target_tokens'] > 0))
    self.assertEqual(float(np.sum(counts)), real)
    # Every token has one expert: together they see what the router sees.
    np.testing.assert_allclose(
      np.einsum('eij,e->ij', grams, counts) / real, router, rtol=1e-4, atol=1e-5
    )


class ErrorsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('field', lambda: t5_family(experts=3), 'num_experts'),
    ('number', lambda: models.build(dict(model_type='lm', moe={'top_k': 1})),
     'how many experts'),
    ('no settings', lambda: models.build(dict(model_type='lm', moe=8)),
     'settings by name'),
    ('mixed', lambda: lm_family(dict(decoder_layers=2), 3), 'evenly'),
    ('scanned', lambda: lm_family({}, scan_layers=True), 'scan_layers=True'),
    ('prioritised', lambda: lm_family(dict(batch_prioritised=True)),
     'is for encoders'),
    ('causal', lambda: t5_family(router='experts_choose'), 'allow_noncausal'),
  )  # fmt: skip
  def test_message(self, make, words):
    with self.assertRaisesRegex(errors.ConfigError, words):
      make()

  def test_adapters_leave_experts_alone(self):
    family = lm_family({})
    call = lambda targets: jax.eval_shape(
      lambda key: (lambda adapted: adapted.logits(adapted.init(key), rows(4)))(
        mj.adapters.adapt(family, mj.adapters.lora(targets=targets))
      ),
      jax.random.key(0),
    )
    with self.assertRaisesRegex(errors.StructureError, 'kernels of experts'):
      call('.*/wo/kernel')
    self.assertEqual(call('(?!.*/expert/).*/wo/kernel').shape, (4, 8, 40))

  def test_hugging_face_has_no_experts(self):
    fields = dataclasses.asdict(t5_family().config)
    for name, conversion in models.family_class('t5x').conversions.items():
      with self.subTest(name):
        with self.assertRaisesRegex(errors.UserError, 'to_dense'):
          conversion.write_config(fields)


if __name__ == '__main__':
  absltest.main()
