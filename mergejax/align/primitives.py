# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What each operation of a trace says of its axes.

A rule is `(trace, equation, axes of the operands, shapes of the results) -> axes
of the results`.
"""

from collections.abc import Callable
import math

from mergejax.align import atoms


def _broadcast(trace, eqn, given, shapes):
  (operand, *_), (shape,) = given, shapes
  result = atoms.Traced.fresh(shape)
  for i, at in enumerate(eqn.params['broadcast_dimensions']):
    if eqn.invars[0].aval.shape[i] == shape[at]:
      result.axes[at] = operand.axes[i]
  return [result]


def _reshape(trace, eqn, given, shapes):
  left = [atom for axis in given[0].axes for atom in atoms.expanded(axis)]
  result = []
  for size in shapes[0]:
    axis = []
    while math.prod(atom.size for atom in axis) < size and left:
      missing = size // math.prod(atom.size for atom in axis)
      atom = left[0]
      if atom.size > missing:
        if atom.size % missing:
          return trace.unknown(given, shapes)
        atom.split(missing)
        # The atom may stand further back as well.
        left = [part for one in left for part in atoms.expanded([one])]
        atom = left[0]
      axis.append(left.pop(0))
    if math.prod(atom.size for atom in axis) != size:
      return trace.unknown(given, shapes)
    result.append(axis)
  return [atoms.Traced(result)]


def _transpose(trace, eqn, given, shapes):
  return [atoms.Traced([given[0].axes[i] for i in eqn.params['permutation']])]


def _squeeze(trace, eqn, given, shapes):
  gone = eqn.params['dimensions']
  return [
    atoms.Traced([a for i, a in enumerate(given[0].axes) if i not in gone])
  ]


def _reduce(trace, eqn, given, shapes):
  gone = eqn.params['axes']
  kept = [a for i, a in enumerate(given[0].axes) if i not in gone]
  return [atoms.Traced(kept) for _ in shapes]


def _arg_reduce(trace, eqn, given, shapes):
  for i in eqn.params['axes']:
    atoms.pin(given[0].axes[i])
  return _reduce(trace, eqn, given, shapes)


def _along(parameter):
  """Operations whose positions along one axis follow each other."""

  def rule(trace, eqn, given, shapes):
    for one in given:
      if one.axes:
        atoms.pin(one.axes[eqn.params[parameter]])
    return [given[0] for _ in shapes]

  return rule


def _dot(trace, eqn, given, shapes):
  (left_by, right_by), (left_batch, right_batch) = eqn.params[
    'dimension_numbers'
  ]
  left, right = given
  for a, b in (*zip(left_by, right_by), *zip(left_batch, right_batch)):
    atoms.same(left.axes[a], right.axes[b])
  free = lambda one, by, batch: [
    axis for i, axis in enumerate(one.axes) if i not in (*by, *batch)
  ]
  batch = [left.axes[i] for i in left_batch]
  return [
    atoms.Traced(
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
    return trace.unknown(given, shapes)
  groups = eqn.params['feature_group_count']
  batch, features, *space = numbers.lhs_spec
  out, into, *window = numbers.rhs_spec
  if groups == 1:
    atoms.same(image.axes[features], kernel.axes[into])
  elif eqn.invars[1].aval.shape[out] == groups:  # depthwise
    atoms.same(image.axes[features], kernel.axes[out])
  else:
    atoms.pin(image.axes[features])
    atoms.pin(kernel.axes[into])
    atoms.pin(kernel.axes[out])
  for i in space:
    atoms.pin(image.axes[i])
  for i in window:
    atoms.pin(kernel.axes[i])
  result = atoms.Traced.fresh(shapes[0], pinned=True)
  result.axes[numbers.out_spec[0]] = image.axes[batch]
  result.axes[numbers.out_spec[1]] = kernel.axes[out]
  return [result]


def _window(trace, eqn, given, shapes):
  """Pooling: axes with a window of one position stay."""
  operand = given[0]
  result = atoms.Traced.fresh(shapes[0], pinned=True)
  for i, size in enumerate(eqn.params['window_dimensions']):
    if size == 1 and eqn.invars[0].aval.shape[i] == shapes[0][i]:
      result.axes[i] = operand.axes[i]
    else:
      atoms.pin(operand.axes[i])
  return [result for _ in shapes]


def _partial(trace, eqn, given, shapes):
  """Slices and pads: axes that keep their size stay, others are pinned."""
  operand = given[0]
  before, after = eqn.invars[0].aval.shape, shapes[0]
  result = atoms.Traced.fresh(after, pinned=True)
  for i, (a, b) in enumerate(zip(before, after)):
    if a == b:
      result.axes[i] = operand.axes[i]
    else:
      atoms.pin(operand.axes[i])
  return [result]


def _pad(trace, eqn, given, shapes):
  for i, (low, high, inner) in enumerate(eqn.params['padding_config']):
    if low or high or inner:
      atoms.pin(given[0].axes[i])
  return _partial(trace, eqn, given, shapes)


def _dynamic_update_slice(trace, eqn, given, shapes):
  operand, update = given[:2]
  whole = zip(eqn.invars[0].aval.shape, eqn.invars[1].aval.shape)
  for i, (a, b) in enumerate(whole):
    if a == b:
      atoms.same(operand.axes[i], update.axes[i])
    else:
      atoms.pin(operand.axes[i])
      atoms.pin(update.axes[i])
  return [operand]


def _concatenate(trace, eqn, given, shapes):
  at = eqn.params['dimension']
  first = given[0]
  for other in given:
    atoms.pin(other.axes[at])
    for i, (a, b) in enumerate(zip(first.axes, other.axes)):
      if i != at:
        atoms.same(a, b)
  result = atoms.Traced(first.axes)
  result.axes[at] = atoms.Traced.fresh([shapes[0][at]], pinned=True).axes[0]
  return [result]


def _split(trace, eqn, given, shapes):
  at = eqn.params['axis']
  atoms.pin(given[0].axes[at])
  results = []
  for shape in shapes:
    one = atoms.Traced(given[0].axes)
    one.axes[at] = atoms.Traced.fresh([shape[at]], pinned=True).axes[0]
    results.append(one)
  return results


def _iota(trace, eqn, given, shapes):
  result = atoms.Traced.fresh(shapes[0])
  atoms.pin(result.axes[eqn.params['dimension']])
  return [result]


def _gather(trace, eqn, given, shapes):
  """A look-up: axes of the table that are taken whole stay."""
  operand, indices = given
  numbers = eqn.params['dimension_numbers']
  sizes, shape = eqn.params['slice_sizes'], eqn.invars[0].aval.shape
  if getattr(numbers, 'operand_batching_dims', ()):
    return trace.unknown(given, shapes)
  result = atoms.Traced.fresh(shapes[0], pinned=True)
  kept = [i for i in range(len(shape)) if i not in numbers.collapsed_slice_dims]
  for at, i in zip(numbers.offset_dims, kept):
    if sizes[i] == shape[i] and i not in numbers.start_index_map:
      result.axes[at] = operand.axes[i]
    else:
      atoms.pin(operand.axes[i])
  for i in numbers.collapsed_slice_dims:
    atoms.pin(operand.axes[i])
  batch = [i for i in range(len(shapes[0])) if i not in numbers.offset_dims]
  for at, axis in zip(batch, indices.axes[:-1]):
    result.axes[at] = axis
  return [result]


IDENTITY = frozenset((
  'convert_element_type', 'copy', 'copy_p', 'stop_gradient', 'device_put',
  'optimization_barrier', 'reduce_precision', 'sharding_constraint', 'name',
  'pvary',
))  # fmt: skip
ELEMENTWISE = frozenset((
  'abs', 'add', 'add_any', 'and', 'asin', 'acos', 'atan', 'atan2', 'cbrt',
  'ceil', 'clamp', 'cos', 'cosh', 'div', 'eq', 'erf', 'erfc', 'erf_inv', 'exp',
  'exp2', 'expm1', 'floor', 'ge', 'gt', 'integer_pow', 'is_finite', 'le', 'log',
  'log1p', 'logistic', 'lt', 'max', 'min', 'mul', 'ne', 'neg', 'nextafter',
  'not', 'or', 'pow', 'rem', 'round', 'rsqrt', 'select_n', 'sign', 'sin',
  'sinh', 'sqrt', 'square', 'sub', 'tan', 'tanh', 'xor',
))  # fmt: skip
RULES: dict[str, Callable[..., list[atoms.Traced]]] = {
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
  'slice': _partial,
  'sort': _along('dimension'),
  'split': _split,
  'squeeze': _squeeze,
  'transpose': _transpose,
}
