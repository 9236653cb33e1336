# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models: from a configuration, from a checkpoint, and back."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import os
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax.checkpoints import base
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints.names import t5 as t5_names
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.nn import lm
from mergejax.nn import t5
from mergejax.nn import vision

# model_type -> (module, config class)
_KINDS = {
  't5x': (t5.Transformer, t5.T5Config),
  'lm': (lm.LanguageModel, lm.LMConfig),
  'mlp': (vision.MLP, vision.MLPConfig),
  'vgg': (vision.VGG, vision.VGGConfig),
  'resnet': (vision.ResNet, vision.ResNetConfig),
  'vit': (vision.ViT, vision.ViTConfig),
}
# What of a batch must be below a size of the model: tokens, and labels.
_TOKENS = (
  'encoder_input_tokens', 'decoder_input_tokens', 'decoder_target_tokens',
)  # fmt: skip
# Running statistics of batch norms, which a tree of parameters may hold.
BATCH_STATS = 'batch_stats'


def build(config: Mapping[str, Any]) -> nn.Module:
  """Builds the module that a `config.json` of this project describes.

  Args:
    config: `model_type` (`'t5x'`, `'lm'`, `'mlp'`, `'vgg'`, `'resnet'`, `'vit'`)
      and the fields of its config class; missing fields take their defaults.

  Raises:
    UserError: unknown `model_type` or field (near names are offered).

  Example:
    >>> build({'model_type': 'lm', 'emb_dim': 8}).config.emb_dim
    8
  """
  fields = dict(config)
  kind = fields.pop('model_type', None)
  if kind not in _KINDS:
    raise errors.ConfigError(errors.near(str(kind), _KINDS, 'model_type'))
  module, config_class = _KINDS[kind]
  known = [field.name for field in dataclasses.fields(config_class)]
  for name, value in fields.items():
    if name not in known:
      raise errors.ConfigError(
        errors.near(name, known, f'setting of a {kind} model,')
      )
    if isinstance(value, list):
      fields[name] = tuple(value)
  return module(config_class(**fields))


def describe(module: nn.Module) -> dict[str, Any]:
  """The `config.json` from which `build` makes `module` again."""
  for kind, (module_class, _) in _KINDS.items():
    if isinstance(module, module_class):
      return {'model_type': kind, **dataclasses.asdict(module.config)}
  raise errors.ConfigError(
    f'{type(module).__name__} cannot be described by a config.json; known '
    f'model types: {", ".join(_KINDS)}.'
  )


def _kind(module):
  """How messages call what a module is."""
  for kind, (module_class, _) in _KINDS.items():
    if isinstance(module, module_class):
      return kind
  return type(module).__name__


def example_batch(
  module: nn.Module, rows: int = 1, *, length: int = 1
) -> dict[str, jax.Array]:
  """A batch that a known model accepts: all tokens 1, all pixels 0.

  Raises:
    UserError: the module is none of this project's.
  """
  describe(module)
  if isinstance(module.config, vision.VisionConfig):
    return {
      'images': jnp.zeros((rows, *module.config.image_shape), jnp.float32),
      'labels': jnp.zeros((rows,), jnp.int32),
    }
  names = ['decoder_input_tokens', 'decoder_target_tokens']
  if isinstance(module, t5.Transformer):
    names.append('encoder_input_tokens')
  return {name: jnp.ones((rows, length), jnp.int32) for name in names}


def arguments(
  batch: Mapping[str, Any],
) -> tuple[list[typing.Array], dict[str, typing.Array]]:
  """`(positional, by name)` of a batch for a module's `__call__`."""
  if 'images' in batch:
    return [batch['images']], {}
  names = ('encoder_segment_ids', 'decoder_segment_ids')
  if 'encoder_input_tokens' in batch:
    positional = [batch['encoder_input_tokens']]
  else:
    positional = []
    names = ('decoder_segment_ids', 'decoder_causal_attention')
  positional += [batch['decoder_input_tokens'], batch['decoder_target_tokens']]
  return positional, {name: batch[name] for name in names if name in batch}


