# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How much of every skill of an inventory a task takes, and where it is said."""

import math
import re

import jax
import jax.numpy as jnp

from mergejax.adapters import sites
from mergejax.core import errors
from mergejax.core import typing

SELECTORS = ('sigmoid', 'straight_through', 'l2', 'average', 'uniform')
# Who has logits of its own.
OWNERS = ('map', 'sublayer', 'block', 'stack', 'model')
# Where logits lie that maps share.
FOLDER = 'routes/'
_EPSILON = 1e-12


def gates(
  logits: jax.Array,
  selector: str = 'sigmoid',
  *,
  shared_skill: bool = False,
  key: jax.Array | None = None,
  dropout: float = 0.0,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """How much of every skill, `w = g(Z) / (sum_s g(Z) + 1e-12)`.

  Args:
    logits: `<float32>[..., heads, skills]`, Z.
    selector: 'sigmoid', `g = sigmoid`; 'straight_through', it is rounded, and
      its gradient is the sigmoid's; 'l2', `w = Z / |Z|` by head, which may be
      negative; 'average', `sigmoid(Z) sqrt(heads / skills)`, not normalised;
      'uniform', 1 / skills.
    shared_skill: the last skill's gate is 1, before they are normalised.
    key: of 'sigmoid': relaxed Bernoulli of temperature 1, `sigmoid(Z + log u -
      log(1 - u))` with u uniform; None draws nothing.
    dropout: share of gates that are 0, the others over what is left of 1,
      before the shared one and before they are normalised. Not of 'l2' and
      'uniform', which have no gates.
    dropout_key: says which; None drops nothing.

  Returns:
    `<float32>` of the same shape.
  """
  heads, skills = logits.shape[-2:]
  if selector == 'uniform':
    return jnp.full(logits.shape, 1 / skills, jnp.float32)
  if selector == 'l2':
    size = jnp.sqrt(jnp.sum(jnp.square(logits), axis=-1, keepdims=True))
    return logits / jnp.maximum(size, _EPSILON)
  if key is not None:
    small = jnp.finfo(jnp.float32).tiny
    u = jax.random.uniform(key, logits.shape, minval=small)
    logits = logits + jnp.log(u) - jnp.log1p(-u)
  found = jax.nn.sigmoid(logits)
  if selector == 'straight_through':
    found = found + jax.lax.stop_gradient(jnp.round(found) - found)
  if dropout_key is not None:
    kept = jax.random.bernoulli(dropout_key, 1 - dropout, found.shape)
    found = jnp.where(kept, found / (1 - dropout), 0.0)
  if shared_skill:
    found = found.at[..., -1].set(1.0)
  if selector == 'average':
    return found * math.sqrt(heads / skills)
  return found / (jnp.sum(found, axis=-1, keepdims=True) + _EPSILON)


def owner(selectors: str, site: sites.Site) -> typing.Path | None:
  """Where the logits of a map lie, if others share them; None if none does.

  Args:
    selectors: of `OWNERS`.
    site: of the map.

  Raises:
    ConfigError: a block is to have logits, and the map is in none.
  """
  if selectors == 'map':
    return None
  if selectors == 'model':
    return f'{FOLDER}model'
  names = site.path.split('/')
  if selectors == 'stack':
    return FOLDER + names[0]
  # Blocks are numbered: 'encoder/layers_0', and have sub-layers of a name.
  at = next((i for i, x in enumerate(names) if re.search(r'\d+$', x)), None)
  if at is None or at + 2 >= len(names) or site.view.stack:
    raise errors.ConfigError(
      f'selectors={selectors!r} needs kernels of numbered blocks, such as '
      f'encoder/layers_0/mlp/wi/kernel, one by one, and {site.path} is none: '
      "build the model with scan_layers=False, or take 'map' or 'stack'."
    )
  count = at + (2 if selectors == 'sublayer' else 1)
  return FOLDER + '/'.join(names[:count])
