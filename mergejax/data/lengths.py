# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How long examples are, and what of them is cut off."""

from collections.abc import Mapping
import logging

import seqio
import tensorflow as tf

from mergejax.core import errors
from mergejax.data import samples
from mergejax.data import sources

# To see how long an example is, it is given so many times the room it has.
_ROOM = 16
# Examples of a table that training looks at for that.
_LOOKED_AT = 1024


def longest(provider: seqio.Task | seqio.Mixture, split: str) -> dict[str, int]:
  """Tokens of the longest inputs and targets; all of a split is read for it.

  Args:
    provider: a task or mixture.
    split: the split.

  Returns:
    `{feature: tokens}`, the longest over all tasks of a mixture.

  Raises:
    DataError: the split has no example, or a bad row.
  """
  found: dict[str, int] = {}
  for task in seqio.get_subtasks(provider):
    names = [n for n in ('inputs', 'targets') if n in task.output_features]
    with sources.reporting_bad_rows():
      sizes = samples.in_order(task, split, None).map(
        lambda row, names=names: {name: tf.size(row[name]) for name in names}
      )
      for row in sizes.as_numpy_iterator():
        for name, size in row.items():
          found[name] = max(found.get(name, 1), int(size))
  if not found:
    raise errors.DataError(
      f'The split {split!r} of {provider.name} has no example.'
    )
  return found


def check_cuts(
  provider: seqio.Task | seqio.Mixture,
  split: str,
  lengths: Mapping[str, int],
  most: int | None,
  answers: bool,
) -> None:
  """Compares the tokens of every example with the room that they have.

  Args:
    provider: a task or mixture.
    split: the split.
    lengths: tokens per feature.
    most: of so many examples, see `samples`; None: of all.
    answers: the targets are answers, of which nothing may be cut off. Other
      targets, and inputs, that are cut are told in a warning.

  Raises:
    DataError: an answer that does not fit.
  """
  roomy = {name: _ROOM * length for name, length in lengths.items()}
  sizes = {name: [] for name in lengths}
  with sources.reporting_bad_rows():
    dataset = samples.in_order(provider, split, roomy).map(
      lambda row: {name: tf.size(row[name]) for name in lengths}
    )
    for row in samples.drawn(dataset, most):
      for name, size in row.items():
        sizes[name].append(int(size))
  for name, found in sizes.items():
    long = [size for size in found if size > lengths[name]]
    if not long:
      continue
    longest = f'{max(long)} tokens' + (
      ' or more' if max(long) == roomy[name] else ''
    )
    what = (
      f'{len(long)} of {len(found)} {name} of {provider.name}, {split}, are '
      f'longer than {lengths[name]} tokens, the end token included'
    )
    if name == 'targets' and answers:
      raise errors.DataError(
        f'{what}. Answers that are cut off can no longer be told apart: the '
        f'length of {name} must be at least {longest}.'
      )
    logging.warning('%s, and are cut. The longest has %s.', what, longest)


def tell_cuts(
  mixture_or_task: str, split: str, lengths: Mapping[str, int]
) -> None:
  """Warns of inputs and targets of tables that are cut to their lengths.

  Args:
    mixture_or_task: a name registered in seqio.
    split: of which a sample of each table is looked at.
    lengths: tokens per feature.
  """
  for task in seqio.get_subtasks(seqio.get_mixture_or_task(mixture_or_task)):
    source = task.source
    if isinstance(source, sources.RowSource) and source.example_a_row:
      some = samples.narrowed(task, split, _LOOKED_AT)
      check_cuts(some, split, lengths, None, answers=False)
