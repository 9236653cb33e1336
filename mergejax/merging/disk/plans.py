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
from mergejax.merging.recipes import recipe as recipe_lib
from mergejax.methods import base as merge_base
from mergejax.methods import named

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
    method: name of the method, or None to copy the only input.
    options: of the method, by their Python names.
    weights: one a model.
    inputs: where the models' versions lie.
    base: where the base's lies, or None.
    stats: `{statistic: path in the statistics' store}` for each model.
  """

  path: typing.Path
  spec: typing.LeafSpec
  method: str | None
  options: Mapping[str, Any]
  weights: tuple[float, ...]
  inputs: tuple[tuple[str, typing.Path], ...]
  base: tuple[str, typing.Path] | None
  stats: tuple[Mapping[str, typing.Path], ...] = ()

  def build(self) -> merge_base.Merge:
    """The method with the options of this parameter."""
    return named.resolve(self.method, **self.options)


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

  @property
  def identity(self) -> str:
    """sha256 of what is asked for and computed, the same in every process."""
    return identity.digest(
      {
        'recipe': self.recipe.data,
        'chat_template': self.recipe.chat_template,
        'tasks': self.tasks,
        'config': self.config,
        'tokenizer': self.tokenizer,
      }
    )

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
    whole = sum(
      spec.nbytes
      for (m, _), spec in zip(refs, specs)
      if not self.stores[m].reads_pieces
    )
    stored = sum(spec.dtype.itemsize for spec in specs)
    wide = 4 if task.spec.dtype.itemsize < 8 else 8
    if task.method is None:
      return whole + PIECE * stored
    size = task.spec.size
    if not self.in_pieces(task):
      # The leaves as stored, widened, laid for the method, and the result.
      return whole + size * (stored + wide * (2 * len(refs) + 2))
    piece = min(size, PIECE)
    first_passes = task.build().first_passes
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

  def in_pieces(self, task: Task) -> bool:
    """True if a parameter is merged piece by piece rather than whole."""
    if task.method is None:
      return True
    method = task.build()
    stack = axes_lib.stacked(task.spec) and method.of_slices
    if stack or 'gram' in method.needs:
      return False
    if method.view == 'element':
      return True
    parts = axes_lib.view(task.path, task.spec)
    # Rows of `[units, inputs]` lie one after the other; columns do not.
    return method.view == 'unit' and (
      parts.outputs == (0,) and task.spec.size // task.spec.shape[0] <= PIECE
    )

  @property
  def peak_bytes(self) -> int:
    """Most bytes that are held at once, beside Python and JAX themselves."""
    sizes = sorted((self.working_bytes(t) for t in self.tasks), reverse=True)
    return sum(sizes[:WORKERS])

  def describe(self) -> str:
    """The plan in words."""
    recipe = self.recipe
    lines = [f'method    {recipe.method}']
    if recipe.base:
      lines.append(f'base      {recipe.base}')
    lines += [f'model     {m}' for m in recipe.models() if m != recipe.base]
    groups: dict[tuple, list[Task]] = {}
    for task in self.tasks:
      key = (task.method, tuple(sorted((k, str(v)) for k, v in task.options.items())), task.weights)  # fmt: skip
      groups.setdefault(key, []).append(task)
    for (method, options, weights), tasks in list(groups.items())[:12]:
      what = 'copied' if method is None else method
      settings = ''.join(f', {name}={value}' for name, value in options)
      if method is not None:
        settings += f', weights {list(weights)}'
      lines.append(
        f'  {len(tasks):>5} x {what}{settings}   (first: {tasks[0].path})'
      )
    if len(groups) > 12:
      lines.append(f'  ... and {len(groups) - 12} more groups of settings')
    whole = [t for t in self.tasks if not self.in_pieces(t)]
    lines += [
      f'reads     {self.read_bytes / 1e6:,.1f} MB',
      f'writes    {self.write_bytes / 1e6:,.1f} MB, {len(self.tasks)} arrays',
      f'holds     at most {self.peak_bytes / 1e6:,.1f} MB at once, beside '
      'about 300 MB of Python and JAX',
    ]
    if whole:
      lines.append(f'whole     {len(whole)} arrays cannot be merged in pieces')
    return '\n'.join(lines + [f'note      {r}' for r in self.remarks])
