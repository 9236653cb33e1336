# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Numbers that are not finite: refused wherever they come in or come out.

Comparisons with NaN are false, so that trimming, electing and dropping would
lose a NaN without a trace; only the models themselves can tell of it.
"""

from collections.abc import Sequence
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import statistic_specs
from mergejax.core import typing


def all_finite(array: np.ndarray) -> bool:
  """Whether every number is finite; without a copy but of 8-bit floats."""
  if not numerics.is_averaged(array.dtype):
    return True  # counters and ids
  if array.dtype.itemsize != 2 or not array.size:
    wide = array if array.dtype.itemsize > 2 else array.astype(np.float32)
    with np.errstate(over='ignore', invalid='ignore'):
      if np.isfinite(np.sum(wide)):  # one pass, no array of flags
        return True
    return bool(np.all(np.isfinite(wide)))  # the sum may have overflowed
  # As integers, numbers that are not finite lie above all finite ones of their
  # sign: as signed for positive, as unsigned for negative.
  infinite = 0x7C00 if array.dtype == np.float16 else 0x7F80
  return bool(
    np.max(array.view(np.int16)) < infinite
    and np.max(array.view(np.uint16)) < infinite + 0x8000
  )


@jax.jit
def _are_finite(arrays):
  """<bool>[n]; of sharded arrays, local and one sum over devices."""
  return jnp.stack([jnp.all(jnp.isfinite(numerics.widen(a))) for a in arrays])


def first_bad(arrays: Sequence[Any]) -> tuple[int, int] | None:
  """The first array that is not finite, and how many of its numbers are not.

  Args:
    arrays: of NumPy or JAX; those that JAX traces are not looked at, nor are
      other than floating ones. Sharded ones are not gathered.
  """
  known = [
    i
    for i, array in enumerate(arrays)
    if not numerics.is_traced(array) and numerics.is_averaged(array.dtype)
  ]
  on_device = [i for i in known if isinstance(arrays[i], jax.Array)]
  bad = [
    i for i in known if i not in on_device and not all_finite(np.asarray(arrays[i]))
  ]  # fmt: skip
  with jax.ensure_compile_time_eval():  # numbers are known, also under jit
    if on_device:
      sound = np.asarray(_are_finite([arrays[i] for i in on_device]))
      bad += [i for i, one in zip(on_device, sound) if not one]
    if not bad:
      return None
    worst = jnp.isfinite(numerics.widen(arrays[min(bad)]))
    return min(bad), int(jnp.sum(~worst, dtype=jnp.uint32))


def check_inputs(
  path: typing.Path, arrays: Sequence[Any], names: Sequence[str]
) -> None:
  """Raises if an input of a merge is not finite, naming the source and leaf."""
  found = first_bad(arrays)
  if found is not None:
    which, count = found
    raise errors.DataError(
      of_input(names[which], path, count, np.size(arrays[which]))
    )


def check_stacked(path: typing.Path, array: Any, names: Sequence[str]) -> None:
  """`check_inputs` for copies `[K, ...]` in one array, on a mesh or not."""
  if first_bad([array]) is not None:
    check_inputs(path, [array[k] for k in range(len(names))], names)


def of_input(name: str, path: typing.Path, count: int, size: int) -> str:
  """The message for a source that has infinite or undefined numbers."""
  return (
    f'{name}: {path} has {count} number(s) that are not finite, of {size}. '
    'Merging them would spoil the result; find out where the model broke, or '
    'leave the parameter as it is in a sound model with a rule (`copy: base` '
    "in a recipe, `rules=[(path, 'copy')]` in Python)."
  )


def of_result(
  path: typing.Path,
  count: int,
  dtype: Any,
  needs: Sequence[statistic_specs.StatisticSpec] = (),
) -> str:
  """The message for a result that has infinite or undefined numbers."""
  cause = ' '.join(spec.advice for spec in needs if spec.advice) or (
    'Look for weights that cancel, and for options that enlarge.'
  )
  largest = float(jnp.finfo(dtype).max)
  if largest < float(jnp.finfo(np.float32).max):
    name = np.dtype(dtype).name
    cause += f' Or they are too large for {name}, which ends at {largest:g}: '
    cause += 'give another dtype.'
  return f'{path}: {count} number(s) of the result are not finite. {cause}'


def stored(
  path: typing.Path,
  leaf: typing.Array,
  dtype: Any,
  needs: Sequence[statistic_specs.StatisticSpec] = (),
) -> typing.Array:
  """A merged leaf in the dtype of the result.

  Args:
    path: of the leaf.
    leaf: <float>[...], as merged.
    dtype: of the result.
    needs: statistics of the method, for the message.

  Returns:
    <dtype>[...].

  Raises:
    UserError: numbers that are not finite, before or after the cast. Values
      that JAX traces cannot be looked at and pass.
  """
  wanted = np.dtype(dtype)
  possible = jax.dtypes.canonicalize_dtype(wanted)
  if possible != wanted:
    logging.warning(
        '%s is %s but JAX is limited to %s; set JAX_ENABLE_X64=1 to keep it.',
        path, wanted, possible,
    )  # fmt: skip
  result = jnp.asarray(leaf).astype(possible)
  found = first_bad([result])
  if found is not None:
    raise errors.DataError(of_result(path, found[1], possible, needs))
  return result
