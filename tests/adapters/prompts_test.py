# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Prompt tuning, SPoT and ATTEMPT against the released code's numbers."""

import math

from absl.testing import absltest
from absl.testing import parameterized
import environments
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax
import small_adapted
import tiers

import mergejax as mj
from mergejax.adapters import base as base_lib
from mergejax.core import errors
from mergejax.core import tree
from mergejax.training import losses

CLOSE = dict(rtol=1e-4, atol=2e-5)
# Pads take part in the maximum there, and the temperature is one of its options.
CASES = {
  'single': dict(),
  'multi': dict(tasks=3),
  'single_temp2087': dict(),
  'ignore_target': dict(ignore_target=True),
  'constant': dict(attention='constant'),
}


@tiers.slow('test_attempt[02]')
class GoldenTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.arrays = goldens.load('attempt')
    cls.family, cls.base = small_adapted.of_golden(cls.arrays, tied=True)
    labels = cls.arrays['labels']
    cls.batch = {
      'encoder_input_tokens': cls.arrays['input_ids'],
      'decoder_input_tokens': np.pad(labels, ((0, 0), (1, 0)))[:, :-1],
      'decoder_target_tokens': labels,
    }

  def leaves(self, tasks=None):
    target = self.arrays['target_prompts']
    found = {
      'prompts/source': self.arrays['source_prompts'],
      'prompts/target': target[0] if tasks is None else target,
      **small_adapted.attempt_of_golden(self.arrays),
    }
    return tree.unflatten(found)

  def check(self, name, adapted, params, batch):
    logits = jax.jit(adapted.logits)(params, batch)
    np.testing.assert_allclose(logits, self.arrays[f'{name}/logits'], **CLOSE)
    loss, _ = losses.token_cross_entropy(logits, self.arrays['labels'])
    counted = self.arrays['labels'] > 0
    np.testing.assert_allclose(
      np.mean(np.asarray(loss)[counted]), self.arrays[f'{name}/loss'], **CLOSE
    )

  @parameterized.parameters(*CASES)
  def test_attempt(self, name):
    settings = CASES[name]
    adapter = mj.adapters.attempt(
      sources=3, length=4, width=self.leaves()['attempt']['down'].shape[1],
      temperature=float(self.arrays[f'{name}/temperature']),
      mask_pad_in_pool=False, **settings,
    )  # fmt: skip
    adapted = mj.adapters.adapt(self.family, adapter)
    params = adapted.joined(self.base, self.leaves(settings.get('tasks')))
    batch = dict(self.batch)
    if 'tasks' in settings:
      batch['task_ids'] = self.arrays['multi/task_ids']
    self.check(name, adapted, params, batch)
    embedded = self.base['token_embedder']['embedding'][
      batch['encoder_input_tokens']
    ]
    own = {p: tree.flatten(params)[p] for p in adapted.adapter_specs}
    call = base_lib.Call(self.family, adapted.base_specs, own, batch)
    real = batch['encoder_input_tokens'] > 0
    found = adapter.mixture(call, jnp.asarray(embedded), jnp.asarray(real))
    for field, golden in (
      ('pooled', 'pooled_input'), ('query', 'query'), ('scores', 'scores'),
      ('attention', 'attention'), ('prompt', 'soft_prompt'),
    ):  # fmt: skip
      key = f'{name}/{golden}'
      if key in self.arrays:
        np.testing.assert_allclose(
          getattr(found, field), self.arrays[key], **CLOSE, err_msg=field
        )
    np.testing.assert_allclose(jnp.sum(found.attention, 1), 1, rtol=1e-5)

  def test_prompt_tuning(self):
    adapted = mj.adapters.adapt(self.family, mj.adapters.prompt(length=4))
    target = self.arrays['target_prompts'][0]
    params = adapted.joined(self.base, {'prompts': {'target': target}})
    self.check('prompt_tuning', adapted, params, self.batch)

  def test_spot(self):
    sources, targets = (
      self.arrays['source_prompts'], self.arrays['target_prompts'],
    )  # fmt: skip
    np.testing.assert_allclose(
      mj.adapters.spot(sources, targets[1]),
      self.arrays['spot/similarity_weighted_init'], **CLOSE,
    )  # fmt: skip
    np.testing.assert_array_equal(
      mj.adapters.spot([sources[1]]), self.arrays['spot/single_source_init']
    )
    with self.assertRaisesRegex(errors.DataError, 'need a target prompt'):
      mj.adapters.spot(sources)
    with self.assertRaisesRegex(errors.DataError, 'of one shape'):
      mj.adapters.spot([sources[0], sources[1][:2]], targets[0])
    with self.assertRaisesRegex(errors.DataError, 'sum to 0'):
      mj.adapters.spot(sources, np.zeros_like(targets[0]))
    target = np.array(targets[0])
    target[0] = 0
    self.assertTrue(np.isfinite(mj.adapters.spot(sources, target)).all())


