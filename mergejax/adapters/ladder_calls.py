# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A model's call with a ladder beside it: what is read, what is replaced.

The encoder's output carries the side network's behind its own, `[batch, length,
embed + embed / r]`, and the decoder is given both parts back: so the side network
goes wherever a family takes an encoder's output, into caches too. The head is
given what the side network says instead of the decoder's output.

Nothing that is met inside a scan over layers can be kept outside but what the
scan stacks: there the layers' inputs are left in the collection `intermediates`,
which may change during the call, and is given back without them.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from flax.core import scope as scope_lib
import flax.linen as nn
import jax
import jax.numpy as jnp

from mergejax import partition
from mergejax.adapters import base as base_lib
from mergejax.adapters import side_stacks
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.nn import lm
from mergejax.nn import t5
from mergejax.nn import transformer

# Of a batch that brings its ladders: `<dtype>[batch, kept + 1, length, embed]`.
ENCODER, DECODER = 'encoder_ladders', 'decoder_ladders'
# With `merge_last`: `<dtype>[batch, length, embed]`, what the head is given.
LAST = 'decoder_last'
# The name of the side network: of its leaves, and of its part of a cache.
SIDE = 'side'
_CACHED = ('cache', 'encoded')
# What scanned layers leave: `<dtype>[layers, batch, length, embed]`.
_COLLECTION, _MARK = 'intermediates', 'inputs_for_ladder'
_CALLS = ('__call__', 'encode', 'decode')
_LAYERS = (transformer.EncoderLayer, transformer.DecoderLayer)


class Settings(Protocol):
  """What a call must know of a ladder; see `ladders.ladder`."""

  @property
  def reduction(self) -> int: ...
  @property
  def temperature(self) -> float: ...
  @property
  def gates(self) -> str: ...
  @property
  def residual(self) -> str: ...
  @property
  def merge_last(self) -> bool: ...
  @property
  def backbone_dropout(self) -> bool: ...

  def kept(self, base: typing.SpecTree, stack: str) -> tuple[int, ...]: ...


class _Reading(NamedTuple):
  """A stack of the backbone while it runs.

  Attributes:
    module: the stack.
    stack: 'encoder' or 'decoder'.
    replayed: its ladders, if the batch brings them; its layers do not run then.
    met: the inputs of its layers, unless they are scanned; behind them what its
      last norm is given.
    finish: `ladders -> state` of the side stack.
  """

  module: nn.Module
  stack: str
  replayed: jax.Array | None
  met: list[jax.Array]
  finish: Callable[[list[jax.Array]], jax.Array]


