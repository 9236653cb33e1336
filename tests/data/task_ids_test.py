# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Targets know their task, whatever is mixed and packed; losses by task."""

from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
import numpy as np
import seqio
import tensorflow as tf

from mergejax import models
from mergejax.core import errors
from mergejax.data import features
from mergejax.data import mixtures
from mergejax.data import stream
from mergejax.training import objective
from mergejax.training import transforms

TOKENS = {'ids_a': 10, 'ids_b': 20, 'ids_c': 30}
LENGTHS = {'inputs': 12, 'targets': 9}


def add(name):
  """Examples of 1 to 5 times the same token."""

  def rows(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    return tf.data.Dataset.range(1, 6).map(
      lambda size: {
        feature: tf.fill([size], tf.constant(TOKENS[name], tf.int32))
        for feature in ('inputs', 'targets')
      }
    )

  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(rows, splits=['train']),
    preprocessors=[],
    output_features=features.encoder_decoder(features.vocabulary()),
  )


class TaskIdsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    for name in TOKENS:
      add(name)
    inner = mixtures.add_mixture('ids_inner', {'ids_c': 1, 'ids_b': 2})
    mixtures.add_mixture('ids', {inner.name: 3, 'ids_a': 1, 'ids_b': 1})
    cls.enterClassContext(
      mock.patch.object(stream.identity, 'describe', lambda *_, **__: {})
    )

  @classmethod
  def tearDownClass(cls):
    for name in ('ids', 'ids_inner'):
      seqio.MixtureRegistry.remove(name)
    for name in TOKENS:
      seqio.TaskRegistry.remove(name)
    super().tearDownClass()

  def batches(self, kind, pack, count=2, **settings):
    lengths = LENGTHS if kind != 'lm' else {'targets': 9}
    opened = stream.SeqioStream(
      'ids', lengths=lengths, batch_size=4, kind=kind, pack=pack, seed=5,
      **settings,
    )  # fmt: skip
    return [next(opened) for _ in range(count)]

  @parameterized.parameters(('encoder_decoder', True), ('lm', False))
  def test_every_target_knows_its_task(self, kind, pack):
    plain = self.batches(kind, pack)
    told = self.batches(kind, pack, task_ids=True)
    seen = set()
    for before, after in zip(plain, told):
      ids = after.pop('decoder_task_ids')
      self.assertEqual(before.keys(), after.keys())
      for name, leaf in before.items():  # rows are what they were
        np.testing.assert_array_equal(after[name], leaf)
      np.testing.assert_array_equal(ids * 10, after['decoder_target_tokens'])
      seen |= set(ids.ravel().tolist())
    self.assertEqual(seen, {0, 1, 2, 3})

  @parameterized.parameters('encoder_decoder', 'lm')
  def test_every_row_knows_its_task(self, kind):
    plain = self.batches(kind, False)
    told = self.batches(
      kind, False, task_ids=True, row_ids=['task_ids', 'expert_ids']
    )
    seen = set()
    for before, after in zip(plain, told):
      ids = after.pop('task_ids')
      self.assertEqual((ids.dtype, ids.shape), (np.int32, (4,)))
      np.testing.assert_array_equal(after.pop('expert_ids'), ids)
      targets = after['decoder_target_tokens']
      np.testing.assert_array_equal((ids + 1) * 10, targets[:, 0])
      after.pop('decoder_task_ids')
      for name, leaf in before.items():
        np.testing.assert_array_equal(after[name], leaf)
      seen |= set(ids.tolist())
    self.assertEqual(seen, {0, 1, 2})
    with self.assertRaisesRegex(errors.ConfigError, 'pack=False'):
      self.batches(kind, True, row_ids=['task_ids'])

  def test_a_position_is_restored(self):
    settings = dict(lengths=LENGTHS, batch_size=4, kind='encoder_decoder',
                    task_ids=True)  # fmt: skip
    first = stream.SeqioStream('ids', **settings)
    next(first)
    saved, expected = first.state(), next(first)
    again = stream.SeqioStream('ids', **settings)
    again.restore(saved)
    for name, leaf in next(again).items():
      np.testing.assert_array_equal(leaf, expected[name])

  def test_prefix_lm_is_refused(self):
    with self.assertRaisesRegex(errors.ConfigError, 'leave per_task out'):
      self.batches('prefix_lm', True, task_ids=True)


