# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Dense against sparse language models, from text to report.

A dense model and a Switch model train from scratch, equally many steps on
batches of equal size; a token meets as many feed-forward blocks in one as in
the other. From what the dense model was at `seed_steps` two more begin: one is
upcycled and goes on with the same mixture; experts branch, one a domain, and
are mixed into one sparse model (Branch-Train-MiX), which goes on too. The
experts also answer together, as an ensemble.

Source: Fedus et al. (2021), https://arxiv.org/abs/2101.03961; Komatsuzaki et
al. (2022), https://arxiv.org/abs/2212.05055; Sukhbaatar et al. (2024),
https://arxiv.org/abs/2403.07816.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from mergejax import models
from mergejax import partition
from mergejax.checkpoints import checkpoint
from mergejax.cli import common
from mergejax.cli import domain_runs
from mergejax.cli import same_run
from mergejax.cli import train
from mergejax.core import tree
from mergejax.core import typing
from mergejax.evaluation import base
from mergejax.evaluation import expert_table
from mergejax.evaluation import forest_scores
from mergejax.evaluation import suite as suite_lib
from mergejax.experts import beginnings
from mergejax.experts import branch
from mergejax.experts import sparse_layers
from mergejax.experts import upcycle
from mergejax.nn import moe_config
from mergejax.training import callbacks
from mergejax.training import checkpoints

DENSE, SWITCH, UPCYCLED = 'dense', 'switch', 'upcycled'
ENSEMBLE, MIXED, TRAINED = 'ensemble of experts', 'mix', 'mix, trained on'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(domain_runs.DomainSettings):
  """What is trained, how long, and on what; bound by gin.

  Attributes:
    seed_steps: updates after which the dense model is upcycled and branched.
    branch_steps: updates from there on, of each model.
    switch: settings of `moe_config.MoeConfig`, of the model from scratch.
    upcycled: of the one that begins as the dense model.
    mixed: of the one that begins as its experts; their number is that of the
      domains.
  """

  seed_steps: int
  branch_steps: int
  switch: Mapping[str, Any]
  upcycled: Mapping[str, Any]
  mixed: Mapping[str, Any]

  @property
  def steps(self) -> int:
    """Updates in all."""
    return self.seed_steps + self.branch_steps


class Row(NamedTuple):
  """A model of the table.

  Attributes:
    family: of the model, or of each of several.
    params: its parameters, of experts with a leading axis.
    begins: what it began as.
    steps: updates of its own.
    phase: the name of its training; None if it was not trained.
  """

  family: models.ModelFamily
  params: typing.Tree
  begins: str
  steps: int
  phase: str | None


def run(settings: Callable[[], Settings] | Settings) -> None:
  """The job: text, training, evaluation, report."""
  started = time.monotonic()
  settings = settings() if callable(settings) else settings
  optimizer = train.optimizer_of(settings.optimizer, settings.steps)
  settings = dataclasses.replace(settings, optimizer=optimizer)
  described = domain_runs.describe(settings)
  where = domain_runs.layout(settings)
  same_run.check(settings.directory / 'settings.json', described, where)
  report = settings.directory / 'report.md'
  if report.exists():
    print(report.read_text())
    print(
      f'{settings.directory} is complete; nothing was computed. Remove it, '
      'or name another folder, to train again.'
    )
    return
  task_of, mixture = domain_runs.prepare_data(
    settings, described, lambda domains: _sparse_families(settings, domains)
  )
  rows = _train_all(settings, task_of, mixture)
  domain_runs.say('evaluating')
  suite = suite_lib.of_corpora(
    task_of, length=settings.length, batch_size=settings.batch_size
  )
  test = suite.read('test', limit=settings.test_sequences)
  table = base.Table({
    name: _scores(row, test, settings.batch_size) for name, row in rows.items()
  })  # fmt: skip
  if jax.process_index() == 0:
    _write(settings, table, rows, time.monotonic() - started)


# Training ---------------------------------------------------------------------


def _sparse_families(settings, domains):
  """`{name: family}` of the sparse models; raises for settings that are none."""
  dense = sparse_layers.family_of(settings.module, sparse=False)
  mixed = {'num_experts': len(domains), **settings.mixed}
  given = {SWITCH: settings.switch, UPCYCLED: settings.upcycled, MIXED: mixed}
  return {
    name: sparse_layers.with_moe(dense, moe_config.from_fields(fields))
    for name, fields in given.items()
  }


