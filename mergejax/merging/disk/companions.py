# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Files beside a model that its merge needs too: tokenizer, processor, modules.

Only what is known by name, holds data, and is small goes along. Code and
pickles never do: a merge does not decide whom to trust.
"""

import pathlib
import shutil
from typing import NamedTuple

from mergejax.adapters import changes
from mergejax.checkpoints import base as store_base
from mergejax.checkpoints.peft import fold

# These go with the tokenizer, which may be another model's.
_TOKENIZER = (
  'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
  'added_tokens.json', 'vocab*.json', 'vocab*.txt', 'merges.txt', 'dict*.txt',
  '*.model', 'tokenizer.model.v*', '*.spm', '*.tiktoken', 'bpe.codes',
  'tekken.json', 'normalizer.json', 'chat_template.jinja',
  'chat_template.json', 'additional_chat_templates/*.jinja',
)  # fmt: skip
# These go with the architecture: of the reference.
_ARCHITECTURE = (
  'generation_config.json', '*processor_config.json', 'modules.json',
  'sentence_*_config.json', 'config_sentence_transformers.json',
  '[0-9]_*/*.json', 'LICENSE*', 'LICENCE*', 'NOTICE*', 'USE_POLICY*',
)  # fmt: skip
# The result has its own, or they are of no use to it.
_OWN = (
  'config.json', 'axes.json', 'README.md', 'recipe.yaml', 'manifest.json', 'adapter_*',
  '.*', '*.safetensors', '*.safetensors.index*.json',
)  # fmt: skip
# A merge may change what these say.
REWRITTEN = (
  'tokenizer_config.json', 'processor_config.json', 'added_tokens.json',
  'generation_config.json',
)  # fmt: skip
_PICKLES = ('.bin', '.pt', '.pth', '.pkl', '.pickle', '.ckpt', '.joblib')
# Tokenizers of the largest vocabularies have some 40 MB.
_LARGEST = 100 * 10**6


class Tokenizer(NamedTuple):
  """The tokenizer of a result.

  Attributes:
    folder: whose files it has.
    text: its `tokenizer.json`, if that is not the folder's.
  """

  folder: pathlib.Path
  text: str | None = None


class Companions(NamedTuple):
  """What goes with a result, and what does not.

  Attributes:
    copied: `(file, its name in the result)`.
    left: names, and why.
  """

  copied: list[tuple[pathlib.Path, str]]
  left: dict[str, list[str]]

  def copy_to(self, result: pathlib.Path) -> None:
    """Copies what goes along; nothing else of it is read."""
    for file, name in self.copied:
      (result / name).parent.mkdir(exist_ok=True)
      shutil.copyfile(file, result / name)

  def remarks(self, folder: pathlib.Path) -> list[str]:
    """What is left behind, in words."""
    return [
      f'beside the weights of {folder}, not copied ({why}): '
      + ', '.join(sorted(names)[:20])
      + (f' and {len(names) - 20} more' if len(names) > 20 else '')
      for why, names in self.left.items()
    ]


def folder_of(model: str, base: str | None) -> pathlib.Path:
  """Where the side files of a model lie; an adapter's are those of its base."""
  folder = changes.parts(model)[0]
  if base and fold.is_adapter(folder):
    folder = changes.parts(base)[0]
  return pathlib.Path(folder).expanduser()


def find(
  folder: pathlib.Path,
  tokenizer: pathlib.Path,
  store: store_base.ParamStore | None = None,
) -> Companions:
  """Looks at what lies beside a model.

  Args:
    folder: of the model whose architecture the result has.
    tokenizer: of the model whose tokenizer it has.
    store: the model; files that its parameters are read from are not named.

  Returns:
    What a merge copies from the two, and what stays behind.
  """
  copied, left = {}, {}
  for source, patterns in ((folder, _ARCHITECTURE), (tokenizer, _TOKENIZER)):
    for pattern in patterns:
      for file in sorted(source.glob(pattern)):
        name = str(file.relative_to(source))
        why = _obstacle(file)
        if why is None:
          copied[name] = file
        elif why:
          left.setdefault(why, []).append(name)
  weights = set() if store is None else {*map(pathlib.Path, store.files())}
  known = {*copied, *(name for names in left.values() for name in names)}
  if tokenizer != folder:  # the other one's files are wanted, not these
    own = [file for pattern in _TOKENIZER for file in folder.glob(pattern)]
    known |= {str(file.relative_to(folder)) for file in own}
  for name in _others(folder, known, weights):
    left.setdefault(_reason(name), []).append(name)
  return Companions([(file, name) for name, file in copied.items()], left)


def _others(folder, known, weights):
  """Names of other files; a folder of which nothing is taken is one name."""
  folders = {name.split('/')[0] for name in known if '/' in name}
  for child in sorted(folder.iterdir()) if folder.is_dir() else ():
    if any(child.match(pattern) for pattern in _OWN) or child.name in known:
      continue
    if child.name in folders or child.is_dir() and child.match('[0-9]_*'):
      inside = [f for f in sorted(child.rglob('*')) if f.is_file()]
      names = [str(file.relative_to(folder)) for file in inside]
      yield from (name for name in names if name not in known)
    elif child.is_dir():
      if any(file.is_relative_to(child.absolute()) for file in weights):
        continue
      yield f'{child.name}/'
    elif child not in weights and child.absolute() not in weights:
      yield child.name


def _reason(name):
  suffix = pathlib.PurePath(name).suffix
  if suffix == '.py':
    return 'code, which you may copy if you trust it'
  if suffix in _PICKLES:
    return 'pickles'
  if suffix == '.safetensors':
    return 'weights of modules that are not merged'
  return 'not known here'


def _obstacle(file):
  """Why a file of a known name does not go along, or None if it does."""
  if not file.is_file():
    return ''
  size = file.stat().st_size
  if size > _LARGEST:
    return f'more than {_LARGEST // 10**6} MB'
  with open(file, 'rb') as stream:
    start = stream.read(4)
  # Of pickle's protocols from 2 on, and of PyTorch's archives of pickles.
  if start[:1] == b'\x80' and start[1:2] <= b'\x05' or start == b'PK\x03\x04':
    return 'pickles'
  return None
