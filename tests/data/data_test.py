# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Local text to token streams: no leaks, exact order, exact position."""

import json
import os
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import numpy as np
import seqio

from mergejax.core import errors
from mergejax.data import corpora
from mergejax.data import features
from mergejax.data import machine_text
from mergejax.data import mixtures
from mergejax.data import splits
from mergejax.data import stream
from mergejax.data import tasks


def sentences(count, seed=0):
  rng = np.random.default_rng(seed)
  return [
    f'document {i} of {seed}: ' + 'word ' * int(rng.integers(5, 60))
    for i in range(count)
  ]


def write_corpora(folder, domains=('one', 'two'), count=60):
  folder = pathlib.Path(folder)
  corpora.write_splits(
    {
      d: (('all', t) for t in sentences(count, seed=i))
      for i, d in enumerate(domains)
    },
    folder,
  )
  return folder


def documents_of(folder, domain):
  return {
    split: [
      json.loads(line)['text']
      for line in (folder / domain / f'{split}.jsonl').read_text().splitlines()
    ]
    for split in corpora.SPLITS
  }


class CorporaTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def test_splits_are_by_document_and_disjoint(self):
    texts = sentences(200)
    labelled = [('all', t) for t in texts + texts[:50]]
    labelled += [('all', texts[0].upper().replace(' ', '  '))]
    found = list(corpora.split_documents(labelled, set()))
    self.assertCountEqual([t for _, t in found], texts)
    share = sum(len(t) for s, t in found if s == 'test') / sum(map(len, texts))
    self.assertBetween(share, corpora.HELD_OUT, corpora.HELD_OUT + 0.03)

  def test_a_long_document_leaves_the_other_splits_theirs(self):
    for letter in 'abcdefghij':  # it is in another place each time
      texts = [*sentences(60), letter * 2000]
      found = list(corpora.split_documents([('all', t) for t in texts], set()))
      self.assertCountEqual([t for _, t in found], texts)
      by_split = {
        s: [t for split, t in found if split == s] for s in corpora.SPLITS
      }
      quota = corpora.HELD_OUT * sum(map(len, texts))
      for split in ('test', 'validation'):
        # The last document of a split is the one that fills it.
        sizes = [len(text) for text in by_split[split]]
        self.assertGreaterEqual(sum(sizes), quota)
        self.assertLess(sum(sizes[:-1]), quota)

  @parameterized.parameters('train', 'all')
  def test_a_limit_keeps_a_random_part(self, label):
    """Of a file that is sorted, not its head."""
    texts = [f'{"ab"[i // 100] * 20} {i:03}' for i in range(200)]
    kept = []
    for order in (texts, texts[::-1]):
      sizes = corpora.write_splits(
        {'d': [(label, text) for text in order]}, self.folder,
        max_train_bytes=50 * 24 + 23,
      )  # fmt: skip
      self.assertEqual(sizes['d']['train'], 50 * 24)
      found = documents_of(self.folder, 'd')['train']
      self.assertEqual(sum(map(len, found)), 50 * 24)
      kept.append(found)
    self.assertCountEqual(*kept)
    self.assertBetween(sum(t[0] == 'a' for t in kept[0]), 12, 38)
    self.assertCountEqual(
      (self.folder / 'd').iterdir(),
      [self.folder / 'd' / f'{split}.jsonl' for split in corpora.SPLITS],
    )

  def test_splits_do_not_depend_on_the_order_of_files(self):
    labelled = [('all', t) for t in sentences(50)]
    forward = set(corpora.split_documents(labelled, set()))
    self.assertEqual(
      forward, set(corpora.split_documents(labelled[::-1], set()))
    )

  def test_nothing_of_test_is_trained_on(self):
    for split in corpora.SPLITS:
      lines = sentences(5, seed=len(split)) + ['the very same text everywhere']
      rows = [json.dumps({'text': text}) for text in lines]
      (self.folder / 'in' / 'news').mkdir(parents=True, exist_ok=True)
      (self.folder / 'in' / 'news' / f'{split}.jsonl').write_text(
        '\n'.join(rows)
      )
    out = self.folder / 'out'
    corpora.write_splits(corpora.read_folder(self.folder / 'in'), out)
    found = documents_of(out, 'news')
    self.assertIn('the very same text everywhere', found['test'])
    self.assertNotIn('the very same text everywhere', found['train'])
    self.assertLen(found['train'], 5)

  def test_a_domain_is_a_file_or_a_folder(self):
    (self.folder / 'prose').mkdir()
    for i, text in enumerate(sentences(12)):
      (self.folder / 'prose' / f'{i}.txt').write_text(text)
    rows = [json.dumps({'text': t}) for t in sentences(12, seed=1)]
    (self.folder / 'rows.jsonl').write_text('\n'.join(rows))
    domains = corpora.read_folder(self.folder)
    self.assertEqual({d: len(list(t)) for d, t in domains.items()},
                     {'prose': 12, 'rows': 12})  # fmt: skip

  def test_mistakes(self):
    with self.assertRaisesRegex(errors.UserError, 'does not exist'):
      corpora.find_domains(self.folder / 'nothing')
    with self.assertRaisesRegex(errors.UserError, 'is empty'):
      corpora.find_domains(self.folder)
    (self.folder / 'bad.jsonl').write_text('{"txt": 1}\n')
    with self.assertRaisesRegex(errors.UserError, 'bad.jsonl, line 1'):
      list(corpora.read_folder(self.folder)['bad'])
    sizes = {'poetry': {'train': 10, 'validation': 1, 'test': 100}}
    with self.assertRaisesRegex(errors.UserError, 'poetry: 10 bytes of train'):
      corpora.check_sizes(sizes, {'train': 2048, 'test': 64})

  def test_this_machine_has_five_domains(self):
    first = {d: next(iter(t))[1] for d, t in machine_text.domains().items()}
    self.assertLen(first, 5)
    self.assertTrue(all(len(text) > 20 for text in first.values()), first)


class StreamTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = write_corpora(self.create_tempdir().full_path)
    self.folder = folder
    self.task_of = tasks.add_corpora(folder)
    mixtures.add_mixture('both', list(self.task_of.values()), rates='equal')

  def open(self, name='both', **options):
    settings = dict(lengths={'targets': 32}, batch_size=4, seed=3)
    return stream.SeqioStream(name, **settings | options)

  @parameterized.parameters(False, True)
  def test_a_restored_stream_continues_exactly(self, pack):
    first = self.open(pack=pack)
    for _ in range(7):
      next(first)
    state = first.state()
    expected = [next(first) for _ in range(5)]
    again = self.open(pack=pack)
    again.restore(state)
    self.assertEqual(again.position, 7)
    for batch in expected:
      found = next(again)
      self.assertEqual(sorted(found), sorted(batch))
      for name in batch:
        np.testing.assert_array_equal(found[name], batch[name])

  def test_order_is_fixed_by_the_seed(self):
    take = lambda s: np.stack(
      [next(s)['decoder_target_tokens'] for _ in range(4)]
    )
    np.testing.assert_array_equal(take(self.open()), take(self.open()))
    self.assertFalse((take(self.open()) == take(self.open(seed=4))).all())

  def test_no_token_is_lost_and_rows_are_full(self):
    task = self.task_of['one']
    batches = splits.batches(
      task, lengths={'targets': 32}, batch_size=4, split='train'
    )
    tokens = np.concatenate([b['decoder_target_tokens'] for b in batches])
    texts = documents_of(self.folder, 'one')['train']
    vocabulary = features.vocabulary()
    joined = [*map(vocabulary.encode, texts)]
    expected = sum((list(ids) + [vocabulary.eos_id] for ids in joined), [])
    np.testing.assert_array_equal(tokens[tokens > 0], expected)
    real = (tokens > 0).sum(axis=1)
    self.assertLessEqual(np.sum((real > 0) & (real < 32)), 1 + len(texts) // 64)
    inputs = np.concatenate([b['decoder_input_tokens'] for b in batches])
    np.testing.assert_array_equal(inputs[0, 1:], tokens[0, :-1])
    self.assertEqual(inputs[0, 0], 0)

  def test_shards_share_the_examples(self):
    task = self.task_of['one']
    rows = set()
    for index in range(2):
      one = self.open(
        task, shard_index=index, num_shards=2, pack=False, batch_size=1
      )
      rows |= {next(one)['decoder_target_tokens'].tobytes() for _ in range(40)}
    whole = self.open(task, pack=False, batch_size=1)
    everything = {
      next(whole)['decoder_target_tokens'].tobytes() for _ in range(400)
    }
    self.assertNotEmpty(rows & everything)

  def test_packing_puts_several_examples_into_a_row(self):
    table = self.folder / 't.tsv'
    table.write_text('text\tlabel\n' + 'a\tb\nccc\tdd\n' * 20)
    tasks.add_table_task(
      'pairs', {'train': table}, inputs='say: {text}', targets='{label}'
    )
    settings = dict(
        lengths={'inputs': 32, 'targets': 16}, batch_size=2,
        kind='encoder_decoder',
    )  # fmt: skip
    packed = next(stream.SeqioStream('pairs', **settings))
    self.assertGreater(packed['encoder_segment_ids'].max(), 1)
    plain = next(stream.SeqioStream('pairs', pack=False, **settings))
    text = features.vocabulary().decode(
      plain['encoder_input_tokens'][0].tolist()
    )
    self.assertIn(text.rstrip('\x00'), ('say: a', 'say: ccc'))

  def test_files_are_found_below_the_data_folder(self):
    table = self.folder / 'sub' / 't.tsv'
    table.parent.mkdir()
    table.write_text('text\tlabel\na\tb\n')
    with mock.patch.dict(os.environ, {'MERGEJAX_DATA': str(self.folder)}):
      tasks.add_table_task(
        'below', {'train': 'sub/t.tsv'}, inputs='{text}', targets='{label}'
      )
    self.assertEqual(tasks.num_examples('below'), 1)
    with self.assertRaisesRegex(errors.UserError, 'no sub/none.tsv'):
      tasks.locate('sub/none.tsv')

  def test_mistakes(self):
    table = self.folder / 't.tsv'
    table.write_text('text\tlabel\na\tb\n')
    with self.assertRaisesRegex(errors.UserError, "Did you mean 'label'"):
      tasks.add_table_task(
        'x', {'train': table}, inputs='{text}', targets='{labl}'
      )
    with self.assertRaisesRegex(errors.UserError, 'all be .tsv'):
      tasks.add_text_task(
        'y', {'train': table, 'test': self.folder / 'one' / 'test.jsonl'}
      )
    with self.assertRaisesRegex(errors.UserError, "Did you mean 'prefix_lm'"):
      self.open(kind='prefixlm')
    with self.assertRaisesRegex(errors.UserError, 'no SentencePiece model'):
      features.vocabulary('/nowhere.model')


class MixturesTest(parameterized.TestCase):
  @parameterized.product(
    cap=[None, 300000, 524288, 2097152], temperature=[1.0, 2.0, 4.0, 8.0]
  )
  def test_rates(self, cap, temperature):
    arrays = goldens.load('seqio_mixing')
    found = [
      mixtures.rate(size, cap=cap, temperature=temperature)
      for size in arrays['sizes']
    ]
    name = f'max{cap}_T{temperature}'
    np.testing.assert_allclose(found, arrays[f'rate/{name}'], rtol=1e-9)
    np.testing.assert_allclose(
      np.array(found) / sum(found), arrays[f'prob/{name}'], rtol=1e-9
    )

  def test_scale_before_cap(self):
    arrays = goldens.load('seqio_mixing')
    found = [
      mixtures.rate(size, cap=300000, temperature=2, scale=2)
      for size in arrays['sizes']
    ]
    np.testing.assert_allclose(found, arrays['rate/scale2_max300000_T2'])

  def test_registered_rates(self):
    folder = write_corpora(self.create_tempdir().full_path)
    names = list(tasks.add_corpora(folder).values())
    sizes = [tasks.num_examples(name) for name in names]
    proportional = mixtures.add_mixture('p', names, temperature=2)
    rates = [proportional.get_rate(seqio.TaskRegistry.get(n)) for n in names]
    np.testing.assert_allclose(rates, np.sqrt(sizes))
    fixed = mixtures.add_mixture('f', {names[0]: 3.0, names[1]: 1.0})
    self.assertEqual(fixed.get_rate(seqio.TaskRegistry.get(names[0])), 3.0)
    with self.assertRaisesRegex(errors.UserError, 'Unknown task'):
      mixtures.add_mixture('q', ['corpus_on'])
    with self.assertRaisesRegex(errors.UserError, 'temperature'):
      mixtures.rate(3, temperature=0)


if __name__ == '__main__':
  absltest.main()