class ByTaskTest(parameterized.TestCase):
  def example(self, rows=4, length=7, tasks=3, packed=True):
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 4, (rows, 2)) if packed else np.full((rows, 1), 5)
    ids, segments = np.zeros((2, rows, length), np.int32)
    for row in range(rows):
      start = 0
      for number, size in enumerate(sizes[row]):
        ids[row, start : start + size] = rng.integers(1, tasks + 1)
        segments[row, start : start + size] = number + 1
        start += size
    weights = (ids > 0).astype(np.float32)
    weights[1, 0] = 0  # of its example the second target is the first to count
    weights[0, 1] = 0  # within an example, or its end
    loss = rng.normal(size=ids.shape).astype(np.float32)
    loss[weights == 0] = np.nan
    outputs = models.Outputs(
      logits=jnp.zeros((*ids.shape, 2)), targets=jnp.asarray(ids),
      weights=jnp.asarray(weights),
      segments=jnp.asarray(segments) if packed else None,
    )  # fmt: skip
    return ids, segments, weights, loss, outputs

  @parameterized.parameters(True, False)
  def test_sums_are_those_by_hand(self, packed):
    ids, segments, weights, loss, outputs = self.example(packed=packed)
    found = objective.by_task({'decoder_task_ids': ids}, outputs, loss, 3)
    expected = np.zeros((3, 3))
    counted = set()
    for row, column in zip(*np.nonzero(weights)):
      task = ids[row, column] - 1
      expected[0, task] += loss[row, column]
      expected[1, task] += 1
      example = (row, segments[row, column])
      expected[2, task] += example not in counted
      counted.add(example)
    np.testing.assert_allclose(found, expected / weights.sum(), rtol=1e-5)

  def test_parts_add_up(self):
    ids, _, weights, loss, outputs = self.example()
    whole = objective.by_task({'decoder_task_ids': ids}, outputs, loss, 3)
    parts, tokens = [], []
    for rows in (slice(0, 1), slice(1, 4)):
      part = outputs._replace(
        targets=outputs.targets[rows], weights=outputs.weights[rows],
        segments=outputs.segments[rows],
      )  # fmt: skip
      parts.append(
        objective.by_task({'decoder_task_ids': ids[rows]}, part, loss[rows], 3)
      )
      tokens.append(weights[rows].sum())
    np.testing.assert_allclose(
      np.average(parts, axis=0, weights=tokens), whole, rtol=1e-5
    )

  def test_metrics_of_a_run(self):
    transform = transforms.task_metrics(['a', 'b'])
    extra = transform.init({})
    steps = [
      # Two examples of a; then one of b, whose loss is not finite; then of b.
      (np.array([[0.5, 0], [1, 0], [0.5, 0]]), 4.0),
      (np.array([[0, np.nan], [0, 1], [0, 1 / 3]]), 3.0),
      (np.array([[0, 6.0], [0, 1], [0, 0.2]]), 5.0),
    ]
    expected = [(0.5, 0, 2, 0), (0.5, 0, 2, 1), (0.5, 6.0, 2, 2)]
    names = ('loss/a', 'loss/b', 'examples/a', 'examples/b')
    for (shares, tokens), values in zip(steps, expected):
      metrics = {'tasks': jnp.float32(shares), 'tokens': jnp.float32(tokens)}
      extra, new, found = transform.update(extra, None, 'kept', metrics)
      self.assertEqual(new, 'kept')
      self.assertEqual(tuple(float(found[n]) for n in names), values)
      self.assertNotIn('tasks', found)

  def test_mistakes(self):
    *_, loss, outputs = self.example()
    with self.assertRaisesRegex(errors.DataError, 'task_ids=True'):
      objective.by_task({}, outputs, loss, 3)
    with self.assertRaisesRegex(
      errors.ConfigError, r'cross_entropy\(tasks=1\)'
    ):
      transform = transforms.task_metrics(['a'])
      transform.update(transform.init({}), None, None, {})
    shares = {'tasks': jnp.zeros((3, 1))}
    with self.assertRaisesRegex(errors.ConfigError, 'and `tokens`, the sum'):
      transform.update(transform.init({}), None, None, shares)


if __name__ == '__main__':
  absltest.main()
