# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Attention of the T5 family: relative positions, masks, cached decoding.

Parameter names and shapes are those of T5X's minimal T5: see `layers`.
"""

import flax.linen as nn
import jax
from jax.nn import initializers
import jax.numpy as jnp
import numpy as np

from mergejax import partition
from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import typing
from mergejax.nn import attention_kernels
from mergejax.nn import layers

MASKED = attention_kernels.MASKED


def relative_position_bucket(
  relative_position: typing.Array,
  *,
  bidirectional: bool,
  num_buckets: int = 32,
  max_distance: int = 128,
) -> typing.Array:
  """Maps `key index - query index` to a bucket of the relative-position table.

  Half of the buckets are exact distances, the rest grow logarithmically up to
  `max_distance`; a bidirectional stack spends half of all buckets on keys that
  lie ahead of the query, a causal one puts all of those in bucket 0.

  Args:
    relative_position: `<int32>[...]`, key position minus query position.
    bidirectional: True in an encoder, False in causal self-attention.
    num_buckets: number of buckets; 32 in every released T5.
    max_distance: distances from here on share the last bucket; 128 in T5.

  Returns:
    `<int32>[...]`, bucket numbers in `[0, num_buckets)`.

  Example:
    >>> relative_position_bucket(np.array([0, -1, 1]), bidirectional=True)
    array([ 0,  1, 17], dtype=int32)
  """
  distance = -np.asarray(relative_position)
  offset = np.zeros_like(distance)
  if bidirectional:
    num_buckets //= 2
    offset = np.where(distance < 0, num_buckets, 0)
    distance = np.abs(distance)
  else:
    distance = np.maximum(distance, 0)
  exact = num_buckets // 2
  # The released table is float32 with epsilon inside the logarithm; float64
  # moves a few borders for other than the default settings.
  log_ratio = np.log(
    distance.astype(np.float32) / exact + np.finfo(np.float32).eps
  ) / np.log(max_distance / exact)
  far = exact + (log_ratio * (num_buckets - exact)).astype(np.int32)
  bucket = np.where(
    distance < exact, distance, np.minimum(far, num_buckets - 1)
  )
  return (offset + bucket).astype(np.int32)


class RelativePositionBias(nn.Module):
  """Learned bias per head and bucketed distance, shared by a stack's layers.

  The table `rel_embedding` is `[heads, buckets]`; the result is
  `[1, heads, query, key]`, to be added to attention logits.

  Attributes:
    num_heads: attention heads of the stack.
    num_buckets: rows of distances, see `relative_position_bucket`.
    max_distance: see `relative_position_bucket`.
    bidirectional: True in an encoder.
    dtype: dtype of the returned bias.
  """

  num_heads: int
  num_buckets: int = 32
  max_distance: int = 128
  bidirectional: bool = True
  dtype: str = 'float32'

  @nn.compact
  def __call__(
    self,
    query_length: int,
    key_length: int,
    *,
    at: typing.Array | None = None,
  ) -> typing.Array:
    """The bias of the first `query_length` positions, or of one.

    Args:
      query_length: queries, from position 0 on.
      key_length: keys, from position 0 on.
      at: `<int32>[]`, the position of the only query, while decoding.

    Returns:
      `<dtype>[1, heads, query, key]`; `query` is 1 with `at`.
    """
    table = self.param(
      'rel_embedding',
      initializers.variance_scaling(1.0, 'fan_avg', 'uniform'),
      (self.num_heads, self.num_buckets),
      jnp.float32,
    )
    if at is None:
      relative = np.arange(key_length) - np.arange(query_length)[:, None]
    else:  # all that can come about; the row of the query is cut out below
      relative = np.arange(1 - key_length, key_length)[None]
    buckets = relative_position_bucket(
      relative,
      bidirectional=self.bidirectional,
      num_buckets=self.num_buckets,
      max_distance=self.max_distance,
    )
    # A product with one-hot buckets rather than a gather: its gradient is a
    # product too, not a scatter-add over query x key.
    one_hot = jax.nn.one_hot(
      buckets.reshape(-1), self.num_buckets, dtype=table.dtype
    )
    # [heads, buckets] x [query * key, buckets] -> [1, heads, query, key]
    bias = jnp.einsum('hn,pn->hp', table, one_hot)
    bias = bias.reshape(1, self.num_heads, *relative.shape)
    if at is not None:
      first = key_length - 1 - at
      bias = jax.lax.dynamic_slice_in_dim(bias, first, key_length, axis=3)
    return bias.astype(self.dtype)


# What attention makes of the residual stream.
_HEADS = ('batch', 'length', 'heads', 'kv')


def _length_last(x: typing.Array) -> typing.Array:
  """`[batch, length, heads, head_dim] -> [batch, heads, head_dim, length]`.

  T5X's layout of caches, which a product with one query takes as it is.
  """
  return jnp.moveaxis(x, 1, 3)


class Attention(nn.Module):
  """Multi-head attention with T5X's parameters `query, key, value, out`.

  `softmax(q k^T + bias) v`, without `1/sqrt(head_dim)`: T5 folds that factor
  into the initial query kernel.

  Attributes:
    num_heads: number of heads.
    head_dim: size of one head; `heads * head_dim` need not equal `embed`.
    dtype: compute dtype; parameters stay float32.
    dropout_rate: dropout of attention probabilities. The keep mask has size 1
      along the query axis, as in T5X.
    float32_logits: compute logits and softmax in float32 whatever `dtype` is.
    init_scale: variance of fresh kernels times their inputs.
    kernel: of whole rows, see `attention_kernels`. One query against a cache is
      always as by 'reference', which no kernel would be faster than.
  """

  num_heads: int
  head_dim: int
  dtype: str = 'float32'
  dropout_rate: float = 0.0
  float32_logits: bool = False
  kernel: str = attention_kernels.REFERENCE
  init_scale: float = 1.0

  @nn.compact
  def __call__(
    self,
    queries: typing.Array,
    keys_values: typing.Array,
    bias: typing.Array | None = None,
    *,
    deterministic: bool = True,
    decode: bool = False,
    keep: bool = False,
  ) -> typing.Array:
    """Attends from `queries` to `keys_values`.

    Args:
      queries: `<dtype>[batch, query, embed]`.
      keys_values: `<dtype>[batch, key, embed]`.
      bias: `<float>[1 | batch, 1 | heads, query, key]`, added to the logits:
        relative positions, and `MASKED` where attention is not allowed.
      deterministic: no dropout.
      decode: keep keys and values in the collection `cache`. The call that
        creates the cache fixes its length; later calls bring one position, and
        the `bias` of this query, or of all queries, and all keys.
      keep: take the keys and values of `keys_values` from the collection
        `encoded`. A call that may write that collection fills it; without it
        they are computed as ever. Rows may then be several to one row of keys,
        side by side, one query each: answers to the same input.

    Returns:
      `<dtype>[batch, query, embed]`.

    Raises:
      UserError: a call that does not fit its cache; a kernel that does not run
        here, or that would have to drop probabilities.
    """
    joined = self.num_heads * self.head_dim

    def project(name, inputs, scale=1.0):
      init = layers.attention_init(scale * self.init_scale)
      # [batch, length, embed] -> [batch, length, heads, head_dim]
      return layers.dense(joined, self.dtype, init, name)(inputs).reshape(
        *inputs.shape[:-1], self.num_heads, self.head_dim
      )

    query = project('query', queries, 1.0 / self.head_dim)
    query = partition.constrain(query, _HEADS)
    layout = 'bkhd'  # of keys and values
    if keep and self.has_variable('encoded', 'key'):
      key = self.get_variable('encoded', 'key')
      value = self.get_variable('encoded', 'value')
      layout = 'bhdk'
      # Answers to one row share its keys, as its queries.
      query = query.reshape(key.shape[0], -1, self.num_heads, self.head_dim)
    else:
      key = project('key', keys_values)
      value = project('value', keys_values)
      key, value = partition.constrain((key, value), _HEADS)
      if decode:
        key, value, bias = self._update_cache(key, value, bias)
        layout = 'bhdk'
      elif keep and not self.is_initializing():
        if self.is_mutable_collection('encoded'):
          self.put_variable('encoded', 'key', _length_last(key))
          self.put_variable('encoded', 'value', _length_last(value))
    whole = not (decode or keep or self.is_initializing())
    if whole and self.kernel != attention_kernels.REFERENCE:
      if self.dropout_rate and not deterministic:
        raise errors.ConfigError(
          f'attention_kernel={self.kernel!r} does not drop attention '
          f'probabilities, and dropout_rate is {self.dropout_rate}: set it to '
          "0, as T5 1.1 is pre-trained, or take 'reference'."
        )
      mixed = attention_kernels.attend(self.kernel, query, key, value, bias)
    else:
      mixed = self._mixed(query, key, value, bias, layout, deterministic)
    mixed = mixed.reshape(*queries.shape[:-1], joined)
    init = layers.attention_init(self.init_scale)
    return layers.dense(queries.shape[-1], self.dtype, init, 'out')(mixed)

  def _mixed(self, query, key, value, bias, layout, deterministic):
    """`<dtype>[batch, query, heads, head_dim]`: the definition."""
    if self.float32_logits:
      query, key = query.astype(jnp.float32), key.astype(jnp.float32)
    # [batch, query, heads, head_dim] x [batch, key, heads, head_dim]
    #   -> [batch, heads, query, key]
    logits = jnp.einsum(f'bqhd,{layout}->bhqk', query, key)
    if bias is not None:
      logits = logits + bias.astype(logits.dtype)
    probabilities = jax.nn.softmax(logits).astype(self.dtype)
    probabilities = nn.Dropout(self.dropout_rate, broadcast_dims=(-2,))(
      probabilities, deterministic=deterministic
    )
    return jnp.einsum(f'bhqk,{layout}->bqhd', probabilities, value)

  def _update_cache(self, key, value, bias):
    """Writes one position into the cache and returns all of it, with a mask."""
    created = not self.has_variable('cache', 'cached_key')
    key, value = _length_last(key), _length_last(value)
    shape = key.shape
    cached_key = self.variable(
      'cache', 'cached_key', jnp.zeros, shape, key.dtype
    )
    cached_value = self.variable(
      'cache', 'cached_value', jnp.zeros, shape, value.dtype
    )
    index = self.variable(
      'cache', 'cache_index', lambda: jnp.zeros((), jnp.int32)
    )
    if created:
      return key, value, bias
    length = cached_key.value.shape[-1]
    at = index.value
    if shape[-1] != 1:
      raise errors.ConfigError(
        'Cached decoding takes one position a call; this call brought '
        f'{shape[-1]}. Create the cache with the full length, then feed '
        'tokens one by one.'
      )
    rows = None if bias is None else bias.shape[2:]
    if rows not in (None, (1, length), (length, length)):
      raise errors.ConfigError(
        f'The cache has {length} positions, but the bias of the attention is '
        f'for {list(rows)} queries and keys.'
      )
    if not numerics.is_traced(at) and at >= length:
      raise errors.ConfigError(
        f'The cache has {length} positions and all of them are taken: create '
        'it with as many as are decoded.'
      )
    # Updates past the end are moved back onto the last position; a compiled
    # program cannot raise, so its result from there on is not a number. (By the
    # values: on CPU, the softmax of NaN is a number.)
    value = jnp.where(at < length, value, jnp.nan)
    cached_key.value = jax.lax.dynamic_update_slice_in_dim(
      cached_key.value, key, at, axis=3
    )
    cached_value.value = jax.lax.dynamic_update_slice_in_dim(
      cached_value.value, value, at, axis=3
    )
    index.value = at + 1
    past = jnp.where(jnp.arange(length) <= at, 0.0, MASKED)[None, None, None]
    if bias is not None and bias.shape[2] == length:
      bias = jax.lax.dynamic_slice_in_dim(bias, at, 1, axis=2)
    past = past if bias is None else past + bias
    return cached_key.value, cached_value.value, past


def attention_bias(*allowed: typing.Array | None) -> typing.Array | None:
  """Turns masks into one additive bias: 0 where all allow, `MASKED` elsewhere.

  Args:
    *allowed: `<bool>[1 | batch, 1, query, key]` masks, or None for no limit.

  Returns:
    `<float32>[1 | batch, 1, query, key]`, or None when nothing limits.
  """
  given = [mask for mask in allowed if mask is not None]
  if not given:
    return None
  both = given[0]
  for mask in given[1:]:
    both = both & mask
  return jnp.where(both, 0.0, MASKED).astype(jnp.float32)


def check_decoding(decode: bool, **unsupported: typing.Array | None) -> None:
  """Raises if cached decoding is asked for what a full forward alone can do.

  Args:
    decode: whether decoding is cached.
    **unsupported: arguments that would change which positions see each other:
      a cache holds one row, whose positions see all that is before them.
  """
  given = [name for name, value in unsupported.items() if value is not None]
  if decode and given:
    raise errors.ConfigError(
      f'Cached decoding does not know {" or ".join(given)}: every position '
      'sees all that is before it in its row. Leave it out, or score whole '
      'rows without decode=True.'
    )


def pair_mask(query_side: typing.Array, key_side: typing.Array) -> typing.Array:
  """Mask that allows attention between real (true) positions of both sides.

  Args:
    query_side: `<bool>[batch, query]`.
    key_side: `<bool>[batch, key]`.

  Returns:
    `<bool>[batch, 1, query, key]`.
  """
  return (query_side[:, :, None] & key_side[:, None, :])[:, None]


def segment_mask(
  query_segments: typing.Array | None, key_segments: typing.Array | None
) -> typing.Array | None:
  """Mask that allows attention inside a packed segment only.

  Args:
    query_segments: `<int32>[batch, query]` segment ids, or None (not packed).
    key_segments: `<int32>[batch, key]`, or None.

  Returns:
    `<bool>[batch, 1, query, key]`, or None.
  """
  if query_segments is None or key_segments is None:
    return None
  return (query_segments[:, :, None] == key_segments[:, None, :])[:, None]


def causal_mask(length: int) -> typing.Array:
  """`<bool>[1, 1, length, length]`: a query sees itself and what is before."""
  return jnp.tril(jnp.ones((length, length), jnp.bool_))[None, None]
