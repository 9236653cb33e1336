# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Routers against the goldens, loops in NumPy, and laws of their own."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import goldens
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from reference import routing as oracle

from mergejax.core import errors
from mergejax.nn import routing
from mergejax.nn import routing_losses
from mergejax.nn import token_groups

EXPERTS = 4
TAGS = [
  (capacity, k, bpr, pad)
  for capacity in (2, 4, 6)
  for k in (1, 2)
  for bpr in (0, 1)
  for pad in (0, 1)
]
tokens_choose = jax.jit(
  routing.tokens_choose,
  static_argnums=(1, 2),
  static_argnames=('prioritise', 'normalize', 'legacy_padding'),
)


def masks(choices, capacity):
  """Dispatch `<bool>` and combine `[groups, tokens, experts, capacity]`."""
  groups, tokens, _ = choices.weights.shape
  dispatch = np.zeros((groups, tokens, EXPERTS, capacity), bool)
  combine = np.zeros(dispatch.shape, np.float32)
  for place in np.argwhere(np.asarray(choices.kept)):
    g, t, j = place
    at = g, t, int(choices.experts[g, t, j]), int(choices.positions[g, t, j])
    dispatch[at] = True
    combine[at] += choices.weights[g, t, j]
  return dispatch, combine


def slot_masks(slots, tokens):
  """The same of experts' choices."""
  groups, experts, capacity = slots.tokens.shape
  dispatch = np.zeros((groups, tokens + 1, experts, capacity), bool)
  combine = np.zeros(dispatch.shape, np.float32)
  for g, e, c in np.ndindex(groups, experts, capacity):
    dispatch[g, int(slots.tokens[g, e, c]), e, c] = True
    combine[g, int(slots.tokens[g, e, c]), e, c] = slots.weights[g, e, c]
  return dispatch[:, :tokens], combine[:, :tokens]


def pairs_of(choices):
  """`[[(token, expert, weight)]]` of the kept pairs, by group."""
  found = [[] for _ in choices.kept]
  for g, t, j in np.argwhere(np.asarray(choices.kept)):
    found[g].append(
      (int(t), int(choices.experts[g, t, j]), float(choices.weights[g, t, j]))
    )
  return found


class GoldensTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.arrays = goldens.load('moe_flaxformer')

  def close(self, found, name):
    np.testing.assert_allclose(
      found, self.arrays[name], rtol=1e-4, atol=1e-5, err_msg=name
    )

  def inputs(self, pad):
    logits = self.arrays['logits_pad' if pad else 'logits']
    real = np.any(logits != 0, -1) if pad else None
    return logits, np.asarray(jax.nn.softmax(logits)), real

  @parameterized.parameters(*TAGS)
  def test_tokens_choose(self, capacity, k, bpr, pad):
    logits, probabilities, real = self.inputs(pad)
    tag = f'cap{capacity}/top{k}/bpr{bpr}/pad{pad}'
    for style in (routing.MASK, routing.SCATTER):
      choices = tokens_choose(
        probabilities, k, capacity, real=real, prioritise=bool(bpr),
        legacy_padding=style,
      )  # fmt: skip
      if style == routing.MASK:
        dispatch, combine = masks(choices, capacity)
        np.testing.assert_array_equal(
          dispatch, self.arrays[f'mask/{tag}/dispatch_mask']
        )
        self.close(combine, f'mask/{tag}/combine_array')
      else:
        indices = np.stack([choices.experts, choices.positions], -1)
        np.testing.assert_array_equal(
          indices, self.arrays[f'scatter/{tag}/dispatch_indices']
        )
        self.close(choices.weights, f'scatter/{tag}/combine_weights')
      options = {'real': real, 'legacy_padding': style}
      chosen = choices.chosen
      aux = routing_losses.load_balance(probabilities, chosen, **options)
      self.close(aux, f'{style}/{tag}/aux')
      z = routing_losses.router_z(logits, **options)
      self.close(z, f'{style}/{tag}/z')

  @parameterized.product(capacity=(2, 4, 6), pad=(0, 1))
  def test_experts_choose(self, capacity, pad):
    logits, probabilities, real = self.inputs(pad)
    slots = routing.experts_choose(
      probabilities, capacity, real=real, legacy_padding='mask'
    )
    dispatch, combine = slot_masks(slots, logits.shape[1])
    tag = f'experts_choose/cap{capacity}/pad{pad}'
    self.close(combine, f'{tag}/combine_array')
    np.testing.assert_array_equal(
      dispatch, self.arrays[f'{tag}/dispatch_mask'] != 0
    )
    z = routing_losses.router_z(logits, real=real, legacy_padding='mask')
    self.close(z, f'{tag}/z')

  def test_losses(self):
    probabilities = self.arrays['probs']
    hot = jax.nn.one_hot(self.arrays['loss/expert_indices'], EXPERTS)
    both = routing_losses.load_balance(probabilities, hot.max(2))
    self.close(both, 'loss/load_balancing_loss')
    first = routing_losses.load_balance(probabilities, hot[:, :, 0])
    self.close(first, 'loss/load_balancing_loss_top1')
    z = routing_losses.router_z(self.arrays['logits'])
    self.close(z, 'loss/router_z_loss')

  def test_tables_of_sizes(self):
    for tokens, size, experts, replicas, count in self.arrays[
      'num_groups/table'
    ].tolist():
      found = token_groups.group_count(tokens, size, experts, replicas)
      self.assertEqual(found, count)
    for *given_, batch, length in self.arrays['maybe_pad/table'].tolist():
      self.assertEqual(token_groups.padded_shape(*given_), (batch, length))

  @parameterized.product(before=(0, 1), evaluating=(0, 1), pad=(0, 1))
  def test_gshard(self, before, evaluating, pad):
    arrays = goldens.load('moe_gshard_top2')
    logits = arrays['logits'][None]
    real = ~arrays['padding_mask'][None] if pad else None
    tag = f'norm_before{before}/eval{evaluating}/pad{pad}'
    tokens = logits.shape[1]
    capacity = token_groups.gshard_capacity(
      tokens, EXPERTS, train=not evaluating
    )
    choices = routing.gshard_top2(
      jnp.asarray(logits), capacity, real=real,
      second_expert=routing.ARGMAX, normalize_before_dropping=bool(before),
    )  # fmt: skip
    dispatch, combine = masks(choices, capacity)
    want = arrays[f'{tag}/combine_weights']
    self.assertEqual(combine[0].shape, want.shape)
    np.testing.assert_allclose(combine[0], want, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(dispatch[0], arrays[f'{tag}/dispatch_mask'])
    aux = routing_losses.load_balance(
      jax.nn.softmax(logits), choices.chosen, real=real, legacy_padding='routed'
    )
    np.testing.assert_allclose(aux, arrays[f'{tag}/aux'], rtol=1e-4)


CASES = st.builds(
  dict,
  seed=st.integers(0, 2**16),
  k=st.integers(1, 3),
  capacity=st.sampled_from([None, 0, 1, 2, 5]),
  padded=st.booleans(),
  prioritise=st.booleans(),
  ties=st.booleans(),
)


def example(seed, padded=False, ties=False, **_):
  """Logits `[2, 9, 4]`, and which tokens are real."""
  rng = np.random.default_rng(seed)
  logits = 2 * rng.normal(size=(2, 9, EXPERTS)).astype(np.float32)
  if ties:
    logits = np.round(logits)
  real = rng.random((2, 9)) < 0.7 if padded else np.ones((2, 9), bool)
  return logits, real


class OracleTest(parameterized.TestCase):
  """The same as loops over tokens, ties and padding among them."""

  def same(self, found, wanted):
    found = sorted(found)
    wanted = sorted((t, e, float(w)) for t, e, w in wanted)
    self.assertEqual([p[:2] for p in found], [p[:2] for p in wanted])
    np.testing.assert_allclose(
      [p[2] for p in found], [p[2] for p in wanted], rtol=1e-5, atol=1e-6
    )

  @settings(max_examples=15, deadline=None)
  @given(CASES)
  def test_tokens_choose(self, case):
    logits, real = example(**case)
    probabilities = np.asarray(jax.nn.softmax(logits))
    arguments = probabilities, case['k'], case['capacity']
    prioritise = case['prioritise']
    choices = tokens_choose(*arguments, real=real, prioritise=prioritise)
    for group, pairs in enumerate(pairs_of(choices)):
      self.same(
        pairs,
        oracle.tokens_choose(
          probabilities[group], *arguments[1:], real[group], prioritise
        ),
      )

  @settings(max_examples=10, deadline=None)
  @given(CASES, st.booleans())
  def test_gshard(self, case, before):
    logits, real = example(**case)
    choices = _gshard(logits, case['capacity'], real, before)
    for group, pairs in enumerate(pairs_of(choices)):
      wanted = oracle.gshard_top2(
        logits[group], case['capacity'], real[group], before
      )
      self.same(pairs, wanted)

  @settings(max_examples=10, deadline=None)
  @given(CASES, st.integers(0, 9))
  def test_experts_choose(self, case, capacity):
    logits, real = example(**case)
    probabilities = np.asarray(jax.nn.softmax(logits))
    slots = _experts_choose(probabilities, capacity, real)
    for group in range(2):
      pairs = [
        (int(slots.tokens[group, e, c]), e, float(slots.weights[group, e, c]))
        for e, c in np.ndindex(EXPERTS, capacity)
      ]
      self.same(
        [pair for pair in pairs if pair[0] < 9],
        oracle.experts_choose(probabilities[group], capacity, real[group]),
      )
      self.assertTrue(all(w == 0 for t, _, w in pairs if t == 9))


@functools.partial(jax.jit, static_argnums=(1, 3))
def _gshard(logits, capacity, real, before):
  return routing.gshard_top2(
    logits, capacity, real=real, second_expert=routing.ARGMAX,
    normalize_before_dropping=before,
  )  # fmt: skip


@functools.partial(jax.jit, static_argnums=1)
def _experts_choose(probabilities, capacity, real):
  return routing.experts_choose(probabilities, capacity, real=real)


class LawsTest(parameterized.TestCase):
  @settings(max_examples=10, deadline=None)
  @given(CASES)
  def test_kept_pairs_have_a_slot_of_their_own(self, case):
    logits, real = example(**case)
    choices = tokens_choose(
      jax.nn.softmax(logits), case['k'], case['capacity'], real=real,
      prioritise=case['prioritise'],
    )  # fmt: skip
    kept = np.asarray(choices.kept)
    self.assertFalse(np.any(kept & ~real[..., None]))
    self.assertTrue(np.all(np.asarray(choices.weights)[~kept] == 0))
    for g in range(2):
      slots = np.stack([choices.experts[g], choices.positions[g]], -1)[kept[g]]
      self.assertLen({*map(tuple, slots)}, len(slots))
      if case['capacity'] is None:
        self.assertEqual(len(slots), case['k'] * real[g].sum())
      elif len(slots):
        self.assertLess(slots[:, 1].max(), case['capacity'])
    np.testing.assert_array_equal(
      np.asarray(choices.chosen).sum(-1), case['k'] * real
    )

  def test_nothing_is_kept_without_room(self):
    logits, _ = example(0)
    choices = routing.tokens_choose(jax.nn.softmax(logits), 2, 0)
    self.assertFalse(np.any(choices.kept))
    self.assertEqual(float(jnp.sum(choices.weights)), 0.0)

  def test_an_overflowing_choice_advances_the_queue(self):
    """The third token's second choice finds expert 0 full of first choices."""
    p = jnp.asarray([[[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]], jnp.float32)
    choices = routing.tokens_choose(p, 2, 1)
    np.testing.assert_array_equal(
      choices.positions[0], [[0, 1], [1, 2], [0, 2]]
    )

  def test_normalized_weights_sum_to_one(self):
    logits, _ = example(1)
    choices = routing.tokens_choose(
      jax.nn.softmax(logits), 2, None, normalize=True
    )
    np.testing.assert_allclose(choices.weights.sum(-1), 1.0, rtol=1e-6)

  def test_a_drawn_second_expert(self):
    logits = jnp.asarray(np.tile([3.0, 1.0, 1.0, -30.0], (1, 4000, 1)))
    logits = logits.astype(jnp.float32)
    draw = functools.partial(
      routing.gshard_top2, logits, None, key=jax.random.key(0)
    )
    sampled = np.asarray(draw(second_expert='sampling').experts[0, :, 1])
    counts = np.bincount(sampled, minlength=4) / len(sampled)
    np.testing.assert_allclose(counts, [0, 0.5, 0.5, 0], atol=0.03)
    kept = np.asarray(draw(second_expert='random').kept[0, :, 1])
    second = oracle.softmax(np.asarray(logits[0, 0]))[1]
    np.testing.assert_allclose(kept.mean(), 2 * second, atol=0.03)
    # Without a key nothing is drawn.
    again = routing.gshard_top2(logits, None)
    np.testing.assert_array_equal(again.experts[..., 1], 1)

  def test_losses_leave_padding_out(self):
    logits, real = example(2, padded=True)
    other = np.where(real[..., None], logits, 7.0).astype(np.float32)
    for of in (logits, other):
      p = jax.nn.softmax(of)
      chosen = routing.tokens_choose(p, 1, None, real=real).chosen
      balance = routing_losses.load_balance(p, chosen, real=real)
      z = routing_losses.router_z(of, real=real)
      kept = [np.asarray(p[g])[real[g]] for g in range(2)]
      wanted = [
        EXPERTS * np.sum(np.eye(EXPERTS)[q.argmax(-1)].mean(0) * q.mean(0))
        for q in kept
      ]
      np.testing.assert_allclose(balance, np.mean(wanted), rtol=1e-5)
      squares = np.asarray(jax.nn.logsumexp(logits, -1))[real] ** 2
      np.testing.assert_allclose(z, squares.mean(), rtol=1e-5)

  def test_balance_is_learnt_through_probabilities_alone(self):
    p = jax.nn.softmax(example(3)[0])

    def loss(p):
      chosen = routing.tokens_choose(p, 1, None).chosen
      return routing_losses.load_balance(p, chosen)

    chosen = np.asarray(routing.tokens_choose(p, 1, None).chosen)
    wanted = EXPERTS * chosen.mean(1, keepdims=True) / p.shape[1] / 2
    np.testing.assert_allclose(
      jax.grad(loss)(p), np.broadcast_to(wanted, p.shape), rtol=1e-5
    )

  def test_of_no_tokens_every_number_is_zero(self):
    logits = jnp.zeros((1, 4, EXPERTS))
    nobody = jnp.zeros((1, 4), bool)
    p = jax.nn.softmax(logits)
    choices = routing.tokens_choose(p, 1, 2, real=nobody)
    self.assertFalse(np.any(choices.kept))
    values = [
      routing_losses.load_balance(p, choices.chosen, real=nobody),
      routing_losses.router_z(logits, real=nobody),
      routing_losses.entropy(p, nobody),
    ]
    load = jnp.zeros(EXPERTS)
    zero = jnp.float32(0.0)
    found = routing_losses.metrics(
      load, zero, zero, tokens=zero, pairs=zero, slots=8
    )
    self.assertEqual(float(found.pop('dead_experts')), EXPERTS)
    self.assertEqual(float(found.pop('load_cv')), 0.0)
    for value in (*values, *found.values()):
      np.testing.assert_array_equal(value, np.zeros_like(value))


class ErrorsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ('choices', lambda p: routing.tokens_choose(p, 5, 1), '5 experts'),
    ('one expert', lambda p: routing.gshard_top2(p[..., :1], 1), '2 experts'),
    ('second', lambda p: routing.gshard_top2(p, 1, second_expert='best'),
     'second_expert'),
    ('too few tokens', lambda p: routing.experts_choose(p, 10), '10 tokens'),
    ('padding', lambda p: routing.tokens_choose(p, 1, 1, legacy_padding='old'),
     'legacy_padding'),
    ('factor', lambda p: token_groups.capacity(0.0, 8, 2), 'capacity factor'),
    ('groups', lambda p: token_groups.group_count(9, 4, 2), '9 tokens'),
    ('strict', lambda p: token_groups.group_count(8, 3, 2, strict=True), '4 tokens'),
  )  # fmt: skip
  def test_message(self, call, words):
    with self.assertRaisesRegex(errors.ConfigError, words):
      call(jnp.full((1, 9, EXPERTS), 0.25))


if __name__ == '__main__':
  absltest.main()
