# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Grows a forest: over many domains, in batches, a few at a time.

The domains come in generations. Those of one generation branch from the forest
as it was when the generation began: from the seed, from one expert, or from an
average that the posterior of their held-out text chooses. They train side by
side in one program, or a few at a time; which of them train together changes
nothing. An expert that has finished is in the forest, whatever happens then.

Source: Li et al., "Branch-Train-Merge" (2022),
https://arxiv.org/abs/2208.03306.
"""

from collections.abc import Callable, Mapping
import dataclasses
import os
import pathlib
import shutil
from typing import Any

import jax
from jax.experimental import multihost_utils

from mergejax import partition
from mergejax.checkpoints import checkpoint
from mergejax.cli import domain_runs
from mergejax.cli import loaded
from mergejax.cli import same_run
from mergejax.cli import train
from mergejax.core import errors
from mergejax.data import corpora as corpora_lib
from mergejax.evaluation import expert_table
from mergejax.evaluation import forest_scores
from mergejax.evaluation import suite as suite_lib
from mergejax.experts import averages
from mergejax.experts import beginnings
from mergejax.experts import branch
from mergejax.experts import ensemble
from mergejax.experts import forest as forest_lib
from mergejax.experts import records
from mergejax.methods import named
from mergejax.training import checkpoints
from mergejax.training import peers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(domain_runs.DomainSettings):
  """What is trained, how long, and on what; bound by gin.

  Attributes:
    forest: the folder of the forest, one that is there or a new one; in
      `model_dir` by default.
    seed_steps: updates of the seed of a new forest, on the mixture of all
      domains. One that is there brings its own.
    branch_steps: updates of every expert.
    generation: domains of a generation; all by default.
    side_by_side: experts that train together; all of a generation by default.
    branch_from: 'seed', 'uniform', 'argmax', 'posterior', 'topk' or the name
      of an expert: see `averages.weights`. A forest without experts has a seed
      alone, and everything branches from that.
    top_k: for 'topk'.
    merge: the method of the average that a branch begins as.
    merge_options: of the method.
    reset_optimizer: begin without moments; see `beginnings`.
    reset_schedule: likewise of the learning rate.
    keep_state: the forest keeps moments, for those that branch later.
  """

  seed_steps: int
  branch_steps: int
  branch_from: str
  forest: os.PathLike | str | None = None
  generation: int | None = None
  side_by_side: int | None = None
  top_k: int | None = None
  merge: str = 'linear'
  merge_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  reset_optimizer: bool = False
  reset_schedule: bool = False
  keep_state: bool = True

  def __post_init__(self):
    errors.check_whole('branch_steps', self.branch_steps)
    errors.check_whole('seed_steps', self.seed_steps, least=0)
    for name in ('generation', 'side_by_side'):
      if getattr(self, name) is not None:
        errors.check_whole(name, getattr(self, name))

  @property
  def place(self) -> pathlib.Path:
    """The folder of the forest."""
    if self.forest is None:
      return self.directory / 'forest'
    return pathlib.Path(self.forest).expanduser()


def run(settings: Callable[[], Settings] | Settings) -> None:
  """The job: text, a seed if there is none, generations, priors, a table."""
  settings = given = settings() if callable(settings) else settings
  begins = _position(settings)
  settings = dataclasses.replace(
    settings,
    optimizer=train.optimizer_of(
      settings.optimizer, begins + settings.branch_steps
    ),
  )
  # Where the forest is and how many train together make no other run.
  described = domain_runs.describe(settings, 'forest', 'side_by_side')
  same_run.check(
    settings.directory / 'settings.json', described,
    domain_runs.layout(settings),
  )  # fmt: skip
  table_file = settings.directory / 'table.json'
  if table_file.exists():
    print(
      f'{settings.directory} is complete; nothing was computed. Remove it, '
      'or name another folder, to grow again.'
    )
    return
  begun = (settings.directory / 'settings.json').exists()
  task_of, mixture = domain_runs.prepare_data(
    settings, described, lambda domains: _check_plan(settings, domains, begun)
  )
  if not settings.reset_schedule:
    given = settings
  forest = _forest(given, mixture)
  for first, domains in _generations(settings, list(task_of)):
    _grow(settings, forest, task_of, domains, first)
  _finish(settings, forest, task_of, table_file)


def _position(settings):
  """The step number at which branches begin."""
  if settings.reset_schedule:
    return 0
  forest = loaded.forest_at(settings.place)
  return int(forest.seed['steps']) if forest else settings.seed_steps


def _forest(settings, mixture) -> forest_lib.Forest:
  """The forest that is there, or a new one of a seed that is trained."""
  there = loaded.forest_at(settings.place)
  if there:
    return there
  # One schedule spans seed and branch, or the seed has one of its own.
  settings = (
    dataclasses.replace(
      settings,
      optimizer=train.optimizer_of(settings.optimizer, settings.seed_steps),
    )
    if settings.reset_schedule
    else settings
  )
  _, single = domain_runs.make_meshes(settings, 1)
  stream = domain_runs.stream(
    settings, mixture, settings.batch_size, 1000 * settings.seed
  )
  steps = settings.seed_steps
  state = domain_runs.phase(settings, 'seed', stream, steps=steps, mesh=single)
  state = partition.to_host(state)
  _by_first(
    lambda: forest_lib.create(
      settings.place, state.params, model=settings.module, steps=steps,
      vocabulary=settings.vocabulary,
      state=beginnings.kept(state) if settings.keep_state else None,
    ),
    'forest',
  )  # fmt: skip
  return forest_lib.Forest(settings.place)


def _by_first(function, name):
  """Calls a function in the first process; the others wait for it."""
  if jax.process_index() == 0:
    function()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _generations(settings, domains):
  """`[(number of the first domain, domains)]`."""
  size = settings.generation or len(domains)
  starts = range(0, len(domains), size)
  return [(first, domains[first : first + size]) for first in starts]


def _chunks(settings, domains):
  """`[(number of the first domain in its generation, domains)]`."""
  size = settings.side_by_side or len(domains)
  starts = range(0, len(domains), size)
  return [(start, domains[start : start + size]) for start in starts]


def _check_plan(settings, domains, begun):
  """Raises for what would fail after hours: names, branches, meshes."""
  for domain in domains:
    records.check_name(domain)
  # An expert of a later generation is not there when the second one begins.
  _, there = _generations(settings, domains)[0]
  forest = loaded.forest_at(settings.place)
  if forest:
    _check_forest(settings, forest, () if begun else domains)
    there = (*forest.experts, *there)
  kinds = (*ensemble.AVERAGES, records.SEED, *dict.fromkeys(there))
  if settings.branch_from not in kinds:
    raise errors.ConfigError(
      errors.near(
        settings.branch_from, kinds, 'expert or average to branch from'
      )
    )
  prior = ensemble.uniform_prior(1)
  if settings.branch_from in ensemble.AVERAGES:
    ensemble.average_weights(prior, settings.branch_from, k=settings.top_k)
  generations = _generations(settings, domains)
  _check_merge(settings, forest, len(generations))
  for _, generation in generations:
    for _, chunk in _chunks(settings, generation):
      domain_runs.make_meshes(settings, len(chunk))


def _check_merge(settings, forest, generations):
  """Raises for a merge that is none, or needs what experts of a run lack."""
  merge = named.resolve(settings.merge, **settings.merge_options)
  if not merge.statistics:
    return
  if generations > 1 or forest is None or not forest.experts:
    raise errors.ConfigError(
      f'merge={settings.merge!r} needs a {merge.statistics[0].name} of every '
      'expert that a branch begins as, which a run does not collect: take '
      'another merge, or add experts with their statistics (`mergejax forest '
      'add --statistics`) and grow on them, one generation at a time.'
    )


def _check_forest(settings, forest, new):
  """Raises for a forest of another model, or that knows new domains already."""
  if forest.module != settings.module:
    raise errors.ConfigError(
      f'The experts of {forest.path} are another model than the configured '
      'module: configure it as its seed/model/config.json says.'
    )
  forest.check_vocabulary(settings.vocabulary)
  known = [domain for domain in new if domain in forest.experts]
  if known:
    raise errors.ConfigError(
      f'{forest.path} has experts of {", ".join(known)} already: leave these '
      'domains out of the corpora, or remove the experts first.'
    )


def _grow(settings, forest, task_of, domains, first):
  """One generation; experts that have finished are left."""
  shares = _plan(settings, forest, task_of, domains, first)
  for start, chunk in _chunks(settings, domains):
    # Others beside each other have another state.
    name = f'experts_{first + start}_{len(chunk)}'
    folder = settings.directory / 'train' / name / 'checkpoints'
    known = all(domain in forest.experts for domain in chunk)
    if not peers.from_first(int(known)):
      _train(settings, forest, task_of, chunk, shares, name)
    # What they are is in the forest now.
    _by_first(lambda f=folder: shutil.rmtree(f, ignore_errors=True), name)


def _plan(settings, forest, task_of, domains, first):
  """`{domain: {expert: weight}}`, from the forest as the generation found it."""
  file = settings.directory / 'generations' / f'{first}.json'
  # The first process may have written it before another one looks.
  if not peers.from_first(int(file.exists())):
    if forest.experts:
      found = _shares(settings, forest, task_of, domains)
    else:
      found = {domain: {records.SEED: 1.0} for domain in domains}
    _by_first(lambda: train.save_json(file, found), f'generation {first}')
  return checkpoint.read_json(file)


def _shares(settings, forest, task_of, domains):
  """What each domain branches from: by the posterior of its held-out text."""
  kind, k = settings.branch_from, settings.top_k
  if kind in ('uniform', records.SEED, *forest.experts):
    shares = averages.weights(forest, kind)
    return {domain: shares for domain in domains}
  sets = _suite(settings, task_of).read(
    'validation', domains, settings.validation_sequences
  )
  priors = forest_scores.priors(
    forest, sets, expert_table.Scorer(settings.module),
    batch_size=settings.batch_size,
  )  # fmt: skip
  return {
    domain: averages.weights(forest, kind, prior=prior, k=k)
    for domain, prior in priors.items()
  }


def _suite(settings, task_of):
  return suite_lib.of_corpora(
    task_of, length=settings.length, batch_size=settings.batch_size
  )


def _train(settings, forest, task_of, chunk, shares, name):
  """Trains experts side by side, and adds them to the forest."""
  numbers = {domain: i for i, domain in enumerate(task_of)}
  mesh, _ = domain_runs.make_meshes(settings, len(chunk))
  seed = 1000 * settings.seed + 1
  mine = branch.local_experts(mesh, len(chunk))
  stream = branch.StackedStream(
    [
      domain_runs.stream(
        settings, task_of[chunk[i]], settings.batch_size,
        seed + numbers[chunk[i]],
      )
      for i in mine
    ],
    mine,
  )  # fmt: skip
  begins = beginnings.position(forest, settings.reset_schedule)
  steps = begins + settings.branch_steps
  folder = settings.directory / 'train' / name / 'checkpoints'
  begun = None
  if not checkpoints.has_steps(folder):
    trainer = domain_runs.trainer(settings, partition.make_mesh())
    begun = [
      beginnings.begin(
        forest, shares[domain], trainer, steps=steps,
        key=jax.random.fold_in(jax.random.key(settings.seed), numbers[domain]),
        reset_optimizer=settings.reset_optimizer,
        reset_schedule=settings.reset_schedule,
        method=settings.merge, **settings.merge_options,
      )
      for domain in chunk
    ]  # fmt: skip
  state = partition.to_host(
    domain_runs.phase(
      settings, name, stream, steps=steps, mesh=mesh, state=begun, experts=chunk
    )
  )
  _by_first(
    lambda: _add(settings, forest, chunk, shares, state), f'{name} added'
  )


def _add(settings, forest, chunk, shares, state):
  """Puts what has finished into the forest, expert by expert."""
  for i, domain in enumerate(chunk):
    if domain in forest.experts:
      continue
    own = jax.tree.map(lambda leaf, i=i: leaf[i], state)
    parents = shares[domain]
    forest.add(
      domain, own.params, domain=domain, parents=parents,
      branched_by=_how(settings, parents),
      steps=settings.branch_steps, data=_data(settings, domain),
      vocabulary=settings.vocabulary,
      state=beginnings.kept(own) if settings.keep_state else None,
    )  # fmt: skip
    domain_runs.say(f'  {domain} is in {forest.path}')


def _how(settings, parents):
  """How parents were chosen, and made one."""
  if list(parents) == [records.SEED]:
    return records.SEED
  if settings.merge == 'linear':
    return settings.branch_from
  return f'{settings.branch_from}, {settings.merge}'


def _data(settings, domain):
  """Of a domain's training text."""
  file = settings.directory / 'corpora' / domain / 'train.jsonl'
  texts = corpora_lib.documents(file)
  rows = settings.branch_steps * settings.batch_size
  return {
    'bytes': sum(len(text.encode('utf-8', 'replace')) for text in texts),
    'tokens seen': rows * settings.length,
  }


def _finish(settings, forest, task_of, table_file):
  """Priors of all domains of the run, and a table on their test text."""
  domain_runs.say('evaluating')
  suite = _suite(settings, task_of)
  validation = suite.read('validation', limit=settings.validation_sequences)
  scorer = expert_table.Scorer(settings.module)
  priors = forest_scores.priors(
    forest, validation, scorer, batch_size=settings.batch_size
  )

  def note():
    for domain, prior in priors.items():
      forest.set_prior(domain, prior)

  _by_first(note, 'priors')
  table = forest_scores.table(
    forest, suite.read('test', limit=settings.test_sequences),
    ensembles=('uniform', 'updating', 'cached'),
    weights=('uniform', 'posterior'), batch_size=settings.batch_size,
  )  # fmt: skip
  if jax.process_index() == 0:
    print('bits per byte of the test text, lower is better')
    print(table.to_text())
    train.save_json(
      table_file, table.to_json(tasks='domains', value='bits_per_byte')
    )
