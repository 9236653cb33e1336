# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The names of all families together, for checkpoints of any of them."""

from collections.abc import Mapping, Sequence
import re
from typing import Any

from mergejax.core import axes as axes_lib
from mergejax.core import typing
from mergejax.names import base
from mergejax.names import bert
from mergejax.names import gpt2
from mergejax.names import images
from mergejax.names import llama
from mergejax.names import t5
from mergejax.names import t5x
from mergejax.names import vit

# In the order in which their tied names are looked for.
NAMINGS = tuple(
  module.NAMING for module in (t5, llama, gpt2, bert, vit, t5x, images)
)  # fmt: skip
# Axes of families that were registered, by model type.
_REGISTERED: dict[str, Sequence[tuple[str, tuple[str, ...]]]] = {}


def _any(field: str) -> str:
  """A regular expression for what any family has in a field."""
  parts = [part for naming in NAMINGS for part in getattr(naming, field)]
  return '|'.join(dict.fromkeys(parts))


# stem, index and rest of a layer's parameter; the outermost number counts.
LAYER = re.compile(
  rf'(?P<stem>(?:.*?[./])?(?:{_any("blocks")})[._/])'
  r'(?P<index>\d+)(?P<rest>[./].*)'
)
# Blocks that a search gives coefficients of their own; ResNets number stages.
_BLOCK = re.compile(r'.*?(layers?|blocks?|h|stage)[._]\d+(_block_\d+)?[./]')
# What comes before the layers; everything else outside of them comes after.
FIRST = re.compile(rf'.*({_any("first")}).*')
# Parameters that the first layer of a stack stores for all of them.
OF_ALL_LAYERS = re.compile(_any('shared'))
TABLE = re.compile(_any('tables'))
HEAD = re.compile(_any('heads'))
TURNED = re.compile(_any('turned'))
ADAPTED_TABLE = re.compile(rf'(.*\.)?({_any("adapted")})\.weight')
TRANSPOSED = re.compile(rf'(.*\.)?({_any("transposed")})')
TIES: Sequence[base.Pair] = tuple(
  pair for naming in NAMINGS for pair in naming.ties
)


def block_of(path: typing.Path) -> str | None:
  """The beginning of a parameter's path that names its layer, or None.

  Example:
    >>> block_of('encoder/layers_0/mlp/wi/kernel')
    'encoder/layers_0/'
  """
  found = _BLOCK.match(path)
  return found and found[0]


def register(model_type: str, axes: axes_lib.Rules) -> None:
  """Makes the logical axes of a model type known to checkpoints."""
  if isinstance(axes, Mapping):
    axes = [(re.escape(path), tuple(names)) for path, names in axes.items()]
  _REGISTERED[model_type] = axes


def axes(
  specs: typing.SpecTree, config: Mapping[str, Any]
) -> dict[typing.Path, tuple[str, ...]]:
  """The logical axes that names tell.

  Args:
    specs: the parameters.
    config: their `config.json`; its `model_type` says whose names they are, and
      `scan_layers` that layers are stacked, T5X's way.

  Returns:
    `{path: axes}` of parameters that a rule matches, with as many axes as it
    names; nothing of families that are not known.

  Example:
    >>> import numpy as np
    >>> spec = typing.LeafSpec((8, 16), np.dtype('float32'))
    >>> axes({'encoder/layers_0/mlp/wi/kernel': spec}, {'model_type': 't5x'})
    {'encoder/layers_0/mlp/wi/kernel': ('embed', 'mlp')}
  """
  found = {}
  rules = _rules(config)
  for path, spec in specs.items():
    names = next((n for p, n in rules if re.fullmatch(p, path)), ())
    # A parameter of another rank is stacked, or another one.
    if names and len(names) == len(spec.shape):
      found[path] = tuple(names)
  return found


def _rules(config):
  kind = config.get('model_type')
  rules: Any = _REGISTERED.get(kind)
  if rules is None:
    rules = next(
      (naming.axes for naming in NAMINGS if kind in naming.model_types), ()
    )
  if config.get('moe') and rules is t5x.NAMING.axes:
    rules = t5x.SPARSE
  if config.get('scan_layers'):
    rules = t5x.scanned(rules, config.get('param_scan_axis', 1))
  return rules
