# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What mergekit 0.1.5 reads in a recipe, by which name, and what it ignores.

mergekit ignores every key that it does not know, wherever it stands. A recipe
that runs there runs here: such keys are ignored too, and told. Only a key that
is nearly a known one is refused, because it must be a slip of the pen.

Source: mergekit 0.1.5, https://github.com/arcee-ai/mergekit.
"""

from collections.abc import Iterable
import difflib

# mergekit's names of methods and options -> ours.
METHOD_ALIASES = {'ramplus_tl': 'ram_plus'}
OPTION_ALIASES = {
  'lambda': 'scale',
  'nuslerp_flatten': 'flatten',
  'nuslerp_row_wise': 'axis',
}

_TASK_VECTORS = (('weight', 'density'), ('normalize', 'rescale', 'lambda', 'int8_mask'))  # fmt: skip
# method: (options that each model may have its own of, options for all).
READS = {
  'arcee_fusion': ((), ()),
  'breadcrumbs': (('gamma', *_TASK_VECTORS[0]), _TASK_VECTORS[1]),
  'breadcrumbs_ties': (('gamma', *_TASK_VECTORS[0]), _TASK_VECTORS[1]),
  'dare_linear': _TASK_VECTORS,
  'dare_ties': _TASK_VECTORS,
  'della': (('epsilon', *_TASK_VECTORS[0]), _TASK_VECTORS[1]),
  'della_linear': (('epsilon', *_TASK_VECTORS[0]), _TASK_VECTORS[1]),
  'karcher': ((), ('max_iter', 'tol')),
  'linear': (('weight',), ('normalize',)),
  'model_stock': ((), ('filter_wise',)),
  'multislerp': (('weight',), ('normalize_weights', 'eps')),
  'nearswap': ((), ('t',)),
  'nuslerp': (('weight',), ('nuslerp_row_wise', 'nuslerp_flatten')),
  'passthrough': (('scale',), ()),
  'ram': ((), ('epsilon',)),
  'ram_plus': ((), ('r', 'alpha', 'epsilon')),
  'sce': ((), ('select_topk', 'int8_mask')),
  'slerp': ((), ('t',)),
  'task_arithmetic': _TASK_VECTORS,
  'ties': _TASK_VECTORS,
}
# Options of any method, of earlier releases too: known words everywhere.
OPTIONS = frozenset(
  word for own in READS.values() for words in own for word in words
) | {'embed_slerp'}
# These read `base_model` as one more model, in a recipe of `models:`.
TAKES_BASE_AS_MODEL = ('linear', 'karcher')
# Options that are read and change no number here, and why.
WITHOUT_EFFECT = {'int8_mask': 'signs are always counted exactly'}
# What task_arithmetic, whose task vectors stay whole, reads and does not use.
WHOLE_TASK_VECTORS = ('density', 'rescale')

# How near an unknown key must be to a known one to be taken for a slip.
_NEAR = 0.75


def slip(key: str, known: Iterable[str]) -> str | None:
  """The known word that an unknown key was probably meant to be, or None.

  Example:
    >>> slip('wieght', ['weight', 'density'])
    'weight'
    >>> slip('model_name', ['models', 'base_model'])
  """
  close = difflib.get_close_matches(str(key), sorted(known), 1, _NEAR)
  return close[0] if close else None
