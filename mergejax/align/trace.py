# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which axes of a model's parameters may be permuted together.

The model is traced once. Every axis of every array in the trace is a product
of atoms (a joined axis `heads * head_dim` of two), and each operation says
which axes are the same: a sum joins the axes of its operands, a matrix product
the two that it contracts, a reshape splits and joins atoms. An operation that
treats the positions of an axis differently (an index, a slice, a convolution
along its window, the inputs and outputs of the model) pins the axis. Atoms that
nothing pins, and that are axes of parameters, can be permuted freely.

An atom that never occurs without another (`head_dim` without `heads`, the
hidden units of a scanned layer without its place in the stack) may have a
permutation of its own for every position of that other.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
import jax.extend
import numpy as np

from mergejax import tree as tree_lib
from mergejax import typing


class Atom:
  """A set of positions that belong together; joined ones share a root.

  Attributes:
    size: number of positions.
    pinned: they may not be permuted.
    parts: the atoms it was split into, slowest first, or None.
  """

  def __init__(self, size: int, pinned: bool = False):
    self.size = size
    self.pinned = pinned
    self.parts: list[Atom] | None = None
    self._parent: Atom | None = None

  def root(self) -> 'Atom':
    """The atom that stands for all that were joined with this one."""
    atom = self
    while atom._parent is not None:
      atom = atom._parent
    return atom

  def split(self, first: int) -> None:
    """Splits a root into a slow part of `first` positions and a fast one."""
    rest = self.size // first
    self.parts = [Atom(first, self.pinned), Atom(rest, self.pinned)]

  def join(self, other: 'Atom') -> None:
    """Makes two roots of one size the same."""
    self.pinned |= other.pinned
    other._parent = self


# The atoms of an axis, slowest first; none for an axis of size 1.
Axis = list[Atom]


def expanded(axis: Axis) -> Axis:
  """The axis as roots that are not split any further."""
  result = []
  for atom in axis:
    root = atom.root()
    result += expanded(root.parts) if root.parts is not None else [root]
  return result


def pin(axis: Axis) -> None:
  """Forbids permutations of an axis."""
  for atom in expanded(axis):
    atom.pinned = True


def same(first: Axis, second: Axis) -> None:
  """Says that two axes number the same things."""
  while True:
    a, b = expanded(first), expanded(second)
    differ = next((i for i, (x, y) in enumerate(zip(a, b)) if x is not y), None)
    if differ is None:
      if len(a) != len(b):
        pin(first)
        pin(second)
      return
    x, y = a[differ], b[differ]
    if x.size == y.size:
      x.join(y)
    elif x.size < y.size and y.size % x.size == 0:
      y.split(x.size)
    elif y.size < x.size and x.size % y.size == 0:
      x.split(y.size)
    else:
      pin(first)
      pin(second)
      return


class Traced:
  """A parameter or any other array of the trace: the atoms of its axes."""

  def __init__(self, axes: Sequence[Axis]):
    self.axes = list(axes)

  @classmethod
  def fresh(cls, shape: Sequence[int], pinned: bool = False) -> 'Traced':
    return cls([[Atom(n, pinned)] if n > 1 else [] for n in shape])

  def pin(self) -> None:
    for axis in self.axes:
      pin(axis)


