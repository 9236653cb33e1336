# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a collection of statistics has done so far, so that it can continue."""

from collections.abc import Iterable, Iterator, Mapping
import hashlib
import itertools
import os
import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from mergejax.core import errors
from mergejax.core import files
from mergejax.core import resume
from mergejax.core import typing

Totals = dict[typing.Path, np.ndarray]


class Progress:
  """Sums and position, beside the result, saved whole or not at all."""

  def __init__(
    self, out: os.PathLike | str | None, settings: Mapping[str, Any]
  ):
    """Begins or finds the journal of a collection.

    Args:
      out: where the result will be; None keeps no journal.
      settings: what makes it another collection if it differs.

    Raises:
      UserError: the result exists.
    """
    path = None
    if out is not None:
      out = pathlib.Path(out)
      files.check_new(out)
      path = out.with_name(f'.{out.name}.collecting.npz')
    self._journal = resume.Journal(path, 'statistics', settings)
    # Of all batches so far, in their order.
    self._data = hashlib.sha256()
    self._expected = None

  def load(self) -> tuple[Totals | None, int, dict[typing.Path, typing.Path]]:
    """`(sums, batches done, aliases)` of a collection that was interrupted.

    Raises:
      UserError: it cannot be read, or is of another model or settings; or
        processes do not find the same one.
    """
    totals, done, aliases = None, 0, {}
    found = self._journal.load()
    if found is not None:
      totals, about = found
      done, aliases = about['batches'], about['aliases']
      self._expected = about['data']
    if self._journal.path is not None and jax.process_count() > 1:
      everywhere = multihost_utils.process_allgather(np.int32(done))
      if (everywhere != done).any():
        raise errors.DataError(
          f'Of the processes of this run some find {self._journal.path} and '
          'others do not: put the result where all of them see it.'
        )
    return totals, done, aliases

  def after(
    self, done: int, batches: Iterable[Mapping[str, Any]]
  ) -> Iterator[Mapping[str, Any]]:
    """The batches that are still to be done, taken note of as they come.

    Raises:
      UserError: those that were done are not these.
    """
    batches = iter(batches)
    seen = 0
    for batch in itertools.islice(batches, done):
      self._note(batch)
      seen += 1
    if done and (seen < done or self._data.hexdigest() != self._expected):
      raise errors.DataError(
        f'{self._journal.path} holds a collection over other data: its first {done} '
        f'batches are not those that were given now ({seen} of them). Give the '
        'same batches in the same order, or remove it to start afresh.'
      )
    for batch in batches:
      self._note(batch)
      yield batch

  def _note(self, batch):
    if self._journal.path is None:
      return
    for name in sorted(batch):
      leaf = np.asarray(batch[name])
      self._data.update(f'{name}{leaf.dtype}{list(leaf.shape)}'.encode())
      self._data.update(np.ascontiguousarray(leaf).data)

  def save(
    self,
    totals: Totals,
    batches: int,
    aliases: Mapping[typing.Path, typing.Path],
  ) -> None:
    """Replaces what was saved before."""
    if not jax.process_index():
      self._journal.save(
        totals,
        {
          'batches': batches,
          'aliases': dict(aliases),
          'data': self._data.hexdigest(),
        },
      )

  def forget(self) -> None:
    """Removes the journal of a collection that is complete."""
    if not jax.process_index():
      self._journal.forget()
