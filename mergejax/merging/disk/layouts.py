# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Which parameters the result has, and which parameters they come from.

A model is a few stacks of layers (one; an encoder and a decoder; the language
model and the towers in front of it) and what lies before and after them. A
recipe takes models as they are, stacks slices of them, or does either for each
module of the model.
"""

from collections.abc import Callable
import re
from typing import NamedTuple

from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.merging.disk import inputs as inputs_lib
from mergejax.merging.disk import layer_configs
from mergejax.merging.recipes import recipe as recipe_lib
from mergejax.merging.recipes import sources as sources_lib
from mergejax.names import known
from mergejax.names import modules

Ref = tuple[str, typing.Path]


class Entry(NamedTuple):
  """A parameter of the result.

  Attributes:
    path: its name there.
    depth: 0 at the first of the chosen layers, 1 at the last; None if it is of
      no chosen layer.
    slice: whose settings it has.
    refs: where it comes from, one an input of the slice.
    base: where the base's version is, or None.
    copied: it is the only ref's, whatever the method.
  """

  path: typing.Path
  depth: float | None
  slice: sources_lib.Slice
  refs: list[Ref]
  base: Ref | None
  copied: bool = False


class _Part(NamedTuple):
  """Parameters that are merged, or stacked, in one way."""

  name: str
  slices: tuple[sources_lib.Slice, ...]
  covers: Callable[[typing.Path], bool]
  stem: str | None  # of the layers that slices choose from


def lay_out(
  recipe: recipe_lib.Recipe, inputs: inputs_lib.Inputs
) -> list[Entry]:
  """Every parameter of the result; problems and remarks go to the inputs.

  Args:
    recipe: what was asked for.
    inputs: the models; their `config` gets the new numbers of layers, and
      lists of one entry a layer in their new order.

  Returns:
    The parameters in the order to store them; incomplete if there are problems.
  """
  return _Layout(recipe, inputs).entries()


class _Layout:
  """The layout of one recipe; collects problems."""

  def __init__(self, recipe, inputs):
    self._recipe = recipe
    self._problems = inputs.problems
    self._remarks = inputs.remarks
    self._inputs = inputs
    self._specs = {n: store.specs() for n, store in inputs.stores.items()}
    self._reference = self._specs[inputs.reference]
    self._module = modules.module_names(self._reference)
    self._counts = {
      n: modules.layer_counts(own) for n, own in self._specs.items()
    }

  def entries(self):
    result = []
    parts = self._parts()
    for part in [] if self._problems else parts:
      make = self._whole if part.stem is None else self._stacked
      result += make(part)
    covered = {path for part in parts for path in self._covered(part)}
    left = [path for path in self._reference if path not in covered]
    if left and not self._problems:
      name = self._inputs.reference
      self._remarks.append(
        f'no module covers {len(left)} parameters (first: {left[0]}); they are '
        f'copied from {name}'
      )
      one = sources_lib.Slice((sources_lib.Input(name, {}),), None, {})
      result += [
        Entry(path, None, one, [(name, path)], None, copied=True)
        for path in left
      ]
    return result

  def _covered(self, part):
    return [path for path in self._reference if part.covers(path)]

  # Modules -------------------------------------------------------------------

  def _parts(self):
    recipe = self._recipe
    everything = lambda path: True
    if recipe.modules:
      return self._modules()
    if not recipe.sliced:
      return [_Part(modules.WHOLE, recipe.slices, everything, None)]
    stem = self._only_stack(self._counts_all())
    return [_Part(modules.WHOLE, recipe.slices, everything, stem)]

  def _counts_all(self):
    """Stacks of any model: those of one that is not the reference count too."""
    stems = {stem for own in self._counts.values() for stem in own}
    texts = {
      stem for stem in stems if self._module(f'{stem}0.') == modules.TEXT
    }
    if texts and texts != stems:
      others = ', '.join(sorted(stem[:-1] for stem in stems - texts))
      self._remarks.append(
        f'slices choose from the layers of the {modules.TEXT}; {others}: merged as '
        'they are, from the models of the first slice (`modules:` tells more)'
      )
    return texts or stems

  def _only_stack(self, stems):
    if len(stems) == 1:
      return next(iter(stems))
    names = sorted({self._module(f'{stem}0.') for stem in stems})
    if len(names) < len(stems):
      names = sorted(stem[:-1] for stem in stems)
    example = '\n'.join(f'  {name}: {{slices: [...]}}' for name in names)
    self._problems.append(
      'slices choose from one stack of layers; found '
      f'{sorted(stem[:-1] for stem in stems)}.'
      + (f' Say which, module by module:\nmodules:\n{example}' if stems else '')
    )
    return None

  def _modules(self):
    names = [one.name for one in self._recipe.modules]
    parts = []
    for one in self._recipe.modules:
      covers = lambda path, name=one.name: self._owner(path, names) == name
      paths = [path for path in self._reference if covers(path)]
      if not paths:
        known = sorted({self._module(path) for path in self._reference})
        self._problems.append(
          errors.near(one.name, known, 'module of these models')
        )
        continue
      stem = None
      if one.sliced:
        stem = self._only_stack(set(modules.layer_counts(paths)))
      parts.append(_Part(one.name, one.slices, covers, stem))
    return parts

  def _owner(self, path, names):
    """The listed module that a parameter belongs to, or None."""
    own = self._module(path)
    for name in names:
      if modules.ALIASES.get(name, name) == own:
        return name
    for name in names:
      part = re.escape(name).replace(r'\.', '[./]')
      if re.fullmatch(rf'(.*[./])?{part}[./].*', path):
        return name
    return modules.WHOLE if modules.WHOLE in names else None

  # Models as they are ---------------------------------------------------------

  def _whole(self, part):
    one = part.slices[0]
    expected = self._own(self._inputs.reference, part)
    models = [one.base, *(source.model for source in one.inputs)]
    for name in dict.fromkeys(filter(None, models)):
      lines = tree.difference(expected, self._own(name, part))
      if lines:
        self._problems.append(
          f'{name} does not have the parameters of {self._inputs.reference} '
          f'({len(lines)} differences; - missing, + unexpected, '
          '! shape or dtype):\n'
          f'{errors.listed(["  " + line for line in lines])}\n'
          '(What only some have may be copied: '
          '`rules: [{match: REGEX, copy: MODEL}]`.)'
        )
    result = []
    for path in self._reference:
      if part.covers(path):
        refs = [(source.model, path) for source in one.inputs]
        base = (one.base, path) if one.base else None
        result.append(self._entry(path, None, one, refs, base))
    return [*result, *self._donated(part, one)]

  def _own(self, name, part):
    """Specs of a model in a part, but for those that rules copy."""
    return {
      path: spec
      for path, spec in self._specs[name].items()
      if part.covers(path) and self._inputs.donor(path) is None
    }

  def _donated(self, part, one):
    """What rules copy from a model although the reference lacks it."""
    result = []
    for name, specs in self._specs.items():
      for path in specs:
        missing = path not in self._reference and part.covers(path)
        if missing and self._inputs.donor(path) == name:
          result.append(Entry(path, None, one, [(name, path)], None))
    return result

  def _entry(self, path, depth, one, refs, base):
    """An entry whose sources exist, or a problem and None."""
    if self._inputs.donor(path) is not None:
      # Only the donor must have it; the first names its shape.
      have = [r for r in (base, *refs) if r and r[1] in self._specs[r[0]]]
      have.append((self._inputs.donor(path), path))
      return Entry(path, depth, one, have[:1], None)
    lacking = [
      ref for ref in (*refs, base) if ref and ref[1] not in self._specs[ref[0]]
    ]
    for model, leaf in lacking:
      self._problems.append(f'{model} lacks {leaf}.')
    if lacking:
      return None
    # A module of the base alone: there is nothing to merge into it.
    uses_base = self._recipe.entry.base_policy != 'ignored'
    alone = uses_base and all(ref == base for ref in refs)
    copied = bool(self._recipe.modules) and alone
    return Entry(path, depth, one, refs, base, copied)

  # Slices --------------------------------------------------------------------

  def _stacked(self, part):
    """Layers from the slices one after the other; the rest from both ends."""
    self._check_ranges(part)
    if self._problems:
      return []
    first, last = part.slices[0], part.slices[-1]
    ends: dict[bool, list] = {True: [], False: []}
    module = self._module(f'{part.stem}0.')
    for path in self._ends(part, self._reference):
      # What belongs to other stacks stays together.
      other = known.LAYER.fullmatch(path) or self._module(path) != module
      early = bool(other or known.FIRST.fullmatch(path))
      one = first if early else last
      refs = [(source.model, path) for source in one.inputs]
      base = (one.base, path) if one.base else None
      ends[early].append(self._entry(path, None, one, refs, base))
    names = [s.model for one in (first, last) for s in one.inputs]
    for name in dict.fromkeys(names):
      for path in self._ends(part, self._specs[name]):
        if path not in self._reference and self._inputs.donor(path) is None:
          self._problems.append(
            f'{name} has {path}, which {self._inputs.reference} lacks.'
          )
    layers, order = [], []
    for one in part.slices:
      start, end = one.inputs[0].layers
      for j in range(end - start):
        depth = j / (end - start - 1) if end - start > 1 else 1.0
        layers += self._layer(part.stem, len(order), j, depth, one)
        order.append((one.inputs[0].model, start + j))
    self._tell(part, order)
    made = [*ends[True], *layers, *ends[False], *self._donated(part, first)]
    return [entry for entry in made if entry is not None]

  def _check_ranges(self, part):
    for i, one in enumerate(part.slices):
      for source in one.inputs:
        count = self._counts[source.model].get(part.stem, 0)
        if source.layers and source.layers[1] > count:
          what = f'layers 0 to {count - 1}' if count else f'no {part.stem[:-1]}'
          self._problems.append(
            f'slice {i}: layer_range {list(source.layers)} of {source.model}, '
            f'which has {what}.'
          )

  def _ends(self, part, paths):
    for path in paths:
      match = known.LAYER.fullmatch(path)
      if part.covers(path) and not (match and match['stem'] == part.stem):
        yield path

  def _layer(self, stem, at, j, depth, one):
    # (model, beginning of the layer's parameters) of every source.
    sources = [(s.model, f'{stem}{s.layers[0] + j}') for s in one.inputs]
    origin = None
    if one.base:
      own = [s for s in one.inputs if s.model == one.base] or one.inputs
      origin = (one.base, f'{stem}{own[0].layers[0] + j}')
    rests = {}
    for model, layer in filter(None, [*sources, origin]):
      for path in self._specs[model]:
        match = known.LAYER.fullmatch(path)
        found = match and match['stem'] + match['index']
        shared = known.OF_ALL_LAYERS.fullmatch(path)
        if found == (f'{stem}0' if shared else layer) and not (shared and at):
          rests[match['rest']] = shared
    result = []
    for rest, shared in rests.items():
      at_rest = lambda layer, r=rest, s=shared: (
        f'{stem}0{r}' if s else layer + r
      )
      refs = [(model, at_rest(layer)) for model, layer in sources]
      base = (origin[0], at_rest(origin[1])) if origin else None
      result.append(self._entry(f'{stem}{at}{rest}', depth, one, refs, base))
    return result

  def _tell(self, part, order):
    inputs = self._inputs
    self._remarks.append(
      f'{len(order)} layers of {part.stem[:-1]} in {len(part.slices)} slices'
    )
    counts = self._counts[inputs.reference]
    stack = layer_configs.Stack(
      module=self._module(f'{part.stem}0.'),
      order=tuple(order),
      counts={n: own.get(part.stem, 0) for n, own in self._counts.items()},
      other_side=max(
        [n for stem, n in counts.items() if modules.side(stem) == 'decoder'],
        default=0,
      ),
    )
    changes, remarks = layer_configs.changes(
      inputs.reference, inputs.configs, stack
    )
    inputs.config.update(changes)
    self._remarks += remarks
