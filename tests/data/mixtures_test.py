# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What mixtures draw: seqio's rates, their table, ExMix with denoising."""

import functools
import math
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from mergejax.core import errors
from mergejax.data import exmix
from mergejax.data import exmix_table
from mergejax.data import features
from mergejax.data import mixtures
from mergejax.data import pretraining
from mergejax.data import t5_tasks
from mergejax.data import tfds_sets

GOLDEN = goldens.load('seqio_mixing')
SIZES = [int(size) for size in GOLDEN['sizes']]
VOCABULARY = features.vocabulary(extra_ids=100)


def numbered(name, number, size=None, vocabulary=VOCABULARY):
  """A task whose every target is one number."""

  def rows(split, shuffle_files, seed=None):
    del split, shuffle_files, seed
    row = {f: [number] for f in ('inputs', 'targets')}
    return tf.data.Dataset.from_tensors(row).map(
      lambda r: {n: tf.cast(leaf, tf.int32) for n, leaf in r.items()}
    )

  return seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      rows, splits=['train'], num_input_examples={'train': size} if size else None,
    ),
    preprocessors=[],
    output_features=features.encoder_decoder(vocabulary),
  )  # fmt: skip


class _Registries(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
      self.addCleanup(self.forget, registry, set(registry.names()))

  def forget(self, registry, known):
    for name in set(registry.names()) - known:
      registry.remove(name)

  def tasks(self, names='abcd', sizes=SIZES):
    return [
      numbered(f'mix_{n}', i + 3, size).name
      for i, (n, size) in enumerate(zip(names, sizes))
    ]


class MixturesTest(_Registries):
  def test_nested_rates_are_seqios(self):
    a, b, c, d = self.tasks()
    inner = mixtures.add_mixture('inner', {a: 2, b: 6})
    inner2 = mixtures.add_mixture('inner2', {b: 1, c: 3})
    parts = {inner.name: 4, inner2.name: 10, d: 5, a: 1}
    for order in (list(parts), list(parts)[::-1]):
      mixture = mixtures.add_mixture('nested', {n: parts[n] for n in order})
      shares = mixtures.probabilities(mixture)
      self.assertEqual([s.task for s in shares], GOLDEN['nested/task_names'].tolist())  # fmt: skip
      np.testing.assert_allclose(
        [s.rate for s in shares], GOLDEN['nested/rates'], rtol=1e-9
      )
    self.assertEqual(mixture.total_rate, GOLDEN['nested/total_rate'])
    flat = mixtures.add_mixture('flat', {s.task: s.rate for s in shares})
    self.assertEqual(
      [s.probability for s in mixtures.probabilities(flat)],
      [s.probability for s in shares],
    )

  @parameterized.parameters(1.0, 2.0, 4.0)
  def test_denoising_beside_is_seqios(self, ratio):
    tasks = self.tasks()
    mixture = exmix.beside_denoising(
      'ex', tasks[:3], denoising=tasks[3], ratio=ratio
    )
    shares = mixtures.probabilities(mixture)
    np.testing.assert_allclose(
      [s.rate for s in shares], GOLDEN[f'exmix/R{ratio}/rates'], rtol=1e-9
    )
    np.testing.assert_allclose(
      [s.probability for s in shares], GOLDEN[f'exmix/R{ratio}/probs'],
      rtol=1e-9,
    )  # fmt: skip

  @parameterized.parameters((0, 0.0), (math.inf, 1.0), (2, 2 / 3))
  def test_the_share_of_denoising(self, ratio, share):
    for count in (2, 3):
      tasks = self.tasks('abcd'[: count + 1])
      mixture = exmix.beside_denoising(
        'ex', tasks[:-1], denoising=tasks[-1], ratio=ratio
      )
      found = {s.task: s.probability for s in mixtures.probabilities(mixture)}
      self.assertAlmostEqual(found.get(tasks[-1], 0.0), share)
      self.forget(seqio.TaskRegistry, set(seqio.TaskRegistry.names()) - set(tasks))  # fmt: skip

  def test_draws_have_these_shares(self):
    tasks = self.tasks()
    mixture = exmix.beside_denoising(
      'ex', tasks[:3], denoising=tasks[3], cap=1e5, temperature=2.0
    )
    shares = mixtures.probabilities(mixture)
    dataset = mixture.get_dataset(
      {'inputs': 1, 'targets': 1}, shuffle=False, seed=3
    )
    count = 20_000
    draws = next(iter(dataset.map(lambda row: row['targets'][0]).batch(count)))
    for number, share in enumerate(shares):
      sigma = math.sqrt(count * share.probability * (1 - share.probability))
      found = int(np.sum(draws.numpy() == number + 3))
      self.assertLess(abs(found - count * share.probability), 4 * sigma)

  def test_the_table(self):
    tasks = self.tasks()
    mixture = mixtures.add_mixture(
      'table_p', tasks, cap=300_000, temperature=2.0
    )
    shares = mixtures.probabilities(mixture, steps=1000, batch_size=32)
    self.assertEqual([s.examples for s in shares], SIZES)
    self.assertEqual([s.capped for s in shares], [min(s, 300_000) for s in SIZES])  # fmt: skip
    np.testing.assert_allclose(
      [s.probability for s in shares], GOLDEN['prob/max300000_T2.0'], rtol=1e-9
    )
    np.testing.assert_allclose(
      [s.epochs * s.examples for s in shares],
      [32000 * s.probability for s in shares],
    )
    lines = mixtures.table(shares).splitlines()
    self.assertLen(lines, 5)
    self.assertRegex(lines[1], r'^mix_c +2,000,000 +300,000 ')
    beside = exmix.beside_denoising('table_ex', tasks[:3], denoising=tasks[3])
    capped = [s.capped for s in mixtures.probabilities(beside)]
    self.assertEqual(capped, [1000, 50000, 300_000, None])
    # Twice the size changes nothing where the cap holds.
    twice = mixtures.add_mixture(
      'table_q', tasks, cap=300_000, scale=2, temperature=2
    )
    held = [twice.get_rate(t) == mixture.get_rate(t) for t in twice.tasks]
    self.assertEqual(held, [False, False, True, True])
    capped = [s.capped for s in mixtures.probabilities(twice)]
    self.assertEqual(capped, [min(2 * s, 300_000) for s in SIZES])

  def test_rows_of_documents_have_no_epochs(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    (folder / 'a.txt').write_text('one document\nand another\n')
    files = {'train': folder / 'a.txt'}
    labelled = numbered('labelled', 3, 10).name
    spans = pretraining.add_unlabelled_task('spans', files).name
    mixture = mixtures.add_mixture('beside', {labelled: 1, spans: 1})
    shares = mixtures.probabilities(mixture, steps=5, batch_size=4)
    self.assertEqual([s.examples for s in shares], [10, 2])
    self.assertEqual([s.epochs for s in shares], [1.0, None])

  def test_a_task_that_is_registered_again_is_the_same(self):
    a, b = self.tasks('ab', [1000, 5000])
    mixtures.add_mixture('inner', [a], cap=300)
    outer = mixtures.add_mixture('outer', {'inner': 1.0, b: 1.0})
    seqio.TaskRegistry.remove(a)
    seqio.MixtureRegistry.remove('inner')
    self.tasks('a', [1000])
    mixtures.add_mixture('inner', [a], cap=300)
    capped = [s.capped for s in mixtures.probabilities(outer)]
    self.assertEqual(capped, [300, None])

  def test_rates_of_seqio_are_understood(self):
    a, b = self.tasks('ab', [1000, 5000])
    seqio.MixtureRegistry.add(
      'theirs', [a, b],
      default_rate=functools.partial(
        seqio.mixing_rate_num_examples, maximum=2000
      ),
    )  # fmt: skip
    shares = mixtures.probabilities('theirs')
    self.assertEqual([s.capped for s in shares], [1000, 2000])
    self.assertEqual([s.rate for s in shares], [1000, 2000])

  def test_mistakes(self):
    a, b = self.tasks('ab')
    for options, message in (
      (dict(cap=-1), 'cap'), (dict(cap=0.5), '1 example or more'),
      (dict(temperature=0), 'temperature'), (dict(scale=-1), 'negative'),
      (dict(temperature=math.nan), 'must be positive, not nan'),
      (dict(scale=math.nan), 'NaN'),
    ):  # fmt: skip
      with self.assertRaisesRegex(errors.DataError, message):
        mixtures.add_mixture('x', [a, b], **options)
    for rates, message in (
      ({a: 0, b: 0.0}, 'All rates .* are 0'), ({a: math.nan}, 'mix_a .* nan'),
      ({a: 1, b: -2}, 'mix_b .* -2'),
    ):  # fmt: skip
      with self.assertRaisesRegex(errors.DataError, message):
        mixtures.add_mixture('x', rates)
    numbered('other', 3, 10, vocabulary=features.vocabulary())
    with self.assertRaisesRegex(
      errors.DataError, r'of mix_a are tokens of .*359.*of other of .*259'
    ):
      mixtures.add_mixture('x', {a: 1, 'other': 1})
    with self.assertRaisesRegex(errors.DataError, "a task 'mix_a' already"):
      mixtures.add_mixture('mix_a', {b: 1})
    mixtures.add_mixture('x', {a: 0, b: 1})  # one may be for evaluation alone
    with self.assertRaisesRegex(errors.DataError, 'needs a task'):
      exmix.beside_denoising('y', [a])
    with self.assertRaisesRegex(errors.DataError, 'not -1'):
      exmix.beside_denoising('y', [a], ratio=-1, denoising=b)


class ExMixTest(_Registries):
  def test_there_are_107_in_eight_families(self):
    self.assertLen(exmix_table.TASKS, 107)
    self.assertLen([f for f in exmix_table.FAMILIES if f != 'other'], 8)

  def test_columns_are_those_of_tfds(self):
    for row in exmix_table.TASKS.values():
      if row.tfds is None:
        self.assertFalse(row.can_be_had)
        continue
      self.assertEqual(tfds_sets.state(row.tfds), 'to build', row.name)
      if row.can_be_had and row.text[0] != 't5':
        columns = row.text[1:2] if row.text[0] == 'label' else row.text[1:]
        known = tfds.builder(row.tfds).info.features
        for column in ','.join(columns).split(','):
          self.assertIn(column, known, row.name)
        self.assertNotEmpty(exmix.spec_of(row).steps)

  @parameterized.parameters(
    'xsum', 'imdb', 'scan', 'web_questions', 'winogrande'
  )
  def test_rows_become_tokens(self, name):
    with tfds.testing.mock_data(num_examples=2):
      task = t5_tasks.add(exmix.spec_of(exmix_table.TASKS[name]))
      found = list(
        task.get_dataset(None, shuffle=False, try_in_mem_cache=False)
      )
    self.assertLen(found, 2)
    for row in found:
      self.assertEqual(int(row['targets'][-1]), 1)

  def test_selections_grow(self):
    chosen = [
      {row.name for row in exmix.select(count=count, seed=1)}
      for count in (30, 55, 80, 107)
    ]
    for fewer, more in zip(chosen, chosen[1:]):
      self.assertLess(fewer, more)
    self.assertNotEqual(chosen[0], {r.name for r in exmix.select(count=30)})
    nli = exmix.select(families=['nli'], exclude=['rte'])
    self.assertEqual({row.family for row in nli}, {'nli'})
    self.assertNotIn('rte', [row.name for row in nli])
    for options, message in (
      (dict(families=['nil']), "mean 'nli'"), (dict(exclude=['rt']), "'rte'"),
      (dict(count=108), 'Of 107 tasks 108'),
    ):  # fmt: skip
      with self.assertRaisesRegex(errors.DataError, message):
        exmix.select(**options)

  def test_what_is_missing_is_told_once_and_whole(self):
    own = numbered('my_rte', 3, 500).name
    denoising = numbered('spans', 4, 10).name
    options = dict(families=['nli'], tasks={'rte': own}, denoising=denoising)
    with self.assertRaisesRegex(errors.DataError, 'Of 12 .* 11 cannot') as told:
      exmix.exmix(**options)
    message = str(told.exception)
    self.assertRegex(message, 'snli: not on this machine: tfds build snli')
    self.assertRegex(message, r"fever: TFDS has no such set: .*tasks=\{'fever'")
    self.assertRegex(message, "missing='skip' goes on")
    with self.assertLogs(level='WARNING') as logged:
      mixture = exmix.exmix(missing='skip', **options)
    self.assertLen(logged.output, 1)
    found = {s.task: s.probability for s in mixtures.probabilities(mixture)}
    self.assertEqual(found, {'my_rte': 1 / 3, 'spans': 2 / 3})
    with self.assertRaisesRegex(errors.DataError, 'None is left'):
      exmix.exmix(missing='skip', families=['nli'], denoising=denoising)

  def test_sets_that_are_here_are_used(self):
    with (
      tfds.testing.mock_data(num_examples=2),
      mock.patch.object(tfds_sets, 'state', lambda *_: 'ready'),
      mock.patch.object(mixtures.tasks_lib, 'num_examples', lambda _: 400_000),
    ):
      mixture = exmix.exmix(families=['nli'], missing='skip', ratio=0)
    found = [s.task for s in mixtures.probabilities(mixture)]
    self.assertLen(found, 10)
    self.assertIn('exmix_anli_r1', found)
    self.assertIn('glue_mnli_v002', found)


if __name__ == '__main__':
  absltest.main()
