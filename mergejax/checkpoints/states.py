# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Where the parameters lie in a training state, and what of it they are not."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.core import typing

# Names that trainers give to the parts of a state: ours and flax's, T5X's,
# big_vision's, nnx's and others.
_PARAMS = ('params', 'target', 'model')
_OPTIMIZERS = (
  'opt_state', 'opt_states', 'optimizer_state', 'optimizer_states', 'optimizer',
  'optim', 'opt', 'state',
)  # fmt: skip
# Parts that lie around a state, or around its batch statistics.
_AROUND = ('train_state', 'state', 'optimizer')
_COLLECTIONS = ('model_state', 'flax_mutables', 'extra_variables')
BATCH_STATS = 'batch_stats'
# Running averages of a network, as flax's and Haiku's trainers call them.
_VARIABLES = (BATCH_STATS, 'net_state', 'network_state', 'state')
# What optimizers call their averages.
_MOMENTS = {
  'mu', 'nu', 'trace', 'v_row', 'v_col', 'param_states', 'exp_avg',
  'exp_avg_sq', 'momentum', 'velocity', 'grad_ema', 'grad_sq_ema',
}  # fmt: skip


class Parts(NamedTuple):
  """A tree seen as parameters.

  Attributes:
    paths: `{path of a parameter: its path in the tree}`.
    left_out: parts of the tree that are not parameters.
  """

  paths: Mapping[typing.Path, typing.Path]
  left_out: list[str]


def parameters(tree: Mapping[str, Any], name: str) -> Parts:
  """Finds the parameters of a tree that may be a training state.

  A tree is a state if it has parameters and an optimizer's state side by side,
  under names of known trainers. Its parameters are shown without that name,
  its running averages under their own (`batch_stats`), as in the trees that
  linen modules are initialised with. Any other tree is shown as it is.

  Args:
    tree: nested dicts.
    name: how messages call it.

  Returns:
    Where the parameters are.

  Raises:
    UserError: an optimizer's averages lie beside no known name of parameters:
      they would be merged as if they were weights.

  Example:
    >>> tree = {'params': {'w': 1}, 'opt_state': {'mu': {'w': 2}}, 'step': 3}
    >>> parameters(tree, 'a state')
    Parts(paths={'w': 'params/w'}, left_out=['opt_state', 'step'])
  """
  leaves = tree_lib.flatten(tree)
  found = _state(tree, '')
  if found is None:
    _check_no_moments(tree, name)
    return Parts({path: path for path in leaves}, [])
  state, prefix = found
  params = next(key for key in _PARAMS if key in state)
  roots = {f'{prefix}{params}/': ''}
  for key in _VARIABLES:
    if key in state and not _is_optimizer(state, key):
      roots[f'{prefix}{key}/'] = f'{key}/'
  for key in _COLLECTIONS:
    if BATCH_STATS in _children(state.get(key)):
      roots[f'{prefix}{key}/{BATCH_STATS}/'] = f'{BATCH_STATS}/'
  paths = {}
  for path in leaves:
    for root, shown in roots.items():
      if path.startswith(root):
        paths[shown + path[len(root) :]] = path
  taken = set(paths.values())
  left_out = {_part(path, prefix) for path in leaves if path not in taken}
  return Parts(paths, sorted(left_out))


def _state(tree, prefix):
  """`(state, its path)`, looked for here and in what may lie around one."""
  optimizers = [key for key in _OPTIMIZERS if _is_optimizer(tree, key)]
  for key in ('params', 'target'):
    if key in tree and optimizers:
      return tree, prefix
  if 'model' in tree and any(
    key == 'opt_state' or _has_moments(tree[key]) for key in optimizers
  ):
    return tree, prefix
  for key in _AROUND:
    found = _children(tree.get(key)) and _state(tree[key], f'{prefix}{key}/')
    if found:
      return found
  return None


def _is_optimizer(tree, key):
  """True if a part is an optimizer's, and not the running averages of Haiku."""
  if key == 'state':
    own = tree.get(key)
    return 'target' in tree or 'step' in _children(own) or _has_moments(own)
  return key in tree and key in _OPTIMIZERS


def _check_no_moments(tree, name):
  for key in _OPTIMIZERS:
    if key in tree and _has_moments(tree[key]):
      raise errors.CheckpointError(
        f'{name} is a training state, with the averages of an optimizer in '
        f'{key!r}, but none of its other parts '
        f'({", ".join(sorted(set(tree) - {key})) or "there are none"}) is '
        f'called {", ".join(map(repr, _PARAMS))}. Save the parameters alone: '
        '`mj.save_checkpoint(PATH, params)`.'
      )


def _has_moments(tree):
  return any(_MOMENTS & set(path.split('/')) for path in tree_lib.flatten(tree))


def _children(tree):
  return tree if isinstance(tree, Mapping) else {}


def _part(path, prefix):
  """The part of a state that a leaf is in, as messages call it."""
  if not path.startswith(prefix):
    return path.split('/')[0]
  head, *rest = path[len(prefix) :].split('/')
  return f'{head}/{rest[0]}' if head in _COLLECTIONS and rest else head
