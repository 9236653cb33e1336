# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A suite of one task with two answers, as files."""

import json
import pathlib


def write(folder: pathlib.Path, batch_size: int) -> pathlib.Path:
  """Writes `suite.yaml`, and its data below `task`; gives its path."""
  for split in ('train', 'validation', 'test'):
    answers = ('yes', 'no') * 6
    lines = [f'{split} {i}\t{said}' for i, said in enumerate(answers)]
    file = folder / 'task' / f'{split}.tsv'
    file.parent.mkdir(exist_ok=True)
    file.write_text('\n'.join(['text\tlabel', *lines]) + '\n')
  task = {
    'files': str(folder / 'task'), 'inputs': 'q {text}', 'targets': '{label}',
  }  # fmt: skip
  suite = folder / 'suite.yaml'
  suite.write_text(json.dumps({
    'lengths': {'inputs': 16, 'targets': 8}, 'batch_size': batch_size,
    'tasks': {'task': task},
  }))  # fmt: skip
  return suite
