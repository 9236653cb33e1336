# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Our models inside T5X: its `train.py`, `eval.py` and `infer.py`, through gin.

T5X's models take a linen module with the call signature of its networks, which
ours have. What they need besides is here: logical axes among the variables that
`init` makes (`params_axes`), by which T5X partitions parameters and its
Adafactor factors them, and word of scanned layers. A gin file of T5X is given

    from mergejax import t5x_adapter
    from mergejax.nn import t5
    models.EncoderDecoderModel.module = @t5x_adapter.Transformer()
    t5x_adapter.Transformer.config = @t5.T5Config()

in place of its own network (`gin/t5x/t5_1_1.gin` does), or, for a decoder-only
model, `@t5x_adapter.DecoderOnlyModel()` with `@t5x_adapter.LanguageModel()`.
Its checkpoints have the names that they would have with T5X's networks.

This is the only module that imports T5X, which is not on the package registry:
https://github.com/google-research/t5x.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any

from flax.linen import partitioning as flax_partitioning
import jax
import jax.numpy as jnp
from t5x import decoding
from t5x import models as t5x_models

from mergejax import models
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.nn import lm
from mergejax.nn import t5


def params_axes(module: Any, params: typing.Tree) -> typing.Tree:
  """The collection `params_axes` that T5X expects beside `params`.

  Args:
    module: a T5 or a language model of ours.
    params: its parameters, or their shapes.

  Returns:
    A tree like `params` whose leaves are called `kernel_axes` for `kernel`, and
    are flax's `AxisMetadata`.
  """
  specs = models.family_of(module).specs(params)
  return tree.unflatten(
    {
      f'{path}_axes': flax_partitioning.AxisMetadata(spec.axes)
      for path, spec in specs.items()
    }
  )


class _InsideT5X:
  """What T5X asks of a module beyond ours."""

  @property
  def scan_layers(self) -> bool:
    """Whether caches have the axis of layers in front of that of rows."""
    return self.config.scan_layers

  def init(self, *args: Any, **kwargs: Any) -> Mapping[str, typing.Tree]:
    """Variables as `linen.Module.init` makes them, and `params_axes`."""
    variables = super().init(*args, **kwargs)
    module = type(self).__bases__[-1](self.config)
    return {
      **variables,
      'params_axes': params_axes(module, variables['params']),
    }


class Transformer(_InsideT5X, t5.Transformer):
  """T5 for `t5x.models.EncoderDecoderModel`."""


class LanguageModel(_InsideT5X, lm.LanguageModel):
  """The decoder-only model for `DecoderOnlyModel` below."""


class DecoderOnlyModel(t5x_models.DecoderOnlyModel):
  """T5X's decoder-only model, with a `LanguageModel` of ours.

  T5X's network reads a prompt in one go into its cache. Ours reads it token by
  token, and so takes as many steps as prompt and answer have tokens. Answers
  are the same, but for the random numbers of sampled ones.
  """

  def __init__(
    self,
    module: LanguageModel,
    *args: Any,
    decode_fn: Callable[..., Any] = decoding.temperature_sample,
    inputs_bidirectional_attention: bool = False,
    **kwargs: Any,
  ):
    """Takes what T5X's model takes.

    Raises:
      ConfigError: `inputs_bidirectional_attention`: a prompt that sees itself
        in both directions cannot be read token by token.
    """
    if inputs_bidirectional_attention:
      raise errors.ConfigError(
        'inputs_bidirectional_attention=True: inside T5X our language model '
        'reads prompts token by token, so they cannot see what follows. Train '
        "prefix language models with `mergejax train` (kind='prefix_lm')."
      )
    super().__init__(
      module,
      *args,
      decode_fn=functools.partial(_from_the_start, decode_fn),
      **kwargs,
    )

  def _compute_kv_cache(
    self,
    params: typing.Tree,
    inputs: jax.Array,
    causal_attention_mask: jax.Array,
  ) -> tuple[typing.Tree, jax.Array]:
    """An empty cache, and how many tokens each prompt has."""
    del causal_attention_mask
    ones = jnp.ones_like(inputs)
    _, made = self.module.apply(
      {'params': params}, ones, ones, decode=True, mutable=['cache']
    )
    return made['cache'], jnp.sum(inputs[:, 1:] != 0, axis=-1)


def _from_the_start(decode_fn, *, inputs, initial_index, **kwargs):
  """Decodes with the prompt as forced tokens, over an empty cache."""
  del initial_index
  return decode_fn(inputs=inputs, **kwargs)
