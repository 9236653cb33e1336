# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The kinds of adapters that PEFT writes: folded how, or refused why."""

from collections.abc import Mapping

from mergejax.checkpoints.peft import base
from mergejax.checkpoints.peft import blocks
from mergejax.checkpoints.peft import lora
from mergejax.checkpoints.peft import products
from mergejax.checkpoints.peft import rotations
from mergejax.checkpoints.peft import scales


def _kind(weight, shapes, *more, **options):
  needs = more or (frozenset(shapes),)
  return base.Kind(shapes, needs, weight, **options)


_LORA = {
  'lora_A': 'r n', 'lora_B': 'o r', 'lora_B.bias': 'o',
  'lora_embedding_A': 'r n', 'lora_embedding_B': 'o r',
  'lora_magnitude_vector': 'o', 'lora_diag': 'r',
}  # fmt: skip
_HADA = {
  'hada_w1_a': 'o r|r o', 'hada_w1_b': 'r n|r i',
  'hada_w2_a': 'o r|r o', 'hada_w2_b': 'r n|r i',
  'hada_t1': 'r r *', 'hada_t2': 'r r *',
}  # fmt: skip
# Kronecker factors: w1 [p, q], w2 [o / p, n / q]; what cannot be said by
# letters is seen when the product is put in the shape of the kernel.
_LOKR = {
  'lokr_w1': '* *', 'lokr_w1_a': '* s', 'lokr_w1_b': 's *',
  'lokr_w2': '* *', 'lokr_w2_a': '* *', 'lokr_w2_b': '* *', 'lokr_t2': '* *',
}  # fmt: skip
_VBLORA = {
  f'vblora_logits_{side}{end}': '* * *'
  for side in 'AB'
  for end in ('', '_topk_indices', '_topk_weights')
}
_PAIR = (frozenset({'lora_A', 'lora_B'}),)
_TABLE = (frozenset({'lora_embedding_A', 'lora_embedding_B'}),)

KINDS: Mapping[str, base.Kind] = {
  'LORA': _kind(
    lora.weight, _LORA, *_PAIR, *_TABLE, bias=lora.bias, refuse=lora.refuse
  ),
  'ADALORA': _kind(
    lora.adalora,
    {'lora_A': 'r n', 'lora_B': 'o r', 'lora_E': 'r 1', 'ranknum': '*'},
    frozenset({'lora_A', 'lora_B', 'lora_E'}),
  ),
  'IA3': _kind(scales.ia3, {'ia3_l': '* *'}, bias=scales.ia3_bias),
  'HIRA': _kind(
    scales.hira,
    {
      'hira_A': 'r n',
      'hira_B': 'o r',
      'hira_embedding_A': 'r n',
      'hira_embedding_B': 'o r',
    },
    frozenset({'hira_A', 'hira_B'}),
    frozenset({'hira_embedding_A', 'hira_embedding_B'}),
  ),  # fmt: skip
  'LOHA': _kind(
    products.loha,
    _HADA,
    frozenset({'hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b'}),
  ),
  'LOKR': _kind(products.lokr, _LOKR, frozenset()),
  'OFT': _kind(
    rotations.oft,
    {'oft_R': '* *', 'oft_embedding_R': '* *'},
    frozenset({'oft_R'}),
    frozenset({'oft_embedding_R'}),
  ),
  'HRA': _kind(rotations.hra, {'hra_u': '* *'}),
  'ROAD': _kind(
    rotations.road,
    {'road_theta': '*', 'road_alpha': '*'},
    bias=rotations.road_bias,
  ),
  'MISS': _kind(blocks.miss, {'miss_block': '* *'}),
  'BOFT': _kind(rotations.boft, {'boft_R': '* * *', 'boft_s': 'o'}),
  'C3A': _kind(blocks.c3a, {'c3a_kernel': '* * *'}),
  'SHIRA': _kind(blocks.shira, {'shira_indices': '2 k', 'shira_weight': 'k'}),
  'DELORA': _kind(
    blocks.delora,
    {
      'delora_A': 'r n',
      'delora_B': 'o r',
      'delora_lambda': '1',
      'delora_w_norm': 'n',
    },
  ),  # fmt: skip
  'GRALORA': _kind(
    blocks.gralora,
    {
      'gralora_A': 'k * r',
      'gralora_B': 'k r *',
      'gralora_A_general': 'q n',
      'gralora_B_general': 'o q',
    },
    frozenset({'gralora_A', 'gralora_B'}),
  ),
  'RANDLORA': _kind(
    blocks.randlora,
    {
      'randlora_A': 'r 1 *',
      'randlora_B': '* * r',
      'randlora_lambda': 'r b',
      'randlora_gamma': 'b *',
    },
    frozenset({'randlora_lambda', 'randlora_gamma'}),
    shared=('randlora_A', 'randlora_B'),
  ),
  'VERA': _kind(
    blocks.vera,
    {'vera_lambda_b': 'o', 'vera_lambda_d': 'r'},
    shared=('vera_A', 'vera_B'),
  ),
  'VBLORA': _kind(
    blocks.vblora, _VBLORA, frozenset(), shared=('vblora_vector_bank',)
  ),
  # Whole tensors and rows, which every kind may have: see `names`.
  'LN_TUNING': _kind(None, {}),
  'TRAINABLE_TOKENS': _kind(None, {}),
}

_TOKENS = (
  'it puts learned vectors beside the tokens and changes no weight, so there is '
  'nothing to fold; merge the models, and keep the adapter beside the result'
)
_RANDOM = (
  "part of it is not stored but drawn again by PyTorch's random generator"
)
_ROUTES = 'it mixes adapters by input: no single weight does that'
_LAYERS = 'it adds layers to the model rather than changing its weights'
_UNKNOWN = 'this kind has no formula here yet'

# Kinds that are not folded, and why not.
REFUSED: Mapping[str, str] = {
  'PROMPT_TUNING': _TOKENS,
  'MULTITASK_PROMPT_TUNING': _TOKENS,
  'P_TUNING': _TOKENS,
  'PREFIX_TUNING': _TOKENS,
  'CPT': _TOKENS,
  'CARTRIDGE': _TOKENS,
  'ADAPTION_PROMPT': _LAYERS,
  'SHADOW': _LAYERS,
  'PEANUT': _UNKNOWN,
  'XLORA': _ROUTES,
  'POLY': _ROUTES,
  'FOURIERFT': _RANDOM,
  'WAVEFT': _RANDOM,
  'UNILORA': _UNKNOWN,
  'PVERA': _UNKNOWN,
  'TINYLORA': _UNKNOWN,
  'FROD': _UNKNOWN,
  'BONE': 'PEFT itself reads it no more, and calls its successor MiSS',
  'GLORA': _UNKNOWN,
  'LILY': _ROUTES,
  'BEFT': _UNKNOWN,
  'OSF': _UNKNOWN,
  'PSOFT': _UNKNOWN,
  'DEFT': _UNKNOWN,
  'ADAMSS': _UNKNOWN,
  'SUPERTUNING': _UNKNOWN,
}

# Reasons where PEFT itself can do it.
MERGED_BY_PEFT = frozenset({_RANDOM, _UNKNOWN})
