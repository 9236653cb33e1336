# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Pre-training on many tasks beside denoising, and fine-tuning on others.

    MERGEJAX_DATA=... python benchmarks/ext5.py [--seeds 3] [--cache FOLDER]
        [--steps 800] [--tuning_steps 100] [--tuning_rate 0.02] [--show]

Small T5s are pre-trained on tables mixed as ExMix with denoising at ratio R:
0 is tasks alone, inf denoising alone. Then each is fine-tuned on each of a few
tasks that were left out, and scored on their test sets. Beside them: the task
alone from fresh weights, for as many steps as a fine-tuning and for as many as
pre-training and fine-tuning together. Claim (Aribandi et al., 2022): R = 2 is
above denoising alone, and R = 0 far below it.

What is done is kept below the folder and not done again. The tables go to
`results/ext5_*.md`, by the numbers of steps and the rate of fine-tuning.
"""

import functools
import pathlib

import ext5_data
import ext5_table
import jax
import numpy as np
import real_data

from mergejax import training
from mergejax.checkpoints import checkpoint
from mergejax.data import mixtures
from mergejax.evaluation import suite

RATIOS = (float('inf'), 0.0, 1.0, 2.0, 4.0)
BATCH = 16
RATE = 0.03
MAX_EXAMPLES = 1000
SHORT = 'single task, steps of a fine-tuning'
LONG = 'single task, steps of both'


def name_of(ratio: float) -> str:
  """A row of the table."""
  if np.isinf(ratio):
    return 'denoising only'
  return 'tasks only (R = 0)' if not ratio else f'R = {ratio:g}'


class Program:
  """One compiled step for runs of equal length, whatever their data."""

  def __init__(self, module, rate: float, steps: int, tasks=()):
    schedule = training.schedules.warmup_cosine(
      rate, warmup_steps=min(100, steps // 5)
    )
    self.steps = steps
    self._logged = {}
    keep = lambda step, metrics: self._logged.update(metrics)
    self._trainer = training.Trainer(
      module,
      functools.partial(training.optim.adafactor, schedule),
      objective=training.cross_entropy(tasks=len(tasks)),
      transforms=[training.task_metrics(tasks)] if tasks else [],
      callbacks=[training.callbacks.on_log(keep)],
    )

  def run(self, batches, seed: int, params=None):
    """`(params, metrics of the last step)`."""
    state = self._trainer.fit(
      batches, steps=self.steps, log_every=self.steps,
      key=jax.random.key(seed), params=params,
    )  # fmt: skip
    return jax.device_get(state.params), dict(self._logged)


class Experiment:
  """The runs; programs and data are made when they are first needed."""

  def __init__(
    self, cache: pathlib.Path, steps: int, tuning_steps: int, tuning_rate: float
  ):
    self.cache, self.steps = cache, steps
    self.tuning_steps, self.tuning_rate = tuning_steps, tuning_rate
    # Results of other settings are others.
    self.folder = cache / f'steps_{steps}'
    self.folder.mkdir(parents=True, exist_ok=True)
    self.pretrained = real_data.Rows(self.folder / 'pretrained.jsonl')
    name = f'tuned_{tuning_steps}_{tuning_rate:g}.jsonl'
    self.rows = real_data.Rows(self.folder / name)
    self.module = ext5_data.module()
    self.mixtures = {r: ext5_data.mixture(r, cache).name for r in RATIOS}
    self._scores = {}
    vocab = ext5_data.vocabulary(cache)
    self.tuned = {
      name: ext5_data.table_task(name, templates, vocab)
      for name, (_, templates) in ext5_data.LEFT_OUT.items()
    }

  @functools.cached_property
  def _examples(self):
    return ext5_data.Examples(self.mixtures[1.0], self.cache)

  @functools.cached_property
  def _pretraining(self):
    return Program(self.module, RATE, self.steps, self._examples.names)

  @functools.cached_property
  def _tuning(self):
    return Program(self.module, self.tuning_rate, self.tuning_steps)

  @functools.cached_property
  def _alone(self):
    """From fresh weights: the rate of pre-training, the steps of both."""
    return Program(self.module, RATE, self.steps + self.tuning_steps)

  @functools.cached_property
  def _alone_shortly(self):
    return Program(self.module, RATE, self.tuning_steps)

  def _score(self, task):
    if task not in self._scores:
      one = suite.of_mixture(
        self.tuned[task], lengths=ext5_data.LENGTHS, batch_size=64,
        max_examples=MAX_EXAMPLES,
      )  # fmt: skip
      self._scores[task] = one.evaluator(self.module, 'test').compiled()
    return self._scores[task]

  def accuracy(self, params, task: str) -> dict[str, float]:
    """Of the test set."""
    return {'accuracy': self._score(task)(params)[self.tuned[task]]}

  def pretrain(self, ratio: float, seed: int) -> None:
    """Trains on a mixture and keeps the parameters."""

    def make():
      data = self._examples.draw(self.mixtures[ratio], BATCH, seed)
      params, metrics = self._pretraining.run(data, seed)
      checkpoint.save_checkpoint(
        self._path(ratio, seed), params, overwrite=True
      )
      return _summary(self._examples.names, metrics)

    self.pretrained.once(seed, name_of(ratio), '', make)

  def tune(self, ratio: float, seed: int, task: str) -> None:
    """Trains pre-trained parameters on a task."""

    def make():
      params = checkpoint.open_checkpoint(self._path(ratio, seed)).read()
      params, _ = self._tuning.run(self._data(task, seed), seed, params)
      return self.accuracy(params, task)

    self.rows.once(seed, name_of(ratio), task, make)

  def alone(self, arm: str, seed: int, task: str) -> None:
    """Trains fresh parameters on a task."""

    def make():
      program = self._alone if arm == LONG else self._alone_shortly
      params, _ = program.run(self._data(task, seed), seed)
      return self.accuracy(params, task)

    self.rows.once(seed, arm, task, make)

  def _path(self, ratio, seed):
    return self.folder / f'{ratio:g}_{seed}.npz'

  def _data(self, task, seed):
    data = ext5_data.examples(self.tuned[task], self.cache)
    return training.ArrayStream(data, BATCH, seed=seed)


def _summary(names, metrics):
  """What was drawn, and the last losses, of denoising and of tasks."""
  result = {'loss': float(metrics['loss'])}
  for kind, prefix in (('denoising', 'corpus_'), ('tasks', 'ext5_')):
    mine = [n for n in names if n.startswith(prefix)]
    drawn = [int(metrics[f'examples/{n}']) for n in mine]
    result[f'{kind} drawn'] = sum(drawn)
    losses = [metrics[f'loss/{n}'] for n, d in zip(mine, drawn) if d]
    result[f'{kind} loss'] = float(np.mean(losses)) if losses else None
  return result


def write(run: Experiment) -> None:
  """Writes the tables, and prints them."""
  rows = list(run.rows.found.values())
  before = list(run.pretrained.found.values())
  tasks = list(ext5_data.LEFT_OUT)
  arms = [name_of(ratio) for ratio in RATIOS]
  lines = [
    f'Measured on {ext5_table.machine()}; `+-` is half of a 95% t interval.',
    '',
    f'Accuracy after {run.tuning_steps} steps of fine-tuning at rate '
    f'{run.tuning_rate}; pre-training has {run.steps} steps, batches {BATCH} '
    f'rows. {tasks[-1]} is of a family of the mixture.',
    '',
    *ext5_table.accuracies(
      rows, [*arms, SHORT, LONG], tasks, tasks[:-1], to=arms[0]
    ),
    '',
    'What pre-training drew, and the newest loss in nats a token, the mean over '
    'the tasks or the domains.',
    '',
    *ext5_table.pretraining(before, arms),
    '',
    'What R = 2 draws, over the whole of pre-training.',
    '',
    '```',
    mixtures.table(
      mixtures.probabilities(
        run.mixtures[2.0], steps=run.steps, batch_size=BATCH
      )
    ),
    '```',
  ]
  text = '\n'.join(lines) + '\n'
  name = f'ext5_{run.steps}_{run.tuning_steps}_{run.tuning_rate:g}.md'
  (real_data.RESULTS / name).write_text(text)
  print(text)


def main():
  parser = real_data.parser()
  parser.add_argument('--cache', type=pathlib.Path)
  parser.add_argument('--steps', type=int, default=800)
  parser.add_argument('--tuning_steps', type=int, default=100)
  parser.add_argument('--tuning_rate', type=float, default=0.02)
  parser.add_argument('--show', action='store_true', help='train nothing')
  options = parser.parse_args()
  cache = options.cache or real_data.cache_folder() / 'ext5'
  run = Experiment(
    cache, options.steps, options.tuning_steps, options.tuning_rate
  )
  tasks = list(ext5_data.LEFT_OUT)
  seeds = range(0 if options.show else options.seeds)
  for seed in seeds:
    for ratio in RATIOS:
      run.pretrain(ratio, seed)
      for task in tasks:
        run.tune(ratio, seed, task)
    for task in tasks:
      run.alone(SHORT, seed, task)
  # The dearest come last: what is there when a run ends is told by seeds.
  for seed in seeds:
    for task in tasks:
      run.alone(LONG, seed, task)
  write(run)


if __name__ == '__main__':
  main()
