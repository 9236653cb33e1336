# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Finds the permutation groups of a model: from its trace, or its axes."""

from collections.abc import Callable
from typing import Any

from mergejax.align import atoms
from mergejax.align import spec as spec_lib
from mergejax.align import trace
from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import typing
from mergejax.names import t5x


def derive(
  apply: Callable[..., Any], params: typing.Tree, *inputs: Any
) -> spec_lib.PermutationSpec:
  """The permutation groups of a model, found by tracing it; see `trace`.

  Args:
    apply: `(params, *inputs) -> outputs`, pure, in evaluation mode.
    params: its parameters, running statistics among them; or their shapes.
    inputs: an example of what else it takes; only shapes matter.

  Returns:
    A specification with every permutation that provably leaves the outputs as
    they are.

  Raises:
    UserError: no unit may be permuted.
  """
  leaves, traced = trace.follow(apply, params, *inputs)
  notes = []
  while True:
    twice = _twice(leaves)
    if twice is None:
      break
    path, atom = twice
    atom.pinned = True
    notes.append(
      f'{path} carries the same units on two axes, so they stay where they are.'
    )
  free = {}
  for path, one in leaves.items():
    for i, axis in enumerate(one.axes):
      for atom in atoms.expanded(axis):
        if not atom.pinned:
          free.setdefault(atom, f'{path}:{i}')
  if not free:
    raise errors.StructureError(
      'No unit of this model can change places: every axis of its parameters '
      'is fixed by an input, an output, or an operation that is not followed.'
    )
  names: dict[Any, str] = {}
  for atom, name in free.items():
    taken = name in names.values()
    names[atom] = f'{name}/{atom.size}' if taken else name
  parents, stacks = _parents(names, traced, leaves)
  groups = {}
  for atom, name in names.items():
    groups[name] = spec_lib.Group(atom.size, tuple(parents[atom]))
  factors = {
    path: tuple(
      tuple(
        spec_lib.Factor(names.get(atom, stacks.get(atom)), atom.size)
        for atom in atoms.expanded(axis)
      )
      or (spec_lib.Factor(None, 1),)
      for axis in one.axes
    )
    for path, one in leaves.items()
  }
  sizes = {name: atom.size for atom, name in stacks.items()}
  return spec_lib.PermutationSpec(
    factors, groups, sizes, tuple(dict.fromkeys(notes))
  )


def _twice(leaves):
  """A leaf with one free atom on two axes, and the atom."""
  for path, one in leaves.items():
    here = [a for axis in one.axes for a in atoms.expanded(axis)]
    for atom in here:
      if not atom.pinned and here.count(atom) > 1:
        return path, atom
  return None


def _parents(names, traced, leaves):
  """For each free atom the names it depends on, and the stacks among them."""
  # atom -> atoms that every array with it has as well
  with_it: dict[Any, set] = {}
  for one, context in traced.seen:
    here = {
      atom for axis in (*one.axes, *context) for atom in atoms.expanded(axis)
    }
    for atom in here:
      with_it[atom] = with_it[atom] & here if atom in with_it else set(here)
  stack_atoms = [
    a for _, context in traced.seen for axis in context
    for a in atoms.expanded(axis)
  ]  # fmt: skip
  stacks = {}
  for atom in dict.fromkeys(stack_atoms):
    stacks[atom] = f'stack {len(stacks)}'
  order = {}
  for one in leaves.values():
    for axis in one.axes:
      for i, atom in enumerate(atoms.expanded(axis)):
        order.setdefault(atom, i)
  result = {}
  for atom in names:
    others = with_it.get(atom, set()) - {atom}
    fixed = [stacks[a] for a in stacks if a in others]
    moving = [
      names[a]
      for a in names
      if a in others
      # Of two that are always together the slower one leads.
      and (atom not in with_it[a] or order[a] < order[atom])
    ]
    # Deeper nests are not matched jointly; one leader is enough.
    result[atom] = fixed + moving[:1]
  by_name = {name: atom for atom, name in names.items()}
  for atom, own in result.items():
    leaders = [n for n in own if n in by_name]
    if leaders and any(n in by_name for n in result[by_name[leaders[0]]]):
      result[atom] = [n for n in own if n not in by_name]
  return result, stacks


def from_axes(
  specs: typing.SpecTree, rules: axes_lib.Rules = t5x.AXES
) -> spec_lib.PermutationSpec:
  """Groups from logical axes, for checkpoints whose module is not at hand.

  The hidden units of each MLP (axis `mlp`, one group for each folder of
  kernels) and the residual stream (`embed`, one group for the whole model).
  Attention stays: how many heads there are is not written in the shapes.

  Args:
    specs: of the model.
    rules: `(regular expression, axes)`, see `axes.logical_axes`; by default
      those of the names of T5X.

  Raises:
    UserError: a leaf that no rule covers.
  """
  logical = axes_lib.logical_axes(specs, rules)
  leaves, groups, stacks = {}, {}, {}
  for path, spec in specs.items():
    axes = []
    above = [n for n in logical[path] if n in axes_lib.STACKS]
    for name, size in zip(logical[path], spec.shape):
      if name in axes_lib.STACKS:
        stacks[name] = size
        factor = spec_lib.Factor(name, size)
      elif name == 'embed':
        groups['embed'] = spec_lib.Group(size)
        factor = spec_lib.Factor('embed', size)
      elif name == 'mlp':
        folder = path.rsplit('/', 2)[0]
        group = f'{folder}/mlp'
        groups[group] = spec_lib.Group(size, tuple(above))
        factor = spec_lib.Factor(group, size)
      else:
        factor = spec_lib.Factor(None, size)
      axes.append((factor,))
    leaves[path] = tuple(axes)
  return spec_lib.PermutationSpec(
    leaves,
    groups,
    stacks,
    ('Attention heads stay: their number is not known.',),
  )
