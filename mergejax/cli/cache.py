# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax cache TASK --out DIR`: tokenises a task once, by Apache Beam.

What a task does before its `seqio.CacheDatasetPlaceholder` is done, in shards,
on whatever runs Beam's pipelines: this machine (DirectRunner), or Dataflow,
Flink and Spark by `--runner` and their `--option`s. Training reads the result
with `train.train_model.cache_dir = DIR`, and so do T5X and seqio.
"""

import argparse
from collections.abc import Sequence
import functools
import importlib
import re
import threading

import seqio
import tensorflow as tf

from mergejax.cli import common
from mergejax.core import errors
from mergejax.data import cached
from mergejax.data import features
from mergejax.data import t5_tasks
from mergejax.data import tfds_sets

# Held while a machine of the runner, which has many threads, registers a task.
_REGISTERING = threading.Lock()
# What a pipeline that did not end leaves in the folder of its task.
_LEFT = re.compile(r'beam-temp-.*|(info|stats)\..*\.json|.*\.tfrecord-.*')


def main(arguments: Sequence[str]) -> None:
  """Caches the tasks that are named, one after the other."""
  options = _parser().parse_args(arguments)
  errors.check_whole('--shards', options.shards)
  tasks = _tasks(options)
  waiting = []
  for task in tasks:
    out = seqio.get_task_dir_from_name(task.name)
    out = f'{options.out.rstrip("/")}/{out}'
    splits = [s for s in task.splits if s in (options.split or task.splits)]
    if _is_there(task, splits, out):
      print(f'{task.name}: is in {out} already')
    else:
      waiting.append((task, splits, out))
  beam = _beam() if waiting else None
  for task, splits, out in waiting:
    if tf.io.gfile.exists(out):
      tf.io.gfile.rmtree(out)  # of a run that did not end
    _write(beam, task, splits, out, options)
    # Readers look for this file: it comes last.
    with tf.io.gfile.GFile(f'{out}/COMPLETED', 'w') as file:
      file.write('')
    print(f'{task.name}: {", ".join(splits)} in {out}')


def _is_there(task, splits, out) -> bool:
  """Whether a folder has splits of a task already; else it may be written.

  Raises:
    DataError: it has other splits of it, tokens of another vocabulary, or what
      is no cache at all.
  """
  if not tf.io.gfile.exists(f'{out}/COMPLETED'):
    found = tf.io.gfile.listdir(out) if tf.io.gfile.exists(out) else []
    foreign = [n for n in found if not _LEFT.fullmatch(n.rstrip('/'))]
    if foreign:
      raise errors.DataError(
        f'{out} would be written anew, but has {errors.some(sorted(foreign))}, '
        'which is no part of a cache: give another --out.'
      )
    return False
  for split in splits:
    if not tf.io.gfile.exists(seqio.get_cached_stats_path(out, split)):
      raise errors.DataError(
        f'The cache of {task.name} in {out} has no split {split!r}, and none '
        'is added to a cache: remove it, or give another --out, and ask for '
        'all splits that you need at once.'
      )
    cached.check_tokens(task, out, split)
  return True


def _parser() -> argparse.ArgumentParser:
  parser = common.parser('cache', 'Tokenise tasks once, by Apache Beam.')
  parser.add_argument(
    'task', nargs='+', help="a seqio task or mixture, or one of T5's suite"
  )
  parser.add_argument(
    '--out', required=True, help='a folder, or a path such as gs://...'
  )
  parser.add_argument(
    '--shards', type=int, default=64, help='files for each split (64)'
  )
  parser.add_argument(
    '--split', action='append', help='only this one; may be given again'
  )
  parser.add_argument(
    '--runner', default='DirectRunner',
    help='DirectRunner (this machine), DataflowRunner, FlinkRunner, ...',
  )  # fmt: skip
  parser.add_argument(
    '--option', action='append', default=[], metavar='NAME=VALUE',
    help='an option of the runner, for example project=MINE',
  )  # fmt: skip
  parser.add_argument(
    '--worker_import', action='append', default=[], metavar='MODULE',
    help='a module that registers the task on the machines of the runner',
  )  # fmt: skip
  parser.add_argument(
    '--vocabulary', default='bytes',
    help="of T5's suite: bytes, or a SentencePiece .model",
  )  # fmt: skip
  parser.add_argument(
    '--extra_ids', type=int, default=100, help='its sentinels (100)'
  )
  return parser


def _tasks(options) -> list[seqio.Task]:
  """The tasks that are asked for, all of which can be cached.

  Raises:
    UserError: an unknown name or split, a task that cannot be cached, or a TFDS
      set that is not on this machine.
  """
  known = [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()]
  found = {}
  for name in options.task:
    if name in known:
      provider = seqio.get_mixture_or_task(name)
    elif name in t5_tasks.TASKS:
      vocabulary = features.vocabulary(options.vocabulary, options.extra_ids)
      provider = t5_tasks.add(name, vocabulary=vocabulary)
    else:
      text = errors.near(name, [*known, *t5_tasks.TASKS], 'task or mixture')
      raise errors.DataError(
        f'{text} --import MODULE registers tasks of your own.'
      )
    found |= {task.name: task for task in seqio.get_subtasks(provider)}
  for task in found.values():
    _check(task, options.split or ())
  tfds_sets.check(list(found.values()))
  return list(found.values())


def _check(task, splits):
  if not task.supports_caching:
    raise errors.DataError(
      f'The task {task.name} cannot be cached: its preprocessors have no '
      'seqio.CacheDatasetPlaceholder(), which says up to where. Put one after '
      'seqio.preprocessors.tokenize.'
    )
  for split in splits:
    if split not in task.splits:
      raise errors.DataError(
        errors.near(split, sorted(task.splits), f'split of {task.name}')
      )


def _beam():
  """seqio's transforms of Beam.

  Raises:
    ConfigError: Beam is not installed, or does not fit what is.
  """
  try:
    importlib.import_module('apache_beam')
    return importlib.import_module('seqio.beam_utils')
  except ImportError as error:
    raise errors.ConfigError(
      'mergejax cache runs on Apache Beam, which is not installed '
      f"({error.name or error}): pip install 'mergejax[beam]', best in an "
      'environment of its own, since Beam asks for older versions of protobuf '
      'than other packages may.'
    ) from error


def _prepare(modules, name, vocabulary, extra_ids):
  """Registers a task on a machine of the runner: yours, or of T5's suite."""
  with _REGISTERING:
    for module in modules:
      importlib.import_module(module)
    if name not in seqio.TaskRegistry.names() and name in t5_tasks.TASKS:
      t5_tasks.add(name, vocabulary=features.vocabulary(vocabulary, extra_ids))