class Trace:
  """Follows axes through a traced function.

  Attributes:
    seen: the axes of every array of the trace, with the stacks it lies in.
  """

  def __init__(self):
    self.seen: list[tuple[Traced, tuple[Axis, ...]]] = []
    self._stacks: tuple[Axis, ...] = ()

  def run(
    self, jaxpr: Any, constants: Sequence[Any], inputs: Sequence[Traced]
  ) -> list[Traced]:
    """The outputs' axes of a jaxpr whose inputs' axes are known."""
    env = {}

    def read(atom):
      if isinstance(atom, jax.extend.core.Literal):
        # A scalar, or the same value everywhere.
        return Traced.fresh(np.shape(atom.val), pinned=True)
      return env[atom]

    for var, value in zip(jaxpr.constvars, constants):
      env[var] = value
    env.update(zip(jaxpr.invars, inputs))
    for eqn in jaxpr.eqns:
      given = [read(atom) for atom in eqn.invars]
      results = self._apply(eqn, given)
      for var, value in zip(eqn.outvars, results):
        env[var] = value
        self.seen.append((value, self._stacks))
    return [read(atom) for atom in jaxpr.outvars]

  def _apply(self, eqn, given):
    name = eqn.primitive.name
    shapes = [var.aval.shape for var in eqn.outvars]
    if name in _ELEMENTWISE or name in _IDENTITY:
      return self._elementwise(name, given, shapes)
    inner = _inner_jaxpr(eqn)
    if inner is not None and name != 'scan':
      return self._call(inner, given)
    rule = _RULES.get(name)
    if rule is None:
      return self._unknown(given, shapes)
    return rule(self, eqn, given, shapes)

  def _unknown(self, given, shapes):
    """Nothing is known of the operation: nothing may be permuted."""
    for one in given:
      one.pin()
    return [Traced.fresh(shape, pinned=True) for shape in shapes]

  def _call(self, inner, given):
    constants = [constant(c) for c in inner.consts]
    return self.run(inner.jaxpr, constants, given[-len(inner.jaxpr.invars) :] if inner.jaxpr.invars else [])  # fmt: skip

  def _elementwise(self, name, given, shapes):
    if name in _IDENTITY:
      return list(given)
    whole = [one for one in given if len(one.axes) == len(shapes[0])]
    result = Traced(whole[0].axes)
    for other in whole[1:]:
      for i, axis in enumerate(other.axes):
        if not result.axes[i]:  # a single position serves all of the others
          result.axes[i] = axis
        elif axis:
          same(result.axes[i], axis)
    return [result for _ in shapes]

  def scan(self, eqn, given, shapes):
    """A loop over stacked layers: the stack is an axis that stays."""
    p = eqn.params
    consts, carried = p['num_consts'], p['num_carry']
    inner = p['jaxpr']
    stack = [Atom(p['length'], pinned=True)] if p['length'] > 1 else []
    slices = []
    for one in given[consts + carried :]:
      same(one.axes[0], stack)
      slices.append(Traced(one.axes[1:]))
    start = given[consts : consts + carried]
    outer, self._stacks = self._stacks, (*self._stacks, stack)
    results = self.run(
      inner.jaxpr,
      [constant(c) for c in inner.consts],
      [*given[:consts], *start, *slices],
    )
    self._stacks = outer
    for before, after in zip(start, results):
      for a, b in zip(before.axes, after.axes):
        same(a, b)
      # What is carried lives outside of the stack as well.
      self.seen.append((before, outer))
    ys = [Traced([stack, *one.axes]) for one in results[carried:]]
    return [*start, *ys]


def constant(value: Any) -> Traced:
  """A constant of the program: its positions differ, so they are pinned."""
  return Traced.fresh(np.shape(value), pinned=True)


def _inner_jaxpr(eqn):
  for name in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
    inner = eqn.params.get(name)
    if inner is None:
      continue
    if hasattr(inner, 'jaxpr'):
      return inner
    return jax.extend.core.ClosedJaxpr(inner, ())
  return None


def _broadcast(trace, eqn, given, shapes):
  (operand, *_), (shape,) = given, shapes
  result = Traced.fresh(shape)
  for i, at in enumerate(eqn.params['broadcast_dimensions']):
    if eqn.invars[0].aval.shape[i] == shape[at]:
      result.axes[at] = operand.axes[i]
  return [result]


def _reshape(trace, eqn, given, shapes):
  atoms = [atom for axis in given[0].axes for atom in expanded(axis)]
  result = []
  for size in shapes[0]:
    axis = []
    while math.prod(atom.size for atom in axis) < size and atoms:
      missing = size // math.prod(atom.size for atom in axis)
      atom = atoms[0]
      if atom.size > missing:
        if atom.size % missing:
          return trace._unknown(given, shapes)
        atom.split(missing)
        # The atom may stand further back as well.
        atoms = [part for one in atoms for part in expanded([one])]
        atom = atoms[0]
      axis.append(atoms.pop(0))
    if math.prod(atom.size for atom in axis) != size:
      return trace._unknown(given, shapes)
    result.append(axis)
  return [Traced(result)]


def _transpose(trace, eqn, given, shapes):
  return [Traced([given[0].axes[i] for i in eqn.params['permutation']])]


def _squeeze(trace, eqn, given, shapes):
  gone = eqn.params['dimensions']
  return [Traced([a for i, a in enumerate(given[0].axes) if i not in gone])]


def _reduce(trace, eqn, given, shapes):
  gone = eqn.params['axes']
  kept = [a for i, a in enumerate(given[0].axes) if i not in gone]
  return [Traced(kept) for _ in shapes]


