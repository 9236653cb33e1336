# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""ATTEMPT: every input mixes prompts of other tasks into its own."""

from collections.abc import Sequence
import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.adapters import base as base_lib
from mergejax.adapters import prompts
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing

SOURCE = 'prompts/source'
_KINDS = ('attempt', 'constant')
_EPSILON = 1e-5


class Mixture(NamedTuple):
  """What ATTEMPT makes of a batch.

  Attributes:
    pooled: `<float32>[batch, embed]` the inputs' maximum over positions.
    query: `<float32>[batch, embed]`, None if attention is constant.
    scores: `<float32>[batch, candidates]`, likewise.
    attention: `<float32>[batch, candidates]`, sources first, then the target.
    prompt: `<float32>[batch, m, embed]`.
  """

  pooled: jax.Array
  query: jax.Array | None
  scores: jax.Array | None
  attention: jax.Array
  prompt: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attempt(prompts.Prompted):
  """See `attempt`."""

  reads_inputs = True
  sources: int
  length: int = 100
  tasks: int | None = None
  width: int = 100
  temperature: float | None = None
  attention: str = 'attempt'
  ignore_target: bool = False
  train_norm: bool = True
  mask_pad_in_pool: bool = True

  def __post_init__(self):
    errors.check_whole('length', self.length)
    errors.check_whole('width', self.width)
    errors.check_whole('sources', self.sources, least=int(self.ignore_target))
    if self.tasks is not None:
      errors.check_whole('tasks', self.tasks)
    if self.temperature is not None:
      errors.check_number('temperature', self.temperature, 0, open_below=True)
    if self.attention not in _KINDS:
      raise errors.ConfigError(errors.near(self.attention, _KINDS, 'attention'))

  def learns(self, path):
    if path == SOURCE:
      return False
    if path == prompts.TARGET:
      return not self.ignore_target
    if self.attention == 'constant':
      return False
    return self.train_norm or not path.startswith('attempt/norm/')

  def group(self, path):
    sub_network = path.startswith('attempt/')
    return base_lib.ROUTER if sub_network else base_lib.ADAPTER

  def specs(self, base):
    d = prompts.width(base)
    leaf = lambda shape, names: typing.LeafSpec(
      shape, np.dtype('float32'), names
    )
    return {
      SOURCE: leaf(
        (self.sources, self.length, d), ('experts', 'length', 'embed')
      ),
      prompts.TARGET: self.target_spec(base),
      'attempt/down': leaf((d, self.width), ('embed', 'rank')),
      'attempt/up': leaf((self.width, d), ('rank', 'embed')),
      'attempt/norm/scale': leaf((d,), ('embed',)),
      'attempt/norm/bias': leaf((d,), ('embed',)),
    }

  def init(self, base, key, params=None):
    del params
    specs = self.specs(base)
    keys = jax.random.split(key, 3)
    draw = lambda key, path: 0.01 * jax.random.normal(key, specs[path].shape)
    sources = jax.random.uniform(
      keys[2], specs[SOURCE].shape, minval=-0.5, maxval=0.5
    )
    leaves = {
      'attempt/down': draw(keys[0], 'attempt/down'),
      'attempt/up': draw(keys[1], 'attempt/up'),
      'attempt/norm/scale': jnp.ones(specs['attempt/norm/scale'].shape),
      'attempt/norm/bias': jnp.zeros(specs['attempt/norm/bias'].shape),
    }
    return tree.unflatten({**leaves, **self._with(specs, sources)})

  def begin(
    self, base: typing.SpecTree, key: jax.Array, sources: Sequence[typing.Array]
  ) -> typing.Tree:
    """Leaves with trained source prompts; target prompts are the first of them.

    Args:
      base: specs of the base.
      key: of the sub-network's random start.
      sources: `<float>[m, embed]` each; their order decides the targets' start.

    Raises:
      DataError: prompts of other shapes or another number.
    """
    prompts.check_shapes(sources)
    specs = self.specs(base)
    stacked = jnp.stack([jnp.asarray(each, jnp.float32) for each in sources])
    if stacked.shape != specs[SOURCE].shape:
      raise errors.DataError(
        f'The adapter is for source prompts {list(specs[SOURCE].shape)}, and '
        f'{list(stacked.shape)} are given.'
      )
    leaves = tree.flatten(self.init(base, key))
    return tree.unflatten({**leaves, **self._with(specs, stacked)})

  def _with(self, specs, sources):
    shape = specs[prompts.TARGET].shape
    first = sources[0] if self.sources else jnp.zeros(shape[-2:])
    return {SOURCE: sources, prompts.TARGET: jnp.broadcast_to(first, shape)}

  def vectors(self, call, embedded, real):
    return self.mixture(call, embedded, real).prompt

  def mixture(
    self, call: base_lib.Call, embedded: jax.Array, real: jax.Array
  ) -> Mixture:
    """The prompts of a batch, and how they come about; see `vectors`."""
    leaves = call.adapter
    embedded = embedded.astype(jnp.float32)
    if self.mask_pad_in_pool:
      # A row of padding alone has a maximum of 0, not of minus infinity.
      some = jnp.any(real, axis=1)[:, None]
      low = jnp.where(real[..., None], embedded, -jnp.inf)
      pooled = jnp.where(some, jnp.max(low, axis=1), 0.0)
    else:
      pooled = jnp.max(embedded, axis=1)
    source = jax.lax.stop_gradient(leaves[SOURCE])
    target = self.of_task(call, embedded.shape[0])
    keys = jnp.max(source, axis=1)[None]
    keys = jnp.broadcast_to(keys, (len(pooled), *keys.shape[1:]))
    if not self.ignore_target:
      keys = jnp.concatenate([keys, jnp.max(target, axis=1)[:, None]], axis=1)
    query, scores = None, None
    if self.attention == 'constant':
      attention = jnp.full(keys.shape[:2], 1 / keys.shape[1], jnp.float32)
    else:
      query = self._query(leaves, pooled)
      tau = self.temperature or pooled.shape[-1] * math.e
      scores = jnp.einsum('bjd,bd->bj', keys, query, precision='highest') / tau
      attention = jax.nn.softmax(scores)
    of_sources = attention[:, : self.sources]
    flat = source.reshape(self.sources, math.prod(source.shape[1:]))
    mixed = jnp.dot(of_sources, flat)
    mixed = mixed.reshape(-1, *source.shape[1:])
    if not self.ignore_target:
      mixed = mixed + (1 + attention[:, -1, None, None]) * target
    return Mixture(pooled, query, scores, attention, mixed)

  def _query(self, leaves, pooled):
    """`LayerNorm(W_up silu(W_down x))`, `<float32>[batch, embed]`."""
    hidden = jax.nn.silu(jnp.dot(pooled, leaves['attempt/down']))
    h = jnp.dot(hidden, leaves['attempt/up'])
    h = h - jnp.mean(h, axis=-1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + _EPSILON)
    scale, bias = leaves['attempt/norm/scale'], leaves['attempt/norm/bias']
    return h * scale[None] + bias[None]