def check_batch(
  module: nn.Module, batch: Mapping[str, Any], source: str = 'the data'
) -> None:
  """Raises if a batch, in host memory, has what the model does not know.

  A compiled program cannot refuse a token without a row: its logits are NaN,
  and the answer that is most likely then is token 0.

  Args:
    module: the model. One whose `config` tells neither `vocab_size` nor
      `classes` passes.
    batch: see `logits`.
    source: where it comes from, for the message.

  Raises:
    UserError: a token or a label below 0, or beyond the model's sizes.
  """
  config = getattr(module, 'config', None)
  for names, setting in ((('labels',), 'classes'), (_TOKENS, 'vocab_size')):
    size = getattr(config, setting, None)
    for name in names if size is not None else ():
      values = np.asarray(batch.get(name, ()))
      for value in (values.min(), values.max()) if values.size else ():
        if not 0 <= value < size:
          raise errors.ConfigError(
            f'{name} of {source} hold the number {value}, but the '
            f'{_kind(module)} model knows 0 to {size - 1} only '
            f'({setting}={size}). They were made with the vocabulary, or for '
            'the classes, of another model: use those that this model was '
            f'trained with, or, for a fresh model, a larger {setting}.'
          )


def variables(params: typing.Tree) -> dict[str, typing.Tree]:
  """A tree as flax's collections: `params`, and `batch_stats` if it has them."""
  if BATCH_STATS not in params:
    return {'params': params}
  rest = {name: leaf for name, leaf in params.items() if name != BATCH_STATS}
  return {'params': rest, BATCH_STATS: params[BATCH_STATS]}


def logits(
  module: nn.Module,
  params: typing.Tree,
  batch: Mapping[str, Any],
  key: jax.Array | None = None,
) -> jax.Array:
  """What a model says of a batch.

  Args:
    module: a T5, a language model (T5X's call signature) or an image
      classifier.
    params: its parameters.
    batch: seqio's names: `decoder_input_tokens`, `decoder_target_tokens`,
      optionally `encoder_input_tokens`, segment ids and
      `decoder_causal_attention`. Or `images`.
    key: enables dropout.

  Returns:
    `<float32>[batch, length, vocab]`, or `<float32>[batch, classes]`.
  """
  positional, named = arguments(batch)
  if 'images' not in batch:
    named['enable_dropout'] = key is not None
  return module.apply(
    variables(params),
    *positional,
    **named,
    rngs=None if key is None else {'dropout': key},
  )


def answer_logits(
  module: nn.Module, answers: jax.Array
) -> Callable[[typing.Tree, Mapping[str, Any]], jax.Array]:
  """A text-to-text model as a classifier over a list of answers.

  `logits[b, c] = sum_t log p(answer_c[t] | input_b, answer_c[<t])`.

  Args:
    module: a T5.
    answers: `<int32>[classes, length]` tokens, ended by the end token and
      padded with 0.

  Returns:
    `(params, batch) -> <float32>[batch, classes]`.
  """
  answers = jnp.asarray(answers, jnp.int32)

  def fn(params, batch):
    inputs = batch['encoder_input_tokens']
    encoded = module.apply(
      {'params': params}, inputs, method=type(module).encode
    )

    def score(answer):
      tokens = jnp.broadcast_to(answer, (len(inputs), len(answer)))
      shifted = jnp.pad(tokens, ((0, 0), (1, 0)))[:, :-1]
      given = module.apply(
          {'params': params}, encoded, inputs, shifted, tokens,
          method=type(module).decode,
      )  # fmt: skip
      log_p = jax.nn.log_softmax(given.astype(jnp.float32))
      picked = jax.nn.one_hot(tokens, log_p.shape[-1], dtype=log_p.dtype)
      real = (tokens > 0).astype(log_p.dtype)[..., None]
      return jnp.sum(log_p * picked * real, axis=(1, 2))

    return jax.lax.map(score, answers).T

  return fn


def training_logits(
  module: nn.Module,
  params: typing.Tree,
  batch: Mapping[str, Any],
  key: jax.Array | None = None,
) -> tuple[jax.Array, typing.Tree | None]:
  """`logits` in training mode, and the batch norms' new running statistics.

  Rows of weight 0 fill a batch and have no part in mean and variance; a batch
  of nothing else leaves the statistics as they were.

  Raises:
    UserError: a batch norm whose first axis is not that of the batch, where
      some rows have no weight.
  """
  if BATCH_STATS not in params:
    return logits(module, params, batch, key), None
  positional, named = arguments(batch)
  real = None
  if 'weights' in batch:
    real = jnp.asarray(batch['weights']) > 0
  with nn.intercept_methods(_norms_of(real)):
    result, changed = module.apply(
      variables(params), *positional, **named, train=True, mutable=[BATCH_STATS]
    )
  stats = changed[BATCH_STATS]
  if real is not None:
    keep = lambda new, old: jnp.where(jnp.any(real), new, old)
    stats = jax.tree.map(keep, stats, params[BATCH_STATS])
  return result, stats


