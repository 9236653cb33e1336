# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Branch-Train-Merge on real text, at equal compute.

    MERGEJAX_DATA=... python benchmarks/btm.py [--seeds 3] [--cache FOLDER]
        [--seed_steps 600] [--steps 200] [--only ARM ...] [--show]

A small language model, the seed, is trained on eight domains; then experts
branch from it, one a domain. They are mixed in output space and merged in
weight space, two, four, eight and twelve of them (nested), and compared with a
dense model that goes on from the same seed with as many tokens, and with
experts of random parts of the same text. The last four of twelve experts have
domains that the seed has not seen. Arms, in the order in which they run:

    experts   seed, ensembles and averages of weights
    dense     goes on with the mixture: as many steps, K times the rows
    random    experts of random parts of the text of all K domains
    branches  new experts from an average of the forest, against from the seed
    outer     DiLoCo: the experts are merged while they train
    mix       one sparse model of four experts, trained on (BTX)
    clusters  experts of clusters instead of domains (c-BTM)
    small     dense with K times the steps instead of rows

What is done is kept below the folder and not done again. The tables go to
`results/btm_*.md`, by the numbers of steps, which should be multiples of 100 for
DiLoCo.
"""

from collections.abc import Mapping, Sequence
import functools
import pathlib

import btm_forest
import btm_table
import jax
import numpy as np
import real_data

import mergejax as mj
from mergejax.evaluation import expert_table
from mergejax.evaluation import forest_scores
from mergejax.experts import clusters
from mergejax.experts import ensemble
from mergejax.experts import outer
from mergejax.experts import route
from mergejax.experts import upcycle
from mergejax.nn import moe_config

Bits = dict[str, float]

COUNTS = (2, 4, 8, 12)
RANDOM_COUNTS = (8, 4)
# Of those arms that have one number of experts.
CLUSTERS = 8
FEW = 4
ENSEMBLES = {
  'ensemble': 'cached',
  'ensemble, prior learnt on the way': 'updating',
  'ensemble, uniform prior': 'uniform',
}
# Tokens by which a row is routed, and experts that then answer.
CONTEXT, TOP_K = 32, 2
# Of which the best on validation text of the K domains is taken.
MERGES = (
  ('linear', {}),
  *(('task_arithmetic', {'scale': s, 'normalize': True}) for s in (1.5, 2, 3)),
  *(
    ('ties', {'density': density, 'scale': s})
    for density in (0.2, 0.5)
    for s in (1, 2)
  ),
  ('model_stock', {}),
)


class Experiment:
  """The arms: each makes rows `{domain: bits per byte}`."""

  def __init__(self, cache: pathlib.Path, seed_steps: int, steps: int):
    self.train = btm_forest.Training(cache, seed_steps, steps)
    self.rows = real_data.Rows(self.train.folder / 'rows.jsonl')
    self._scorer = expert_table.Scorer(self.train.module)
    self._said = {}

  # What is scored --------------------------------------------------------------

  @functools.cached_property
  def _sets(self):
    return {s: self.train.text.scored(s) for s in ('validation', 'test')}

  def _test(self, count: int):
    """`{domain: batches}` of the first K domains and of those left out."""
    known, new = btm_forest.domains_of(count)
    return {domain: self._sets['test'][domain] for domain in (*known, *new)}

  def _keep(self, seed, arm, count, make) -> None:
    """Keeps what `make()` gives, bits per byte by domain."""
    self.rows.once(seed, arm, str(count), lambda: {'bits': make()})

  def _keep_scored(self, seed, arm, count, make) -> None:
    """Keeps how parameters that `make()` gives score."""
    made = lambda: self._bits(make(), self._test(count))
    self._keep(seed, arm, count, made)

  def _bits(self, params, sets, scorer=None) -> Bits:
    scores = (scorer or self._scorer).scores(params, sets)
    return {domain: float(score.value) for domain, score in scores.items()}

  def _likelihoods(self, seed, names, split, domain) -> np.ndarray:
    """`<float32>[K, rows, length]` of the tokens of a domain under experts."""
    forest = self.train.forest(seed)
    for name in names:
      if (seed, name, split, domain) not in self._said:
        params = self.train.params(forest, name)
        self._said[seed, name, split, domain] = self._scorer.log_likelihood(
          params, self._sets[split][domain]
        )
    return np.stack([self._said[seed, n, split, domain] for n in names])

  def _prior(self, seed, names, domain) -> np.ndarray:
    """`[K]`: how likely each expert is, by validation text of the domain."""
    mask = self._scorer.mask(self._sets['validation'][domain])
    lp = self._likelihoods(seed, names, 'validation', domain)
    return expert_table.cached_prior(lp, mask, btm_forest.BATCH)

  def _mixed(self, seed, names, count, mode) -> Bits:
    """Of the ensemble."""
    found = {}
    for domain, batches in self._test(count).items():
      mixed = forest_scores.mixed(
        self._likelihoods(seed, names, 'test', domain),
        self._scorer.mask(batches), mode,
        prior=self._prior(seed, names, domain), batch_size=btm_forest.BATCH,
      )  # fmt: skip
      found[domain] = float(expert_table.score(mixed, batches).value)
    return found

  def _own(self, seed, name_of: Mapping[str, str]) -> Bits:
    """Of experts, `{domain: name}`, each on its own domain."""
    found = {}
    for domain, name in name_of.items():
      (lp,) = self._likelihoods(seed, [name], 'test', domain)
      score = expert_table.score(lp, self._sets['test'][domain])
      found[domain] = float(score.value)
    return found

  # Arms ------------------------------------------------------------------------

  def experts(self, seed: int) -> None:
    """Seed, experts, ensembles, averages."""
    forest = self.train.forest(seed)
    self.train.grow_domains(seed, btm_forest.ORDER[: COUNTS[-1]])
    for count in COUNTS:
      names = btm_forest.ORDER[:count]
      self._keep_scored(seed, 'seed', count, lambda: forest.params('seed'))
      own = {name: name for name in names}
      self._keep(
        seed, 'each expert on its own', count, lambda o=own: self._own(seed, o)
      )
      for arm, mode in ENSEMBLES.items():
        made = functools.partial(self._mixed, seed, names, count, mode)
        self._keep(seed, arm, count, made)
      uniform = functools.partial(self._uniform, seed, names)
      self._keep_scored(seed, 'uniform average', count, uniform)
      posterior = functools.partial(self._posterior_average, seed, names, count)
      self._keep(seed, 'posterior average', count, posterior)
      best = functools.partial(self._best_merge, seed, names, count)
      self.rows.once(seed, 'best merge', str(count), best)

  def _trees(self, seed, names):
    forest = self.train.forest(seed)
    return [self.train.params(forest, name) for name in names]

  def _uniform(self, seed, names):
    return mj.merge(self._trees(seed, names), 'linear')

  def _posterior_average(self, seed, names, count) -> Bits:
    """Every domain has its own average, by its prior."""
    trees, found = self._trees(seed, names), {}
    for domain, batches in self._test(count).items():
      prior = self._prior(seed, names, domain)
      weights = ensemble.average_weights(prior, 'posterior')
      params = mj.merge(trees, 'linear', weights=weights)
      found |= self._bits(params, {domain: batches})
    return found

  def _best_merge(self, seed, names, count):
    """Of the best of several, by the mean over validation text."""
    trees = self._trees(seed, names)
    base = self.train.params(self.train.forest(seed), 'seed')
    sets = {domain: self._sets['validation'][domain] for domain in names}
    tried = []
    for method, options in MERGES:
      given = {} if method == 'linear' else {'base': base}
      params = mj.merge(trees, method, **given, **options)
      told = [f'{n}={v}' for n, v in options.items()]
      name = f'{method}({", ".join(told)})'
      value = np.mean(list(self._bits(params, sets).values()))
      tried.append((value, name, params))
    _, name, params = min(tried, key=lambda one: one[0])
    return {'bits': self._bits(params, self._test(count)), 'chosen': name}

  def dense(self, seed: int) -> None:
    """As many tokens as K experts: as many steps, K times the rows."""
    for count in sorted(COUNTS, key=lambda k: (abs(k - 8), k)):
      made = functools.partial(self.train.dense, seed, count)
      self._keep_scored(seed, 'dense', count, made)

  def random(self, seed: int) -> None:
    """Experts of random parts of the text of K domains."""
    for count in RANDOM_COUNTS:
      names = self.train.grow_random(seed, count)
      for arm in ('ensemble', 'ensemble, uniform prior'):
        self._keep(
          seed, f'random parts, {arm}', count,
          functools.partial(self._mixed, seed, names, count, ENSEMBLES[arm]),
        )  # fmt: skip
      self._keep_scored(
        seed, 'random parts, uniform average', count,
        functools.partial(self._uniform, seed, names),
      )  # fmt: skip

  def branches(self, seed: int) -> None:
    """New experts that begin as an average of the forest."""
    old, new = btm_forest.ORDER[: btm_forest.SEEN], btm_forest.NEW
    self.train.grow_domains(seed, (*old, *new))
    trees, begun, shares = self._trees(seed, old), {}, {}
    for domain in new:
      prior = self._prior(seed, old, domain)
      weights = ensemble.average_weights(prior, 'posterior')
      shares[domain] = dict(zip(old, weights.tolist()))
      sets = {domain: self._sets['test'][domain]}
      begun |= self._bits(mj.merge(trees, 'linear', weights=weights), sets)
    names = self.train.grow_from_averages(seed, shares)
    last = COUNTS[-1]
    (seed_tree,) = self._trees(seed, ['seed'])
    test = {domain: self._sets['test'][domain] for domain in new}
    at_seed = functools.partial(self._bits, seed_tree, test)
    self._keep(seed, 'new: seed', last, at_seed)
    self._keep(seed, 'new: average', last, lambda: begun)
    for arm, of in (('seed', dict(zip(new, new))), ('average', names)):
      own = functools.partial(self._own, seed, of)
      self._keep(seed, f'new: expert from the {arm}', last, own)
    every = (*old, *names.values())
    made = functools.partial(self._mixed, seed, every, last, 'cached')
    self._keep(seed, 'ensemble, new from averages', last, made)

  def clusters(self, seed: int) -> None:
    """Experts of clusters against those of domains."""
    names, found = self.train.grow_clusters(seed, CLUSTERS)
    domains = btm_forest.ORDER[:CLUSTERS]
    made = functools.partial(self._mixed, seed, names, CLUSTERS, 'cached')
    self._keep(seed, 'clusters, ensemble', CLUSTERS, made)
    self._keep(
      seed, 'clusters, routed', CLUSTERS,
      functools.partial(self._routed, seed, names, found),
    )  # fmt: skip
    self.train.grow_domains(seed, domains)
    texts = lambda d: self.train.text.decoded(self.train.text.train(d))
    self._keep(
      seed, 'domains, routed', CLUSTERS,
      lambda: self._routed(
        seed, domains,
        clusters.of_groups({d: texts(d) for d in domains}, seed=seed),
      ),
    )  # fmt: skip

  def _routed(self, seed, names, found) -> Bits:
    """Of experts that the first tokens of a row choose."""
    router, bits = route.Router(found, top_k=TOP_K), {}
    for domain, batches in self._test(CLUSTERS).items():
      tokens = np.concatenate([b['decoder_target_tokens'] for b in batches])
      weights = router.weights(self.train.text.decoded(tokens[:, :CONTEXT]))
      mixed = forest_scores.routed(
        self._likelihoods(seed, names, 'test', domain),
        self._scorer.mask(batches), weights, CONTEXT,
      )  # fmt: skip
      bits[domain] = float(expert_table.score(mixed, batches).value)
    return bits

  def outer(self, seed: int) -> None:
    """DiLoCo, a domain a worker."""
    for every in self.train.merge_steps:
      made = functools.partial(
        self.train.merged, seed, FEW, outer.diloco(every)
      )
      self._keep_scored(seed, f'DiLoCo, H = {every}', FEW, made)

  def mix(self, seed: int) -> None:
    """A sparse model of the experts; and their average, trained as long."""
    names = btm_forest.ORDER[:FEW]
    self.train.grow_domains(seed, names)
    moe = moe_config.MoeConfig(
      num_experts=FEW, decoder_layers=btm_forest.LAYERS, top_k=2,
      normalize_gates=True, train_capacity_factor=None,
      eval_capacity_factor=None,
    )  # fmt: skip

    @functools.cache
    def mixed():
      return upcycle.branch_train_mix(
        self.train.module, self._trees(seed, names), moe,
        key=jax.random.key(seed),
      )  # fmt: skip

    def scored(params):
      scorer = expert_table.Scorer(mixed()[0])
      return self._bits(params, self._test(FEW), scorer)

    begun = lambda: scored(mixed()[1])
    self._keep(seed, 'mix, not trained', FEW, begun)
    trained = lambda: scored(self.train.go_on(seed, FEW, *mixed()))
    self._keep(seed, 'mix, trained on', FEW, trained)
    average = lambda: self.train.go_on(
      seed, FEW, self.train.module, self._uniform(seed, names)
    )
    self._keep_scored(seed, 'uniform average, trained on', FEW, average)

  def small(self, seed: int) -> None:
    """As many tokens as K experts in K times the steps."""
    made = functools.partial(self.train.dense_in_small_batches, seed, FEW)
    self._keep_scored(seed, 'dense, more steps', FEW, made)


ARMS: Sequence[str] = (
  'experts', 'dense', 'random', 'branches', 'outer', 'mix', 'clusters', 'small',
)  # fmt: skip


def main():
  parser = real_data.parser()
  parser.add_argument('--cache', type=pathlib.Path)
  parser.add_argument('--seed_steps', type=int, default=600)
  parser.add_argument('--steps', type=int, default=200)
  parser.add_argument('--only', nargs='+', choices=ARMS, default=ARMS)
  parser.add_argument('--show', action='store_true', help='train nothing')
  options = parser.parse_args()
  cache = options.cache or real_data.cache_folder() / 'corpora_lm'
  run = Experiment(cache, options.seed_steps, options.steps)
  for arm in () if options.show else options.only:
    for seed in range(options.seeds):
      getattr(run, arm)(seed)
  name = f'btm_{options.seed_steps}_{options.steps}.md'
  btm_table.write(
    list(run.rows.found.values()), name, options.seed_steps, options.steps
  )


if __name__ == '__main__':
  main()
