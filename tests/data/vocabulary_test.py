# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Vocabularies by name and file, and whose sentinels they have."""

import os
import pathlib

from absl.testing import absltest
import small_vocabularies

from mergejax.core import errors
from mergejax.data import features
from mergejax.data import noise


class VocabularyTest(absltest.TestCase):
  def test_bytes(self):
    vocabulary = features.vocabulary()
    self.assertEqual(vocabulary.vocab_size, 259)
    self.assertEqual(list(vocabulary.encode('A')), [ord('A') + 3])

  def test_sentence_piece(self):
    root = os.environ.get('MERGEJAX_DATA')
    if not root:
      self.skipTest('MERGEJAX_DATA is not set')
    vocabulary = features.vocabulary(
      pathlib.Path(root) / 'vocab/t5_cc_all_32000/sentencepiece.model'
    )
    self.assertEqual(vocabulary.vocab_size, 32100)
    ids = vocabulary.encode('Merge the models.')
    self.assertEqual(vocabulary.decode(ids), 'Merge the models.')

  def test_sentinels_that_a_model_has_are_its_sentinels(self):
    """As mT5's model, whose last pieces are `<extra_id_...>`."""
    folder = pathlib.Path(self.create_tempdir().full_path)
    path = small_vocabularies.pieces(folder)
    added = features.vocabulary(path, 5)
    self.assertEqual(features.vocabulary(path).extra_ids, 100)
    (folder / 'inside.model').write_bytes(added.sp_model)
    for asked in (None, 0, 5):
      inside = features.vocabulary(folder / 'inside.model', asked)
      self.assertEqual(inside.vocab_size, added.vocab_size)
      self.assertEqual(noise.num_sentinels(inside), 5)
    with self.assertRaisesRegex(errors.DataError, 'has 5 .* extra_ids=5, not'):
      features.vocabulary(folder / 'inside.model', 100)

  def test_a_file_that_is_no_model(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    for name, content in (('empty', b''), ('text', b'no model of pieces')):
      path = folder / f'{name}.model'
      path.write_bytes(content)
      with self.assertRaisesRegex(errors.DataError, 'is no SentencePiece'):
        features.vocabulary(path)


if __name__ == '__main__':
  absltest.main()
