# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""K experts as one model: an output ensemble that scores, answers and serves.

A `Mixture` is a `ModelFamily`, so whoever takes a model takes it: tables of a
suite, `decode.make_decoder` with draws or beams, answers to lines of text. Its
parameters are the experts' with a leading axis K, and the prior:

    mixture = Mixture(family, experts=3)
    params = mixture.join([a, b, c], prior=[0.5, 0.3, 0.2])
    tokens = decode.make_decoder(mixture, length=32)(params, batch)

Every expert has its own key and value cache, on the mesh axis `branch`. The
state of the posterior is in the cache too, and goes where a beam goes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax import models
from mergejax import partition
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.experts import branch
from mergejax.experts import ensemble
from mergejax.models import base
from mergejax.models import lm


class Mixture(base.ModelFamily):
  """`p(x_t | x_<t) = sum_j w_t,j p_j(x_t | x_<t)` of K experts of one family.

  Probabilities are mixed, by one log-sum-exp over the experts; the weights
  follow the tokens that came, of a prompt too, see `ensemble.Posterior`.

  Source: Li et al., "Branch-Train-Merge" (2022),
  https://arxiv.org/abs/2208.03306.
  """

  model_type = 'mixture'

  def __init__(
    self,
    model: nn.Module | models.ModelFamily,
    *,
    experts: int,
    posterior: ensemble.Posterior = ensemble.Posterior(),
    mesh: jax.sharding.Mesh | None = None,
  ):
    """Says what is mixed and how.

    Args:
      model: the module of every expert, or its family.
      experts: K.
      posterior: where the weights come from.
      mesh: K experts lie on its `branch`; None: on one device.

    Raises:
      ConfigError: not a model of text, no expert, or experts that do not divide
        over the branches of the mesh.
    """
    family = models.family_of(model)
    if not isinstance(family, lm.TextFamily):
      raise errors.ConfigError(
        f'{type(family).__name__} is no model of text: a posterior follows the '
        'tokens of a text. Average the experts instead.'
      )
    errors.check_whole('experts', experts)
    if mesh is not None:
      branch.check_experts(experts, mesh)
    super().__init__(family.module)
    self.family, self.experts = family, experts
    self.posterior, self.mesh = posterior, mesh
    # What a class says of itself elsewhere, a mixture learns from its experts.
    facts = {
      'decodes': family.decodes,
      'answers': family.answers,
      'sizes': family.sizes,
      'axes': (
        *(
          (f'experts/(?:{pattern})', ('branch', *axes))
          for pattern, axes in family.axes
        ),
        ('prior', ('branch',)),
      ),
    }
    vars(self).update(facts)

  def join(
    self,
    experts: Sequence[typing.Tree],
    prior: typing.Array | None = None,
  ) -> dict[str, Any]:
    """The parameters of the mixture, on its mesh.

    Args:
      experts: K trees of parameters.
      prior: `[K]`, or `[K, batch]` for batches of that size; uniform by default.

    Returns:
      `{'experts': leaves <any>[K, ...], 'prior': <float32>[K]}`.

    Raises:
      UserError: another number of experts, trees that differ (the first
        differences are listed), or a prior that is none.
    """
    if len(experts) != self.experts:
      raise errors.ConfigError(
        f'A mixture of {self.experts} experts was given {len(experts)}.'
      )
    for i, one in enumerate(experts):
      tree.check_same(
        tree.specs(experts[0]), tree.specs(one),
        expected_name='expert 0', given_name=f'expert {i}',
      )  # fmt: skip
    if prior is None:
      prior = ensemble.uniform_prior(self.experts)
    prior = ensemble.check_prior(prior, self.experts).astype(np.float32)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *experts)
    params = {'experts': stacked, 'prior': jnp.asarray(prior)}
    if self.mesh is None:
      return params
    return jax.device_put(params, self.layout(params))

  def layout(self, params: typing.Tree) -> typing.Tree:
    """Shardings of the parameters: experts on `branch`, the rest as usual."""
    if self.mesh is None:
      raise ValueError('A mixture without a mesh lies on one device.')
    # Of priors with a row each, the rows stay together.
    one = {**params, 'prior': jnp.zeros(self.experts)}
    axes: dict[str, Any] = {p: spec.axes for p, spec in self.specs(one).items()}
    axes['prior'] = ('branch', None)[: params['prior'].ndim]
    return partition.shardings(self.mesh, params, axes, partition.standard())

  def init(self, key):
    keys = jax.random.split(key, self.experts)
    prior = ensemble.uniform_prior(self.experts).astype(np.float32)
    return {
      'experts': self._mapped(self.family.init)(keys),
      'prior': jnp.asarray(prior),
    }

  # What a batch is, the experts say ------------------------------------------

  def arguments(self, batch, *, train=False):
    return self.family.arguments(batch, train=train)

  def targets(self, batch):
    return self.family.targets(batch)

  def given_weights(self, batch):
    return self.family.given_weights(batch)

  def segments(self, batch):
    return self.family.segments(batch)

  def with_targets(self, batch, targets):
    return self.family.with_targets(batch, targets)

  def example_batch(self, rows=1, *, length=1):
    return self.family.example_batch(rows, length=length)

  def mask(self, path, batch):
    return self.family.mask(path.removeprefix('experts/'), batch)

  def rng_streams(self, *, train):
    return self.family.rng_streams(train=train)

  # What it says --------------------------------------------------------------

  def call(self, variables, batch, *, train=False, rngs=None, mutable=()):
    """Log-probabilities of the mixture, `<float32>[batch, length, vocab]`.

    The history of a position is the targets before it.

    Raises:
      DataError: rows that hold several examples.
    """
    if train or rngs or mutable:
      raise errors.ConfigError(
        'A mixture of experts does not train: train the experts, or average '
        'them into one model.'
      )
    if self.segments(batch) is not None:
      raise errors.DataError(
        'These rows hold several examples, and the weights of experts follow '
        'one text: give batches that are not packed.'
      )
    params = variables['params']
    log_p = self._mapped(
      lambda own: jax.nn.log_softmax(
        self.family.logits(own, batch).astype(jnp.float32)
      )
    )(params['experts'])
    targets = jnp.asarray(self.targets(batch), jnp.int32)
    # [experts, batch, length]
    lp = jnp.take_along_axis(log_p, targets[None, ..., None], axis=-1)[..., 0]
    how = self.posterior
    log_w = ensemble.log_posterior(
      lp, targets > 0, params['prior'], kind=how.kind, tempering=how.tempering,
      floor=how.floor,
    )  # fmt: skip
    mixed = jax.nn.logsumexp(log_w[..., :-1, None] + log_p, axis=0)
    return mixed, {}

  def init_cache(self, params, batch, length):
    cache = self._mapped(
      lambda own: self.family.init_cache(own, batch, length)
    )(params['experts'])
    rows = batch['decoder_input_tokens'].shape[0]
    log_prior = ensemble.log_of_prior(params['prior'], self.experts)
    log_prior = jnp.broadcast_to(log_prior, (self.experts, rows))
    said = (self.experts, rows, self.config.vocab_size)
    return {
      'experts': cache,
      'log_prior': log_prior,
      'state': self.posterior.start(log_prior),
      # What each expert said of the token that comes next.
      'log_p': jnp.zeros(said, jnp.float32),
    }

  def decode_step(self, params, cache, tokens):
    state = self.posterior.advance(
      cache['state'],
      cache['log_prior'],
      jnp.take_along_axis(cache['log_p'], tokens[None, :, None], axis=-1)[
        ..., 0
      ],
      tokens > 0,  # 0 begins, and fills what has ended
    )
    logits, own = self._mapped(self.family.decode_step, (0, 0, None))(
      params['experts'], cache['experts'], tokens
    )
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    log_w = self.posterior.log_weights(state)
    mixed = jax.nn.logsumexp(log_w[..., None] + log_p, axis=0)
    return mixed, {**cache, 'experts': own, 'state': state, 'log_p': log_p}

  def weights(self, cache: Mapping[str, Any]) -> jax.Array:
    """`<float32>[K, rows]`: the weights that a cache has come to.

    The last token told to `decode_step` counts; the one it makes likely does
    not yet.
    """
    return jnp.exp(self.posterior.log_weights(cache['state']))

  def cache_rows(self, path, leaf):
    if not path.startswith('experts/'):
      return 1  # [experts, rows, ...]
    one: Any = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
    axis = self.family.cache_rows(path.removeprefix('experts/'), one)
    return None if axis is None else axis + 1

  def _mapped(self, fn, in_axes: Any = 0):
    """A function of one expert, of all of them side by side."""
    name = None if self.mesh is None else 'branch'
    return jax.vmap(fn, in_axes, spmd_axis_name=name)
