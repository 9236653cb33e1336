# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax compile --topology v5e:16x16 ...`: does it fit a pod, and how fast.

A gin run or a recipe is compiled for chips that are only described, from shapes
alone: no data are opened, no weight is read, no TPU is needed.
"""

from collections.abc import Callable, Mapping, Sequence
import copy
import dataclasses
import inspect
import json
import math
from typing import Any

import jax

import gin
from mergejax import partition
from mergejax.cli import adapting
from mergejax.cli import branch_train_merge
from mergejax.cli import common
from mergejax.cli import domain_runs
from mergejax.cli import grow_forest
from mergejax.cli import train
from mergejax.core import errors
from mergejax.core import typing
from mergejax.data import corpora as corpora_lib
from mergejax.data import machine_text
from mergejax.data import stream as stream_lib
from mergejax.experts import branch
from mergejax.merging.disk import planner
from mergejax.merging.disk import plans
from mergejax.merging.recipes import recipe as recipe_lib
from mergejax.pods import chips
from mergejax.pods import compiler
from mergejax.pods import work as work_lib
from mergejax.training import trainer as trainer_lib

# Arguments of `train.train_model` that no program depends on: what they name
# is not opened.
_UNUSED = (
  'mixture_or_task', 'model_dir', 'initial_checkpoint', 'callbacks', 'seed',
  'save_every', 'log_every', 'per_task', 'cache_dir', 'adapter_start',
)  # fmt: skip
# The devices of this machine, instead of a described slice.
HERE = 'here'

# `rows -> work`, the trainer of it, the rows of a batch, and the parts that a
# batch is worked through in.
Made = tuple[Callable[[int], work_lib.Work], trainer_lib.Trainer, int, int]


def main(arguments: Sequence[str]) -> None:
  """Compiles, and prints what one chip must have."""
  files, paths, bindings, rest = common.split_gin_flags(arguments)
  options = _parser().parse_args(rest)
  if bool(files) == bool(options.recipe):
    raise errors.ConfigError(
      'mergejax compile needs --gin_file=FILE, or --recipe=RECIPE, and not '
      'both.'
    )
  if options.recipe:
    _refuse(
      options, 'a recipe', 'phase', 'experts', 'largest_batch', 'skip_init'
    )
  topology = '' if options.topology == HERE else options.topology
  if not topology and (options.slices != 1 or options.largest_batch):
    raise errors.ConfigError(
      f'--slices and --largest_batch need a described --topology: {HERE!r} is '
      'the devices of this machine as they are, and their memory is not known.'
    )
  devices = None
  if topology:
    jax.config.update('jax_platforms', 'cpu')
    devices = chips.devices(topology, options.slices)
  sizes = common.mesh_sizes(options.mesh)
  where = {'topology': topology, 'slices': options.slices}
  if options.recipe:
    mesh = partition.make_mesh(devices=devices, **(sizes or {}))
    reports = [
      compiler.report(work, **where)
      for work in recipe_work(options.recipe, mesh)
    ]
  else:
    common.parse_gin(files, bindings, paths)
    reports = _of_run(options, devices, sizes, where)
  print('\n\n'.join(report.to_text() for report in reports))
  if options.json:
    data = [report.to_json() for report in reports]
    common.write_text(options.json, json.dumps(data, indent=2) + '\n')


def _parser():
  parser = common.parser(
    'compile', 'Compile a run or a merge for a described slice of chips.'
  )
  parser.add_argument(
    '--topology', required=True,
    help=f'{", ".join(chips.CHIPS)} and a shape, such as v5e:16x16; or '
    f'{HERE!r}, the devices of this machine',
  )  # fmt: skip
  parser.add_argument(
    '--slices', type=int, default=1, help='slices of that topology'
  )
  parser.add_argument(
    '--gin_file', action='append', help='a run, as of `mergejax train`'
  )
  parser.add_argument('--gin_search_paths', help='folders, comma-separated')
  parser.add_argument('--recipe', help='a merge, as of `mergejax merge`')
  parser.add_argument(
    '--mesh', help='instead of that of the run: data=32,model=8'
  )
  parser.add_argument(
    '--phase', choices=('seed', 'experts', 'dense'),
    help='of a run over domains; experts by default',
  )  # fmt: skip
  parser.add_argument(
    '--experts', type=int, metavar='K',
    help='of such a run; by default one for each domain of its text, or as many '
    'as a forest trains side by side',
  )  # fmt: skip
  parser.add_argument(
    '--largest_batch', action='store_true',
    help='compile twice, and tell the largest batch that fits',
  )  # fmt: skip
  parser.add_argument(
    '--skip_init', action='store_true', help='compile the step alone'
  )
  parser.add_argument('--json', metavar='FILE', help='also write all figures')
  return parser


def _of_run(options, devices, sizes, where):
  """Reports of a gin run: its step, merges between, and how it begins."""
  job = gin.get_bindings(train.run, resolve_references=False).get('job')
  function = getattr(getattr(job, 'configurable', None), 'wrapped', None)
  if function is train.train_model:
    _refuse(options, 'a run of train.train_model', 'phase', 'experts')
    made = _train_model(_bound(job), devices, sizes)
  elif function in (branch_train_merge.run, grow_forest.run):
    settings = _resolved(_bound(job)['settings'])
    settings = settings() if callable(settings) else settings
    made = _of_domains(settings, options, devices, sizes)
  else:
    raise errors.ConfigError(
      'mergejax compile knows the jobs train.train_model, '
      f'branch_train_merge.run and grow_forest.run, not {job}: compile your own '
      'trainer with `mergejax.pods.work.training_step`.'
    )
  make, trainer, rows, parts = made
  report = compiler.report(make(rows), **where)
  if options.largest_batch:
    report = _with_largest(report, make, trainer, parts, where)
  works = []
  if isinstance(trainer, branch.BranchTrainer) and trainer.outer is not None:
    works.append(work_lib.outer_merge(trainer))
  if not options.skip_init:
    works.append(work_lib.fresh_state(trainer))
  return [report, *(compiler.report(work, **where) for work in works)]


def _refuse(options, job, *names):
  """Raises if options are given that a job has no use for."""
  given = [f'--{n}' for n in names if getattr(options, n) not in (None, False)]
  if given:
    raise errors.ConfigError(
      f'{" and ".join(given)} would change nothing for {job}: compile without.'
    )


def _with_largest(report, make, trainer, parts, where):
  slices = [trainer.mesh.shape[axis] for axis in ('data', 'expert')]
  rows, second = compiler.largest_rows(
    report,
    lambda rows: compiler.report(make(rows), **where),
    parts * math.prod(slices),
  )
  return report.with_largest(rows, second.rows)


def _train_model(arguments: Mapping[str, Any], devices, sizes) -> Made:
  """The trainer of `train.train_model`, on described devices."""
  known = inspect.signature(train.train_model).parameters
  given = {n: p.default for n, p in known.items()}
  given |= {n: _resolved(v) for n, v in arguments.items() if n not in _UNUSED}
  missing = [
    name
    for name, value in given.items()
    if value is inspect.Parameter.empty and name not in _UNUSED
  ]
  if missing:
    raise errors.ConfigError(
      f'train.train_model needs {", ".join(missing)}: bind them in the gin '
      'file.'
    )
  get = given.__getitem__
  if get('choices'):
    raise errors.ConfigError(
      'Rows with all of their answers (choices) have as many as the tasks say, '
      'and no data are opened here: leave it out, and the objective of it.'
    )
  mesh = sizes if sizes is not None else get('mesh') or {}
  family = adapting.adapted(get('module'), get('adapter'), get('restore'))
  optimizer, router = (
    made and train.optimizer_of(made, get('steps'))
    for made in (get('optimizer'), get('router_optimizer'))
  )
  trainer = trainer_lib.Trainer(
    family,
    adapting.optimizer_of(family, optimizer, router),
    objective=train.objective_of(get('objective'), get('loss')),
    mesh=partition.make_mesh(devices=devices, **mesh),
    rules=get('rules'),
    transforms=get('transforms'),
    freeze=get('freeze'),
    accumulate=get('accumulate'),
    clip=get('clip'),
    allow_float16=get('allow_float16'),
  )
  lengths: dict[str, int | None] = {
    **stream_lib.batch_lengths(
      get('lengths'), kind=get('kind'), pack=get('pack')
    )
  }
  if get('adapter') is not None:
    lengths |= dict.fromkeys(get('adapter').reads)
  make = _maker(trainer, lengths, get('steps'))
  return make, trainer, get('batch_size'), get('accumulate')


def _of_domains(
  settings: branch_train_merge.Settings | grow_forest.Settings,
  options,
  devices,
  sizes,
) -> Made:
  """The trainer of one phase of a run over domains, on described devices."""
  if isinstance(settings, grow_forest.Settings) and options.phase == 'dense':
    raise errors.ConfigError(
      'A forest is grown without a dense model: --phase is seed or experts.'
    )
  experts = options.experts
  if experts is None:
    experts = _side_by_side(settings)
  errors.check_whole('--experts', experts)
  if sizes is not None:
    side_by_side = single = partition.make_mesh(devices=devices, **sizes)
  else:
    side_by_side, single = domain_runs.make_meshes(settings, experts, devices)
  total = settings.seed_steps + settings.branch_steps
  settings = dataclasses.replace(
    settings, optimizer=train.optimizer_of(settings.optimizer, total)
  )
  rows = settings.batch_size
  if options.phase in (None, 'experts'):
    names = [f'expert {i}' for i in range(experts)]
    trainer = domain_runs.trainer(
      settings, side_by_side, names, outer=getattr(settings, 'outer', None)
    )
  else:
    trainer = domain_runs.trainer(settings, single)
    rows *= experts if options.phase == 'dense' else 1
  lengths = stream_lib.batch_lengths(
    {'targets': settings.length}, kind='lm', pack=False
  )
  make = _maker(trainer, lengths, total)
  return make, trainer, rows, settings.accumulate


def _maker(trainer, lengths, steps):
  return lambda rows: work_lib.training_step(
    trainer, lengths, rows=rows, steps=steps
  )


def _side_by_side(settings):
  """Experts in one program: of a forest as many as it trains at once."""
  if isinstance(settings, grow_forest.Settings):
    together = settings.side_by_side or settings.generation
    if together is not None:
      return together
  return len(_domains(settings))


def _domains(settings):
  """Names of the domains of a run's text; none of it is read."""
  if settings.corpora is None:
    return machine_text.domains()
  return corpora_lib.find_domains(settings.corpora)


