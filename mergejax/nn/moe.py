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

import flax.linen as nn
import jax
from jax.nn import initializers
import jax.numpy as jnp

from mergejax import partition
from mergejax.core import errors
from mergejax.core import typing
from mergejax.nn import dispatch as dispatch_lib
from mergejax.nn import dispatch_mesh
from mergejax.nn import layers
from mergejax.nn import moe_config
from mergejax.nn import moe_metrics
from mergejax.nn import routing
from mergejax.nn import token_groups

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

    What `moe_metrics.measured` finds is left in the collection
    `intermediates`.

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
      ConfigError: tokens that do not divide into groups, experts that do not
        divide over the mesh, and what routers refuse.
    """
    config = self.config
    _check_mesh(config)
    if self.decoder:
      config.check_causal()
    # What parameters are made with is an example, of a few tokens.
    strict = config.strict_group_size and not self.is_initializing()
    groups = _groups(config, inputs.shape, decode, strict)
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
    found = _dispatch(config, routed, groups, room, self.hidden)
    rate = config.dropout_rate
    values = ExpertMlp(
      config.num_experts, self.hidden, self.activations, self.dtype,
      self.dropout_rate if rate is None else rate, self.init_scale,
      name='expert',
    )(found.to_experts(tokens), found, deterministic=deterministic)  # fmt: skip
    left = moe_metrics.COLLECTION
    if self.is_mutable_collection(left):
      found_of = moe_metrics.measured(config, routed, logits, real, room)
      for name, value in found_of.items():
        self.sow(
          left, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None
        )
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
    kernel = lambda features, name, back=False: ExpertKernel(
      self.experts, features, self.dtype, self.init_scale, back, name=name
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
    return kernel(values.shape[-1], 'wo', back=True)(hidden, dispatch)


class ExpertKernel(nn.Module):
  """A kernel for every expert, `[experts, in, features]`, without bias."""

  experts: int
  features: int
  dtype: str
  init_scale: float
  back: bool = False

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
    kernel = kernel.astype(self.dtype)
    return dispatch.product(values, kernel, back=self.back)


def _check_mesh(config):
  """Raises if a part of the mesh's axis `expert` would have no whole experts."""
  mesh = partition.active_mesh()
  parts = 1 if mesh is None else mesh.shape.get('expert', 1)
  if config.num_experts % parts:
    raise errors.ConfigError(
      f'{config.num_experts} experts do not divide over {parts} parts of the '
      "mesh (axis 'expert'): choose a size that divides "
      f"{config.num_experts}, and 'data' for what is left."
    )


def _groups(config, shape, decode, strict):
  """How tokens are divided; while decoding they are one group."""
  batch, length, _ = shape
  if decode:
    return token_groups.Groups((batch, length), (batch, length), 1)
  return token_groups.groups(
    batch, length, config.num_experts, max_size=config.group_size,
    replicas=config.replicas, strict=strict,
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


def _dispatch(config, routed, groups, room, hidden) -> dispatch_lib.Dispatch:
  """The form in which tokens go to the experts."""
  if isinstance(routed, routing.Slots):
    return dispatch_lib.Chosen(routed, groups.tokens)
  kind, alone = config.dispatch, partition.device_count() == 1
  if kind == moe_config.AUTO and room is None:
    kind = moe_config.ROWS
  if kind == moe_config.ROWS and not alone:
    return dispatch_mesh.rows(routed, config.num_experts, hidden=hidden)
  if kind == moe_config.ROWS:
    return dispatch_lib.rows(routed, config.num_experts, room)
  # No expert can be chosen by more than all tokens of a group.
  room = groups.tokens if room is None else min(room, groups.tokens)
  return dispatch_lib.padded(routed, config.num_experts, room)
