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

  def test_mistakes(self):
    for prior, message in (
      ([0.5, 0.5], '4 experts'),
      ([1.0, 1.0, 0.0, 0.0], 'not a distribution'),
    ):
      with self.assertRaisesRegex(errors.UserError, message):
        ensemble.log_posterior(self.lp, self.mask, prior)
    with self.assertRaisesRegex(errors.UserError, "Did you mean 'full_bayes'"):
      ensemble.log_posterior(self.lp, self.mask, kind='fullbayes')
    with self.assertRaisesRegex(errors.UserError, 'at least 1'):
      ensemble.keep_top([1.0], 0)
    with self.assertRaisesRegex(errors.UserError, 'at least one batch'):
      ensemble.cached_prior([])


if __name__ == '__main__':
  absltest.main()
