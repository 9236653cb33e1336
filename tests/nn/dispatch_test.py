# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tokens to their experts and back: nothing is lost, doubled or seen too soon."""

import functools

from absl.testing import absltest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from mergejax.nn import dispatch
from mergejax.nn import routing

GROUPS, TOKENS, EXPERTS, EMBED = 2, 9, 4, 3
# Programs that are compiled, each once for all examples.
FORMS = st.fixed_dictionaries({
  'k': st.integers(1, 2),
  'capacity': st.sampled_from([None, 2]),
  'form': st.sampled_from(['rows', 'padded']),
})  # fmt: skip
SEEDS = st.integers(0, 2**31 - 1)
few = settings(max_examples=12, deadline=None)


@functools.partial(jax.jit, static_argnames=('k', 'capacity', 'form', 'equal'))
def sent(logits, tokens, scales, real, *, k, capacity, form, equal=False):
  """Through experts that multiply by a number each: `(outputs, choices)`."""
  choices = routing.tokens_choose(
    jax.nn.softmax(logits), k, capacity, real=real, normalize=equal
  )
  if form == 'rows':
    found = dispatch.rows(choices, EXPERTS, capacity)
  else:
    room = TOKENS if capacity is None else capacity
    found = dispatch.padded(choices, EXPERTS, room)
  kernels = scales[:, None, None] * jnp.eye(EMBED, dtype=jnp.float32)[None]
  values = found.product(found.to_experts(tokens), kernels)
  return found.to_tokens(values).reshape(tokens.shape), choices


def example(seed):
  """Logits, tokens, a number for every expert, and which tokens are real."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return (
    2 * normal(GROUPS, TOKENS, EXPERTS), normal(GROUPS, TOKENS, EMBED),
    normal(EXPERTS), rng.random((GROUPS, TOKENS)) < 0.8,
  )  # fmt: skip


class LawsTest(absltest.TestCase):
  @few
  @given(SEEDS, FORMS)
  def test_kept_pairs_are_combined_once_with_their_weights(self, seed, how):
    """`sum of the kept pairs of a token of weight_e scale_e x`; dropped: 0."""
    logits, tokens, scales, real = example(seed)
    found, choices = sent(logits, tokens, scales, real, **how)
    wanted = np.zeros(tokens.shape, np.float64)
    counts = np.zeros((GROUPS, EXPERTS), int)
    for g, t, j in np.argwhere(np.asarray(choices.kept)):
      e = int(choices.experts[g, t, j])
      wanted[g, t] += float(choices.weights[g, t, j]) * scales[e] * tokens[g, t]
      counts[g, e] += 1
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found)[~real], 0)
    if how['capacity'] is None:
      self.assertEqual(counts.sum(), how['k'] * real.sum())
    else:
      self.assertLessEqual(counts.max(), how['capacity'])

  @few
  @given(SEEDS, FORMS)
  def test_equal_experts_make_the_dense_function(self, seed, how):
    """Where weights sum to 1 and nothing is dropped."""
    logits, tokens, _, real = example(seed)
    scales = np.full(EXPERTS, 1.5, np.float32)
    how = {**how, 'capacity': None}
    found, _ = sent(logits, tokens, scales, real, **how, equal=True)
    wanted = np.where(real[..., None], 1.5 * tokens, 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)

  @few
  @given(SEEDS, FORMS, st.permutations(range(EXPERTS)))
  def test_the_order_of_experts_does_not_matter(self, seed, how, order):
    logits, tokens, scales, real = example(seed)
    found, _ = sent(logits, tokens, scales, real, **how)
    order = np.array(order)
    other, _ = sent(logits[..., order], tokens, scales[order], real, **how)
    np.testing.assert_allclose(found, other, rtol=1e-4, atol=1e-5)

  @few
  @given(SEEDS, FORMS, st.integers(1, TOKENS - 1))
  def test_no_later_token_changes_an_earlier_output(self, seed, how, first):
    """Of one expert a token even where tokens are dropped.

    Second choices queue behind all first ones, those of later tokens too: with
    two experts a token it holds where nothing is dropped.
    """
    if how['k'] > 1:
      how = {**how, 'capacity': None}
    one, other = example(seed), example(seed + 1)
    mixed = [
      np.concatenate([a[:, :first], b[:, first:]], axis=1)
      for a, b in zip(one, other)
      if a.ndim > 1
    ]
    logits, tokens, scales, real = one
    found, _ = sent(logits, tokens, scales, real, **how)
    later, _ = sent(*mixed[:2], scales, mixed[2], **how)
    np.testing.assert_allclose(
      found[:, :first], later[:, :first], rtol=1e-5, atol=1e-6
    )
    self.assertGreater(np.abs(np.asarray(found - later)[:, first:]).max(), 0)


if __name__ == '__main__':
  absltest.main()
