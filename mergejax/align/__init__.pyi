# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax.align.activations import match_activations
from mergejax.align.groups import derive
from mergejax.align.groups import from_axes
from mergejax.align.spec import Permutation
from mergejax.align.spec import PermutationSpec
from mergejax.align.spec import check_function
from mergejax.align.spec import identity
from mergejax.align.spec import permutation_spec
from mergejax.align.spec import permute
from mergejax.align.spec import random_permutation
from mergejax.align.straight_through import match_straight_through
from mergejax.align.weights import match_weights
from mergejax.align.weights import merge_many
from mergejax.align.weights import objective

__all__ = [
  'Permutation',
  'PermutationSpec',
  'check_function',
  'derive',
  'from_axes',
  'identity',
  'match_activations',
  'match_straight_through',
  'match_weights',
  'merge_many',
  'objective',
  'permutation_spec',
  'permute',
  'random_permutation',
]
