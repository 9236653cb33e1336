# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`forest.json`: what a forest holds, changed by one process after the other.

version     of the words in it
model       config of the module of the seed and of every expert
vocabulary  'bytes', or the checksum of vocabulary.model
seed        steps and fingerprint
experts     {name: record}, see `records.Expert`
removed     {name: record} of experts that have children
priors      {domain: {expert: share}}
"""

from collections.abc import Iterator, Mapping
import contextlib
import fcntl
import json
import pathlib
from typing import Any

from mergejax.checkpoints import checkpoint
from mergejax.core import errors
from mergejax.core import files
from mergejax.experts import records

FILE = 'forest.json'
# Another number means other words in it.
_VERSION = 1
_PARTS = ('model', 'vocabulary', 'seed', 'experts', 'removed', 'priors')


def new(*, model: Any, vocabulary: str, seed: Any) -> dict[str, Any]:
  """The manifest of a forest of a seed alone."""
  return {
    'version': _VERSION, 'model': model, 'vocabulary': vocabulary,
    'seed': seed, 'experts': {}, 'removed': {}, 'priors': {},
  }  # fmt: skip


def read(forest: pathlib.Path) -> dict[str, Any]:
  """The manifest of a forest.

  Raises:
    CheckpointError: it is no JSON object, of a newer version, or lacks a part.
  """
  file = forest / FILE
  found = checkpoint.read_json(file)
  version = found.get('version')
  if version != _VERSION:
    raise errors.CheckpointError(
      f'{file} is of version {version}, and {_VERSION} is read here.'
    )
  wrong = [part for part in _PARTS[2:] if not isinstance(found.get(part), dict)]
  wrong += [part for part in _PARTS[:2] if part not in found]
  if wrong:
    raise errors.CheckpointError(
      f'{file} does not tell {", ".join(wrong)}: it was changed by something '
      'else than mergejax. Restore it, or make the forest anew of the '
      'checkpoints beside it.'
    )
  return found


def experts(forest: pathlib.Path, part: str = 'experts') -> dict[str, Any]:
  """`{name: record}` of the experts, or of those that were 'removed'.

  Raises:
    CheckpointError: see `read`; a record that is none.
  """
  return {
    name: records.from_json(record, f'{forest / FILE}, expert {name}')
    for name, record in read(forest)[part].items()
  }


@contextlib.contextmanager
def locked(forest: pathlib.Path) -> Iterator[dict[str, Any]]:
  """The manifest, which one process at a time may change and `write`."""
  with open(forest / '.lock', 'w', encoding='utf-8') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield read(forest)


def write(forest: pathlib.Path, manifest: Mapping[str, Any]) -> None:
  """Writes it in one rename."""
  with files.atomic_path(forest / FILE, overwrite=True) as temporary:
    temporary.write_text(
      json.dumps(manifest, indent=2) + '\n', encoding='utf-8'
    )


def forget(manifest: dict[str, Any], name: str) -> None:
  """Takes an expert out; priors of domains are renormalised.

  A domain whose prior was all on it has none then. What it was stays noted as
  long as experts, or removed ones, began as it.
  """
  record = manifest['experts'].pop(name)
  others = [*manifest['experts'].values(), *manifest['removed'].values()]
  if any(name in one.get('parents', ()) for one in others):
    manifest['removed'][name] = record
  manifest['priors'] = _without(name, manifest['priors'])


def _without(name, priors):
  """Priors of domains without an expert; a domain that was its alone has none."""
  found = {}
  for domain, prior in priors.items():
    left = {one: p for one, p in prior.items() if one != name}
    total = sum(left.values())
    if left == prior:
      found[domain] = prior
    elif total > 0:
      found[domain] = {one: p / total for one, p in left.items()}
  return found
