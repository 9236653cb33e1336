# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA: a kernel plus a product of two narrow ones."""

from collections.abc import Mapping, Sequence
import dataclasses
import math

import jax
import jax.numpy as jnp

from mergejax.adapters import sites as sites_lib
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.intercept import linear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora(sites_lib.LayerAdapter):
  """See `lora`; two with the same settings are the same adapter."""

  rank: int | tuple[tuple[str, int], ...] = 8
  alpha: float | None = None
  targets: tuple[str, ...] = ()
  rank_stabilised: bool = False
  dropout: float = 0.0
  kernels: Mapping[type, linear.Describe] = dataclasses.field(
    default_factory=dict, hash=False
  )

  def __post_init__(self):
    ranks = (
      [self.rank] if isinstance(self.rank, int) else dict(self.rank).values()
    )
    for rank in ranks:
      errors.check_whole('rank', rank)
    errors.check_number('dropout', self.dropout, 0, 1)
    if self.dropout == 1:
      raise errors.ConfigError(
        'dropout=1 drops everything: give a smaller one.'
      )
    if self.alpha is not None:
      errors.check_number('alpha', self.alpha, 0, open_below=True)

  def sites(self, base):
    return sites_lib.find(base, self.targets)

  def specs(self, base):
    if not isinstance(self.rank, int):
      # Every rule must be the first for some kernel.
      paths = [site.path for site in self.sites(base)]
      tree.apply_rules(self.rank, paths, 'rank')
    return super().specs(base)

  def rank_at(self, path: typing.Path) -> int:
    """The rank at a kernel."""
    if isinstance(self.rank, int):
      return self.rank
    return next(
      rank
      for pattern, rank in self.rank
      if tree.expression(pattern, 'rank rule').fullmatch(path)
    )

  def scale_at(self, path: typing.Path) -> float:
    """`alpha / r`, or `alpha / sqrt(r)` if rank-stabilised."""
    rank = self.rank_at(path)
    alpha = rank if self.alpha is None else self.alpha
    return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

  def parts(self, site):
    rank = self.rank_at(site.path)
    (inputs, of_inputs), (outputs, of_outputs) = site.inputs, site.outputs
    bound = 1 / math.sqrt(math.prod(inputs))
    uniform = lambda key, shape: jax.random.uniform(
      key, shape, jnp.float32, -bound, bound
    )
    zeros = lambda key, shape: jnp.zeros(shape, jnp.float32)
    return {
      'lora_a': sites_lib.Part((*inputs, rank), (*of_inputs, 'rank'), uniform),
      'lora_b': sites_lib.Part((rank, *outputs), ('rank', *of_outputs), zeros),
    }

  def after(self, site, parts, inputs, outputs, key=None):
    a, b = _matrices(parts)
    if key is not None:
      keep = jax.random.bernoulli(key, 1 - self.dropout, inputs.shape)
      inputs = jnp.where(keep, inputs / (1 - self.dropout), 0).astype(
        inputs.dtype
      )
    narrow = sites_lib.product(inputs, a, outputs.dtype)
    wide = sites_lib.product(narrow, b, outputs.dtype).reshape(outputs.shape)
    total = outputs.astype(jnp.float32) + self.scale_at(site.path) * wide
    return total.astype(outputs.dtype)

  def folded(self, site, own, parts):
    (name,) = (name for name in own if name != 'bias')
    a, b = _matrices(parts)
    delta = jnp.matmul(a, b, precision='highest') * self.scale_at(site.path)
    return {name: own[name] + site.unmatrix(delta)}


def _matrices(parts):
  a, b = parts['lora_a'], parts['lora_b']
  return a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)


def lora(
  *,
  rank: int | Sequence[tuple[str, int]] = 8,
  alpha: float | None = None,
  targets: str | Sequence[str] = (r'(.*/)?(query|value)/kernel',),
  rank_stabilised: bool = False,
  dropout: float = 0.0,
  kernels: Mapping[type, linear.Describe] | None = None,
) -> Lora:
  """LoRA: `y = x W + b + s (x A) B`, with `s = alpha / r`.

  `A <float32>[*in, rank]` is drawn from U(-1/sqrt(in), 1/sqrt(in)), `B
  <float32>[rank, *out]` is 0; they lie beside the kernel as `lora_a` and
  `lora_b`, with its own logical axes.

  Args:
    rank: of all kernels, or `(regular expression, rank)` rules over their
      paths, first match wins. 8, of the paper's range 1 to 64.
    alpha: the scale times the rank; by default the rank, a scale of 1.
    targets: regular expressions over whole paths of kernels; by default those
      of queries and values, as in the paper.
    rank_stabilised: `s = alpha / sqrt(r)` (rsLoRA), so that large ranks learn
      as fast as small ones.
    dropout: of what `A` is given, in training.
    kernels: `{class: describe}` of modules of your own with linear maps.

  Returns:
    An adapter, for `adapt`. It folds exactly: `W + s A B`.

  Raises:
    ConfigError: numbers that are none; when it is put to a model, a target or
      rule that matches nothing.

  Example:
    >>> lora(rank=4, alpha=8).scale_at('encoder/layers_0/attention/query/kernel')
    2.0

  Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models"
  (2021), https://arxiv.org/abs/2106.09685, eq. 3; Kalajdzievski, "A Rank
  Stabilization Scaling Factor" (2023), https://arxiv.org/abs/2312.03732. The
  paper draws A from a normal; the bound here is that of PEFT's files.
  """
  return Lora(
    rank=rank if isinstance(rank, int) else tuple((p, r) for p, r in rank),
    alpha=alpha,
    targets=(targets,) if isinstance(targets, str) else tuple(targets),
    rank_stabilised=rank_stabilised,
    dropout=dropout,
    kernels=kernels or {},
  )
