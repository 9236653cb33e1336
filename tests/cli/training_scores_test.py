# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A suite of tasks is evaluated inside training, on parameters in shards."""

import json
import pathlib

from absl.testing import absltest
import optax
import yaml

import mergejax as mj
from mergejax import models
from mergejax import partition
from mergejax import training
from mergejax.cli import training_scores
from mergejax.evaluation import suite as suite_lib


class TrainingScoresTest(absltest.TestCase):
  def test_scores_are_those_of_the_suite(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    for split in ('train', 'validation', 'test'):
      (folder / f'{split}.tsv').write_text(
        'text\tlabel\n'
        + ''.join(f'{word} {split}\t{word[0]}\n' for word in ('ab', 'ba', 'aa'))
      )
    task = dict(files=str(folder), inputs='{text}', targets='{label}')
    task['metric'] = 'loss'
    suite = {
      'tasks': {'letters': task}, 'batch_size': 4,
      'lengths': {'inputs': 16, 'targets': 4},
    }  # fmt: skip
    (folder / 'suite.yaml').write_text(yaml.safe_dump(suite))
    module = models.build(
      dict(
        model_type='t5x', vocab_size=264, emb_dim=8, num_heads=2, head_dim=4,
        mlp_dim=8, num_encoder_layers=1, num_decoder_layers=1,
      )
    )  # fmt: skip
    suite = suite_lib.load(folder / 'suite.yaml')
    batches = suite.batches('letters', 'train') * 2
    seen = {}
    state = training.Trainer(
      module,
      optax.sgd(0.1),
      mesh=partition.make_mesh(data=4, model=2),
      rules=partition.fsdp(),
      callbacks=[
        training_scores.suite(
          folder / 'suite.yaml', every=2, keep_best='letters'
        ),
        training.callbacks.on_log(lambda at, m: seen.update({at: dict(m)})),
      ],
    ).fit(batches, steps=2, directory=folder / 'run')
    found = seen[2]['eval/letters']
    table = suite.table([('m', module, state.params)], 'validation')
    self.assertAlmostEqual(-found, table['m']['letters'].value, places=5)
    best = json.loads((folder / 'run' / 'best.json').read_text())
    self.assertAlmostEqual(best['score'], found, places=5)
    kept, params = mj.load_model(folder / 'run' / 'best')
    again = suite.table([('m', kept, params)], 'validation')
    self.assertAlmostEqual(-found, again['m']['letters'].value, places=5)


if __name__ == '__main__':
  absltest.main()
