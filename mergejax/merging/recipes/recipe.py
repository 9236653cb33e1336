# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Recipes: which models, which weights, which method, as data.

A mergekit YAML file is a recipe, unchanged (`models:` and `slices:` are read by
`recipes.sources`, `modules:` by `recipes.modules`). A recipe may further hold
`rules`, `stats`, `axes`, `seed`, `format`, `untie`, `vocab`, `adapter` (see
`adapter_words`) and `ignore_config`:

    merge_method: ties
    base_model: path/to/base
    models:
      - model: path/to/a
        parameters: {weight: 1.0, density: 0.5}
      - model: path/to/b+path/to/lora
        parameters: {weight: [0, 0.5, 1]}   # along the layers
    parameters:
      lambda: 0.9
      density:
        - {filter: norm, value: 1.0}        # names that contain 'norm'
        - value: 0.3
    dtype: bfloat16
    rules:                                   # first full match of a path wins
      - {match: '.*lm_head.*', copy: base}
      - {match: '.*mlp.*', method: linear, parameters: {weight: 1}}

A method is a name of the menu, `package.module:function` for a constructor of
your own (whose module is imported), or, in data from Python, a built `Merge`.
"""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
from typing import Any

import yaml

from mergejax.core import errors
from mergejax.core import registry
from mergejax.merging.recipes import adapter_words
from mergejax.merging.recipes import mergekit_words
from mergejax.merging.recipes import model_names
from mergejax.merging.recipes import modules as recipe_modules
from mergejax.merging.recipes import parameters as parameters_lib
from mergejax.merging.recipes import sources
from mergejax.merging.recipes import tokenizer_words
from mergejax.merging.recipes import values
from mergejax.methods import base as merge_base
from mergejax.methods import entries as methods_lib
from mergejax.methods import named

_TOP = (
  'merge_method', 'models', 'slices', 'modules', 'base_model', 'parameters', 'dtype',
  'out_dtype', 'tokenizer_source', 'tokenizer', 'chat_template',
  'rules', 'stats', 'axes', 'seed', 'format', 'untie', 'vocab', 'name',
  'ignore_config', 'adapter',
)  # fmt: skip
ADAPTER = adapter_words.FORMAT
FORMATS = ('safetensors', 'orbax', 't5x', 'npz', ADAPTER)
VOCAB_POLICIES = ('base', 'union', 'pad')


@dataclasses.dataclass(frozen=True)
class Rule:
  """Another treatment for the parameters whose path matches.

  Attributes:
    match: regular expression of the full path.
    copy: 'base', or the path of the model to copy from; None merges.
    method: another method, or None; see `Recipe.method`.
    parameters: settings that come before all others.
  """

  match: str
  copy: str | None = None
  method: str | merge_base.Merge | None = None
  parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A recipe whose words are known; no checkpoint has been looked at.

  Attributes:
    method: name on the menu, `package.module:function`, or a `Merge`; see
      `methods.named.entry_of`.
    slices: what the result is stacked from; one slice for `models`; those of
      all modules, if there are any.
    sliced: the recipe chose layers or modules itself.
    modules: parts of the model that are merged in ways of their own.
    base: path of the base model, or None.
    parameters: settings for all models.
    rules: exceptions by path.
    stats: statistics of the models, in their order.
    axes: logical axes by path, see `axes`.
    dtype: dtype of the result, or None to keep that of the base or first model.
    seed: seed of random methods.
    format: format of the result, or None for what the name of OUT says. Of
      'adapter' the models are adapters, merged by what they change.
    adapter: of such a result.
    untie: give tied models a head of their own.
    vocab: what to do where vocabularies differ, or None: an error.
    ignore_config: fields of `config.json` that may differ between the models
      although they change the function; see `architectures`.
    tokenizer: 'base', 'union' or a path to take the tokenizer from; None: that
      of the base or first model, and embeddings as they are.
    tokens: where the embedding rows of some tokens come from.
    row_multiple: embeddings get rows up to a multiple of this, or None.
    chat_template: text to put into the tokenizer's settings, 'auto' for the
      one that most models have, or None to keep what the tokenizer has.
    notes: what of the recipe does not count, in words.
    data: the recipe as it was read; words stand in the place of a `Merge`.
  """

  method: str | merge_base.Merge
  slices: tuple[sources.Slice, ...]
  sliced: bool = False
  modules: tuple[recipe_modules.Module, ...] = ()
  base: str | None = None
  parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  rules: tuple[Rule, ...] = ()
  stats: tuple[str, ...] = ()
  axes: tuple[tuple[str, tuple[str, ...]], ...] = ()
  dtype: str | None = None
  seed: int = 0
  format: str | None = None
  adapter: adapter_words.AdapterWords = adapter_words.AdapterWords()
  untie: bool = False
  vocab: str | None = None
  ignore_config: tuple[str, ...] = ()
  tokenizer: str | None = None
  tokens: Mapping[str, tokenizer_words.TokenSource] = dataclasses.field(
    default_factory=dict
  )
  row_multiple: int | None = None
  chat_template: str | None = None
  notes: tuple[str, ...] = ()
  data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def of_adapters(self) -> bool:
    """True if adapters are merged into an adapter."""
    return self.format == ADAPTER

  @property
  def entry(self) -> methods_lib.MethodEntry:
    """What is known of its method."""
    return named.entry_of(self.method)

  def methods(self) -> list[str | merge_base.Merge]:
    """Its method, and those of its rules."""
    others = [rule.method for rule in self.rules if rule.method is not None]
    return [self.method, *others]

  def models(self) -> list[str]:
    """Every model that is named, once, the base first."""
    names = [self.base] if self.base else []
    for part in self.slices:
      names += [part.base] if part.base else []
      names += [source.model for source in part.inputs]
    names += [r.copy for r in self.rules if r.copy not in (None, 'base')]
    return list(dict.fromkeys(names))

  def settings(self) -> list[Any]:
    """Every value that is given to an option or a weight, wherever it stands."""
    places = [self.parameters, *(rule.parameters for rule in self.rules)]
    for part in self.slices:
      places += [part.parameters, part.outer]
      places += [source.parameters for source in part.inputs]
    return [value for place in places for value in place.values()]


