# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a model says of itself: the one interface that everything else asks.

Whoever trains, watches, evaluates, ranks or merges a model asks its
`ModelFamily`, and knows nothing of the architecture besides. A family is one
file: its configuration and module, the logical axes of its parameters, what a
batch holds, which positions are real, how it decodes, and its names elsewhere.

A family for your own module, in your own file:

    @models.register
    class Probe(models.ModelFamily):
      model_type = 'probe'
      config_class = ProbeConfig
      module_class = ProbeModule
      axes = ((r'hidden/kernel', ('embed', 'mlp')), (r'.*bias', ('mlp',)))

      def arguments(self, batch, *, train=False):
        return [batch['features']], {}
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.models import batch_norm
from mergejax.models import decoding
from mergejax.models import outputs as outputs_lib

Batch = Mapping[str, Any]

# A mask: those rows are real that are not all zero, slots with a token in them.
NONZERO = 'nonzero'


class ModelFamily(decoding.Decoding):
  """One architecture, with one of its modules.

  A subclass states facts as class attributes and overrides what is not as it
  is here, which suits a classifier that is given `inputs` and `labels`; how it
  decodes is in `Decoding`.

  Attributes:
    model_type: its name in `config.json`.
    config_class: dataclass of its sizes; `module_class(config)` is a module.
    module_class: the linen module.
    axes: `(regular expression, logical axes)` of its parameters, first full
      match wins; every parameter must have one. See `partition.ShardingRules`
      for what a mesh makes of them.
    collections: flax collections that change in training and live in the tree
      of parameters beside them, so that merges see them too: 'batch_stats'.
    sizes: `{field of the configuration: names in a batch}`: whole numbers there
      are from 0 to below that size.
    conversions: to and from other libraries' names, by what the command line
      calls those names.
    features: the kernel whose inputs are the features of an example.
    embedded: where the inputs are met as vectors `[batch, length, embed]`, so
      that a prompt can be put before them: `(path of a module, 'argument' or
      'result')` of its call; None if that is not told. See `with_room`.
    module: the module at hand.
  """

  config_class: ClassVar[type | None] = None
  module_class: ClassVar[type[nn.Module]] = nn.Module
  axes: ClassVar[axes_lib.Rules] = ()
  collections: ClassVar[tuple[str, ...]] = ()
  sizes: ClassVar[Mapping[str, Sequence[str]]] = {'classes': ('labels',)}
  conversions: ClassVar[Mapping[str, outputs_lib.Conversion]] = {}
  features: str | None = None
  embedded: ClassVar[tuple[str, str] | None] = None

  def __init__(self, module: nn.Module):
    self.module = module

  @property
  def config(self) -> Any:
    """The sizes of the module; None if it has none."""
    return getattr(self.module, 'config', None)

  @property
  def program_key(self) -> Hashable:
    """What a compiled program of the model depends on, but its parameters."""
    return self.module

  # A batch -------------------------------------------------------------------

  def arguments(
    self, batch: Batch, *, train: bool = False
  ) -> tuple[list[typing.Array], dict[str, Any]]:
    """`(positional, by name)` of a batch for the module's `__call__`."""
    del train
    return [batch['inputs']], {}

  def takes(self, batch: Batch) -> bool:
    """Whether a batch has what the model is called with."""
    try:
      self.arguments(batch)
    except (KeyError, errors.DataError):
      return False
    return True

  def targets(self, batch: Batch) -> typing.Array:
    """`<int32>[batch, length]`, or `[batch]`: what the logits should say."""
    return batch['labels']

  def given_weights(self, batch: Batch) -> typing.Array:
    """Weight of every target, in the dtype and memory where the batch has it.

    Returns:
      What the batch says (`weights`); else `<bool>`, True where it counts.
    """
    if batch.get('weights') is not None:
      return batch['weights']
    return np.ones(np.shape(self.targets(batch)), np.bool_)

  def target_weights(self, batch: Batch) -> jax.Array:
    """`<float32>` weight of every target; 0 for padding."""
    return jnp.asarray(self.given_weights(batch)).astype(jnp.float32)

  def real_rows(self, batch: Batch) -> typing.Array:
    """`<bool>[batch]`: which rows have a target that counts."""
    weights = self.given_weights(batch)
    return weights.reshape(len(weights), -1).max(axis=1) > 0

  def segments(self, batch: Batch) -> typing.Array | None:
    """`<int32>[batch, length]` which example of a packed row a target is of.

    Returns:
      1, 2, ... in the order of the examples, 0 between and behind them; None
      where every row is one example.
    """
    del batch
    return None

  def with_targets(self, batch: Batch, targets: typing.Array) -> Batch:
    """The batch of the same inputs with other targets, which all count.

    Raises:
      ConfigError: the family does not say how targets lie in a batch.
    """
    raise errors.ConfigError(
      f'{type(self).__name__} does not say how targets lie in a batch: give it '
      'the method with_targets(batch, targets), or use other estimators.'
    )

  def example_batch(
    self, rows: int = 1, *, length: int = 1
  ) -> dict[str, jax.Array]:
    """A batch that the model accepts, to find out shapes with."""
    raise errors.ConfigError(
      f'{type(self).__name__} does not say what a batch looks like: give it '
      'the method example_batch(rows, length=1).'
    )

  def with_room(self, batch: Batch, length: int) -> Batch:
    """The batch with room for a prompt before its inputs; see `embedded`."""
    raise errors.ConfigError(
      f'{type(self).__name__} does not say how a prompt comes before its inputs: '
      'give it `embedded` and the method with_room(batch, length).'
    )

  def check_batch(self, batch: Batch, source: str = 'the data') -> None:
    """Raises if a batch, in host memory, has what the model does not know.

    A compiled program cannot refuse a token without a row: its logits are NaN,
    and the answer that is most likely then is token 0.

    Args:
      batch: arrays in host memory.
      source: where it comes from, for the message.

    Raises:
      DataError: a token or a label below 0, or beyond the model's sizes.
    """
    for setting, names in self.sizes.items():
      size = getattr(self.config, setting, None)
      for name in names if size is not None else ():
        values = np.asarray(batch.get(name, ()))
        for value in (values.min(), values.max()) if values.size else ():
          if not 0 <= value < size:
            raise errors.DataError(
              f'{name} of {source} hold the number {value}, but the '
              f'{self.model_type} model knows 0 to {size - 1} only '
              f'({setting}={size}). They were made with the vocabulary, or for '
              'the classes, of another model: use those that this model was '
              f'trained with, or, for a fresh model, a larger {setting}.'
            )

  def mask(self, path: typing.Path, batch: Batch) -> typing.Array | str | None:
    """Which positions are real in what the layer of a parameter is given.

    Args:
      path: of the parameter.
      batch: what the model is given.

    Returns:
      `<bool or float>` of the leading axes of the layer's inputs; None: all of
      them; `NONZERO`: those that are not all zero, of layers that are given
      slots, some of them empty.
    """
    del path
    return batch.get('weights')

  # Calling it ----------------------------------------------------------------

  def rng_streams(self, *, train: bool) -> tuple[str, ...]:
    """Names of the random streams that a call draws from."""
    rate = getattr(self.config, 'dropout_rate', 0.0)
    return ('dropout',) if train and rate else ()

  def apply(
    self,
    variables: Mapping[str, typing.Tree],
    batch: Batch,
    *,
    train: bool = False,
    rngs: Mapping[str, jax.Array] | None = None,
    mutable: Sequence[str] = (),
  ) -> outputs_lib.Outputs:
    """Runs the model on a batch.

    Args:
      variables: flax's collections, see `variables`.
      batch: arrays by name.
      train: in training mode: dropout, where `rngs` has its stream, and
        `collections` measured anew.
      rngs: `{stream: key}`.
      mutable: further collections that may change, such as 'intermediates'.

    Returns:
      See `Outputs`.
    """
    logits, changed = self.call(
      variables, batch, train=train, rngs=rngs, mutable=mutable
    )
    return outputs_lib.Outputs(
      logits,
      jnp.asarray(self.targets(batch), jnp.int32),
      self.target_weights(batch),
      mutable=changed,
      segments=self.segments(batch),
    )

  def call(
    self,
    variables: Mapping[str, typing.Tree],
    batch: Batch,
    *,
    train: bool = False,
    rngs: Mapping[str, jax.Array] | None = None,
    mutable: Sequence[str] = (),
  ) -> tuple[jax.Array, Mapping[str, typing.Tree]]:
    """`(logits, what changed)`: as `apply`, for batches without targets too."""
    positional, named = self.arguments(batch, train=train)
    wanted = [*mutable, *(self.collections if train else ())]
    if batch_norm.COLLECTION in wanted:
      return batch_norm.call(
        self.module, variables, positional, named, batch.get('weights'),
        rngs=rngs, mutable=wanted,
      )  # fmt: skip
    found = self.module.apply(
      variables, *positional, **named, rngs=rngs, mutable=wanted or False
    )
    return found if wanted else (found, {})

  def choice_logits(
    self,
    variables: Mapping[str, typing.Tree],
    batch: Batch,
    choices: jax.Array,
    *,
    train: bool = False,
    rngs: Mapping[str, jax.Array] | None = None,
  ) -> jax.Array:
    """The logits of several answers to every row, whose inputs are read once.

    As `apply`, with `choices <int32>[batch, choices, length]`, padded with 0;
    gives `<float>[batch, choices, length, vocab]`.

    Raises:
      ConfigError: the family has no inputs apart from its targets.
    """
    raise self._reads_answers_only()

  def answer_logits(
    self, answers: typing.Array
  ) -> Callable[[typing.Tree, Batch], jax.Array]:
    """The model as a classifier over a list of answers.

    `logits[b, c] = sum_t log p(answer_c[t] | input_b, answer_c[<t])`.

    Args:
      answers: `<int32>[classes, length]` tokens, ended by the end token and
        padded with 0.

    Returns:
      `(params, batch) -> <float32>[batch, classes]`.

    Raises:
      ConfigError: the family has no inputs apart from its targets.
    """
    raise self._reads_answers_only()

  def _reads_answers_only(self):
    return errors.ConfigError(
      f'{self.model_type or type(self).__name__} models do not read inputs apart '
      'from their answers: choices among answers need an encoder-decoder.'
    )

  def logits(self, params: typing.Tree, batch: Batch) -> jax.Array:
    """The logits of a batch in evaluation mode."""
    return self.call(self.variables(params), batch)[0]

  # Parameters ----------------------------------------------------------------

  def variables(self, params: typing.Tree) -> dict[str, typing.Tree]:
    """A tree as flax's collections: `params`, and what lives beside them."""
    beside = {n: params[n] for n in self.collections if n in params}
    rest = params
    if beside:
      rest = {n: leaf for n, leaf in params.items() if n not in beside}
    return {'params': rest, **beside}

  def updated(
    self, params: typing.Tree, mutable: Mapping[str, typing.Tree]
  ) -> typing.Tree:
    """Parameters with the new values of the collections among them."""
    new = {n: mutable[n] for n in self.collections if n in mutable}
    return {**params, **new} if new else params

  def init(self, key: jax.Array) -> typing.Tree:
    """Fresh float32 parameters; traceable, so that they can be born sharded.

    Raises:
      StructureError: batch norms, and a family that does not name their
        running statistics.
    """
    positional, named = self.arguments(self.example_batch())
    made = jax.jit(lambda key: self.module.init(key, *positional, **named))(key)
    stats = batch_norm.COLLECTION
    if stats in made and stats not in self.collections:
      raise errors.StructureError(
        f'{type(self.module).__name__} has batch norms, whose running '
        f'statistics ({stats}) would be lost: name them in the collections of '
        f'its family, collections=({stats!r},), and let a call know when it '
        'trains, of a Classifier with train_argument=.'
      )
    beside = {n: made[n] for n in self.collections if n in made}
    return {**made['params'], **beside}

  def specs(self, shapes: typing.Tree | None = None) -> typing.SpecTree:
    """`{path: LeafSpec}` with logical axes, without making a parameter.

    Args:
      shapes: of `init`, where the caller has them: the model is not traced.

    Raises:
      StructureError: the family names axes, but not those of some parameter.
    """
    if shapes is None:
      shapes = jax.eval_shape(lambda: self.init(jax.random.key(0)))
    found = tree.specs(shapes)
    if not self.axes:
      return found
    named = axes_lib.logical_axes(found, self.axes)
    return {
      path: typing.LeafSpec(spec.shape, spec.dtype, named[path])
      for path, spec in found.items()
    }

  def in_form(self, specs: typing.SpecTree) -> bool:
    """Whether stored parameters lie as in the module, or must be `arranged`.

    Args:
      specs: of the stored parameters, with axes where they are known.
    """
    del specs
    return True

  def arranged(
    self,
    leaves: Mapping[typing.Path, Any],
    axes: Mapping[typing.Path, tuple[str, ...]] | None = None,
  ) -> dict[typing.Path, Any]:
    """Parameters of the same model, stored in another way, as the module's.

    Args:
      leaves: `{path: array}`; families whose layers may be stacked accept them
        stacked or one by one.
      axes: logical axes of the given leaves, where they are known.

    Returns:
      `{path: array}` of the same numbers.
    """
    del axes
    return dict(leaves)

  def stored_as(self, specs: typing.SpecTree) -> 'ModelFamily':
    """The same model with its parameters as given ones lie, as far as it can.

    Args:
      specs: of parameters that `arranged` takes.

    Returns:
      This family, if they lie as its own.
    """
    del specs
    return self

  def features_layer(self, specs: typing.SpecTree) -> typing.Path:
    """The kernel whose inputs are the model's features of an example.

    Raises:
      StructureError: the family does not say (`features`), and the model has
        several kernels.
    """
    if self.features is not None:
      return self.features
    kernels = [path for path in specs if path.endswith('kernel')]
    if len(kernels) == 1:
      return kernels[0]
    raise errors.StructureError(
      f'{type(self).__name__} does not say which layer gives its features: '
      'name it with `layer=`, or give the family `features`, one of: '
      f'{", ".join(kernels) or "its parameters (no kernel is among them)"}.'
    )

  def learns(self, path: typing.Path) -> bool:
    """Whether a parameter may be trained; of an adapted model the base is not.

    Args:
      path: of the parameter. What `collections` hold is measured, not trained.
    """
    return path.split('/')[0] not in self.collections
