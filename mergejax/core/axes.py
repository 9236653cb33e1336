# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a merge or a mesh must know of a parameter: names for its axes.

A short table of rules gives every parameter its logical axes by path, so the
same facts hold for a module, a tree in memory and a checkpoint on disk. An
unknown parameter is an error, never a guess: a `[512, 512]` kernel does not
say which side is its input.

`View` is the other half: which axes of a leaf are stacked layers, which are
the inputs of a linear map and which its output units. Flax kernels are `[in,
out]`, PyTorch weights `[out, in]`.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import stacks
from mergejax.core import tree
from mergejax.core import typing

# `(regular expression, axes)`, or axes by the very path.
Rules = (
  Sequence[tuple[str, tuple[str, ...]]] | Mapping[typing.Path, Sequence[str]]
)


def logical_axes(
  specs: Mapping[typing.Path, typing.LeafSpec], rules: Rules
) -> dict[typing.Path, tuple[str, ...]]:
  """Logical axes of every parameter.

  Args:
    specs: the parameters; axes that a spec already carries are kept.
    rules: `(regular expression, axes)`, first full match wins.

  Returns:
    `{path: axes}`, one name per array axis.

  Raises:
    UserError: a parameter that no rule covers, or whose rank is not the rule's
      (a stacked kernel needs axes of its own: their place cannot be guessed).

  Example:
    >>> spec = typing.LeafSpec((8, 16), np.dtype('float32'))
    >>> rules = [('.*wi/kernel', ('embed', 'mlp'))]
    >>> logical_axes({'layers_0/mlp/wi/kernel': spec}, rules)
    {'layers_0/mlp/wi/kernel': ('embed', 'mlp')}
  """
  unknown = [path for path, spec in specs.items() if spec.axes is None]
  # A table serves many architectures: a rule that a model does not use is fine.
  used: list[Any] = [rule for rule in rules if _matched(rule, unknown)]
  found = tree.apply_rules(used, unknown, 'logical axes')
  result = {}
  for path, spec in specs.items():
    axes = spec.axes if spec.axes is not None else found[path]
    if len(axes) != len(spec.shape):
      raise errors.StructureError(
        f'{path} has shape {list(spec.shape)} but its logical axes are '
        f'{axes}. If layers are stacked, give the axes of the stacked '
        "parameter, with 'layers' where the stack is."
      )
    result[path] = tuple(axes)
  return result


def _matched(rule, paths: Iterable[typing.Path]) -> list[typing.Path]:
  """The paths that the expression of a rule matches."""
  pattern = tree.expression(rule[0], 'axes rule')
  return [path for path in paths if pattern.fullmatch(path)]


STACKS = stacks.NAMES
# Axes that are called so are what they say, whatever the path.
INPUTS, OUTPUTS = 'inputs', 'outputs'

# Tables of one vector a position, or a token.
_ROWS = r'(positions?|\w*pos(ition)?_?embed\w*|cls|cls_token|class_token)'
# (path, axes besides stacked ones, which of them are inputs); first match wins.
_INPUTS = (
  (r'(.*[/.])?(query|key|value|qkv)[/.]kernel', (2, 3, 4), lambda n: [0]),
  (r'(.*[/.])?kernel', (2, 3, 4, 5), lambda n: list(range(n - 1))),
  (r'(.*[/.])?embedding', (2,), lambda n: [1]),
  (r'(.*[/.])?rel_embedding', (2,), lambda n: [0]),
  (r'(.*[/.])?' + _ROWS, (2, 3), lambda n: [n - 1]),
  (r'(.*[/.])?weight', (2, 3, 4, 5), lambda n: list(range(1, n))),
)
# Without axis names, kernels of more than two axes whose inputs are known: those
# of attention, one axis of inputs (or, of `out`, of outputs), and convolutions.
_ATTENTION = re.compile(r'(.*[/.])?(query|key|value|out)[/.]kernel')
_VECTOR = re.compile(r'(.*[/.])?(bias|scale)')


