# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Rows that count in part or not at all, and rows that hold several examples."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np

import mergejax as mj
from mergejax import models
from mergejax import statistics
from mergejax.core import errors
from mergejax.core import tree
from mergejax.merging.recipes import recipe as recipe_lib

LM = dict(
  model_type='lm', vocab_size=16, emb_dim=8, num_heads=2, head_dim=4,
  mlp_dim=8, num_layers=1,
)  # fmt: skip


def classifier():
  module = models.build(
    dict(model_type='mlp', hidden=(4,), image_shape=(2, 2, 1), classes=3)
  )
  return module, models.family_of(module).init(jax.random.key(0))


def images(weights):
  rng = np.random.default_rng(0)
  rows = len(weights)
  return {
    'images': rng.random((rows, 2, 2, 1), np.float32),
    'labels': rng.integers(0, 3, rows),
    'weights': np.asarray(weights, np.float32),
  }


class FractionsTest(parameterized.TestCase):
  @parameterized.parameters(
    ([1.0, 0.25, 0.0, 2.5],), ([0.125, 0.25, 0.0, 0.125],)
  )
  def test_gram(self, weights):
    module, params = classifier()
    batch = images(weights)
    found = statistics.collect(statistics.gram(), module, params, [batch])
    first = found['dense_0/kernel']
    # A network of this kind centres pixels by itself, or does not.
    rows = np.float64(batch['images'].reshape(4, 4))
    expected = (rows * np.array(weights)[:, None]).T @ rows / sum(weights)
    np.testing.assert_allclose(first['gram'], expected, rtol=1e-5)
    self.assertAlmostEqual(float(first['count']), sum(weights), places=6)

  @parameterized.parameters('exact', 'empirical')
  def test_fisher(self, estimator):
    module, params = classifier()
    weights = [1.0, 0.25, 0.0, 0.5]
    statistic = statistics.fisher(estimator=estimator)
    batch = images(weights)
    found = statistics.collect(statistic, module, params, [batch])
    each = [
      statistics.collect(
        statistic, module, params,
        [{n: x[i : i + 1] for n, x in images([1.0] * 4).items()}],
      )
      for i in range(4)
    ]  # fmt: skip
    for path, own in found.items():
      expected = sum(
        w * np.float64(one[path]['fisher']) for w, one in zip(weights, each)
      )
      np.testing.assert_allclose(
        own['fisher'], expected / sum(weights), rtol=1e-4, atol=1e-9
      )
      self.assertEqual(own['count'], sum(weights))

  def test_labels_that_a_model_does_not_have(self):
    """They are no gradient of zero, except where nothing is asked of them."""
    module, params = classifier()
    batch = images([1.0, 1.0, 0.0])
    batch['labels'] = np.array([0, 2, 9])
    statistic = statistics.fisher(estimator='empirical')
    statistics.collect(statistic, module, params, [batch])
    batch['labels'] = np.array([0, 3, 9])
    with self.assertRaisesRegex(errors.UserError, 'all of its tokens and lab'):
      statistics.collect(statistic, module, params, [batch])
    statistics.collect(statistics.fisher(), module, params, [batch])

  def test_nothing_real(self):
    module, params = classifier()
    for statistic in (statistics.gram(), statistics.fisher()):
      with self.assertRaisesRegex(errors.UserError, 'No batch had a real row'):
        statistics.collect(statistic, module, params, [images([0.0, 0.0])])

  def test_a_batch_that_does_not_tell_is_told(self):
    module, params = classifier()
    apply = lambda module, params, batch: module.apply(
      {'params': params}, batch['pixels'], mutable=['intermediates']
    )[1]
    batch = images([1.0, 0.5, 0.0])
    pixels = {'pixels': batch['images'], 'weights': batch['weights']}
    with self.assertNoLogs(level='WARNING'):
      known = statistics.collect(
        statistics.gram(apply=apply), module, params, [pixels]
      )
    again = statistics.collect(statistics.gram(), module, params, [batch])
    for path, own in known.items():
      np.testing.assert_allclose(own['gram'], again[path]['gram'], rtol=1e-6)
    del pixels['weights']
    with self.assertLogs(level='WARNING') as logged:
      statistics.collect(statistics.gram(apply=apply), module, params, [pixels])
    self.assertIn('A batch of pixels does not say', logged.output[0])


