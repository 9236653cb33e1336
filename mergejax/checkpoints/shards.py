# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which files of a directory are the model, by transformers' rule.

`from_pretrained` takes `model.safetensors`, or else the shards of
`model.safetensors.index.json`, and nothing else: other formats and precisions
of the same weights (`consolidated.safetensors`, `model.fp16.safetensors`)
often lie beside them. Directories that it would not load are read where there
is no doubt: one other index, the complete shards of one model, a single file.
"""

from collections.abc import Mapping
import json
import pathlib
import re
from typing import NamedTuple

from mergejax.core import errors

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
_SUFFIX = '.safetensors'
_SHARD = re.compile(
  r'(?P<stem>.+?)[-_](?P<number>\d+)[-_]of[-_](?P<count>\d+)'
  r'(?P<variant>\.[\w.]+)?\.safetensors'
)


class Chosen(NamedTuple):
  """The files of a model.

  Attributes:
    files: in the order of their names; empty if there are none.
    index: the index that names them, or None.
    weight_map: what it says: `{parameter: file name}`.
    left_out: names of other safetensors files that lie there.
  """

  files: list[pathlib.Path]
  index: pathlib.Path | None
  weight_map: Mapping[str, str]
  left_out: list[str]


def is_here(path: pathlib.Path) -> bool:
  """True if a path is a safetensors file, or a directory with some or an index."""
  if path.is_file():
    return path.suffix == _SUFFIX
  return any(path.glob(f'*{_SUFFIX}')) or bool(_indices(path))


def choose(path: pathlib.Path) -> Chosen:
  """Finds the safetensors files that are the model.

  Args:
    path: a file, which is meant itself, or a directory.

  Returns:
    The files.

  Raises:
    UserError: a damaged index, a missing shard, or several files of which
      nothing tells which ones are the model.
  """
  if path.is_file():
    return Chosen([path], None, {}, [])
  there = sorted(path.glob(f'*{_SUFFIX}'))
  indices = _indices(path)
  index, weight_map = None, {}
  if path / SINGLE in there:
    files = [path / SINGLE]
  elif path / INDEX in indices or len(indices) == 1:
    index = path / INDEX if path / INDEX in indices else indices[0]
    weight_map = _weight_map(index)
    files = _shards_of(index, weight_map)
  else:
    _check_no_pickle(path, there)
    files = _complete_shards(path, there)
  left_out = [file.name for file in there if file not in files]
  return Chosen(files, index, weight_map, left_out)


def _check_no_pickle(path, there):
  """Refuses a directory whose model is a pickle beside other safetensors."""
  pickles = sorted(path.glob('pytorch_model*.bin'))
  if pickles:
    raise errors.CheckpointError(
      f'The model in {path} is {pickles[0].name}, a pickle, which can run code '
      f'when loaded and is never read; {there[0].name} is not the file that '
      'transformers would load. Convert the model where it came from, '
      '`model.save_pretrained(DIR, safe_serialization=True)`, or give the path '
      'of the file that is meant.'
    )


def _indices(path):
  # `model.safetensors.index.fp16.json` is how variants are called.
  return sorted(path.glob(f'*{_SUFFIX}.index*.json')) if path.is_dir() else []


def _weight_map(index):
  try:
    weight_map = json.loads(index.read_text())['weight_map']
    return {str(name): str(file) for name, file in weight_map.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise errors.CheckpointError(
      f'{index} is not a safetensors index: it should be JSON with a '
      "'weight_map' of tensor names to file names."
    ) from error


def _shards_of(index, weight_map):
  files = sorted({index.parent / name for name in weight_map.values()})
  for file in files:
    if file.parent.resolve() != index.parent.resolve():
      raise errors.CheckpointError(
        f'{index} names a file outside its folder: {file}'
      )
    if not file.is_file():
      raise errors.CheckpointError(
        f'{index} names {file.name}, which is missing: the download or '
        'copy of this model is incomplete.'
      )
  return files


def _complete_shards(path, there):
  """The only file, or the shards of the one model whose files are numbered."""
  groups: dict[tuple, dict[int, pathlib.Path]] = {}
  for file in there:
    match = _SHARD.fullmatch(file.name)
    if match:
      key = match['stem'], match['variant'], int(match['count'])
      groups.setdefault(key, {})[int(match['number'])] = file
  if not groups and len(there) == 1:
    return there
  own = [key for key in groups if key[:2] == ('model', None)] or list(groups)
  if len(own) != 1:
    names = [file.name for file in there]
    raise errors.CheckpointError(
      f'{path} holds {len(there)} safetensors files and nothing says which '
      f'ones are the model:\n{errors.listed(names)}\n'
      f'Give the path of one of them, or remove the others. Parts of one model '
      f'need a file {INDEX}: {{"weight_map": {{parameter: file name}}}}.'
    )
  found, count = groups[own[0]], own[0][2]
  # Numbers begin with 1, of some writers with 0.
  missing = set(range(1, count + 1)) - set(found)
  if missing and set(found) != set(range(count)):
    raise errors.CheckpointError(
      f'{path} holds {len(found)} of {count} shards; number '
      f'{", ".join(map(str, sorted(missing)))} is missing: the download or '
      'copy of this model is incomplete.'
    )
  return [found[number] for number in sorted(found)]
