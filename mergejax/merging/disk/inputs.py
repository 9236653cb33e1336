# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The models of a recipe, opened and brought to a common form.

Adapters are folded, embedding rows put in one order, heads tied or untied:
what comes after sees models of one architecture.
"""

from collections.abc import Callable
import os
import pathlib
import re
from typing import Any

from mergejax.adapters import changes
from mergejax.checkpoints import base as store_base
from mergejax.checkpoints import buffers
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import ties
from mergejax.checkpoints import vocabulary
from mergejax.checkpoints.peft import fold
from mergejax.core import errors
from mergejax.merging import adapters
from mergejax.merging.disk import companions
from mergejax.merging.disk import vocabularies
from mergejax.merging.recipes import recipe as recipe_lib
from mergejax.models import architectures
from mergejax.statistics import saved


class Inputs:
  """Opened models, or problems.

  Attributes:
    problems: what is wrong, in words.
    remarks: choices that a reader of the plan should know.
    stores: the models by name, in a common form.
    opened: the same, as they are stored.
    stats: statistics' stores, in the order of the models.
    configs: `{name: its config.json, or None}`.
    reference: name of the base, or of the first model.
    tied: `{alias: path}` of the result.
    repeated: `{model: {alias: path}}` that must prove equal.
    config: changes to the reference's configuration.
    tokenizer: of the result.
  """

  def __init__(
    self, recipe: recipe_lib.Recipe, sandbox: os.PathLike | str | None
  ):
    """Opens, and raises `UserError` with all problems if there are any."""
    self._recipe = recipe
    self._sandbox = sandbox and pathlib.Path(sandbox).resolve()
    self.problems: list[str] = []
    # Of problems that were raised; all others are mistakes of the recipe.
    self._kinds: dict[str, type[errors.UserError]] = {}
    self.remarks: list[str] = []
    self.stores: dict[str, store_base.ParamStore] = {}
    self.stats: list[store_base.ParamStore] = []
    self.tied: dict = {}
    self.repeated: dict = {}
    self.config: dict[str, Any] = {}
    self.configs: dict[str, Any] = {}
    self.opened: dict[str, store_base.ParamStore] = {}
    self._open()
    self.raise_problems()
    self.reference = recipe.base or recipe.slices[0].inputs[0].model
    self._prepare()

  def _prepare(self):
    """Brings the models to a common form."""
    self.configs = {
      name: self.attempt(checkpoint.read_config, self.folder(name))
      for name in self.stores
    }
    self._check_configs()
    self.opened = dict(self.stores)
    # Heads first: whoever lacks one has no rows to give.
    self._tie()
    self.tokenizer = vocabularies.align(self, self._recipe)
    self._leave_out_buffers()
    self.raise_problems()
    self._note_companions()
    self.raise_problems()

  def _note_companions(self):
    """Tells which files beside the reference the result will not have."""
    folder = self.folder(self.reference)
    found = companions.find(
      folder, self.tokenizer.folder, self.stores[self.reference]
    )
    self.remarks += found.remarks(folder)
    for file, name in found.copied:
      if name in companions.REWRITTEN:
        self.attempt(checkpoint.read_json, file)

  def raise_problems(self) -> None:
    """Raises with every problem so far, if there is any.

    Raises:
      UserError: of the kind that all problems have, else `RecipeError`.
    """
    lines = list(dict.fromkeys(self.problems))
    kinds = {self._kinds.get(line, errors.RecipeError) for line in lines}
    kind = kinds.pop() if len(kinds) == 1 else errors.RecipeError
    if len(lines) == 1:
      raise kind(lines[0])
    if lines:
      raise kind(
        f'This merge cannot run, for {len(lines)} reasons:\n'
        f'{errors.listed(lines, 40)}'
      )

  def attempt(self, function: Callable, *args) -> Any:
    """Calls a function; a `UserError` becomes a problem, and None the result."""
    try:
      return function(*args)
    except errors.UserError as error:
      self.problems.append(error.message)
      self._kinds[error.message] = type(error)
      return None

  def donor(self, path: str) -> str | None:
    """The model that a rule copies a parameter from, or None."""
    for rule in self._recipe.rules:
      if re.fullmatch(rule.match, path):
        return self._recipe.base if rule.copy == 'base' else rule.copy
    return None

  def _inside(self, name):
    if self._sandbox is None:
      return True
    for part in filter(None, changes.parts(name)):
      place = pathlib.Path(part).expanduser().resolve()
      if not place.is_relative_to(self._sandbox):
        self.problems.append(
          f'{part} lies outside the sandbox {self._sandbox}: paths of a recipe '
          'must stay inside it.'
        )
        return False
    return True

  def _open(self):
    recipe = self._recipe
    for name in recipe.models():
      if self._inside(name):
        self.stores[name] = self.attempt(self._open_model, name)
        self._note_adapter(name)
    for name in recipe.stats:
      if self._inside(name):
        self.stats.append(self.attempt(checkpoint.open_checkpoint, name))
        if len(self.stats) <= len(recipe.slices[0].inputs):
          model = recipe.slices[0].inputs[len(self.stats) - 1].model
          self._check_fingerprint(name, model)
    tok = recipe.tokenizer
    if tok not in (None, 'base', 'union'):
      self._inside(tok)

  def _note_adapter(self, name):
    store, beside = self.stores[name], fold.left_beside(name)
    if isinstance(store, fold.AdapterStore):
      self.config.update(store.config)
      self.remarks += store.remarks
    elif beside:
      self.remarks.append(beside)

  def _check_fingerprint(self, name, model):
    store = self.stores.get(model)
    if self.stats[-1] is not None and store is not None:
      expected = self.attempt(saved.about, name)
      if expected:
        self.attempt(
          saved.check_fingerprint, model, store, name,
          expected.get('fingerprint'),
        )  # fmt: skip

  def _open_model(self, name):
    model, adapter = changes.parts(name)
    if adapter:
      return adapters.fold_into(self._open_weights(model), model, adapter)
    if fold.is_adapter(model):
      if not self._recipe.base:
        raise errors.RecipeError(
          f'{model} is an adapter: say what it was trained on with '
          f'`base_model:`, or write `model: BASE+{model}`.'
        )
      base = self._open_weights(self._recipe.base)
      return adapters.fold_into(base, self._recipe.base, model)
    return self._open_weights(model)

  def _open_weights(self, path):
    store = checkpoint.open_weights(path)
    left_out = store.provenance.get('left_out')
    if left_out:
      remark = f'of {path}, this is not merged: {", ".join(left_out)}'
      if remark not in self.remarks:
        self.remarks.append(remark)
    return store

  def folder(self, name: str) -> pathlib.Path:
    """Where the configuration and the tokenizer of a model lie."""
    return companions.folder_of(name, self._recipe.base)

  def _check_configs(self):
    """Models whose weights mean different things are not merged."""
    first = self.configs[self.reference]
    remarks = self.attempt(
      architectures.check,
      {self.reference: first, **self.configs},
      'If a field changes nothing here, say so in the recipe: '
      '`ignore_config: [FIELD]`.',
      self._recipe.ignore_config,
    )
    self.remarks += remarks or []

  # Tied heads ----------------------------------------------------------------

  def _tie(self):
    """Kept tied if every source is; untied on request; an error otherwise."""
    # What is stored and nothing calls an array of its own must prove equal; an
    # adapter has the configuration of its model, but may have parted the two.
    possible = {
      name: {
        alias: path
        for alias, path in ties.possible(
          store.specs(), self.configs[name]
        ).items()
        if alias not in getattr(self.opened[name], 'untied', ())
      }
      for name, store in self.stores.items()
    }
    names = {
      path: alias
      for own in possible.values()
      for alias, path in own.items()
      if not ties.always(alias)
    }
    tied = {}
    for name, store in self.opened.items():
      # A head that is not stored has the name that others store it under.
      tied[name] = {
        alias if alias in store.specs() else names.get(path, alias): path
        for alias, path in store.tied.items()
      }
    pairs = {a: p for own in tied.values() for a, p in own.items()}
    for alias, path in pairs.items():
      if self._recipe.untie and not ties.always(alias):
        self._untie(alias, path, tied)
      else:
        known = {name: {**possible[name], **tied[name]} for name in tied}
        self._keep_tied(alias, path, known)

  def _keep_tied(self, alias, path, known):
    specs = {name: store.specs() for name, store in self.stores.items()}
    loose = [name for name in specs if known[name].get(alias) != path]
    if ties.always(alias):
      loose = [name for name in loose if alias in specs[name]]
    if loose:
      there = [name for name in specs if name not in loose]
      self.problems.append(
        f'{alias} is tied to {path} in {", ".join(there)}, but not in '
        f'{", ".join(loose)}. `untie: true` gives every model a head of its '
        'own before merging.'
      )
      return
    for name, store in self.stores.items():
      if alias in specs[name]:
        folder = str(self.folder(name))
        self.repeated.setdefault(folder, {})[alias] = path
        self.stores[name] = vocabulary.AliasStore(store, {}, [alias])
    self.tied[alias] = path
    self.remarks.append(f'{alias} stays tied to {path}')

  def _untie(self, alias, path, tied):
    for name, store in self.stores.items():
      if tied[name].get(alias) == path and alias not in store.specs():
        self.stores[name] = vocabulary.AliasStore(store, {alias: path})
    self.config.update(ties.untied(self.configs[self.reference]))
    self.remarks.append(f'{alias} is untied from {path}')

  # Buffers -------------------------------------------------------------------

  def _leave_out_buffers(self):
    """Buffers that not all models store, in one size, are made anew by users."""
    shapes: dict[str, dict[str, set]] = {}
    for name, store in self.stores.items():
      for path, spec in store.specs().items():
        if buffers.is_buffer(path, spec) and self.donor(path) is None:
          kinds = shapes.setdefault(_template(path), {})
          kinds.setdefault(name, set()).add(spec.shape)
    left = {
      kind
      for kind, own in shapes.items()
      if len(own) < len(self.stores) or len(set.union(*own.values())) > 1
    }
    for name, store in self.stores.items():
      hidden = [path for path in store.specs() if _template(path) in left]
      if hidden:
        self.stores[name] = vocabulary.AliasStore(store, {}, hidden)
    if left:
      self.remarks.append(
        f'left out, as not all models store them and models make them anew: '
        f'{", ".join(sorted(left))}'
      )


def _template(path):
  """The same for every layer."""
  return re.sub(r'\d+', '#', path)