def packed(examples, per_row, length=7):
  """Rows of so many examples, by seqio's names."""
  rows = []
  for start in range(0, len(examples), per_row):
    row = {name: np.zeros(length, np.int32) for name in (
      'decoder_target_tokens', 'decoder_input_tokens', 'decoder_segment_ids',
      'decoder_positions', 'decoder_loss_weights',
    )}  # fmt: skip
    at = 0
    for number, tokens in enumerate(examples[start : start + per_row], 1):
      place = slice(at, at + len(tokens))
      row['decoder_target_tokens'][place] = tokens
      row['decoder_input_tokens'][place] = [0, *tokens[:-1]]
      row['decoder_segment_ids'][place] = number
      row['decoder_positions'][place] = range(len(tokens))
      row['decoder_loss_weights'][place] = 1
      at += len(tokens)
    rows.append(row)
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class PackedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.module = models.build(LM)
    rng = np.random.default_rng(0)
    self.params = jax.tree.map(
      lambda leaf: leaf + np.float32(0.3 * rng.normal(size=leaf.shape)),
      models.family_of(self.module).init(jax.random.key(0)),
    )
    self.examples = [rng.integers(2, 16, n) for n in (3, 1, 3, 4, 1)]

  def test_every_example_is_squared_by_itself(self):
    """Against gradients of one example at a time, without any packing."""

    def log_p(params, batch):
      given = jax.nn.log_softmax(
        models.family_of(self.module).logits(params, batch)
      )
      picked = batch['decoder_target_tokens'][..., None]
      real = (picked > 0).astype(given.dtype)
      return (jax.numpy.take_along_axis(given, picked, axis=2) * real).sum()

    gradient, expected = jax.jit(jax.grad(log_p)), {}
    for tokens in self.examples:
      alone = packed([tokens], 1)
      del alone['decoder_segment_ids']
      for path, leaf in tree.flatten(gradient(self.params, alone)).items():
        square = np.square(np.float64(leaf)) / len(self.examples)
        expected[path] = expected.get(path, 0.0) + square
    found = statistics.collect(
      statistics.fisher(estimator='empirical', microbatch=2),
      self.module, self.params, [packed(self.examples, 3)],
    )  # fmt: skip
    for path, own in found.items():
      self.assertEqual(own['count'], len(self.examples))
      np.testing.assert_allclose(
        own['fisher'], expected[path], rtol=2e-4, atol=1e-7, err_msg=path
      )

  def test_a_gram_does_not_see_packing(self):
    one, several = (
      statistics.collect(
        statistics.gram(), self.module, self.params, [packed(self.examples, n)]
      )
      for n in (1, 3)
    )
    for path, own in one.items():
      self.assertEqual(own['count'], several[path]['count'])
      np.testing.assert_allclose(
        own['gram'], several[path]['gram'], rtol=2e-4, atol=1e-6, err_msg=path
      )

  def test_what_packed_rows_cannot_give(self):
    batch = packed(self.examples, 3)
    encoder = {**batch, 'encoder_input_tokens': batch['decoder_target_tokens']}
    answers = models.family_class('t5x')(self.module)
    for estimator, given, model in (
      ('exact', batch, self.module),
      ('sampled', encoder, answers),
    ):
      with self.assertRaisesRegex(errors.UserError, 'decoder_segment_ids'):
        statistics.collect(
          statistics.fisher(estimator=estimator), model, self.params, [given]
        )


class GivenTest(absltest.TestCase):
  def test_an_unsymmetric_gram_is_refused(self):
    folder = self.create_tempdir().full_path
    kernels = [{'kernel': np.full((2, 1), k, np.float32)} for k in (1, 3)]
    whole = {'kernel': {'gram': np.eye(2, dtype=np.float32)}}
    skew = {'kernel': {'gram': np.array([[1, 0.5], [0, 1]], np.float32)}}
    for name, leaves in (
      ('a', kernels[0]), ('b', kernels[1]), ('whole', whole), ('skew', skew)
    ):  # fmt: skip
      mj.save_checkpoint(f'{folder}/{name}.safetensors', leaves)
    with self.assertRaisesRegex(errors.UserError, 'model 1 is not symmetric'):
      mj.merge(kernels, 'regmean', stats=[whole, skew])
    recipe = recipe_lib.parse_recipe(
      {
        'merge_method': 'regmean',
        'models': [f'{folder}/{name}.safetensors' for name in 'ab'],
        'stats': [f'{folder}/{n}.safetensors' for n in ('whole', 'skew')],
      }
    )
    with self.assertRaisesRegex(errors.UserError, 'skew.*is not symmetric'):
      mj.execute(mj.plan(recipe), f'{folder}/out')
    self.assertFalse(pathlib.Path(folder, 'out').exists())


if __name__ == '__main__':
  absltest.main()
