# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Recipes: which models, which weights, which method, as data.

A mergekit YAML file is a recipe, unchanged (`modules` are those of
`recipe_modules`). A recipe may further hold `rules`, `stats`, `axes`, `seed`,
`format`, `untie`, `vocab` and `ignore_config`:

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
"""

from collections.abc import Mapping
import dataclasses
import difflib
import os
import pathlib
import re
from typing import Any

import yaml

from mergejax import errors
from mergejax import recipe_modules
from mergejax import settings
from mergejax.merging import named

_TOP = (
  'merge_method', 'models', 'slices', 'modules', 'base_model', 'parameters', 'dtype',
  'out_dtype', 'tokenizer_source', 'tokenizer', 'chat_template',
  'rules', 'stats', 'axes', 'seed', 'format', 'untie', 'vocab', 'name',
  'ignore_config',
)  # fmt: skip
DTYPES = ('float32', 'bfloat16', 'float16')
FORMATS = ('safetensors', 'orbax', 't5x', 'npz')
VOCAB_POLICIES = ('base', 'union', 'pad')
# mergekit's names of methods and options -> ours.
_METHOD_ALIASES = {'ramplus_tl': 'ram_plus'}
_OPTION_ALIASES = {'lambda': 'scale', 'nuslerp_flatten': 'flatten'}
# Options of mergekit that change nothing here: sums are always float32.
_WITHOUT_EFFECT = {'int8_mask'}
# Where mergekit's default is not the paper's, a recipe gets mergekit's.
MERGEKIT_DEFAULTS = {
  'ties': {'density': 1.0, 'trim_scope': 'tensor'},
  'dare_linear': {'density': 1.0, 'rescale': 'l1'},
  'dare_ties': {'density': 1.0, 'rescale': 'l1'},
  'della': {'density': 1.0, 'rescale': 'l1'},
  'della_linear': {'density': 1.0, 'rescale': 'l1'},
}
# What one model may have its own value of.
PER_MODEL = ('weight', 'density', 'gamma', 'epsilon', 'scale')


@dataclasses.dataclass(frozen=True)
class Input:
  """One model of a merge, or some of its layers.

  Attributes:
    model: path, or `path+adapter`.
    parameters: its own settings.
    layers: half-open range of its layers, None for all.
  """

  model: str
  parameters: Mapping[str, Any]
  layers: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Slice:
  """Some layers of the result, and the inputs they are merged from."""

  inputs: tuple[Input, ...]
  base: str | None
  parameters: Mapping[str, Any]
  # Settings of the module that it belongs to.
  outer: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Rule:
  """Another treatment for the parameters whose path matches.

  Attributes:
    match: regular expression of the full path.
    copy: 'base', or the path of the model to copy from; None merges.
    method: another method, or None.
    parameters: settings that come before all others.
  """

  match: str
  copy: str | None = None
  method: str | None = None
  parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A recipe whose words are known; no checkpoint has been looked at.

  Attributes:
    method: name on the menu.
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
    format: format of the result, or None for what the name of OUT says.
    untie: give tied models a head of their own.
    vocab: what to do where vocabularies differ, or None: an error.
    ignore_config: fields of `config.json` that may differ between the models
      although they change the function; see `architectures`.
    tokenizer: 'base', 'union' or a path to take the tokenizer from; None: that
      of the base or first model, and embeddings as they are.
    chat_template: text to put into the tokenizer's settings, or None to keep
      what the tokenizer has.
    data: the recipe as it was read.
  """

  method: str
  slices: tuple[Slice, ...]
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
  untie: bool = False
  vocab: str | None = None
  ignore_config: tuple[str, ...] = ()
  tokenizer: str | None = None
  chat_template: str | None = None
  data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def models(self) -> list[str]:
    """Every model that is named, once, the base first."""
    names = [self.base] if self.base else []
    for one in self.slices:
      names += [one.base] if one.base else []
      names += [source.model for source in one.inputs]
    names += [r.copy for r in self.rules if r.copy not in (None, 'base')]
    return list(dict.fromkeys(names))


