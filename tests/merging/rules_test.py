# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Rules by path, and what RegMean and Fisher do with odd statistics."""

from absl.testing import absltest
import jax
import numpy as np

import mergejax as mj
from mergejax.core import errors


def models_and_grams(seed=0, rows=(40, 10)):
  rng = np.random.default_rng(seed)
  models, grams = [], []
  for count in rows:
    models.append({
      'a': {'kernel': rng.normal(size=(4, 3)).astype(np.float32)},
      'b': {'kernel': rng.normal(size=(4, 3)).astype(np.float32)},
      'scale': rng.normal(size=3).astype(np.float32),
    })  # fmt: skip
    own = {}
    for path in ('a/kernel', 'b/kernel'):
      x = rng.normal(size=(count, 4)).astype(np.float32)
      own[path] = {'gram': x.T @ x / count, 'count': np.float64(count)}
    grams.append(own)
  return models, grams


def solved(path, models, grams, by):
  gram = lambda own: np.asarray(own[path]['gram'], np.float64)
  left = sum(w * gram(own) for w, own in zip(by, grams))
  right = sum(
    w * gram(own) @ model[path[0]]['kernel']
    for w, own, model in zip(by, grams, models)
  )
  return np.linalg.solve(left, right)


class RulesTest(absltest.TestCase):
  def test_other_methods_by_path(self):
    models, grams = models_and_grams()
    base = jax.tree.map(np.zeros_like, models[0])
    merged = mj.merge(
      models, 'regmean', stats=grams, base=base, alpha=1.0,
      rules=[('b/.*', 'linear'), ('scale', 'copy')],
    )  # fmt: skip
    np.testing.assert_allclose(
      merged['a']['kernel'], solved('a/kernel', models, grams, [1, 1]),
      rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    mean = (models[0]['b']['kernel'] + models[1]['b']['kernel']) / 2
    np.testing.assert_allclose(merged['b']['kernel'], mean, rtol=1e-6)
    np.testing.assert_array_equal(merged['scale'], base['scale'])

  def test_another_alpha_by_path(self):
    models, grams = models_and_grams()
    merged = mj.merge(
      models, 'regmean', stats=grams, alpha=1.0,
      rules=[('b/.*', mj.regmean(alpha=0.0))],
    )  # fmt: skip
    diagonal = [
      {p: {'gram': np.diag(np.diag(s['gram']))} for p, s in own.items()}
      for own in grams
    ]
    np.testing.assert_allclose(
      merged['b']['kernel'], solved('b/kernel', models, diagonal, [1, 1]),
      rtol=1e-4, atol=1e-5,
    )  # fmt: skip

  def test_rules_of_one_method_are_one_model_to_it(self):
    rng = np.random.default_rng(0)
    base, *models = [
      {name: rng.normal(size=50).astype(np.float32) * scale
       for name, scale in (('a', 1.0), ('b', 9.0), ('c', 1.0))}
      for _ in range(3)
    ]  # fmt: skip
    merge = lambda *rules: mj.merge(models, 'linear', base=base, rules=rules)
    joint = merge(('a|b', 'ties'))
    method = mj.ties()
    for found in (
      merge(('a', 'ties'), ('b', 'ties')), merge(('a', method), ('b', method))
    ):  # fmt: skip
      jax.tree.map(np.testing.assert_array_equal, found, joint)
    apart = merge(('a', mj.ties()), ('b', mj.ties()))
    self.assertFalse(np.array_equal(apart['a'], joint['a']))

  def test_bad_rules(self):
    models, _ = models_and_grams()
    with self.assertRaisesRegex(errors.UserError, 'first match of no leaf'):
      mj.merge(models, 'linear', rules=[('nothing', 'copy')])
    with self.assertRaisesRegex(errors.UserError, "'linear'"):
      mj.merge(models, 'linear', rules=[('a/.*', 'liner')])
    for more in ({'rules': [('(', 'copy')]}, {'axes': [('(', ('embed',))]}):
      with self.assertRaisesRegex(
        errors.ConfigError, "rule '\\(' is not a reg"
      ):
        mj.merge(models, 'linear', **more)


class StatisticsTest(absltest.TestCase):
  def test_weighting_by_tokens(self):
    models, grams = models_and_grams()
    merged = mj.merge(
      models, 'regmean', stats=grams, alpha=1.0, weighting='tokens'
    )
    np.testing.assert_allclose(
      merged['a']['kernel'], solved('a/kernel', models, grams, [40, 10]),
      rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    bare = [{p: {'gram': s['gram']} for p, s in own.items()} for own in grams]
    with self.assertRaisesRegex(errors.UserError, 'lacks its count'):
      mj.merge(models, 'regmean', stats=bare, weighting='tokens')

  def test_weights_that_cancel(self):
    models, grams = models_and_grams()
    with self.assertRaisesRegex(errors.UserError, 'sum to zero'):
      mj.merge(models, 'regmean', stats=grams, weights=[1.0, -1.0])

  def test_fewer_rows_than_features(self):
    models, grams = models_and_grams(rows=(1, 2))
    with self.assertRaisesRegex(errors.UserError, 'lower alpha'):
      mj.merge(models, 'regmean', stats=grams, alpha=1.0)
    mj.merge(models, 'regmean', stats=grams, alpha=0.9)
    merged = mj.merge(models, 'regmean', stats=grams, alpha=1.0, ridge=0.1)
    self.assertTrue(np.isfinite(merged['a']['kernel']).all())

  def test_a_copied_leaf_need_not_agree(self):
    body = [np.full((2, 2), k, np.float32) for k in (1, 3, 8)]
    heads = [np.ones((2, n), np.float32) for n in (3, 5)]
    models = [{'body': b, 'head': h} for b, h in zip(body, heads)]
    models.append({'body': body[2]})
    for given, base, head in (
      (models, None, heads[0]),
      (models[1:], models[0], heads[0]),
      (models[2:], models[1], heads[1]),
    ):
      merged = mj.merge(given, 'linear', base=base, rules=[('head', 'copy')])
      mean = np.mean([model['body'] for model in given], axis=0)
      np.testing.assert_allclose(merged['body'], mean)
      np.testing.assert_array_equal(merged['head'], head)
    with self.assertRaises(errors.UserError) as raised:
      mj.merge(models[:2], 'linear')
    for part in ('head [2, 3]', "rules=[('PATH', 'copy')]"):
      self.assertIn(part, raised.exception.message)
    with self.assertRaisesRegex(errors.UserError, 'body'):
      mj.merge([models[0], {**models[1], 'body': heads[1]}], 'linear',
               rules=[('head', 'copy')])  # fmt: skip

  def test_a_warning_where_digits_are_lost(self):
    models, grams = models_and_grams()
    skewed = np.diag(np.float32([1, 1, 1, 1e-7]))
    for own in grams:
      own['a/kernel']['gram'] = skewed
    with self.assertLogs(level='WARNING') as logs:
      mj.merge(models, 'regmean', stats=grams, alpha=1.0)
    self.assertIn('a/kernel: the summed Gram matrix', logs.output[0])

  def test_statistics_that_cannot_be(self):
    models, grams = models_and_grams()
    for path, gram, message in (
      ('a/kernel', np.eye(3, dtype=np.float32), 'does not fit'),
      ('a/kernel', -np.eye(4, dtype=np.float32), 'negative'),
      ('c/kernel', np.eye(4, dtype=np.float32), 'no model has'),
    ):
      wrong = {**grams[0], path: {'gram': gram}}
      with self.assertRaisesRegex(errors.UserError, message):
        mj.merge(models, 'regmean', stats=[wrong, grams[1]])
    lacking = {p: s for p, s in grams[0].items() if p != 'a/kernel'}
    with self.assertRaisesRegex(errors.UserError, 'lacks its gram'):
      mj.merge(models, 'regmean', stats=[lacking, grams[1]])


if __name__ == '__main__':
  absltest.main()
