# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Plans: what a merge will read, compute, hold and write, leaf by leaf."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from mergejax.checkpoints import base as store_base
from mergejax.core import axes as axes_lib
from mergejax.core import identity
from mergejax.core import typing
from mergejax.merging.disk import companions
from mergejax.merging.disk import programs
from mergejax.merging.recipes import recipe as recipe_lib

# Elements of a leaf that are merged at a time.
PIECE = 1 << 20
# Leaves of so many pieces stay in memory between the passes of a method; larger
# ones are read again.
RESIDENT = 4
# Leaves that are merged at the same time: some read or write while others
# compute.
WORKERS = 4


@dataclasses.dataclass(frozen=True)
class Task:
  """One parameter of the result.

  Attributes:
    path: its name there.
    spec: its shape and dtype there, and its logical axes.
    settings: the method and its options, or None to copy the only input.
    weights: one a model.
    inputs: where the models' versions lie.
    base: where the base's lies, or None.
    stats: `{statistic: path in the statistics' store}` for each model.
  """

  path: typing.Path
  spec: typing.LeafSpec
  settings: programs.Settings | None
  weights: tuple[float, ...]
  inputs: tuple[tuple[str, typing.Path], ...]
  base: tuple[str, typing.Path] | None
  stats: tuple[Mapping[str, typing.Path], ...] = ()

  @property
  def method(self) -> str | None:
    """Name of the method, None for a copy."""
    return None if self.settings is None else self.settings.entry.name

  @property
  def options(self) -> Mapping[str, Any]:
    """Options of the method, by their Python names."""
    return {} if self.settings is None else self.settings.options

  @property
  def in_pieces(self) -> bool:
    """True if it is merged piece by piece rather than whole."""
    if self.settings is None:
      return True
    method = self.settings.method
    stack = axes_lib.stacked(self.spec) and method.of_slices
    if stack or not all(need.is_leaf for need in method.statistics):
      return False
    if method.view == 'element':
      return True
    parts = axes_lib.view(self.path, self.spec)
    # Rows of `[units, inputs]` lie one after the other; columns do not.
    return method.view == 'unit' and (
      parts.outputs == (0,) and self.spec.size // self.spec.shape[0] <= PIECE
    )

  def record(self) -> dict[str, Any]:
    """What is computed, as plain data."""
    return {
      'path': self.path,
      'spec': self.spec,
      'method': self.method,
      'options': self.options,
      'weights': self.weights,
      'inputs': self.inputs,
      'base': self.base,
      'stats': self.stats,
    }


