# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Task arithmetic: adding, negating and relating task vectors.

Source: Ilharco et al., "Editing Models with Task Arithmetic" (2023),
https://arxiv.org/abs/2212.04089.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from mergejax.core import typing
from mergejax.methods import base as base_lib
from mergejax.methods import entries
from mergejax.methods import mean


class Edit(NamedTuple):
  """A change to one task vector before it is merged.

  Attributes:
    apply: `(delta, context) -> delta`.
    first_passes: what it must know first; their leaves are task vectors.
    view: see `Merge.view`.
    numbered: see `Merge.numbered`.
  """

  apply: Callable[[typing.Array, base_lib.LeafContext], typing.Array]
  first_passes: tuple[base_lib.FirstPass, ...] = ()
  view: str = 'element'
  numbered: bool = False


def on_deltas(
  inner: base_lib.Merge, edit: Edit | None = None, *, scale: float = 1.0
) -> base_lib.Merge:
  """Runs a method on task vectors and adds the result to the base.

  `base + scale * inner(edit(theta_1 - base), ..., edit(theta_K - base))`.
  Differences are formed after widening to float32: in bfloat16 most small ones
  would vanish.

  Args:
    inner: the method that combines the task vectors.
    edit: what is done to each of them first, such as trimming.
    scale: the factor lambda of the papers.

  Returns:
    A method that needs a base.
  """
  base_lib.check_finite('scale', scale)

  def update(
    state, params, *, base: Any = None, weight=1.0, contexts: Any = None
  ):
    deltas = {path: leaf - base[path] for path, leaf in params.items()}
    if edit is not None:
      deltas = {
        path: edit.apply(delta, contexts[path])
        for path, delta in deltas.items()
      }
    return inner.update(state, deltas, weight=weight, contexts=contexts)

  def finish(state, *, base: Any = None):
    return {
      path: base[path] + jnp.asarray(scale, delta.dtype) * delta
      for path, delta in inner.finish(state).items()
    }

  def of_deltas(first_pass, edited):
    def measure(leaves, base, contexts, weights):
      deltas = [leaf - base for leaf in leaves]
      if edited and edit is not None:
        deltas = [edit.apply(*pair) for pair in zip(deltas, contexts)]
      return first_pass.measure(deltas, None, contexts, weights)

    return first_pass._replace(measure=measure)

  return inner._replace(
    update=update,
    finish=finish,
    first_passes=tuple(
      of_deltas(first_pass, False)
      for first_pass in (edit.first_passes if edit else ())
    )
    + tuple(of_deltas(first_pass, True) for first_pass in inner.first_passes),
    base='required',
    view=edit.view if edit else inner.view,
    numbered=inner.numbered or (edit is not None and edit.numbered),
  )


@entries.register('task_arithmetic', base='required', averages='normalize')
def task_arithmetic(
  *, scale: float = 1.0, normalize: bool = False
) -> base_lib.Merge:
  """Adds task vectors to the base: one model for several tasks.

  `base + scale * sum_k w_k (theta_k - base)`.

  Args:
    scale: lambda, shared by all task vectors; in recipes it is `lambda`. 1 by
      default, as in mergekit. The paper searches 0, 0.05, ..., 1 on held-out
      data; 0.3 to 0.4 is a good first guess for many tasks.
    normalize: divide by the sum of the weights, so that `scale=1` is their
      average. Off by default, as in the paper and in mergekit.

  Returns:
    A method over a base and any number of models.

  Example:
    >>> merge([{'w': jnp.ones(1)}, {'w': 2 * jnp.ones(1)}],
    ...       task_arithmetic(scale=0.5), base={'w': jnp.zeros(1)})
    {'w': Array([1.5], dtype=float32)}

  Source: Ilharco et al. (2023), https://arxiv.org/abs/2212.04089, section 2.
  The released code warns and drops leaves that two vectors do not share; here
  differing trees are an error.
  """
  return on_deltas(mean.linear(normalize=normalize), scale=scale)


@entries.register('negate', base='required')
def negate(*, scale: float = 1.0) -> base_lib.Merge:
  """Subtracts a task vector: forgets what fine-tuning taught.

  `base - scale * (theta - base)`.

  Args:
    scale: lambda. The paper takes the largest effect that keeps 95% of the
      base's accuracy on a control task; 0.5 in its examples.

  Returns:
    A method over a base and one model.

  Example:
    >>> merge([{'w': jnp.ones(1)}], negate(scale=0.5), base={'w': jnp.zeros(1)})
    {'w': Array([-0.5], dtype=float32)}

  Source: Ilharco et al. (2023), https://arxiv.org/abs/2212.04089, section 3.
  """
  return task_arithmetic(scale=scale)._replace(
    counts=(1, 1), default_weights=(-1.0,)
  )


@entries.register('analogy', base='required')
def analogy(*, scale: float = 1.0) -> base_lib.Merge:
  """A is to B as C is to D: a model for D from three others.

  `base + scale * (tau_C + tau_B - tau_A)` with `tau_X = theta_X - base`.

  Args:
    scale: lambda, chosen on held-out data of D.

  Returns:
    A method over a base and exactly the models A, B, C in this order.

  Example:
    >>> a, b, c = ({'w': jnp.full(1, x)} for x in (1.0, 2.0, 5.0))
    >>> merge([a, b, c], analogy(), base={'w': jnp.zeros(1)})
    {'w': Array([6.], dtype=float32)}

  Source: Ilharco et al. (2023), https://arxiv.org/abs/2212.04089, section 5.
  Its README subtracts two task vectors, which the released class cannot do;
  here it works.
  """
  return task_arithmetic(scale=scale)._replace(
    counts=(3, 3), default_weights=(-1.0, 1.0, 1.0)
  )
