# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Random masks that depend on seed, path and model alone.

Every element of a leaf draws from its own flat position, so a mask is the same
on one device and on eight, for a leaf merged whole or in pieces, and in
whatever order leaves and models come.
"""

import hashlib

import jax.numpy as jnp
import numpy as np

from mergejax.core import typing


def mask_key(seed: int, path: typing.Path, model: int) -> np.ndarray:
  """The key of one leaf of one model.

  Args:
    seed: of the merge.
    path: of the leaf.
    model: number of the model, from 0.

  Returns:
    <uint32>[2], 64 bits of BLAKE2b of the three.
  """
  text = f'{seed}\0{model}\0{path}'.encode()
  return np.frombuffer(hashlib.blake2b(text, digest_size=8).digest(), '<u4')


def _scramble(x: typing.Array) -> typing.Array:
  """A bijection of 32-bit words in which every input bit moves every output bit.

  Two multiply-and-shift rounds; constants of the `lowbias32` family (C. Wellons,
  "Prospecting for hash functions", 2018, public domain), whose measured
  avalanche bias is below that of a random permutation's sampling error.
  """
  x = x ^ (x >> jnp.uint32(16))
  x = x * jnp.uint32(0x21F0AAAD)
  x = x ^ (x >> jnp.uint32(15))
  x = x * jnp.uint32(0xD35A2D97)
  return x ^ (x >> jnp.uint32(15))


def uniform(key: typing.Array, index: typing.Array) -> typing.Array:
  """Numbers in `[0, 1)`, one for each position.

  `scramble(scramble(index * odd + key_0) ^ key_1)`: a counter hash, twenty
  times cheaper on a CPU than threefry, because it fuses into whatever uses it.
  It is made for masks, not for cryptography: tests check its uniformity, and
  independence between neighbours, models, paths and seeds.

  Args:
    key: <uint32>[2] from `mask_key`.
    index: <uint32>[...] positions.

  Returns:
    <float32>[...], multiples of 2**-24.
  """
  key = jnp.asarray(key, jnp.uint32)
  word = _scramble(index * jnp.uint32(0x9E3779B9) + key[0])
  word = _scramble(word ^ key[1])
  return (word >> jnp.uint32(8)).astype(jnp.float32) * jnp.float32(2.0**-24)
