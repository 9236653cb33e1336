# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What to look at before merging: sizes, signs and angles of task vectors."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.checkpoints import base as store_base
from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import tree as tree_lib
from mergejax.core import typing


@dataclasses.dataclass(frozen=True)
class Survey:
  """Task vectors `tau_k = theta_k - theta_0` of K models, leaf by leaf.

  Attributes:
    paths: the floating leaves; of a stack of layers each layer, `PATH[3]`.
    base_norms: `<float64>[leaves]` L2 norm of the base.
    norms: `<float64>[leaves, K]` L2 norms of the task vectors.
    products: `<float64>[leaves, K, K]` inner products of the task vectors.
    moved: `<int>[leaves]` entries that any model moved.
    agreement: `<float64>[leaves]` share of these whose moves all have one sign.
  """

  paths: tuple[typing.Path, ...]
  base_norms: np.ndarray
  norms: np.ndarray
  products: np.ndarray
  moved: np.ndarray
  agreement: np.ndarray

  def cosines(self) -> np.ndarray:
    """`<float64>[leaves, K, K]`, 0 where a task vector is 0."""
    return _cosines(self.products)

  def whole_cosines(self) -> np.ndarray:
    """`<float64>[K, K]` over the whole model."""
    return _cosines(self.products.sum(axis=0))

  def to_rows(self) -> list[dict[str, Any]]:
    """One dict a leaf, and one for the whole model, of plain numbers.

    Norms are relative to the base's; None where that is 0.
    """
    count = self.norms.shape[1]
    pairs = np.triu_indices(count, 1)

    def row(path, base, norms, cosines, agreement):
      # Fresh biases are 0: nothing to compare with.
      relative = norms / base if base else np.full_like(norms, np.nan)
      apart = cosines[pairs]
      return {
        'path': path,
        'relative_norms': [float(r) if base else None for r in relative],
        'mean_cosine': float(apart.mean()) if len(apart) else 1.0,
        'least_cosine': float(apart.min()) if len(apart) else 1.0,
        'sign_agreement': float(agreement),
      }

    rows = [
      row(*leaf)
      for leaf in zip(
        self.paths, self.base_norms, self.norms, self.cosines(), self.agreement
      )
    ]
    whole = np.sqrt(np.diagonal(self.products.sum(axis=0)))
    rows.append(
      row(
        'whole model',
        float(np.sqrt(np.square(self.base_norms).sum())),
        whole,
        self.whole_cosines(),
        float((self.agreement * self.moved).sum() / max(self.moved.sum(), 1)),
      )
    )
    return rows

  def to_text(self) -> str:
    """A table for a terminal."""
    rows = self.to_rows()
    width = max(len(row['path']) for row in rows) + 2
    lines = [
      f'{"leaf":<{width}}{"|task vector| / |base|":<26}'
      f'{"cosine mean":>12}{"least":>8}{"signs agree":>13}'
    ]
    for row in rows:
      norms = row['relative_norms']
      shown = 'the base is 0'
      if None not in norms:
        shown = f'{min(norms):.4f} to {max(norms):.4f}'
      lines.append(
        f'{row["path"]:<{width}}{shown:<26}{row["mean_cosine"]:>12.3f}'
        f'{row["least_cosine"]:>8.3f}{row["sign_agreement"]:>13.3f}'
      )
    return '\n'.join(lines)


def _cosines(products):
  norms = np.sqrt(np.diagonal(products, axis1=-2, axis2=-1))
  scale = norms[..., :, None] * norms[..., None, :]
  return np.divide(
    products, scale, out=np.zeros_like(products), where=scale > 0
  )


@jax.jit
def _measure(base, leaves):
  wide = numerics.widen(base)
  deltas = jnp.stack([numerics.widen(leaf) - wide for leaf in leaves])
  flat = deltas.reshape(len(leaves), -1)
  products = jnp.matmul(flat, flat.T, precision=jax.lax.Precision.HIGHEST)
  up, down = jnp.any(flat > 0, axis=0), jnp.any(flat < 0, axis=0)
  moved = jnp.sum(up | down, dtype=jnp.uint32)
  both = jnp.sum(up & down, dtype=jnp.uint32)
  return jnp.linalg.norm(wide.reshape(-1)), products, moved, both


def survey(
  models: Sequence[typing.Tree | store_base.ParamStore],
  base: typing.Tree | store_base.ParamStore,
) -> Survey:
  """Compares models with their common ancestor, one leaf in memory at a time.

  Cosines near 0 say that the models moved in unrelated directions: averages
  then shrink every task vector by their number, and sums keep them. Cosines
  near 1 say that an average loses nothing. Cosines near 0 with task vectors as
  large as the base say that the models do not share an ancestor: align them
  first (`mergejax align`).

  Args:
    models: trees or stores, K of them. Where a store tells that layers are
      stacked in one leaf, each of them is a leaf of its own.
    base: their common ancestor.

  Returns:
    A `Survey`.

  Raises:
    UserError: no model, trees that differ (listed) or hold no floating leaf.

  Example:
    >>> zero, one = {'w': np.zeros(2)}, {'w': np.array([3.0, 4.0])}
    >>> survey([one], zero).norms.tolist()
    [[5.0]]
  """
  if not models:
    raise errors.ConfigError(
      'A survey needs at least one model beside the base.'
    )
  stores = [_store(m, f'model {i}') for i, m in enumerate(models)]
  origin = _store(base, 'the base')
  specs = origin.specs()
  for store in stores:
    tree_lib.check_same(
      specs, store.specs(), expected_name=origin.name, given_name=store.name
    )
  specs = axes_lib.of_models([store.specs() for store in (origin, *stores)])
  averaged = {p: s for p, s in specs.items() if numerics.is_averaged(s.dtype)}
  if not averaged:
    raise errors.StructureError(
      f'{origin.name} has no floating parameter, so there is nothing to compare.'
    )
  paths, found = [], []
  for path, spec in averaged.items():
    numerics.check_countable(path, axes_lib.slice_size(spec))
    stack = axes_lib.stacked(spec)
    base_leaf, *leaves = (
      np.moveaxis(
        np.asarray(store.leaves([path])[path]), stack, range(len(stack))
      )
      for store in (origin, *stores)
    )
    for at in np.ndindex(base_leaf.shape[: len(stack)]):
      norm, products, moved, both = _measure(
        base_leaf[at], [leaf[at] for leaf in leaves]
      )
      moved = int(moved)
      agree = 1 - int(both) / moved if moved else 1.0
      paths.append(path + ''.join(f'[{i}]' for i in at))
      found.append(
        (float(norm), np.asarray(products, np.float64), moved, agree)
      )
  norms, products, moved, agreement = zip(*found)
  products = np.stack(products)
  diagonal = np.diagonal(products, axis1=1, axis2=2)
  return Survey(
    tuple(paths),
    np.array(norms),
    np.sqrt(np.maximum(diagonal, 0)),
    products,
    np.array(moved),
    np.array(agreement),
  )


def _store(model, name):
  if isinstance(model, store_base.ParamStore):
    return model
  return store_base.MemoryStore(model, name=name)
