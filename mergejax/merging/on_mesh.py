# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Merges experts that are stacked on one axis, where they lie on a mesh."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.merging import finite
from mergejax.merging import in_memory
from mergejax.merging import parts
from mergejax.methods import base as merging
from mergejax.methods import masks


def merge_experts(
  stacked: typing.Tree,
  method: merging.Merge,
  *,
  base: typing.Tree | None = None,
  weights: Sequence[float] | typing.Array | None = None,
  axes: axes_lib.Rules = (),
  seed: int = 0,
) -> typing.Tree:
  """Merges stacked experts where they lie: one all-reduce over `branch`.

  The `update(init, params)` of every expert runs on its slice, the states are
  summed over the branch axis, `finish` gives the result on every slice.
  Methods with first passes, whose states do not add, or that see leaves laid by
  their axes are not run so: each expert is taken out of the stack (on a mesh
  its parameters move between devices) and the K of them go through
  `merging.in_memory.merge`, beside the stack in memory.

  Args:
    stacked: parameters with a leading axis `[K, ...]`.
    method: a merge method without statistics.
    base: the seed, for methods on differences.
    weights: `[K]`; see `merging.in_memory.merge`.
    axes: `(regular expression, logical axes)` of leaves that are stacks of
      layers within an expert, the axis of experts left out.
    seed: seeds random methods.

  Returns:
    One tree, without the leading axis, in the dtypes of `stacked`: the numbers
    of `merging.in_memory.merge`, with the same masks. Leaves that are not
    floating (step counters, ids) are those of the base or the first expert.

  Raises:
    UserError: weights or the number of experts do not fit the method, leaves
      without the axis of experts or that may be stacks, a base of other
      parameters or none where one is needed, numbers that are not finite; see
      `merging.in_memory.merge`.
  """
  leaves = tree_lib.flatten(stacked)
  experts = _count(leaves)
  if method.first_passes or not method.additive or method.view != 'element':
    expert = lambda i: jax.tree.map(lambda leaf: leaf[i], stacked)
    return in_memory.merge(
      [expert(i) for i in range(experts)],
      method,
      base=base,
      weights=weights,
      axes=axes,
      seed=seed,
    )
  weights = jnp.asarray(in_memory.check_call(method, weights, experts, base))
  specs = {
    path: typing.LeafSpec(spec.shape[1:], spec.dtype)
    for path, spec in tree_lib.specs(leaves).items()
  }
  if base is not None:
    tree_lib.check_same(
      tree_lib.specs(base), specs,
      expected_name='the base', given_name='an expert',
    )  # fmt: skip
  specs = axes_lib.with_axes(specs, axes)
  used = None
  if base is not None and method.base != 'ignored':
    used = tree_lib.flatten(base)
  result = _merged_where_they_lie(leaves, specs, method, used, weights, seed)
  inputs = [
    in_memory.Source(
      {p: x[i] for p, x in leaves.items() if p not in result}, f'model {i}'
    )
    for i in range(experts)
  ]
  reference = inputs[0] if base is None else in_memory.Source(base, 'the base')
  for path in leaves:
    if path not in result:
      result[path] = in_memory.copied(path, reference, inputs)
  return jax.tree.unflatten(
    jax.tree.structure(stacked), [result[path] for path in leaves]
  )


def _count(leaves):
  """K, the size of the first axis of every leaf."""
  counts = {path: tuple(leaf.shape)[:1] for path, leaf in leaves.items()}
  if len(set(counts.values())) != 1 or () in counts.values():
    lines = [f'{path}: {list(leaf.shape)}' for path, leaf in leaves.items()]
    raise errors.StructureError(
      'Stacked experts have one first axis, of the experts, in every leaf; '
      f'these do not:\n{errors.listed(lines)}'
    )
  return next(iter(counts.values()))[0]


def _merged_where_they_lie(leaves, specs, method, base, weights, seed):
  """`{path: merged leaf}` of the floating leaves, by one sum over experts."""
  experts = range(len(weights))
  layouts = {
    path: parts.Layout(path, specs[path], method)
    for path in in_memory.merged_paths(specs)
  }
  for path in layouts:
    names = [f'model {i}' for i in experts]
    finite.check_stacked(path, leaves[path], names)
    if base is not None:
      finite.check_inputs(path, [base[path]], ['the base'])

  def cut(tree):
    return {
      name: layout.cut(numerics.widen(tree[path]), at)
      for path, layout in layouts.items()
      for name, at in layout.slices
    }

  base = None if base is None else cut(base)
  keys = {
    name: np.stack([masks.mask_key(seed, name, i) for i in experts])
    for layout in layouts.values()
    for name, _ in layout.slices
  }

  def update(params, weight, model, keys):
    wide = cut(params)
    contexts = {}
    for name, leaf in wide.items():
      known = merging.LeafContext(model, key=keys[name])
      contexts[name] = parts.Part([leaf], None, [known]).placed()[0]
    return method.update(
      method.init(tree_lib.specs(wide)),
      wide,
      base=base,
      weight=weight,
      contexts=contexts,
    )

  floating = {path: leaves[path] for path in layouts}
  states = jax.vmap(update)(floating, weights, jnp.arange(len(weights)), keys)
  summed = jax.tree.map(lambda x: jnp.sum(x, axis=0), states)
  merged = method.finish(summed, base=base)
  return {
    path: finite.stored(
      path,
      layout.join([merged[name] for name, _ in layout.slices]),
      specs[path].dtype,
    )
    for path, layout in layouts.items()
  }