def _arg_reduce(trace, eqn, given, shapes):
  for i in eqn.params['axes']:
    pin(given[0].axes[i])
  return _reduce(trace, eqn, given, shapes)


def _along(parameter):
  """Operations whose positions along one axis follow each other."""

  def rule(trace, eqn, given, shapes):
    for one in given:
      if one.axes:
        pin(one.axes[eqn.params[parameter]])
    return [given[0] for _ in shapes]

  return rule


def _dot(trace, eqn, given, shapes):
  (left_by, right_by), (left_batch, right_batch) = eqn.params[
    'dimension_numbers'
  ]
  left, right = given
  for a, b in (*zip(left_by, right_by), *zip(left_batch, right_batch)):
    same(left.axes[a], right.axes[b])
  free = lambda one, by, batch: [
    axis for i, axis in enumerate(one.axes) if i not in (*by, *batch)
  ]
  batch = [left.axes[i] for i in left_batch]
  return [
    Traced(
      [
        *batch,
        *free(left, left_by, left_batch),
        *free(right, right_by, right_batch),
      ]
    )
  ]


def _conv(trace, eqn, given, shapes):
  numbers = eqn.params['dimension_numbers']
  image, kernel = given
  if eqn.params['batch_group_count'] != 1:
    return trace._unknown(given, shapes)
  groups = eqn.params['feature_group_count']
  batch, features, *space = numbers.lhs_spec
  out, into, *window = numbers.rhs_spec
  if groups == 1:
    same(image.axes[features], kernel.axes[into])
  elif eqn.invars[1].aval.shape[out] == groups:  # depthwise
    same(image.axes[features], kernel.axes[out])
  else:
    pin(image.axes[features])
    pin(kernel.axes[into])
    pin(kernel.axes[out])
  for i in space:
    pin(image.axes[i])
  for i in window:
    pin(kernel.axes[i])
  result = Traced.fresh(shapes[0], pinned=True)
  result.axes[numbers.out_spec[0]] = image.axes[batch]
  result.axes[numbers.out_spec[1]] = kernel.axes[out]
  return [result]


def _window(trace, eqn, given, shapes):
  """Pooling: axes with a window of one position stay."""
  operand = given[0]
  result = Traced.fresh(shapes[0], pinned=True)
  for i, size in enumerate(eqn.params['window_dimensions']):
    if size == 1 and eqn.invars[0].aval.shape[i] == shapes[0][i]:
      result.axes[i] = operand.axes[i]
    else:
      pin(operand.axes[i])
  return [result for _ in shapes]


def _partial(trace, eqn, given, shapes):
  """Slices and pads: axes that keep their size stay, others are pinned."""
  operand = given[0]
  before, after = eqn.invars[0].aval.shape, shapes[0]
  result = Traced.fresh(after, pinned=True)
  for i, (a, b) in enumerate(zip(before, after)):
    if a == b:
      result.axes[i] = operand.axes[i]
    else:
      pin(operand.axes[i])
  return [result]


def _pad(trace, eqn, given, shapes):
  for i, (low, high, inner) in enumerate(eqn.params['padding_config']):
    if low or high or inner:
      pin(given[0].axes[i])
  return _partial(trace, eqn, given, shapes)


def _dynamic_update_slice(trace, eqn, given, shapes):
  operand, update = given[:2]
  whole = zip(eqn.invars[0].aval.shape, eqn.invars[1].aval.shape)
  for i, (a, b) in enumerate(whole):
    if a == b:
      same(operand.axes[i], update.axes[i])
    else:
      pin(operand.axes[i])
      pin(update.axes[i])
  return [operand]


def _concatenate(trace, eqn, given, shapes):
  at = eqn.params['dimension']
  first = given[0]
  for other in given:
    pin(other.axes[at])
    for i, (a, b) in enumerate(zip(first.axes, other.axes)):
      if i != at:
        same(a, b)
  result = Traced(first.axes)
  result.axes[at] = Traced.fresh([shapes[0][at]], pinned=True).axes[0]
  return [result]


def _split(trace, eqn, given, shapes):
  at = eqn.params['axis']
  pin(given[0].axes[at])
  results = []
  for shape in shapes:
    one = Traced(given[0].axes)
    one.axes[at] = Traced.fresh([shape[at]], pinned=True).axes[0]
    results.append(one)
  return results


def _iota(trace, eqn, given, shapes):
  result = Traced.fresh(shapes[0])
  pin(result.axes[eqn.params['dimension']])
  return [result]


