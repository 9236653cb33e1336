# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Branch-Train-Merge, from text to report.

A seed language model is trained on the mixture of all domains and copied once
per domain; the copies train side by side, each on its own domain, while a dense
model goes on with the mixture at the same total compute. Experts are then
merged in weight space and mixed in output space, and everything is evaluated on
every domain.

Source: Li et al., "Branch-Train-Merge" (2022),
https://arxiv.org/abs/2208.03306.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import time
from typing import Any

import jax

from mergejax import partition
from mergejax.cli import domain_runs
from mergejax.cli import same_run
from mergejax.cli import train
from mergejax.evaluation import base as evaluation_base
from mergejax.evaluation import expert_table
from mergejax.evaluation import plots
from mergejax.evaluation import report
from mergejax.evaluation import suite as suite_lib
from mergejax.experts import branch
from mergejax.experts import outer as outer_lib
from mergejax.training import checkpoints


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(domain_runs.DomainSettings):
  """What is trained, how long, and on what; bound by gin.

  Numbers that a gin file sets have no default here. The dense model's batch
  has K times the rows of an expert's.

  Attributes:
    seed_steps: updates of the seed on the mixture.
    branch_steps: updates of every expert, and of the dense model.
    scales: task arithmetic's candidates, chosen on validation.
    outer: merges the experts while they train, `@outer.diloco()`; by default
      they never meet.
  """

  seed_steps: int
  branch_steps: int
  scales: Sequence[float] = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0)
  outer: outer_lib.Outer | None = None


def describe(settings: Settings) -> dict[str, Any]:
  """The settings that make two runs the same, as plain data."""
  fields = domain_runs.describe(settings, 'outer')
  outer = outer_lib.checked(settings.outer)
  if outer is not None:
    fields['outer'] = dict(outer.transform().settings)
  return fields


def run(settings: Callable[[], Settings] | Settings) -> None:
  """The job: text, training, merging, evaluation, report."""
  settings = settings() if callable(settings) else settings
  total = settings.seed_steps + settings.branch_steps
  settings = dataclasses.replace(
    settings, optimizer=train.optimizer_of(settings.optimizer, total)
  )
  outer = outer_lib.checked(settings.outer)
  if outer is not None:
    outer.check_meets(settings.seed_steps, total)
  started = time.monotonic()
  table_file = settings.directory / 'table.json'
  same_run.check(
    settings.directory / 'settings.json',
    describe(settings),
    domain_runs.layout(settings),
  )
  if table_file.exists():
    print((settings.directory / 'report.md').read_text())
    print(
      f'{settings.directory} is complete; nothing was computed. Remove it, '
      'or name another folder, to train again.'
    )
    return
  task_of, mixture = domain_runs.prepare_data(settings, describe(settings))
  trained = train_all(settings, task_of, mixture)
  domain_runs.say('evaluating')
  suite = suite_lib.of_corpora(
    task_of, length=settings.length, batch_size=settings.batch_size
  )
  table, roles, chosen, best_merge = expert_table.evaluate(
    settings.module,
    trained,
    validation=suite.read('validation', limit=settings.validation_sequences),
    test=suite.read('test', limit=settings.test_sequences),
    scales=settings.scales,
    batch_size=settings.batch_size,
  )
  checkpoints.export(
    settings.directory / 'checkpoints' / 'best_merge',
    settings.module,
    best_merge,
  )
  if jax.process_index() == 0:
    write_report(settings, table, roles, chosen, time.monotonic() - started)


def train_all(
  settings: Settings, task_of: Mapping[str, str], mixture: str
) -> expert_table.Models:
  """Seed, experts and dense model; every phase continues where it stopped."""
  domains = list(task_of)
  side_by_side, single = domain_runs.make_meshes(settings, len(domains))
  rows = settings.batch_size
  total = settings.seed_steps + settings.branch_steps
  data_seed = 1000 * settings.seed
  # Streams are not named: shuffle buffers must not outlive their phase.
  state = domain_runs.phase(
    settings, 'seed', domain_runs.stream(settings, mixture, rows, data_seed),
    steps=settings.seed_steps, mesh=single,
  )  # fmt: skip
  # Experts and dense model start from the very same host copy.
  seed = partition.to_host(state)
  mine = branch.local_experts(side_by_side, len(domains))
  experts = domain_runs.phase(
    settings,
    'experts',
    branch.StackedStream(
      [
        domain_runs.stream(
          settings, task_of[domains[i]], rows, data_seed + 1 + i
        )
        for i in mine
      ],
      mine,
    ),
    steps=total,
    mesh=side_by_side,
    state=seed,
    experts=domains,
    outer=settings.outer,
  )
  dense = domain_runs.phase(
    settings, 'dense',
    domain_runs.stream(settings, mixture, len(domains) * rows, data_seed + 999),
    steps=total, mesh=single, state=seed,
  )  # fmt: skip
  trained = expert_table.Models(
    seed.params,
    partition.to_host(experts.params),
    partition.to_host(dense.params),
  )
  _export(settings, trained, domains)
  return trained


def _export(settings, trained, domains):
  """Saves every model as one that can be loaded."""
  folder = settings.directory / 'checkpoints'
  checkpoints.export(folder / 'seed', settings.module, trained.seed)
  checkpoints.export(folder / 'dense', settings.module, trained.dense)
  for i, domain in enumerate(domains):
    checkpoints.export(
      folder / 'experts' / domain,
      settings.module,
      branch.unstack(trained.experts, i),
    )


def write_report(
  settings: Settings,
  table: evaluation_base.Table,
  roles: report.Roles,
  chosen: Mapping[str, Any],
  seconds: float,
) -> None:
  """Writes `heatmap.png`, `report.md` and, last, `table.json`; prints."""
  directory = settings.directory
  held = report.expectations(table, roles)
  plots.heatmap(table, roles.seed, directory / 'heatmap.png')
  verdicts = [
    f'- {"held" if ok else "did NOT hold"}: {t}' for t, ok in held.items()
  ]
  advice = [f'- {line}' for line in report.advice(table, roles)]
  lines = [
    '# Branch-Train-Merge',
    '',
    f'{len(roles.experts)} experts branched from a seed of '
    f'{settings.seed_steps} steps, {settings.branch_steps} steps each, '
    f'batches of {settings.batch_size} x {settings.length} tokens, seed '
    f'{settings.seed}, on {jax.device_count()} {jax.devices()[0].platform} '
    f'device(s), {seconds:.0f} s since this command started.',
    '',
    'Bits per byte on the test set of every domain, lower is better, with '
    'the 95% bootstrap interval over '
    f'{settings.test_sequences} sequences at most; the mean is over domains. '
    'The posterior average has its own weights for every domain.',
    '',
    table.to_markdown(),
    '',
    '![heat map](heatmap.png)',
    '',
    '## What was expected',
    '',
    *verdicts,
    '',
    '## Which model to use',
    '',
    *advice,
    '',
    f'Chosen on validation: task arithmetic scale '
    f'{chosen["task_arithmetic_scale"]:g}; best merge: '
    f'{chosen["best_merge"]}.',
    '',
  ]
  (directory / 'report.md').write_text('\n'.join(lines))
  train.save_json(
    directory / 'table.json',
    {
      'table': table.to_json(tasks='domains', value='bits_per_byte'),
      'expected': held,
      'chosen': dict(chosen),
      'settings': describe(settings),
      'seconds': seconds,
    },
  )
  print(table.to_text())
  print('\n'.join(['', *verdicts, '', 'Which model to use:', *advice]))
  print(f'\n{directory / "report.md"}')
