# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A folder of adapters of one base: which there are, and each put to work."""

from collections.abc import Iterator
import os
import pathlib
from typing import Any

from mergejax import models
from mergejax.adapters import adapted as adapted_lib
from mergejax.adapters import banks
from mergejax.adapters import saved
from mergejax.adapters import sites
from mergejax.checkpoints.peft import fold
from mergejax.core import errors
from mergejax.core import typing


class Library:
  """Adapters on disk, each a directory in PEFT's format, by name.

  Whoever chooses among whole experts chooses among `experts(model, params)`:
  `mj.select.rank` by LogME or LEEP, the domain posterior of
  `mj.experts.ensemble` from their likelihoods of a text, nearness to what they
  were trained on by `mj.experts.AdapterRouter`.

  Attributes:
    path: the folder.
    cards: `{name: what it is}`, in the order of their names.

  Example:
    >>> import jax, tempfile
    >>> import mergejax as mj
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> module = models.build({'model_type': 't5x', 'emb_dim': 8, 'num_heads': 2,
    ...   'head_dim': 4, 'mlp_dim': 8, 'num_encoder_layers': 1,
    ...   'num_decoder_layers': 1})
    >>> family = adapted_lib.adapt(module, mj.adapters.ia3())
    >>> base = models.family_of(module).init(jax.random.key(0))
    >>> saved.save(folder / 'books', family, family.start(base, jax.random.key(1)))
    >>> library = Library(folder)
    >>> library.cards['books'].kind
    'ia3'
    >>> [name for name, _, _ in library.experts(module, base)]
    ['books']
  """

  def __init__(self, path: os.PathLike | str):
    """Lists a folder; reads headers only.

    Raises:
      CheckpointError: there is no adapter in it, or one of a kind that is not
        put to work here.
    """
    self.path = pathlib.Path(path).expanduser()
    inside = sorted(self.path.iterdir()) if self.path.is_dir() else []
    self.cards = {one.name: saved.card(one) for one in inside if _is_one(one)}
    if not self.cards:
      raise errors.CheckpointError(
        f'{path} holds no adapter: a library is a folder of directories that '
        f'each have {fold.CONFIG}.'
      )

  def load(
    self, name: str, model: Any, params: typing.Tree | None = None
  ) -> tuple[adapted_lib.Adapted, typing.Tree]:
    """`(family, leaves)` of one adapter; see `adapters.load`.

    Raises:
      UserError: no adapter of this name; see `adapters.load`.
    """
    if name not in self.cards:
      raise errors.ConfigError(errors.near(name, self.cards, 'adapter'))
    return saved.load(self.path / name, model, params)

  def check(self, fingerprint: str) -> None:
    """Refuses a base that some adapter was not trained on, by what they tell.

    Args:
      fingerprint: of the base, `mj.stats.fingerprint(params)`.

    Raises:
      CheckpointError: with all that are of another base.
    """
    lines = [
      f'{name}: {card.base[1]}'
      for name, card in self.cards.items()
      if card.base[1] not in (None, fingerprint)
    ]
    if lines:
      raise errors.CheckpointError(
        f'Of the adapters in {self.path} these were trained on another base than '
        f'the one given ({fingerprint}):\n{errors.listed(lines)}'
      )

  def experts(
    self, model: Any, params: typing.Tree
  ) -> Iterator[tuple[str, models.ModelFamily, typing.Tree]]:
    """`(name, family, params)` of the base with each adapter, one by one.

    The base's leaves are the same arrays in all of them.

    Args:
      model: the base's module or family.
      params: the base's parameters.

    Raises:
      UserError: an adapter of another base, or that does not fit the model.
    """
    for name in self.cards:
      family, leaves = self.load(name, model, params)
      yield name, family, family.joined(params, leaves)

  def bank(
    self, model: Any, params: typing.Tree
  ) -> tuple[adapted_lib.Adapted, typing.Tree]:
    """All adapters at once, each row of a batch with its own by `expert_ids`.

    Args:
      model: the base's module or family.
      params: the base's parameters.

    Returns:
      `(family, params)` of the base with a `bank`, whose numbers go by the order
      of `cards`.

    Raises:
      ConfigError: adapters that are no LoRAs or scales of one form: of other
        targets or ranks, or prompts.
      UserError: see `experts`.
    """
    every = [self.load(name, model, params) for name in self.cards]
    first = every[0][0]
    form = first.adapter
    for name, (family, _) in zip(self.cards, every):
      if not isinstance(form, sites.LayerAdapter) or family.adapter != form:
        raise errors.ConfigError(
          f'{name} is {family.adapter}, and a bank holds adapters of layers of '
          f'one form, here {form}: take them one by one from `experts`.'
        )
    assert isinstance(form, sites.LayerAdapter)
    made = banks.bank(form, len(every))
    leaves = made.stack(first.base_specs, [own for _, own in every])
    family = adapted_lib.adapt(first.plain, made)
    return family, family.joined(params, leaves)

  def __str__(self) -> str:
    lines = []
    for name, card in self.cards.items():
      first, *more = str(card).splitlines()
      lines += [f'{name}  {first}', *(f'  {line}' for line in more)]
    return '\n'.join(lines)


def is_library(path: os.PathLike | str) -> bool:
  """Whether a folder holds adapters, and no model or adapter itself."""
  folder = pathlib.Path(path)
  if not folder.is_dir() or any(one.is_file() for one in folder.iterdir()):
    return False
  return any(_is_one(one) for one in folder.iterdir())


def _is_one(path):
  return (path / fold.CONFIG).is_file()
