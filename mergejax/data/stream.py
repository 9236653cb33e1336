# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Endless training batches whose position can be saved and restored exactly."""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import functools
import io
import json
import pathlib
import re
import tempfile
from typing import Any
import weakref
import zipfile

import numpy as np
import seqio
import tensorflow as tf

from mergejax.core import errors
from mergejax.data import answers as answers_lib
from mergejax.data import cached as cached_lib
from mergejax.data import converters
from mergejax.data import identity
from mergejax.data import sources
from mergejax.data import task_ids as task_ids_lib
from mergejax.data import tasks
from mergejax.data import tfds_sets

Batch = dict[str, np.ndarray]

CONVERTERS = {
  'lm': seqio.LMFeatureConverter,
  'prefix_lm': seqio.PrefixLMFeatureConverter,
  'encoder_decoder': seqio.EncDecFeatureConverter,
}
# In a saved position: what it is a position in.
_IDENTITY = 'identity.json'


def find(
  mixture_or_task: str, split: str, *, cached: bool = False
) -> seqio.Task | seqio.Mixture:
  """The task or mixture of a name, all of which has the split and its data.

  Args:
    mixture_or_task: a name registered in seqio.
    split: the split.
    cached: the data are in seqio's cache, and their sources are not asked.

  Raises:
    UserError: an unknown name (near ones are offered), no such split, TFDS sets
      that are not on this machine, or tasks that are not in the cache, or were
      cached with another vocabulary.
  """
  known = [*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()]
  if mixture_or_task not in known:
    raise errors.DataError(
      errors.near(str(mixture_or_task), known, 'seqio task or mixture')
      + " Those of T5's suite are made by gin/mixtures/t5_tasks.gin; your own "
      'are known once a gin file imports the module that registers them.'
    )
  provider = seqio.get_mixture_or_task(mixture_or_task)
  if cached:
    cached_lib.check(provider, split)
    return provider
  tasks.check_split(provider, split)
  tfds_sets.check(seqio.get_subtasks(provider))
  return provider


def _check_examples(provider, split, shards):
  """Raises if a shard would get no example of a task, as far as is known.

  A member of a mixture without any would be left out of it silently.
  """
  for task in seqio.get_subtasks(provider):
    if isinstance(task.source, sources.RowSource):
      count = len(task.source.rows(split))
      if count < shards:
        raise errors.DataError(
          f'The split {split!r} of {task.name} has {count} rows, too few for '
          f'{shards} process(es) to read: add some, or leave the task out.'
        )


def check_lengths(lengths: Mapping[str, int], kind: str) -> None:
  """Raises a `UserError` for an unknown kind, or lengths that do not fit it."""
  if kind not in CONVERTERS:
    raise errors.DataError(errors.near(kind, CONVERTERS, 'kind of features'))
  needed = sorted(CONVERTERS[kind].TASK_FEATURES)
  if sorted(lengths) != needed:
    raise errors.DataError(
      f'The lengths of {kind!r} features must be those of '
      f'{" and ".join(needed)}, not {dict(lengths)}.'
    )
  for name, length in lengths.items():
    check_positive(f'length of {name}', length)


def _check_extras(kind, pack, row_ids, choices):
  """Raises where rows are no examples, or none with inputs of their own."""
  if pack and (row_ids or choices):
    raise errors.ConfigError(
      'A row of several packed examples has no task and no choices of its own, '
      f'which {" and ".join(row_ids) or "the choices"} would tell: set pack=False '
      '(train.train_model.pack = False).'
    )
  if choices and kind != 'encoder_decoder':
    raise errors.ConfigError(
      f"Choices are answers of an encoder-decoder: kind='encoder_decoder', not "
      f'{kind!r}.'
    )


def batch_lengths(
  lengths: Mapping[str, int], *, kind: str, pack: bool
) -> dict[str, int]:
  """Positions of a row of every array of a batch; opens no data.

  Args:
    lengths: tokens per feature.
    kind: as of `SeqioStream`.
    pack: likewise.

  Raises:
    UserError: lengths of other features than the kind has.

  Example:
    >>> batch_lengths({'targets': 8}, kind='lm', pack=False)
    {'decoder_target_tokens': 8, 'decoder_input_tokens': 8, \
'decoder_loss_weights': 8}
  """
  check_lengths(lengths, kind)
  converter = CONVERTERS[kind](pack=pack)
  return dict(converter.get_model_feature_lengths(dict(lengths)))