def sub_network(d):
  """Leaves of a random one of width 3, which need not begin near 0."""
  rng = np.random.default_rng(3)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    'attempt/down': draw(d, 3), 'attempt/up': draw(3, d),
    'attempt/norm/scale': draw(d), 'attempt/norm/bias': draw(d),
  }  # fmt: skip


def mixture(sources, target, embedded, real, *, own=None, **settings):
  """What ATTEMPT makes of given prompts, with a random sub-network."""
  adapter = mj.adapters.attempt(
    sources=len(sources), length=len(target), width=3, **settings
  )
  own = {
    'prompts/source': jnp.asarray(sources), 'prompts/target': jnp.asarray(target),
    **(sub_network(target.shape[1]) if own is None else own),
  }  # fmt: skip
  call = base_lib.Call(None, {}, own, {})
  return adapter.mixture(call, jnp.asarray(embedded), jnp.asarray(real))


class MixtureTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    self.sources, self.target = draw(3, 2, 6), draw(2, 6)
    self.embedded = draw(4, 5, 6)
    self.real = np.arange(5)[None] < np.int32([5, 3, 2, 4])[:, None]

  def test_order_of_sources(self):
    found = mixture(self.sources, self.target, self.embedded, self.real)
    other = mixture(
      self.sources[[2, 0, 1]], self.target, self.embedded, self.real
    )
    np.testing.assert_allclose(
      other.attention, found.attention[:, jnp.array([2, 0, 1, 3])], rtol=1e-5
    )
    np.testing.assert_allclose(other.prompt, found.prompt, rtol=1e-4, atol=1e-5)

  def test_temperatures(self):
    given = self.sources, self.target, self.embedded, self.real
    hot = mixture(*given, temperature=1e6)
    np.testing.assert_allclose(hot.attention, 0.25, atol=1e-4)
    cold = mixture(*given, temperature=1e-4)
    np.testing.assert_allclose(
      cold.attention, jax.nn.one_hot(hot.scores.argmax(1), 4), atol=1e-4
    )
    plain = mixture(*given)
    np.testing.assert_allclose(
      plain.scores, hot.scores * 1e6 / (6 * math.e), rtol=1e-4
    )

  def test_padding_in_the_pool(self):
    given = self.sources, self.target
    other = np.where(self.real[..., None], self.embedded, 100)
    for mask in (True, False):
      pooled = [
        mixture(*given, x, self.real, mask_pad_in_pool=mask).pooled
        for x in (self.embedded, other)
      ]
      self.assertEqual(np.array_equal(*pooled), mask)
    nothing = mixture(*given, self.embedded, np.zeros_like(self.real))
    self.assertTrue(np.isfinite(nothing.prompt).all())

  @parameterized.parameters(
    (dict(), ('target', 'down', 'up', 'scale', 'bias')),
    (dict(attention='constant'), ('target',)),
    (dict(ignore_target=True), ('down', 'up', 'scale', 'bias')),
  )
  def test_gradients(self, settings, learned):
    def total(own):
      found = mixture(
        own.pop('source'), own.pop('target'), self.embedded, self.real,
        own=own, **settings,
      )  # fmt: skip
      weights = np.random.default_rng(5).normal(size=found.prompt.shape)
      return jnp.sum(found.prompt * jnp.asarray(weights, jnp.float32))

    own = {'source': self.sources, 'target': self.target, **sub_network(6)}
    for name, grad in jax.grad(total)(own).items():
      moves = bool(np.abs(grad).max() > 1e-6)
      self.assertEqual(moves, name.split('/')[-1] in learned, name)

  def test_a_source_equal_to_the_target(self):
    found = mixture(self.target[None], self.target, self.embedded, self.real)
    np.testing.assert_allclose(
      found.prompt, np.tile(2 * self.target, (4, 1, 1)), rtol=1e-5
    )
    alone = mixture(
      np.zeros((0, *self.target.shape), np.float32), self.target,
      self.embedded, self.real,
    )  # fmt: skip
    np.testing.assert_allclose(alone.prompt, found.prompt, rtol=1e-5)