def load_recipe(path: os.PathLike | str, *, imports: bool = True) -> Recipe:
  """Reads and checks a recipe file.

  Args:
    path: a YAML file; see the module for an example.
    imports: whether methods may be named by `package.module:function`. Their
      modules are imported, which runs them: False for recipes of strangers.

  Returns:
    The recipe. Methods and options exist; no checkpoint has been looked at.

  Raises:
    UserError: the file is missing or not YAML, or with everything in it that
      is not known (near names are offered).
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise errors.RecipeError(f'There is no recipe at {path}.')
  try:
    data = yaml.safe_load(path.read_text(encoding='utf-8'))
  except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
    raise errors.RecipeError(f'{path} is not YAML: {error}') from error
  try:
    return parse_recipe(data, imports=imports)
  except errors.UserError as error:
    raise error.at(path) from error


def parse_recipe(data: Any, *, imports: bool = True) -> Recipe:
  """Checks a recipe given as nested dicts and lists; see `load_recipe`.

  Methods may be a `Merge` here: `{'merge_method': mj.ties(density=0.3), ...}`.
  Its options are those that it was built with.
  """
  reader = _Reader(imports)
  recipe = reader.recipe(data)
  if reader.problems or recipe is None:
    lines = list(dict.fromkeys(reader.problems))
    if len(lines) == 1:
      raise errors.RecipeError(lines[0])
    raise errors.RecipeError(
      f'the recipe has {len(lines)} mistakes:\n{errors.listed(lines, 20)}'
    )
  return recipe


class _Reader:
  """Collects every mistake before any is reported."""

  def __init__(self, imports=True):
    self._imports = imports
    self._report = parameters_lib.Report()
    self.problems = self._report.problems

  def recipe(self, data) -> Recipe | None:
    report = self._report
    if not parameters_lib.is_mapping(data, _TOP, 'recipe', report):
      return None
    method = self._method(data.get('merge_method'))
    base = self._name(data.get('base_model'), 'base_model')
    parameters = self._parameters(data.get('parameters'), method, 'parameters')
    common = method, base, parameters, report
    modules: tuple[recipe_modules.Module, ...] = ()
    if 'modules' in data:
      if 'models' in data or 'slices' in data:
        self.problems.append("give one of 'models', 'slices' and 'modules'.")
      modules = recipe_modules.read(data['modules'], *common)
      slices, sliced = sum((module.slices for module in modules), ()), True
    else:
      slices, sliced = sources.read(data, *common)
    tokenizer = self._name(data.get('tokenizer_source'), 'tokenizer_source')
    tokens, multiple = {}, None
    if data.get('tokenizer') is not None:
      if tokenizer is not None:
        self.problems.append(
          "give 'tokenizer' or 'tokenizer_source', not both."
        )
      tokenizer, tokens, multiple = tokenizer_words.read(
        data['tokenizer'], report
      )
    return Recipe(
      method='' if method is None else method.value or method.name,
      slices=slices,
      sliced=sliced,
      modules=modules,
      base=base,
      parameters=parameters,
      rules=self._rules(data.get('rules'), method),
      stats=values.texts(data.get('stats'), 'stats', 'paths', report),
      axes=values.axes(data.get('axes'), report),
      dtype=values.dtype(data.get('dtype'), data.get('out_dtype'), report),
      seed=values.whole_number(data.get('seed', 0), 'seed', report),
      format=values.choice(data.get('format'), FORMATS, 'format', report),
      adapter=adapter_words.read(data, report),
      untie=values.flag(data.get('untie', False), 'untie', report),
      vocab=values.choice(
        data.get('vocab'), VOCAB_POLICIES, 'vocab policy', report
      ),
      ignore_config=values.texts(
        data.get('ignore_config'), 'ignore_config', 'names', report
      ),
      tokenizer=tokenizer,
      tokens=tokens,
      row_multiple=multiple,
      chat_template=values.chat_template(data.get('chat_template'), report),
      notes=report.notes(),
      data=_without_values(data),
    )

  def _method(self, name):
    """The entry of a method, or None."""
    if name is None:
      self.problems.append("the recipe lacks 'merge_method'.")
      return None
    if isinstance(name, merge_base.Merge):
      return named.entry_of(name)
    name = mergekit_words.METHOD_ALIASES.get(str(name), str(name))
    if name not in named.METHODS and registry.is_import_path(name):
      if not self._imports:
        self.problems.append(
          f'the merge method {name!r} would import a module, and a recipe in a '
          'sandbox runs nothing. Leave the sandbox, or take one of the menu.'
        )
        return None
      try:
        return named.entry_of(name)
      except errors.UserError as error:
        self.problems.append(error.message)
        return None
    if name not in named.METHODS:
      # dare-ties is a common way to write dare_ties.
      self.problems.append(errors.near(name, named.METHODS, 'merge method'))
      return None
    return named.entry_of(name)

  def _parameters(self, data, method, what):
    return parameters_lib.read(data, method, what, self._report, of_model=False)

  def _rules(self, data, method):
    rules = []
    form = '`{match: ..., ...}`'
    entries = values.entries(data, 'rules', form, self._report)
    for i, entry in enumerate(entries):
      what = f'rule {i}'
      known = ('match', 'copy', 'method', 'parameters')
      if not parameters_lib.is_mapping(entry, known, what, self._report):
        continue
      match = str(entry.get('match'))
      values.is_expression(match, f'match of {what}', self._report)
      if 'match' not in entry:
        self.problems.append(f"{what} lacks 'match'.")
      own = self._method(entry['method']) if 'method' in entry else None
      rules.append(
        Rule(
          match,
          self._name(entry.get('copy'), 'copy'),
          own and (own.value or own.name),
          self._parameters(entry.get('parameters'), own or method, what),
        )
      )
    return tuple(rules)

  def _name(self, value, what):
    return model_names.read(value, what, self._report)


def _without_values(data):
  """A recipe with words where it holds methods that were built in Python."""
  if isinstance(data, merge_base.Merge):
    return methods_lib.VALUE
  if isinstance(data, dict):
    return {key: _without_values(one) for key, one in data.items()}
  if isinstance(data, list):
    return [_without_values(one) for one in data]
  return data
