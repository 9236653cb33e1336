# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax evaluate CKPT... --corpora DIR`: bits per byte by domain."""

from collections.abc import Sequence
import json
import pathlib
import tempfile

from mergejax import errors
from mergejax import models
from mergejax.data import corpora
from mergejax.data import features
from mergejax.data import tasks
from mergejax.evaluation import bits
from mergejax.evaluation import report
from mergejax.nn import lm
from mergejax.run import common


def main(arguments: Sequence[str]) -> None:
  """Prints a table of language models by domains of a corpora folder."""
  parser = common.parser('evaluate', 'Bits per byte on the test sets.')
  parser.add_argument('checkpoints', nargs='+')
  parser.add_argument('--corpora', required=True, help='one domain an entry')
  parser.add_argument('--vocabulary', default='bytes', help='or a .model file')
  parser.add_argument('--split', default='test', choices=corpora.SPLITS)
  parser.add_argument('--length', type=int, default=64, help='tokens a row')
  parser.add_argument('--batch_size', type=int, default=32)
  parser.add_argument(
    '--max_sequences', type=int, default=256, help='rows a domain'
  )
  parser.add_argument('--json', help='also write the table to this file')
  options = parser.parse_args(arguments)
  loaded = {}
  for path in options.checkpoints:
    loaded[path] = models.load_model(path)
    if not isinstance(loaded[path][0], lm.LanguageModel):
      raise errors.UserError(f'{path} is not a language model.')
  vocabulary = features.vocabulary(options.vocabulary)
  with tempfile.TemporaryDirectory() as folder:
    sizes = corpora.write_splits(
      corpora.read_folder(tasks.locate(options.corpora)), pathlib.Path(folder)
    )
    corpora.check_sizes(sizes, {options.split: 1})
    test_sets = bits.load_test_sets(
      tasks.add_corpora(folder, vocabulary),
      vocabulary,
      split=options.split,
      length=options.length,
      batch_size=options.batch_size,
      max_sequences=options.max_sequences,
    )
  table = {}
  for path, (module, params) in loaded.items():
    scorer = bits.make_scorer(module)
    table[path] = {
      domain: bits.score(scorer(params, test_set), test_set.num_bytes)
      for domain, test_set in test_sets.items()
    }
  print(report.to_text(table))
  if options.json:
    text = json.dumps(report.to_json(table), indent=2)
    pathlib.Path(options.json).write_text(text + '\n')
