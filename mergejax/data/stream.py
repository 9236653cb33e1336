# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Endless training batches whose position can be saved and restored exactly."""

from collections.abc import Iterator, Mapping, Sequence
import functools
import io
import json
import pathlib
import tempfile
from typing import Any
import zipfile

import numpy as np
import seqio
import tensorflow as tf

from mergejax import errors
from mergejax.data import identity

Batch = dict[str, np.ndarray]

_CONVERTERS = {
  'lm': seqio.LMFeatureConverter,
  'prefix_lm': seqio.PrefixLMFeatureConverter,
  'encoder_decoder': seqio.EncDecFeatureConverter,
}


_IDENTITY = 'identity.json'


def _converter(kind: str, pack: bool) -> seqio.FeatureConverter:
  if kind not in _CONVERTERS:
    raise errors.UserError(errors.near(kind, _CONVERTERS, 'kind of features'))
  return _CONVERTERS[kind](pack=pack)


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
    }
    dataset = seqio.get_dataset(
      mixture_or_task,
      task_feature_lengths=dict(lengths),
      dataset_split=split,
      shuffle=True,
      num_epochs=None,
      feature_converter=_converter(kind, pack),
      shard_info=seqio.ShardInfo(shard_index, num_shards),
      seed=seed,
    )
    self._iterator = iter(dataset.batch(batch_size, drop_remainder=True))
    self._position = tf.Variable(0, dtype=tf.int64)
    self._saved = tf.train.Checkpoint(
      iterator=self._iterator, position=self._position
    )

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    batch = {name: leaf.numpy() for name, leaf in next(self._iterator).items()}
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
    data = identity.describe(self._name, self._split, self._lengths)
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
      raise errors.UserError(
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
        raise errors.UserError(
          f'The saved position of {self} cannot be read '
          f'({str(error).splitlines()[0][:200]}). Perhaps another version of '
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
    raise errors.UserError(
      'The saved position is none of a task or mixture, or an older version '
      'wrote it, which did not note what it was a position in. Begin anew in '
      'another folder.'
    ) from error


def evaluation_batches(
  mixture_or_task: str,
  *,
  lengths: Mapping[str, int],
  batch_size: int,
  split: str,
  kind: str = 'lm',
  max_examples: int | None = None,
) -> list[Batch]:
  """A fixed sample of a split, in batches of equal shape.

  Args:
    mixture_or_task: a name registered in seqio.
    lengths: tokens per feature.
    batch_size: rows of a batch; the last is filled with empty rows of weight 0.
    split: the split to read.
    kind: as in `SeqioStream`; never packed.
    max_examples: at most this many examples, drawn with a fixed seed.

  Returns:
    Batches of `<int32>[batch_size, length]` arrays.

  Raises:
    UserError: the split has no example.
  """
  dataset = seqio.get_dataset(
    mixture_or_task,
    task_feature_lengths=dict(lengths),
    dataset_split=split,
    shuffle=max_examples is not None,
    num_epochs=1,
    feature_converter=_converter(kind, pack=False),
    seed=0,
  )
  if max_examples is not None:
    dataset = dataset.take(max_examples)
  batches = []
  for batch in dataset.batch(batch_size).as_numpy_iterator():
    missing = batch_size - len(next(iter(batch.values())))
    batches.append(
      {
        name: np.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1))
        for name, leaf in batch.items()
      }
    )
  if not batches:
    raise errors.UserError(
      f'The split {split!r} of {mixture_or_task} has no example.'
    )
  return batches
