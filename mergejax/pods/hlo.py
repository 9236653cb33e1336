# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Reads the text of a compiled program: what runs, and how often.

XLA's own cost analysis counts the body of a loop once. Here every computation
has the number of times it runs in one call of the program.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import functools
import math
import re

_BITS = {
  'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16,
  's32': 32, 'u32': 32, 's64': 64, 'u64': 64, 'f16': 16, 'bf16': 16,
  'f32': 32, 'f64': 64, 'c64': 64, 'c128': 128, 's2': 2, 'u2': 2,
}  # fmt: skip
_LEAF = re.compile(r'\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$')
_LINE = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (.*)$')
_CALLED = re.compile(
  r'\b(?:calls|to_apply|body|condition|branch_computations|'
  r'called_computations|true_computation|false_computation)='
  r'(\{[^}]*\}|%?[\w.\-]+)'
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array of a shape: its bytes, and whether it lies in main memory."""

  nbytes: int
  in_memory: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: of its result.
    opcode: what is done.
    shape: text of the result's shape.
    operands: names, of the same computation.
    rest: the attributes, as text.
    root: whether it is the computation's result.
  """

  name: str
  opcode: str
  shape: str
  operands: tuple[str, ...]
  rest: str
  root: bool

  @functools.cached_property
  def leaves(self) -> tuple[Leaf, ...]:
    """The arrays of the result."""
    return tuple(_leaf(*m.groups()) for m in _LEAF.finditer(self.shape))

  @property
  def nbytes(self) -> int:
    """Bytes of the result."""
    return sum(leaf.nbytes for leaf in self.leaves)

  def attribute(self, name: str) -> str | None:
    """The text of one attribute: a name, a number or what is in braces."""
    found = re.search(rf'\b{name}=(\{{[^}}]*\}}|[^,\s]+)', self.rest)
    return found[1] if found else None


def _leaf(kind, sizes, layout):
  bits = _BITS.get(kind, 8 if kind.startswith('f8') else 0)
  count = math.prod(map(int, sizes.split(','))) if sizes else 1
  # S(n) is a memory of the chip other than its main one.
  return Leaf((count * bits + 7) // 8, 'S(' not in (layout or ''))


class Program:
  """The computations of a compiled program.

  Attributes:
    computations: `{name: {instruction's name: Instruction}}`.
    entry: name of the first one.
  """

  def __init__(self, text: str):
    """Reads `compiled.as_text()`."""
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry = ''
    current: dict[str, Instruction] = {}
    for line in text.splitlines():
      head = _HEAD.match(line)
      if head:
        current = self.computations.setdefault(head[2], {})
        if head[1]:
          self.entry = head[2]
        continue
      found = _LINE.match(line)
      if found:
        instruction = _instruction(found[2], found[3], bool(found[1]))
        current[instruction.name] = instruction

  @functools.cached_property
  def runs(self) -> Mapping[str, int]:
    """`{computation: how often it runs}`; what nothing calls is left out.

    Every branch of a conditional counts as if it were taken.
    """
    runs = {self.entry: 1}
    for name in self._callers_first():
      for instruction in self.computations[name].values():
        for called in _called(instruction):
          if called in self.computations:
            times = self.trips(name, instruction)
            runs[called] = runs.get(called, 0) + runs[name] * times
    return runs

  @functools.cached_property
  def fused(self) -> frozenset[str]:
    """Computations that are parts of one kernel, or of a reduction."""
    found = set()
    for body in self.computations.values():
      for instruction in body.values():
        if instruction.opcode not in _CONTROL:
          found.update(_called(instruction))
    return frozenset(found)

  def executed(self) -> Iterator[tuple[str, Instruction, int]]:
    """`(computation, instruction, runs)` of all that is reached."""
    for name, times in self.runs.items():
      for instruction in self.computations[name].values():
        yield name, instruction, times

  def trips(self, computation: str, instruction: Instruction) -> int:
    """How often a call is made: the iterations of a loop, else once.

    A loop says so itself (`known_trip_count`), or by its condition: a counter
    below a constant, with the step that its body adds. One whose condition is
    of another kind counts once.
    """
    if instruction.opcode != 'while':
      return 1
    known = _TRIPS.search(instruction.rest)
    if known:
      return int(known[1])
    condition = self.computations[_name(instruction.attribute('condition'))]
    body = self.computations[_name(instruction.attribute('body'))]
    return self._counted(computation, instruction, condition, body) or 1

  def _counted(self, computation, loop, condition, body):
    """Iterations by the condition; None where it is of another kind."""
    test = _root(condition)
    if test.opcode != 'compare' or len(test.operands) != 2:
      return None
    counter, bound = (condition.get(name) for name in test.operands)
    limit = _constant(bound)
    index = counter and counter.attribute('index')
    if limit is None or index is None:
      return None
    result = _root(body)
    step = _added(body, result.operands[int(index)], index)
    outside = self.computations[computation]
    given = outside.get(loop.operands[0])
    start = 0
    if given is not None and given.opcode == 'tuple':
      start = _constant(_through(outside, given.operands[int(index)])) or 0
    inclusive = test.attribute('direction') in ('LE', 'GE')
    return -(-(abs(limit - start) + inclusive) // max(abs(step), 1))

  def _callers_first(self):
    """Reached computations, each after all that call it."""
    order, seen = [], set()

    def visit(name):
      seen.add(name)
      for instruction in self.computations[name].values():
        for called in _called(instruction):
          if called in self.computations and called not in seen:
            visit(called)
      order.append(name)

    visit(self.entry)
    return order[::-1]


# What calls a computation whose instructions are kernels of their own.
_CONTROL = ('while', 'conditional', 'call')


def _instruction(name, text, root):
  end = _shape_end(text)
  shape, rest = text[:end], text[end:].lstrip()
  opcode, _, rest = rest.partition('(')
  inside, after = _balanced(rest)
  operands = tuple(re.findall(r'%([\w.\-]+)', inside))
  if opcode in ('constant', 'parameter'):
    after = f'value={inside},{after}'
  return Instruction(name, opcode.strip(), shape, operands, after, root)


def _shape_end(text):
  if not text.startswith('('):
    return text.index(' ')
  return len(text) - len(_balanced(text[1:])[1])


def _balanced(text):
  """`(what stands before the closing parenthesis, what comes after)`."""
  depth = 1
  for found in re.finditer(r'[()]', text):
    depth += 1 if found[0] == '(' else -1
    if not depth:
      return text[: found.start()], text[found.end() :]
  return text, ''


def _called(instruction):
  for found in _CALLED.finditer(instruction.rest):
    yield from (_name(part) for part in found[1].strip('{}').split(','))


def _name(text):
  return text.strip().removeprefix('%')


def _root(body):
  return next(one for one in body.values() if one.root)


def _constant(instruction):
  """The whole number of a constant, or None."""
  if instruction is None or instruction.opcode != 'constant':
    return None
  found = re.match(r'value=(-?\d+),', instruction.rest)
  return int(found[1]) if found else None


def _through(body, name):
  """The instruction that a chain of copies begins with."""
  found = body.get(name)
  while found is not None and found.opcode in ('copy', 'bitcast', 'convert'):
    found = body.get(found.operands[0])
  return found


def _added(body, name, index):
  """What a loop's body adds to its counter; 1 where that cannot be seen."""
  total, found = 0, _through(body, name)
  while found is not None and found.opcode == 'add':
    first, second = (_through(body, each) for each in found.operands)
    constant = _constant(second)
    if constant is None:
      first, constant = second, _constant(first)
    if constant is None:
      return 1
    total, found = total + constant, first
  at_counter = found is not None and found.attribute('index') == index
  return total if total and at_counter else 1