class View(NamedTuple):
  """Which axes of a leaf play which part; together all of its axes.

  Attributes:
    stack: axes of stacked layers or experts; each slice is a leaf of its own.
    inputs: input axes of the linear map; all axes of a vector.
    outputs: axes that number its output units; none for a vector.
  """

  stack: tuple[int, ...]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]


def stacked(spec: typing.LeafSpec) -> tuple[int, ...]:
  """Positions of the axes that stack layers; none if axes are not known."""
  return tuple(i for i, name in enumerate(spec.axes or ()) if name in STACKS)


def slice_size(spec: typing.LeafSpec) -> int:
  """Elements of one layer of a stack; of all, where nothing is stacked."""
  stack = stacked(spec)
  return math.prod(n for i, n in enumerate(spec.shape) if i not in stack)


def view(path: typing.Path, spec: typing.LeafSpec) -> View:
  """Finds out what the axes of a leaf are.

  Args:
    path: of the leaf.
    spec: with `axes` where they are known. Where all of them but stacked ones
      are called 'inputs' or 'outputs' they are that; a vector has but one kind.

  Returns:
    The parts that its axes play.

  Raises:
    UserError: the path and the number of axes leave it open, or the parameter
      may be a stack and the spec names no axes.

  Example:
    >>> view('mlp/wi/kernel', typing.LeafSpec((8, 16), np.dtype('float32')))
    View(stack=(), inputs=(0,), outputs=(1,))
    >>> view('mlp.up_proj.weight', typing.LeafSpec((16, 8), np.dtype('float32')))
    View(stack=(), inputs=(1,), outputs=(0,))
  """
  stack = stacked(spec)
  rest = [i for i in range(len(spec.shape)) if i not in stack]
  said = {i: spec.axes[i] for i in rest} if spec.axes else {}
  if said and {*said.values()} == {INPUTS, OUTPUTS}:
    of = lambda name: tuple(i for i in rest if said[i] == name)
    return View(stack, of(INPUTS), of(OUTPUTS))
  if said and {*said.values()} <= {INPUTS, OUTPUTS}:
    return View(stack, tuple(rest), ())
  if len(rest) <= 1:
    return View(stack, tuple(rest), ())
  if stacks.may_be_stack(path, spec):
    raise errors.StructureError(stacks.message({path: spec}))
  if _VECTOR.fullmatch(path):
    return View(stack, tuple(rest), ())
  for pattern, ranks, inputs in _INPUTS:
    if re.fullmatch(pattern, path) and len(rest) in ranks:
      if spec.axes is None and not _is_plain(path, len(rest)):
        break
      of_rest = inputs(len(rest))
      return View(
        stack,
        tuple(rest[i] for i in of_rest),
        tuple(rest[i] for i in range(len(rest)) if i not in of_rest),
      )
  raise errors.StructureError(
    f'Which axes of {path} {list(spec.shape)} are inputs and which are outputs '
    'is not known, and this method must know. Give its logical axes: '
    f'`axes=[({path!r}, {_example(spec)})]` in Python, `axes:` in a recipe, one '
    f'name an axis: {INPUTS!r} for those of its inputs, {OUTPUTS!r} for those of '
    f'its outputs, and for stacked ones one of {", ".join(STACKS)}.'
  )


def _is_plain(path, rank):
  """Whether a path says which axes are inputs, without axis names."""
  rows = re.fullmatch(_ROWS, re.split('[/.]', path)[-1])
  if rank == 2 or path.endswith('weight') or rows:
    return True
  attention = rank == 3 and _ATTENTION.fullmatch(path)
  return bool(attention) or stacks.is_convolution(path, rank)


def _example(spec):
  """Names that fit the rank of a leaf, to be changed as it lies."""
  return (INPUTS, *(OUTPUTS,) * (len(spec.shape) - 1))


