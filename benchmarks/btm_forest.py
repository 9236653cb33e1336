# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What `btm.py` trains: seeds, experts, dense models, kept in forests."""

from collections.abc import Mapping, Sequence
import functools
import pathlib

import corpora_lm
import jax
import numpy as np

from mergejax import models
from mergejax import partition
from mergejax import training
from mergejax.core import typing
from mergejax.experts import beginnings
from mergejax.experts import branch
from mergejax.experts import clusters
from mergejax.experts import forest as forest_lib
from mergejax.experts import outer as outer_lib

# Rows of a step of an expert: few, they then stay in the caches of a CPU.
BATCH = 4
# Of 0.025, 0.05 and 0.1 the best for a seed, on validation text of four domains.
RATE = 0.05
VALIDATION_ROWS, TEST_ROWS = 32, 64
LAYERS = 2
# H of DiLoCo.
MERGE_STEPS = (20, 100)
# Experts in one program, on a CPU one after the other.
SIDE_BY_SIDE = 4
# The first K have experts; the seed is trained on the first eight, so that
# five are new to all models of up to eight experts, and one to those of twelve.
ORDER = (
  'biomedical_abstracts', 'shakespeare', 'maths_problems', 'news',
  'legal_judgments', 'service_dialogue', 'novels_french', 'tweets',
  'bible', 'policies_licences', 'movie_reviews', 'encyclopedia',
  'novels_english',
)  # fmt: skip
SEEN = 8
NEW = ORDER[SEEN:12]
SEED = {'seed': 1.0}


def domains_of(count: int) -> tuple[Sequence[str], Sequence[str]]:
  """`(domains of K experts, domains that no model has seen)`."""
  return ORDER[:count], ORDER[max(count, SEEN) :]


class Text:
  """Rows of the domains."""

  def __init__(self, cache: pathlib.Path):
    self._cache = cache
    given = sorted(corpora_lm.domains())
    if given != sorted(ORDER):
      raise SystemExit(f'Other domains than are known here: {given}.')

  def train(self, domain: str) -> np.ndarray:
    return corpora_lm.rows(domain, 'train', self._cache)

  def mixture(self, count: int) -> list[np.ndarray]:
    """Of the first K domains."""
    return [self.train(domain) for domain in ORDER[:count]]

  def scored(self, split: str) -> dict[str, list[corpora_lm.Batch]]:
    """Batches of all domains, a fixed sample of the split."""
    most = TEST_ROWS if split == 'test' else VALIDATION_ROWS
    rows = {d: corpora_lm.rows(d, split, self._cache, most) for d in ORDER}
    return {d: corpora_lm.scored(r, self._cache) for d, r in rows.items()}

  def decoded(self, tokens: np.ndarray) -> list[str]:
    """Text of rows of tokens."""
    pieces = corpora_lm.vocabulary(self._cache)
    return [pieces.decode(row[row > 0].tolist()) for row in tokens]


