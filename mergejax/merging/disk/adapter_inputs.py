# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The models of a recipe that makes an adapter: adapters, by what they change."""

import pathlib

from mergejax.adapters import changes
from mergejax.checkpoints import base as store_base
from mergejax.checkpoints.peft import fold
from mergejax.core import errors
from mergejax.merging import adapters
from mergejax.merging.disk import companions
from mergejax.merging.disk import inputs


class AdapterInputs(inputs.Inputs):
  """Opened adapters, and what stands for their base; see `Inputs`.

  A base has no leaf of an adapter: in its place is the adapter that changes
  nothing, or the one that all were begun from.
  """

  def _open_model(self, name):
    recipe = self._recipe
    if name == recipe.base and not fold.is_adapter(name):
      return self._open_weights(name)
    base, adapter = changes.parts(name)
    if adapter and base != recipe.base:
      raise errors.RecipeError(
        f'{name} names a base of its own, and the adapters of a result in '
        '`format: adapter` have one base: give it as `base_model:`, and the '
        'adapters as models.'
      )
    return changes.ChangeStore(adapter or base, recipe.adapter.space)

  def _prepare(self):
    recipe = self._recipe
    base = self.stores.get(recipe.base)
    own = {n: s for n, s in self.stores.items() if n != recipe.base}
    begun = isinstance(base, changes.ChangeStore)
    neutral = self.attempt(
      adapters.gather, [*own.values()], base if begun else recipe.base,
      recipe.base,
    )  # fmt: skip
    self.raise_problems()
    if not begun and recipe.base is not None:
      self._stand_in(neutral, next(iter(own.values())))
    self.opened = dict(self.stores)
    self.configs = dict.fromkeys(self.stores)
    self.tokenizer = companions.Tokenizer(pathlib.Path(self.reference))
    self._note(own)

  def _stand_in(self, neutral: store_base.ParamStore | None, first):
    """Puts what stands for the base in its place."""
    recipe = self._recipe
    del self.stores[recipe.base]
    if neutral is not None:
      self.stores = {recipe.base: neutral, **self.stores}
    elif recipe.entry.base_policy == 'required':
      error = adapters.no_start(recipe.entry.name, first.kind)
      raise errors.RecipeError(error.message)
    elif any(one.model == recipe.base for one in recipe.slices[0].inputs):
      raise errors.RecipeError(
        f'{recipe.entry.name} takes the base as one more model here, and no '
        f'{first.kind} ({first.space}) stands for it. Give `weight` model by '
        'model, or leave `base_model` out.'
      )
    else:  # nobody looks at it
      self.stores = {recipe.base: first, **self.stores}

  def _note(self, own):
    first = next(iter(own.values()))
    self.remarks.append(
      f'the result is an adapter ({first.kind}), merged in the space '
      f'{first.space}' + self._describe_rank(first)
    )
    silent = [name for name, one in own.items() if one.base is None]
    names = {one.config.get('base_model_name_or_path') for one in own.values()}
    if silent:
      told = errors.some(sorted(name for name in names if name))
      self.remarks.append(
        f'{errors.some(silent)} carry no fingerprint of their base'
        + (f', which they call {told}' if told else '')
        + ': that it is the same cannot be checked'
      )
    specs = first.specs()
    for name, one in own.items():
      absent = [path for path in specs if path in one.absent]
      if absent:
        self.remarks.append(
          f'{name} leaves {len(absent)} leaves as they are that others change '
          f'(first: {absent[0]})'
        )

  def _describe_rank(self, first):
    if first.space != changes.DELTA:
      return ''
    rank = self._recipe.adapter.rank
    return f', and written at rank {rank}'
