# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of Llama and of what is named like it, towers of vision included."""

from mergejax.names import base

_EMBEDDINGS = 'embed_tokens.weight'

NAMING = base.Naming(
  # Those that fuse their experts, see `axes`.
  model_types=('llama4', 'llama4_text', 'gpt_oss'),
  blocks=('layers',),
  first=('embed',),
  tables=(r'(.*[./])?embed(?!\w*pos)\w*[./](weight|embedding)',),
  heads=(
    r'(.*\.)?(\w*lm_head|lm_head\.(decoder|out_proj)|embed_out)'
    r'\.(weight|bias)',
  ),
  adapted=(r'\w*embed(?!_out)\w*',),
  ties=(
    base.Pair(
      'language_model.lm_head.weight', f'language_model.model.{_EMBEDDINGS}'
    ),
    *(
      base.Pair('lm_head.weight', f'{prefix}.{_EMBEDDINGS}')
      for prefix in (
        'model',
        'model.language_model',
        'language_model.model',
        'model.text_model',
      )
    ),
  ),
  # All experts of a layer are one array, `[experts, inputs, outputs]`.
  axes=(
    (r'.*\.experts\.(gate_up|down)_proj', ('expert', 'inputs', 'outputs')),
    (r'.*\.experts\.(gate_up|down)_proj_bias', ('expert', 'outputs')),
  ),
)
