# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Corruption of text is T5's: its lengths, masks, sentinels and draws."""

import itertools

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import numpy as np
import seqio
import tensorflow as tf

from mergejax.core import errors
from mergejax.data import documents as documents_lib
from mergejax.data import features
from mergejax.data import noise
from mergejax.data import objectives

GOLDEN = goldens.load('t5_span_corruption')
VOCABULARY = seqio.ByteVocabulary(extra_ids=100)
FEATURES = features.encoder_decoder(VOCABULARY)


class _Numbers(seqio.PassThroughVocabulary):
  """Ids are tokens, as in the goldens: 128 of them, all 28 last sentinels."""

  def __init__(self):
    super().__init__(size=int(GOLDEN['vocab_size']) - 28, eos_id=1)

  @property
  def extra_ids(self):
    return 28


NUMBERS = features.encoder_decoder(_Numbers())


def documents(*tokens):
  dataset = tf.data.Dataset.from_generator(
    lambda: ({'targets': np.asarray(each, np.int32)} for each in tokens),
    output_signature={'targets': tf.TensorSpec([None], tf.int32)},
  )
  return dataset


def raw():
  names = sorted(name for name in GOLDEN if name.startswith('pipeline/raw/'))
  return documents(*(GOLDEN[name] for name in names))


def restored(inputs, targets, first_sentinel):
  """The text behind a corrupted row, spelled out token by token."""
  answers, open_span = {}, None
  for token in targets:
    if token >= first_sentinel:
      open_span = answers.setdefault(int(token), [])
    else:
      open_span.append(int(token))
  text = []
  for token in inputs:
    text += answers[int(token)] if token >= first_sentinel else [int(token)]
  return text


class NoiseTest(parameterized.TestCase):
  def test_lengths_are_t5s(self):
    for inputs, density, mean_span, raw_length, targets in GOLDEN[
      'spans_helper/table'
    ]:
      self.assertEqual(
        noise.fitting_lengths(int(inputs), density, mean_span),
        (raw_length, targets),
      )

  def test_counts_are_t5s(self):
    table = GOLDEN['spanmask/counts_d0.15_m3']
    self.assertEqual(table[:, 0].tolist(), list(range(2, 130)))
    for length, tokens, spans in table:
      found = [int(x) for x in noise.counts(int(length))]
      self.assertEqual(found, [tokens, spans], length)

  def test_masks_are_t5s(self):
    for i, row in enumerate(GOLDEN['spanmask/table']):
      length, density, mean_span = row[:3]
      seeds = tf.constant(row[3:7].astype(np.int32))
      mask = noise.spans_mask(
        int(length), density, [seeds[:2], seeds[2:]], mean_span=mean_span
      )
      np.testing.assert_array_equal(mask, GOLDEN[f'spanmask/{i}'])
    turned = noise.spans_mask(40, 0.15, [[1, 2], [3, 4]], random_roll=True)
    np.testing.assert_array_equal(turned, GOLDEN['spanmask/roll'])

  @parameterized.parameters(range(5))
  def test_sentinels_are_t5s(self, i):
    prefix = f'sentinel/{i}/'
    tokens, mask = GOLDEN[prefix + 'tokens'], GOLDEN[prefix + 'mask']
    for name, found in {
      'inputs': noise.with_sentinels(tokens, mask, _Numbers()),
      'targets': noise.with_sentinels(tokens, ~mask, _Numbers()),
      'drop_noise': noise.without(tokens, mask, _Numbers()),
      'drop_nonnoise': noise.without(tokens, ~mask, _Numbers()),
      'single_sentinel': noise.with_one_sentinel(tokens, mask, _Numbers()),
    }.items():
      np.testing.assert_array_equal(found, GOLDEN[prefix + name], name)

  def test_partitions_are_equally_likely(self):
    """Of 5 tokens in 3 parts there are 6, each one time in six."""
    seeds = np.random.default_rng(0).integers(0, 1 << 30, (1200, 2))
    parts = tf.map_fn(
      lambda seed: noise._parts(5, 3, seed),
      tf.constant(seeds, tf.int32), fn_output_signature=tf.int32,
    )  # fmt: skip
    found, times = np.unique(parts, axis=0, return_counts=True)
    self.assertLen(found, 6)
    self.assertTrue((found.sum(1) == 5).all() and found.min() == 1)
    self.assertLess(np.abs(times - 200).max(), 4 * np.sqrt(1200 * 5 / 36))

  @parameterized.parameters(0.15, 0.5)
  def test_mean_targets_are_those_of_all_masks(self, density):
    mean = 0
    for mask in itertools.product([False, True], repeat=7):
      noisy = sum(mask)
      runs = sum(not is_noise for is_noise, _ in itertools.groupby(mask))
      mean += density**noisy * (1 - density) ** (7 - noisy) * (noisy + runs)
    self.assertAlmostEqual(noise.mean_targets(7, density), mean)

  def test_sentinels_of_a_vocabulary(self):
    self.assertEqual(noise.num_sentinels(seqio.ByteVocabulary()), 0)
    self.assertEqual(noise.num_sentinels(VOCABULARY), 100)

    class Pieces(_Numbers):  # as mT5's model has them
      extra_ids = 0

      class tokenizer:
        id_to_piece = lambda i: f'▁<extra_id_{99 - i}>' if i > 92 else 'a'

    self.assertEqual(noise.num_sentinels(Pieces()), 7)


class ObjectivesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('span_corruption', 'span_corruption', 48, 16, dict(documents=None)),
    ('span_corruption_merge', 'span_corruption', 64, 16, {}),
    ('iid_denoising', 'independent_denoising', 64, 64, {}),
    ('prefix_lm', 'prefix_lm', 64, 64, {}),
  )
  def test_rows_are_t5s(self, golden, objective, inputs, targets, options):
    with seqio.map_seed_manager(42):
      dataset = objectives.OBJECTIVES[objective](
        raw(), {'inputs': inputs, 'targets': targets}, NUMBERS, **options
      )
    found = list(dataset.as_numpy_iterator())
    self.assertLen(found, int(GOLDEN[f'pipeline/{golden}/n']))
    for i, row in enumerate(found):
      for name in ('inputs', 'targets'):
        np.testing.assert_array_equal(
          row[name], GOLDEN[f'pipeline/{golden}/{i}/{name}'], f'{i} {name}'
        )

  @parameterized.parameters(0.15, 0.5, 0.7)
  def test_nothing_is_lost(self, density):
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 259, n).tolist() for n in (1, 2, 3, 40, 500, 77)]
    sizes = {'inputs': 64, 'targets': 400}
    dataset = objectives.span_corruption(
      documents(*texts), sizes, FEATURES, density=density, mean_span=4.0
    )
    first = VOCABULARY.vocab_size - 100
    text = []
    for row in dataset.as_numpy_iterator():
      self.assertLess(len(row['inputs']), 64)  # there is room for the end
      text += restored(row['inputs'], row['targets'], first)
    self.assertEqual(text, sum(texts, []))

  @parameterized.parameters(
    ('prefix_lm', 'up to 39 tokens.* room for 30'),
    ('independent_denoising', 'about 13 tokens.* room for 12'),
  )
  def test_targets_that_will_be_cut_are_told(self, name, message):
    room = int(message.split()[-1])
    make = lambda targets: objectives.OBJECTIVES[name](
      documents(range(40)), {'inputs': 40, 'targets': targets}, FEATURES
    )
    with self.assertLogs(level='WARNING') as logged:
      for _ in range(2):
        make(room)
    self.assertLen(logged.output, 1)
    self.assertRegex(logged.output[0], message)
    with self.assertNoLogs(level='WARNING'):
      make(39)

  def test_language_model_rows_are_the_text(self):
    texts = [list(range(3, 3 + n)) for n in (7, 30, 11)]
    dataset = objectives.language_model(
      documents(*texts), {'targets': 10}, features.language_model(VOCABULARY)
    )
    rows = [row['targets'].tolist() for row in dataset.as_numpy_iterator()]
    self.assertEqual([len(row) for row in rows], [10, 10, 10, 10, 8])
    self.assertEqual(sum(rows, []), sum(texts, []))

  def test_of_a_long_document_a_piece_is_taken(self):
    long = np.arange(documents_lib.PIECE * 2 + 5, dtype=np.int32)
    seen = set()
    for seed in range(12):
      with seqio.map_seed_manager(seed):
        dataset = documents_lib.random_piece(documents(long))
      (row,) = dataset.as_numpy_iterator()
      start = int(row['targets'][0])
      seen.add(start // documents_lib.PIECE)
      self.assertEqual(start % documents_lib.PIECE, 0)
      size = 5 if start == 2 * documents_lib.PIECE else documents_lib.PIECE
      np.testing.assert_array_equal(row['targets'], long[start:][:size])
    self.assertEqual(seen, {0, 1, 2})

  def test_mistakes_are_told_before_anything_is_read(self):
    def nothing():
      raise AssertionError('read')
      yield

    dataset = tf.data.Dataset.from_generator(
      nothing, output_signature={'targets': tf.TensorSpec([None], tf.int32)}
    )
    check = lambda pattern, name, lengths, vocab=FEATURES, **options: (
      self.assertRaisesRegex(
        errors.ConfigError, pattern, objectives.OBJECTIVES[name],
        dataset, lengths, vocab, **options,
      )
    )  # fmt: skip
    spans = 'span_corruption'
    t5 = {'inputs': 512, 'targets': 114}
    check(
      'has 114 targets.*there is room for 113', spans, {**t5, 'targets': 113}
    )
    check('targets, which is not given', spans, {'inputs': 512})
    check(
      'only .* are left to stand between them', spans,
      {'inputs': 64, 'targets': 5000}, density=0.9, mean_span=2.0,
    )  # fmt: skip
    check('a share between 0 and 1, not 1.5', spans, t5, density=1.5)
    check('1 token or more, not 0.5', spans, t5, mean_span=0.5)
    few = features.encoder_decoder(seqio.ByteVocabulary(extra_ids=27))
    check(r'up to 28 spans .* has 27 sentinels', spans, t5, few)
    none = features.encoder_decoder(seqio.ByteVocabulary())
    check('has 0 sentinels', 'independent_denoising', t5, none)
    check('no room for text', 'prefix_lm', {'inputs': 2, 'targets': 2})


if __name__ == '__main__':
  absltest.main()