def _norms_of(real: jax.Array | None) -> Callable[..., Any]:
  """An interceptor that shows batch norms the real rows, `<bool>[batch]`."""

  def interceptor(call, positional, named, context):
    if (
      real is None
      or not isinstance(context.module, nn.BatchNorm)
      or context.method_name != '__call__'
      or named.get('mask') is not None
    ):
      return call(*positional, **named)
    inputs = positional[0] if positional else named['x']
    if len(inputs) != len(real):
      raise errors.ConfigError(
        f'The batch norm {"/".join(context.module.path)} sees {len(inputs)} '
        f'rows, the batch has {len(real)}, some of no weight: which of them it '
        'must leave out is not known. Give it its `mask`, or whole batches '
        'without weights.'
      )
    # The mean of no row is NaN: where none is real, all are taken.
    mask = (real | ~jnp.any(real)).reshape(-1, *(1,) * (inputs.ndim - 1))
    return call(*positional, **named, mask=mask)

  return interceptor


def targets(batch: Mapping[str, Any]) -> jax.Array:
  """`<int32>[batch, length]` target tokens, or `<int32>[batch]` labels."""
  if 'images' in batch:
    return jnp.asarray(batch['labels'], jnp.int32)
  return jnp.asarray(batch['decoder_target_tokens'])


def given_weights(batch: Mapping[str, Any]) -> typing.Array:
  """Weight of every target, in the dtype and the memory where the batch has it.

  Returns:
    What the batch gives; else `<bool>`, False on padding.
  """
  weights = batch.get('decoder_loss_weights', batch.get('weights'))
  if weights is not None:
    return weights
  if 'images' in batch:
    return np.ones(batch['labels'].shape, np.bool_)
  return batch['decoder_target_tokens'] > 0


def target_weights(batch: Mapping[str, Any]) -> jax.Array:
  """`<float32>` weight of every target: 1, 0 for padding, or what is given."""
  return jnp.asarray(given_weights(batch)).astype(jnp.float32)


def init_params(module: nn.Module, key: jax.Array) -> typing.Tree:
  """Fresh float32 parameters of a model."""
  made = _init(module, key)
  if BATCH_STATS in made:
    return {**made['params'], BATCH_STATS: made[BATCH_STATS]}
  return made['params']


@functools.partial(jax.jit, static_argnums=0)
def _init(module, key):
  """Compiled, so that the model is traced and not run."""
  positional, named = arguments(example_batch(module))
  return module.init(key, *positional, **named)


def param_specs(module: nn.Module) -> typing.SpecTree:
  """`{path: LeafSpec}` of a model, without making its parameters."""
  return tree.specs(
    jax.eval_shape(lambda: init_params(module, jax.random.key(0)))
  )


def load_module(path: os.PathLike | str) -> nn.Module:
  """The module that a checkpoint's `config.json` describes; reads no weight.

  Raises:
    UserError: no `config.json`, or an unknown model type or setting.
  """
  config = checkpoint.read_config(path)
  if config is None:
    raise errors.ConfigError(
      f'{path} has no {checkpoint.CONFIG}, so its architecture is unknown. '
      'Add one: {"model_type": "lm" or "t5x", ...sizes}. `mergejax inspect` '
      'lists the shapes.'
    )
  if is_hugging_face(path):
    config = dict(model_type='t5x', **t5_names.config_from_hf(config))
  return build(config)


def is_hugging_face(path: os.PathLike | str) -> bool:
  """Whether a checkpoint's parameters have Hugging Face's names for T5."""
  return (checkpoint.read_config(path) or {}).get('model_type') == 't5'


def load_model(
  path: os.PathLike | str, sharding: Any = None
) -> tuple[nn.Module, typing.Tree]:
  """Loads a model: its linen module and its parameters.

  Args:
    path: a checkpoint directory with a `config.json`: one of ours (saved with
      `save_checkpoint(..., config=...)`) or a Hugging Face T5.
    sharding: see `ParamStore.read`.

  Returns:
    `(module, params)`; call `module.apply({'params': params}, ...)`, for T5
    with the signature of T5X's `Transformer`.

  Raises:
    UserError: no `config.json`, an unknown model type, or weights that are not
      those of the described model.
  """
  store = checkpoint.open_weights(path)
  module = load_module(path)
  if is_hugging_face(path):
    leaves = t5_names.from_hf(
      tree.flatten(store.read()),
      tied_head=module.config.logits_via_embedding,
    )
    store = base.MemoryStore(leaves, name=str(path))
  params = store.read(sharding=sharding)
  tree.check_same(
    param_specs(module),
    tree.specs(params),
    expected_name=f'the model that {checkpoint.CONFIG} describes',
    given_name=str(path),
  )
  return module, params
