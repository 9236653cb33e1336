# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a recipe will do, worked out from headers alone.

Everything that names, shapes, dtypes, tied parameters, vocabularies and
options can tell is checked here, and everything found wrong is reported at
once, before the first weight is read.
"""

from collections.abc import Mapping
import dataclasses
import math
import os
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from mergejax import axes as axes_lib
from mergejax import errors
from mergejax import numerics
from mergejax import recipe as recipe_lib
from mergejax import tree
from mergejax import typing
from mergejax.merging import base as merge_base
from mergejax.merging import mean
from mergejax.merging import named
from mergejax.peft import fold
from mergejax.store import base as store_base
from mergejax.store import checkpoint
from mergejax.store import vocabulary

# Elements of a leaf that are merged at a time.
PIECE = 1 << 20
# Leaves that are merged at the same time: some read or write while others
# compute.
WORKERS = 4
_LAYER = re.compile(
  r'(?P<stem>(?:.*[./])?(?:layers|layer|blocks|block|h)[._/])(?P<index>\d+)'
  r'(?P<rest>[./].*)'
)
_EMBEDDING = re.compile(
  r'(.*[./])?(embed\w*|wte|shared|token_embedder|word_embeddings)[./]'
  r'(weight|embedding)|(.*[./])?(lm_head|embed_out)\.weight'
)
# Methods that divide by the sum of the weights.
_AVERAGES = ('linear', 'task_arithmetic', 'dare_linear', 'della_linear', 'breadcrumbs')  # fmt: skip
_FIRST = re.compile(r'.*(embed|wte|wpe|shared|token_embedder).*')


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
    config: changes to the reference's `config.json`.
    tokenizer: text of the result's `tokenizer.json`, or the path of the model
      to copy tokenizer files from.
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
  tokenizer: tuple[str, str]
  remarks: tuple[str, ...]

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
    whole = sum(
      self.stores[m].specs()[p].nbytes
      for m, p in refs
      if not self.stores[m].reads_pieces
    )
    if task.method is None:
      return whole + 2 * PIECE * task.spec.dtype.itemsize
    wide = 4 if task.spec.dtype.itemsize < 8 else 8
    elements = task.spec.size if not self.in_pieces(task) else PIECE
    elements = min(task.spec.size, elements)
    raw = sum(self.stores[m].specs()[p].dtype.itemsize for m, p in refs)
    scores = 0
    if any(look.ranks for look in task.build().looks):
      # Scores of the pieces that are kept, and the bracket around a rank.
      scores = (
        4
        * len(task.inputs)
        * (min(task.spec.size, 4 * PIECE) + task.spec.size // 16)
      )
    copies = 3 * len(refs) if not self.in_pieces(task) else len(refs)
    return whole + scores + elements * (raw + wide * (copies + 2))

  def in_pieces(self, task: Task) -> bool:
    """True if a parameter is merged piece by piece rather than whole."""
    if task.method is None:
      return True
    method = task.build()
    if axes_lib.stacked(task.spec) or 'gram' in method.needs:
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


def plan(
  recipe: recipe_lib.Recipe | os.PathLike | str | Mapping[str, Any],
  *,
  sandbox: os.PathLike | str | None = None,
) -> Plan:
  """Works out what a recipe will do, reading headers only.

  Args:
    recipe: from `load_recipe`, the path of a recipe, or its data.
    sandbox: if given, every path of the recipe must lie in this directory.

  Returns:
    A plan; `print(plan.describe())` shows it, `execute` runs it.

  Raises:
    UserError: with everything that is wrong.
  """
  if isinstance(recipe, Mapping):
    recipe = recipe_lib.parse_recipe(recipe)
  elif not isinstance(recipe, recipe_lib.Recipe):
    recipe = recipe_lib.load_recipe(recipe)
  return _Planner(recipe, sandbox).plan()


class _Planner:
  """Collects problems; a stage runs only if what it rests on was sound."""

  def __init__(self, recipe, sandbox):
    self._recipe = recipe
    self._sandbox = sandbox and pathlib.Path(sandbox).resolve()
    self._problems: list[str] = []
    self._remarks: list[str] = []
    self._stores: dict[str, store_base.ParamStore] = {}
    self._stats: list[store_base.ParamStore] = []
    self._tied: dict = {}
    self._repeated: dict = {}
    self._config: dict[str, Any] = {}

  def plan(self) -> Plan:
    recipe = self._recipe
    self._open()
    self._raise()
    self._reference = recipe.base or recipe.slices[0].inputs[0].model
    tokenizer = self._align_vocabularies()
    self._tie()
    self._raise()
    tasks = self._tasks()
    self._raise()
    self._defaults_remark()
    return Plan(
      recipe, self._stores, tuple(self._stats), tuple(tasks), self._reference,
      self._tied, self._repeated, self._config, tokenizer,
      tuple(self._remarks),
    )  # fmt: skip

  def _raise(self):
    lines = list(dict.fromkeys(self._problems))
    if len(lines) == 1:
      raise errors.UserError(lines[0])
    if lines:
      raise errors.UserError(
        f'This merge cannot run, for {len(lines)} reasons:\n'
        f'{errors.listed(lines, 40)}'
      )

  def _try(self, function, *args):
    try:
      return function(*args)
    except errors.UserError as error:
      self._problems.append(error.message)
      return None

  def _defaults_remark(self):
    chosen = recipe_lib.MERGEKIT_DEFAULTS.get(self._recipe.method, {})
    chosen = {
      k: v for k, v in chosen.items() if k not in self._recipe.parameters
    }
    if chosen:
      words = ', '.join(f'{k}={v}' for k, v in chosen.items())
      self._remarks.append(
        f"mergekit's defaults where the recipe is silent: {words} "
        f"(`mergejax methods {self._recipe.method}` tells the paper's)"
      )

  # Stores ------------------------------------------------------------------

  def _inside(self, name):
    if self._sandbox is None:
      return True
    for part in name.split('+'):
      place = pathlib.Path(part).expanduser().resolve()
      if not place.is_relative_to(self._sandbox):
        self._problems.append(
          f'{part} lies outside the sandbox {self._sandbox}: paths of a recipe '
          'must stay inside it.'
        )
        return False
    return True

  def _open(self):
    recipe = self._recipe
    for name in recipe.models():
      if self._inside(name):
        self._stores[name] = self._try(self._open_model, name)
    for name in recipe.stats:
      if self._inside(name):
        self._stats.append(self._try(checkpoint.open_checkpoint, name))
    tok = recipe.tokenizer
    if tok not in (None, 'base', 'union'):
      self._inside(tok)

  def _open_model(self, name):
    model, _, adapter = name.partition('+')
    if adapter:
      return fold.AdapterStore(checkpoint.open_checkpoint(model), adapter)
    if fold.is_adapter(model):
      if not self._recipe.base:
        raise errors.UserError(
          f'{model} is an adapter: say what it was trained on with '
          f'`base_model:`, or write `model: BASE+{model}`.'
        )
      base = checkpoint.open_checkpoint(self._recipe.base)
      return fold.AdapterStore(base, model)
    return checkpoint.open_checkpoint(model)

  # Vocabularies and tied heads ------------------------------------------------

  def _align_vocabularies(self) -> tuple[str, str]:
    recipe = self._recipe
    if recipe.tokenizer is not None and recipe.vocab is not None:
      self._problems.append(
        "give 'tokenizer' (rows by token) or 'vocab' (rows by number), not both."
      )
    paths = {
      name: {p: s for p, s in store.specs().items() if _EMBEDDING.fullmatch(p)}
      for name, store in self._stores.items()
    }
    if recipe.tokenizer is not None:
      return self._by_token(paths)
    counts = {
      name: {spec.shape[0] for spec in own.values() if len(spec.shape) == 2}
      for name, own in paths.items()
    }
    sizes = {n: max(own) for n, own in counts.items() if own}
    if len(set(sizes.values())) > 1:
      if recipe.vocab is None:
        listing = ', '.join(f'{name}: {size}' for name, size in sizes.items())
        self._problems.append(
          f'The vocabularies differ in size ({listing}). Say what to do: '
          '`tokenizer: {source: union}` matches rows by token; `vocab: base`, '
          '`union` or `pad` by number.'
        )
      else:
        self._by_number(paths, sizes)
    return ('copy', self._reference.split('+')[0])

  def _by_number(self, paths, sizes):
    policy = self._recipe.vocab
    count = sizes[self._reference] if policy == 'base' else max(sizes.values())
    rows = {}
    for name, own in paths.items():
      rows[name] = {
        path: np.where(np.arange(count) < spec.shape[0], np.arange(count), -1)
        for path, spec in own.items()
      }
    self._wrap_rows(rows, zeros=policy == 'pad')
    self._config['vocab_size'] = count
    self._remarks.append(
      f'vocabularies of {sorted(set(sizes.values()))} rows: the result has '
      f'{count} (policy {policy!r})'
    )

  def _by_token(self, paths):
    recipe = self._recipe
    tokens = {}
    for name in self._stores:
      folder = name.split('+')[0]
      if fold.is_adapter(folder):
        folder = recipe.base
      tokens[name] = self._try(vocabulary.read_tokens, folder)
    source = recipe.tokenizer
    if source not in ('base', 'union') and source not in tokens:
      tokens[source] = self._try(vocabulary.read_tokens, source)
    if self._problems:
      return ('copy', self._reference)
    if source == 'union':
      first = [self._reference, *(n for n in tokens if n != self._reference)]
      wanted = vocabulary.union([tokens[name] for name in first])
    else:
      wanted = tokens[self._reference if source == 'base' else source]
    least = max(wanted.values()) + 1
    if source != 'union':
      # Rows past the last token are padding that the model has.
      own = [s.shape[0] for s in paths.get(
        self._reference if source == 'base' else source, {}
      ).values()]  # fmt: skip
      least = max([least, *own])
    rows = {}
    for name, own in paths.items():
      order = np.full(least, -1)
      for token, row in wanted.items():
        order[row] = tokens[name].get(token, -1)
      rows[name] = {
        path: np.where(order < spec.shape[0], order, -1)
        for path, spec in own.items()
      }
    self._wrap_rows(rows)
    self._config['vocab_size'] = least
    new = len(set(wanted) - set(tokens[self._reference]))
    self._remarks.append(
      f'tokenizer {source!r}: {len(wanted)} tokens, {new} of them not in '
      f'{self._reference}; embedding rows are matched by token'
    )
    folder = self._reference if source in ('base', 'union') else source
    folder = folder.split('+')[0]
    if source == 'union' and new:
      return ('text', vocabulary.extended_tokenizer(folder, wanted))
    return ('copy', folder)

  def _wrap_rows(self, rows, zeros=False):
    plain = dict(self._stores)
    base = self._recipe.base
    for name, store in plain.items():
      same = all(
        len(order) == store.specs()[path].shape[0]
        and np.array_equal(order, np.arange(len(order)))
        for path, order in rows[name].items()
      )
      if same:
        continue
      fallbacks, others = [], []
      if not zeros:
        if base and name != base:
          fallbacks = [(plain[base], rows[base])]
        others = [(plain[n], rows[n]) for n in plain if n != name]
      self._stores[name] = vocabulary.RowsStore(
        store, rows[name], fallbacks, others
      )

  def _tie(self):
    """Kept tied if every source is; untied on request; an error otherwise."""
    tied = {n: dict(s.tied) for n, s in self._stores.items() if s.tied}
    if not tied:
      return
    loose = [n for n in self._stores if n not in tied]
    head, embedding = next(iter(next(iter(tied.values())).items()))
    if not loose and not self._recipe.untie:
      for name, store in self._stores.items():
        stored = [alias for alias in tied[name] if alias in store.specs()]
        if stored:
          self._repeated[name] = {a: tied[name][a] for a in stored}
          self._stores[name] = vocabulary.AliasStore(store, {}, stored)
      self._tied = {head: embedding}
      self._remarks.append(f'{head} stays tied to {embedding}')
      return
    if self._recipe.untie:
      for name in tied:
        missing = {
          a: p for a, p in tied[name].items()
          if a not in self._stores[name].specs()
        }  # fmt: skip
        self._stores[name] = vocabulary.AliasStore(self._stores[name], missing)
      self._config['tie_word_embeddings'] = False
      self._remarks.append(f'{head} is untied from {embedding}')
      return
    self._problems.append(
      f'{head} is tied to {embedding} in {", ".join(tied)}, but not in '
      f'{", ".join(loose)}. `untie: true` gives every model a head of its own '
      'before merging.'
    )

  # Tasks ---------------------------------------------------------------------

  def _tasks(self) -> list[Task]:
    recipe = self._recipe
    layouts = self._layouts()
    if self._problems:
      return []
    tasks = []
    used_rules: set[int] = set()
    for path, depth, one, refs, base in layouts:
      task = self._try(self._task, path, depth, one, refs, base, used_rules)
      if task is not None:
        tasks.append(task)
    for i, rule in enumerate(recipe.rules):
      if i not in used_rules:
        self._problems.append(
          f'rule {i} ({rule.match!r}) is the first match of no parameter.'
        )
    if self._stats and len(self._stats) != len(recipe.slices[0].inputs):
      self._problems.append(
        f"{len(self._stats)} 'stats' for {len(recipe.slices[0].inputs)} "
        'models: give one for each, in their order.'
      )
    return tasks

  def _layouts(self):
    """`(path, depth, slice, refs, base ref)` of every parameter."""
    recipe = self._recipe
    if not recipe.sliced:
      return self._unsliced()
    return self._stacked()

  def _unsliced(self):
    recipe = self._recipe
    reference = self._stores[self._reference].specs()
    one = recipe.slices[0]
    for name, store in self._stores.items():
      lines = tree.difference(reference, store.specs())
      if lines:
        self._problems.append(
          f'{name} does not have the parameters of {self._reference} '
          f'({len(lines)} differences; - missing, + unexpected, ! shape):\n'
          f'{errors.listed(["  " + line for line in lines])}'
        )
    counts = _layer_counts(reference)
    result = []
    for path in reference:
      refs = [(source.model, path) for source in one.inputs]
      base = (recipe.base, path) if recipe.base else None
      result.append((path, _depth(path, counts), one, refs, base))
    return result

  def _stacked(self):
    """Layers from the slices one after the other; the rest from both ends."""
    recipe = self._recipe
    stems = {
      match['stem']
      for store in self._stores.values()
      for path in store.specs()
      if (match := _LAYER.fullmatch(path))
    }
    if len(stems) != 1:
      self._problems.append(
        f'slices need models with one stack of layers; found {sorted(stems)}.'
      )
      return []
    stem = stems.pop()
    counts = {
      name: _layer_counts(store.specs()).get(stem, 0)
      for name, store in self._stores.items()
    }
    for i, one in enumerate(recipe.slices):
      for source in one.inputs:
        if source.layers and source.layers[1] > counts[source.model]:
          self._problems.append(
            f'slice {i}: layer_range {list(source.layers)} of {source.model}, '
            f'which has layers 0 to {counts[source.model] - 1}.'
          )
    if self._problems:
      return []
    result, at = [], 0
    first, last = recipe.slices[0], recipe.slices[-1]
    ends = [
      (path, 0.0 if _FIRST.fullmatch(path) else 1.0)
      for path in self._stores[self._reference].specs()
      if not _LAYER.fullmatch(path)
    ]
    for path, depth in ends:
      if depth == 0.0:
        result.append(self._end(path, depth, first))
    for one in recipe.slices:
      start, end = one.inputs[0].layers
      for j in range(end - start):
        depth = j / (end - start - 1) if end - start > 1 else 1.0
        result += self._layer(stem, at, j, depth, one)
        at += 1
    for path, depth in ends:
      if depth == 1.0:
        result.append(self._end(path, depth, last))
    # Whichever of these the reference's configuration has.
    for key in ('num_hidden_layers', 'num_layers', 'n_layer', 'num_decoder_layers'):  # fmt: skip
      self._config[key] = at
    self._remarks.append(f'{at} layers in {len(recipe.slices)} slices')
    return [entry for entry in result if entry is not None]

  def _end(self, path, depth, one):
    refs = [(source.model, path) for source in one.inputs]
    for model, _ in refs:
      if path not in self._stores[model].specs():
        self._problems.append(f'{model} lacks {path}.')
    return (path, depth, one, refs, (one.base, path) if one.base else None)

  def _layer(self, stem, at, j, depth, one):
    source = one.inputs[0]
    prefix = f'{stem}{source.layers[0] + j}'
    result = []
    for path in self._stores[source.model].specs():
      match = _LAYER.fullmatch(path)
      if not match or match['stem'] + match['index'] != prefix:
        continue
      refs = [
        (s.model, f'{stem}{s.layers[0] + j}{match["rest"]}') for s in one.inputs
      ]
      base = None
      if one.base:
        own = [s for s in one.inputs if s.model == one.base]
        begin = (own or one.inputs)[0].layers[0]
        base = (one.base, f'{stem}{begin + j}{match["rest"]}')
      for model, leaf in [*refs, *([base] if base else [])]:
        if leaf not in self._stores[model].specs():
          self._problems.append(f'{model} lacks {leaf}.')
      result.append((f'{stem}{at}{match["rest"]}', depth, one, refs, base))
    return result

  def _task(self, path, depth, one, refs, base, used_rules) -> Task:
    recipe = self._recipe
    rule = None
    for i, candidate in enumerate(recipe.rules):
      if re.fullmatch(candidate.match, path):
        used_rules.add(i)
        rule = candidate
        break
    spec = self._spec(refs[0] if base is None else base)
    stored = spec
    if recipe.dtype and numerics.is_averaged(spec.dtype):
      stored = typing.LeafSpec(
        spec.shape, np.dtype(jnp.dtype(recipe.dtype)), spec.axes
      )
    elif spec.dtype != (lead := self._lead_dtype(refs, base)):
      stored = typing.LeafSpec(spec.shape, lead, spec.axes)
    stored = axes_lib.with_axes({path: stored}, [
      one_rule for one_rule in recipe.axes if re.fullmatch(one_rule[0], path)
    ])[path]  # fmt: skip
    copy = None
    if rule is not None and rule.copy is not None:
      if rule.copy == 'base' and not recipe.base:
        raise errors.UserError(
          f'{path}: a rule copies the base; none is given.'
        )
      copy = (recipe.base if rule.copy == 'base' else rule.copy, path)
    elif not numerics.is_averaged(spec.dtype):
      copy = refs[0] if base is None else base
    if copy is not None:
      return Task(path, stored, None, {}, (), (copy,), None)
    method = (rule and rule.method) or recipe.method
    return self._merge_task(path, depth, one, refs, base, stored, method, rule)

  def _merge_task(self, path, depth, one, refs, base, spec, method, rule):
    wanted = _base_policy(method)
    if wanted == 'ignored':
      base = None
    else:
      refs_and_sources = [
        (ref, source)
        for ref, source in zip(refs, one.inputs)
        if not (base and source.model == base[0])
      ]
      refs = [ref for ref, _ in refs_and_sources]
    sources = (
      one.inputs if wanted == 'ignored' else [s for _, s in refs_and_sources]
    )
    if wanted == 'required' and base is None:
      self._problems.append(
        f'{method} works on differences from a base model: give `base_model:`.'
      )
    layers = [dict(rule.parameters)] if rule else [{}]
    shared = [*layers, one.parameters, self._recipe.parameters]
    values: dict[str, list] = {}
    names = set(named.METHODS.options(method)) | {'weight'}
    for name in names:
      values[name] = [
        _first(name, [*layers, source.parameters, *shared[1:]], path, depth)
        for source in sources
      ] or [_first(name, shared, path, depth)]
    weights = values.pop('weight')
    options = dict(recipe_lib.MERGEKIT_DEFAULTS.get(method, {}))
    for name, own in values.items():
      given = [value for value in own if value is not None]
      if not given:
        continue
      if all(value == own[0] for value in own):
        options[name] = own[0]
      elif len(given) < len(own) and name not in options:
        raise errors.UserError(
          f'{path}: {name} is given for some models and not for others.'
        )
      else:
        options[name] = [options.get(name) if v is None else v for v in own]
    if method == 'multislerp' and 'normalize' in options:
      options['normalize_weights'] = options.pop('normalize')
    try:
      built = named.resolve(method, **options)
      plain = None if all(w is None for w in weights) else [
        1.0 if w is None else w for w in weights
      ]  # fmt: skip
      if built.default_weights is not None:
        plain = None
      checked = merge_base.check_weights(built, plain, len(refs))
      if method in _AVERAGES and options.get('normalize', method == 'linear'):
        if abs(sum(checked)) < mean.TINY_WEIGHT:
          raise errors.UserError(
            f'the weights of {path} sum to zero, so their average is not '
            'defined; give others, or `normalize: false`.'
          )
    except errors.UserError as error:
      raise errors.UserError(f'{method}: {error.message}') from error
    self._check_shapes(path, spec, refs, base)
    if built.view != 'element':
      axes_lib.view(path, spec)
    return Task(
      path, spec, method, options, tuple(float(w) for w in checked),
      tuple(refs), base, self._stats_of(path, spec, built, refs),
    )  # fmt: skip

  def _stats_of(self, path, spec, method, refs):
    if not method.needs:
      return ()
    kind = method.needs[0]
    if len(self._stats) != len(refs):
      raise errors.UserError(
        f'this method needs `stats:`, one path for each of the {len(refs)} '
        f'models, {len(self._stats)} given. `mergejax stats` collects them.'
      )
    own = [f'{path}/{kind}' for _ in self._stats]
    have = [name in store.specs() for name, store in zip(own, self._stats)]
    if not any(have) and kind == 'gram':
      return tuple({} for _ in own)
    for name, store, there in zip(own, self._stats, have):
      if not there:
        raise errors.UserError(f'{store.name} lacks {name}.')
      shape = store.specs()[name].shape
      fits = shape == spec.shape
      if kind == 'gram':
        view = axes_lib.view(path, spec)
        width = math.prod(spec.shape[i] for i in view.inputs)
        stack = tuple(spec.shape[i] for i in view.stack)
        fits = shape == stack + (width, width)
      if not fits:
        raise errors.UserError(
          f'{store.name}: {name} is {list(shape)}, which does not fit {path} '
          f'{list(spec.shape)}. Are these the statistics of another model?'
        )
    return tuple({kind: name} for name in own)

  def _spec(self, ref):
    model, path = ref
    return self._stores[model].specs()[path]

  def _lead_dtype(self, refs, base):
    """dtype of the base, or of the first model, as stored, adapters aside."""
    model, path = refs[0] if base is None else base
    store = self._stores[model]
    if isinstance(store, fold.AdapterStore):
      plain = self._stores.get(self._reference)
      if plain is not None and path in plain.specs():
        return plain.specs()[path].dtype
    return store.specs()[path].dtype

  def _check_shapes(self, path, spec, refs, base):
    for ref in [*refs, *([base] if base else [])]:
      shape = self._spec(ref).shape
      if shape != spec.shape:
        raise errors.UserError(
          f'{path}: {ref[1]} of {ref[0]} is {list(shape)}, expected '
          f'{list(spec.shape)}.'
        )


def _base_policy(method: str) -> str:
  """Whether a method needs a base, from its constructor with any options."""
  needed = {
    name: 0.5
    for name, parameter in named.METHODS.options(method).items()
    if parameter.default is parameter.empty
  }
  return named.resolve(method, **needed).base


def _first(name, places, path, depth):
  """The value of a setting in the first place that has one."""
  for place in places:
    if name in place:
      value = recipe_lib.evaluate(place[name], path, depth)
      if value is not None:
        return value
  return None


def _layer_counts(specs) -> dict[str, int]:
  """`{stem: number of layers}`."""
  counts: dict[str, int] = {}
  for path in specs:
    match = _LAYER.fullmatch(path)
    if match:
      stem = match['stem']
      counts[stem] = max(counts.get(stem, 0), int(match['index']) + 1)
  return counts


def _depth(path, counts) -> float:
  """0 at the first layer, 1 at the last; embeddings 0, what follows 1."""
  match = _LAYER.fullmatch(path)
  if match:
    count = counts[match['stem']]
    return int(match['index']) / (count - 1) if count > 1 else 1.0
  return 0.0 if _FIRST.fullmatch(path) else 1.0