def with_axes(
  specs: Mapping[typing.Path, typing.LeafSpec], rules: Rules
) -> dict[typing.Path, typing.LeafSpec]:
  """Specs with the axis names that a user's rules give; others as they were.

  Raises:
    UserError: a rule that matches nothing, or does not fit the rank.
  """
  if isinstance(rules, Mapping):
    found = rules
    for path in found:
      if path not in specs:
        raise errors.StructureError(errors.near(path, specs, 'parameter'))
  else:
    matched = set().union(*(_matched(rule, specs) for rule in rules))
    covered = [path for path in specs if path in matched]
    found = tree.apply_rules(rules, covered, 'axes') if rules else {}
  result = dict(specs)
  for path, names in found.items():
    spec = specs[path]
    if len(names) != len(spec.shape):
      raise errors.StructureError(
        f'{path} has shape {list(spec.shape)}, but the axes given for it are '
        f'{tuple(names)}: one name an axis.'
      )
    result[path] = typing.LeafSpec(spec.shape, spec.dtype, tuple(names))
  return result


def agreed(
  path: typing.Path, specs: Sequence[typing.LeafSpec]
) -> typing.LeafSpec:
  """The first model's spec of a leaf, with the axes that any of them knows.

  Args:
    path: of the leaf.
    specs: of the models, of one shape.

  Raises:
    StructureError: two models stack layers along different axes, or give the
      axes the same names in another order: one is transposed.
  """
  first = specs[0]
  known = [
    spec for spec in specs
    if spec.axes is not None and len(spec.axes) == len(first.shape)
  ]  # fmt: skip
  if not known:
    return first
  for spec in known[1:]:
    names = spec.axes or (), known[0].axes or ()
    turned = names[0] != names[1] and sorted(names[0]) == sorted(names[1])
    if turned or stacked(spec) != stacked(known[0]):
      raise errors.StructureError(
        f'{path} has the axes {known[0].axes} in one model and {spec.axes} in '
        'another: they stack layers differently, or one is transposed, so that '
        'their elements are not of the same layers or inputs. Save one of them '
        'anew as the other lies, or give the true axes with `axes=` (`axes:` in '
        'a recipe).'
      )
  return typing.LeafSpec(first.shape, first.dtype, known[0].axes)


def of_models(
  models: Sequence[Mapping[typing.Path, typing.LeafSpec]], rules: Rules = ()
) -> dict[typing.Path, typing.LeafSpec]:
  """The first model's specs, with the axes of `rules`, or that models agree on.

  Raises:
    StructureError: a rule that matches nothing, or does not fit the rank; two
      models that stack the layers of a leaf differently, see `agreed`.
  """
  bare = {
    path: dataclasses.replace(spec, axes=None)
    for path, spec in models[0].items()
  }
  result = with_axes(bare, rules)
  for path, spec in result.items():
    if spec.axes is None:
      own = [model[path] for model in models if path in model]
      result[path] = agreed(path, own)
  return result


def lay(leaf: typing.Array, parts: View, kind: str) -> typing.Array:
  """Lays a leaf without stacked axes before a method.

  Args:
    leaf: <float>[...].
    parts: its view, with an empty stack.
    kind: 'unit' gives `[units, inputs]`, 'input' and 'matrix' `[inputs,
      units]`; a vector stays a vector for 'matrix' and is one unit, or one
      input, otherwise.

  Returns:
    The leaf, transposed and reshaped; `unlay` takes it back.
  """
  if kind == 'element' or (kind == 'matrix' and not parts.outputs):
    return leaf
  if not parts.outputs:
    return jnp.reshape(leaf, (1, -1))
  first, second = (
    (parts.outputs, parts.inputs)
    if kind == 'unit'
    else (parts.inputs, parts.outputs)
  )
  rows = math.prod(leaf.shape[i] for i in first)
  return jnp.reshape(jnp.transpose(leaf, first + second), (rows, -1))


def unlay(
  laid: typing.Array, shape: Sequence[int], parts: View, kind: str
) -> typing.Array:
  """Takes `lay` back; `shape` is that of the leaf."""
  if kind == 'element' or (kind == 'matrix' and not parts.outputs):
    return laid
  if not parts.outputs:
    return jnp.reshape(laid, shape)
  order = (
    parts.outputs + parts.inputs
    if kind == 'unit'
    else parts.inputs + parts.outputs
  )
  moved = jnp.reshape(laid, tuple(shape[i] for i in order))
  return jnp.transpose(moved, tuple(int(i) for i in np.argsort(order)))
