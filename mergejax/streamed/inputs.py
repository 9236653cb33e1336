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

import numpy as np

from mergejax import errors
from mergejax import recipe as recipe_lib
from mergejax.peft import fold
from mergejax.stats import saved
from mergejax.store import base as store_base
from mergejax.store import checkpoint
from mergejax.store import vocabulary
from mergejax.streamed import companions

_EMBEDDING = re.compile(
  r'(.*[./])?(embed\w*|wte|shared|token_embedder|word_embeddings)[./]'
  r'(weight|embedding)|(.*[./])?(lm_head|embed_out)\.weight'
)


class Inputs:
  """Opened models, or problems.

  Attributes:
    problems: what is wrong, in words.
    remarks: choices that a reader of the plan should know.
    stores: the models by name.
    stats: statistics' stores, in the order of the models.
    reference: name of the base, or of the first model.
    tied: `{alias: path}` of the result.
    repeated: `{model: {alias: path}}` that must prove equal.
    config: changes to the reference's configuration.
    tokenizer: `('copy', model)`, or `('text', tokenizer.json)`.
  """

  def __init__(
    self, recipe: recipe_lib.Recipe, sandbox: os.PathLike | str | None
  ):
    """Opens, and raises `UserError` with all problems if there are any."""
    self._recipe = recipe
    self._sandbox = sandbox and pathlib.Path(sandbox).resolve()
    self.problems: list[str] = []
    self.remarks: list[str] = []
    self.stores: dict[str, store_base.ParamStore] = {}
    self.stats: list[store_base.ParamStore] = []
    self.tied: dict = {}
    self.repeated: dict = {}
    self.config: dict[str, Any] = {}
    self._open()
    self.raise_problems()
    self.reference = recipe.base or recipe.slices[0].inputs[0].model
    self.tokenizer = self._align_vocabularies()
    self._tie()
    self.raise_problems()
    self._note_companions()
    self.raise_problems()

  def _note_companions(self):
    """Tells which files beside the reference the result will not have."""
    folder = companions.folder_of(self.reference, self._recipe.base)
    kind, source = self.tokenizer
    found = companions.find(
      folder,
      folder if kind == 'text' else pathlib.Path(source).expanduser(),
      self.stores[self.reference],
    )
    self.remarks += found.remarks(folder)
    for file, name in found.copied:
      if name in companions.REWRITTEN:
        self.attempt(checkpoint.read_json, file)

  def raise_problems(self) -> None:
    """Raises with every problem so far, if there is any."""
    lines = list(dict.fromkeys(self.problems))
    if len(lines) == 1:
      raise errors.UserError(lines[0])
    if lines:
      raise errors.UserError(
        f'This merge cannot run, for {len(lines)} reasons:\n'
        f'{errors.listed(lines, 40)}'
      )

  def attempt(self, function: Callable, *args) -> Any:
    """Calls a function; a `UserError` becomes a problem, and None the result."""
    try:
      return function(*args)
    except errors.UserError as error:
      self.problems.append(error.message)
      return None

  def _inside(self, name):
    if self._sandbox is None:
      return True
    for part in name.split('+'):
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
    for name in recipe.stats:
      if self._inside(name):
        self.stats.append(self.attempt(checkpoint.open_checkpoint, name))
        if len(self.stats) <= len(recipe.slices[0].inputs):
          model = recipe.slices[0].inputs[len(self.stats) - 1].model
          self._check_fingerprint(name, model)
    tok = recipe.tokenizer
    if tok not in (None, 'base', 'union'):
      self._inside(tok)

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
    model, _, adapter = name.partition('+')
    if adapter:
      return fold.AdapterStore(self._open_weights(model), adapter)
    if fold.is_adapter(model):
      if not self._recipe.base:
        raise errors.UserError(
          f'{model} is an adapter: say what it was trained on with '
          f'`base_model:`, or write `model: BASE+{model}`.'
        )
      base = self._open_weights(self._recipe.base)
      return fold.AdapterStore(base, model)
    return self._open_weights(model)

  def _open_weights(self, path):
    store = checkpoint.open_weights(path)
    left_out = store.provenance.get('left_out')
    if left_out:
      remark = f'of {path}, this is not merged: {", ".join(left_out)}'
      if remark not in self.remarks:
        self.remarks.append(remark)
    return store

  # Vocabularies and tied heads ------------------------------------------------

  def _align_vocabularies(self) -> tuple[str, str]:
    recipe = self._recipe
    if recipe.tokenizer is not None and recipe.vocab is not None:
      self.problems.append(
        "give 'tokenizer' (rows by token) or 'vocab' (rows by number), not both."
      )
    paths = {
      name: {p: s for p, s in store.specs().items() if _EMBEDDING.fullmatch(p)}
      for name, store in self.stores.items()
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
        self.problems.append(
          f'The vocabularies differ in size ({listing}). Say what to do: '
          '`tokenizer: {source: union}` matches rows by token; `vocab: base`, '
          '`union` or `pad` by number.'
        )
      else:
        self._by_number(paths, sizes)
    return ('copy', self.reference.split('+')[0])

  def _by_number(self, paths, sizes):
    policy = self._recipe.vocab
    count = sizes[self.reference] if policy == 'base' else max(sizes.values())
    rows = {}
    for name, own in paths.items():
      rows[name] = {
        path: np.where(np.arange(count) < spec.shape[0], np.arange(count), -1)
        for path, spec in own.items()
      }
    self._wrap_rows(rows, zeros=policy == 'pad')
    self.config['vocab_size'] = count
    self.remarks.append(
      f'vocabularies of {sorted(set(sizes.values()))} rows: the result has '
      f'{count} (policy {policy!r})'
    )

  def _by_token(self, paths):
    recipe = self._recipe
    tokens = {}
    for name in self.stores:
      folder = name.split('+')[0]
      if fold.is_adapter(folder):
        folder = recipe.base
      tokens[name] = self.attempt(vocabulary.read_tokens, folder)
    source = recipe.tokenizer
    if source not in ('base', 'union') and source not in tokens:
      tokens[source] = self.attempt(vocabulary.read_tokens, source)
    if self.problems:
      return ('copy', self.reference)
    if source == 'union':
      first = [self.reference, *(n for n in tokens if n != self.reference)]
      wanted = vocabulary.union([tokens[name] for name in first])
    else:
      wanted = tokens[self.reference if source == 'base' else source]
    least = max(wanted.values()) + 1
    if source != 'union':
      # Rows past the last token are padding that the model has.
      own = [s.shape[0] for s in paths.get(
        self.reference if source == 'base' else source, {}
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
    self.config['vocab_size'] = least
    new = len(set(wanted) - set(tokens[self.reference]))
    self.remarks.append(
      f'tokenizer {source!r}: {len(wanted)} tokens, {new} of them not in '
      f'{self.reference}; embedding rows are matched by token'
    )
    folder = self.reference if source in ('base', 'union') else source
    folder = folder.split('+')[0]
    if source == 'union' and new:
      donors = [name.split('+')[0] for name in tokens]
      return ('text', vocabulary.extended_tokenizer(folder, wanted, donors))
    return ('copy', folder)

  def _wrap_rows(self, rows, zeros=False):
    plain = dict(self.stores)
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
      self.stores[name] = vocabulary.RowsStore(
        store, rows[name], fallbacks, others
      )

  def _tie(self):
    """Kept tied if every source is; untied on request; an error otherwise."""
    tied = {n: dict(s.tied) for n, s in self.stores.items() if s.tied}
    if not tied:
      return
    loose = [n for n in self.stores if n not in tied]
    head, embedding = next(iter(next(iter(tied.values())).items()))
    if not loose and not self._recipe.untie:
      for name, store in self.stores.items():
        stored = [alias for alias in tied[name] if alias in store.specs()]
        if stored:
          self.repeated[name] = {a: tied[name][a] for a in stored}
          self.stores[name] = vocabulary.AliasStore(store, {}, stored)
      self.tied = {head: embedding}
      self.remarks.append(f'{head} stays tied to {embedding}')
      return
    if self._recipe.untie:
      for name in tied:
        missing = {
          a: p for a, p in tied[name].items()
          if a not in self.stores[name].specs()
        }  # fmt: skip
        self.stores[name] = vocabulary.AliasStore(self.stores[name], missing)
      self.config['tie_word_embeddings'] = False
      self.remarks.append(f'{head} is untied from {embedding}')
      return
    self.problems.append(
      f'{head} is tied to {embedding} in {", ".join(tied)}, but not in '
      f'{", ".join(loose)}. `untie: true` gives every model a head of its own '
      'before merging.'
    )