def load_recipe(path: os.PathLike | str) -> Recipe:
  """Reads and checks a recipe file.

  Args:
    path: a YAML file; see the module for an example.

  Returns:
    The recipe. Methods and options exist; no checkpoint has been looked at.

  Raises:
    UserError: the file is missing or not YAML, or with everything in it that
      is not known (near names are offered).
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise errors.UserError(f'There is no recipe at {path}.')
  try:
    data = yaml.safe_load(path.read_text(encoding='utf-8'))
  except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
    raise errors.UserError(f'{path} is not YAML: {error}') from error
  try:
    return parse_recipe(data)
  except errors.UserError as error:
    raise errors.UserError(f'{path}: {error.message}') from error


def parse_recipe(data: Any) -> Recipe:
  """Checks a recipe given as nested dicts and lists; see `load_recipe`."""
  reader = _Reader()
  recipe = reader.recipe(data)
  if reader.problems:
    lines = list(dict.fromkeys(reader.problems))
    if len(lines) == 1:
      raise errors.UserError(lines[0])
    raise errors.UserError(
      f'the recipe has {len(lines)} mistakes:\n{errors.listed(lines, 20)}'
    )
  return recipe


class _Reader:
  """Collects every mistake before any is reported."""

  def __init__(self):
    self.problems: list[str] = []

  def recipe(self, data) -> Recipe | None:
    if not self._mapping(data, _TOP, 'recipe'):
      return None
    method = self._method(data.get('merge_method'))
    base = self._name(data.get('base_model'), 'base_model')
    parameters = self._parameters(data.get('parameters'), method, 'parameters')
    modules = self._modules(data, method, base)
    if 'modules' in data:
      slices, sliced = sum((one.slices for one in modules), ()), True
    else:
      slices, sliced = self._slices(data, method, base)
    tokenizer = data.get('tokenizer_source')
    if isinstance(data.get('tokenizer'), dict):
      if self._mapping(data['tokenizer'], ('source',), 'tokenizer'):
        tokenizer = data['tokenizer'].get('source', 'union')
    elif 'tokenizer' in data:
      self.problems.append("'tokenizer' must be `{source: base|union|PATH}`.")
    return Recipe(
      method=method or '',
      slices=slices,
      sliced=sliced,
      modules=modules,
      base=base,
      parameters=parameters,
      rules=self._rules(data.get('rules'), method),
      stats=tuple(self._names(data.get('stats'), 'stats')),
      axes=self._axes(data.get('axes')),
      dtype=self._choice(
        data.get('out_dtype') or data.get('dtype'), DTYPES, 'dtype'
      ),
      seed=self._seed(data.get('seed', 0)),
      format=self._choice(data.get('format'), FORMATS, 'format'),
      untie=self._flag(data.get('untie', False), 'untie'),
      vocab=self._choice(data.get('vocab'), VOCAB_POLICIES, 'vocab policy'),
      ignore_config=tuple(
        self._names(data.get('ignore_config'), 'ignore_config')
      ),
      tokenizer=self._name(tokenizer, 'tokenizer_source'),
      chat_template=self._template(data.get('chat_template')),
      data=data,
    )

  def _method(self, name):
    if name is None:
      self.problems.append("the recipe lacks 'merge_method'.")
      return None
    name = _METHOD_ALIASES.get(str(name), str(name))
    if name not in set(named.METHODS):
      # dare-ties is a common way to write dare_ties.
      self.problems.append(errors.near(name, named.METHODS, 'merge method'))
      return None
    return name

  def _modules(self, data, method, base):
    if 'modules' not in data:
      return ()
    if 'models' in data or 'slices' in data:
      self.problems.append("give one of 'models', 'slices' and 'modules'.")
    return recipe_modules.read(
      data['modules'],
      mapping=self._mapping,
      slices=lambda entry: self._slices(entry, method, base),
      parameters=lambda own, what: self._parameters(own, method, what),
    )

  def _slices(self, data, method, base):
    entries = data.get('models')
    if (entries is None) == (data.get('slices') is None):
      self.problems.append("give either 'models' or 'slices', and not both.")
      return (), False
    if entries is not None:
      inputs = self._inputs(entries, method, 'models', False)
      return (Slice(inputs, base, {}),), False
    slices = []
    if not isinstance(data['slices'], list) or not data['slices']:
      self.problems.append("'slices' must be a list of `- sources: [...]`.")
      return (), True
    for i, entry in enumerate(data['slices']):
      what = f'slice {i}'
      known = ('sources', 'base_model', 'parameters', 'residual_weight')
      if not self._mapping(entry, known, what):
        continue
      if entry.get('residual_weight') is not None:
        self.problems.append(f'{what}: residual_weight is not supported.')
      inputs = self._inputs(entry.get('sources'), method, what, True)
      lengths = {b - a for a, b in (x.layers for x in inputs if x.layers)}
      if len(lengths) > 1:
        self.problems.append(
          f'{what}: its sources have {sorted(lengths)} layers; they must have '
          'the same number.'
        )
      slices.append(
        Slice(
          inputs,
          self._name(entry.get('base_model'), 'base_model') or base,
          self._parameters(entry.get('parameters'), method, what),
        )
      )
    return tuple(slices), True

  def _inputs(self, entries, method, what, with_layers):
    if not isinstance(entries, list) or not entries:
      self.problems.append(f'{what} must be a list of `- model: PATH`.')
      return ()
    inputs = []
    for i, entry in enumerate(entries):
      entry = {'model': entry} if isinstance(entry, str) else entry
      known = ('model', 'parameters') + (
        ('layer_range',) if with_layers else ()
      )
      where = f'entry {i} of {what}'
      if not self._mapping(entry, known, where):
        continue
      if not isinstance(entry.get('model'), (str, dict)):
        self.problems.append(f"{where} lacks 'model'.")
        continue
      layers = None
      if with_layers:
        layers = self._layers(entry.get('layer_range'), where)
      inputs.append(
        Input(
          self._name(entry['model'], 'model'),
          self._parameters(
            entry.get('parameters'), method, f'parameters of {entry["model"]}'
          ),
          layers,
        )
      )
    return tuple(inputs)

  def _layers(self, value, where):
    good = (
      isinstance(value, (list, tuple))
      and len(value) == 2
      and all(type(n) is int for n in value)
      and 0 <= value[0] < value[1]
    )
    if not good:
      self.problems.append(
        f'{where}: layer_range must be [first, end] with 0 <= first < end, '
        f'not {value!r}.'
      )
      return None
    return tuple(value)

  def _parameters(self, data, method, what):
    if data is None:
      return {}
    if not self._mapping(data, None, what):
      return {}
    result = {}
    for key, value in data.items():
      name = _OPTION_ALIASES.get(key, key)
      if key in _WITHOUT_EFFECT:
        continue
      if key == 'nuslerp_row_wise':
        name = 'axis'
        value = 'input_feature' if value else 'output_unit'
      if name == 'rescale' and isinstance(value, bool):
        value = 'l1' if value else 'none'
      if method is not None and not self._known_option(method, name):
        options = [o for o in named.METHODS.options(method)]
        options = ['lambda' if o == 'scale' and method != 'passthrough' else o for o in options]  # fmt: skip
        self.problems.append(
          errors.near(
            str(key), ['weight', *options], f'option of {method} in {what},'
          )
        )
        continue
      value = settings.with_numbers(value)
      problem = settings.problem_of(value)
      if problem:
        self.problems.append(f'{what}: {key}: {problem}')
      result[name] = value
    return result

  def _known_option(self, method, name):
    options = named.METHODS.options(method)
    # mergekit's task arithmetic takes, and does not use, both.
    unused = method == 'task_arithmetic' and name in ('density', 'rescale')
    return name == 'weight' or name in options or unused

  def _rules(self, data, method):
    rules = []
    for i, entry in enumerate(data or []):
      what = f'rule {i}'
      known = ('match', 'copy', 'method', 'parameters')
      if not self._mapping(entry, known, what):
        continue
      try:
        re.compile(str(entry.get('match')))
      except re.error as error:
        self.problems.append(f'{what}: match is not a regular expression: {error}.')  # fmt: skip
      if 'match' not in entry:
        self.problems.append(f"{what} lacks 'match'.")
      own = self._method(entry['method']) if 'method' in entry else None
      rules.append(
        Rule(
          str(entry.get('match')),
          self._name(entry.get('copy'), 'copy'),
          own,
          self._parameters(entry.get('parameters'), own or method, what),
        )
      )
    return tuple(rules)

  def _axes(self, data):
    rules = []
    for entry in data or []:
      good = (
        isinstance(entry, (list, tuple))
        and len(entry) == 2
        and isinstance(entry[1], list)
      )
      if not good:
        self.problems.append(
          "'axes' must be a list of `[regular expression, [axis names]]`."
        )
        continue
      rules.append((str(entry[0]), tuple(map(str, entry[1]))))
    return tuple(rules)

  def _names(self, data, what):
    if data is None:
      return []
    if not isinstance(data, list):
      self.problems.append(f'{what!r} must be a list of paths.')
      return []
    return [str(name) for name in data]

  def _name(self, value, what):
    if value is None:
      return None
    if isinstance(value, dict):
      # mergekit's long form of `path+adapter`.
      inner = value.get('model', value)
      if isinstance(inner, dict):
        inner = inner.get('path')
      lora = value.get('lora')
      if isinstance(lora, dict):
        lora = lora.get('path')
      value = f'{inner}+{lora}' if lora else inner
    if not isinstance(value, str):
      self.problems.append(f'{what!r} must be a path or a word, not {value!r}.')
      return None
    return value

  def _template(self, value):
    """A Jinja text; 'auto' keeps that of the tokenizer, which is copied."""
    if value in (None, 'auto'):
      return None
    if not isinstance(value, str) or '{' not in value:
      self.problems.append(
        f"'chat_template' must be 'auto' or the text of a template, not "
        f'{value!r}: templates are not known by name here.'
      )
      return None
    return value

  def _choice(self, value, choices, what):
    if value is not None and value not in choices:
      self.problems.append(errors.near(str(value), choices, what))
      return None
    return value

  def _flag(self, value, what):
    if not isinstance(value, bool):
      self.problems.append(f'{what!r} must be true or false, not {value!r}.')
    return bool(value)

  def _seed(self, value):
    if type(value) is not int:
      self.problems.append(f"'seed' must be a whole number, not {value!r}.")
      return 0
    return value

  def _mapping(self, data, known, what):
    if not isinstance(data, dict):
      self.problems.append(f'the {what} must be `key: value` lines.')
      return False
    for key in data:
      if known is not None and key not in known:
        close = difflib.get_close_matches(str(key), known, n=1)
        hint = f' Did you mean {close[0]!r}?' if close else ''
        self.problems.append(
          f'unknown key {key!r} in the {what}.{hint} Known: {", ".join(known)}.'
        )
    return True