def attempt(
  *,
  sources: int,
  length: int = 100,
  tasks: int | None = None,
  width: int = 100,
  temperature: float | None = None,
  attention: str = 'attempt',
  ignore_target: bool = False,
  train_norm: bool = True,
  mask_pad_in_pool: bool = True,
) -> Attempt:
  """ATTEMPT: `P = P_T + sum_j a_j P_j`, over t source prompts and the target's.

  `a = softmax_j(max P_j . h / tau)`, `h = LayerNorm(W_up silu(W_down max x))`,
  where the maxima are over positions, of a prompt and of the embedded inputs.
  The target is candidate and residual at once. Leaves, all float32:
  `prompts/source [t, m, embed]`, which stays as it is, `prompts/target [m,
  embed]` (with an axis of tasks in front), `attempt/down [embed, width]`,
  `attempt/up [width, embed]`, `attempt/norm/{scale,bias} [embed]`.

  Args:
    sources: t; see `Attempt.begin`.
    length: m; the paper's 100.
    tasks: target prompts that share the sub-network, numbered by `task_ids
      <int32>[batch]`; None is one.
    width: r of the sub-network; the paper's 100.
    temperature: tau; by default embed times e, the paper's. Released code has
      2000 as its default and 2087 in its settings.
    attention: 'attempt', or 'constant' for equal weights. The released code's
      'dot', 'linear' and 'token' do not run there, and are not here.
    ignore_target: the mixture of the sources alone.
    train_norm: scale and bias of the norm learn; in released code they do not.
    mask_pad_in_pool: padding has no part in the maximum of the inputs; it has
      in released code (False).

  Returns:
    An adapter of encoder-decoders, for `adapt`. It cannot be folded.

  Raises:
    ConfigError: numbers that are none, an unknown kind, no source to mix.

  Example:
    >>> attempt(sources=6, tasks=3).length
    100

  Source: Asai et al., "ATTEMPT: Parameter-Efficient Multi-task Tuning via
  Attentional Mixtures of Soft Prompts" (2022),
  https://arxiv.org/abs/2205.11961, section 3.
  """
  return Attempt(
    sources=sources,
    length=length,
    tasks=tasks,
    width=width,
    temperature=temperature,
    attention=attention,
    ignore_target=ignore_target,
    train_norm=train_norm,
    mask_pad_in_pool=mask_pad_in_pool,
  )