def _bound(job) -> dict[str, Any]:
  """What gin binds of a job's arguments, nothing of it evaluated."""
  with gin.config_scope(job.scopes):
    return gin.get_bindings(job.configurable.wrapped, resolve_references=False)


def _resolved(value):
  """A bound value; gin evaluates its references when they are copied."""
  return copy.deepcopy(value)


def recipe_work(recipe: str, mesh: jax.sharding.Mesh) -> list[work_lib.Work]:
  """The merges of a recipe, one for the parameters that are merged alike.

  Args:
    recipe: path of a YAML file.
    mesh: where the models lie.

  Raises:
    UserError: see `planner.plan`; a recipe that merges nothing.
  """
  plan = planner.plan(recipe_lib.load_recipe(recipe))
  found = [
    _of_group(plan, tasks, mesh)
    for tasks in plan.groups()
    if tasks[0].settings is not None
  ]
  if not found:
    raise errors.RecipeError(f'{recipe} copies everything: nothing is merged.')
  return found


def _of_group(plan: plans.Plan, tasks, mesh) -> work_lib.Work:
  """The merge of the parameters of one group of a plan."""
  first = tasks[0]

  def specs(refs):
    found = {}
    for task, (model, path) in zip(tasks, refs):
      dtype = plan.stores[model].specs()[path].dtype
      found[task.path] = typing.LeafSpec(task.spec.shape, dtype, task.spec.axes)
    return found

  models = [
    specs([task.inputs[k] for task in tasks]) for k in range(len(first.inputs))
  ]
  base = specs([task.base for task in tasks]) if first.base else None
  stats = [
    {
      task.path: {
        name: store.specs()[path] for name, path in task.stats[k].items()
      }
      for task in tasks
      if task.stats and task.stats[k]
    }
    for k, store in enumerate(plan.stats)
  ]
  return work_lib.merge(
    first.settings.method, models, mesh, base=base, stats=stats,
    weights=first.weights,
  )  # fmt: skip
