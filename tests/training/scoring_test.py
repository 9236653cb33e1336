# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Evaluation inside training: what is asked, logged and kept."""

import json
import pathlib
import sys

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mergejax as mj
from mergejax import partition
from mergejax import training
from mergejax.core import errors
from mergejax.experts import branch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import small_runs  # noqa: E402

losses_of, mlp, pictures = (
  small_runs.losses_of,
  small_runs.mlp,
  small_runs.pictures,
)


class EvaluationTest(absltest.TestCase):
  def test_scores_and_the_best_model(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    rows, asked = [], []

    def score(params):
      asked.append(float(jnp.sum(params['head']['bias'])))
      return {
        'task': {2: 1.0, 4: 3.0, 5: 2.0}[
          2 + 2 * (len(asked) > 2) + (len(asked) > 4)
        ]
      }

    callback = training.evaluate(
      score, every=2, averages=['ema'], keep_best='mean'
    )
    log = training.callbacks.on_log(lambda s, m: rows.append((s, dict(m))))
    fit = lambda: training.Trainer(
      mlp(), optax.sgd(0.5), transforms=[training.ema(0.5)],
      callbacks=[callback, log, training.callbacks.jsonl()],
    ).fit(
      training.ArrayStream(pictures(), 8), steps=5, log_every=5,
      directory=folder,
    )  # fmt: skip
    fit()
    self.assertEqual([step for step, _ in rows], [2, 4, 5])
    self.assertEqual(rows[0][1], {'eval/task': 1.0, 'eval/ema/task': 1.0})
    self.assertIn('loss', rows[2][1])
    self.assertNotEqual(asked[0], asked[1])
    best = json.loads((folder / 'best.json').read_text())
    self.assertEqual(best, {'step': 4, 'metric': 'mean', 'score': 3.0})
    _, params = mj.load_model(folder / 'best')
    np.testing.assert_allclose(
      np.sum(params['head']['bias']), asked[2], rtol=1e-5
    )
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    self.assertEqual([json.loads(line)['step'] for line in lines], [2, 4, 5])

  def test_callbacks_of_two_runs_mix_nothing(self):
    scores = iter([5.0, 4.0, 3.0, float('nan'), 2.0])
    best = lambda name: training.evaluate(
      lambda _: {name: next(scores)}, every=1, keep_best=name
    )
    one, jsonl = best('a'), training.callbacks.jsonl()
    folders = [pathlib.Path(self.create_tempdir().full_path) for _ in range(2)]
    kept = lambda i: json.loads((folders[i] / 'best.json').read_text())
    fit = lambda folder, steps, *callbacks: losses_of(
      mlp(), steps, pictures(), directory=folder, callbacks=callbacks
    )
    for i, folder in enumerate(folders):
      fit(folder, 1, one, jsonl)
      self.assertEqual(kept(i)['score'], 5.0 - i)
      self.assertLen((folder / 'metrics.jsonl').read_text().splitlines(), 1)
    # The score of another task is no rival, and what is no number never best.
    fit(folders[0], 2, best('b'))
    self.assertEqual(kept(0), {'step': 2, 'metric': 'b', 'score': 3.0})
    other = self.create_tempdir().full_path
    fit(other, 2, best('a'))
    found = json.loads((pathlib.Path(other) / 'best.json').read_text())
    self.assertEqual(found, {'step': 2, 'metric': 'a', 'score': 2.0})

  def test_averages_of_experts_are_of_each(self):
    seen = []
    transforms = [training.ema(0.5), training.lawa(1, 2)]
    keep = lambda params: (
      seen.append(jax.tree.map(np.array, params)) or {'task': 0.0}
    )
    callback = training.evaluate(keep, every=2, averages=['ema', 'lawa'])
    settings = dict(
      experts='ab', mesh=partition.make_mesh(branch=2, data=4),
      transforms=transforms,
    )  # fmt: skip
    pairs = [pictures(8), pictures(8, 1)]
    batch = {name: np.stack([one[name] for one in pairs]) for name in pairs[0]}
    trainer = branch.BranchTrainer(
      mlp(), optax.sgd(0.2), callbacks=[callback], **settings
    )
    trainer.fit([batch] * 2, steps=2)
    for i, pair in enumerate(pairs):
      state = training.Trainer(
        mlp(), optax.sgd(0.2), transforms=transforms
      ).fit([pair] * 2, steps=2)
      for each, found in zip(transforms, seen[1:]):
        alone = each.averaged(state.extras[each.name], state.params)
        jax.tree.map(
          lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
          branch.unstack(found, i), alone,
        )  # fmt: skip
    best = training.evaluate(keep, every=1, keep_best='task')
    with self.assertRaisesRegex(errors.ConfigError, '2 experts side by side'):
      branch.BranchTrainer(
        mlp(), optax.sgd(0.2), callbacks=[best], **settings
      ).fit([batch], steps=1, directory=self.create_tempdir().full_path)

  def test_an_average_that_nobody_keeps(self):
    callback = training.evaluate(lambda p: {}, every=1, averages=['emma'])
    with self.assertRaisesRegex(errors.ConfigError, "'ema'"):
      losses_of(
        mlp(), 1, pictures(), callbacks=[callback],
        transforms=[training.ema(0.5)],
      )  # fmt: skip


if __name__ == '__main__':
  absltest.main()