def _train_all(settings, task_of, mixture) -> dict[str, Row]:
  """The models of the table; every phase continues where it stopped."""
  domains = list(task_of)
  dense = models.family_of(settings.module)
  sparse = _sparse_families(settings, domains)
  side_by_side, single = domain_runs.make_meshes(settings, len(domains))
  first = 1000 * settings.seed
  stream = lambda number: domain_runs.stream(
    settings, mixture, settings.batch_size, first + number
  )
  of = lambda family: dataclasses.replace(settings, module=family.module)
  key = jax.random.key(settings.seed)
  rest = settings.branch_steps

  def go_on(name, family, params):
    state = _begun(of(family), single, params)
    return _phase(of(family), name, stream(999), single, state=state).params

  seed = _phase(settings, 'seed', stream(0), single, steps=settings.seed_steps)
  later = _phase(settings, DENSE, stream(999), single, state=seed)
  switch = _phase(of(sparse[SWITCH]), SWITCH, stream(0), single)
  _, begun = upcycle.upcycle(
    dense, seed.params, sparse[UPCYCLED].config.moe, key=key
  )
  upcycled = go_on(UPCYCLED, sparse[UPCYCLED], begun)
  experts = _experts(settings, task_of, side_by_side, seed, first).params
  _, mix = upcycle.branch_train_mix(
    dense, [branch.unstack(experts, i) for i in range(len(domains))],
    sparse[MIXED].config.moe, key=key,
  )  # fmt: skip
  trained = go_on(MIXED, sparse[MIXED], mix)
  rows = {
    DENSE: Row(dense, later.params, 'fresh', settings.steps, DENSE),
    SWITCH: Row(sparse[SWITCH], switch.params, 'fresh', settings.steps, SWITCH),
    UPCYCLED: Row(sparse[UPCYCLED], upcycled, 'dense', rest, UPCYCLED),
    ENSEMBLE: Row(dense, experts, 'dense', rest, 'experts'),
    MIXED: Row(sparse[MIXED], mix, 'experts', 0, None),
    TRAINED: Row(sparse[MIXED], trained, 'experts', rest, MIXED),
  }
  for name in (DENSE, SWITCH, UPCYCLED, TRAINED):
    folder = settings.directory / 'checkpoints' / name.split(',')[0]
    checkpoints.export(folder, rows[name].family, rows[name].params)
  return rows


def _experts(settings, task_of, mesh, seed, first):
  """The state of an expert of every domain, side by side."""
  domains = list(task_of)
  mine = branch.local_experts(mesh, len(domains))
  of_domain = lambda i: domain_runs.stream(
    settings, task_of[domains[i]], settings.batch_size, first + 1 + i
  )
  stream = branch.StackedStream([of_domain(i) for i in mine], mine)
  return _phase(settings, 'experts', stream, mesh, state=seed, experts=domains)


def _begun(settings, mesh, params):
  """A state where the seed stopped; its moments fit no more and begin anew."""
  trainer = domain_runs.trainer(settings, mesh)
  key = jax.random.key(settings.seed)
  state = partition.to_host(trainer.begin(settings.steps, params, key))
  return state.replace(
    step=np.int32(settings.seed_steps),
    opt_state=beginnings.at_step(state.opt_state, settings.seed_steps),
  )


def _phase(settings, name, stream, mesh, steps=None, **given):
  """The trained state, in host memory; notes how long a step takes."""
  clock = _Clock()
  state = domain_runs.phase(
    settings, name, stream, steps=steps or settings.steps, mesh=mesh,
    callbacks=[clock], **given,
  )  # fmt: skip
  if clock.milliseconds is not None and jax.process_index() == 0:
    told = _times(settings) | {name: clock.milliseconds}
    train.save_json(settings.directory / 'times.json', told)
  return partition.to_host(state)


def _times(settings) -> dict[str, float]:
  """`{phase: milliseconds a step}`, of those that were trained."""
  file = settings.directory / 'times.json'
  return checkpoint.read_json(file) if file.exists() else {}


class _Clock(callbacks.Callback):
  """How long a step takes, what is compiled before the first left out."""

  everywhere = False

  def __init__(self):
    self.milliseconds: float | None = None
    self._first: tuple[int, float] | None = None

  def on_log(self, step, metrics):
    # The metrics of the step are there: it is done.
    now = time.monotonic()
    if self._first is None:
      self._first = step, now
    elif step > self._first[0]:
      first, then = self._first
      self.milliseconds = 1000 * (now - then) / (step - first)


