# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What devices send each other: by kind, by axes of the mesh, and how much."""

from collections.abc import Sequence
import dataclasses
import math
import re

import jax
import numpy as np

from mergejax.pods import hlo

# Bytes that a chip sends, of the bytes it is given, in a group of g.
_SENT = {
  'all-gather': lambda g: g - 1,
  'all-reduce': lambda g: 2 * (g - 1) / g,
  'reduce-scatter': lambda g: (g - 1) / g,
  'all-to-all': lambda g: (g - 1) / g,
  'ragged-all-to-all': lambda g: (g - 1) / g,
  'collective-permute': lambda g: 1,
  'collective-broadcast': lambda g: 1,
}
_EXPLICIT = re.compile(
  r'replica_groups=\{(\{[\d,\s]*\}(?:,\s*\{[\d,\s]*\})*)?\}'
)
_IOTA = re.compile(
  r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?'
)
_NAMED = re.compile(
  r'replica_groups=mesh\[(.*?)\]'
  r'(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^:}]*)\}'
)
_PAIRS = re.compile(
  r'source_target_pairs=\{(\{\d+,\d+\}(?:,\s*\{\d+,\d+\})*)\}'
)
# Between slices the TPU compiler sends through the hosts: attributes say what,
# and who to whom, as slices from 1 or as ids of devices.
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TARGET = re.compile(
  r'_xla_megascale_target=(?:"\{([\d,]+)\}x\{0:\d+\}"|\{(\{[^_]*\})\})'
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """Collectives of one kind over the same axes of the mesh.

  Attributes:
    kind: 'all-gather', 'all-reduce', ...
    axes: the mesh axes that a group spans, in the mesh's order.
    count: how many run in one call of the program.
    given_bytes: bytes that a chip brings to them, all together.
    sent_bytes: bytes that a chip sends then, if they are done in rings:
      `g - 1` times what it is given to gather, `2 (g - 1) / g` to all-reduce,
      `(g - 1) / g` to reduce and scatter or to exchange, as much to permute.
    largest: bytes that the largest one of them is given, or gathers to: a kernel
      that is whole where it should not be shows here.
    between: whether it goes from slice to slice, by the slower network.
    source: of which operation that is, by the modules it stands in.
  """

  kind: str
  axes: tuple[str, ...]
  count: int
  given_bytes: int
  sent_bytes: float
  largest: int
  between: bool = False
  source: str = dataclasses.field(default='', compare=False)

  def repeated(self, times: int) -> 'Collective':
    """The same of so many calls."""
    return dataclasses.replace(
      self,
      count=times * self.count,
      given_bytes=times * self.given_bytes,
      sent_bytes=times * self.sent_bytes,
    )


def groups_of(text: str, devices: int) -> list[tuple[int, ...]] | None:
  """The groups of devices, by number, that a collective's attributes name.

  Args:
    text: with `replica_groups=` as lists `{{0,1},{2,3}}`, as a laid-out range
      `[2,4]<=[8]`, `[4,2]<=[2,4]T(1,0)`, or by axes `mesh['a'=2,'b'=4] {'b'}`;
      or with `source_target_pairs=`.
    devices: how many there are; an empty list of groups is one group of all.

  Returns:
    Groups, pairs for a permutation; None if there is nothing of the kind.

  Example:
    >>> groups_of('replica_groups=[4,2]<=[2,4]T(1,0)', 8)
    [(0, 4), (1, 5), (2, 6), (3, 7)]
  """
  found = _IOTA.search(text)
  if found:
    shape, whole = (_numbers(found[i]) for i in (1, 2))
    numbers = np.arange(math.prod(whole)).reshape(whole)
    if found[3]:
      numbers = numbers.transpose(_numbers(found[3]))
    return [tuple(map(int, row)) for row in numbers.reshape(shape)]
  found = _NAMED.search(text)
  if found:
    return _along(*found.groups())
  found = _PAIRS.search(text)
  if not found:
    found = _EXPLICIT.search(text)
    if not found:
      return None
    if not found[1]:
      return [tuple(range(devices))]
  return [_numbers(row) for row in re.findall(r'\{([\d,\s]*)\}', found[1])]


def _along(axes, shape, order, over):
  """Groups along some axes of a range that is laid out by named axes."""
  sizes = {n: int(size) for n, size in re.findall(r"'(\w+)'=(\d+)", axes)}
  over = re.findall(r"'(\w+)'", over)
  numbers = np.arange(math.prod(sizes.values()))
  if shape:
    numbers = numbers.reshape(_numbers(shape))
  if order:
    numbers = numbers.transpose(_numbers(order))
  names = list(sizes)
  axes = [*(n for n in names if n not in over), *over]
  numbers = numbers.reshape([sizes[n] for n in names])
  numbers = numbers.transpose([names.index(n) for n in axes])
  rows = numbers.reshape(-1, math.prod(sizes[n] for n in over))
  return [tuple(map(int, row)) for row in rows]


def axes_of(
  groups: Sequence[Sequence[int]], mesh: jax.sharding.Mesh
) -> tuple[str, ...]:
  """The axes of a mesh along which the devices of a group differ.

  Args:
    groups: numbers of devices, in the order of `mesh.devices.flat`.
    mesh: what the program was compiled for.
  """
  shape = tuple(mesh.shape.values())
  spans = np.zeros(len(shape), bool)
  for group in groups:
    places = np.stack(np.unravel_index(np.asarray(group), shape))
    spans |= (places != places[:, :1]).any(axis=1)
  return tuple(name for name, on in zip(mesh.shape, spans) if on)


def found(program: hlo.Program, mesh: jax.sharding.Mesh) -> list[Collective]:
  """All collectives of a compiled program, the largest senders first.

  The TPU compiler spreads a collective over several kernels that run while it
  is under way: the parts share a channel, and count once.
  """
  slices = _slices(mesh)
  rows: list[Collective] = []
  seen: dict[tuple, str] = {}
  for where, each, runs in program.executed():
    kind = _kind(where, each)
    if kind is None:
      continue
    channel = each.attribute('channel_id')
    if channel and seen.setdefault((kind, channel), where) != where:
      continue
    groups = _groups(each, mesh)
    between = each.opcode == 'send'
    # Between slices, what stays in one of them is not sent.
    size = max(
      len({slices[i] for i in group} if between else group) for group in groups
    )
    operands = [program.computations[where][name] for name in each.operands]
    given = sum(operand.nbytes for operand in operands)
    largest = given * size if kind == 'all-gather' else given
    once = Collective(
      kind, axes_of(groups, mesh), 1, given, given * _SENT[kind](size), largest,
      between, _source(each.rest),
    )  # fmt: skip
    rows.append(once.repeated(runs))
  return joined(rows)


def _kind(where, each):
  """The kind of an instruction; None if it sends nothing to other chips."""
  kind = each.opcode.removesuffix('-start')
  if kind == 'send':
    between = _BETWEEN.search(each.rest)
    if between is None:
      return None  # to the host
    kind = between[1].lower().replace('_', '-')
    return kind if kind in _SENT else 'collective-permute'
  if kind == 'all-reduce' and where.startswith('all-reduce-scatter'):
    # So the TPU compiler names a sum of which each chip keeps its part.
    return 'reduce-scatter'
  return kind if kind in _SENT else None


def _groups(sender, mesh):
  """Groups of devices that one collective joins, by their places in a mesh."""
  if sender.opcode == 'send':
    groups = _across(sender.rest, mesh)
  else:
    # A program is of one slice, and numbers the devices of that one.
    slices = _slices(mesh)
    places = [i for i, each in enumerate(slices) if each == slices[0]]
    groups = [
      tuple(places[i] for i in group)
      for group in groups_of(sender.rest, len(places)) or ()
    ]
  if not groups:
    raise ValueError(
      f'The devices of {sender.name} cannot be read: {sender.rest[:200]}'
    )
  return groups


def _across(text, mesh):
  """Groups of devices that send to each other from slice to slice."""
  found = _TARGET.search(text)
  if found is None:
    return []
  if found[1]:  # each chip of a slice, with its like in the others
    slices = _slices(mesh)
    numbers = sorted(set(slices))
    chosen = [numbers[i - 1] for i in _numbers(found[1])]
    return list(zip(*(
      [i for i, each in enumerate(slices) if each == number]
      for number in chosen
    )))  # fmt: skip
  places = {device.id: i for i, device in enumerate(mesh.devices.flat)}
  return [
    tuple(places[int(number)] for number in re.findall(r'\d+', group))
    for group in re.findall(r'\{([^}]*)\}', found[2])
  ]


def _slices(mesh):
  """The slice of every device; one of all where there are none."""
  return [getattr(device, 'slice_index', 0) for device in mesh.devices.flat]


def joined(rows: Sequence[Collective]) -> list[Collective]:
  """Those of a kind over the same axes as one, the largest senders first."""
  sums: dict[tuple, Collective] = {}
  for row in rows:
    key = row.kind, row.axes, row.between
    before = sums.get(key)
    if before is not None:
      biggest = max(before, row, key=lambda each: each.largest)
      row = dataclasses.replace(
        biggest,
        count=before.count + row.count,
        given_bytes=before.given_bytes + row.given_bytes,
        sent_bytes=before.sent_bytes + row.sent_bytes,
      )
    sums[key] = row
  return sorted(sums.values(), key=lambda row: -row.sent_bytes)


def _source(text):
  """The last modules and the operation of an instruction's `op_name`."""
  found = re.search(r'op_name="([^"]*)"', text)
  return '/'.join(found[1].split('/')[-4:]) if found else ''


def _numbers(text):
  return tuple(int(part) for part in text.split(',') if part.strip())