class Training:
  """Makes models, and keeps those that others begin from.

  One learning rate spans seed and branch: linear warm-up over 8 % of the steps
  and then down to 0, as in the paper's scripts; moments go on. What branches,
  and what is compared with it, all starts at the seed's step.
  """

  def __init__(self, cache: pathlib.Path, seed_steps: int, steps: int):
    self.steps, self._seed_steps = steps, seed_steps
    self._total = seed_steps + steps
    # Merges must fall on the last step, too.
    self.merge_steps = [
      every
      for every in MERGE_STEPS
      if steps % every == 0 and seed_steps % every == 0
    ]
    self.text = Text(cache)
    self.folder = cache / f'btm_{seed_steps}_{steps}'
    self.folder.mkdir(parents=True, exist_ok=True)
    self.module = corpora_lm.module(num_layers=LAYERS)
    rate = training.schedules.warmup_linear(
      RATE, warmup=0.08, steps=self._total
    )
    self._optimizer = training.optim.adafactor(rate)
    self._single = training.Trainer(self.module, self._optimizer)
    self._several = self._branches()
    self._read = functools.cache(lambda forest, name: forest.params(name))
    self._forests = {}

  def _branches(self, outer: outer_lib.Outer | None = None):
    return branch.BranchTrainer(
      self.module, self._optimizer, outer=outer,
      experts=[str(i) for i in range(SIDE_BY_SIDE)],
    )  # fmt: skip

  # The forest ------------------------------------------------------------------

  def forest(self, seed: int) -> forest_lib.Forest:
    """Of a seed model that is trained once."""
    if seed not in self._forests:
      path = self.folder / f'forest_{seed}'
      if not path.exists():
        data = corpora_lm.stream(self.text.mixture(SEEN), BATCH, 1000 * seed)
        state = self._fit(
          self._single, data, self._seed_steps, key=jax.random.key(seed)
        )
        forest_lib.create(
          path, state.params, model=self.module, steps=self._seed_steps,
          state=beginnings.kept(state),
        )  # fmt: skip
      self._forests[seed] = forest_lib.Forest(path)
    return self._forests[seed]

  def params(self, forest: forest_lib.Forest, name: str) -> typing.Tree:
    """Of an expert or the seed, read once."""
    return self._read(forest, name)

  def _grow(self, seed, data, parents=None) -> None:
    """Trains those experts, `{name: its rows}`, that are not there."""
    forest, names = self.forest(seed), list(data)
    for first in range(0, len(names), SIDE_BY_SIDE):
      chunk = names[first : first + SIDE_BY_SIDE]
      if all(name in forest.experts for name in chunk):
        continue
      shares = [parents[name] if parents else SEED for name in chunk]
      numbers = [1000 * seed + 1 + first + i for i in range(len(chunk))]
      streams = [
        corpora_lm.stream([data[name]], BATCH, n)
        for name, n in zip(chunk, numbers)
      ]
      states = [self._begun(seed, s, n) for s, n in zip(shares, numbers)]
      state = self._fit(
        self._several, branch.StackedStream(streams), self._total, state=states
      )
      for i, name in enumerate(chunk):
        if name not in forest.experts:
          own = branch.unstack(state, i)
          forest.add(
            name, own.params, parents=shares[i], steps=self.steps,
            branched_by='posterior' if parents else 'seed',
            state=beginnings.kept(own),
          )  # fmt: skip

  def grow_domains(self, seed: int, domains: Sequence[str]) -> None:
    """Experts of domains."""
    self._grow(seed, {domain: self.text.train(domain) for domain in domains})

  def grow_random(self, seed: int, count: int) -> list[str]:
    """Experts of random parts of the rows of the first K domains; names."""
    rows = np.concatenate(self.text.mixture(count))
    order = np.random.default_rng(seed).permutation(len(rows))
    parts = np.array_split(rows[order], count)
    data = {f'random_{count}_{i}': part for i, part in enumerate(parts)}
    self._grow(seed, data)
    return list(data)

  def grow_from_averages(
    self, seed: int, shares: Mapping[str, Mapping[str, float]]
  ) -> dict[str, str]:
    """Experts of domains that begin as averages; `{domain: name}`."""
    names = {domain: f'{domain}_from_average' for domain in shares}
    self._grow(
      seed,
      {name: self.text.train(domain) for domain, name in names.items()},
      {name: shares[domain] for domain, name in names.items()},
    )
    return names

  def grow_clusters(
    self, seed: int, count: int
  ) -> tuple[list[str], clusters.Clusters]:
    """Experts of clusters of the rows of the first K domains, and these."""
    path = self.folder / f'clusters_{seed}'
    names = [f'cluster_{i}' for i in range(count)]
    if not path.exists():
      rows = np.concatenate(self.text.mixture(count))
      found = clusters.fit(self.text.decoded(rows), count, seed=seed)
      self._grow(
        seed, {n: rows[found.assignment == i] for i, n in enumerate(names)}
      )
      found.save(path)
    return names, clusters.load(path)

  # Others ----------------------------------------------------------------------

  def dense(self, seed: int, count: int) -> typing.Tree:
    """The seed goes on with K domains: as many steps, K times the rows."""
    data = corpora_lm.stream(
      self.text.mixture(count), count * BATCH, 1000 * seed + 999
    )
    trainer = training.Trainer(self.module, self._optimizer, accumulate=count)
    begun = self._begun(seed)
    return self._fit(trainer, data, self._total, state=begun).params

  def dense_in_small_batches(self, seed: int, count: int) -> typing.Tree:
    """The seed goes on with K domains: as many rows, K times the steps.

    The learning rate comes down from where the seed stopped.
    """
    steps = count * self.steps
    peak = RATE * self.steps / (self._total - int(0.08 * self._total))
    rate = training.schedules.warmup_linear(peak, warmup=0, steps=steps)
    trainer = training.Trainer(self.module, training.optim.adafactor(rate))
    begun = self._begun(seed, reset_schedule=True)
    data = corpora_lm.stream(self.text.mixture(count), BATCH, 1000 * seed + 999)
    return self._fit(trainer, data, steps, state=begun).params

  def merged(self, seed: int, count: int, outer: outer_lib.Outer):
    """The seed on K domains, a domain a worker, merged while they train."""
    streams = [
      corpora_lm.stream([self.text.train(domain)], BATCH, 1000 * seed + 1 + i)
      for i, domain in enumerate(ORDER[:count])
    ]
    state = self._fit(
      self._branches(outer), branch.StackedStream(streams), self._total,
      state=self._begun(seed),
    )  # fmt: skip
    return branch.unstack(state.params, 0)

  def go_on(
    self, seed: int, count: int, model, params: typing.Tree
  ) -> typing.Tree:
    """Trains parameters on K domains, for the steps of a branch of one expert.

    The schedule stands where the seed stopped; moments begin anew.
    """
    trainer = self._single
    if models.family_of(model).config != trainer.family.config:
      trainer = training.Trainer(model, self._optimizer)
    state = trainer.begin(self._total, params, jax.random.key(seed))
    state = state.replace(
      step=np.int32(self._seed_steps),
      opt_state=beginnings.at_step(state.opt_state, self._seed_steps),
    )
    data = corpora_lm.stream(self.text.mixture(count), BATCH, 1000 * seed + 998)
    return self._fit(trainer, data, self._total, state=state).params

  def _begun(self, seed, shares=None, number=0, reset_schedule=False):
    """A state of one model that begins as an average of the forest."""
    return beginnings.begin(
      self.forest(seed), shares or SEED, self._single, steps=self._total,
      key=jax.random.fold_in(jax.random.key(seed), number),
      reset_schedule=reset_schedule,
    )  # fmt: skip

  def _fit(self, trainer, data, steps, **given):
    """The trained state, in host memory."""
    state = trainer.fit(data, steps=steps, log_every=steps, **given)
    return partition.to_host(state)
