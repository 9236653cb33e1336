# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts as one model: what is scored is what is generated."""

import re

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import small_decoders
import small_networks

from mergejax import models
from mergejax import partition
from mergejax.core import errors
from mergejax.evaluation import beam
from mergejax.evaluation import decode
from mergejax.evaluation import metrics
from mergejax.experts import ensemble
from mergejax.experts import mixture as mixture_lib

SIZES = dict(
  model_type='lm', vocab_size=11, emb_dim=8, num_heads=2, head_dim=4,
  num_layers=1, mlp_dim=8,
)  # fmt: skip
K = 3
PRIOR = np.array([0.5, 0.3, 0.2])


class MixtureTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.module = models.build(SIZES)
    cls.family = models.family_of(cls.module)
    init = jax.jit(cls.family.init)
    cls.params = [
      jax.tree.map(lambda x: 3 * x, init(jax.random.key(i))) for i in range(K)
    ]
    tokens = np.random.default_rng(0).integers(2, 11, (2, 6)).astype(np.int32)
    tokens[1, 4:] = 0
    cls.batch = {
      'decoder_input_tokens': np.pad(tokens, ((0, 0), (1, 0)))[:, :-1],
      'decoder_target_tokens': tokens,
    }
    logits = np.stack(
      [np.asarray(cls.family.logits(p, cls.batch)) for p in cls.params]
    )
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    cls.log_p = log_p
    cls.lp = np.take_along_axis(log_p, tokens[None, ..., None], -1)[..., 0]
    cls.mask = tokens > 0

  def forced(self, mixture, params):
    """`(weights before every token, log-probabilities)` of decoding a batch."""
    tokens = self.batch['decoder_input_tokens']

    @jax.jit
    def run(params):
      def step(cache, now):
        logits, cache = mixture.decode_step(params, cache, now)
        return cache, (mixture.weights(cache), logits)

      cache = mixture.init_cache(params, self.batch, tokens.shape[1])
      return jax.lax.scan(step, cache, tokens.T)[1]

    weights, logits = run(params)
    return np.moveaxis(weights, 0, -1), np.moveaxis(logits, 0, 1)

  @parameterized.parameters('full_bayes', 'one_step')
  def test_generation_has_the_posterior_of_scoring(self, kind):
    how = ensemble.Posterior(kind, tempering=0.7, floor=0.01)
    mixture = mixture_lib.Mixture(self.module, experts=K, posterior=how)
    params = mixture.join(self.params, PRIOR)
    weights, said = self.forced(mixture, params)
    expected = ensemble.log_posterior(
      self.lp, self.mask, PRIOR, kind=kind, tempering=0.7, floor=0.01
    )
    np.testing.assert_allclose(
      weights, np.exp(expected[..., :-1]), rtol=1e-4, atol=1e-5
    )
    whole = mixture.logits(params, self.batch)
    mixed = np.log(np.einsum('kbt,kbtv->btv', weights, np.exp(self.log_p)))
    real = self.mask[..., None].astype(np.float32)
    np.testing.assert_allclose(whole * real, mixed * real, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(said * real, mixed * real, rtol=1e-4, atol=1e-5)

  def test_it_scores_like_any_model(self):
    mixture = mixture_lib.Mixture(self.module, experts=K)
    params = mixture.join(self.params, PRIOR)
    nats, _ = metrics.make_scorer(mixture, 'loss')(params, [self.batch])
    expected = ensemble.log_likelihood(self.lp, self.mask, PRIOR)
    np.testing.assert_allclose(-nats, expected, rtol=1e-4, atol=1e-5)
    self.assertEqual(
      set(mixture.specs()), {*_paths('experts', self.family), 'prior'}
    )
    self.assertEqual(mixture.specs()['prior'].axes, ('branch',))

  def test_on_branches_it_says_the_same_by_one_sum(self):
    mesh = partition.make_mesh(branch=2, data=4)
    mixture = mixture_lib.Mixture(self.module, experts=2, mesh=mesh)
    params = mixture.join(self.params[:2])
    alone = mixture_lib.Mixture(self.module, experts=2)
    expected = self.forced(alone, alone.join(self.params[:2]))
    for found, one in zip(self.forced(mixture, params), expected):
      np.testing.assert_allclose(found, one, rtol=1e-4, atol=1e-5)
    leaf = jax.tree.leaves(params['experts'])[0]
    self.assertEqual(leaf.sharding.spec[0], 'branch')
    tokens = jnp.zeros(2, jnp.int32)
    cache = jax.eval_shape(
      lambda p: mixture.init_cache(p, self.batch, 6), params
    )
    lay = lambda path, x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=partition.sharding(mesh, ('branch',))
    )
    cache = jax.tree_util.tree_map_with_path(lay, cache)
    hlo = (
      jax.jit(mixture.decode_step).lower(params, cache, tokens).compile()
    ).as_text()
    # No expert's distribution is gathered: only maxima and sums cross.
    self.assertNotRegex(hlo, r'all-gather|all-to-all')
    wide = re.findall(r'f32\[2,11\][^=]*? all-reduce\(', hlo)
    self.assertLen(wide, 2, 'the maximum and the sum of one log-sum-exp')

  def test_beams_take_the_posterior_with_them(self):
    """Three beams of a mixture are what a search through all answers finds."""
    family = small_decoders.family(vocab=4)
    tables = [small_decoders.table(4, seed) for seed in (1, 2)]
    mixture = mixture_lib.Mixture(family, experts=2)
    prior = np.array([0.8, 0.2])
    params = mixture.join([jnp.asarray(t) for t in tables], prior)
    batch = small_decoders.batch([[2, 3]], width=4)
    # A beam of as many as there are prefixes is a search through all.
    method = beam.Beam(beams=27, alpha=0)
    decoder = decode.make_decoder(mixture, length=3, method=method)
    found = decoder.answers(params, batch)

    def log_p(answer):
      tokens = [2, 3, *answer]
      w, total = np.log(prior), 0.0
      for i, token in enumerate(tokens):
        one = np.array([
          small_decoders.log_probabilities(t, tokens[:i])[token]
          for t in tables
        ])  # fmt: skip
        w = w - np.logaddexp.reduce(w)
        total += np.logaddexp.reduce(w + one) * (i >= 2)
        w = w + one * (token > 0)  # 0 is padding, and says nothing
      return total

    for tokens, score in zip(found.tokens[0], found.scores[0]):
      if score > -np.inf:
        answer = np.trim_zeros(tokens, 'b').tolist()
        np.testing.assert_allclose(score, log_p(answer), rtol=1e-4)
    self.assertGreater(np.isfinite(found.scores[0]).sum(), 5)

  def test_one_of_many_copies_is_the_model(self):
    mixture = mixture_lib.Mixture(self.module, experts=2)
    params = mixture.join([self.params[0]] * 2, [0.9, 0.1])
    np.testing.assert_allclose(
      mixture.logits(params, self.batch), self.log_p[0], rtol=1e-4, atol=1e-5
    )

  def test_mistakes(self):
    mesh = partition.make_mesh(branch=2, data=4)
    for make, message in (
      (lambda: mixture_lib.Mixture(_no_text(), experts=2),
       'no model of text'),
      (lambda: mixture_lib.Mixture(self.module, experts=3, mesh=mesh),
       '3 experts do not divide over 2 branches'),
      (lambda: mixture_lib.Mixture(self.module, experts=2).join(self.params),
       '2 experts was given 3'),
      (lambda: mixture_lib.Mixture(self.module, experts=2).join(
        [{'w': np.ones(2)}, {'w': np.ones(3)}]), r'! w \[2\] expected, \[3\]'),
      (lambda: mixture_lib.Mixture(self.module, experts=2).join(
        self.params[:2], [0.9, 0.9]), 'not a distribution'),
    ):  # fmt: skip
      with self.assertRaisesRegex(errors.UserError, message):
        make()


def _no_text():
  return models.build(dict(small_networks.BUILT)['mlp'])


def _paths(prefix, family):
  return {f'{prefix}/{path}' for path in family.specs()}


if __name__ == '__main__':
  absltest.main()