@tiers.slow('test_answers_.*1')
class AdaptedTest(parameterized.TestCase):
  def test_what_learns(self):
    family, base = small_adapted.build('t5')
    batch = small_adapted.batch(4)
    for settings, learned in (
      (dict(), 5), (dict(train_norm=False), 3), (dict(attention='constant'), 1),
      (dict(ignore_target=True), 4),
    ):  # fmt: skip
      adapter = mj.adapters.attempt(sources=2, length=3, width=4, **settings)
      adapted = mj.adapters.adapt(family, adapter)
      own = [p for p in adapted.specs() if adapted.learns(p)]
      self.assertLen(own, learned)
    adapted = mj.adapters.adapt(
      family, mj.adapters.attempt(sources=2, length=3, width=4)
    )
    sources = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)
    leaves = adapted.adapter.begin(
      adapted.base_specs, jax.random.key(0), list(sources)
    )
    np.testing.assert_array_equal(leaves['prompts']['target'], sources[0])
    params = adapted.joined(base, leaves)
    loss = mj.training.objective.make_loss(adapted)
    grads = tree.flatten(jax.jit(jax.grad(lambda p: loss(p, batch)[0]))(params))
    for path, grad in grads.items():
      self.assertEqual(bool(np.any(grad)), adapted.learns(path), path)
    self.enter_context(environments.one_device())
    trainer = mj.training.Trainer(adapted, optax.sgd(0.3))
    state = trainer.fit([small_adapted.batch()], steps=1, params=params)
    for path, leaf in tree.flatten(state.params).items():
      same = np.array_equal(leaf, tree.flatten(params)[path])
      self.assertEqual(same, not adapted.learns(path), path)

  def test_tasks_of_one_batch(self):
    family, base = small_adapted.build('t5', scan_layers=True)
    many = mj.adapters.adapt(family, mj.adapters.prompt(length=3, tasks=2))
    one = mj.adapters.adapt(family, mj.adapters.prompt(length=3))
    params = many.start(base, jax.random.key(0))
    target = params['prompts']['target']
    table = base['token_embedder']['embedding']
    for row in target.reshape(-1, 8):
      self.assertIn(row.tolist(), table.tolist())
    ids = np.int32([1, 0, 0, 1])
    batch = small_adapted.batch(4)
    found = jax.jit(many.logits)(params, {**batch, 'task_ids': ids})
    answer = jax.jit(one.logits)
    for task in (0, 1):
      alone = answer(
        one.joined(base, {'prompts': {'target': target[task]}}), batch
      )
      np.testing.assert_allclose(
        found[ids == task], alone[ids == task], rtol=2e-4, atol=2e-4
      )
    for wrong in (2, -1):
      given = {**batch, 'task_ids': np.int32([0, 0, wrong, 1])}
      with self.assertRaisesRegex(
        errors.DataError, f'number {wrong}, .* 2 tasks'
      ):
        many.check_batch(given)
    with self.assertRaisesRegex(errors.DataError, "not 'task_ids'"):
      many.logits(params, batch)

  def test_a_prompt_of_tokens_is_those_tokens(self):
    # Of both kinds of model: vectors of tokens do what the tokens do.
    for kind in ('t5', 'lm'):
      family, base = small_adapted.build(kind)
      adapted = mj.adapters.adapt(family, mj.adapters.prompt(length=2))
      tokens = np.int32([[7, 9]])
      table = family.specs() and base
      embedding = tree.flatten(table)[
        'token_embedder/embedding' if kind == 't5'
        else 'decoder/token_embedder/embedding'
      ]  # fmt: skip
      params = adapted.joined(
        base, {'prompts': {'target': embedding[tokens[0]]}}
      )
      batch = small_adapted.batch(3)
      found = jax.jit(adapted.logits)(params, batch)
      before = np.repeat(tokens, 3, 0)
      wider = family.with_room(batch, 2)
      name = 'encoder_input_tokens' if kind == 't5' else 'decoder_input_tokens'
      wider[name] = np.concatenate([before, batch[name]], axis=1)
      expected = jax.jit(family.logits)(base, wider)
      np.testing.assert_allclose(
        found, expected[:, -found.shape[1] :], rtol=2e-4, atol=2e-4
      )

  @parameterized.parameters(('t5', None), ('lm', None), ('lm', 2))
  def test_answers_step_by_step(self, kind, tasks):
    family, base = small_adapted.build(kind)
    prompt = mj.adapters.prompt(length=3, tasks=tasks)
    adapted = mj.adapters.adapt(family, prompt)
    params = adapted.start(base, jax.random.key(0))
    batch = small_adapted.batch(2)
    if tasks:
      batch['task_ids'] = np.array([1, 0], np.int32)

    def steps(params):
      cache, found = adapted.init_cache(params, batch, 3), []
      for i in range(3):
        tokens = jnp.asarray(batch['decoder_input_tokens'][:, i], jnp.int32)
        logits, cache = adapted.decode_step(params, cache, tokens)
        found.append(logits)
      return jnp.stack(found, axis=1)

    real = {**batch, 'decoder_target_tokens': np.ones((2, 5), np.int32)}
    whole = jax.jit(adapted.logits)(params, real)
    np.testing.assert_allclose(
      jax.jit(steps)(params), whole[:, :3], rtol=5e-4, atol=5e-4
    )

  def test_counts(self):
    base = {'embed': small_adapted.table(768)}
    count = mj.adapters.count
    self.assertEqual(count(mj.adapters.attempt(sources=6), base), 231_936)
    self.assertEqual(
      count(mj.adapters.attempt(sources=6, train_norm=False), base), 230_400
    )
    self.assertEqual(
      count(mj.adapters.attempt(sources=6, tasks=8), base), 8 * 76_800 + 155_136
    )
    self.assertEqual(count(mj.adapters.prompt(), base), 76_800)

  def test_several_tables(self):
    base = {name: small_adapted.table(4) for name in 'ab'}
    params = {name: np.zeros((100, 4), np.float32) for name in 'ab'}
    key = jax.random.key(0)
    with self.assertRaisesRegex(errors.ConfigError, "start='uniform'"):
      mj.adapters.prompt(length=2).init(base, key, params)
    drawn = mj.adapters.prompt(length=2, start='uniform')
    self.assertLen(tree.flatten(drawn.init(base, key, params)), 1)

  def test_mistakes(self):
    family, base = small_adapted.build('lm')
    adapter = mj.adapters.attempt(sources=2, length=3, width=2)
    adapted = mj.adapters.adapt(family, adapter)
    params = adapted.start(base, jax.random.key(0))
    with self.assertRaisesRegex(errors.ConfigError, 'needs an encoder-decoder'):
      adapted.logits(params, small_adapted.batch(2))
    packed = {**small_adapted.batch(2), 'decoder_segment_ids': np.ones((2, 5))}
    plain = mj.adapters.adapt(family, mj.adapters.prompt(length=3))
    params = plain.start(base, jax.random.key(0))
    with self.assertRaisesRegex(errors.DataError, 'packed rows'):
      plain.logits(params, packed)
    with self.assertRaisesRegex(
      errors.DataError, r'\[2, 3, 8\], and \[1, 3, 8\]'
    ):
      adapter.begin(
        adapted.base_specs, jax.random.key(0), [np.zeros((3, 8), np.float32)]
      )
    with self.assertRaisesRegex(errors.ConfigError, 'Known: attempt, constant'):
      mj.adapters.attempt(sources=2, attention='dot')
    with self.assertRaisesRegex(errors.ConfigError, 'sources must be'):
      mj.adapters.attempt(sources=0, ignore_target=True)
    with self.assertRaisesRegex(errors.ConfigError, 'distinct ones of 24'):
      mj.adapters.adapt(family, mj.adapters.prompt(length=30)).start(
        base, jax.random.key(0)
      )


if __name__ == '__main__':
  absltest.main()
