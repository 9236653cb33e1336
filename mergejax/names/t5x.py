# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of T5X's models and of flax's modules: ours."""

from mergejax.core import axes as axes_lib
from mergejax.names import base

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
  axes=axes_lib.T5_RULES,
)
