# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""T-Few's losses and rank classification, against its own numbers."""

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import jax
import numpy as np
import optax
import small_adapted

import mergejax as mj
from mergejax.core import errors
from mergejax.core import tree
from mergejax.experts import branch
from mergejax.training import choices

CLOSE = dict(rtol=1e-4, atol=2e-5)
T_FEW = ((r'.*/(key|value|wi_1)/kernel', 'outputs'),)
SETTINGS = {
  'loss_all': dict(),
  'loss_nolengthnorm': dict(length_norm=0.0),
  'loss_ln_half': dict(mc_loss=0.5, unlikely_loss=2.0, length_norm=0.5),
}
LOSSES = ('lm_loss', 'mc_loss', 'unlikely_loss', 'loss')


class GoldenTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.arrays = goldens.load('tfew_losses')
    family, base = small_adapted.of_golden(cls.arrays, tied=False)
    cls.family = mj.adapters.adapt(family, mj.adapters.ia3(rules=T_FEW))
    leaves = small_adapted.scales_of_golden(
      cls.arrays, 'ia3/', suffix='.multi_lora_b'
    )
    cls.params = cls.family.joined(base, leaves)
    tokens = cls.arrays['answer_choices_ids']
    cls.batch = choices.batch_of(
      cls.arrays['input_ids'],
      [[each[each > 0] for each in row] for row in tokens],
      cls.arrays['labels'],
    )
    np.testing.assert_array_equal(cls.batch['choice_tokens'], tokens)
    clean = choices.t_few()
    cls.metrics = staticmethod(
      jax.jit(lambda p, b: dict(clean(cls.family, p, b, {})[1].metrics))
    )
    cls.rank = staticmethod(
      jax.jit(lambda p, b: choices.rank(cls.family, p, b))
    )

  def test_losses_and_gradients(self):
    def every(params):
      found = {}
      for name, settings in SETTINGS.items():
        objective = choices.t_few(reference_compat=True, **settings)
        _, outputs = objective(self.family, params, self.batch, {})
        found[name] = dict(outputs.metrics)
      return found['loss_all']['loss'], found

    grads, found = jax.jit(jax.grad(every, has_aux=True))(self.params)
    for name in SETTINGS:
      for loss in LOSSES:
        np.testing.assert_allclose(
          found[name][loss], self.arrays[f'{name}/{loss}'], **CLOSE
        )
    given = small_adapted.scales_of_golden(
      self.arrays, 'grad_all/', suffix='.multi_lora_b'
    )
    grads = tree.flatten(grads)
    given = tree.flatten(given)
    self.assertLen(given, 3)
    for path, expected in given.items():
      np.testing.assert_allclose(grads[path], expected, **CLOSE)
    base = [p for p in grads if p not in self.family.adapter_specs]
    self.assertFalse(any(np.any(grads[path]) for path in base))

  def test_ranking(self):
    arrays = self.arrays
    found = self.rank(self.params, self.batch)
    np.testing.assert_allclose(found.scores, arrays['choice_nll_mean'], **CLOSE)
    np.testing.assert_array_equal(found.prediction, arrays['rank/prediction'])
    np.testing.assert_allclose(
      found.gold, arrays['rank/score_of_gold'], **CLOSE
    )
    np.testing.assert_allclose(
      found.best_wrong, arrays['rank/best_wrong_score'], **CLOSE
    )

  def test_ranking_does_not_see_order_padding_or_parts(self):
    scores = np.asarray(self.rank(self.params, self.batch).scores)
    order = [2, 0, 1]
    tokens, mask = self.batch['choice_tokens'], self.batch['choice_mask']
    # More padding, and a choice that is none, in front of the permuted ones.
    wider = np.pad(tokens[:, order], ((0, 0), (1, 0), (0, 2)))
    masked = np.pad(mask[:, order], ((0, 0), (1, 0)))
    changed = {
      **self.batch, 'choice_tokens': wider, 'choice_mask': masked,
      'labels': np.int32([order.index(x) + 1 for x in self.batch['labels']]),
    }  # fmt: skip
    halves = jax.jit(lambda p, b: choices.rank(self.family, p, b, parts=2))
    found = halves(self.params, changed)
    np.testing.assert_allclose(
      found.scores[:, 1:], scores[:, order], rtol=1e-5, atol=1e-5
    )
    self.assertTrue(np.isinf(found.scores[:, 0]).all())
    np.testing.assert_array_equal(
      np.take(order, found.prediction - 1), scores.argmin(1)
    )
    found = self.metrics(self.params, changed)
    for name, expected in self.metrics(self.params, self.batch).items():
      np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5)

  def test_clean_losses_by_hand(self):
    # From the golden's own logits, choice by choice, in float64.
    logits = np.float64(self.arrays['choice_logits'])
    tokens, labels = self.arrays['answer_choices_ids'], self.arrays['labels']
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    gold, wrong, rows = [], [], []
    for i, k in np.ndindex(tokens.shape[:2]):
      for t in range(tokens.shape[2]):
        if tokens[i, k, t]:
          nats = -log_p[i, k, t, tokens[i, k, t]]
          if k == labels[i]:
            gold.append(nats)
          else:
            wrong.append(-np.log(1.01 - np.exp(-nats)))
    for i in range(len(tokens)):
      scores = []
      for k in range(tokens.shape[1]):
        own = [t for t in range(tokens.shape[2]) if tokens[i, k, t]]
        nats = [-log_p[i, k, t, tokens[i, k, t]] for t in own]
        scores.append(np.mean(nats))
      rows.append(scores[labels[i]] + np.log(np.exp(-np.array(scores)).sum()))
    found = self.metrics(self.params, self.batch)
    for name, expected in (
      ('lm_loss', gold), ('mc_loss', rows), ('unlikely_loss', wrong),
    ):  # fmt: skip
      np.testing.assert_allclose(found[name], np.mean(expected), **CLOSE)

  def test_padding_rows_do_not_count(self):
    more = jax.tree.map(
      lambda x: np.concatenate([x, np.zeros_like(x[:2])]), self.batch
    )
    loss = lambda p: choices.t_few()(self.family, p, more, {})[0]
    value, grads = jax.jit(jax.value_and_grad(loss))(self.params)
    expected = self.metrics(self.params, self.batch)['loss']
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for path, leaf in tree.flatten(grads).items():
      self.assertTrue(np.isfinite(leaf).all(), path)
      self.assertEqual(np.any(leaf), path in self.family.adapter_specs, path)
    score = mj.evaluation.rank_evaluator(self.family, {'t': [more]}).compiled()
    right = np.mean(self.arrays['rank/prediction'] == self.arrays['labels'])
    self.assertAlmostEqual(score(self.params)['t'], right)

  def test_batches_of_several_sizes_are_ranked_together(self):
    parts = []
    for rows, more in ((slice(0, 3), 2), (slice(3, 4), 0)):
      part = {name: x[rows] for name, x in self.batch.items()}
      tokens = np.pad(part['choice_tokens'], ((0, 0), (0, 0), (0, more)))
      parts.append({**part, 'choice_tokens': tokens})
    del parts[1]['choice_mask']
    score = mj.evaluation.rank_evaluator(self.family, {'t': parts}).compiled()
    right = np.mean(self.arrays['rank/prediction'] == self.arrays['labels'])
    self.assertAlmostEqual(score(self.params)['t'], right)
    for wrong, message in (
      ([{**self.batch, 'choice_mask': self.batch['choice_mask'] & False}],
       'no row with choices'),
      ([self.batch, {**self.batch, 'more': self.batch['labels']}], 'more'),
    ):  # fmt: skip
      with self.assertRaisesRegex(errors.DataError, message):
        mj.evaluation.rank_evaluator(self.family, {'t': wrong})

  def test_batches_of_experts_are_checked(self):
    trainer = branch.BranchTrainer(
      self.family, optax.sgd(0.1), experts=['a', 'b'], objective=choices.t_few(),
      mesh=mj.make_mesh(branch=2, devices=jax.devices()[:2]),
    )  # fmt: skip
    both = {n: np.stack([x, x]) for n, x in self.batch.items()}
    trainer.placer()(both)
    both['labels'][1, 2] = 3
    with self.assertRaisesRegex(errors.DataError, 'row 2 of .*expert 1.* is 3'):
      trainer.placer()(both)

  def test_trains_and_evaluates(self):
    trainer = mj.training.Trainer(
      self.family, optax.sgd(0.05), objective=mj.training.t_few(),
      mesh=mj.make_mesh(data=4, devices=jax.devices()[:4]),
    )  # fmt: skip
    state = trainer.fit([self.batch] * 4, steps=4, params=self.params)
    loss = lambda params: float(self.metrics(params, self.batch)['loss'])
    self.assertLess(loss(state.params), loss(self.params))

  @parameterized.parameters(
    (dict(labels=np.int32([0, 1, 3, 0])), 'row 2 of the data is 3'),
    (dict(labels=np.int32([0, -1, 2, 0])), 'row 1 of the data is -1'),
    (dict(choice_mask=None, choice_tokens=None), 'not choice_tokens'),
    (dict(choice_tokens='empty'), 'Choice 1 of row 2 .* no token'),
    (dict(choice_tokens='large'), 'the number 99, but the model knows 0 to 39'),
    (dict(choice_tokens='negative'), 'the number -5'),
    (dict(labels=np.int32([0, 1])), 'labels 2'),
    (dict(choice_mask='gold'), 'has 2 choices'),
  )
  def test_mistakes_of_data(self, changes, message):
    batch = dict(self.batch)
    for name, value in changes.items():
      if isinstance(value, str):
        array = batch[name].copy()
        if value == 'gold':
          array[1, batch['labels'][1]] = False
        else:
          array[2, 1] = {'empty': 0, 'large': 99, 'negative': -5}[value]
        value = array
      batch[name] = value
      if value is None:
        del batch[name]
    trainer = mj.training.Trainer(
      self.family, optax.sgd(0.1), objective=choices.t_few()
    )
    with self.assertRaisesRegex(errors.DataError, message):
      trainer.placer()(batch)

  def test_mistakes_of_rows(self):
    for inputs, labels in ((2, [0]), (3, [0, 0])):
      with self.assertRaisesRegex(errors.DataError, 'choice_tokens 2'):
        choices.batch_of(np.ones((inputs, 3), np.int32), [[[5, 1]]] * 2, labels)

  def test_mistakes_of_settings(self):
    with self.assertRaisesRegex(errors.ConfigError, 'mc_loss must be'):
      choices.t_few(mc_loss=-1)
    family, base = small_adapted.build('lm')
    with self.assertRaisesRegex(errors.ConfigError, 'need an encoder-decoder'):
      choices.rank(family, base, self.batch)


if __name__ == '__main__':
  absltest.main()
