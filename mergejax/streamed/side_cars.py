# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What stands beside merged weights: configuration, tokenizer, recipe, card."""

import json
import os
import pathlib
import shutil

import yaml

import mergejax
from mergejax.peft import fold
from mergejax.store import checkpoint
from mergejax.store import vocabulary
from mergejax.streamed import layer_configs
from mergejax.streamed import plans

RECIPE = 'recipe.yaml'
CARD = 'README.md'
# Files beside the weights that go with a tokenizer, and with generation.
_TOKENIZER_FILES = (
  'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
  'tokenizer.model', 'spiece.model', 'vocab.json', 'vocab.txt', 'merges.txt',
  'added_tokens.json', 'chat_template.jinja', 'chat_template.json',
)  # fmt: skip
_OTHER_FILES = ('generation_config.json', 'preprocessor_config.json')


def write(plan: plans.Plan, result: pathlib.Path) -> None:
  """Writes everything beside the weights that a user of the model needs.

  Args:
    plan: what was merged.
    result: the directory of the weights.
  """
  reference = pathlib.Path(plan.reference.split('+')[0]).expanduser()
  if fold.is_adapter(reference) and plan.recipe.base:
    reference = pathlib.Path(plan.recipe.base).expanduser()
  config = checkpoint.read_config(reference) if reference.is_dir() else None
  if config is not None:
    changes = {
      k: v
      for k, v in plan.config.items()
      if k in config or k != 'vocab_size'
    }
    kept = {'bfloat16', 'float32', 'float16'}
    if plan.recipe.dtype in kept and 'torch_dtype' in config:
      changes['torch_dtype'] = plan.recipe.dtype
    text = json.dumps(layer_configs.changed(config, changes), indent=2) + '\n'
    write_text(result / checkpoint.CONFIG, text)
  kind, value = plan.tokenizer
  source = reference if kind == 'text' else pathlib.Path(value).expanduser()
  for name in (*_TOKENIZER_FILES, *_OTHER_FILES):
    folder = reference if name in _OTHER_FILES else source
    if (folder / name).is_file():
      shutil.copyfile(folder / name, result / name)
  if kind == 'text':
    write_text(result / vocabulary.TOKENIZER, value)
  _chat_template(plan, result)
  write_text(
    result / RECIPE, yaml.safe_dump(dict(plan.recipe.data), sort_keys=False)
  )
  write_text(result / CARD, _card(plan))


def _chat_template(plan, result):
  wanted = plan.recipe.chat_template
  if wanted is None:
    return
  file = result / 'tokenizer_config.json'
  settings = checkpoint.read_json(file) if file.is_file() else {}
  settings['chat_template'] = wanted
  write_text(file, json.dumps(settings, indent=2, ensure_ascii=False) + '\n')


def _card(plan):
  recipe = plan.recipe
  models = '\n'.join(f'- `{name}`' for name in recipe.models())
  text = yaml.safe_dump(dict(recipe.data), sort_keys=False)
  return (
    '---\ntags:\n- merge\n- mergejax\n---\n\n'
    f'# A merge by `{recipe.method}`\n\nMerged with mergejax '
    f'{mergejax.__version__} from:\n\n{models}\n\n## Recipe\n\n'
    f'```yaml\n{text}```\n\n`manifest.json` lists the settings of every '
    'parameter and the sha256 of every source.\n'
  )


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a small file whole or not at all."""
  temporary = path.with_name(f'{path.name}.new')
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, path)
