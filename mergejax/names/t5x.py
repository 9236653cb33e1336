# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of T5X's models and of flax's modules: ours."""

from collections.abc import Sequence

from mergejax.core import axes as axes_lib
from mergejax.names import base

# Of encoder-decoders, decoder-only models and whatever reuses their layers.
AXES: Sequence[tuple[str, tuple[str, ...]]] = (
  (r'(.*/)?token_embedder/embedding', ('vocab', 'embed')),
  (r'(.*/)?(query|key|value)/kernel', ('embed', 'joined_kv')),
  (r'(.*/)?out/kernel', ('joined_kv', 'embed')),
  (r'(.*/)?expert/wi(_\d+)?/kernel', ('expert', 'mlp_embed', 'expert_mlp')),
  (r'(.*/)?expert/wo/kernel', ('expert', 'expert_mlp', 'mlp_embed')),
  (r'(.*/)?router_weights/w/kernel', ('embed', 'unmodeled')),
  (r'(?!.*expert/)(.*/)?wi(_\d+)?/kernel', ('embed', 'mlp')),
  (r'(?!.*expert/)(.*/)?wo/kernel', ('mlp', 'embed')),
  (r'(.*/)?logits_dense/kernel', ('embed', 'vocab')),
  (r'(.*/)?rel_embedding', ('heads', 'relpos_buckets')),
  (r'(.*/)?\w*norm/scale', ('embed',)),
)


# Of models with experts, whose dense layers lie on a mesh as their experts do.
SPARSE: Sequence[tuple[str, tuple[str, ...]]] = tuple(
  (pattern, tuple('mlp_embed' if name == 'embed' else name for name in axes))
  if 'mlp' in axes
  else (pattern, axes)
  for pattern, axes in AXES
)


def scanned(
  rules: Sequence[tuple[str, tuple[str, ...]]], axis: int
) -> axes_lib.Rules:
  """Rules of a model whose layers are one by one, for the same one scanned.

  Args:
    rules: axes of parameters of a layer.
    axis: where a scanned parameter has its axis of layers.

  Returns:
    Rules of stacks called like their parents, and of what is outside of them.
  """
  stack = r'(encoder/encoder|decoder/decoder)/'
  inside = tuple(
    (stack + pattern, (*axes[:axis], 'layers', *axes[axis:]))
    for pattern, axes in rules
  )
  outside = tuple((f'(?!{stack}){pattern}', axes) for pattern, axes in rules)
  return inside + outside


NAMING = base.Naming(
  model_types=('t5x', 'lm'),
  # flax's own numbers follow the name of the block: `encoderblock_3`.
  blocks=(
    r'(?i:(?:(?:encoder|decoder|transformer|residual|res)_?)?'
    r'(?:layers?|blocks?))',
  ),
  first=('embed', 'token_embedder'),
  tables=(r'(.*[./])?tok(en)?s?_embed\w*[./](weight|embedding)',),
  turned=(r'(.*[./])?(lm_head|logits_dense|decoder)/kernel',),
  axes=AXES,
)
