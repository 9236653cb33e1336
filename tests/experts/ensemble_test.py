# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The domain posterior against the released scorer and the paper's formula."""

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import numpy as np

import mergejax as mj
from mergejax.core import errors
from mergejax.experts import ensemble


class EnsembleTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.golden = goldens.load('btm')
    self.lp = self.golden['target_logprobs']
    self.mask = np.ones(self.lp.shape[1:], bool)

  @parameterized.parameters('uniform', 'prior')
  def test_full_bayes(self, name):
    prior = None if name == 'uniform' else self.golden['prior']
    found = np.exp(ensemble.log_posterior(self.lp, self.mask, prior))
    expected = self.golden[f'full_bayes/{name}/posterior']
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      ensemble.log_likelihood(self.lp, self.mask, prior),
      self.golden[f'full_bayes/{name}/token_logprobs'],
      rtol=1e-4,
      atol=1e-5,
    )

  @parameterized.parameters('uniform', 'prior')
  def test_one_step(self, name):
    prior = None if name == 'uniform' else self.golden['prior']
    found = ensemble.log_likelihood(self.lp, self.mask, prior, kind='one_step')
    np.testing.assert_allclose(
        found, self.golden[f'one_step/{name}/token_logprobs'], rtol=1e-4,
        atol=1e-5,
    )  # fmt: skip
    # The released code reports the weights of its last column.
    weights = np.exp(
      ensemble.log_posterior(self.lp, self.mask, prior, kind='one_step')
    )
    np.testing.assert_allclose(
        weights[..., -2], self.golden[f'one_step/{name}/expert_probs'],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip

  def test_simple_average(self):
    np.testing.assert_allclose(
      ensemble.log_likelihood(self.lp, self.mask, kind='simple_average'),
      self.golden['simple_average/token_logprobs'],
      rtol=1e-4,
      atol=1e-5,
    )

  def test_updating_prior(self):
    prior = None
    for posterior, expected in zip(
      self.golden['updating/posterior'], self.golden['updating/ema_prior']
    ):
      prior = ensemble.update_prior(
        prior, posterior, decay=float(self.golden['updating/ema_alpha'])
      )
      np.testing.assert_allclose(prior, expected, rtol=1e-6)

  def test_a_domain_is_scored_while_its_prior_is_learnt(self):
    logits = self.golden['updating/logits']
    targets = self.golden['updating/targets']
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    lps = np.take_along_axis(
      log_p, targets[:, None, ..., None], axis=-1
    )[..., 0]  # fmt: skip
    prior, nats = None, 0.0
    for b, lp in enumerate(lps):
      scored = ensemble.log_likelihood(lp, self.mask, prior, kind='one_step')
      np.testing.assert_allclose(
        scored, self.golden['updating/token_logprobs'][b], rtol=1e-4, atol=1e-5
      )
      nats -= np.asarray(scored, np.float64).sum()
      # The released scorer reads its last column, before the last token.
      w = np.exp(ensemble.log_posterior(lp, self.mask, prior, kind='one_step'))
      posterior = w[..., -2].mean(axis=1)
      np.testing.assert_allclose(
        posterior, self.golden['updating/posterior'][b], rtol=1e-4
      )
      prior = ensemble.update_prior(prior, posterior)
    np.testing.assert_allclose(
      np.exp(nats / lps[:, 0].size), self.golden['updating/ppl'], rtol=1e-4
    )
    # Ours counts the last token too, and is one loop.
    batches = [(lp, self.mask) for lp in lps]
    found = list(ensemble.updating(batches))
    first = ensemble.batch_posterior(*batches[0])
    np.testing.assert_allclose(found[0][0], first)
    second = ensemble.batch_posterior(*batches[1], first)
    np.testing.assert_allclose(found[1][0], 0.7 * first + 0.3 * second)
    np.testing.assert_array_equal(
      found[1][1], ensemble.log_likelihood(*batches[1], first)
    )

  @parameterized.parameters(*ensemble.POSTERIORS)
  def test_one_token_after_the_other(self, kind):
    """The definition for generation is that for scoring."""
    mask = self.mask.copy()
    mask[0, 5:] = mask[1, 2] = False
    how = ensemble.Posterior(kind, tempering=0.5, floor=0.02)
    prior = np.array([0.4, 0.3, 0.3, 0.0])
    at_once = ensemble.log_posterior(
      self.lp, mask, prior, kind=kind, tempering=0.5, floor=0.02
    )
    log_prior = np.broadcast_to(
      ensemble.log_of_prior(prior, 4), self.lp.shape[:2]
    )
    state = how.start(log_prior)
    for t in range(mask.shape[1]):
      np.testing.assert_allclose(
        np.exp(how.log_weights(state)), np.exp(at_once[..., t]), atol=1e-5
      )
      state = how.advance(state, log_prior, self.lp[..., t], mask[:, t])
    np.testing.assert_allclose(
      np.exp(how.log_weights(state)), np.exp(at_once[..., -1]), atol=1e-5
    )

  def test_tempering_and_floor(self):
    plain = np.exp(ensemble.log_posterior(self.lp, self.mask))
    off = ensemble.log_posterior(self.lp, self.mask, tempering=0.0)
    np.testing.assert_allclose(np.exp(off), 0.25, rtol=1e-6)
    floored = np.exp(ensemble.log_posterior(self.lp, self.mask, floor=0.1))
    raised = np.maximum(plain, 0.1)
    np.testing.assert_allclose(floored, raised / raised.sum(0), rtol=1e-4)
    self.assertLess(plain.min(), 0.05)
    prior = np.array([0.5, 0.5, 0.0, 0.0])
    kept = np.exp(ensemble.log_posterior(self.lp, self.mask, prior, floor=0.1))
    np.testing.assert_array_equal(kept[2:], 0)

  def test_rows_have_priors_of_their_own(self):
    rows = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.25] * 4]).T
    together = ensemble.log_likelihood(self.lp, self.mask, rows)
    for i in range(3):
      alone = ensemble.log_likelihood(
        self.lp[:, i : i + 1], self.mask[i : i + 1], rows[:, i]
      )
      np.testing.assert_allclose(together[i], alone[0], rtol=1e-5)
    fixed = np.exp(
      ensemble.log_posterior(self.lp, self.mask, rows, kind='fixed')
    )
    np.testing.assert_allclose(fixed[..., 3], rows, rtol=1e-5)

  def test_long_histories_do_not_underflow(self):
    lp = np.full((2, 1, 4000), -9.0, np.float32)
    lp[1] -= 0.001
    found = ensemble.log_posterior(lp, np.ones((1, 4000), bool))
    # The better expert leads by exp(4).
    np.testing.assert_allclose(
      np.exp(found[:, 0, -1]), [1 / (1 + np.exp(-4)), 1 / (1 + np.exp(4))],
      rtol=0.02,
    )  # fmt: skip

  @parameterized.parameters(1, 2, 3, 4)
  def test_top_k(self, k):
    np.testing.assert_allclose(
      ensemble.keep_top(self.golden['prior'], k),
      self.golden[f'topk/{k}'],
      rtol=1e-6,
    )

  @parameterized.parameters('uniform', 'argmax', 'posterior')
  def test_averages(self, kind):
    names = ('a.weight', 'b.bias', 'n')
    experts = [
      {n: self.golden[f'avg/expert{j}/{n}'] for n in names} for j in range(4)
    ]
    prior = self.golden['avg/posterior/weights']
    weights = ensemble.average_weights(prior, kind)
    top = ensemble.average_weights(self.golden['prior'], 'topk', k=2)
    np.testing.assert_allclose(top, self.golden['topk/2'], rtol=1e-6)
    np.testing.assert_allclose(
      weights, self.golden[f'avg/{kind}/weights'], rtol=1e-6
    )
    merged = mj.merge(experts, 'linear', weights=weights)
    for n in names:
      np.testing.assert_allclose(
        merged[n], self.golden[f'avg/{kind}/{n}'], rtol=1e-5, atol=1e-6
      )

  def test_unnormalised_average(self):
    experts = [{'w': self.golden[f'avg/expert{j}/a.weight']} for j in range(4)]
    merged = mj.merge(
        experts, 'linear', normalize=False,
        weights=self.golden['avg/unnormalized/weights'],
    )  # fmt: skip
    np.testing.assert_allclose(
      merged['w'], self.golden['avg/unnormalized/a.weight'], rtol=1e-5
    )

  @parameterized.parameters(*ensemble.POSTERIORS)
  def test_padding_changes_nothing(self, kind):
    pad = lambda x, value: np.pad(
      x, [(0, 0)] * (x.ndim - 1) + [(0, 3)], constant_values=value
    )
    short = ensemble.log_posterior(self.lp, self.mask, kind=kind)
    long = ensemble.log_posterior(
      pad(self.lp, -7.0), pad(self.mask, False), kind=kind
    )
    np.testing.assert_allclose(long[..., : short.shape[-1]], short, atol=1e-6)
    np.testing.assert_allclose(long[..., -1], short[..., -1], atol=1e-6)

  def test_weights_sum_to_one_and_follow_their_experts(self):
    weights = np.exp(ensemble.log_posterior(self.lp, self.mask))
    np.testing.assert_allclose(weights.sum(axis=0), 1.0, rtol=1e-5)
    turned = np.exp(ensemble.log_posterior(self.lp[::-1], self.mask))
    np.testing.assert_allclose(turned[::-1], weights, rtol=1e-5)

  def test_duplicates_share_their_weight(self):
    weights = np.exp(ensemble.log_posterior(self.lp, self.mask))
    doubled = np.concatenate([self.lp, self.lp[:1]])
    prior = np.array([0.125, 0.25, 0.25, 0.25, 0.125])
    found = np.exp(ensemble.log_posterior(doubled, self.mask, prior))
    np.testing.assert_allclose(found[0] + found[-1], weights[0], rtol=1e-4)

  def test_a_prior_of_zero_removes_an_expert(self):
    kept = ensemble.log_likelihood(self.lp[:2], self.mask)
    prior = np.array([0.5, 0.5, 0.0, 0.0])
    np.testing.assert_allclose(
      ensemble.log_likelihood(self.lp, self.mask, prior), kept, rtol=1e-5
    )

  def test_cached_prior_finds_the_right_expert(self):
    batches = [(self.lp - np.arange(4)[:, None, None], self.mask)] * 3
    prior = ensemble.cached_prior(batches)
    self.assertEqual(np.argmax(prior), 0)
    self.assertAlmostEqual(prior.sum(), 1.0)
    empty = np.zeros_like(self.mask)
    empty[0] = True
    only = ensemble.batch_posterior(self.lp, empty)
    row = ensemble.batch_posterior(self.lp[:, :1], self.mask[:1])
    np.testing.assert_allclose(only, row, rtol=1e-5)
    with self.assertRaisesRegex(errors.DataError, 'without a real token'):
      ensemble.batch_posterior(self.lp, np.zeros_like(self.mask))

  def test_of_equal_experts_all_ways_keep_the_same_one(self):
    prior = [0.4, 0.2, 0.4]
    kept = ensemble.average_weights(prior, 'argmax')
    np.testing.assert_array_equal(kept, [0, 0, 1])
    np.testing.assert_array_equal(kept, ensemble.keep_top(prior, 1))
    np.testing.assert_array_equal(
      kept, ensemble.average_weights(prior, 'topk', k=1)
    )

  def test_mistakes(self):
    for prior, message in (
      ([0.5, 0.5], '4 experts'),
      ([1.0, 1.0, 0.0, 0.0], 'not a distribution'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        ensemble.log_posterior(self.lp, self.mask, prior)
    with self.assertRaisesRegex(errors.UserError, "Did you mean 'full_bayes'"):
      ensemble.log_posterior(self.lp, self.mask, kind='fullbayes')
    for options, message in (
      (dict(kind='mean'), "Did you mean|Unknown kind of average 'mean'"),
      (dict(kind='topk'), "'topk', which needs one"),
      (dict(kind='uniform', k=2), 'k=2'),
      (dict(kind='topk', k=0), 'top-k must be a whole number'),
      (dict(kind='topk', k=1.5), r'not 1\.5'),
    ):
      with self.assertRaisesRegex(errors.ConfigError, message):
        ensemble.average_weights(self.golden['prior'], **options)
    with self.assertRaisesRegex(errors.ConfigError, 'floor must be a number'):
      ensemble.Posterior(floor=2)
    with self.assertRaisesRegex(errors.UserError, 'top-k must be a whole'):
      ensemble.keep_top([1.0], 0)
    with self.assertRaisesRegex(errors.UserError, 'at least one batch'):
      ensemble.cached_prior([])


if __name__ == '__main__':
  absltest.main()
