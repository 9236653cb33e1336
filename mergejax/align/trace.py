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
from typing import Any

import jax
import jax.extend
import numpy as np

from mergejax.align import atoms
from mergejax.align import primitives
from mergejax.core import tree as tree_lib
from mergejax.core import typing


class Trace:
  """Follows axes through a traced function.

  Attributes:
    seen: the axes of every array of the trace, with the stacks it lies in.
  """

  def __init__(self):
    self.seen: list[tuple[atoms.Traced, tuple[atoms.Axis, ...]]] = []
    self._stacks: tuple[atoms.Axis, ...] = ()

  def run(
    self, jaxpr: Any, constants: Sequence[Any], inputs: Sequence[atoms.Traced]
  ) -> list[atoms.Traced]:
    """The outputs' axes of a jaxpr whose inputs' axes are known."""
    env = {}

    def read(atom):
      if isinstance(atom, jax.extend.core.Literal):
        # A scalar, or the same value everywhere.
        return atoms.Traced.fresh(np.shape(atom.val), pinned=True)
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
    if name in primitives.ELEMENTWISE or name in primitives.IDENTITY:
      return self._elementwise(name, given, shapes)
    if name == 'scan':
      return self._scan(eqn, given)
    inner = _inner_jaxpr(eqn)
    if inner is not None:
      constants = [constant(c) for c in inner.consts]
      return self.run(inner.jaxpr, constants, given)
    rule = primitives.RULES.get(name)
    if rule is None:
      return self.unknown(given, shapes)
    return rule(self, eqn, given, shapes)

  def unknown(self, given, shapes):
    """Nothing is known of the operation: nothing may be permuted."""
    for one in given:
      one.pin()
    return [atoms.Traced.fresh(shape, pinned=True) for shape in shapes]

  def _elementwise(self, name, given, shapes):
    if name in primitives.IDENTITY:
      return list(given)
    whole = [one for one in given if len(one.axes) == len(shapes[0])]
    result = atoms.Traced(whole[0].axes)
    for other in whole[1:]:
      for i, axis in enumerate(other.axes):
        if not result.axes[i]:  # a single position serves all of the others
          result.axes[i] = axis
        elif axis:
          atoms.same(result.axes[i], axis)
    return [result for _ in shapes]

  def _scan(self, eqn, given):
    """A loop over stacked layers: the stack is an axis that stays."""
    inner, length = _closed(eqn.params['jaxpr']), eqn.params['length']
    # Versions of JAX tell differently how many operands are constant, carried
    # and sliced; slices have an axis less inside of the loop.
    rank = lambda var: len(var.aval.shape)
    as_they_are = lambda outer, own: sum(
      rank(x) == rank(y) for x, y in zip(outer, own)
    )
    carried = as_they_are(eqn.outvars, inner.jaxpr.outvars)
    consts = as_they_are(eqn.invars, inner.jaxpr.invars) - carried
    stack = [atoms.Atom(length, pinned=True)] if length > 1 else []
    slices = []
    for one in given[consts + carried :]:
      atoms.same(one.axes[0], stack)
      slices.append(atoms.Traced(one.axes[1:]))
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
        atoms.same(a, b)
      # What is carried lives outside of the stack as well.
      self.seen.append((before, outer))
    ys = [atoms.Traced([stack, *one.axes]) for one in results[carried:]]
    return [*start, *ys]


def constant(value: Any) -> atoms.Traced:
  """A constant of the program: its positions differ, so they are pinned."""
  return atoms.Traced.fresh(np.shape(value), pinned=True)


def _closed(jaxpr):
  """A program with its constants, where it comes without."""
  if hasattr(jaxpr, 'jaxpr'):
    return jaxpr
  return jax.extend.core.ClosedJaxpr(jaxpr, ())


def _inner_jaxpr(eqn):
  """The program that an operation calls on its operands as they are, or None.

  Mapped ones (over devices) see other shapes and are not followed.
  """
  for name in ('jaxpr', 'call_jaxpr', 'fun_jaxpr'):
    inner = eqn.params.get(name)
    if inner is None:
      continue
    inner = _closed(inner)
    shapes = lambda variables: [v.aval.shape for v in variables]
    if shapes(inner.jaxpr.invars) == shapes(eqn.invars):
      return inner
  return None


def follow(
  apply: Callable[..., Any], params: typing.Tree, *inputs: Any
) -> tuple[dict[typing.Path, atoms.Traced], Trace]:
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
  leaves = {path: atoms.Traced.fresh(shape) for path, shape in shapes.items()}
  others = [
    atoms.Traced.fresh(np.shape(leaf), pinned=True)
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
