# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Real text that every machine with this package has, in five domains.

Nothing is downloaded: the text is what Python and the installed packages
bring along. The domains differ as corpora do: code in two languages, prose,
licences and package descriptions, and a catalogue of character names.
"""

from collections.abc import Iterable, Iterator
import pathlib
import pydoc_data.topics
import random
import re
import sysconfig
import unicodedata


def _read(paths: Iterable[pathlib.Path]) -> Iterator[str]:
  for path in paths:
    try:
      yield path.read_text(encoding='utf-8')
    except (UnicodeDecodeError, OSError):
      continue  # a test file in another encoding is not text for us


def _shuffled(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
  """A fixed random order, so that a byte limit samples the whole tree."""
  paths = sorted(paths)
  random.Random(0).shuffle(paths)
  return paths


def _site() -> pathlib.Path:
  return pathlib.Path(sysconfig.get_path('purelib'))


def python_source() -> Iterator[str]:
  """Modules of the standard library, without its tests and packages."""
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  skipped = {'site-packages', 'dist-packages', 'test', 'tests', 'pydoc_data'}
  return _read(
    _shuffled(p for p in root.rglob('*.py') if not skipped & set(p.parts))
  )


def c_headers() -> Iterator[str]:
  """C headers of Python and of NumPy, which come with it or with a package."""
  folders = [pathlib.Path(sysconfig.get_path('include')), _site() / 'numpy']
  return _read(_shuffled(p for f in folders for p in f.rglob('*.h')))


def reference_prose() -> Iterator[str]:
  """The language reference as `help()` shows it."""
  for _, text in sorted(pydoc_data.topics.topics.items()):
    yield text


def licences_and_metadata() -> Iterator[str]:
  """Licence texts and descriptions of the installed packages."""
  wanted = re.compile(r'(metadata$|licen|copying|notice|authors)', re.I)
  return _read(
    _shuffled(
      path
      for path in _site().glob('*.dist-info/**/*')
      if path.is_file() and wanted.match(path.name)
    )
  )


def unicode_names(block: int = 64) -> Iterator[str]:
  """Code points and their names, a document per block of the character table.

  CJK ideographs and Hangul syllables are left out: their names are numbers.
  """
  for start in range(0, 0x20000, block):
    rows = []
    for code in range(start, start + block):
      name = unicodedata.name(chr(code), '')
      if name and not name.startswith(('CJK', 'HANGUL SYLLABLE')):
        rows.append(f'{code:04X} {name}')
    if rows:
      yield '\n'.join(rows) + '\n'


def domains() -> dict[str, Iterator[tuple[str, str]]]:
  """Every domain as `('all', text)` pairs, for `corpora.write_splits`."""
  sources = {
    'python': python_source(),
    'c_headers': c_headers(),
    'reference': reference_prose(),
    'licences': licences_and_metadata(),
    'unicode': unicode_names(),
  }
  return {
    name: (('all', text) for text in texts) for name, texts in sources.items()
  }
