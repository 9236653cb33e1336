# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""One process of several that answer a task, are stopped, go on, and score it.

Usage: answering.py CHECKPOINT FOLDER ADDRESS PROCESSES INDEX
"""

import json
import os
import pathlib
import signal
import sys
from unittest import mock

from mergejax.cli import evaluate
from mergejax.cli import infer
from mergejax.cli import main as main_lib
from mergejax.core import resume
from mergejax.evaluation import suite

TASK = 'answering'
LENGTHS = {'inputs': 12, 'targets': 6}
MESH = {'data': 4, 'model': 2}
BATCH_SIZE = 4


def add_task():
  """A task of ten rows, registered."""
  import seqio
  import tensorflow as tf

  def rows(split, shuffle_files=False, seed=None):
    del split, shuffle_files, seed
    texts = [f'{word} {i}' for i in range(5) for word in ('good', 'bad')]
    return tf.data.Dataset.from_tensor_slices(
      {'inputs': texts, 'targets': ['a'] * len(texts)}
    )

  vocabulary = seqio.ByteVocabulary()
  return seqio.TaskRegistry.add(
    TASK,
    source=seqio.FunctionDataSource(rows, splits=('test',)),
    preprocessors=[
      seqio.preprocessors.tokenize, seqio.preprocessors.append_eos
    ],
    output_features={
      name: seqio.Feature(vocabulary) for name in ('inputs', 'targets')
    },
    metric_fns=[],
  )  # fmt: skip


def answer(checkpoint, folder):
  """Answers the task."""
  infer.infer_task(
    checkpoint=checkpoint, mixture_or_task=TASK, lengths=LENGTHS,
    output_dir=folder, batch_size=BATCH_SIZE, mesh=MESH,
    mode='predict_with_aux',
  )  # fmt: skip


def score(checkpoint, folder):
  """Scores the targets, into `scores.json`."""
  targets = suite.of_mixture(
    TASK, lengths=LENGTHS, metric='loss', max_examples=None,
    batch_size=BATCH_SIZE,
  )  # fmt: skip
  evaluate.evaluate_models(
    checkpoints=[checkpoint], suite=targets, mesh=MESH, output_dir=folder
  )


def main(checkpoint, folder, address, processes, index):
  add_task()
  append, batches = resume.Journal.append, []

  def stopped(self, row):
    append(self, row)
    batches.append(row)
    if int(index) == 1:  # the signal comes to one process only
      os.kill(os.getpid(), signal.SIGTERM)

  with mock.patch.object(resume.Journal, 'append', stopped):
    code = main_lib.main([
      'infer', '--gin_file=gin/runs/infer.gin', f'--gin.MIXTURE="{TASK}"',
      f'--gin.CHECKPOINT="{checkpoint}"', f'--gin.LENGTHS={LENGTHS}',
      f'--gin.OUTPUT_DIR="{folder}/answers"', f'--gin.MESH={MESH}',
      f'--gin.BATCH_SIZE={BATCH_SIZE}', '--gin.MODE="predict_with_aux"',
      f'--coordinator_address={address}', f'--process_count={processes}',
      f'--process_index={index}',
    ])  # fmt: skip
  there = [path.name for path in (pathlib.Path(folder) / 'answers').iterdir()]
  found = {'code': code, 'batches': len(batches), 'files': there}
  answer(checkpoint, pathlib.Path(folder) / 'answers')
  score(checkpoint, folder)
  print(json.dumps(found))


if __name__ == '__main__':
  main(*sys.argv[1:])
