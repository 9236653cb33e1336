# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a statistic of a parameter is: its shape, and where it must be.

A statistic declares its `StatisticSpec`, methods list those that they need, and
whoever saves, checks, cuts or places statistics reads the spec.
"""

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

from mergejax.core import axes as axes_lib
from mergejax.core import typing

LEAF, SCALAR = 'leaf', 'scalar'
# Sizes that stand in a layout beside whole numbers.
_INPUTS, _OUTPUTS, _ANY = 'inputs', 'outputs', '*'
VALUES = ('any', 'finite', 'nonnegative', 'positive semidefinite')


class StatisticSpec(NamedTuple):
  """A kind of statistic, which every model brings of its parameters.

  Attributes:
    name: its name in files, and in `LeafContext.stats`.
    layout: its shape: 'leaf', that of the parameter; 'scalar', one number; or
      sizes such as 'inputs x inputs', 'outputs', 'inputs x 3' and '*' (any),
      counted over the input and output axes of the parameter. All but 'leaf'
      have the axes of a stack of layers in front: one statistic a layer.
    required: 'all', every merged parameter must have it; 'some', parameters of
      which no model has it are merged without.
    values: what its numbers are: 'any', 'finite', 'nonnegative' (and finite) or
      'positive semidefinite' (symmetric, of a diagonal that is not negative).
    combines: the weighted mean over models is the statistic of their merge.
    advice: what to try where a merge with it has no finite result.

  Example:
    >>> spec = typing.LeafSpec((8, 16), np.dtype('float32'))
    >>> StatisticSpec('gram', 'inputs x inputs').shape('wi/kernel', spec)
    (8, 8)
  """

  name: str
  layout: str = LEAF
  required: str = 'all'
  values: str = 'finite'
  combines: bool = False
  advice: str = ''

  @property
  def is_leaf(self) -> bool:
    """True if it lies like its parameter, element by element."""
    return self.layout == LEAF

  @property
  def sizes(self) -> tuple[str, ...]:
    """The sizes of its layout: `('inputs', 'inputs')`; none of 'leaf'."""
    if self.layout in (LEAF, SCALAR):
      return ()
    return tuple(self.layout.split(' x '))

  def check(self) -> None:
    """Raises `ValueError` unless its words are known."""
    for size in self.sizes:
      if size not in (_INPUTS, _OUTPUTS, _ANY) and not size.isdigit():
        raise ValueError(
          f"The layout of {self.name!r} should be 'leaf', 'scalar' or sizes "
          f"('inputs', 'outputs', a whole number, '*') joined by ' x ', not "
          f'{self.layout!r}.'
        )
    if self.required not in ('all', 'some') or self.values not in VALUES:
      raise ValueError(
        f"{self.name!r} should be required of 'all' or 'some' parameters, not "
        f'{self.required!r}, and its values one of {VALUES}, not '
        f'{self.values!r}.'
      )

  def shape(
    self, path: typing.Path, spec: typing.LeafSpec
  ) -> tuple[int | None, ...]:
    """Its shape for a parameter; None for sizes that may be any.

    Raises:
      UserError: it counts inputs or outputs, and which these are is not known.
    """
    if self.is_leaf:
      return spec.shape
    if self.layout == SCALAR and not axes_lib.stacked(spec):
      return ()
    view = axes_lib.view(path, spec)
    known = {
      _INPUTS: math.prod(spec.shape[i] for i in view.inputs),
      _OUTPUTS: math.prod(spec.shape[i] for i in view.outputs),
      _ANY: None,
    }
    stack = tuple(spec.shape[i] for i in view.stack)
    return stack + tuple(
      known[size] if size in known else int(size) for size in self.sizes
    )

  def fits(
    self, shape: tuple[int, ...], path: typing.Path, spec: typing.LeafSpec
  ) -> bool:
    """Whether an array of this shape can be the statistic of a parameter."""
    return matches(shape, self.shape(path, spec))

  def record(self) -> dict[str, Any]:
    """Itself as plain data, for files."""
    return self._asdict()


def matches(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
  """Whether a shape is the wanted one, in which None may be any size."""
  return len(shape) == len(wanted) and all(
    size in (None, found) for size, found in zip(wanted, shape)
  )


FISHER = StatisticSpec('fisher', values='nonnegative')
GRAM = StatisticSpec(
  'gram',
  'inputs x inputs',
  required='some',
  values='positive semidefinite',
  combines=True,
  advice='The summed Gram matrix may be singular: lower alpha, collect more '
  'tokens, or give a ridge.',
)
# How many examples (or rows of inputs) a statistic was taken over.
COUNT = StatisticSpec('count', SCALAR, required='some', values='any')
# Files of before specs were saved name their statistic only.
_BY_NAME = {spec.name: spec for spec in (FISHER, GRAM)}


def named(name: str) -> StatisticSpec | None:
  """The statistic of the package that has this name, or None."""
  return _BY_NAME.get(name)


def read(record: Mapping[str, Any]) -> StatisticSpec:
  """The spec that `StatisticSpec.record` gave."""
  known = {n: x for n, x in record.items() if n in StatisticSpec._fields}
  spec = StatisticSpec(**known)
  spec.check()
  return spec