class Calls:
  """An interceptor for `nn.intercept_methods`.

  Attributes:
    collected: the ladders that were met, by their names in a batch.
  """

  def __init__(self, settings: Settings, call: base_lib.Call, *, collect=False):
    self.collected: dict[str, jax.Array] = {}
    self._settings, self._call, self._collect = settings, call, collect
    self._leaves = tree.unflatten(dict(call.adapter)).get(SIDE, {})
    self._reading: _Reading | None = None
    # Ladders of a batch are those of its own targets: a call of the whole model
    # reads these, no other does.
    self._whole = False
    self._leaving = False

  def __call__(self, run, arguments, named, context):
    module, method = context.module, context.method_name
    is_model = isinstance(module, (t5.Transformer, lm.LanguageModel))
    if is_model and method in _CALLS and self._must_leave(module):
      return self._left(module, method, arguments, named)
    if method == '__call__':
      if is_model:
        self._whole = True
        try:
          return run(*arguments, **named)
        finally:
          self._whole = False
      if isinstance(module, transformer.Encoder):
        return self._encoder(run, module, *arguments, **named)
      if isinstance(module, transformer.Decoder):
        return self._decoder(run, module, *arguments, **named)
    reading = self._reading
    if reading is None:
      return run(*arguments, **named)
    # A scan calls its layer by another method, which calls this one.
    if method == '__call__' and isinstance(module, _LAYERS):
      return self._layer(reading, run, module, *arguments, **named)
    if method == '__call__' and module.name == f'{reading.stack}_norm':
      reading.met.append(*arguments)
    if _is_head(module, method):
      return run(self._head(reading, *arguments), **named)
    return run(*arguments, **named)

  # Of scanned layers -----------------------------------------------------------

  def _must_leave(self, module):
    return module.config.scan_layers and not self._leaving

  def _left(self, module, method, arguments, named):
    """A call of a model with scanned layers, in which they may leave inputs."""
    scope = module.scope
    allowed = scope_lib.union_filters(scope.mutable, _COLLECTION)
    self._leaving = True
    try:
      found, changed = self._call.family.module.apply(
        module.variables, *arguments, rngs=scope.rngs, mutable=allowed,
        method=method, **named,
      )  # fmt: skip
    finally:
      self._leaving = False
    for collection, values in changed.items():
      if module.is_mutable_collection(collection):
        for name, value in _unmarked(values).items():
          module.put_variable(collection, name, value)
    return found

  # Of the backbone -------------------------------------------------------------

  def _encoder(self, run, module, embedded, bias, *, deterministic, **named):
    def finish(ladders):
      return self._side(module, 'encoder', deterministic, ladders, None, bias)

    reading = self._begun(module, 'encoder', ENCODER, finish)
    still = self._still(deterministic)
    found = run(embedded, bias, deterministic=still, **named)
    state = self._finished(reading, ENCODER)
    if state is None:
      return found
    return jnp.concatenate([found, state.astype(found.dtype)], axis=-1)

  def _decoder(self, run, module, tokens, encoded, bias, cross_bias, **named):
    width = module.config.emb_dim
    side = None
    if encoded is not None:
      encoded, side = encoded[..., :width], encoded[..., width:]
      # Side by side they have a gradient both; the backbone's half has none.
      encoded = jax.lax.stop_gradient(encoded)

    def finish(ladders):
      return self._side(
        module, 'decoder', named['deterministic'], ladders, side, bias,
        cross_bias, decode=named['decode'],
      )  # fmt: skip

    self._begun(module, 'decoder', DECODER, finish)
    still = self._still(named['deterministic'])
    return run(
      tokens, encoded, bias, cross_bias, **{**named, 'deterministic': still}
    )

  def _layer(self, reading, run, module, x, *arguments, **named):
    if reading.replayed is not None:
      return x
    if module.config.scan_layers:
      module.sow(
        _COLLECTION, _MARK, x, init_fn=lambda: None, reduce_fn=lambda _, new: new
      )  # fmt: skip
    else:
      reading.met.append(x)
    return run(x, *arguments, **named)

  def _head(self, reading, last):
    """What the head is given, from what it would be given."""
    if self._collect and self._settings.merge_last:
      self.collected[LAST] = last
    state = self._finished(reading, DECODER)
    if state is None:
      return last
    up = self._leaves['up']
    wide = jnp.dot(state.astype(jnp.float32), up['kernel'])
    wide = wide + up['bias'][None, None]
    if self._settings.merge_last:
      if reading.replayed is not None:
        last = self._call.batch[LAST]
      gate = self._leaves['gate_last'] / self._settings.temperature
      mu = jax.nn.sigmoid(gate)
      last = jax.lax.stop_gradient(last).astype(jnp.float32)
      wide = mu * wide + (1 - mu) * last
    return wide.astype(state.dtype)

  def _still(self, deterministic):
    return deterministic or not self._settings.backbone_dropout

  # Of the side network ---------------------------------------------------------

  def _begun(self, module, stack, name, finish):
    batch = self._call.batch
    replayed = None
    if self._whole and DECODER in batch and not self._collect:
      rungs = 1 + len(self._settings.kept(self._call.base, stack))
      names = [name, *([LAST] if self._settings.merge_last else [])]
      if any(n not in batch for n in names) or batch[name].shape[1] != rungs:
        had = {n: list(x.shape) for n, x in batch.items() if 'ladders' in n}
        raise errors.DataError(
          f'A batch brings the ladders {had}, but this adapter reads '
          f'{" and ".join(names)}, with {rungs} states of the {stack}: collect '
          'them anew, with this adapter.'
        )
      replayed = batch[name]
    self._reading = _Reading(module, stack, replayed, [], finish)
    return self._reading

  def _finished(self, reading, name):
    """The state of the side stack; None while ladders are collected."""
    self._reading = None
    if reading.replayed is not None:
      ladders = _each(jnp.moveaxis(reading.replayed, 1, 0))
    else:
      ladders = self._ladders(reading)
    if self._collect:
      self.collected[name] = jnp.stack(ladders, axis=1)
      return None
    # The backbone's parameters have no gradient, so that this cuts nothing off
    # but a caller's own cotangents.
    ladders = [jax.lax.stop_gradient(h) for h in ladders]
    with partition.rows_alone():
      return reading.finish(ladders)

  def _ladders(self, reading):
    """The embedded tokens, then the outputs of the kept layers.

    Of a layer the output is the next one's input, of the last one the norm's.
    """
    met = reading.met
    if reading.module.config.scan_layers:
      left = reading.module.variables[_COLLECTION][reading.stack][_MARK]
      met = [*_each(left), *met]
    kept = self._settings.kept(self._call.base, reading.stack)
    return [met[0], *(met[i + 1] for i in kept)]

  def _side(
    self, module, stack, deterministic, ladders, encoded, bias, cross_bias=None,
    *, decode=False,
  ):  # fmt: skip
    settings = self._settings
    side = side_stacks.SideStack(
      side_stacks.narrow(module.config, settings.reduction),
      settings.kept(self._call.base, stack),
      None if settings.gates == 'sum' else settings.temperature,
      settings.residual,
      deterministic,
      decode,
      dropped=settings.backbone_dropout,
      name=stack,
      parent=None,
    )
    rngs = None if deterministic else {'dropout': module.make_rng('dropout')}
    given = {'params': self._leaves[stack]}
    changing = []
    if decode:
      given |= {
        name: module.get_variable(name, SIDE)
        for name in _CACHED
        if module.has_variable(name, SIDE)
      }
      changing = [n for n in _CACHED if module.is_mutable_collection(n)]
    state, changed = side.apply(
      given, ladders, encoded, bias, cross_bias, rngs=rngs, mutable=changing
    )
    for name, value in changed.items():
      module.put_variable(name, SIDE, value)
    return state


