# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What stands beside merged weights: configuration, tokenizer, recipe, card."""

import hashlib
import json
import os
import pathlib

import yaml

import mergejax
from mergejax.checkpoints import axes_file
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import vocabulary
from mergejax.core import numerics
from mergejax.merging.disk import companions
from mergejax.merging.disk import configs
from mergejax.merging.disk import plans

RECIPE = 'recipe.yaml'
CARD = 'README.md'
TEMPLATE = 'chat_template.jinja'
GENERATION = 'generation_config.json'
# dtypes that `config.json` has a word for.
_TORCH = ('float64', 'float32', 'bfloat16', 'float16')


def write(plan: plans.Plan, result: pathlib.Path) -> None:
  """Writes everything beside the weights that a user of the model needs.

  Args:
    plan: what was merged.
    result: the directory of the weights.
  """
  if not plan.recipe.of_adapters:
    _write_companions(plan, result)
  write_text(
    result / RECIPE, yaml.safe_dump(dict(plan.recipe.data), sort_keys=False)
  )
  write_text(result / CARD, _card(plan))


def _write_companions(plan, result):
  """What a whole model needs: its configuration and tokenizer."""
  reference = companions.folder_of(plan.reference, plan.recipe.base)
  config = checkpoint.read_config(reference) if reference.is_dir() else None
  if config is not None:
    config = configs.changed(config, plan.config, _dtype(plan))
    write_text(result / checkpoint.CONFIG, _json(config))
  axes = {t.path: t.spec.axes for t in plan.tasks if t.spec.axes is not None}
  if axes:
    write_text(result / axes_file.NAME, axes_file.text(axes))
  source = plan.tokenizer.folder
  companions.find(reference, source).copy_to(result)
  if source != reference:
    before, after = map(vocabulary.read_tokens, (str(reference), str(source)))
    for file in (result / checkpoint.CONFIG, result / GENERATION):
      if file.is_file():
        settings = checkpoint.read_json(file)
        renumbered = configs.renumbered(settings, before, after)
        write_text(file, _json(renumbered))
  if plan.tokenizer.text is not None:
    write_text(result / vocabulary.TOKENIZER, plan.tokenizer.text)
    _note_added_tokens(result)
  _chat_template(plan, result)


def digests(plan: plans.Plan) -> dict[str, str]:
  """What a result owes to files beside the weights.

  Args:
    plan: what is merged.

  Returns:
    `{file: sha256}` of the configuration, of all that is copied, and of every
    tokenizer, where rows are matched by token.
  """
  if plan.recipe.of_adapters:
    return {}
  reference = companions.folder_of(plan.reference, plan.recipe.base)
  copied = companions.find(reference, plan.tokenizer.folder).copied
  files = {reference / checkpoint.CONFIG, *(file for file, _ in copied)}
  for folder in (reference, plan.tokenizer.folder):
    files.add(folder / vocabulary.TOKENIZER)
  if plan.recipe.tokenizer is not None:
    for name in plan.stores:
      folder = companions.folder_of(name, plan.recipe.base)
      files.add(folder / vocabulary.TOKENIZER)
  return {
    str(file): hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(files)
    if file.is_file()
  }


def _dtype(plan):
  """The dtype of all floating weights, or None if they differ in it."""
  dtypes = {
    task.spec.dtype.name
    for task in plan.tasks
    if numerics.is_averaged(task.spec.dtype)
  }
  return dtypes.pop() if len(dtypes) == 1 and dtypes <= set(_TORCH) else None


def _note_added_tokens(result):
  """Slow tokenizers read added tokens from other files than `tokenizer.json`."""
  entries = vocabulary.added_tokens(str(result))
  file = result / 'tokenizer_config.json'
  settings = checkpoint.read_json(file) if file.is_file() else {}
  listed = settings.get('added_tokens_decoder')
  if isinstance(listed, dict):
    for entry in entries:
      own = {key: value for key, value in entry.items() if key != 'id'}
      listed.setdefault(str(entry['id']), own)
    write_text(file, _json(settings))
  file = result / 'added_tokens.json'
  if file.is_file():
    rows = {entry['content']: entry['id'] for entry in entries}
    write_text(file, _json(checkpoint.read_json(file) | rows))


def _json(data):
  return json.dumps(data, indent=2, ensure_ascii=False) + '\n'


def _chat_template(plan, result):
  """Puts the template where every version of transformers finds it first."""
  wanted = plan.recipe.chat_template
  if wanted is None:
    return
  write_text(result / TEMPLATE, wanted)
  # Of processors, these come before that file, or do not go with it.
  (result / 'chat_template.json').unlink(missing_ok=True)
  for name in ('tokenizer_config.json', 'processor_config.json'):
    file = result / name
    settings = checkpoint.read_json(file) if file.is_file() else {}
    if 'chat_template' in settings or name == 'tokenizer_config.json':
      settings['chat_template'] = wanted
      write_text(file, _json(settings))


def _card(plan):
  recipe = plan.recipe
  models = '\n'.join(f'- `{name}`' for name in recipe.models())
  text = yaml.safe_dump(dict(recipe.data), sort_keys=False)
  return (
    '---\ntags:\n- merge\n- mergejax\n---\n\n'
    f'# A merge by `{recipe.entry.name}`\n\nMerged with mergejax '
    f'{mergejax.__version__} from:\n\n{models}\n\n## Recipe\n\n'
    f'```yaml\n{text}```\n\n`manifest.json` lists the settings of every '
    'parameter and the sha256 of every source.\n'
  )


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a small file whole or not at all."""
  temporary = path.with_name(f'{path.name}.new')
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, path)
