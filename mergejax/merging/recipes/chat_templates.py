# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Chat templates by the names that recipes give them.

Each is written from the public description of its format; none fails on a
message with an unusual role, which is written like any other.
"""

import collections
from collections.abc import Sequence
import pathlib

from mergejax.adapters import changes
from mergejax.checkpoints import checkpoint
from mergejax.core import errors

AUTO = 'auto'
_FILE = 'chat_template.jinja'

# https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
{{- message['content'] ~ '<|im_end|>' ~ '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant' ~ '\\n' -}}
{%- endif -%}
"""

# https://github.com/tatsu-lab/stanford_alpaca#data-release
_ALPACA = """\
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '### Instruction:\\n' ~ message['content'] ~ '\\n\\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- '### Response:\\n' ~ message['content'] ~ eos_token ~ '\\n\\n' -}}
{%- else -%}
{{- message['content'] ~ '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '### Response:\\n' -}}
{%- endif -%}
"""

# https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/
_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' -}}
{{- message['content'] | trim ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

# https://huggingface.co/mistralai/Mistral-7B-Instruct-v0.2#instruction-format
# It has no system role; such a message opens the instruction that follows it.
_MISTRAL = """\
{{- bos_token -}}
{%- set waiting = namespace(text='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set waiting.text = message['content'] ~ '\\n\\n' -%}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' ~ message['content'] | trim ~ eos_token -}}
{%- else -%}
{{- '[INST] ' ~ waiting.text ~ message['content'] ~ ' [/INST]' -}}
{%- set waiting.text = '' -%}
{%- endif -%}
{%- endfor -%}
"""

# https://huggingface.co/LGAI-EXAONE/EXAONE-3.5-7.8B-Instruct
_EXAONE = """\
{%- for message in messages -%}
{{- '[|' ~ message['role'] ~ '|]' ~ message['content'] -}}
{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '[|assistant|]' -}}
{%- endif -%}
"""

NAMED = {
  'alpaca': _ALPACA,
  'chatml': _CHATML,
  'exaone': _EXAONE,
  'llama3': _LLAMA3,
  'mistral': _MISTRAL,
}


def resolve(value: str) -> str:
  """The text of a template that a recipe gives as text or by name.

  Args:
    value: a name, or Jinja text.

  Raises:
    UserError: neither; the nearest names are offered.
  """
  if value in NAMED:
    return NAMED[value]
  if '{' not in value:
    raise errors.RecipeError(
      errors.near(value, [AUTO, *NAMED], 'chat template')
      + ' Or give the Jinja text of one.'
    )
  return value


def of_model(folder: pathlib.Path) -> str | None:
  """The chat template of a Hugging Face directory, if it has one."""
  if (folder / _FILE).is_file():
    return (folder / _FILE).read_text(encoding='utf-8').strip()
  settings = folder / 'tokenizer_config.json'
  if not settings.is_file():
    return None
  found = checkpoint.read_json(settings).get('chat_template')
  if isinstance(found, list):  # [{name, template}]
    found = {one.get('name'): one.get('template') for one in found}
  if isinstance(found, dict):
    found = found.get('default')
  return found.strip() if isinstance(found, str) else None


def chosen(
  value: str | None, models: Sequence[str]
) -> tuple[str | None, list[str]]:
  """What 'auto' stands for: the template that most models have.

  Args:
    value: of a recipe; anything but 'auto' is kept.
    models: names of the models; of equally common templates the first counts.

  Returns:
    `(template or None, remarks for the plan)`.
  """
  if value != AUTO:
    return value, []
  folders = [pathlib.Path(changes.parts(n)[0]).expanduser() for n in models]
  found = [own for folder in folders if (own := of_model(folder))]
  if not found:
    return None, ['chat_template auto: no model has one']
  # Counter keeps the order in which templates came.
  text, count = collections.Counter(found).most_common(1)[0]
  return text, [f'chat_template auto: that of {count} of {len(models)} models']
