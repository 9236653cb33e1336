# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows of TSV, JSONL and text files by number; a mistake names its line."""

from collections.abc import Sequence
import json
import os
import pathlib
import weakref

import numpy as np

from mergejax.core import errors

SUFFIXES = ('.tsv', '.jsonl', '.txt')
_BLOCK = 1 << 22
_BYTE_ORDER_MARK = b'\xef\xbb\xbf'


class Rows:
  """The rows of one file, in any order, without holding them in memory.

  A TSV's first line names its columns, and no field is quoted; a line of JSONL
  is an object; a line of text is the one column `text`. A byte-order mark in
  front and a carriage return at the end of a line are not part of a row. Where
  each line begins is kept: 8 bytes a line.

  Attributes:
    path: the file.
    columns: names of the columns, or None if every row says its own (JSONL).
  """

  def __init__(self, path: os.PathLike | str):
    """Opens a file and finds its lines.

    Raises:
      UserError: a TSV without a header, or with a column named twice.
    """
    self.path = pathlib.Path(path)
    self._file = os.open(self.path, os.O_RDONLY)
    weakref.finalize(self, os.close, self._file)
    self._stamp = _stamp(os.fstat(self._file))
    self._starts = _line_starts(self._file)
    self._header = 0
    self.columns: tuple[str, ...] | None = None
    if self.path.suffix == '.txt':
      self.columns = ('text',)
    elif self.path.suffix == '.tsv':
      if len(self._starts) < 2:
        raise errors.DataError(
          f'{self.path} is empty: its first line should name the columns.'
        )
      self.columns = tuple(self._text(0).split('\t'))
      self._header = 1
      if len(set(self.columns)) < len(self.columns):
        raise errors.DataError(
          f'{self.path}, line 1 names a column twice: {list(self.columns)}.'
        )

  def __len__(self) -> int:
    return len(self._starts) - 1 - self._header

  def sizes(self) -> np.ndarray:
    """`<int64>[rows]` bytes of each line."""
    return np.diff(self._starts[self._header :])

  def require(self, wanted: Sequence[str]) -> None:
    """Raises if the file's header lacks a wanted column."""
    for column in wanted:
      if self.columns is not None and column not in self.columns:
        raise errors.DataError(
          errors.near(column, self.columns, f'column of {self.path},')
        )

  def fields(self, number: int, wanted: Sequence[str]) -> list[bytes]:
    """Values of the wanted columns of one row, as UTF-8.

    Args:
      number: of the row; 0 is the first after the header.
      wanted: names of columns.

    Raises:
      UserError: a row that is blank, has fewer or more fields than the header,
        is no JSON object, lacks a field, or is not UTF-8.
    """
    line = number + self._header
    text = self._text(line)
    if self.path.suffix == '.jsonl':
      return [self._json_value(line, text, name) for name in wanted]
    if self.path.suffix == '.txt':
      return [text.encode()]
    values = text.split('\t')
    if len(values) != len(self.columns):
      raise self._mistake(
        line,
        f'expected {len(self.columns)} fields, as the first line has, found '
        + (f'{len(values)}.' if text.strip() else 'a blank line.'),
      )
    return [values[self.columns.index(name)].encode() for name in wanted]

  def _json_value(self, line, text, name):
    try:
      value = json.loads(text)[name]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
      found = '' if text.strip() else ', found a blank line'
      raise self._mistake(
        line, f'expected a JSON object with the field {name!r}{found}.'
      ) from error
    if not isinstance(value, (str, int, float)):
      raise self._mistake(
        line, f'{name!r} should be text or a number, not {json.dumps(value)}.'
      )
    try:
      return str(value).encode()
    except UnicodeEncodeError as error:
      raise self._mistake(line, f'{name!r} is not Unicode: {error}.') from error

  def _text(self, line):
    start, end = (int(at) for at in self._starts[line : line + 2])
    if _stamp(os.fstat(self._file)) != self._stamp:
      raise errors.DataError(
        f'{self.path} was changed while it was read. Start again.'
      )
    found = os.pread(self._file, end - start, start)
    try:
      return found.removesuffix(b'\n').removesuffix(b'\r').decode('utf-8')
    except UnicodeDecodeError as error:
      raise self._mistake(line, f'this is not UTF-8 text: {error}.') from error

  def _mistake(self, line, what):
    return errors.DataError(f'{self.path}, line {line + 1}: {what}')


def _stamp(status):
  """What changes when a file is written to."""
  return status.st_size, status.st_mtime_ns


def _line_starts(file):
  """`<int64>[lines + 1]` where lines begin, and where the last one ends."""
  found = [np.zeros(1, np.int64)]
  size = 0
  while block := os.pread(file, _BLOCK, size):
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord('\n'))
    found.append(ends.astype(np.int64) + size + 1)
    size += len(block)
  starts = np.concatenate(found)
  if starts[-1] < size:  # the last line is not ended
    starts = np.append(starts, size)
  if os.pread(file, 3, 0) == _BYTE_ORDER_MARK:
    starts[0] = 3
  return starts
