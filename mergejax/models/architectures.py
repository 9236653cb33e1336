# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Whether two `config.json` describe the same function of the same weights.

Arrays of equal shapes may belong to different functions: another activation,
another split into heads, other relative positions. Means of such weights mean
nothing, and no shape tells. So every field counts, with two exceptions that
are written down here: fields that a model can be run with either way (its
context, its rotary base, its special tokens, ...) are told and may differ, and
fields of training, saving and generating are left alone.
"""

from collections.abc import Mapping, Sequence
import os
import re
from typing import Any, NamedTuple

from mergejax.checkpoints import checkpoint
from mergejax.core import errors

# Of training, saving, generating, or of the tool that wrote the file.
_ASIDE = re.compile(
  r'_.*|transformers_version|(torch_)?dtype|auto_map|torchscript|use_cache|'
  r'.*drop.*|init_.*|initializer_.*|output_\w+|return_dict\w*|\w*version|'
  r'\w*attn_impl(ementation)?|float32_attention_logits|use_bfloat16|tf_\w+|'
  r'(max|min|model_max)_(new_)?(length|tokens)|temperature|top_p|typical_p|'
  r'num_beams|num_beam_groups|num_return_sequences|do_sample|early_stopping|'
  r'\w*_penalty|\w*no_repeat_ngram_size|bad_words_ids|\w*suppress_tokens|'
  r'forced_decoder_ids|remove_invalid_values|cache_implementation|'
  r'gradient_checkpointing\w*|chunk_size_feed_forward|tokenizer_\w+|prefix|'
  r'task_specific_params|finetuning_task|problem_type|pretraining_tp|\w*_coef|'
  r'\w*_lr|(un)?freeze_\w+|tune_\w+|(mm_)?use_im_\w+|unsloth\w*|name|'
  r'keys_to_ignore_at_inference|mask_(time|feature)_\w+|apply_spec_augment|'
  r'scan_layers|param_scan_axis'
)
# A model runs with either value; the result has that of the reference.
_EITHER = re.compile(
  r'architectures|\w*rope_(theta|scaling|parameters|local_base_freq)|'
  r'rotary_emb_base|rotary_base|(original_)?max_position_embeddings|'
  r'max_(\w+_)?positions|n_positions|n_ctx|seq_length|'
  r'max_seq(uence)?_len(gth)?|model_max_length|\w*sliding_window|'
  r'max_window_layers|attention_window|\w*(_eps|epsilon)|'
  r'\w*token_(id|ids|index)|id2label|label2id|num_labels|num_experts_per_tok|'
  r'router_\w+|num_logits_to_keep|top_k|\w*vision_tower|image_aspect_ratio'
)
# What other checks speak of: shapes, tied heads, vocabularies, quantisation.
_ELSEWHERE = re.compile(
  r'tie_word_embeddings|vocab_size|quantization_config|num_\w*layers|'
  r'n_layers?|depth|(en|de)coder_layers'
)
# Lists of one entry a layer, or of layer numbers.
_OF_LAYERS = re.compile(r'\w*(layer|block)\w*')
# What a field means that is not there; of other types it is not known.
_GELU, _SILU = {'hidden_act': 'gelu'}, {'hidden_act': 'silu'}
_T5 = {
  'feed_forward_proj': 'relu',
  'relative_attention_max_distance': 128,
  'relative_attention_num_buckets': 32,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
  't5': _T5,
  'mt5': {**_T5, 'feed_forward_proj': 'gated-gelu'},
  'umt5': {**_T5, 'feed_forward_proj': 'gated-gelu'},
  'gpt2': {
    'activation_function': 'gelu_new',
    'scale_attn_weights': True,
    'scale_attn_by_inverse_layer_idx': False,
  },
  'gpt_neox': {**_GELU, 'use_parallel_residual': True},
  'bart': {'activation_function': 'gelu', 'scale_embedding': False},
  'whisper': {'activation_function': 'gelu', 'scale_embedding': False},
  'opt': {'activation_function': 'relu'},
  **dict.fromkeys(
    ('bert', 'roberta', 'xlm-roberta', 'electra'),
    {**_GELU, 'position_embedding_type': 'absolute'},
  ),
  **dict.fromkeys(('vit', 'deberta-v2', 'wav2vec2'), _GELU),
  **dict.fromkeys(
    ('llama', 'mistral', 'mixtral', 'qwen2', 'qwen3', 'phi3', 'olmo2'), _SILU
  ),
}
# Their heads share the width where the configuration does not say.
_HEADS_SHARE_WIDTH = ('llama', 'mistral', 'mixtral', 'qwen2', 'phi3', 'olmo2')
_ABSENT = object()


class Difference(NamedTuple):
  """A field that two configurations do not agree in.

  Attributes:
    field: its name, `'text_config.hidden_act'` if nested.
    expected: the first one's value.
    given: the second one's value.
    changes_function: True if weights trained with one mean something else with
      the other.
  """

  field: str
  expected: Any
  given: Any
  changes_function: bool


def differences(
  expected: Mapping[str, Any], given: Mapping[str, Any]
) -> list[Difference]:
  """Fields in which two configurations differ and that are no side matter.

  A field that only one of them has is compared to what its absence means,
  where that is known; otherwise it counts as one that may differ.

  Args:
    expected: a `config.json`: of Hugging Face, or of this project.
    given: another.

  Returns:
    The differences, those that change the function first.

  Example:
    >>> differences({'hidden_act': 'silu'}, {'hidden_act': 'gelu'})[0].field
    'hidden_act'
  """
  both = [_completed(expected), _completed(given)]
  found = []
  for field in dict.fromkeys([*both[0], *both[1]]):
    name = field.rsplit('.', 1)[-1]
    if _ASIDE.fullmatch(name) or _ELSEWHERE.fullmatch(name):
      continue
    a, b = (_meant(own, field, name) for own in both)
    sure = a is not _ABSENT and b is not _ABSENT
    if not sure:
      present = b if a is _ABSENT else a
      default = _meaning_of_absence(both[a is not _ABSENT], field, name)
      sure = default is not _ABSENT
      if present == default or (not sure and present in (None, False, [], {})):
        continue
    if a == b:
      continue
    lists = isinstance(a, list) or isinstance(b, list)
    either = _EITHER.fullmatch(name) or (lists and _OF_LAYERS.fullmatch(name))
    found.append(Difference(field, a, b, bool(sure and not either)))
  return sorted(found, key=lambda one: not one.changes_function)


def compare(
  configs: Mapping[str, Mapping[str, Any] | None],
  ignored: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
  """Compares the configurations of models that are to become one.

  Args:
    configs: `{name of a model: its config.json, or None}`; the first is the
      one whose configuration the result has.
    ignored: fields that may differ.

  Returns:
    `(problems, remarks)`: a line for each field that changes the function, and
    for each that does not but should be known.
  """
  names = list(configs)
  problems, remarks = [], []
  if not configs or configs[names[0]] is None:
    return problems, remarks
  first = configs[names[0]]
  for name in names[1:]:
    given = configs[name]
    if first is None or given is None:
      remarks.append(
        f'{name} has no config.json: whether it computes what {names[0]} does '
        'is not known'
      )
      continue
    for one in differences(first, given):
      line = (
        f'{one.field}: {_shown(one.expected)} in {names[0]}, '
        f'{_shown(one.given)} in {name}'
      )
      if one.changes_function and one.field not in ignored:
        problems.append(line)
      else:
        remarks.append(line)
  return problems, remarks


def check(
  configs: Mapping[str, Mapping[str, Any] | None],
  advice: str,
  ignored: Sequence[str] = (),
) -> list[str]:
  """`compare`, as an error.

  Args:
    configs: see `compare`.
    advice: what to do, the end of the message.
    ignored: see `compare`.

  Returns:
    The remarks of `compare`.

  Raises:
    UserError: a field that changes the function differs.
  """
  problems, remarks = compare(configs, ignored)
  if problems:
    raise errors.StructureError(
      'These models are of different architectures, whatever their shapes: '
      f'weights of one mean something else in the other.\n'
      f'{errors.listed(problems, 20)}\n{advice}'
    )
  return remarks


def check_checkpoints(
  paths: Sequence[os.PathLike | str], advice: str
) -> list[str]:
  """`check`, of those checkpoints that have a `config.json`."""
  found = {str(path): checkpoint.read_config(path) for path in paths}
  return check({path: own for path, own in found.items() if own}, advice)


def _completed(config):
  """`{dotted name: value}`, with the defaults of this project's models."""
  try:
    # Another library's say so; the defaults of its models are not known here.
    own = 'architectures' not in config and 'transformers_version' not in config
    if own and isinstance(config.get('model_type'), str):
      from mergejax import models  # linen, which other models do not need

      config = models.describe(models.build(config))
  except errors.UserError:
    pass  # a model type that is none of ours
  flat = {}
  for name, value in config.items():
    if name.endswith('_config') and isinstance(value, Mapping):
      if not (_ELSEWHERE.fullmatch(name) or _ASIDE.fullmatch(name)):
        flat.update({f'{name}.{k}': v for k, v in _completed(value).items()})
    else:
      flat[name] = list(value) if isinstance(value, tuple) else value
  return flat


def _meant(config, field, name):
  """The value of a field; `null` is what the library makes of it, if known."""
  value = config.get(field, _ABSENT)
  if value is not None:
    return value
  meaning = _meaning_of_absence(config, field, name, null=True)
  return None if meaning is _ABSENT else meaning


def _meaning_of_absence(config, field, name, null=False):
  """What a configuration that lacks a field means by that, if it is known."""
  section = field[: -len(name)]
  kind = config.get(f'{section}model_type')
  width = config.get(f'{section}hidden_size')
  heads = config.get(f'{section}num_attention_heads')
  # Models with another default take a `null` for these all the same.
  shared = null or kind in _HEADS_SHARE_WIDTH
  if shared and name == 'head_dim' and width and heads:
    return width // heads
  if shared and name == 'num_key_value_heads' and heads:
    return heads
  return _DEFAULTS.get(kind, {}).get(name, _ABSENT)


def _shown(value):
  text = 'not given' if value is _ABSENT else repr(value)
  return text if len(text) <= 60 else f'{text[:57]}...'
