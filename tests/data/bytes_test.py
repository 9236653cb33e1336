# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Bytes summed over rows are the UTF-8 bytes of the text."""

import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import seqio
import small_vocabularies

from mergejax.core import errors
from mergejax.data import features
from mergejax.data import splits
from mergejax.data import tasks
from mergejax.evaluation import expert_table
from mergejax.evaluation import suite as suite_lib

# White space in front, doubled, behind and alone; what NFKC changes (a
# ligature, a fraction, full width); characters that the pieces do not have.
TEXTS = [
  'the cat sat on the mat',
  '  the  cat   sat \n\n on the mat  ',
  'ﬁne ½ Ｆull',
  'naïve 日本語 \U0001f600 cat',
  'a',
  '',
  '   ',
  '\tthe\r\nmat\n',
  'the mat ' * 40,
]


class BytesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def text(self, vocabulary, texts=TEXTS):
    path = self.folder / 'text.jsonl'
    path.write_text(''.join(json.dumps({'text': t}) + '\n' for t in texts))
    return tasks.add_text_task(
      'counted', {'test': path}, vocabulary=vocabulary, by_content=True
    ).name

  def vocabulary(self, kind):
    if kind == 'bytes':
      return features.vocabulary()
    options = dict(byte_fallback=True, size=320) if kind == 'fallback' else {}
    return features.vocabulary(
      small_vocabularies.pieces(self.folder, **options)
    )

  @parameterized.product(
    kind=['bytes', 'pieces', 'fallback'], length=[1, 5, 64]
  )
  def test_rows_sum_to_the_bytes_of_the_text(self, kind, length):
    vocabulary = self.vocabulary(kind)
    batches = splits.batches(
      self.text(vocabulary), lengths={'targets': length}, batch_size=4,
      split='test',
    )  # fmt: skip
    total = sum(len(text.encode('utf-8')) for text in TEXTS)
    self.assertEqual(sum(batch['num_bytes'].sum() for batch in batches), total)
    # The tokens themselves are those of the vocabulary, each text ended.
    tokens = np.concatenate([b['decoder_target_tokens'] for b in batches])
    expected = sum((list(vocabulary.encode(t)) + [1] for t in TEXTS), [])
    np.testing.assert_array_equal(tokens[tokens > 0], expected)

  @parameterized.parameters('bytes', 'pieces')
  def test_a_token_has_its_own_bytes(self, kind):
    text = 'the cat  sat '
    vocabulary = self.vocabulary(kind)
    batches = splits.batches(
      self.text(vocabulary, [text, text]), lengths={'targets': 1},
      batch_size=64, split='test',
    )  # fmt: skip
    tokens = batches[0]['decoder_target_tokens'][:, 0]
    found = batches[0]['num_bytes'][tokens > 0]
    if kind == 'bytes':
      expected = [1] * len(text) + [0]
    else:
      # Without the space that SentencePiece puts in front; two spaces are one
      # in a piece, and the last one is in none.
      said = vocabulary.tokenizer.encode(text, out_type=str)
      ends = np.cumsum([len(piece) for piece in said]) - 1
      ends = ends + (ends > text.index('  '))
      expected = np.diff([0, *ends, len(text)])
    self.assertEqual(found.tolist(), [*expected, *expected])

  def test_bits_per_byte_do_not_depend_on_the_rows(self):
    vocabulary = self.vocabulary('pieces')
    total = sum(len(text.encode('utf-8')) for text in TEXTS)
    count = sum(len(vocabulary.encode(t)) + 1 for t in TEXTS)
    for length in (3, 17):
      suite = suite_lib.of_corpora(
        {'all': self.text(vocabulary)}, length=length, batch_size=4,
        max_sequences=10_000,
      )  # fmt: skip
      batches = suite.batches('all', 'test')
      mask = np.concatenate([b['decoder_target_tokens'] > 0 for b in batches])
      # Of a model that finds all of 64 tokens equally likely.
      found = expert_table.score(mask * np.log(1 / 64), batches)
      self.assertAlmostEqual(found.value, 6 * count / total)

  def test_a_vocabulary_that_does_not_tell_is_refused(self):
    name = self.text(seqio.ByteVocabulary())
    unknown = seqio.Task(
      'unknown_vocabulary',
      source=seqio.TaskRegistry.get(name).source,
      preprocessors=seqio.TaskRegistry.get(name).preprocessors,
      output_features={'targets': seqio.Feature(_Unknown(), add_eos=False)},
    )
    seqio.TaskRegistry.add_provider('unknown_vocabulary', unknown)
    self.addCleanup(seqio.TaskRegistry.remove, 'unknown_vocabulary')
    suite = suite_lib.load({'mixture': 'unknown_vocabulary'})
    with self.assertRaisesRegex(errors.UserError, "score 'loss'"):
      suite.batches('unknown_vocabulary', 'test')
    loss = suite_lib.load({'mixture': 'unknown_vocabulary', 'metric': 'loss'})
    self.assertNotEmpty(loss.batches('unknown_vocabulary', 'test'))


class _Unknown(seqio.PassThroughVocabulary):
  def __init__(self):
    super().__init__(300, eos_id=1)

  def _encode_tf(self, s):
    return seqio.ByteVocabulary().encode_tf(s)


if __name__ == '__main__':
  absltest.main()
