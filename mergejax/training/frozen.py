# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Parameters that do not learn: no gradient and no optimizer's state for them."""

from collections.abc import Mapping, Sequence
import re
from typing import Any

from mergejax import models
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing


def paths(
  family: models.ModelFamily,
  params: typing.Tree,
  freeze: Sequence[str] = (),
) -> frozenset[typing.Path]:
  """The parameters that do not learn.

  Args:
    family: which says what may learn at all: running statistics are measured,
      the base below an adapter stays as it is.
    params: arrays or shapes.
    freeze: regular expressions, each of the whole path.

  Raises:
    ConfigError: an expression that matches nothing, or all of the parameters.
  """
  every = list(tree.flatten(params))
  found = {path for path in every if not family.learns(path)}
  for pattern in freeze:
    wanted = tree.expression(pattern, 'freeze rule')
    matching = [p for p in every if wanted.fullmatch(p)]
    if not matching:
      raise errors.ConfigError(
        f'freeze: {pattern!r} matches no parameter; an expression must match '
        f'the whole path. Parameters begin with:\n{errors.listed(every, 5)}'
      )
    found.update(matching)
  if len(found) == len(every):
    raise errors.ConfigError(
      f'freeze={list(freeze)} leaves no parameter to learn.'
    )
  return frozenset(found)


def kept(
  new: typing.Tree, old: typing.Tree, freeze: Sequence[str]
) -> typing.Tree:
  """The new parameters, but for those that an expression of `freeze` matches.

  They are what did not learn, and running statistics that were measured anew.
  """
  if not freeze:
    return new
  stays = lambda path: any(re.fullmatch(pattern, path) for pattern in freeze)
  return tree.map_paths(
    lambda path, after, before: before if stays(path) else after, new, old
  )


def split(
  params: typing.Tree, fixed: frozenset[typing.Path]
) -> tuple[typing.Tree, typing.Tree]:
  """`(what learns, what does not)`; with nothing fixed the tree itself, {}."""
  if not fixed:
    return params, {}
  leaves = tree.flatten(params)
  learned = {p: leaf for p, leaf in leaves.items() if p not in fixed}
  rest = {p: leaf for p, leaf in leaves.items() if p in fixed}
  return tree.unflatten(learned), tree.unflatten(rest)


def join(learned: typing.Tree, rest: Mapping[str, Any]) -> typing.Tree:
  """The inverse of `split`."""
  if not rest:
    return learned
  return tree.unflatten({**tree.flatten(learned), **tree.flatten(rest)})
