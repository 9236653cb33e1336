# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Commands on a suite of inputs and targets read both, of any kind of model.

A decoder-only model has the inputs before its targets; one that is given the
targets alone looks well and measures something else.
"""

import json
import pathlib

from absl.testing import absltest
import drawn
import jax
import numpy as np
import small_suite

import mergejax as mj
from mergejax import models
from mergejax.cli import main as main_lib
from mergejax.evaluation import suite as suite_lib
from mergejax.select import ranking

CONFIG = dict(
  emb_dim=8, vocab_size=384, num_layers=1, num_heads=2, head_dim=4, mlp_dim=8
)


class DecoderOnlyTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.suite = small_suite.write(self.folder, batch_size=8)
    self.module = models.build({'model_type': 'lm', **CONFIG})
    family = models.family_of(self.module)
    self.params = drawn.params(family)
    self.path = str(self.folder / 'model')
    mj.save_checkpoint(
      self.path, self.params, config=models.describe(self.module)
    )
    self.batches = suite_lib.load(self.suite).batches(
      'task', 'train', kind='prefix_lm'
    )

  def run_command(self, *arguments, code=0):
    suite = ['--suite', str(self.suite)]
    self.assertEqual(main_lib.main([*map(str, arguments), *suite]), code)

  def test_statistics(self):
    for kind, statistic in (
      ('gram', mj.stats.gram()),
      ('fisher', mj.stats.fisher(estimator='sampled')),
    ):
      out = self.folder / kind
      self.run_command('stats', kind, self.path, out)
      wanted = mj.stats.collect(
        statistic, self.module, self.params, self.batches
      )
      found = mj.stats.load(out)
      self.assertCountEqual(found, wanted)
      for path, own in wanted.items():
        for name, leaf in own.items():
          np.testing.assert_array_equal(found[path][name], leaf, path)

  def test_rank(self):
    for score in ('logme', 'leep'):
      out = self.folder / f'{score}.json'
      self.run_command('rank', self.path, '--score', score, '--json', out)
      wanted = ranking.rank(
        [('model', self.module, self.params)], {'task': self.batches},
        score=score,
      )  # fmt: skip
      found = json.loads(out.read_text())[self.path]['task']
      self.assertAlmostEqual(found, wanted['model']['task'], places=5)

  def test_classes_and_answers_are_those_after_the_prompt(self):
    classes = ranking.classes_of(self.batches, self.module)
    # The order of tokens: 'no' before 'yes'.
    np.testing.assert_array_equal(classes, [1, 0] * 6)
    given = ranking.source_probabilities(self.module, self.params, self.batches)
    family = models.family_of(self.module)
    rows = []
    for batch in self.batches:
      said = np.asarray(batch['decoder_loss_weights']) > 0
      logits = np.asarray(jax.jit(family.logits)(self.params, batch))
      rows += [
        logits[i, np.flatnonzero(own)[0]]
        for i, own in enumerate(said)
        if own.any()
      ]
    np.testing.assert_allclose(given, jax.nn.softmax(np.stack(rows)), rtol=1e-5)

  def test_rank_keeps_kinds_apart(self):
    module = models.build({'model_type': 't5x', 'num_encoder_layers': 1,
                           'num_decoder_layers': 1, **{
      k: v for k, v in CONFIG.items() if k != 'num_layers'}})  # fmt: skip
    other = self.folder / 't5'
    params = drawn.params(models.family_of(module), 1)
    mj.save_checkpoint(other, params, config=models.describe(module))
    self.run_command('rank', self.path, other, code=2)


if __name__ == '__main__':
  absltest.main()
