# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a merge or a mesh must know of a parameter: names for its axes.

A short table of rules gives every parameter its logical axes by path, so the
same facts hold for a module, a tree in memory and a checkpoint on disk. An
unknown parameter is an error, never a guess: a `[512, 512]` kernel does not
say which side is its input.
"""

from collections.abc import Mapping, Sequence
import re

from mergejax import errors
from mergejax import tree
from mergejax import typing

Rules = Sequence[tuple[str, tuple[str, ...]]]

# T5X's names: encoder-decoder, decoder-only and whatever reuses their layers.
T5_RULES: Rules = (
  (r'(.*/)?token_embedder/embedding', ('vocab', 'embed')),
  (r'(.*/)?(query|key|value)/kernel', ('embed', 'joined_kv')),
  (r'(.*/)?out/kernel', ('joined_kv', 'embed')),
  (r'(.*/)?wi(_\d+)?/kernel', ('embed', 'mlp')),
  (r'(.*/)?wo/kernel', ('mlp', 'embed')),
  (r'(.*/)?logits_dense/kernel', ('embed', 'vocab')),
  (r'(.*/)?rel_embedding', ('heads', 'relpos_buckets')),
  (r'(.*/)?\w*norm/scale', ('embed',)),
)


def logical_axes(
  specs: Mapping[typing.Path, typing.LeafSpec], rules: Rules = T5_RULES
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
    >>> logical_axes({'encoder/layers_0/mlp/wi/kernel': spec})
    {'encoder/layers_0/mlp/wi/kernel': ('embed', 'mlp')}
  """
  unknown = [path for path, spec in specs.items() if spec.axes is None]
  # A table serves many architectures: a rule that a model does not use is fine.
  used = [
    rule for rule in rules if any(_matches(rule[0], path) for path in unknown)
  ]
  found = tree.apply_rules(used, unknown, 'logical axes')
  result = {}
  for path, spec in specs.items():
    axes = spec.axes if spec.axes is not None else found[path]
    if len(axes) != len(spec.shape):
      raise errors.UserError(
        f'{path} has shape {list(spec.shape)} but its logical axes are '
        f'{axes}. If layers are stacked, give the axes of the stacked '
        "parameter, with 'layers' where the stack is."
      )
    result[path] = tuple(axes)
  return result


def _matches(pattern: str, path: str) -> bool:
  return re.fullmatch(pattern, path) is not None
