# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of ours with an adapter folded in, leaf by leaf.

`checkpoints.peft.fold` does the same for checkpoints that have the names of
adapters' files, of more kinds, and knows no model.
"""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from mergejax import models
from mergejax.adapters import base as base_lib
from mergejax.adapters import changes
from mergejax.adapters import saved
from mergejax.adapters import sites as sites_lib
from mergejax.checkpoints import base as store_base
from mergejax.core import tree
from mergejax.core import typing


class FoldedStore(store_base.ParamStore):
  """A base under our names with an adapter in it; changed leaves are float32."""

  def __init__(
    self,
    store: store_base.ParamStore,
    base: os.PathLike | str,
    path: os.PathLike | str,
  ):
    """Opens an adapter over its base; reads the adapter.

    Args:
      store: the base.
      base: its path, whose `config.json` says what it is.
      path: the adapter's directory.

    Raises:
      UserError: see `adapters.load`; a prompt, which no parameters compute.
    """
    family = models.family_of(models.load_module(base))
    models.check_not_converted(base)
    adapted, leaves = saved.load(path, family)
    _check_folds(adapted.adapter, path)
    self._store, self._adapter = store, adapted.adapter
    self._own = base_lib.own_leaves(leaves, adapted.adapter_specs)
    self._path = pathlib.Path(path)
    self.provenance = {'format': 'adapter', 'path': f'{base}+{path}'}
    self.tied = store.tied
    self._site_of = {}
    self._specs = dict(store.specs())
    for site in adapted.adapter.sites(adapted.base_specs):
      for leaf in self._adapter.leaves_of(site, self._specs).values():
        self._site_of[leaf] = site
        self._specs[leaf] = dataclasses.replace(
          self._specs[leaf], dtype=np.dtype(np.float32)
        )

  def specs(self) -> typing.SpecTree:
    return self._specs

  def files(self) -> list[pathlib.Path]:
    own = sorted(file for file in self._path.iterdir() if file.is_file())
    return [*self._store.files(), *own]

  def stored_dtype(self, path: typing.Path) -> np.dtype:
    """dtype in the base, before anything is folded."""
    return self._store.stored_dtype(path)

  def leaves(self, paths: list[typing.Path]) -> Mapping[typing.Path, Any]:
    found = {}
    for path in paths:
      site = self._site_of.get(path)
      if site is None:
        found[path] = self._store.leaves([path])[path]
        continue
      names = [*self._adapter.leaves_of(site, self._specs).values()]
      given = self._store.leaves(names)
      found[path] = np.asarray(
        self._adapter.fold_site(site, given, self._own)[path]
      )
    return found


def load_model(path: os.PathLike | str) -> tuple[Any, typing.Tree]:
  """`models.load_model`, also of `BASE+ADAPTER`: the adapter folded in.

  Args:
    path: of a checkpoint with a `config.json`, or two joined by a plus.

  Returns:
    `(module, params)`, of the base's names. What the adapter changes is float32,
    so that small changes are not rounded away before they are merged.

  Raises:
    UserError: see `models.load_model` and `adapters.load`; a prompt.
  """
  base, adapter = changes.parts(path)
  module, params = models.load_model(base)
  if adapter is None:
    return module, params
  family, leaves = saved.load(adapter, module, params)
  _check_folds(family.adapter, adapter)
  changed = set()
  for site in family.adapter.sites(family.base_specs):
    changed |= {*family.adapter.leaves_of(site, family.base_specs).values()}
  wide = tree.map_paths(
    lambda p, leaf: leaf.astype(np.float32) if p in changed else leaf, params
  )
  return module, family.adapter.fold(family.base_specs, wide, leaves)


def _check_folds(adapter, path):
  if not isinstance(adapter, sites_lib.LayerAdapter):
    raise base_lib.not_folded(adapter).at(path)
