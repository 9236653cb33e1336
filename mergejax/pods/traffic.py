# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Bytes of main memory that a compiled program reads and writes."""

from mergejax.pods import hlo

# What moves nothing: names for what is there.
_FREE = frozenset((
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while',
  'conditional', 'call', 'after-all', 'partition-id', 'replica-id', 'iota',
  'opt-barrier', 'domain', 'async-update',
))  # fmt: skip
# These look at a part of their first operand, as large as the result.
_SLICES = ('dynamic-slice', 'slice', 'gather')


def found(program: hlo.Program) -> int:
  """Bytes that one call of a program reads from main memory and writes to it.

  Every kernel reads its operands and writes its result, as often as it runs;
  what lies in the chip's fast memory (`S(1)`) costs nothing, and of an array
  that a kernel takes a slice of, or writes one into, the slice alone counts.
  What runs in two halves reads in the first (`-start`) and writes in the second
  (`-done`).
  """
  return sum(
    runs * _moved(program, where, each)
    for where, each, runs in program.executed()
    if where not in program.fused and each.opcode not in _FREE
  )


def _moved(program, where, each):
  body = program.computations[where]
  operands = [body[name] for name in each.operands if name in body]
  if each.opcode.endswith('-done'):
    return _in_memory(each)
  if each.opcode in ('slice-start', 'dynamic-slice-start'):
    # Its result is the array, the slice, and small numbers beside them.
    _, part, *_ = sorted((leaf.nbytes for leaf in each.leaves), reverse=True)
    return min(part, _in_memory(operands[0]))
  if each.opcode.endswith('-start') or each.opcode in ('send', 'recv'):
    return sum(map(_in_memory, operands))
  if each.opcode == 'fusion':
    inner = each.attribute('calls').removeprefix('%')
    return _of_fusion(program.computations[inner], operands, each)
  if each.opcode in _SLICES:
    return 2 * _in_memory(each)
  if each.opcode == 'dynamic-update-slice':
    return 2 * _in_memory(operands[1])
  return sum(map(_in_memory, (*operands, each)))


def _of_fusion(body, operands, fusion):
  """Bytes of a kernel that does all of a computation at once."""
  users: dict[str, list[hlo.Instruction]] = {}
  for each in body.values():
    for name in each.operands:
      users.setdefault(name, []).append(each)
  read = 0
  for each in body.values():
    if each.opcode == 'parameter':
      number = int(each.attribute('value'))
      if number < len(operands) and (most := _in_memory(operands[number])):
        read += min(most, _looked_at(each, users, most))
  root = next(each for each in body.values() if each.root)
  ends = [root]
  if root.opcode == 'tuple':
    ends = [body[name] for name in root.operands]
  written = sum(
    _changed(body, end) if leaf.in_memory else 0
    for end, leaf in zip(ends, fusion.leaves)
  )
  return read + written


def _looked_at(parameter, users, most):
  """Bytes that the users of an operand look at."""
  total = 0
  for user in users.get(parameter.name, ()):
    if user.opcode in _SLICES and user.operands[0] == parameter.name:
      total += user.nbytes
    elif user.opcode == 'bitcast':
      total += _looked_at(user, users, most)
    elif (
      user.opcode != 'dynamic-update-slice'
      or user.operands[0] != parameter.name
    ):
      return most
  return total


def _changed(body, end):
  """Bytes that are written of one result."""
  while end.opcode == 'bitcast':
    end = body[end.operands[0]]
  if end.opcode == 'dynamic-update-slice':
    return body[end.operands[1]].nbytes
  return end.nbytes


def _in_memory(each):
  return sum(leaf.nbytes for leaf in each.leaves if leaf.in_memory)