# The report -------------------------------------------------------------------


def _scores(row, test, batch_size):
  """`{domain: Score}` of a model, or of experts that answer together."""
  scorer = expert_table.Scorer(row.family)
  if row.phase != 'experts':
    return scorer.scores(row.params, test)
  experts = [branch.unstack(row.params, i) for i in range(len(test))]
  found = {}
  for domain, batches in test.items():
    mixed = forest_scores.mixed(
      scorer.of_experts(experts, batches), scorer.mask(batches), 'updating',
      batch_size=batch_size,
    )  # fmt: skip
    found[domain] = expert_table.score(mixed, batches)
  return found


def expectations(table: base.Table) -> dict[str, bool]:
  """What the papers promise, and whether it held on the mean of this run."""
  mean = {name: table.mean(name) for name in table}
  return {
    'Switch is better than the dense model of equal operations a token': (
      mean[SWITCH] < mean[DENSE]
    ),
    'the upcycled model is better than the dense one that trained as long': (
      mean[UPCYCLED] < mean[DENSE]
    ),
    'mixed experts are better when they are trained on': (
      mean[TRAINED] < mean[MIXED]
    ),
    'mixed and trained on, experts are better than their ensemble': (
      mean[TRAINED] < mean[ENSEMBLE]
    ),
  }


def blocks_of_token(family: models.ModelFamily) -> int:
  """Feed-forward blocks that a token meets in a decoder, the room allowing."""
  config = family.config
  if config.moe is None:
    return config.num_layers
  sparse = config.moe.sparse_layers(config.num_layers, decoder=True)
  return sum(config.moe.top_k if one else 1 for one in sparse)


def _costs(settings, rows: Mapping[str, Row]) -> list[str]:
  """What every model took to train, as a table of Markdown."""
  times = _times(settings)
  lines = [
    '| model | begins as | steps | tokens | parameters | blocks a token | '
    'ms a step |',
    '|---' * 7 + '|',
  ]
  for name, row in rows.items():
    count = len(jax.tree.leaves(row.params)[0]) if name == ENSEMBLE else 1
    tokens = count * row.steps * settings.batch_size * settings.length
    size = sum(leaf.size for leaf in tree.flatten(row.params).values())
    blocks = count * blocks_of_token(row.family)
    took = f'{times[row.phase]:.0f}' if row.phase in times else '-'
    lines.append(
      f'| {name} | {row.begins} | {row.steps} | {tokens:,} | {size:,} | '
      f'{blocks} | {took} |'
    )
  return lines


def _write(settings, table, rows, seconds):
  """Writes `table.json` and, last, `report.md`; prints the report."""
  held = expectations(table)
  slower = ''
  times = _times(settings)
  if {DENSE, SWITCH} <= times.keys():
    slower = (
      f'Equal operations are not equal time: here a step of the Switch model '
      f'took {times[SWITCH] / times[DENSE]:.2f} times that of the dense one.'
    )
  lines: Sequence[str] = [
    '# Dense and sparse',
    '',
    f'Batches of {settings.batch_size} x {settings.length} tokens of '
    f'{len(table.tasks)} domains, seed {settings.seed}, on '
    f'{jax.device_count()} {jax.devices()[0].platform} device(s), '
    f'{seconds:.0f} s since this command started. What begins as the dense '
    f'model does so at step {settings.seed_steps}.',
    '',
    'Bits per byte on the test set of every domain, lower is better, with the '
    f'95% bootstrap interval over {settings.test_sequences} sequences at most.',
    '',
    table.to_markdown(),
    '',
    *_costs(settings, rows),
    '',
    'Steps and tokens are of the model alone, of experts of all of them; a '
    "block is a feed-forward one, of the size of the dense model's.",
    '',
    slower,
    '',
    '![loads of the experts](train/switch/routing.png)',
    '',
    '## What was expected',
    '',
    *(f'- {"held" if ok else "did NOT hold"}: {t}' for t, ok in held.items()),
    '',
  ]
  data = {
    'table': table.to_json(tasks='domains', value='bits_per_byte'),
    'expected': held,
    'milliseconds_a_step': times,
    'seconds': seconds,
  }
  train.save_json(settings.directory / 'table.json', data)
  text = '\n'.join(lines)
  common.write_text(settings.directory / 'report.md', text)
  print(text)
  print(settings.directory / 'report.md')
