# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of T5, BART, Whisper and their kin, as Hugging Face has them."""

from collections.abc import Mapping
from typing import Any

from mergejax.names import base

_EMBEDDINGS = 'model.decoder.embed_tokens.weight'

NAMING = base.Naming(
  model_types=('t5', 'mt5', 'umt5', 'bart', 'mbart', 'whisper', 'opt'),
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


# Models of one function and one set of names: `config.json` tells them apart.
MODEL_TYPES = ('t5', 'mt5', 'umt5')


def has_tied_head(config: Mapping[str, Any]) -> bool:
  """Whether a Hugging Face T5's head is its embedding, scaled by 1/sqrt(embed).

  transformers 5 writes `tie_word_embeddings: true` for all of them, and says
  with `scale_decoder_outputs` what the older key said. Of mT5 it says nothing,
  and never scales: all mT5 have a head of their own.
  """
  if config.get('model_type') == 'mt5':
    return False
  tied = config.get('tie_word_embeddings', True)
  return bool(config.get('scale_decoder_outputs', tied))


def head_is_told(config: Mapping[str, Any]) -> bool:
  """Whether `has_tied_head` knows better than `tie_word_embeddings` alone."""
  kind = config.get('model_type')
  return kind == 'mt5' or (
    kind in MODEL_TYPES and 'scale_decoder_outputs' in config
  )
