# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""RegMean: the kernel that answers every model's inputs as that model did."""

import logging

import jax.numpy as jnp

from mergejax.core import numerics
from mergejax.core import statistic_specs
from mergejax.methods import base as base_lib
from mergejax.methods import entries
from mergejax.methods import mean
from mergejax.methods import positive_systems

# Condition number from which float32 leaves few digits.
_ILL = 1e6


@entries.register('regmean', base='ignored', averages=True)
def regmean(
  *, alpha: float = 0.9, ridge: float = 0.0, weighting: str = 'models'
) -> base_lib.Merge:
  """Solves each linear kernel by least squares over the models' own inputs.

  `W = (sum_k w_k G_k)^-1 sum_k w_k G_k W_k` with G_k the mean of `x x^T` over
  the inputs of the layer in model k, its off-diagonal entries multiplied by
  alpha. Leaves without a Gram matrix are averaged.

  Args:
    alpha: 1 is plain least squares, 0 weighs each input feature by its second
      moment. 0.9 in the paper, 0.1 for T5. To give some paths another value,
      or plain averaging, use `rules=` of `mj.merge` (in recipes: `rules:`).
    ridge: share of the mean diagonal that is added to every G_k on both sides;
      0 by default. For singular Gram matrices at alpha 1.
    weighting: 'models' counts every model the same, as the released code;
      'tokens' multiplies each G_k by the tokens that it was collected from, as
      the sums of the paper do.

  Returns:
    A method over models that bring `gram` statistics <float32>[in, in] for
    linear kernels. State of a kernel: `sum G` [in, in], `sum G W` [in, out],
    and the running mean. A further model can be folded in later.

  Raises:
    UserError: alpha outside [0, 1], a negative ridge, a kernel of unknown
      layout, weights that sum to zero, a summed Gram matrix that is singular.
      Above a condition of 1e6 there is a warning.

  Example:
    >>> kernel = jnp.ones((1, 1))
    >>> merge([{'kernel': kernel}, {'kernel': 5 * kernel}], regmean(alpha=1.0),
    ...       stats=[{'kernel': {'gram': 3 * kernel}},
    ...              {'kernel': {'gram': kernel}}])
    {'kernel': Array([[2.]], dtype=float32)}

  Source: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language
  Models" (2023), https://arxiv.org/abs/2212.09849, equation 2 and section 3.2.
  The paper sums `x x^T`; the code, and this, take the mean over tokens, so
  that every model counts the same whatever its data. Rows of input features
  that are always zero are averaged; the code would return zeros.
  """
  base_lib.check_option('alpha', alpha, lambda v: 0 <= v <= 1, 'in [0, 1]')
  base_lib.check_not_negative('ridge', ridge)
  base_lib.check_choice('weighting', weighting, ('models', 'tokens'))
  by_tokens = weighting == 'tokens'

  def init(zeros):
    return {'mean': zeros, 'weight': jnp.zeros((), zeros.dtype)}

  def update(state, leaf, base, weight, context):
    del base
    new = {
      **state,
      'mean': state['mean'] + weight * leaf,
      'weight': state['weight'] + weight,
    }
    if context.stats and 'gram' in context.stats:
      gram = context.stats['gram'].astype(leaf.dtype)
      diagonal = jnp.diagonal(gram)
      gram = jnp.asarray(alpha, leaf.dtype) * gram
      gram = gram + (1 - alpha) * jnp.diag(diagonal)
      lift = jnp.asarray(ridge, leaf.dtype) * jnp.mean(diagonal)
      gram = weight * (gram + lift * jnp.eye(len(diagonal), dtype=leaf.dtype))
      if by_tokens:
        gram = gram * jnp.asarray(context.stats['count'], leaf.dtype)
      product = positive_systems.product(gram, leaf)
      first = 'gram' not in state
      new['gram'] = gram if first else state['gram'] + gram
      new['product'] = product if first else state['product'] + product
    return new

  def solve(path, state):
    average = state['mean'] / mean.checked_sum(state['weight'])
    if 'gram' not in state:
      return average
    gram = state['gram']
    dead = jnp.diagonal(gram) == 0
    # A one on the diagonal keeps dead rows out of the system; their solution is
    # replaced. All rows are dead for a leaf without statistics.
    solvable = gram + jnp.diag(dead.astype(gram.dtype))
    solved, pivots = positive_systems.solve(solvable, state['product'])
    _warn_if_ill(path, pivots, dead)
    return jnp.where(dead[:, None], average, solved)

  def finish(state, *, base=None):
    del base
    return {path: solve(path, leaf) for path, leaf in state.items()}

  needs = (statistic_specs.GRAM,)
  if by_tokens:
    needs += (statistic_specs.COUNT,)
  method = base_lib.leafwise(init, update, solve, needs=needs, view='matrix')
  # Not leaf by leaf: the warning names the kernel.
  return method._replace(finish=finish)


def _warn_if_ill(path, pivots, dead):
  """Warns of a badly conditioned system, where its numbers can be seen."""
  if numerics.is_traced(pivots):
    return
  pivots = jnp.where(dead, 1.0, pivots)
  least = jnp.min(jnp.where(dead, jnp.inf, pivots))
  most = jnp.max(jnp.where(dead, 0.0, pivots))
  # The ratio of pivots never exceeds the condition number.
  if bool(most > _ILL * least):
    logging.warning(
      '%s: the summed Gram matrix of its %d inputs has a condition number of '
      'at least %.1e; its solution may amplify rounding. Lower alpha, collect '
      'more tokens, or give a ridge.',
      path, len(dead), float(most / least),
    )  # fmt: skip
