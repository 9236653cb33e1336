# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Trees by name: paths, rules over paths, and differences between trees."""

from collections.abc import Callable, Mapping, Sequence
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import typing


def _key_name(key) -> str:
  for attribute in ('key', 'name', 'idx'):
    if hasattr(key, attribute):
      return str(getattr(key, attribute))
  return str(key)


def path_name(key: Any) -> typing.Path:
  """The '/'-joined path of a key path of `jax.tree_util`."""
  return '/'.join(map(_key_name, key))


def flatten(tree: typing.Tree) -> dict[typing.Path, Any]:
  """Lists the leaves of a pytree by '/'-joined path.

  Args:
    tree: any pytree; a flat `{path: leaf}` dict comes back unchanged.

  Returns:
    `{path: leaf}` in the order of `jax.tree.leaves`.

  Example:
    >>> flatten({'mlp': {'wi': 1, 'wo': 2}})
    {'mlp/wi': 1, 'mlp/wo': 2}
  """
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {path_name(path): leaf for path, leaf in leaves}


def unflatten(leaves: Mapping[typing.Path, Any]) -> typing.Tree:
  """Nested dicts from `{path: leaf}`; the inverse of `flatten` for dicts.

  Raises:
    UserError: a path is both a leaf and a folder.
  """
  root = {}
  for path, leaf in leaves.items():
    *folders, name = path.split('/')
    node = root
    for i, folder in enumerate(folders):
      node = node.setdefault(folder, {})
      if not isinstance(node, dict):
        raise errors.StructureError(
          f'{"/".join(folders[: i + 1])!r} is an array, yet {path!r} lies '
          'below it. A path names an array or a folder, not both.'
        )
    if name in node:
      raise errors.StructureError(f'{path!r} is both an array and a folder.')
    node[name] = leaf
  return root


def map_paths(
  fn: Callable[..., Any], tree: typing.Tree, *rest: typing.Tree
) -> typing.Tree:
  """`jax.tree.map` whose function also gets the path: `fn(path, leaf, ...)`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: fn(path_name(path), *leaves),
    tree,
    *rest,
  )


def leaf_spec(leaf: Any) -> typing.LeafSpec:
  """Shape and dtype of an array, a tracer, a `ShapeDtypeStruct` or a spec.

  Raises:
    UserError: a key of `jax.random`, which has no dtype of NumPy.
  """
  if isinstance(leaf, typing.LeafSpec):
    return leaf
  if not hasattr(leaf, 'shape') or not hasattr(leaf, 'dtype'):
    leaf = np.asarray(leaf)
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    raise errors.StructureError(
      f'A random key ({leaf.dtype}) is not an array of numbers: leave it out, '
      'or put jax.random.key_data(key) in its place and make the key again '
      'with jax.random.wrap_key_data.'
    )
  return typing.LeafSpec(tuple(leaf.shape), np.dtype(leaf.dtype))


def specs(tree: typing.Tree) -> typing.SpecTree:
  """`{path: LeafSpec}` of a tree of arrays (or of specs)."""
  result = {}
  for path, leaf in flatten(tree).items():
    try:
      result[path] = leaf_spec(leaf)
    except errors.UserError as error:
      raise error.at(path) from error
  return result


def expression(pattern: str, what: str) -> re.Pattern[str]:
  """A regular expression over paths.

  Args:
    pattern: as a user wrote it.
    what: whose it is, for messages: `'axes rule'`.

  Raises:
    ConfigError: it is none.
  """
  try:
    return re.compile(pattern)
  except re.error as error:
    raise errors.ConfigError(
      f'The {what} {pattern!r} is not a regular expression: {error}.'
    ) from error


def apply_rules(
  rules: Sequence[tuple[str, Any]],
  paths: Sequence[typing.Path],
  what: str,
) -> dict[typing.Path, Any]:
  """Gives every path the value of the first rule that matches it whole.

  Args:
    rules: `(regular expression, value)` pairs, in order. The expression must
      match the full path.
    paths: the paths to cover.
    what: what the rules give, for messages: `'logical axes'`.

  Returns:
    `{path: value}` for every path.

  Raises:
    UserError: a path that no rule matches, a rule that is never the first to
      match, or an invalid expression.

  Example:
    >>> apply_rules([('.*bias', 0), ('.*', 1)], ['a/bias', 'a/kernel'], 'decay')
    {'a/bias': 0, 'a/kernel': 1}
  """
  compiled = [(expression(p, f'{what} rule'), value) for p, value in rules]
  result, used = {}, set()
  missing = []
  for path in paths:
    for i, (pattern, value) in enumerate(compiled):
      if pattern.fullmatch(path):
        result[path] = value
        used.add(i)
        break
    else:
      missing.append(path)
  if missing:
    raise errors.StructureError(
      f'No {what} rule matches {len(missing)} of {len(paths)} parameters:\n'
      f'{errors.listed(missing)}\n'
      'Rules match the full path, first match wins; end the list with '
      "('.*', ...) to give all others a value."
    )
  unused = [rules[i][0] for i in range(len(rules)) if i not in used]
  if unused:
    raise errors.StructureError(
      f'{len(unused)} {what} rule(s) match nothing, or only what an earlier '
      f'rule took:\n{errors.listed(unused)}\nRemove them or correct the '
      f'expression. Parameters begin with:\n{errors.listed(list(paths), 5)}'
    )
  return result


def difference(expected: typing.SpecTree, given: typing.SpecTree) -> list[str]:
  """Lines on how two trees differ: '-' missing, '+' unexpected, '!' other.

  Args:
    expected: specs of the tree that sets the standard.
    given: specs of the tree that is checked.

  Returns:
    One line per differing path, empty when names and shapes agree. dtypes may
    differ, but not in whether they are floating: a count is no weight.
  """
  lines = []
  for path, spec in expected.items():
    if path not in given:
      lines.append(f'- {path} {list(spec.shape)}')
    elif given[path].shape != spec.shape:
      lines.append(
        f'! {path} {list(spec.shape)} expected, {list(given[path].shape)} given'
      )
    elif _is_floating(given[path]) != _is_floating(spec):
      lines.append(
        f'! {path} {spec.dtype.name} expected, {given[path].dtype.name} given'
      )
  lines += [
    f'+ {path} {list(spec.shape)}'
    for path, spec in given.items()
    if path not in expected
  ]
  return lines


def _is_floating(spec):
  return jax.numpy.issubdtype(spec.dtype, jax.numpy.floating)


def check_same(
  expected: typing.SpecTree,
  given: typing.SpecTree,
  *,
  expected_name: str,
  given_name: str,
) -> None:
  """Raises when two trees differ in names or shapes.

  Raises:
    UserError: with every difference (at most ten shown): '-' for what is
      missing from `given`, '+' for what it has beyond `expected`.
  """
  lines = difference(expected, given)
  if lines:
    raise errors.StructureError(
      f'{given_name} does not have the parameters of {expected_name} '
      f'({len(lines)} differences; - missing, + unexpected, '
      '! shape or dtype):\n'
      f'{errors.listed(lines)}\n'
      'Merge models of one architecture, or convert one of them first.'
    )
