# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters from many tasks to new ones with few examples; merged experts.

    MERGEJAX_DATA=... python benchmarks/adapter_transfer.py [--seeds 3]
        [--cache FOLDER] [--only NAME ...] [--steps 1.0] [--rates] [--show]

One small T5 is pre-trained on denoising and tasks, then, seed by seed, trained on
twelve other classification tasks: all of it, or an adapter. From there it is
adapted to four tasks of families it never saw, with 32 and 128 examples and the
loss of a language model, and scored by rank classification on test data. Claims:
Poly-S >= Poly >= a shared LoRA, and Poly-mu keeps most of that (Caccia et al.,
2022); ATTEMPT is above prompt tuning (Asai et al., 2022); (IA)^3 with three losses
is above the loss of a language model alone (Liu et al., 2022).
`adapter_transfer_merge` merges LoRA experts of four tasks.

What is done is kept below the folder and not done again. The tables go to
`results/adapter_transfer.md` and `.json`. `--steps` multiplies all numbers of
steps; `--rates` tries learning rates on the first seed; `--only` takes some arms.
"""

import functools
import pathlib
import time

import adapter_transfer_arms as arms_lib
import adapter_transfer_data as data_lib
import adapter_transfer_merge
import adapter_transfer_table
import ext5
import ext5_data
import jax
import numpy as np
import real_data

from mergejax import adapters
from mergejax import evaluation
from mergejax import models
from mergejax import training
from mergejax.checkpoints import checkpoint


class Experiment:
  """The runs; programs and data are made when they are first needed."""

  def __init__(self, cache: pathlib.Path, scale: float):
    self.cache = cache
    self.steps = {
      n: max(2, round(scale * count)) for n, count in arms_lib.STEPS.items()
    }
    # Results of other settings are others.
    of_steps = '_'.join(str(count) for count in self.steps.values())
    of_rates = '_'.join(f'{rate:g}' for rate in arms_lib.RATES.values())
    self.before = cache / f'pretrained_{self.steps["pretrain"]}.npz'
    self.folder = cache / f'steps_{of_steps}_rates_{of_rates}'
    self.folder.mkdir(parents=True, exist_ok=True)
    self.rows = real_data.Rows(self.folder / 'adapted.jsonl')
    self.rates = real_data.Rows(self.folder / 'rates.jsonl')
    self.program = functools.cache(self._make_program)
    self.scorer = functools.cache(self._make_scorer)
    self.multi = functools.lru_cache(6)(self._make_multi)
    self.module = ext5_data.module()

  # Programs --------------------------------------------------------------------

  def family(self, kind: str, tasks: int | None = None):
    """The model, or the model with an adapter."""
    adapter = arms_lib.adapter_of(kind, tasks)
    if adapter is None:
      return models.family_of(self.module)
    return adapters.adapt(self.module, adapter)

  def _make_program(
    self, kind: str, stage: str, *, few: bool = False, rate: float | None = None
  ) -> arms_lib.Program:
    """What trains a kind in a stage; with T-Few's losses if so told."""
    family = self.family(
      kind, len(data_lib.MULTI) if stage == 'multi' else None
    )
    steps = self.steps[stage]
    optimizer = arms_lib.optimizer_of(
      kind, family, rate or arms_lib.RATES[kind], steps
    )
    objective = training.t_few() if few else training.cross_entropy(z_loss=0.0)
    return arms_lib.Program(
      family, optimizer, objective, steps, arms_lib.BATCH[stage]
    )

  def _make_scorer(self, kind: str):
    """`(params, task, split) -> accuracy` of rank classification."""
    family = self.family(kind)
    make = lambda task, split: evaluation.rank_evaluator(
      family, {'rows': self.scored(task, split)}
    )
    one = functools.cache(make)
    programs = []

    def score(params, task, split='test'):
      evaluator = one(task, split)
      if not programs:  # all tasks have the shapes of the first
        programs.append(jax.jit(evaluator.score))
      return round(float(programs[0](params, evaluator.data)['rows']), 5)

    return score

  def scored(self, task: str, split: str) -> list[data_lib.Batch]:
    """Rows to be ranked, in batches."""
    found = data_lib.numbered(data_lib.load(task, split, self.cache))
    size = arms_lib.BATCH['score']
    return data_lib.in_batches(found, size, -(-data_lib.MOST[split] // size))

  # Stages ----------------------------------------------------------------------

  @functools.cached_property
  def _examples(self):
    return ext5_data.Examples(data_lib.mixture(self.cache).name, self.cache)

  @functools.cached_property
  def _pretraining(self):
    return ext5.Program(self.module, ext5.RATE, self.steps['pretrain'])

  @functools.cached_property
  def base(self):
    """Parameters pre-trained on denoising and tasks."""
    if not self.before.exists():
      begin, name = time.process_time(), data_lib.mixture(self.cache).name
      drawn = self._examples.draw(name, ext5.BATCH, seed=0)
      params, metrics = self._pretraining.run(drawn, seed=0)
      checkpoint.save_checkpoint(self.before, params)
      took, loss = time.process_time() - begin, float(metrics['loss'])
      print(f'pre-trained, {took:.0f} s, loss {loss:.3f}', flush=True)
    return checkpoint.open_checkpoint(self.before).read()

  def _make_multi(self, kind: str, seed: int):
    """What the many tasks give: an adapter's leaves, or all parameters."""
    path = self.folder / f'{kind}_{seed}.npz'
    if not path.exists():
      begin, program = time.process_time(), self.program(kind, 'multi')
      rows = data_lib.together(data_lib.MULTI, self.cache)
      params = program.run(rows, seed, self.fresh(program.family, seed))
      if kind != 'full':
        params = program.family.split(params)[1]
      checkpoint.save_checkpoint(path, params, overwrite=True)
      took = time.process_time() - begin
      print(f'seed {seed}: {kind} of many tasks, {took:.0f} s', flush=True)
    return checkpoint.open_checkpoint(path).read()

  def fresh(self, family, seed: int):
    """The pre-trained model, with a fresh adapter if it has one."""
    params = self.base
    if not isinstance(family, adapters.Adapted):
      return params
    key = jax.random.fold_in(jax.random.key(seed), 1)
    return family.start(params, key)

  def begin(self, arm: str, seed: int, program: arms_lib.Program, rows):
    """What an adaptation begins from."""
    source, family = arms_lib.ARMS[arm][1], program.family
    if source is None:
      return self.fresh(family, seed)
    given = self.multi(source, seed)
    if arm == arms_lib.FULL:
      return given
    base, key = self.base, jax.random.key(seed)
    if arm == arms_lib.SPOT:
      # Sources are weighed by a prompt that is trained a little.
      begun = self.fresh(family, seed)
      tried = program.run(rows, seed, begun, program.steps // 5)
      made = adapters.spot(
        given['prompts']['target'], tried['prompts']['target']
      )
      given = {'prompts': {'target': np.asarray(made)}}
    elif arm == arms_lib.ATTEMPT:
      sources = given['prompts']['target']
      given = family.adapter.begin(family.base_specs, key, sources)
    elif arm in (arms_lib.POLY, arms_lib.POLY_S, arms_lib.POLY_MU):
      many = self.family(source, len(data_lib.MULTI))
      if arm == arms_lib.POLY_MU:
        given = many.adapter.collapsed(many.base_specs, given)
      else:
        _, given = many.adapter.with_tasks(many.base_specs, given, 1, key)
    return family.joined(base, given)

  # Adaptations -----------------------------------------------------------------

  def adapted(self, arm: str, seed: int, task: str, shots: int, rate=None):
    """`(parameters, program)` after an adaptation."""
    kind = arms_lib.ARMS[arm][0]
    program = self.program(kind, 'adapt', few=arm == arms_lib.IA3, rate=rate)
    rows = data_lib.few(task, shots, seed, self.cache)
    begun = self.begin(arm, seed, program, rows)
    return program.run(rows, seed, begun), program

  def adapt(self, arm: str, seed: int, task: str, shots: int) -> None:
    """Adapts to a task and scores on its test data."""

    def make():
      params, program = self.adapted(arm, seed, task, shots)
      accuracy = self.scorer(arms_lib.ARMS[arm][0])(params, task)
      return {'accuracy': accuracy, 'trained': program.trained}

    column = adapter_transfer_table.column(task, shots)
    self.rows.once(seed, arm, column, make)

  def without(self, seed: int, task: str) -> None:
    """What there is to begin with: the model as it is, one answer always."""
    score = self.scorer('full')
    makes = {
      arms_lib.UNADAPTED: lambda: score(self.base, task),
      arms_lib.COMMONEST: lambda: data_lib.commonest(task, self.cache),
    }
    for arm, make in makes.items():
      for shots in arms_lib.SHOTS:
        column = adapter_transfer_table.column(task, shots)
        self.rows.once(
          seed,
          arm,
          column,
          lambda make=make: {'accuracy': make(), 'trained': 0},
        )

  def try_rate(self, kind: str, rate: float, task: str) -> None:
    """Validation accuracy of a rate, on the first seed."""
    arms = {
      'full': arms_lib.FULL, 'lora': arms_lib.SHARED, 'ia3': arms_lib.IA3,
      'prompt': arms_lib.TUNING, 'attempt': arms_lib.ATTEMPT,
      'poly_s': arms_lib.POLY_S,
    }  # fmt: skip

    def make():
      params, _ = self.adapted(
        arms[kind], 0, task, arms_lib.SHOTS_OF_RATES, rate
      )
      score = self.scorer(kind)
      return {'accuracy': score(params, task, 'validation')}

    self.rates.once(0, f'{kind} {rate:g}', task, make)


def try_rates(run: Experiment) -> None:
  """Tries rates, and prints how good they are."""
  for kind, rates in arms_lib.TRIED.items():
    for rate in rates:
      for task in data_lib.DEVELOPMENT:
        run.try_rate(kind, rate, task)
  found = run.rates.found
  for kind, rates in arms_lib.TRIED.items():
    for rate in rates:
      own = [
        found[0, f'{kind} {rate:g}', task]['accuracy']
        for task in data_lib.DEVELOPMENT
      ]
      told = ', '.join(f'{value:.3f}' for value in own)
      print(f'{kind} {rate:g}: {np.mean(own):.3f} ({told})')


def run_seed(run: Experiment, seed: int, arms) -> None:
  """All of a seed."""
  for task in data_lib.LEFT_OUT:
    run.without(seed, task)
  for arm in arms:
    for task in data_lib.LEFT_OUT:
      for shots in arms_lib.SHOTS:
        run.adapt(arm, seed, task, shots)


def main():
  parser = real_data.parser()
  parser.add_argument('--cache', type=pathlib.Path)
  known = [*arms_lib.ARMS, 'merging']
  parser.add_argument('--only', nargs='*', default=known, choices=known)
  parser.add_argument('--steps', type=float, default=1.0)
  parser.add_argument('--rates', action='store_true', help='try rates')
  parser.add_argument('--show', action='store_true', help='train nothing')
  options = parser.parse_args()
  cache = options.cache or real_data.cache_folder() / 'adapter_transfer'
  run = Experiment(cache, options.steps)
  if options.rates:
    try_rates(run)
    return
  merging = adapter_transfer_merge.Merging(run)
  seeds = range(0 if options.show else options.seeds)
  for seed in seeds:
    run_seed(run, seed, [arm for arm in arms_lib.ARMS if arm in options.only])
  for seed in seeds if 'merging' in options.only else ():
    merging.run_seed(seed)
  adapter_transfer_table.write(
    'adapter_transfer' + ('' if options.steps == 1 else f'_{options.steps:g}'),
    run, [*arms_lib.ARMS, *arms_lib.PLAIN_ARMS], merging,
  )  # fmt: skip


if __name__ == '__main__':
  main()