def _gather(trace, eqn, given, shapes):
  """A look-up: axes of the table that are taken whole stay."""
  operand, indices = given
  numbers = eqn.params['dimension_numbers']
  sizes, shape = eqn.params['slice_sizes'], eqn.invars[0].aval.shape
  if getattr(numbers, 'operand_batching_dims', ()):
    return trace._unknown(given, shapes)
  result = Traced.fresh(shapes[0], pinned=True)
  kept = [i for i in range(len(shape)) if i not in numbers.collapsed_slice_dims]
  for at, i in zip(numbers.offset_dims, kept):
    if sizes[i] == shape[i] and i not in numbers.start_index_map:
      result.axes[at] = operand.axes[i]
    else:
      pin(operand.axes[i])
  for i in numbers.collapsed_slice_dims:
    pin(operand.axes[i])
  batch = [i for i in range(len(shapes[0])) if i not in numbers.offset_dims]
  for at, axis in zip(batch, indices.axes[:-1]):
    result.axes[at] = axis
  return [result]


_IDENTITY = frozenset((
  'convert_element_type', 'copy', 'copy_p', 'stop_gradient', 'device_put',
  'optimization_barrier', 'reduce_precision', 'sharding_constraint', 'name',
  'pvary',
))  # fmt: skip
_ELEMENTWISE = frozenset((
  'abs', 'add', 'add_any', 'and', 'asin', 'acos', 'atan', 'atan2', 'cbrt',
  'ceil', 'clamp', 'cos', 'cosh', 'div', 'eq', 'erf', 'erfc', 'erf_inv', 'exp',
  'exp2', 'expm1', 'floor', 'ge', 'gt', 'integer_pow', 'is_finite', 'le', 'log',
  'log1p', 'logistic', 'lt', 'max', 'min', 'mul', 'ne', 'neg', 'nextafter',
  'not', 'or', 'pow', 'rem', 'round', 'rsqrt', 'select_n', 'sign', 'sin',
  'sinh', 'sqrt', 'square', 'sub', 'tan', 'tanh', 'xor',
))  # fmt: skip
_RULES: dict[str, Callable[..., list[Traced]]] = {
  'argmax': _arg_reduce,
  'argmin': _arg_reduce,
  'broadcast_in_dim': _broadcast,
  'concatenate': _concatenate,
  'conv_general_dilated': _conv,
  'cumlogsumexp': _along('axis'),
  'cummax': _along('axis'),
  'cummin': _along('axis'),
  'cumprod': _along('axis'),
  'cumsum': _along('axis'),
  'dot_general': _dot,
  'dynamic_slice': _partial,
  'dynamic_update_slice': _dynamic_update_slice,
  'gather': _gather,
  'iota': _iota,
  'pad': _pad,
  'reduce_and': _reduce,
  'reduce_max': _reduce,
  'reduce_min': _reduce,
  'reduce_or': _reduce,
  'reduce_prod': _reduce,
  'reduce_sum': _reduce,
  'reduce_window_max': _window,
  'reduce_window_sum': _window,
  'reshape': _reshape,
  'scan': Trace.scan,
  'slice': _partial,
  'sort': _along('dimension'),
  'split': _split,
  'squeeze': _squeeze,
  'transpose': _transpose,
}


def follow(
  apply: Callable[..., Any], params: typing.Tree, *inputs: Any
) -> tuple[dict[typing.Path, Traced], Trace]:
  """Traces `apply(params, *inputs)` and follows the axes of the parameters.

  Args:
    apply: a pure function.
    params: arrays, or their shapes.
    inputs: what else it takes; their axes are pinned, and so are those of the
      outputs.

  Returns:
    The axes of every parameter, and the whole trace.
  """
  closed = jax.make_jaxpr(apply)(params, *inputs)
  shapes = {p: tuple(x.shape) for p, x in tree_lib.flatten(params).items()}
  leaves = {path: Traced.fresh(shape) for path, shape in shapes.items()}
  others = [
    Traced.fresh(np.shape(leaf), pinned=True)
    for leaf in jax.tree.leaves(inputs)
  ]
  trace = Trace()
  for one in (*leaves.values(), *others):
    trace.seen.append((one, ()))
  results = trace.run(
    closed.jaxpr,
    [constant(c) for c in closed.consts],
    [*leaves.values(), *others],
  )
  for one in results:
    one.pin()
  return leaves, trace
