# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of T5, BART, Whisper and their kin, as Hugging Face has them."""

from collections.abc import Mapping
from typing import Any

from mergejax.names import base

_EMBEDDINGS = 'model.decoder.embed_tokens.weight'

NAMING = base.Naming(
  model_types=('t5', 'mt5', 'bart', 'mbart', 'whisper', 'opt'),
  blocks=('block', 'layers'),
  first=('embed', 'shared'),
  tables=(r'(.*[./])?shared[./](weight|embedding)',),
  heads=(r'(.*\.)?(proj_out|output_projection)\.(weight|bias)',),
  turned=(r'(.*[./])?final_logits_bias',),
  adapted=('shared', 'relative_attention_bias'),
  ties=(
    base.Pair('proj_out.weight', _EMBEDDINGS, 'model.encoder.conv1.weight'),
    base.Pair('lm_head.weight', 'shared.weight'),
    base.Pair('lm_head.weight', 'model.shared.weight'),
    base.Pair('lm_head.weight', _EMBEDDINGS),
    *(
      base.Pair(
        f'{prefix}{side}.embed_tokens.weight',
        f'{prefix}shared.weight',
        always=True,
      )
      for prefix in ('', 'model.')
      for side in ('encoder', 'decoder')
    ),
  ),
  # The relative positions of all layers are in the first one.
  shared=(r'.*\.relative_attention_bias\..*',),
)


def has_tied_head(config: Mapping[str, Any]) -> bool:
  """Whether a Hugging Face T5's head is its embedding, scaled by 1/sqrt(embed).

  transformers 5 writes `tie_word_embeddings: true` for all of them, and says
  with `scale_decoder_outputs` what the older key said.
  """
  tied = config.get('tie_word_embeddings', True)
  return bool(config.get('scale_decoder_outputs', tied))
