# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether a parameter without axis names may be a stack of layers.

Scanned layers, vmapped ensembles and fused experts store many parameters as
one array. A method with numbers of a whole parameter, such as an angle or a
threshold, gives other numbers for the stack than for its slices, so it must
know. Shapes do not tell; names mostly do, and where they do not the answer
here is "may be".

A number in the path (`layers_3/`, `layers.3.`) proves that layers are not
stacked, a word for many without a number (`layers/`, `experts.`, `ScanBlock_0`)
that something is, and a name has a least rank (a kernel 2, a bias 1) below
which nothing can be stacked. `Dense_0` and `MlpBlock_0` prove nothing: flax
numbers modules by itself, inside a scanned block too.
"""

from collections.abc import Mapping, Sequence
import re

from mergejax.core import errors
from mergejax.core import typing

# Axes along which separate layers or experts are stacked.
NAMES = ('layers', 'layer', 'stack', 'expert', 'experts', 'branch', 'scan')

# One of many, by number: `layers_3`, `encoderblock_0`, `stage_0_block_1`; with
# the number as the next part of the path, `h.3`.
_ONE_OF_MANY = re.compile(
  r'(?:encoder|decoder|transformer|residual|res)?_?'
  r'(?:layers?|blocks?|stages?|h)'
)
_NUMBERED = re.compile(_ONE_OF_MANY.pattern + r'_?\d+(?:_\w+)?')
# Many in one: what scans are called, classes that flax lifts, experts.
_MANY = re.compile(
  r'layers?|blocks|stack|branch|scan(?:ned)?(?:_\w+)?|(?:en|de)coderblock'
  r'|\w*(?:Scan|Vmap)[A-Z]\w*'
)
_EXPERTS = re.compile(r'(?:\w+_)?experts?|\w*moe\w*', re.IGNORECASE)
_CONVOLUTION = re.compile(
  r'conv|patch|(?:^|[/_])(?:stem|shortcut|downsample)', re.IGNORECASE
)
_LINEAR = re.compile(r'linear|mlp|ffn|feed_?forward|dense', re.IGNORECASE)
_NORM = re.compile(r'norm|(?:^|_)ln(?:_|\d|$)', re.IGNORECASE)
_VECTOR = re.compile(r'(?:\w*_)?(?:scale|bias|gamma|beta|mean|var)')


def is_convolution(path: typing.Path, rank: int) -> bool:
  """True if the modules in a path are called like a convolution."""
  parents, _, name = path.replace('.', '/').rpartition('/')
  if name == 'kernel' and rank >= 4 and parents.endswith('embedding'):
    return True  # ViT's patches: a table of tokens has no kernel
  return _CONVOLUTION.search(parents) is not None


def may_be_stack(path: typing.Path, spec: typing.LeafSpec) -> bool:
  """Whether a parameter may be many in one array.

  Args:
    path: of the parameter.
    spec: its shape, and its axes where they are known.

  Returns:
    False if its axes are known, or name and rank leave no doubt that it is one
    parameter.

  Example:
    >>> spec = typing.LeafSpec((4, 8, 16), np.dtype('float32'))
    >>> may_be_stack('layers/mlp/wi/kernel', spec)
    True
    >>> may_be_stack('layers_3/attention/query/kernel', spec)
    False
  """
  if spec.axes is not None or spec.size == 0:
    return False
  *parts, name = re.split('[/.]', path)
  least = _least_rank(parts, name)
  # A first axis of size 1 stacks one thing, which is a leaf like any other.
  rank = len(spec.shape)
  while rank and spec.shape[-rank] == 1:
    rank -= 1
  if _any(_MANY, parts, numbered=False):
    return rank > (0 if least is None else least)
  if _any(_EXPERTS, parts, numbered=False):
    return rank > (1 if least is None else least)
  convolution = is_convolution(path, len(spec.shape)) and not _VECTOR.fullmatch(
    name
  )
  if name.startswith('weight') and rank >= 3 and not convolution:
    # PyTorch: of rank 3 and more only convolutions, and experts as one array.
    linear = _LINEAR.search('/'.join(parts)) is not None
    return '/' in path or (rank == 3 and linear)
  if _any(_NUMBERED, parts) or _any(_ONE_OF_MANY, parts, numbered=True):
    return False
  # T5X calls a scanned stack like its parent: `encoder/encoder`.
  doubled = '/' in path and any(a == b for a, b in zip(parts, parts[1:]))
  if convolution and not doubled:
    return False
  if least is None:
    return rank > (1 if doubled else 2) and spec.shape[0] != 1
  return rank > least


def _any(pattern, parts, numbered=None):
  """Whether a part of a path matches; `numbered`: with a number after it."""
  after = [part.isdigit() for part in [*parts[1:], '']]
  return any(
    pattern.fullmatch(part) and numbered in (None, digit)
    for part, digit in zip(parts, after)
  )


def _least_rank(parts, name):
  """Axes that a parameter of this name has at least; None if unknown."""
  if _VECTOR.fullmatch(name):
    return 1
  if name.startswith('weight'):
    return 1 if parts and _NORM.search(parts[-1]) else 2
  return 2 if name in ('kernel', 'embedding', 'rel_embedding') else None


def check_known(
  specs: Mapping[typing.Path, typing.LeafSpec],
  paths: Sequence[typing.Path],
) -> None:
  """Raises if one of some parameters may be a stack.

  Args:
    specs: the parameters.
    paths: those that a method merges which looks at whole parameters.

  Raises:
    UserError: with the axes to give for each.
  """
  unknown = [path for path in paths if may_be_stack(path, specs[path])]
  if unknown:
    raise errors.StructureError(
      message({path: specs[path] for path in unknown})
    )


def message(unknown: Mapping[typing.Path, typing.LeafSpec]) -> str:
  """What to say of parameters that may be stacks."""
  lines = [
    f'({path!r}, {_suggested(path, spec)}),  # {list(spec.shape)}'
    for path, spec in unknown.items()
  ]
  return (
    'This method looks at whole parameters (their angles, norms or '
    'thresholds), and it is not known whether these are one parameter each or '
    'a stack of layers or experts, whose merge would have other numbers. Give '
    'the logical axes of each, one name an axis: a stacked axis is called '
    f'{", ".join(NAMES)}; without such a name the array is one parameter, of which some methods must '
    "also know the sides: call each axis of its inputs 'inputs', each of its "
    "outputs 'outputs'. "
    'Paths are regular expressions. If the stack is where these lines say, '
    'give `axes=` in Python (in a recipe, `axes:` with one `[path, [names]]` '
    f'each):\naxes=[\n{errors.listed(lines, 100)}\n]'
  )


def _suggested(path, spec):
  parts = re.split('[/.]', path)
  stack = 'expert' if any(map(_EXPERTS.fullmatch, parts)) else 'layers'
  rest = {1: ('embed',), 2: ('embed', 'mlp'), 3: ('embed', 'heads', 'kv')}
  count = len(spec.shape) - 1
  names = rest.get(count, tuple(f'axis_{i}' for i in range(1, count + 1)))
  # T5X scans along the second axis, in a module with the name of its parent.
  second = count and any(a == b for a, b in zip(parts, parts[1:]))
  return (names[0], stack, *names[1:]) if second else (stack, *names)