def _each(stacked: jax.Array) -> list[jax.Array]:
  return [stacked[i] for i in range(len(stacked))]


def _unmarked(left: Mapping[str, Any]) -> dict[str, Any]:
  """A collection without what was left for ladders, and without empty scopes."""
  found = {}
  for name, value in left.items():
    if isinstance(value, Mapping):
      value = _unmarked(value)
      if not value:
        continue
    if name != _MARK:
      found[name] = value
  return found


def _is_head(module: nn.Module, method: str) -> bool:
  """Whether a call makes logits of a decoder's output."""
  if method == 'attend':
    return isinstance(module, transformer.TokenEmbedder)
  return method == '__call__' and module.name == 'logits_dense'


def collect(
  settings: Settings,
  call: base_lib.Call,
  variables: Mapping[str, Any],
) -> dict[str, jax.Array]:
  """What a ladder reads of the backbone, by the names of a batch."""
  calls = Calls(settings, call, collect=True)
  with nn.intercept_methods(calls):
    call.family.call(variables, call.batch)
  return calls.collected


def check_module(family: Any) -> None:
  """Raises a `ConfigError` unless a model is one that a ladder can read."""
  module = family.module
  if not isinstance(module, (t5.Transformer, lm.LanguageModel)):
    raise errors.ConfigError(
      f'A ladder reads the layers of T5 and of the decoder-only model (nn.t5, '
      f'nn.lm); {type(module).__name__} is another module.'
    )
  if module.config.remat_policy != 'none':
    raise errors.ConfigError(
      f'remat_policy is {module.config.remat_policy!r}, but with a ladder nothing '
      "of the backbone is kept for a backward pass: set it to 'none'."
    )
