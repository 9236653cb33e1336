# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of BERT, RoBERTa, DistilBERT and DeBERTa."""

from mergejax.names import base

_BERT, _ROBERTA = 'cls.predictions', 'lm_head'

NAMING = base.Naming(
  blocks=('layer',),
  first=('embed',),
  tables=(r'(.*[./])?word_embeddings[./](weight|embedding)',),
  heads=(
    r'(.*\.)?((cls\.)?predictions\.decoder|vocab_projector)\.(weight|bias)',
    r'(.*\.)?(cls\.)?predictions\.bias',
  ),
  ties=(
    *(
      base.Pair(
        f'{_BERT}.decoder.weight',
        f'{kind}.embeddings.word_embeddings.weight',
        f'{_BERT}.transform.dense.weight',
      )
      for kind in ('bert', 'deberta')
    ),
    base.Pair(f'{_BERT}.decoder.bias', f'{_BERT}.bias', always=True),
    base.Pair(
      f'{_ROBERTA}.decoder.weight',
      'roberta.embeddings.word_embeddings.weight',
      f'{_ROBERTA}.dense.weight',
    ),
    base.Pair(f'{_ROBERTA}.decoder.bias', f'{_ROBERTA}.bias', always=True),
    base.Pair(
      'vocab_projector.weight',
      'distilbert.embeddings.word_embeddings.weight',
      'vocab_transform.weight',
    ),
  ),
)
