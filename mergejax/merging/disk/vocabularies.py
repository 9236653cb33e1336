# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Embedding rows of several models, brought to one vocabulary.

Rows are matched by token where a recipe names a tokenizer, else by number.
"""

from typing import NamedTuple

import numpy as np

from mergejax.checkpoints import vocabulary
from mergejax.core import errors
from mergejax.core import typing
from mergejax.merging.disk import companions
from mergejax.merging.recipes import recipe as recipe_lib
from mergejax.names import known


class Leaves(NamedTuple):
  """What a model has of its vocabulary.

  Attributes:
    rows: how many its tables have; 0 without a table.
    own: those of so many rows; the first axis counts tokens.
    odd: those of another number of rows, or with tokens along another axis.
  """

  rows: int
  own: typing.SpecTree
  odd: typing.SpecTree


def leaves_of(specs: typing.SpecTree) -> Leaves:
  """Finds the parameters of a model that have a row for every token.

  Names are not enough: `embedding_norm` and small tables of sounds or colours
  are called like tables of tokens.

  Example:
    >>> import numpy as np
    >>> spec = lambda *shape: typing.LeafSpec(shape, np.dtype('float32'))
    >>> leaves_of({
    ...   'embed_tokens.weight': spec(9, 4), 'embedding_norm.weight': spec(4),
    ... }).own
    {'embed_tokens.weight': LeafSpec(shape=(9, 4), dtype=dtype('float32'), axes=None)}
  """
  named = {
    path: spec
    for path, spec in specs.items()
    if (known.TABLE.fullmatch(path) and len(spec.shape) == 2)
    or (known.HEAD.fullmatch(path) and len(spec.shape) in (1, 2))
  }
  rows = max(
    (s.shape[0] for s in named.values() if len(s.shape) == 2), default=0
  )
  own = {path: s for path, s in named.items() if s.shape[0] == rows}
  odd = {
    path: spec
    for path, spec in specs.items()
    if (path in named and rows / 2 < spec.shape[0] < rows)
    or (known.TURNED.fullmatch(path) and rows and spec.shape[-1] == rows)
  }
  return Leaves(rows, own, odd)


def align(inputs, recipe: recipe_lib.Recipe) -> companions.Tokenizer:
  """Wraps the models whose rows lie otherwise than those of the result.

  Args:
    inputs: the models, `inputs.Inputs`; its stores are replaced, its problems
      and remarks added to, and `vocab_size` put into its configuration.
    recipe: whose `tokenizer`, `tokens` and `vocab` say what the rows are.

  Returns:
    The tokenizer of the result.
  """
  return _Vocabularies(inputs, recipe).align()


class _Vocabularies:
  """The vocabularies of the models of one recipe."""

  def __init__(self, inputs, recipe):
    self._inputs = inputs
    self._recipe = recipe

  def align(self) -> companions.Tokenizer:
    recipe = self._recipe
    if recipe.tokenizer is not None and recipe.vocab is not None:
      self._inputs.problems.append(
        "give 'tokenizer' (rows by token) or 'vocab' (rows by number), not both."
      )
    self._leaves = {
      name: leaves_of(store.specs())
      for name, store in self._inputs.stores.items()
    }
    paths = {name: found.own for name, found in self._leaves.items()}
    if recipe.tokenizer is not None:
      return self._by_token(paths)
    sizes = {n: found.rows for n, found in self._leaves.items() if found.rows}
    if len(set(sizes.values())) > 1:
      if recipe.vocab is None:
        listing = ', '.join(f'{name}: {size}' for name, size in sizes.items())
        self._inputs.problems.append(
          f'The vocabularies differ in size ({listing}). Say what to do: '
          '`tokenizer: {source: union}` matches rows by token; `vocab: base`, '
          '`union` or `pad` by number.'
        )
      else:
        self._by_number(paths, sizes)
    return companions.Tokenizer(self._inputs.folder(self._inputs.reference))

  def _by_number(self, paths, sizes):
    policy = self._recipe.vocab
    count = (
      sizes[self._inputs.reference] if policy == 'base' else max(sizes.values())
    )
    rows = {}
    for name, own in paths.items():
      rows[name] = {
        path: np.where(np.arange(count) < spec.shape[0], np.arange(count), -1)
        for path, spec in own.items()
      }
      self._check_rows(name, np.arange(count), count != self._leaves[name].rows)
    if self._inputs.problems:
      return
    self._wrap_rows(rows, zeros=policy == 'pad')
    self._inputs.config['vocab_size'] = count
    self._inputs.remarks.append(
      f'vocabularies of {sorted(set(sizes.values()))} rows: the result has '
      f'{count} (policy {policy!r})'
    )

  def _by_token(self, paths):
    recipe, reference = self._recipe, self._inputs.reference
    tokens = {}
    for name in self._inputs.stores:
      tokens[name] = self._inputs.attempt(self._tokens_of, name, paths)
    source = recipe.tokenizer
    if source not in ('base', 'union') and source not in tokens:
      tokens[source] = self._inputs.attempt(vocabulary.read_tokens, source)
    if self._inputs.problems:
      return companions.Tokenizer(self._inputs.folder(reference))
    owner = reference if source in ('base', 'union') else source
    wanted, least = self._wanted(tokens, paths, owner)
    multiple = recipe.row_multiple or 1
    count = -(-least // multiple) * multiple
    rows = {}
    for name, own in paths.items():
      order = self._order(wanted, tokens[name], count)
      order[least:] = -1
      self._check_rows(name, order, wanted != tokens[name])
      rows[name] = {
        path: np.where(order < spec.shape[0], order, -1)
        for path, spec in own.items()
      }
    chosen = [
      self._inputs.attempt(
        self._chosen_row, token, wanted[token], tokens, paths
      )
      for token in recipe.tokens
    ]
    if self._inputs.problems:
      return companions.Tokenizer(self._inputs.folder(reference))
    self._wrap_rows(rows, chosen=chosen, padding=least)
    self._inputs.config['vocab_size'] = count
    added = len(set(wanted) - set(tokens[reference]))
    self._inputs.remarks.append(
      f'tokenizer {source!r}: {len(wanted)} tokens, {added} of them not in '
      f'{reference}; embedding rows are matched by token'
      + (f'; {count} rows' if count != least else '')
    )
    folder = self._inputs.folder(owner)
    if not set(wanted) - set(tokens[owner]):
      return companions.Tokenizer(folder)
    donors = [str(self._inputs.folder(name)) for name in tokens]
    text = vocabulary.extended_tokenizer(str(folder), wanted, donors)
    return companions.Tokenizer(folder, text)

  def _wanted(self, tokens, paths, owner):
    """`({token: row}, rows)` of the result, before rows that only fill up."""
    union = self._recipe.tokenizer == 'union'
    wanted = tokens[owner]
    if union:
      first = [owner, *(name for name in tokens if name != owner)]
      wanted = vocabulary.union([tokens[name] for name in first])
    last = max(wanted.values())
    new = [token for token in self._recipe.tokens if token not in wanted]
    wanted = {**wanted, **{t: last + 1 + i for i, t in enumerate(new)}}
    least = max(wanted.values()) + 1
    if not union:
      # Rows past the last token are padding that the model has.
      sizes = [spec.shape[0] for spec in paths.get(owner, {}).values()]
      least = max([least, *sizes])
    return wanted, least

  def _order(self, wanted, tokens, count):
    """`<int64>[count]`: for each row of the result that of a model, or -1."""
    order = np.arange(count)  # rows of no token are padding, and stay
    order[[row for row in tokens.values() if row < count]] = -1
    for token, row in wanted.items():
      order[row] = tokens.get(token, -1)
    return order

  def _check_rows(self, name, order, reordered):
    """Refuses to reorder some parameters of the vocabulary and not others."""
    rows, own, odd = self._leaves[name]
    same = len(order) == rows and np.array_equal(order, np.arange(rows))
    if odd and not same:
      lines = [f'{path} {list(spec.shape)}' for path, spec in odd.items()]
      self._inputs.problems.append(
        f'{name}: embedding rows are to be put in another order or number, and '
        f'these parameters of its {rows} tokens cannot follow:\n'
        f'{errors.listed(lines)}'
      )
    if reordered and not own:
      self._inputs.problems.append(
        f'{name}: its tokens lie at other rows, and no parameter has the name '
        'of an embedding table.'
      )

  def _tokens_of(self, name, paths) -> dict[str, int]:
    """A model's tokens; of a bare one with equal rows, the reference's."""
    folder = self._inputs.folder(name)
    shapes = [
      {path: spec.shape for path, spec in paths[n].items()}
      for n in (name, self._inputs.reference)
    ]
    file = folder / vocabulary.TOKENIZER
    if (
      not file.exists()
      and name != self._inputs.reference
      and shapes[0] == shapes[1]
    ):
      self._inputs.remarks.append(
        f'{name} has no {vocabulary.TOKENIZER}: its rows are taken to be those '
        f'of {self._inputs.reference}, as in mergekit'
      )
      return self._tokens_of(self._inputs.reference, paths)
    return vocabulary.read_tokens(str(folder))

  def _chosen_row(self, token, row, tokens, paths) -> vocabulary.ChosenRow:
    """The row that the recipe says a token has."""
    source = self._recipe.tokens[token]
    if source.model is None:
      return vocabulary.ChosenRow(row, None, -1, source.force)
    if source.model not in self._inputs.stores:
      raise errors.CheckpointError(
        f'token {token!r}: {source.model} is none of the models that are merged.'
      )
    at = source.row
    if at is None:
      wanted = token if source.token is None else source.token
      at = tokens[source.model].get(wanted)
      if at is None:
        raise errors.CheckpointError(
          f'token {token!r}: {source.model} has no token {wanted!r}.'
        )
    sizes = [spec.shape[0] for spec in paths[source.model].values()]
    if at >= min(sizes, default=0):
      raise errors.CheckpointError(
        f'token {token!r}: row {at} of {source.model}, which has '
        f'{min(sizes, default=0)}.'
      )
    return vocabulary.ChosenRow(
      row, self._inputs.stores[source.model], at, source.force
    )

  def _wrap_rows(self, rows, zeros=False, chosen=(), padding=None):
    forced = [one.row for one in chosen if one.force]
    plain = dict(self._inputs.stores)
    base = self._recipe.base
    for name, store in plain.items():
      same = all(
        len(order) == store.specs()[path].shape[0]
        and np.array_equal(order, np.arange(len(order)))
        for path, order in rows[name].items()
      )
      if same and not forced:
        continue
      fallbacks, others = [], []
      if not zeros:
        if base and name != base:
          fallbacks = [(plain[base], rows[base])]
        others = [(plain[n], rows[n]) for n in plain if n != name]
      self._inputs.stores[name] = vocabulary.RowsStore(
        store, rows[name], fallbacks, others, chosen, padding
      )
