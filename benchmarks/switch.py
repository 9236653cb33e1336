# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Switch against dense on real text, at equal operations a token and steps.

    MERGEJAX_DATA=... python benchmarks/switch.py [--seeds 3] [--cache FOLDER]
        [--steps 800] [--only ARM ...] [--show]

The language model of `corpora_lm` (two layers, of which the second is sparse)
trains on all thirteen domains together, each with as many rows as it has, and
in the same order in every arm of a seed. Loss is measured on a fixed set of
held-out rows, equally many of each domain, as training goes on. Claim (Fedus et
al., 2021): Switch reaches the loss of the dense model in a seventh of the steps.

The learning rate falls with the inverse root of the step, as in the paper: it
does not know how long the run is, so a loss that is reached early was not
waiting for the end of a schedule.

Experts that choose tokens look at later ones, and `MoeConfig` refuses them in
decoders. They are compared on another task, where nothing is causal: to restore
tokens of a row that is seen whole but for these (`masked ...`), with a dense and
a Switch model of the same task beside them. Their losses cannot be compared with
those of language models.

What is done is kept below the folder and not done again. Tables go to
`results/switch.md` and `.json`, curves to `results/switch.png`; runs of another
length have it in the name.
"""

import argparse
from collections.abc import Callable, Mapping
import functools
import pathlib
import time
from typing import Any, NamedTuple

import corpora_lm
import jax
import numpy as np
import real_data
import switch_table

from mergejax import training
from mergejax.core import tree
from mergejax.evaluation import metrics
from mergejax.nn import moe_metrics

STEPS = 800
EVALUATIONS = 16
# Held-out rows of each domain.
HELD_OUT = 20
WARMUP = 50
PEAK = 0.08
# Every third token is to be restored; the number 2 stands in its place.
MASKED_SHARE = 0.3
MASK = 2
# Of these a mean over the last quarter of a run is told.
ROUTING = ('dropped_pairs', 'fraction_tokens_left_behind', 'dead_experts')


class Arm(NamedTuple):
  """One model that is trained.

  Attributes:
    moe: settings of `moe_config.MoeConfig`; None: a dense model.
    mlp_dim: hidden size of a feed-forward block, of an expert and of others.
    masked: restores masked tokens instead of telling the next one.
  """

  moe: Mapping[str, Any] | None = None
  mlp_dim: int = 512
  masked: bool = False


def switch(
  experts: int = 8,
  room: float | None = 1.25,
  evaluated: float | None = 2.0,
  **more: Any,
) -> dict[str, Any]:
  """Settings of sparse layers, by default the paper's.

  Args:
    experts: how many.
    room: of an expert in training, in fair shares of the tokens; None: all.
    evaluated: in evaluation.
    **more: further fields.
  """
  return {
    'num_experts': experts, 'train_capacity_factor': room,
    'eval_capacity_factor': evaluated, **more,
  }  # fmt: skip


# One width serves all layers: two experts of 344 and a block of 344 stand
# against two blocks of 512. Shares are of tokens, and each asks for two experts:
# 2.5 is what 1.25 is to the others.
TOP2 = switch(room=2.5, evaluated=4.0, top_k=2, normalize_gates=True)
# Each token meets one expert in the mean.
CHOICE = switch(
  room=1.0, evaluated=1.0, router='experts_choose', allow_noncausal=True
)
DENSE, MASKED_DENSE = 'dense', 'masked dense'
ARMS = {
  DENSE: Arm(),
  'top-1': Arm(switch()),
  'top-1, 4 experts': Arm(switch(4)),
  'top-1, 16 experts': Arm(switch(16)),
  'top-1, room 1.0': Arm(switch(room=1.0)),
  'top-1, room 2.0': Arm(switch(room=2.0)),
  'top-1, dropless': Arm(switch(room=None, evaluated=None)),
  'top-2': Arm(TOP2, mlp_dim=344),
  MASKED_DENSE: Arm(masked=True),
  'masked top-1': Arm(switch(), masked=True),
  'masked expert choice': Arm(CHOICE, masked=True),
}


def masked(batch: corpora_lm.Batch, seed: int) -> corpora_lm.Batch:
  """Rows whose masked tokens are to be told from all others on both sides."""
  tokens = batch['decoder_target_tokens']
  hidden = np.random.default_rng(seed).random(tokens.shape) < MASKED_SHARE
  return {
    'decoder_input_tokens': np.where(hidden, MASK, tokens).astype(np.int32),
    'decoder_target_tokens': tokens,
    'decoder_loss_weights': (hidden & (tokens > 0)).astype(np.int32),
    # All of a row is a prefix that sees itself whole.
    'decoder_causal_attention': np.ones_like(tokens),
  }


class Timed:
  """A function of parameters that knows what the steps between its calls took.

  The first span, in which the step is compiled, is left out.
  """

  def __init__(self, fn: Callable[..., Any]):
    self._fn, self._begun, self.spans = fn, None, []

  def __call__(self, params):
    jax.block_until_ready(params)
    if self._begun is not None:
      self.spans.append(np.subtract(_clocks(), self._begun))
    found = self._fn(params)
    self._begun = _clocks()
    return found

  def milliseconds(self, steps: int) -> dict[str, float | None]:
    """Medians of a step; None of a run of one span."""
    if not self.spans:
      return {'wall': None, 'cores': None}
    wall, cores = np.median(self.spans, axis=0) / steps * 1000
    return {'wall': round(float(wall), 2), 'cores': round(float(cores), 2)}


def _clocks():
  return time.perf_counter(), time.process_time()


class Experiment:
  """The runs; data are read when they are first needed."""

  def __init__(self, cache: pathlib.Path, steps: int):
    self.cache, self.steps = cache, steps
    most = max(1, steps // EVALUATIONS)
    self.every = next(n for n in range(most, 0, -1) if steps % n == 0)
    folder = cache / 'switch'
    folder.mkdir(parents=True, exist_ok=True)
    self.rows = real_data.Rows(folder / f'{steps}_{PEAK:g}.jsonl')

  @functools.cached_property
  def _train(self):
    parts = [
      corpora_lm.rows(d, 'train', self.cache) for d in corpora_lm.domains()
    ]
    return corpora_lm.as_batch(np.concatenate(parts))

  @functools.cached_property
  def _held_out(self):
    """Validation rows as batches."""
    parts = [
      corpora_lm.rows(d, 'validation', self.cache, HELD_OUT)
      for d in corpora_lm.domains()
    ]
    return corpora_lm.scored(np.concatenate(parts), self.cache)

  def run(self, name: str, seed: int) -> None:
    """Trains an arm, unless it is there."""
    self.rows.once(seed, name, '', lambda: self._made(ARMS[name], seed))

  def _made(self, arm, seed):
    module = corpora_lm.module(mlp_dim=arm.mlp_dim, moe=arm.moe)
    timed = Timed(self._loss(arm, module))
    found = {}
    rate = training.schedules.factors(
      base_learning_rate=PEAK * WARMUP**0.5, warmup_steps=WARMUP
    )
    trainer = training.Trainer(
      module,
      training.optim.adafactor(rate),
      callbacks=[
        training.evaluate(timed, every=self.every),
        training.callbacks.on_log(lambda step, own: found.update({step: own})),
      ],
    )
    data = masked(self._train, seed) if arm.masked else self._train
    state = trainer.fit(
      training.ArrayStream(data, corpora_lm.BATCH, seed=seed),
      steps=self.steps, log_every=self.every, key=jax.random.key(seed),
    )  # fmt: skip
    sizes = [leaf.size for leaf in tree.flatten(state.params).values()]
    return {
      'parameters': sum(sizes),
      'curve': [
        (step, round(float(own['eval/held_out']), 5))
        for step, own in found.items()
      ],
      'milliseconds': timed.milliseconds(self.every),
      'routing': routing(found, self.steps) if arm.moe else {},
    }

  def _loss(self, arm, module):
    """A function of parameters: the loss on held-out rows."""
    if not arm.masked:
      score = corpora_lm.BitsPerByte(module)
      return lambda params: {'held_out': score(params, self._held_out)}
    batches = [masked(b, 1000 + i) for i, b in enumerate(self._held_out)]
    scorer = metrics.make_scorer(module, 'loss')

    def of_masked(params):
      nats, tokens = scorer(params, batches)
      return {'held_out': float(nats.sum() / tokens.sum())}

    return of_masked


def routing(
  logged: Mapping[int, Mapping[str, Any]], steps: int
) -> dict[str, float]:
  """How experts were used, the mean over what the last quarter logged.

  `load_entropy` is that of the shares of experts, over its largest value: 1 if
  all are used alike.
  """
  last = [own for step, own in logged.items() if step > 0.75 * steps]
  found = {
    name: float(np.mean([own[f'moe/{name}'] for own in last]))
    for name in ROUTING
  }
  loads = np.stack(
    [own[moe_metrics.LOADS] for own in last]
  )  # [logs, layers, experts]
  surprise = -np.log(np.maximum(loads, 1e-12))
  entropies = np.sum(loads * surprise, axis=-1) / np.log(loads.shape[-1])
  found['load_entropy'] = float(np.mean(entropies))
  return {name: round(value, 5) for name, value in found.items()}


def main():
  parser = real_data.parser()
  parser.description = __doc__.splitlines()[0]
  parser.add_argument('--cache', type=pathlib.Path)
  parser.add_argument('--steps', type=_steps, default=STEPS)
  parser.add_argument('--only', nargs='*', choices=list(ARMS), default=ARMS)
  parser.add_argument('--show', action='store_true', help='train nothing')
  options = parser.parse_args()
  cache = options.cache or real_data.cache_folder() / 'corpora_lm'
  run = Experiment(cache, options.steps)
  for seed in range(0 if options.show else options.seeds):
    for name in options.only:
      run.run(name, seed)
  name = 'switch' if options.steps == STEPS else f'switch_{options.steps}'
  switch_table.write(
    name, list(run.rows.found.values()), list(ARMS), (DENSE, MASKED_DENSE),
    head(options.steps),
  )  # fmt: skip


def _steps(text: str) -> int:
  if int(text) < 1:
    raise argparse.ArgumentTypeError('at least one step')
  return int(text)


def head(steps: int) -> str:
  """What stands above the tables."""
  return f"""\
{steps} steps of {corpora_lm.BATCH} rows of {corpora_lm.LENGTH} tokens from
thirteen domains, each with as many rows as it has (43,649 in all). Two layers, of
which the second is sparse, width 128, blocks of 512, 1024 pieces. Held out:
{HELD_OUT} rows a domain. Sparse arms have 8 experts, and room of 1.25 in training
and 2.0 in evaluation, where their name says nothing else. Tokens are routed in as
many groups as there are experts. The rate rises to {PEAK} in {WARMUP} steps and
falls with the inverse root; of 0.04, 0.08 and 0.16 it was best for the dense
model of seed 0 after 100 steps.

`top-2` has room of 2.5 (of pairs: 1.25) and blocks of 344 in both layers, for
equal operations a token (0.8% more), and weights that sum to 1. Expert choice
looks at later tokens: it is no language model, and `MoeConfig` refuses it in
decoders. `masked ...` restore three of ten tokens of rows that are seen whole,
in nats a masked token; distances to later tokens are one bucket. Expert choice
has room of 1.0, one expert a token in the mean."""


if __name__ == '__main__':
  main()