def check_positive(what: str, value: Any) -> None:
  """Raises a `UserError` for what is no whole number of 1 or more."""
  whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
  if not whole or value < 1:
    raise errors.DataError(f'The {what} must be 1 or more, not {value!r}.')


class SeqioStream:
  """Batches of a task or mixture, forever, in an order fixed by the seed.

  The state holds the position inside shuffling and packing, so a restored
  stream continues with the very next batch, bit for bit.
  """

  def __init__(
    self,
    mixture_or_task: str,
    *,
    lengths: Mapping[str, int],
    batch_size: int,
    kind: str = 'lm',
    pack: bool = True,
    split: str = 'train',
    seed: int = 0,
    shard_index: int = 0,
    num_shards: int = 1,
    task_ids: bool = False,
    row_ids: Sequence[str] = (),
    choices: bool = False,
    cached: bool = False,
  ):
    """Opens a stream.

    Args:
      mixture_or_task: a name registered in seqio.
      lengths: tokens per feature: `{'targets': 128}`.
      batch_size: rows of this shard's batch.
      kind: `'lm'`, `'prefix_lm'` or `'encoder_decoder'`.
      pack: put several examples into one row, with segment ids.
      split: the split to read.
      seed: fixes shuffling and mixing.
      shard_index: which part of the examples to read; a process of a
        data-parallel run reads its own.
      num_shards: how many parts there are.
      task_ids: say of every target which task it is of, as `decoder_task_ids`;
        rows stay as they are. See `task_ids`.
      row_ids: say of every row which task it is of, under these names,
        `<int32>[batch]` from 0 in the order of the tasks' names: what adapters
        of several tasks read. Rows must not be packed.
      choices: with all answers of tasks of `answers.add_choice_task`.
      cached: read what `mergejax cache` wrote to a folder that
        `seqio.add_global_cache_dirs` has.

    Raises:
      UserError: an unknown name, a split that a member lacks or that has no
        example for each shard, a bad row.
    """
    self._name, self._split, self._lengths = mixture_or_task, split, lengths
    self._settings = {
      'split': split,
      'lengths': {name: int(length) for name, length in lengths.items()},
      'batch_size': batch_size,
      'kind': kind,
      'pack': pack,
      'seed': seed,
      'shard': f'{shard_index} of {num_shards}',
      # What older positions do not have is not told where it is not used.
      **({'task_ids': True} if task_ids else {}),
      **({'row_ids': sorted(row_ids)} if row_ids else {}),
      **({'choices': True} if choices else {}),
      **({'cached': True} if cached else {}),
    }
    provider = find(mixture_or_task, split, cached=cached)
    check_lengths(lengths, kind)
    check_positive('batch size', batch_size)
    if not cached:
      _check_examples(provider, split, num_shards)
    lengths, extras = dict(lengths), []
    _check_extras(kind, pack, row_ids, choices)
    if choices:
      extras.append(answers_lib.kept(provider, lengths))
    if task_ids or row_ids:
      provider = task_ids_lib.numbered(provider)
      extras.append(
        task_ids_lib.kept(kind, lengths, targets=task_ids, rows=row_ids)
      )
    converter = CONVERTERS[kind](pack=pack)
    if extras:
      converter = converters.extended(CONVERTERS[kind], pack, extras)
      lengths |= {each.feature: each.length for each in extras}
    with reporting_bad_tasks(mixture_or_task):
      dataset = seqio.get_dataset(
        provider,
        task_feature_lengths=lengths,
        dataset_split=split,
        shuffle=True,
        num_epochs=None,
        use_cached=cached,
        feature_converter=converter,
        shard_info=seqio.ShardInfo(shard_index, num_shards),
        seed=seed,
      )
    self._iterator = iter(dataset.batch(batch_size, drop_remainder=True))
    self._position = tf.Variable(0, dtype=tf.int64)
    self._saved = tf.train.Checkpoint(
      iterator=self._iterator, position=self._position
    )
    # An iterator that goes when the interpreter does waits for ever for rows
    # that Python is reading ahead; this is done before.
    weakref.finalize(self, self.__dict__.clear)

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    with reporting_bad_rows():
      found = next(self._iterator, None)
    if found is None:  # the data repeats, unless there is none
      raise errors.DataError(
        f'The split {self._split!r} of {self._name} has no example.'
      )
    batch = {name: leaf.numpy() for name, leaf in found.items()}
    self._position.assign_add(1)
    return batch

  @property
  def position(self) -> int:
    """Batches taken since the beginning."""
    return int(self._position.numpy())

  def __str__(self) -> str:
    found = seqio.get_mixture_or_task(self._name)
    vocabularies = {
      f'{type(feature.vocabulary).__name__} of {feature.vocabulary.vocab_size}'
      for feature in found.output_features.values()
    }
    return f'{self._name} (vocabulary: {", ".join(sorted(vocabularies))} ids)'

  @functools.cached_property
  def identity(self) -> dict[str, Any]:
    """What fixes the batches, as plain data: settings, and content of files."""
    data = identity.describe(
      self._name,
      self._split,
      self._lengths,
      cached=self._settings.get('cached', False),
    )
    return {'data': data, **self._settings}

  def state(self) -> bytes:
    """The position, to be given to `restore`."""
    buffer = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
      self._saved.write(str(pathlib.Path(folder) / 'stream'))
      with zipfile.ZipFile(buffer, 'w') as archive:
        archive.writestr(_IDENTITY, json.dumps(self.identity))
        for file in sorted(pathlib.Path(folder).iterdir()):
          archive.write(file, file.name)
    return buffer.getvalue()

  def restore(self, state: bytes) -> None:
    """Continues from a saved position of a stream with the same arguments.

    Raises:
      UserError: a position in other data, or in other batches of them.
    """
    differing = errors.differences(_identity_in(state), self.identity)
    if differing:
      raise errors.DataError(
        'The saved position is one in other data, or in other batches of the '
        f'same:\n{errors.listed(differing)}\nContinue with what was saved, or '
        'begin anew in another folder.'
      )
    with tempfile.TemporaryDirectory() as folder:
      with zipfile.ZipFile(io.BytesIO(state)) as archive:
        archive.extractall(folder)
      try:
        status = self._saved.read(str(pathlib.Path(folder) / 'stream'))
        status.assert_consumed()
      except (tf.errors.OpError, AssertionError, ValueError) as error:
        raise errors.DataError(
          f'The saved position of {self} cannot be read '
          f'({errors.first_line(error)}). Perhaps another version of '
          'TensorFlow wrote it.'
        ) from error

  def gather(self, states: Sequence[bytes]) -> None:
    """Continues from what several processes saved: that of the same shard."""
    own = [
      state
      for state in states
      if _identity_in(state).get('shard') == self._settings['shard']
    ]
    self.restore([*own, *states][0])


