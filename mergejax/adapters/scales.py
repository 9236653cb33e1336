# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""(IA)^3: activations are scaled by learned vectors."""

from collections.abc import Mapping, Sequence
import dataclasses

import jax.numpy as jnp

from mergejax.adapters import sites as sites_lib
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.intercept import linear

_PLACES = ('inputs', 'outputs')
# Keys and values of every attention; the hidden layer, where `wo` reads it.
T5_RULES = (
  (r'(.*/)?(key|value)/kernel', 'outputs'),
  (r'(.*/)?wo/kernel', 'inputs'),
)
SCALE = 'ia3_scale'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ia3(sites_lib.LayerAdapter):
  """See `ia3`; two with the same rules are the same adapter."""

  rules: tuple[tuple[str, str], ...] = T5_RULES
  kernels: Mapping[type, linear.Describe] = dataclasses.field(
    default_factory=dict, hash=False
  )

  def __post_init__(self):
    for _, place in self.rules:
      if place not in _PLACES:
        raise errors.ConfigError(
          errors.near(place, _PLACES, 'place of a scale')
        )

  def sites(self, base):
    return sites_lib.find(base, [pattern for pattern, _ in self.rules])

  def place_at(self, path: typing.Path) -> str:
    """'inputs' or 'outputs': what is scaled at a kernel."""
    return next(
      place
      for pattern, place in self.rules
      if tree.expression(pattern, 'target').fullmatch(path)
    )

  def parts(self, site):
    shape, names = getattr(site, self.place_at(site.path))
    ones = lambda key, shape: jnp.ones(shape, jnp.float32)
    return {SCALE: sites_lib.Part(shape, names, ones)}

  def before(self, site, parts, inputs):
    if self.place_at(site.path) == 'outputs':
      return inputs
    return _scaled(inputs, parts[SCALE].reshape(-1))

  def after(self, site, parts, inputs, outputs, key=None):
    if self.place_at(site.path) == 'inputs':
      return outputs
    return _scaled(outputs, parts[SCALE])

  def folded(self, site, own, parts):
    (name,) = (name for name in own if name != 'bias')
    matrix, scale = site.matrix(own[name]), parts[SCALE].reshape(-1)
    if self.place_at(site.path) == 'inputs':
      return {name: site.unmatrix(matrix * scale[:, None])}
    found = {name: site.unmatrix(matrix * scale[None])}
    if 'bias' in own:
      found['bias'] = own['bias'] * parts[SCALE]
    return found


def _scaled(x, scale):
  return (x.astype(jnp.float32) * sites_lib.last(scale, x)).astype(x.dtype)


def ia3(
  *,
  rules: Sequence[tuple[str, str]] = T5_RULES,
  kernels: Mapping[type, linear.Describe] | None = None,
) -> Ia3:
  """(IA)^3: `K = l_k (x W_k)`, `V = l_v (x W_v)`, `y = (l_ff h) W_o`.

  Every scale is a vector, `<float32>` of the axes of what it scales, 1 at
  first, which lies beside its kernel as `ia3_scale`. A projection's bias is
  scaled with it.

  Args:
    rules: `(regular expression over whole paths of kernels, 'inputs' or
      'outputs')`: what is scaled there; first match wins. By default outputs of
      keys and values, and inputs of `wo`, which are the paper's places for T5:
      the hidden layer after its activation. In a gated block that equals
      T-Few's code, which scales the outputs of `wi_1`.
    kernels: `{class: describe}` of modules of your own with linear maps.

  Returns:
    An adapter, for `adapt`. It folds exactly: columns of keys and values, and
    rows of `wo`, are scaled.

  Raises:
    ConfigError: a place that is none; when it is put to a model, a rule that
      matches nothing.

  Example:
    >>> ia3().place_at('encoder/layers_0/mlp/wo/kernel')
    'inputs'

  Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and
  Cheaper than In-Context Learning" (2022), https://arxiv.org/abs/2205.05638,
  section 3.3.
  """
  return Ia3(
    rules=tuple((pattern, place) for pattern, place in rules),
    kernels=kernels or {},
  )
