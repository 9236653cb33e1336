# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What sparse layers tell of a call: their losses, and how experts are used."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.nn import dispatch as dispatch_lib
from mergejax.nn import moe_config
from mergejax.nn import routing
from mergejax.nn import routing_losses

# Where a layer leaves its losses and metrics.
COLLECTION = 'intermediates'


def measured(
  config: moe_config.MoeConfig,
  routed: routing.Choices | routing.Slots,
  logits: typing.Array,
  real: typing.Array | None,
  room: int | None,
) -> dict[str, jax.Array]:
  """The losses and metrics of a call.

  Args:
    config: of the layer.
    routed: what tokens or experts chose.
    logits: `<float32>[groups, tokens, experts]`.
    real: `<bool>[groups, tokens]`, or None: all of them.
    room: of an expert in each group; None if it is not bounded.

  Returns:
    `auxiliary_loss` and `router_z_loss`, `<float32>[]`, without their factors
    (see `routing_losses`; where experts choose there is nothing to balance, and
    the first is 0), `router_entropy`, and what `routing_losses.metrics` gives.
  """
  style = {'real': real, 'legacy_padding': config.legacy_padding}
  probabilities = jax.nn.softmax(logits)
  groups, tokens, experts = logits.shape
  there = groups * tokens if real is None else jnp.sum(real)
  if isinstance(routed, routing.Slots):
    balance = jnp.float32(0.0)
    taken = routed.tokens < tokens
    load = jnp.sum(taken.astype(jnp.float32), (0, 2))
    met = jnp.zeros((groups, tokens), bool)
    met = jax.vmap(lambda own, at: own.at[at].set(True, mode='drop'))(
      met, routed.tokens.reshape(groups, -1)
    )
    pairs = jnp.sum(load)
  else:
    balance = routing_losses.load_balance(probabilities, routed.chosen, **style)
    # flaxformer's scatter router keeps padding too.
    kept = routed.kept if real is None else routed.kept & real[..., None]
    counts = dispatch_lib.kept_counts(routed._replace(kept=kept), experts)
    load = jnp.sum(counts, 0)
    met = jnp.any(kept, -1)
    pairs = there * kept.shape[-1]
  load = load.astype(jnp.float32)
  slots = groups * experts * (tokens if room is None else room)
  return {
    'auxiliary_loss': balance,
    'router_z_loss': routing_losses.router_z(logits, **style),
    'router_entropy': routing_losses.entropy(probabilities, real),
    **routing_losses.metrics(
      load, jnp.sum(met.astype(jnp.float32)), jnp.sum(routed.weights),
      tokens=there, pairs=pairs, slots=slots,
    ),
  }  # fmt: skip


# What an objective minimises: its name there, the field that has its factor.
_LOSSES = {
  'auxiliary_loss': ('router_balance_loss', 'balance_loss'),
  'router_z_loss': ('router_z_loss', 'z_loss'),
}
# So many loads of experts a person may still look at one by one.
_MOST_LOADS = 32
# The metric with the loads of all experts of all layers, for a picture.
LOADS = 'moe/expert_loads'


def by_number(path: str) -> list[Any]:
  """A key that sorts `layers_2` before `layers_10`."""
  parts = re.split(r'(\d+)', path)
  return [int(part) if part.isdigit() else part for part in parts]


def totals(
  config: moe_config.MoeConfig, left: typing.Tree
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """What a model's sparse layers bring: means over them.

  Args:
    config: of the model.
    left: its collection `intermediates` after a call.

  Returns:
    `(losses, metrics)`, `<float32>[]` each: `router_balance_loss` and
    `router_z_loss` times their factors, those that have one; and `moe/NAME` for
    what `measured` tells, `moe/expert_load/3` for every expert of few. `LOADS`,
    `<float32>[layers, experts]`, has them of every sparse layer.

  Raises:
    StructureError: no layer left anything: a lifted one must lift the
      collection too.
  """
  found: dict[str, list[jax.Array]] = {}
  flat = tree_lib.flatten(left)
  for path in sorted(flat, key=by_number):
    parent, _, name = path.rpartition('/')
    value = flat[path]
    if f'{parent}/router_entropy' in flat and not name.startswith('inputs_of_'):
      size = 1 if name == 'expert_load' else 0
      # Scanned layers have their stack in front.
      value = value.reshape(-1, *value.shape[value.ndim - size :])
      found.setdefault(name, []).append(value)
  if not found:
    raise errors.StructureError(
      'No sparse layer of the model left its losses in the collection '
      f'{COLLECTION!r}: a lifted layer must lift it too, '
      f'`variable_axes={{{COLLECTION!r}: 0}}`.'
    )
  means = {n: jnp.mean(jnp.concatenate(own), 0) for n, own in found.items()}
  losses = {}
  for name, (known, field) in _LOSSES.items():
    factor = getattr(config, field)
    if factor:
      losses[known] = factor * means[name]
  loads = means.pop('expert_load')
  metrics = {f'moe/{name}': value for name, value in means.items()}
  metrics[LOADS] = jnp.concatenate(found['expert_load'])
  if len(loads) <= _MOST_LOADS:
    metrics |= {f'moe/expert_load/{e}': load for e, load in enumerate(loads)}
  return losses, metrics
