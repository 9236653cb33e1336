# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters: a small network behind a sub-layer."""

from collections.abc import Mapping, Sequence
import dataclasses
import math

import jax
import jax.numpy as jnp

from mergejax.adapters import sites as sites_lib
from mergejax.core import errors
from mergejax.intercept import linear

# Behind attention and feed-forward block, and behind the latter alone.
HOULSBY = (r'(.*/)?(out|wo)/kernel',)
PFEIFFER = (r'(.*/)?wo/kernel',)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bottleneck(sites_lib.LayerAdapter):
  """See `bottleneck`; two with the same settings are the same adapter."""

  width: int = 64
  targets: tuple[str, ...] = HOULSBY
  activation: str = 'gelu'
  kernels: Mapping[type, linear.Describe] = dataclasses.field(
    default_factory=dict, hash=False
  )

  def __post_init__(self):
    errors.check_whole('width', self.width)
    if not callable(getattr(jax.nn, self.activation, None)):
      known = [name for name in dir(jax.nn) if name.islower()]
      raise errors.ConfigError(
        errors.near(self.activation, known, 'activation')
      )

  def sites(self, base):
    return sites_lib.find(base, self.targets)

  def parts(self, site):
    shape, names = site.outputs
    draw = lambda key, shape: 0.01 * jax.random.normal(key, shape, jnp.float32)
    zeros = lambda key, shape: jnp.zeros(shape, jnp.float32)
    part, width = sites_lib.Part, self.width
    return {
      'bottleneck_down': part((*shape, width), (*names, 'rank'), draw),
      'bottleneck_down_bias': part((width,), ('rank',), zeros),
      'bottleneck_up': part((width, *shape), ('rank', *names), zeros),
      'bottleneck_up_bias': part(shape, names, zeros),
    }

  def after(self, site, parts, inputs, outputs, key=None):
    size = math.prod(site.outputs[0])
    flat = outputs.reshape(
      *outputs.shape[: outputs.ndim - len(site.outputs[0])], size
    )
    down, up = parts['bottleneck_down'], parts['bottleneck_up']
    hidden = sites_lib.product(flat, down.reshape(size, -1), outputs.dtype)
    hidden = hidden + sites_lib.last(parts['bottleneck_down_bias'], hidden)
    hidden = getattr(jax.nn, self.activation)(hidden)
    found = sites_lib.product(hidden, up.reshape(-1, size), outputs.dtype)
    bias = parts['bottleneck_up_bias'].reshape(-1)
    found = (found + sites_lib.last(bias, found)).reshape(outputs.shape)
    return (outputs.astype(jnp.float32) + found).astype(outputs.dtype)


def bottleneck(
  *,
  width: int = 64,
  targets: str | Sequence[str] = HOULSBY,
  activation: str = 'gelu',
  kernels: Mapping[type, linear.Describe] | None = None,
) -> Bottleneck:
  """Houlsby's adapters: `y + act(y D + d) U + u`, for the output y of a sub-layer.

  They come before the residual connection. `D <float32>[*out, width]` is drawn
  from N(0, 0.01^2); `U <float32>[width, *out]` and both biases are 0.

  Args:
    width: of the bottleneck; 64 is the paper's best for BERT-large.
    targets: regular expressions over whole paths of kernels whose outputs go
      through a bottleneck; `HOULSBY`, behind attention and feed-forward blocks,
      by default; `PFEIFFER` behind feed-forward blocks alone.
    activation: a function of `jax.nn`.
    kernels: `{class: describe}` of modules of your own with linear maps.

  Returns:
    An adapter, for `adapt`. It cannot be folded.

  Raises:
    ConfigError: numbers that are none, an unknown activation; when it is put to
      a model, a target that matches nothing.

  Example:
    >>> bottleneck(width=16, targets=PFEIFFER).width
    16

  Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP"
  (2019), https://arxiv.org/abs/1902.00751, section 2.1; Pfeiffer et al.,
  "AdapterFusion" (2020), https://arxiv.org/abs/2005.00247. The paper draws U
  too, near 0; with 0 a fresh adapter changes no bit.
  """
  return Bottleneck(
    width=width,
    targets=(targets,) if isinstance(targets, str) else tuple(targets),
    activation=activation,
    kernels=kernels or {},
  )