@dataclasses.dataclass(frozen=True)
class Plan:
  """A recipe whose every step is known to be possible.

  Attributes:
    recipe: what was asked for.
    stores: the models by name, rows and tied parameters already in order.
    stats: the statistics' stores, in the order of the models.
    tasks: the parameters of the result, in the order they are stored.
    reference: name of the model whose configuration the result takes.
    tied: `{alias: path}` of the result.
    repeated: `{model: {alias: path}}` that must prove equal before anything.
    config: changes to the reference's `config.json`; dots lead into sections.
    tokenizer: of the result.
    remarks: what a reader should know: choices made, files left alone.
    methods: what names do not say of methods from outside the package: the
      sha256 of their source, or who vouches for a `Merge` from Python.
    anonymous: nobody vouches for a `Merge` from Python, so that another
      process cannot know it again.
  """

  recipe: recipe_lib.Recipe
  stores: Mapping[str, store_base.ParamStore]
  stats: tuple[store_base.ParamStore, ...]
  tasks: tuple[Task, ...]
  reference: str
  tied: Mapping[typing.Path, typing.Path]
  repeated: Mapping[str, Mapping[typing.Path, typing.Path]]
  config: Mapping[str, Any]
  tokenizer: companions.Tokenizer
  remarks: tuple[str, ...]
  methods: Mapping[str, str] = dataclasses.field(default_factory=dict)
  anonymous: bool = False

  @property
  def identity(self) -> str:
    """sha256 of what is asked for and computed, the same in every process."""
    work = {
      'recipe': self.recipe.data,
      'chat_template': self.recipe.chat_template,
      'tasks': [task.record() for task in self.tasks],
      'config': self.config,
      'tokenizer': self.tokenizer,
    }
    if self.methods:
      work['methods'] = self.methods
    return identity.digest(work)

  @property
  def read_bytes(self) -> int:
    """Bytes of all inputs, each counted once."""
    seen = set()
    for task in self.tasks:
      seen |= set(task.inputs) | ({task.base} if task.base else set())
    return sum(self.stores[m].specs()[path].nbytes for m, path in seen)

  @property
  def write_bytes(self) -> int:
    """Bytes of the result."""
    return sum(task.spec.nbytes for task in self.tasks)

  def working_bytes(self, task: Task) -> int:
    """Bytes that merging one parameter holds at most."""
    refs = [*task.inputs, *([task.base] if task.base else [])]
    specs = [self.stores[m].specs()[p] for m, p in refs]
    whole = sum(self.stores[m].window_bytes(path) for m, path in refs)
    stored = sum(spec.dtype.itemsize for spec in specs)
    wide = 4 if task.spec.dtype.itemsize < 8 else 8
    if task.settings is None:
      return whole + PIECE * stored
    size = task.spec.size
    if not task.in_pieces:
      # The leaves as stored, widened, laid for the method, and the result.
      return whole + size * (stored + wide * (2 * len(refs) + 2))
    piece = min(size, PIECE)
    first_passes = task.settings.method.first_passes
    held = min(size, RESIDENT * PIECE) if first_passes else piece
    held *= stored + sum(d.itemsize for d in self._stat_dtypes(task))
    if any(first_pass.ranks for first_pass in first_passes):
      # Where every element lies to the brackets, and those inside them.
      held += len(task.inputs) * (min(size, RESIDENT * PIECE) + size)
    return whole + held + piece * wide * (len(refs) + 4)

  def _stat_dtypes(self, task):
    return [
      store.specs()[path].dtype
      for store, own in zip(self.stats, task.stats)
      for path in own.values()
    ]

  @property
  def peak_bytes(self) -> int:
    """Most bytes that are held at once, beside Python and JAX themselves."""
    sizes = sorted((self.working_bytes(t) for t in self.tasks), reverse=True)
    return sum(sizes[:WORKERS])

  def groups(self) -> list[list[Task]]:
    """Parameters that are merged alike: one method, its options and weights."""
    groups: dict[tuple, list[Task]] = {}
    for task in self.tasks:
      groups.setdefault((task.settings, task.weights), []).append(task)
    return list(groups.values())

  def describe(self) -> str:
    """The plan in words."""
    recipe = self.recipe
    lines = [f'method    {recipe.entry.name}']
    if recipe.base:
      lines.append(f'base      {recipe.base}')
    lines += [f'model     {m}' for m in recipe.models() if m != recipe.base]
    groups = self.groups()
    for first, *others in groups[:12]:
      what = 'copied'
      if first.settings is not None:
        options = sorted(first.options.items())
        words = [f'{name}={value}' for name, value in options]
        words.append(f'weights {list(first.weights)}')
        what = ', '.join([first.settings.entry.name, *words])
      lines.append(f'  {1 + len(others):>5} x {what}   (first: {first.path})')
    if len(groups) > 12:
      lines.append(f'  ... and {len(groups) - 12} more groups of settings')
    whole = [t for t in self.tasks if not t.in_pieces]
    lines += [
      f'reads     {self.read_bytes / 1e6:,.1f} MB',
      f'writes    {self.write_bytes / 1e6:,.1f} MB, {len(self.tasks)} arrays',
      f'holds     at most {self.peak_bytes / 1e6:,.1f} MB at once, beside '
      'about 300 MB of Python and JAX',
    ]
    if whole:
      lines.append(f'whole     {len(whole)} arrays cannot be merged in pieces')
    return '\n'.join(lines + [f'note      {r}' for r in self.remarks])
