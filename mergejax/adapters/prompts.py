# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Soft prompts: vectors that are read before the inputs.

Where the embedded inputs of a model are met its family says
(`ModelFamily.embedded`, `with_room`): the base is called with room for m
positions, which are then filled.
"""

import abc
from collections.abc import Sequence
import contextlib
import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mergejax.adapters import banks
from mergejax.adapters import base as base_lib
from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import tree
from mergejax.core import typing

TASK_IDS = 'task_ids'
TARGET = 'prompts/target'
_INITS = ('vocabulary', 'uniform')
# Axes of a table of embedded tokens.
_TABLE = ('vocab', 'embed')
# Rows of the vocabulary that prompts begin from: frequent pieces come first.
_FREQUENT = 5000


class Prompted(base_lib.Adapter):
  """An adapter that gives every row of a batch its own prompt.

  A subclass says which, `vectors`, and its leaves.

  Attributes:
    length: m, positions of the prompt.
    tasks: rows of a bank of prompts, which `task_ids` of a batch number; None
      is one for all.
  """

  length: int
  tasks: int | None = None
  # Whether prompts depend on the inputs, which must not hold the answer then.
  reads_inputs: ClassVar[bool] = False

  @property
  def reads(self) -> tuple[str, ...]:
    return () if self.tasks is None else (TASK_IDS,)

  @abc.abstractmethod
  def vectors(
    self, call: base_lib.Call, embedded: jax.Array, real: jax.Array
  ) -> jax.Array:
    """The prompts of a batch.

    Args:
      call: of the model.
      embedded: `<float>[batch, length, embed]` inputs, without the prompt.
      real: `<bool>[batch, length]`, False at padding.

    Returns:
      `<float32>[batch, m, embed]`.
    """

  def of_task(self, call: base_lib.Call, rows: int) -> jax.Array:
    """`<float32>[batch, m, embed]`: the target prompt of every row."""
    target = call.adapter[TARGET]
    if self.tasks is None:
      return jnp.broadcast_to(target, (rows, *target.shape))
    return banks.taken(target, call.batch[TASK_IDS])

  def target_spec(self, base: typing.SpecTree) -> typing.LeafSpec:
    """Of `prompts/target`."""
    shape, names = (self.length, width(base)), ('length', 'embed')
    if self.tasks is not None:
      shape, names = (self.tasks, *shape), ('experts', *names)
    return typing.LeafSpec(shape, np.dtype('float32'), names)

  def check_batch(self, batch, source):
    if self.tasks is not None:
      base_lib.check_ids(batch, TASK_IDS, self.tasks, 'task', source)

  def alone(self, base, adapter, number):
    if self.tasks is None:
      return super().alone(base, adapter, number)
    base_lib.check_number('task', number, self.tasks)
    leaves = base_lib.own_leaves(adapter, self.specs(base))
    leaves[TARGET] = leaves[TARGET][number]
    own: Any = self  # a dataclass, as its subclasses are
    return dataclasses.replace(own, tasks=None), tree.unflatten(leaves)

  def widened(self, call):
    return call.family.with_room(call.batch, self.length)

  def narrowed(self, call, logits):
    return logits if call.family.answers else logits[:, self.length :]

  def ahead(self, call):
    return 0 if call.family.answers else self.length

  def begun(self, call, cache, step):
    if call.family.answers:
      return cache
    rows = next(iter(call.batch.values())).shape[0]
    assert call.family.embedded is not None  # `at_work` has asked
    path, side = call.family.embedded

    def read(cache, vectors):
      def interceptor(run, arguments, named, context):
        module = context.module
        if context.method_name != '__call__' or '/'.join(module.path) != path:
          return run(*arguments, **named)
        put = lambda x: vectors[:, None].astype(x.dtype)
        if side == 'argument':
          return run(put(arguments[0]), *arguments[1:], **named)
        return put(run(*arguments, **named))

      with nn.intercept_methods(interceptor):
        return step(cache, jnp.zeros(rows, jnp.int32))[1], None

    vectors = jnp.moveaxis(self.of_task(call, rows), 1, 0)
    return jax.lax.scan(read, cache, vectors)[0]

  @contextlib.contextmanager
  def at_work(self, call):
    family = call.family
    if family.embedded is None or (self.reads_inputs and not family.answers):
      raise errors.ConfigError(
        f'{type(self).__name__} does not know where {family.model_type} models '
        'read inputs apart from their answers: it needs an encoder-decoder, or, '
        'for plain prompts, a family with `embedded` and `with_room`.'
      )
    if not call.whole and not family.answers:
      yield  # a decoder has read the prompt when it begins, see `begun`
      return
    with nn.intercept_methods(self._interceptor(call)):
      yield

  def _interceptor(self, call):
    path, side = call.family.embedded

    def filled(x):
      inputs = x[:, self.length :]
      real = jnp.asarray(call.family.mask(f'{path}/', call.batch))
      prompt = self.vectors(call, inputs, real)
      return jnp.concatenate([prompt.astype(x.dtype), inputs], axis=1)

    def interceptor(run, arguments, named, context):
      module = context.module
      if context.method_name != '__call__' or '/'.join(module.path) != path:
        return run(*arguments, **named)
      if side == 'argument':
        return run(filled(arguments[0]), *arguments[1:], **named)
      return filled(run(*arguments, **named))

    return interceptor


def width(base: typing.SpecTree) -> int:
  """The size of an embedded token.

  Raises:
    ConfigError: no parameter, or several sizes, have the axes of a table.
  """
  sizes = {spec.shape[1] for spec in base.values() if spec.axes == _TABLE}
  if len(sizes) != 1:
    raise errors.ConfigError(
      'A prompt is as wide as an embedded token, but '
      f'{len(sizes) or "no"} tables of tokens (axes vocab, embed) are known in '
      'the model: its family must name the axes of one.'
    )
  return sizes.pop()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt(Prompted):
  """See `prompt`."""

  length: int = 100
  tasks: int | None = None
  start: str = 'vocabulary'

  def __post_init__(self):
    errors.check_whole('length', self.length)
    if self.tasks is not None:
      errors.check_whole('tasks', self.tasks)
    if self.start not in _INITS:
      raise errors.ConfigError(errors.near(self.start, _INITS, 'start'))

  def specs(self, base):
    return {TARGET: self.target_spec(base)}

  def init(self, base, key, params=None):
    shape = self.target_spec(base).shape
    count = 1 if self.tasks is None else self.tasks
    keys = jax.random.split(key, count)
    draw = lambda key: jax.random.uniform(
      key, shape[-2:], minval=-0.5, maxval=0.5
    )
    if self.start == 'vocabulary' and params is not None:
      path, *others = (p for p, s in base.items() if s.axes == _TABLE)
      if others:
        raise errors.ConfigError(
          f'The model has several tables of tokens ({path}, '
          f"{errors.some(others)}), and it is not known which one's rows a prompt "
          "should begin from: set start='uniform'."
        )
      table = jnp.asarray(tree.flatten(params)[path], jnp.float32)
      draw = lambda key: from_vocabulary(key, table, self.length)
    return tree.unflatten({TARGET: jax.vmap(draw)(keys).reshape(shape)})

  def vectors(self, call, embedded, real):
    return self.of_task(call, embedded.shape[0])


def from_vocabulary(key: jax.Array, table: jax.Array, length: int) -> jax.Array:
  """A prompt of distinct frequent tokens.

  Args:
    key: of `jax.random`.
    table: `<float32>[vocab, embed]`, whose first 5000 rows are taken from.
    length: m.

  Returns:
    `<float32>[m, embed]`.

  Raises:
    ConfigError: fewer tokens than positions.
  """
  rows = min(_FREQUENT, table.shape[0])
  if length > rows:
    raise errors.ConfigError(
      f'A prompt of {length} positions cannot begin with distinct ones of {rows} '
      "tokens: set start='uniform'."
    )
  return table[jax.random.permutation(key, rows)[:length]]


def prompt(
  *,
  length: int = 100,
  tasks: int | None = None,
  start: str = 'vocabulary',
) -> Prompt:
  """Prompt tuning: m trained vectors before the embedded inputs.

  They lie at `prompts/target <float32>[length, embed]`, with an axis of tasks
  in front if there are several. Of an encoder-decoder the encoder reads them,
  with positions 0 to m - 1, and the decoder attends to them; of a decoder they
  come before its row. Being read, they change the logits from the first step
  on.

  Args:
    length: m; the papers' 100.
    tasks: how many prompts; then a batch says with `task_ids <int32>[batch]`
      which row has which. None is one prompt.
    start: 'vocabulary', distinct rows of the first 5000 of the embedding
      (`family.start` gives them), or 'uniform', U(-0.5, 0.5).

  Returns:
    An adapter, for `adapt`. It cannot be folded. To begin from another prompt
    (SPoT), put that in: `family.joined(params, {'prompts': {'target': ...}})`,
    see `spot`.

  Raises:
    ConfigError: numbers that are none.

  Example:
    >>> prompt(length=20).length
    20

  Source: Lester et al., "The Power of Scale for Parameter-Efficient Prompt
  Tuning" (2021), https://arxiv.org/abs/2104.08691.
  """
  return Prompt(length=length, tasks=tasks, start=start)


def spot(
  sources: Sequence[typing.Array] | typing.Array,
  target: typing.Array | None = None,
) -> jax.Array:
  """SPoT: the prompt to begin from, made of prompts of other tasks.

  `sum_j s_j P_j / sum_j s_j`, where `s_j` is the sum over positions of the
  cosine between source and target prompt; of one source without a target that
  source.

  Args:
    sources: `<float>[m, embed]` each.
    target: `<float>[m, embed]`, a prompt trained a little on the target task.

  Returns:
    `<float32>[m, embed]`. Weights may be negative, and large where the
    similarities nearly cancel.

  Raises:
    DataError: prompts of several shapes; several sources and no target;
      similarities that sum to 0.

  Example:
    >>> spot([np.ones((2, 3))]).tolist()
    [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]

  Source: Vu et al., "SPoT: Better Frozen Model Adaptation through Soft Prompt
  Transfer" (2021), https://arxiv.org/abs/2110.07904.
  """
  given = [jnp.asarray(each, jnp.float32) for each in sources]
  every = [
    *given,
    *([] if target is None else [jnp.asarray(target, jnp.float32)]),
  ]
  check_shapes(every)
  if target is None:
    if len(given) > 1:
      raise errors.DataError(
        f'{len(given)} source prompts need a target prompt to be weighed by: give '
        '`target=`, or one source.'
      )
    return given[0]
  # A row of zeros is like no other.
  size = lambda x: jnp.linalg.norm(x, axis=-1, keepdims=True)
  unit = lambda x: x / jnp.maximum(size(x), jnp.finfo(x.dtype).tiny)
  stacked = jnp.stack(given)
  similar = jnp.sum(unit(stacked) * unit(every[-1])[None], axis=(1, 2))
  if not numerics.is_traced(similar) and not jnp.sum(similar):
    raise errors.DataError(
      'The similarities of the source prompts to the target sum to 0, so that '
      'no weights follow from them: train the target prompt a little first.'
    )
  return jnp.einsum('j,jmd->md', similar / jnp.sum(similar), stacked)


def check_shapes(prompts: Sequence[typing.Array]) -> None:
  """Raises a `DataError` unless prompts are there, all `[m, embed]` of one size."""
  shapes = {tuple(each.shape) for each in prompts}
  if len(shapes) != 1 or len(next(iter(shapes))) != 2:
    raise errors.DataError(
      'Prompts must be arrays [length, embed] of one shape, and at least one; '
      f'given: {errors.some([str(list(s)) for s in sorted(shapes)]) or "none"}.'
    )
