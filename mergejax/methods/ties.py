# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sign election, and the methods composed of an edit and an election.

ties             = on_deltas(elect_sign(), trim(density))
dare_ties        = on_deltas(elect_sign(), drop(density))
della            = on_deltas(elect_sign(), drop_by_rank(density, epsilon))
breadcrumbs_ties = on_deltas(elect_sign(), trim_both_ends(density, gamma))
dare_linear      = on_deltas(linear(),     drop(density))
della_linear     = on_deltas(linear(),     drop_by_rank(density, epsilon))
breadcrumbs      = on_deltas(linear(),     trim_both_ends(density, gamma))
"""

from typing import Any

import jax.numpy as jnp

from mergejax.methods import arithmetic
from mergejax.methods import base as base_lib
from mergejax.methods import edits
from mergejax.methods import entries
from mergejax.methods import mean

# mergekit's defaults of the methods that drop at random.
_DROPPING = {'density': 1.0, 'rescale': 'l1'}
# What `rescale` may be where trimming is not random.
_NORMS = ('none', 'l1', 'l2', 'linf')


def elect_sign(
  *, normalize: bool = True, consensus: str = 'sum', aggregate: str = 'sum'
) -> base_lib.Merge:
  """Combines only the entries that agree with an elected sign.

  With `v_k = w_k delta_k`: the elected sign is that of `sum_k v_k` ('sum') or
  of the majority of signs ('count'), + on a tie. The result is the sum of the
  `v_k` of that sign, divided by the sum of their weights if `normalize`; zeros
  never agree.

  Args:
    normalize: divide by the weights that agree, element by element: the
      paper's disjoint mean.
    consensus: 'sum' or 'count'.
    aggregate: 'sum', or 'max' for the largest agreeing magnitude (then
      `normalize` has no effect and states do not add).

  Returns:
    A method on task vectors. State of a leaf: <float32>[...] sums (or
    extremes) of the positive and of the negative `v_k`, their weights, and
    votes.

  Source: Yadav et al., "TIES-Merging" (2023), https://arxiv.org/abs/2306.01708,
  section 4.
  """
  base_lib.check_choice('consensus', consensus, ('sum', 'count'))
  base_lib.check_choice('aggregate', aggregate, ('sum', 'max'))

  def init(zeros):
    state = {'positive': zeros, 'negative': zeros}
    if normalize and aggregate == 'sum':
      state |= {'positive_weight': zeros, 'negative_weight': zeros}
    if consensus == 'count' or aggregate == 'max':
      state['votes'] = zeros
    return state

  def update(state, leaf, base, weight, context):
    del base, context
    value = weight * leaf
    zero = jnp.zeros_like(value)
    up, down = jnp.maximum(value, zero), jnp.minimum(value, zero)
    new = dict(state)
    if aggregate == 'max':
      new['positive'] = jnp.maximum(state['positive'], up)
      new['negative'] = jnp.minimum(state['negative'], down)
    else:
      new['positive'] = state['positive'] + up
      new['negative'] = state['negative'] + down
    if 'positive_weight' in state:
      new['positive_weight'] += jnp.where(value > 0, weight, zero)
      new['negative_weight'] += jnp.where(value < 0, weight, zero)
    if 'votes' in state:
      new['votes'] += jnp.sign(value) if consensus == 'count' else value
    return new

  def finish(state, base):
    del base
    votes = state.get('votes', state['positive'] + state['negative'])
    up = votes >= 0
    total = jnp.where(up, state['positive'], state['negative'])
    if 'positive_weight' not in state:
      return total
    weight = jnp.where(up, state['positive_weight'], state['negative_weight'])
    nobody = jnp.abs(weight) < mean.TINY_WEIGHT
    return total / jnp.where(nobody, jnp.ones_like(weight), weight)

  return base_lib.leafwise(init, update, finish, additive=aggregate == 'sum')


@entries.register(
  'ties',
  base='required',
  counted=('density',),
  recipe_defaults={'density': 1.0, 'trim_scope': 'tensor'},
)
def ties(
  *,
  density: Any = 0.2,
  scale: float = 1.0,
  normalize: bool = True,
  trim_scope: str = 'global',
  consensus: str = 'sum',
  aggregate: str = 'sum',
  keep: str = 'exact',
  rescale: str = 'none',
) -> base_lib.Merge:
  """TIES: trim task vectors, elect a sign per entry, average what agrees.

  `base + scale * elect_sign(trim(theta_k - base))`.

  Args:
    density: share of each task vector that is kept, by magnitude; a number or
      one a model. 0.2 in the paper; 1 in a mergekit recipe.
    scale: lambda; 1 is the paper's choice without validation data.
    normalize: disjoint mean rather than sum.
    trim_scope: 'global' ranks a model's whole task vector, as the paper's
      code; 'tensor' each leaf by itself, as mergekit, and the default of a
      recipe.
    consensus: see `elect_sign`.
    aggregate: see `elect_sign`.
    keep: 'exact', or 'reference' for the original code's off-by-one; see
      `edits.trim`.
    rescale: 'none' as in the paper; 'l1', 'l2' or 'linf' gives a trimmed task
      vector that norm back, leaf by leaf: `rescale: true` of mergekit is 'l1'.

  Returns:
    A method over a base and any number of models.

  Raises:
    UserError: a density outside [0, 1].

  Example:
    >>> merge([{'w': jnp.array([1.0, 0.1])}, {'w': jnp.array([-3.0, 0.2])}],
    ...       ties(density=0.5), base={'w': jnp.zeros(2)})
    {'w': Array([-3.,  0.], dtype=float32)}

  Source: Yadav et al., "TIES-Merging" (2023), https://arxiv.org/abs/2306.01708.
  The released code keeps one element more than the share, and all ties; equal
  magnitudes go by lowest index here.
  """
  base_lib.check_choice('rescale', rescale, _NORMS)
  return arithmetic.on_deltas(
    elect_sign(normalize=normalize, consensus=consensus, aggregate=aggregate),
    edits.rescaled(edits.trim(density, scope=trim_scope, keep=keep), rescale),
    scale=scale,
  )


@entries.register(
  'dare_linear',
  base='required',
  averages='normalize',
  recipe_defaults=_DROPPING,
)
def dare_linear(
  *,
  density: Any,
  scale: float = 1.0,
  normalize: bool = False,
  rescale: str = 'paper',
) -> base_lib.Merge:
  """DARE: drop entries of task vectors at random, rescale, add.

  `base + scale * sum_k w_k drop(theta_k - base)`.

  Args:
    density: share that is kept, a number or one a model. No default: the
      method exists for 0.1 and less; 1 in a mergekit recipe.
    scale: lambda.
    normalize: divide by the sum of the weights.
    rescale: 'paper' divides by the density; a recipe's default is 'l1'. See
      `edits.drop`.

  Returns:
    A method over a base and any number of models, random by seed, path and
    model.

  Raises:
    UserError: a density outside [0, 1].

  Example:
    >>> merge([{'w': jnp.ones(4)}], dare_linear(density=1.0),
    ...       base={'w': jnp.zeros(4)})
    {'w': Array([1., 1., 1., 1.], dtype=float32)}

  Source: Yu et al., "Language Models are Super Mario" (2023),
  https://arxiv.org/abs/2311.03099, section 3. mergekit matches the L1 norm of
  each leaf instead of dividing by the density.
  """
  return arithmetic.on_deltas(
    mean.linear(normalize=normalize),
    edits.drop(density, rescale=rescale),
    scale=scale,
  )


@entries.register('dare_ties', base='required', recipe_defaults=_DROPPING)
def dare_ties(
  *,
  density: Any,
  scale: float = 1.0,
  normalize: bool = False,
  rescale: str = 'paper',
  consensus: str = 'sum',
) -> base_lib.Merge:
  """DARE followed by the sign election of TIES.

  `base + scale * elect_sign(drop(theta_k - base))`.

  Args:
    density: see `dare_linear`.
    scale: lambda.
    normalize: divide by the weights that agree. Off by default, as in
      mergekit.
    rescale: see `dare_linear`.
    consensus: see `elect_sign`.

  Returns:
    A method over a base and any number of models.

  Raises:
    UserError: a density outside [0, 1].

  Example:
    >>> merge([{'w': jnp.ones(2)}, {'w': -2 * jnp.ones(2)}],
    ...       dare_ties(density=1.0), base={'w': jnp.zeros(2)})
    {'w': Array([-2., -2.], dtype=float32)}

  Source: Yu et al. (2023), https://arxiv.org/abs/2311.03099, with Yadav et al.
  (2023), https://arxiv.org/abs/2306.01708; mergekit `dare_ties`.
  """
  return arithmetic.on_deltas(
    elect_sign(normalize=normalize, consensus=consensus),
    edits.drop(density, rescale=rescale),
    scale=scale,
  )


@entries.register(
  'della_linear',
  base='required',
  averages='normalize',
  recipe_defaults=_DROPPING,
)
def della_linear(
  *,
  density: Any,
  epsilon: Any = 0.15,
  scale: float = 1.0,
  normalize: bool = False,
  rescale: str = 'paper',
) -> base_lib.Merge:
  """DELLA without election: drop small entries more often than large ones.

  `base + scale * sum_k w_k drop_by_rank(theta_k - base)`.

  Args:
    density: mean share that is kept, a number or one a model.
    epsilon: half of the range of keep probabilities within an output unit;
      0.15 as in mergekit.
    scale: lambda.
    normalize: divide by the sum of the weights.
    rescale: 'paper' divides by each entry's probability; a recipe's default is
      'l1'.

  Returns:
    A method over a base and any number of models; it must know which axes of
    a kernel are inputs.

  Raises:
    UserError: probabilities outside (0, 1), a kernel of unknown layout.

  Example:
    >>> merge([{'bias': jnp.ones(4)}], della_linear(density=1.0),
    ...       base={'bias': jnp.zeros(4)})
    {'bias': Array([1., 1., 1., 1.], dtype=float32)}

  Source: Deep et al., "DELLA-Merging" (2024), https://arxiv.org/abs/2406.11617.
  """
  return arithmetic.on_deltas(
    mean.linear(normalize=normalize),
    edits.drop_by_rank(density, epsilon, rescale=rescale),
    scale=scale,
  )


@entries.register('della', base='required', recipe_defaults=_DROPPING)
def della(
  *,
  density: Any,
  epsilon: Any = 0.15,
  scale: float = 1.0,
  normalize: bool = True,
  rescale: str = 'paper',
  consensus: str = 'sum',
) -> base_lib.Merge:
  """DELLA: drop by rank, elect a sign, average what agrees.

  `base + scale * elect_sign(drop_by_rank(theta_k - base))`.

  Args:
    density: see `della_linear`.
    epsilon: see `della_linear`.
    scale: lambda.
    normalize: divide by the weights that agree, as in the paper.
    rescale: see `della_linear`.
    consensus: see `elect_sign`.

  Returns:
    A method over a base and any number of models.

  Raises:
    UserError: probabilities outside (0, 1), a kernel of unknown layout.

  Example:
    >>> merge([{'bias': jnp.ones(2)}, {'bias': 3 * jnp.ones(2)}],
    ...       della(density=1.0), base={'bias': jnp.zeros(2)})
    {'bias': Array([2., 2.], dtype=float32)}

  Source: Deep et al. (2024), https://arxiv.org/abs/2406.11617, section 3.
  """
  return arithmetic.on_deltas(
    elect_sign(normalize=normalize, consensus=consensus),
    edits.drop_by_rank(density, epsilon, rescale=rescale),
    scale=scale,
  )


@entries.register(
  'breadcrumbs',
  base='required',
  averages='normalize',
  counted=('density', 'gamma'),
)
def breadcrumbs(
  *,
  density: Any = 1.0,
  gamma: Any = 0.01,
  scale: float = 1.0,
  normalize: bool = False,
  rescale: str = 'none',
) -> base_lib.Merge:
  """Model Breadcrumbs: drop the outliers and the smallest entries, add.

  `base + scale * sum_k w_k trim_both_ends(theta_k - base)`.

  Args:
    density: share of each leaf that is kept, a number or one a model. 1, as in
      mergekit, keeps everything.
    gamma: share of the largest entries that go (the paper's beta); 0.01 as in
      mergekit.
    scale: lambda.
    normalize: divide by the sum of the weights.
    rescale: see `ties`.

  Returns:
    A method over a base and any number of models.

  Raises:
    UserError: a density outside [0, 1], a gamma outside [0, 1).

  Example:
    >>> merge([{'w': jnp.array([1.0, 5.0, 0.1, 2.0])}],
    ...       breadcrumbs(density=0.5, gamma=0.25), base={'w': jnp.zeros(4)})
    {'w': Array([1., 0., 0., 2.], dtype=float32)}

  Source: Davari and Belilovsky, "Model Breadcrumbs" (2023),
  https://arxiv.org/abs/2312.06795.
  """
  base_lib.check_choice('rescale', rescale, _NORMS)
  return arithmetic.on_deltas(
    mean.linear(normalize=normalize),
    edits.rescaled(edits.trim_both_ends(density, gamma), rescale),
    scale=scale,
  )


@entries.register(
  'breadcrumbs_ties', base='required', counted=('density', 'gamma')
)
def breadcrumbs_ties(
  *,
  density: Any = 1.0,
  gamma: Any = 0.01,
  scale: float = 1.0,
  normalize: bool = False,
  consensus: str = 'sum',
  rescale: str = 'none',
) -> base_lib.Merge:
  """Model Breadcrumbs followed by the sign election of TIES.

  `base + scale * elect_sign(trim_both_ends(theta_k - base))`.

  Args:
    density: see `breadcrumbs`.
    gamma: see `breadcrumbs`.
    scale: lambda.
    normalize: divide by the weights that agree. Off by default, as in
      mergekit.
    consensus: see `elect_sign`.
    rescale: see `ties`.

  Returns:
    A method over a base and any number of models.

  Raises:
    UserError: a density outside [0, 1], a gamma outside [0, 1).

  Example:
    >>> merge([{'w': jnp.ones(2)}, {'w': -2 * jnp.ones(2)}],
    ...       breadcrumbs_ties(), base={'w': jnp.zeros(2)})
    {'w': Array([-2., -2.], dtype=float32)}

  Source: Davari and Belilovsky (2023), https://arxiv.org/abs/2312.06795, with
  Yadav et al. (2023), https://arxiv.org/abs/2306.01708; mergekit
  `breadcrumbs_ties`.
  """
  base_lib.check_choice('rescale', rescale, _NORMS)
  return arithmetic.on_deltas(
    elect_sign(normalize=normalize, consensus=consensus),
    edits.rescaled(edits.trim_both_ends(density, gamma), rescale),
    scale=scale,
  )