def _identity_in(state: bytes) -> dict[str, Any]:
  """The identity of the stream that saved a position."""
  try:
    with zipfile.ZipFile(io.BytesIO(state)) as archive:
      return json.loads(archive.read(_IDENTITY))
  except (zipfile.BadZipFile, KeyError, ValueError) as error:
    raise errors.DataError(
      'The saved position is none of a task or mixture, or an older version '
      'wrote it, which did not note what it was a position in. Begin anew in '
      'another folder.'
    ) from error


@contextlib.contextmanager
def reporting_bad_tasks(name: str):
  """What seqio, or a step, misses in a task, without TensorFlow's trail.

  Args:
    name: of the task or mixture whose dataset is made.
  """
  try:
    yield
  except KeyError as error:
    # AutoGraph puts the lines of the code before it.
    missed = str(error.args[0]).strip().rpartition('KeyError: ')[2].strip("'")
    raise errors.DataError(
      f'{name}: a preprocessor asks for a field that examples do not have '
      f'({missed}). Compare its names with those of the source.'
    ) from error
  except ValueError as error:
    if not str(error).startswith('Task dataset'):
      raise
    raise errors.DataError(
      f'{name}: {str(error).rstrip(".")}. Its output_features and what its '
      'preprocessors give must be the same.'
    ) from error


@contextlib.contextmanager
def reporting_bad_rows():
  """What a source says of a row, without TensorFlow's trail."""
  try:
    yield
  except tf.errors.OpError as error:
    found = re.search(
      r'(assertion failed: \[)?DataError: (.*?)(\n\s*\n?Traceback|\n\t \[\[)',
      str(error), re.S,
    )  # fmt: skip
    if not found:
      raise
    text = found[2].strip()
    if found[1]:  # it lists its parts: '[text] [number]'
      text = f'{text.removesuffix("]").replace("] [", " ")}.'
    raise errors.DataError(text) from error
