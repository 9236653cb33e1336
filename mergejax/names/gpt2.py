# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of GPT-2, GPT-NeoX, Falcon and their kin."""

from mergejax.names import base

NAMING = base.Naming(
  blocks=('h', 'layers'),
  first=('embed', 'wte', 'wpe'),
  tables=(r'(.*[./])?(wte|word_embeddings)[./](weight|embedding)',),
  adapted=('wte', 'wpe'),
  ties=(
    base.Pair('lm_head.weight', 'transformer.wte.weight'),
    base.Pair('lm_head.weight', 'transformer.word_embeddings.weight'),
    base.Pair('embed_out.weight', 'gpt_neox.embed_in.weight'),
  ),
  # transformers' Conv1D.
  transposed=('c_attn', 'q_attn', 'c_proj', 'c_fc'),
)
