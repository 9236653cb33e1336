# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax infer CHECKPOINT`: what a model says to lines of text.

With `--gin_file`, as T5X's `infer.py`, to a task of seqio: see
gin/runs/infer.gin.
"""

from collections.abc import Callable, Mapping, Sequence
import hashlib
import json
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import seqio
import tqdm

from mergejax import models
from mergejax import partition
from mergejax.checkpoints import fingerprints
from mergejax.cli import common
from mergejax.cli import decoding_flags
from mergejax.cli import gin_run
from mergejax.cli import loaded
from mergejax.cli import same_run
from mergejax.core import checksums
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import resume
from mergejax.core import stop as stop_lib
from mergejax.data import features
from mergejax.data import splits
from mergejax.data import stream
from mergejax.evaluation import decode
from mergejax.evaluation import likelihoods
from mergejax.evaluation import positions
from mergejax.evaluation import texts
from mergejax.training import peers

# What is written of an example, by T5X's names.
MODES = ('predict', 'predict_with_aux', 'score')


def _parser():
  parser = common.parser(
    'infer',
    'Answer lines of text, greedily unless told otherwise. Killed, the same '
    'command continues, to the same file. Or as T5X does, to a task, from gin '
    'files: --gin_file=gin/runs/infer.gin --gin.NAME=VALUE.',
  )
  parser.add_argument(
    'checkpoint',
    help='a checkpoint with its config.json, a recipe (.yaml) or a forest',
  )
  parser.add_argument(
    '--inputs', required=True,
    help='a .txt file, a text a line; a .jsonl file of {"inputs": text}; or -, '
    'texts from standard input',
  )  # fmt: skip
  parser.add_argument(
    '--out', required=True,
    help='the .jsonl file to create: every row with its prediction',
  )  # fmt: skip
  parser.add_argument('--vocabulary', default='bytes', help='or a .model file')
  parser.add_argument(
    '--length', type=int, default=64, help='most tokens of an answer'
  )
  parser.add_argument('--batch_size', type=int, default=32)
  draws = decoding_flags.add(parser)
  draws.add_argument('--seed', type=int, default=0, help='of the draws')
  parser.add_argument(
    '--scores', action='store_true',
    help='adds the score: the log-likelihood; of beams, with length penalty',
  )  # fmt: skip
  parser.add_argument(
    '--all', action='store_true',
    help='adds predictions: all beams, the best first; samples always are',
  )  # fmt: skip
  parser.add_argument(
    '--prefix', action='store_true',
    help='a decoder-only model was trained on tasks: it reads inputs as those, '
    'ended and in both directions',
  )  # fmt: skip
  parser.add_argument('--data', type=int, default=1, help='devices for rows')
  parser.add_argument('--model_parallel', type=int, default=1)
  return parser


def main(arguments: Sequence[str]) -> None:
  """Writes what a model says to every line."""
  if gin_run.is_asked(arguments):
    about = 'Answer the inputs of a task, as gin files describe.'
    gin_run.run('infer', about, infer_task, arguments)
    return
  options = _parser().parse_args(arguments)
  for name in ('length', 'batch_size'):
    errors.check_whole(f'--{name}', getattr(options, name))
  method = decoding_flags.method_of(options)
  files.check_new(options.out)
  vocabulary = features.vocabulary(options.vocabulary)
  forest = loaded.forest_at(options.checkpoint)
  if forest:
    forest.check_vocabulary(options.vocabulary)
  rows = _read(options.inputs)
  mesh = None
  if options.data * options.model_parallel > 1:
    mesh = partition.make_mesh(data=options.data, model=options.model_parallel)
  family, params = loaded.load(options.checkpoint, mesh=mesh)
  decoding_flags.check(family, options)
  writer = texts.Writer(
    decode.make_decoder(
      family, length=options.length, method=method, mesh=mesh
    ),
    family, params, vocabulary, options.batch_size, prefix=options.prefix,
    seed=options.seed, scored=options.scores,
    every=options.all or getattr(method, 'samples', 1) > 1,
  )  # fmt: skip
  settings = _settings(options, method, rows, writer)
  _answer(writer, rows, pathlib.Path(options.out), settings)


def _read(source):
  """The rows of a file, or of standard input."""
  if source == '-':
    return texts.read(sys.stdin.read(), 'standard input', json_lines=False)
  path = pathlib.Path(source)
  if path.suffix not in ('.txt', '.jsonl'):
    raise errors.DataError(
      f'--inputs must be a .txt file (a text a line), a .jsonl file or -, not '
      f'{source}.'
    )
  if not path.is_file():
    raise errors.DataError(f'There is no file {path} to read inputs from.')
  try:
    text = path.read_text(encoding='utf-8')
  except UnicodeDecodeError as error:
    raise errors.DataError(f'{path} is not UTF-8 text: {error}.') from error
  return texts.read(text, str(path), json_lines=path.suffix == '.jsonl')


def _settings(options, method, rows, writer):
  """All that the answers depend on."""
  vocabulary = options.vocabulary
  if vocabulary != 'bytes':
    vocabulary = checksums.SUMS.of(pathlib.Path(vocabulary).expanduser())
  names = ('length', 'batch_size', 'seed', 'scores', 'all', 'prefix')
  return {
    'model': models.describe(writer.family),
    'weights': fingerprints.fingerprint(writer.params),
    'vocabulary': vocabulary,
    'inputs': _digest(rows),
    'method': {type(method).__name__: method},
    'devices': [options.data, options.model_parallel],
    **{name: getattr(options, name) for name in names},
  }


def _digest(data):
  text = json.dumps(data, ensure_ascii=False).encode()
  return hashlib.sha256(text).hexdigest()


def infer_task(
  *,
  checkpoint: os.PathLike | str,
  mixture_or_task: Callable[[], Any] | str,
  lengths: Mapping[str, int],
  output_dir: os.PathLike | str,
  split: str = 'test',
  mode: str = 'predict',
  decoding: Mapping[str, Any] | None = None,
  batch_size: int = 32,
  every: bool = False,
  module: nn.Module | models.ModelFamily | None = None,
  restore_step: int | None = None,
  dtype: str = 'float32',
  mesh: Mapping[str, int] | None = None,
) -> None:
  """Writes what a model says to every example of a task, or of a mixture's.

  Each task has a file, `TASK-MODE.jsonl-00000-of-00001` as in T5X, of rows
  `{"inputs": {"inputs_pretokenized": text, ...}, "prediction": text}`. Killed,
  the same call continues.

  Args:
    checkpoint: of any format, a run's folder, or a recipe.
    mixture_or_task: a name registered in seqio, or what registers one.
    lengths: tokens of `inputs`, longer ones are cut, with a warning; and of
      `targets`: the most of an answer.
    output_dir: where the files go.
    split: which examples.
    mode: 'predict'; 'predict_with_aux': with `{"aux": {"scores": number}}`, the
      score of the answer, see `texts.Writer`; or 'score': nothing is said, but
      the target has a `score`, see `likelihoods.Scorer`.
    decoding: options of a way to decode, see `decode.method_and_seed`; greedy
      by default.
    batch_size: rows of a batch.
    every: adds all answers, see `texts.Writer`; several samples are always told.
    module: of a checkpoint that does not say what it is of, see `loaded.load`.
    restore_step: of a run's folder; its last by default.
    dtype: 'bfloat16' rounds the parameters to it.
    mesh: sizes for `partition.make_mesh`; all devices side by side by default.

  Raises:
    UserError: a name, a split or lengths that are not there; a model that does
      not decode, or does not know the tokens; a folder of other answers.
  """
  method, seed = decode.method_and_seed(decoding or {})
  errors.check_whole('batch_size', batch_size)
  if mode not in MODES:
    raise errors.ConfigError(errors.near(str(mode), MODES, 'mode'))
  if mode == 'score' and (decoding or every):
    raise errors.ConfigError(
      "mode='score' scores the targets that are there and generates nothing: "
      'leave decoding and every out.'
    )
  for name in ('inputs', 'targets'):
    errors.check_whole(f'length of {name}', lengths.get(name))
  provider = stream.find(
    getattr(mixture_or_task, 'name', mixture_or_task), split
  )
  loaded.check_vocabulary(checkpoint, [provider.name])
  splits.tell_cuts(provider.name, split, {'inputs': lengths['inputs']})
  read = {
    task: texts.of_task(task, split, lengths)
    for task in seqio.get_subtasks(provider)
  }
  devices = loaded.mesh_of(mesh)
  family, params = loaded.load(
    checkpoint, module=module, step=restore_step, dtype=dtype, mesh=devices
  )
  make = _scorers(family, params, split, lengths, batch_size, devices)
  if mode != 'score':
    positions.check_decodes(family, checkpoint)
    decoder = decode.make_decoder(
      family, length=lengths['targets'], method=method, mesh=devices
    )
    make = _writers(decoder, family, params, batch_size, seed, mode, every)
  settings = {
    'model': models.describe(family),
    'weights': _fingerprint(params),
    'method': {type(method).__name__: method}, 'seed': seed, 'mode': mode,
    'all': every, 'lengths': dict(lengths), 'batch_size': batch_size,
    'tasks': {task.name: _digest(each) for task, each in read.items()},
  }  # fmt: skip
  record = pathlib.Path(output_dir) / 'infer.json'
  where = same_run.layout(devices or partition.make_mesh())
  same_run.check(record, settings, where)
  with peers.watching(record.parent):
    same_run.write(record, settings, where)
    for task, (rows, tokens) in read.items():
      out = record.with_name(f'{task.name}-{mode}.jsonl-00000-of-00001')
      if peers.from_first(out.exists()):
        _say(f'{task.name} is answered: {out}')
        continue
      _answer(make(task), rows, out, {**settings, 'devices': where}, tokens)


def _fingerprint(params):
  """Of parameters that may lie in several processes."""
  if jax.process_count() > 1:
    params = partition.to_host(params)
  return fingerprints.fingerprint(params)


def _scorers(family, params, split, lengths, batch_size, mesh):
  return lambda task: likelihoods.Scorer(
    family, params, task, split, lengths, batch_size, mesh
  )


def _writers(decoder, family, params, batch_size, seed, mode, every):
  """`task -> what answers it`."""
  every = every or getattr(decoder.method, 'samples', 1) > 1

  def make(task):
    writer = texts.Writer(
      decoder, family, params, task.output_features['targets'].vocabulary,
      batch_size, prefix=decode.is_decoder_only(family), seed=seed,
      scored=mode == 'predict_with_aux', every=every,
    )  # fmt: skip
    return _WithAux(writer) if mode == 'predict_with_aux' else writer

  return make


class _WithAux(NamedTuple):
  """Tells scores where T5X does."""

  writer: texts.Writer

  def batches(self, *args):
    """See `texts.Writer`."""
    for batch in self.writer.batches(*args):
      aux = [{'aux': {'scores': row.pop('score')}} for row in batch]
      yield [{**row, **more} for row, more in zip(batch, aux)]


def _answer(writer, rows, out, settings, tokens=None):
  """Answers what is still to be answered, then writes all of it.

  All processes answer together; the first one keeps the journal and writes.
  """
  path = out.with_name(f'.{out.name}.answers.jsonl')
  keeps = jax.process_index() == 0
  journal = resume.Journal(path if keeps else None, 'infer', settings)
  answered = [row for batch in journal.rows() for row in batch]
  done = peers.from_first(len(answered))
  if done:
    _say(f'{done} of {len(rows)} are answered.')
  shown = _Progress(len(rows), done)
  with stop_lib.StopRequest() as stop:
    for batch in writer.batches(rows, done, tokens):
      journal.append(batch)
      answered += batch
      done += len(batch)
      shown.at(done)
      if done < len(rows) and stop.agreed():
        raise errors.Stopped(f'Stopped after {done} of {len(rows)} answers.')
  shown.close()
  if not keeps:
    return
  lines = (json.dumps(row, ensure_ascii=False) + '\n' for row in answered)
  common.write_text(out, ''.join(lines))
  journal.forget()
  print(f'{len(answered)} answers: {out}')


def _say(text):
  if jax.process_index() == 0:
    print(text, file=sys.stderr)


class _Progress:
  """A bar on a terminal; else a line every ten seconds; of the first process."""

  def __init__(self, total: int, done: int):
    self._total, self._told, self._bar = total, time.monotonic(), None
    if sys.stderr.isatty() and jax.process_index() == 0:
      self._bar = tqdm.tqdm(total=total, initial=done, unit='row')

  def at(self, done: int) -> None:
    """Tells how many are answered."""
    if self._bar is not None:
      self._bar.update(done - self._bar.n)
    elif time.monotonic() - self._told > 10:
      self._told = time.monotonic()
      _say(f'{done} of {self._total} answers')

  def close(self) -> None:
    """Leaves the bar as it is."""
    if self._bar is not None:
      self._bar.close()
