# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts layer: many feed-forward blocks, of which a token sees few.

The parameters are called as in flaxformer: `router/router_weights/w/kernel
[embed, experts]`, `expert/wi/kernel [experts, embed, mlp]` (`wi_0`, `wi_1` where
they are gated) and `expert/wo/kernel [experts, mlp, embed]`.

Source: Fedus et al., "Switch Transformers" (2021),
https://arxiv.org/abs/2101.03961; for routers see `routing`.
"""

from collections.abc import Sequence
import re
from typing import Any

import flax.linen as nn
import jax
from jax.nn import initializers
import jax.numpy as jnp

from mergejax import partition
from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.nn import dispatch as dispatch_lib
from mergejax.nn import layers
from mergejax.nn import moe_config
from mergejax.nn import routing
from mergejax.nn import routing_losses
from mergejax.nn import token_groups

# Where a layer leaves its losses and metrics.
COLLECTION = 'intermediates'
# Of fresh routers, so that all experts are about as probable.
ROUTER_DEVIATION = 0.02


class MoeLayer(nn.Module):
  """`sum over the experts e of a token of weight_e MLP_e(x)`.

  A token that finds no room gives 0: the residual stream carries it on.

  Attributes:
    config: of the router and its experts.
    hidden: size of the hidden layer of an expert.
    activations: see `layers.Mlp`.
    dtype: compute dtype of the experts; the router's is float32.
    dropout_rate: of the hidden layer of an expert, unless the configuration
      says otherwise; every token has a mask of its own.
    init_scale: variance of fresh kernels times their inputs; 0.1 in Switch.
    decoder: tokens must not see later ones.

  Raises:
    ConfigError: a router that looks at later tokens, in a decoder.
  """

  config: moe_config.MoeConfig
  hidden: int
  activations: Sequence[str] = ('relu',)
  dtype: str = 'float32'
  dropout_rate: float = 0.0
  init_scale: float = 1.0
  decoder: bool = False

  @nn.compact
  def __call__(
    self,
    inputs: typing.Array,
    real: typing.Array | None = None,
    *,
    deterministic: bool = True,
    decode: bool = False,
  ) -> jax.Array:
    """Sends tokens through their experts.

    What `measured` finds is left in the collection `intermediates`.

    Args:
      inputs: `<dtype>[batch, length, embed]`.
      real: `<bool>[batch, length]` False for padding, which meets no expert and
        gives 0; None where there is none.
      deterministic: in evaluation: its capacity, without dropout and jitter.
      decode: the tokens are the next ones of answers: none is dropped, so that
        an answer does not depend on what else is answered.

    Returns:
      `<dtype>[batch, length, embed]`.

    Raises:
      ConfigError: tokens that do not divide into groups, and what routers
        refuse.
    """
    config = self.config
    if self.decoder:
      config.check_causal()
    groups = _groups(config, inputs.shape, decode)
    legacy = config.legacy_padding is not None and not self.decoder
    if legacy and real is not None:
      # flaxformer's encoder has zeros there; its decoder has what it has.
      inputs = jnp.where(real[..., None], inputs, 0)
    # Of the inputs as they came, so that whoever watches the router knows which
    # are real.
    logits = Router(config, name='router')(inputs, deterministic=deterministic)
    logits = groups.divide(logits)
    tokens = groups.divide(inputs.astype(self.dtype))
    real = (
      None if config.legacy_padding == routing.ROUTED else groups.real(real)
    )
    key = None
    if not deterministic and config.draws(self.decoder):
      key = self.make_rng('dropout')
    router = config.router_of(self.decoder)
    room = _room(config, router, groups, not deterministic, decode)
    routed = _route(config, router, self.decoder, logits, real, room, key)
    found = _dispatch(config, routed, groups, room)
    rate = config.dropout_rate
    values = ExpertMlp(
      config.num_experts, self.hidden, self.activations, self.dtype,
      self.dropout_rate if rate is None else rate, self.init_scale,
      name='expert',
    )(found.to_experts(tokens), found, deterministic=deterministic)  # fmt: skip
    if self.is_mutable_collection(COLLECTION):
      for name, value in measured(config, routed, logits, real, room).items():
        self.sow(
          COLLECTION, name, value,
          reduce_fn=lambda _, new: new, init_fn=lambda: None,
        )  # fmt: skip
    return groups.join(found.to_tokens(values))


class Router(nn.Module):
  """Scores of every expert for every token, in float32.

  Attributes:
    config: its `num_experts` and `jitter`.
  """

  config: moe_config.MoeConfig

  @nn.compact
  def __call__(
    self, inputs: typing.Array, *, deterministic: bool = True
  ) -> jax.Array:
    """`<float>[batch, length, embed] -> <float32>[batch, length, experts]`."""
    inputs = inputs.astype(jnp.float32)
    jitter = self.config.jitter
    if jitter and not deterministic:
      inputs *= jax.random.uniform(
        self.make_rng('dropout'), inputs.shape, jnp.float32, 1 - jitter,
        1 + jitter,
      )  # fmt: skip
    return RouterWeights(self.config.num_experts, name='router_weights')(inputs)


class RouterWeights(nn.Module):
  """The kernel of a router; a module of its own for flaxformer's names."""

  experts: int

  @nn.compact
  def __call__(self, inputs: typing.Array) -> jax.Array:
    """`<float32>[..., embed] -> <float32>[..., experts]`."""
    return nn.Dense(
      self.experts,
      use_bias=False,
      dtype=jnp.float32,
      kernel_init=initializers.normal(ROUTER_DEVIATION),
      precision=jax.lax.Precision.HIGHEST,
      dot_general=layers.flat_dot_general,
      name='w',
    )(inputs)


