# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A folder of text, one file or folder per domain, as clean document splits.

A document is never cut between splits and never stands in two of them: every
document goes, whole, to one split by a hash of its text, and a text that
occurs again (up to white space and letter case) is dropped.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import hashlib
import json
import os
import pathlib
import re

from mergejax.core import errors
from mergejax.data import rows

SPLITS = ('test', 'validation', 'train')
# Share of the documents for test and for validation, where the corpus does
# not come with splits of its own.
HELD_OUT = 0.08
# A document with fewer characters says little and is often repeated.
MIN_CHARACTERS = 20


def documents(path: pathlib.Path) -> Iterator[str]:
  """Documents of a file: one a line of JSONL (`text`), else the whole file."""
  if path.suffix == '.jsonl':
    found = rows.Rows(path)
    for number in range(len(found)):
      yield found.fields(number, ['text'])[0].decode()
    return
  try:
    yield path.read_bytes().decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise errors.DataError(f'{path} is not UTF-8 text: {error}.') from error


def find_domains(folder: os.PathLike | str) -> dict[str, dict[str, list]]:
  """Lists the domains of a folder and the files of each.

  Args:
    folder: holds one file or folder per domain. A domain folder with
      `train.*`, `validation.*` and `test.*` keeps these splits; the files of
      any other are documents to be split.

  Returns:
    `{domain: {split or 'all': [files]}}`, sorted by name.

  Raises:
    UserError: no such folder, or nothing in it.
  """
  folder = pathlib.Path(folder).expanduser()
  if not folder.is_dir():
    raise errors.DataError(
      f'The corpora folder {folder} does not exist. It should hold one file '
      'or folder of UTF-8 text per domain.'
    )
  domains = {}
  for entry in sorted(folder.iterdir()):
    if entry.name.startswith('.'):
      continue
    if entry.is_file():
      if entry.suffix in ('.txt', '.jsonl', '.md'):
        domains[entry.stem] = {'all': [entry]}
      continue
    files = sorted(f for f in entry.rglob('*') if f.is_file())
    by_stem = {f.stem: f for f in files if f.parent == entry}
    if set(SPLITS) <= set(by_stem):
      domains[entry.name] = {split: [by_stem[split]] for split in SPLITS}
    elif files:
      domains[entry.name] = {'all': files}
  if not domains:
    raise errors.DataError(
      f'The corpora folder {folder} is empty: put one file (.txt, .jsonl) or '
      'folder of text per domain into it.'
    )
  return domains


def _fingerprint(text: str) -> bytes:
  folded = re.sub(r'\s+', ' ', text).strip().lower()
  return hashlib.sha256(folded.encode()).digest()


def split_documents(
  labelled: Iterable[tuple[str, str]], seen: set[bytes]
) -> Iterator[tuple[str, str]]:
  """Drops repeated documents and gives the rest a split.

  Documents labelled `'all'` are ordered by a hash of their text; the first go
  to test until it has `HELD_OUT` of all characters, the next to validation
  until it has as many, the rest to train. The order of the files does not
  matter, and a domain of few documents still gets all three splits. They are
  held in memory together; documents that bring their split stream through.

  Args:
    labelled: `(split or 'all', text)`. Where splits are given they must come
      in the order test, validation, train: the first occurrence of a text is
      kept, so that nothing of the test set is trained on.
    seen: fingerprints met so far, over all domains; added to.

  Yields:
    `(split, text)`.
  """
  unlabelled = []
  for split, text in labelled:
    fingerprint = _fingerprint(text)
    if len(text) < MIN_CHARACTERS or fingerprint in seen:
      continue
    seen.add(fingerprint)
    if split == 'all':
      unlabelled.append((fingerprint, text))
    else:
      yield split, text
  quota = HELD_OUT * sum(len(text) for _, text in unlabelled)
  # Each is filled by itself: a long document in test leaves validation its own.
  room = {'test': quota, 'validation': quota, 'train': float('inf')}
  for _, text in sorted(unlabelled):
    split = next(name for name, left in room.items() if left > 0)
    room[split] -= len(text)
    yield split, text


def write_splits(
  domains: Mapping[str, Iterable[tuple[str, str]]],
  out: pathlib.Path,
  *,
  max_train_bytes: int | None = None,
) -> dict[str, dict[str, int]]:
  """Writes `out/DOMAIN/{train,validation,test}.jsonl`, deduplicated.

  Args:
    domains: `{domain: (split or 'all', text) pairs}`, see `split_documents`.
    out: a folder; written anew.
    max_train_bytes: a random part of a domain's training documents is kept, of
      no more bytes than this; all are by default. Which they are does not
      depend on their order.

  Returns:
    `{domain: {split: bytes of text}}`.
  """
  seen: set[bytes] = set()
  sizes = {}
  for domain, labelled in domains.items():
    folder = out / domain
    folder.mkdir(parents=True, exist_ok=True)
    sizes[domain] = dict.fromkeys(SPLITS, 0)
    drawn = []
    with contextlib.ExitStack() as stack:
      files = {
        split: stack.enter_context(
          open(folder / f'{split}.jsonl', 'w', encoding='utf-8')
        )
        for split in SPLITS
      }
      for split, text in split_documents(labelled, seen):
        size = len(text.encode('utf-8', 'replace'))
        sizes[domain][split] += size
        files[split].write(json.dumps({'text': text}) + '\n')
        if split == 'train' and max_train_bytes:
          drawn.append((_fingerprint(text), size))
    if max_train_bytes and sizes[domain]['train'] > max_train_bytes:
      sizes[domain]['train'] = _thin(
        folder / 'train.jsonl', drawn, max_train_bytes
      )
  return sizes


def _thin(file, documents, most):
  """Leaves documents, by their hashes, while they fit; returns their bytes."""
  kept, total = set(), 0
  order = sorted((*one, number) for number, one in enumerate(documents))
  for _, size, number in order:
    if total + size <= most:
      kept.add(number)
      total += size
  part = file.with_suffix('.part')
  with open(file, encoding='utf-8') as lines:
    with open(part, 'w', encoding='utf-8') as out:
      out.writelines(line for i, line in enumerate(lines) if i in kept)
  part.replace(file)
  return total


def read_folder(
  folder: os.PathLike | str,
) -> dict[str, Iterator[tuple[str, str]]]:
  """The documents of every domain of a folder, for `write_splits`."""

  def labelled(files_of):
    for split in (*SPLITS, 'all'):
      for file in files_of.get(split, ()):
        for text in documents(file):
          yield split, text

  return {
    domain: labelled(files_of)
    for domain, files_of in find_domains(folder).items()
  }


def check_sizes(
  sizes: Mapping[str, Mapping[str, int]], needed: Mapping[str, int]
) -> None:
  """Raises if a domain has too little text for one batch of some split.

  Args:
    sizes: from `write_splits`, bytes by domain and split.
    needed: bytes that each split must have.

  Raises:
    UserError: lists every domain and split that is too small.
  """
  lines = [
    f'{domain}: {size[split]} bytes of {split} text, {least} needed'
    for domain, size in sizes.items()
    for split, least in needed.items()
    if size[split] < least
  ]
  if lines:
    raise errors.DataError(
      f'Too little text for one batch:\n{errors.listed(lines)}\nAdd '
      'documents to these domains (about '
      f'{HELD_OUT:.0%} of them go to test and to validation each, and those '
      'that are longer than max_train_bytes are left out of training), remove '
      'the domains, or lower the batch size or length.'
    )