def _write(beam_utils, task, splits, out, options):
  """Runs the pipeline of one task to its end."""
  beam = importlib.import_module('apache_beam')
  settings = [f'--runner={options.runner}']
  settings += [f'--{option}' for option in options.option]
  pipeline_options = beam.options.pipeline_options.PipelineOptions(settings)
  with beam.Pipeline(options=pipeline_options) as pipeline:
    for split in splits:
      read = beam_utils.PreprocessTask(
        task, split,
        setup_fn=functools.partial(
          _prepare, options.worker_import, task.name, options.vocabulary,
          options.extra_ids,
        ),
      )  # fmt: skip
      # It also shuffles the examples over the files.
      examples = (
        pipeline | f'{split} read' >> read | f'{split} mix' >> beam.Reshuffle()
      )
      examples | f'{split} write' >> beam_utils.WriteExampleTfRecord(
        seqio.get_cached_tfrecord_prefix(out, split), num_shards=options.shards
      )
      for what, found, path in (
        ('info', beam_utils.GetInfo(options.shards),
         seqio.get_cached_info_path(out, split)),
        ('stats', beam_utils.GetStats(task.output_features),
         seqio.get_cached_stats_path(out, split)),
      ):  # fmt: skip
        (
          examples
          | f'{split} {what}' >> found
          | f'{split} write {what}' >> beam_utils.WriteJson(path)
        )