class ExpertMlp(nn.Module):
  """The feed-forward blocks of all experts; as `layers.Mlp` for each."""

  experts: int
  hidden: int
  activations: Sequence[str]
  dtype: str
  dropout_rate: float
  init_scale: float

  @nn.compact
  def __call__(
    self,
    values: typing.Array,
    dispatch: dispatch_lib.Dispatch,
    *,
    deterministic: bool = True,
  ) -> jax.Array:
    """Of values that lie as the dispatch lays them."""
    kernel = lambda features, name: ExpertKernel(
      self.experts, features, self.dtype, self.init_scale, name=name
    )
    hidden = None
    for i, activation in enumerate(self.activations):
      name = 'wi' if len(self.activations) == 1 else f'wi_{i}'
      branch = layers.activation_of(activation)(
        kernel(self.hidden, name)(values, dispatch)
      )
      hidden = branch if hidden is None else hidden * branch
    if hidden.ndim == 4:  # [experts, groups, slots, hidden]
      hidden = partition.constrain(
        hidden, ('expert', 'expert_replicas', None, 'expert_mlp')
      )
    hidden = nn.Dropout(self.dropout_rate)(hidden, deterministic=deterministic)
    return kernel(values.shape[-1], 'wo')(hidden, dispatch)


class ExpertKernel(nn.Module):
  """A kernel for every expert, `[experts, in, features]`, without bias."""

  experts: int
  features: int
  dtype: str
  init_scale: float

  @nn.compact
  def __call__(
    self, values: typing.Array, dispatch: dispatch_lib.Dispatch
  ) -> jax.Array:
    """`<dtype>[..., in] -> <dtype>[..., features]`."""
    init = initializers.variance_scaling(
      self.init_scale, 'fan_in', 'normal', batch_axis=(0,)
    )
    shape = self.experts, values.shape[-1], self.features
    kernel = self.param('kernel', init, shape, jnp.float32)
    return dispatch.product(values, kernel.astype(self.dtype))


def _groups(config, shape, decode):
  """How tokens are divided; while decoding they are one group."""
  batch, length, _ = shape
  if decode:
    return token_groups.Groups((batch, length), (batch, length), 1)
  return token_groups.groups(
    batch, length, config.num_experts, max_size=config.group_size,
    replicas=config.replicas, strict=config.strict_group_size,
  )  # fmt: skip


def _room(config, router, groups, train, decode):
  """Room of an expert in each group; None drops nothing."""
  factor = (
    config.train_capacity_factor if train else config.eval_capacity_factor
  )
  sizes = groups.tokens, config.num_experts
  if router == moe_config.EXPERTS_CHOOSE:
    least = 1 if decode else min(config.min_capacity, groups.tokens)
    return token_groups.capacity(factor, *sizes, least)
  if decode or factor is None:
    return None
  if router == moe_config.GSHARD:
    return token_groups.gshard_capacity(*sizes, train=train)
  return token_groups.capacity(factor, *sizes, config.min_capacity)


def _route(config, router, decoder, logits, real, room, key):
  """`Choices` of tokens, or `Slots` of experts."""
  style = {'real': real, 'legacy_padding': config.legacy_padding}
  if router == moe_config.GSHARD:
    return routing.gshard_top2(
      logits, room, real=real, second_expert=config.second_expert,
      normalize_before_dropping=config.normalize_before_dropping, key=key,
    )  # fmt: skip
  probabilities = jax.nn.softmax(logits)
  if router == moe_config.EXPERTS_CHOOSE:
    return routing.experts_choose(probabilities, room, **style)
  return routing.tokens_choose(
    probabilities, config.top_k, room, **style,
    prioritise=config.batch_prioritised and not decoder,
    normalize=config.normalize_gates,
  )  # fmt: skip


def _dispatch(config, routed, groups, room) -> dispatch_lib.Dispatch:
  """The form in which tokens go to the experts."""
  if isinstance(routed, routing.Slots):
    return dispatch_lib.Chosen(routed, groups.tokens)
  kind, alone = config.dispatch, partition.device_count() == 1
  if kind == moe_config.ROWS and not alone:
    raise errors.ConfigError(
      "dispatch='rows' sorts the tokens of one device, but the mesh has "
      f"{partition.device_count()}: choose 'padded' or 'auto'."
    )
  if kind == moe_config.AUTO and alone and room is None:
    kind = moe_config.ROWS
  if kind == moe_config.ROWS:
    return dispatch_lib.rows(routed, config.num_experts, room)
  # No expert can be chosen by more than all tokens of a group.
  room = groups.tokens if room is None else min(room, groups.tokens)
  return dispatch_lib.padded(routed, config.num_experts, room)


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
