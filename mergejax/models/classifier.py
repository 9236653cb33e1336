# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A family for a module that has none: arrays in, logits of classes out."""

from collections.abc import Sequence

import flax.linen as nn
import jax

from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.models import base


class Classifier(base.ModelFamily):
  """Wraps any linen module whose output is `<float>[batch, classes]`.

  Example:
    >>> family = Classifier(nn.Dense(3), inputs='x', labels='y',
    ...                     example={'x': jnp.zeros((1, 4)),
    ...                              'y': jnp.zeros(1, jnp.int32)})
    >>> family.init(jax.random.key(0))['kernel'].shape
    (4, 3)
  """

  def __init__(
    self,
    module: nn.Module,
    *,
    inputs: str | Sequence[str] = 'inputs',
    labels: str = 'labels',
    example: base.Batch | None = None,
    axes: axes_lib.Rules = (),
    train_argument: str | None = None,
    collections: Sequence[str] = (),
    rng_streams: Sequence[str] = (),
    features: str | None = None,
  ):
    """Wraps a module.

    Args:
      module: called with the inputs by position.
      inputs: their names in a batch.
      labels: name of `<int32>[batch]` in a batch.
      example: a small batch, to find out shapes with.
      axes: logical axes of its parameters, if it is to be laid over a mesh or
        holds stacked layers; without them parameters are replicated.
      train_argument: keyword of a call that is True in training, 'train' say.
        Without it a module is called in training as it is to answer: batch
        norms go by their running statistics, and leave them as they are.
      collections: that change in training, such as 'batch_stats'.
      rng_streams: that a call in training draws from, such as 'dropout'.
      features: kernel whose inputs are features of an example.
    """
    super().__init__(module)
    self._inputs = [inputs] if isinstance(inputs, str) else list(inputs)
    self._labels = labels
    self._example = example
    self.axes = tuple(axes)
    self._train_argument = train_argument
    self.collections = tuple(collections)
    self._streams = tuple(rng_streams)
    self.features = features
    self.model_type = type(module).__name__
    self.sizes = {'classes': (labels,)}

  def arguments(self, batch, *, train=False):
    inputs = [self._read(batch, name) for name in self._inputs]
    named = {}
    if self._train_argument is not None:
      named[self._train_argument] = train
    return inputs, named

  def targets(self, batch):
    return self._read(batch, self._labels)

  def _read(self, batch, name):
    if name not in batch:
      raise errors.DataError(
        f'A batch has {", ".join(sorted(batch))}, but not {name!r}, which this '
        'Classifier was told to read (inputs=, labels=).'
      )
    return batch[name]

  def example_batch(self, rows=1, *, length=1):
    del length
    if self._example is None:
      return super().example_batch(rows)
    return jax.tree.map(lambda x: x[:1].repeat(rows, 0), dict(self._example))

  def rng_streams(self, *, train):
    return self._streams if train else ()
