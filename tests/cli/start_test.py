# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A run starts where another stopped, T5X's or ours, or from parts of it."""

import contextlib
import io
import json
import pathlib
import time

from absl.testing import absltest
from absl.testing import parameterized
import environments
import jax
import numpy as np

import mergejax as mj
from mergejax.cli import start as start_lib
from mergejax.cli import train
from mergejax.core import errors
from mergejax.data import tasks
from mergejax.nn import lm
from mergejax.training import optim
from mergejax.training import t5x_state
from mergejax.training import trainer as trainer_lib

MODULE = lm.LanguageModel(
  lm.LMConfig(
    vocab_size=384, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16, num_layers=1,
  )
)  # fmt: skip
KEY = jax.random.key(0)


class StartTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(environments.one_device())
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  @parameterized.parameters(
    (dict(restore='moments'), "value of restore 'moments'"),
    (dict(rules=('head/w', None)), 'list of pairs'),
    (dict(restore_step=3), 'restore_step say.*no initial_checkpoint'),
    (dict(initial_checkpoint='x', restore='state', pad_vocabulary=True),
     'pad_vocabulary cannot be given'),
    (dict(initial_checkpoint='/nowhere/x', restore_step=0), 'no checkpoint at'),
  )  # fmt: skip
  def test_mistakes(self, given, message):
    names = {'initial_checkpoint': 'checkpoint', 'restore_step': 'step'}
    given = {'checkpoint': None} | {
      names.get(n, n): v for n, v in given.items()
    }
    with self.assertRaisesRegex(errors.UserError, message):
      start_lib.Start(**given)

  def test_what_is_usual_is_not_told(self):
    # The record of a run that was begun before there was a choice stays.
    self.assertEqual(start_lib.Start(None).described(), {})
    mj.save_checkpoint(self.folder / 'checkpoint_0', {'w': np.ones(2)})
    start = start_lib.Start(self.folder, step=0, rules=[('a', None)])
    self.assertEqual(
      start.described(), {'restore_step': 0, 'restore_rules': [['a', None]]}
    )

  def test_a_restore_in_part_is_told_where_it_happens(self):
    source = self.folder / 'source'
    mj.save_checkpoint(source, mj.models.family_of(MODULE).init(KEY))
    begun = self.folder / 'begun'
    (begun / 'checkpoints' / '1').mkdir(parents=True)

    def told(directory, **given):
      begin = start_lib.Start(source, **given).check(MODULE)
      text = io.StringIO()
      with contextlib.redirect_stderr(text):
        begin.arguments(None, 1, KEY, directory)
      return text.getvalue()

    fresh = dict(rules=[('decoder/token_embedder/.*', None)])
    self.assertRegex(
      told(self.folder / 'new', **fresh),
      r'^\S+/source is restored in part: 1 begin fresh \(decoder/\S+\); 1 stay '
      r'there \(decoder/\S+\)\.\n$',
    )
    self.assertEmpty(told(begun, **fresh))
    self.assertEmpty(told(self.folder / 'new'))

  def test_a_run_goes_on_from_t5x_and_from_ours(self):
    rows = [f'{i} plus one\t{i + 1}' for i in range(64)]
    (self.folder / 'rows.tsv').write_text('\n'.join(['sum\tresult', *rows]))
    name = f'start_{time.time_ns()}'
    tasks.add_table_task(
      name, {'train': self.folder / 'rows.tsv'}, inputs='{sum}',
      targets='{result}',
    )  # fmt: skip

    def run(where, steps, **given):
      train.train_model(
        module=MODULE, optimizer=optim.adafactor(0.01), mixture_or_task=name,
        model_dir=self.folder / where, steps=steps, batch_size=8,
        lengths={'inputs': 16, 'targets': 8}, kind='prefix_lm', pack=False,
        seed=0, save_every=1, **given,
      )  # fmt: skip
      return self.folder / where

    first = run('first', 2, callbacks=[t5x_state.save_t5x()])
    theirs = first / 'train' / 't5x'
    self.assertEqual(
      sorted(p.name for p in theirs.iterdir()), ['checkpoint_1', 'checkpoint_2']
    )
    # The same state, whichever format it comes from.
    trainer = trainer_lib.Trainer(MODULE, optim.adafactor(0.01))
    begin = lambda place, **given: (
      start_lib.Start(place, **given)
      .check(MODULE)
      .arguments(trainer, 3, jax.random.key(0))
    )
    states = [
      begin(place, restore='state', step=1)['state']
      for place in (theirs, first)
    ]
    self.assertEqual(int(states[0].step), 1)
    jax.tree.map(np.testing.assert_array_equal, *states)
    last = begin(first)['params']
    trained = mj.load_model(first / 'model')[1]
    jax.tree.map(np.testing.assert_array_equal, last, trained)
    # A run that goes on in its folder reads nothing of it.
    begin = start_lib.Start(theirs, restore='state').check(MODULE)
    given = begin.arguments(trainer, 3, jax.random.key(0), first / 'train')
    self.assertEqual(given, {})
    # And it trains.
    second = run(
      'second', 3, initial_checkpoint=theirs, restore='state', restore_step=1
    )
    record = json.loads((second / 'run.json').read_text())
    self.assertEqual((record['restore'], record['restore_step']), ('state', 1))
    saved = [int(p.name) for p in (second / 'train/checkpoints').iterdir()]
    self.assertEqual(sorted(saved), [2, 3])
    with self.assertRaisesRegex(errors.UserError, 'of step 2.*reach step 2'):
      run('late', 2, initial_checkpoint=theirs, restore='state')


if __name__ == '__main__':
  absltest.main()
