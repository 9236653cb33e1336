# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A folder goes on with its own run alone; what gin files say stands once."""

import contextlib
import dataclasses
import inspect
import io
import pathlib

from absl.testing import absltest
from absl.testing import parameterized

import gin
from mergejax import models
from mergejax import partition
from mergejax.cli import branch_train_merge
from mergejax.cli import common
from mergejax.cli import grow_forest
from mergejax.cli import same_run
from mergejax.cli import train
from mergejax.core import errors
from mergejax.data import tasks
from mergejax.nn import t5
from mergejax.training import objective
from mergejax.training import optim
from mergejax.training import schedules

RUNS = (
  'branch_train_merge', 'branch_train_merge_small', 'forest',
  'language_model', 'text_to_text',
)  # fmt: skip


def parse(run, *files, **bindings):
  macros = {
    'branch_train_merge': ('CORPORA', 'MODEL_DIR'),
    'forest': ('CORPORA', 'MODEL_DIR'),
    'language_model': ('CORPORA', 'MODEL_DIR'),
    'text_to_text': ('TRAIN_FILE', 'INPUTS', 'TARGETS', 'MODEL_DIR'),
  }[run.removesuffix('_small')]
  named = {name: 'x' for name in macros} | bindings
  common.parse_gin([f'runs/{run}.gin', *files], list(named.items()))


class SameRunTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.write('train.tsv', range(64))

  def write(self, name, numbers):
    rows = ''.join(f'{i}\t{i % 2}\n' for i in numbers)
    (self.folder / name).write_text('number\tparity\n' + rows)

  def train(self, *, steps, file='train.tsv', **changes):
    config = dict(
        vocab_size=260, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=8,
        num_encoder_layers=1, num_decoder_layers=1,
    )  # fmt: skip
    config |= changes.pop('config', {})
    task = tasks.add_table_task(
        'parity', {'train': self.folder / file}, inputs='{number}',
        targets='{parity}', by_content=True,
    )  # fmt: skip
    settings = dict(
        module=t5.Transformer(t5.T5Config(**config)),
        optimizer=lambda steps: optim.adafactor(0.01),
        mixture_or_task=task, model_dir=self.folder / 'out', batch_size=8,
        lengths={'inputs': 8, 'targets': 4}, seed=0, save_every=2,
        mesh={'data': 8}, steps=steps,
    )  # fmt: skip
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
      train.train_model(**settings | changes)
    return err.getvalue()

  def test_all_that_differs_is_in_one_message(self):
    self.train(steps=0)
    before = sorted(self.folder.rglob('*'))
    self.write('other.tsv', range(1, 65))
    with self.assertRaises(errors.UserError) as caught:
      self.train(
          steps=0, file='other.tsv', batch_size=16, pack=False, seed=3,
          lengths={'inputs': 16, 'targets': 4}, config={'dropout_rate': 0.5},
          optimizer=optim.adafactor(0.02), loss={'z_loss': 0.0},
      )  # fmt: skip
    for line in (
      'batch_size: 8 there, 16 asked for',
      'data/files: train.tsv',
      'lengths/inputs: 8 there, 16 asked for',
      'loss/z_loss: None there, 0.0 asked for',
      'model/dropout_rate: 0.0 there, 0.5 asked for',
      'optimizer/learning_rate: 0.01 there, 0.02 asked for',
      'pack: True there, False asked for',
      'seed: 0 there, 3 asked for',
    ):
      self.assertIn(line, caught.exception.message)
    after = set(self.folder.rglob('*')) - {self.folder / 'other.tsv'}
    self.assertEqual(sorted(after), before)

    # Other devices are no other run; the folder says that it moved.
    err = self.train(steps=0, mesh={'data': 4, 'model': 2})
    self.assertIn('mesh/model: 1 there, 2 asked for', err)

  def test_a_task_that_nobody_registered(self):
    with self.assertRaisesRegex(errors.UserError, "mixture 'paritty'"):
      self.train(steps=1, mixture_or_task='paritty')

  def test_a_batch_size_that_is_no_number(self):
    with self.assertRaisesRegex(errors.UserError, 'batch size must be 1 or'):
      self.train(steps=0, batch_size='many')

  def test_a_vocabulary_that_the_model_does_not_have(self):
    with self.assertRaisesRegex(
      errors.UserError, r'259 ids \(ByteVocabulary\).* only 200'
    ):
      self.train(steps=1, config={'vocab_size': 200})
    self.assertFalse((self.folder / 'out').exists())

  def test_answers_that_are_cut_are_told(self):
    rows = ''.join(f'{i}\t{"odd" * (i % 4)}\n' for i in range(64))
    (self.folder / 'long.tsv').write_text('number\tparity\n' + rows)
    with self.assertLogs(level='WARNING') as logs:
      self.train(steps=0, file='long.tsv')
    # 4 tokens hold 3 bytes and the end.
    self.assertRegex(
      '\n'.join(logs.output), r'32 of 64 targets .* than 4 tokens.*10 tokens'
    )

  def test_a_record_that_is_cut_or_of_another_kind(self):
    file = self.folder / 'run.json'
    file.write_text('{"seed": ')
    with self.assertRaisesRegex(errors.UserError, 'is not JSON'):
      same_run.check(file, {'seed': 0})
    file.write_text('{}')
    with self.assertRaisesRegex(errors.UserError, 'seed: None there, 0 asked'):
      same_run.check(file, {'seed': 0})


class SharesTest(parameterized.TestCase):
  @parameterized.parameters((2, 1), (1, 2), (3, 2), (4, 2))
  def test_shards_of_a_run_are_read_by_any_number(self, shards, readers):
    """Every row of a batch is read, in one order, by however many."""
    rows = []
    for index in range(readers):
      share, local_rows = train.share(shards, index, readers)
      self.assertEqual(local_rows, shards % readers == 0)
      if local_rows:
        rows += share
      else:
        self.assertEqual(list(share), list(range(shards)))
    if rows:
      self.assertEqual(rows, list(range(shards)))


class GinTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def tearDown(self):
    super().tearDown()
    gin.clear_config()

  def write(self, *lines):
    """A gin file of these lines."""
    file = self.folder / 'more.gin'
    first = 'from __gin__ import dynamic_registration'
    file.write_text('\n'.join([first, *lines]) + '\n')
    return str(file)

  def rate(self):
    settings = gin.get_configurable(branch_train_merge.Settings)()
    total = settings.seed_steps + settings.branch_steps
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
      made = train.optimizer_of(settings.optimizer, total)
    self.assertEqual(err.getvalue(), '')
    return total, optim.describe(made)['learning_rate']

  @parameterized.parameters('branch_train_merge', 'branch_train_merge_small')
  def test_the_learning_rate_spans_the_run(self, run):
    for steps in ({}, dict(SEED_STEPS='2000', BRANCH_STEPS='1000')):
      parse(run, **steps)
      total, rate = self.rate()
      self.assertEqual(rate['steps'], total)
      if steps:
        self.assertEqual(total, 3000)
      schedule = schedules.over(
        gin.get_configurable(schedules.warmup_cosine)(), total
      )
      peak, share = rate['peak'], rate['final_share']
      # Halfway after the warm-up a cosine is halfway, at the end at its last.
      middle = (rate['warmup_steps'] + total) // 2
      self.assertAlmostEqual(
        float(schedule(middle)) / (peak * (1 + share) / 2), 1, places=2
      )
      self.assertAlmostEqual(float(schedule(total)) / (peak * share), 1, 4)
      self.assertGreater(schedule(total - 20), schedule(total))

  def test_another_optimizer_by_gin_spans_it_too(self):
    file = self.write(
      'from mergejax.cli import branch_train_merge',
      'from mergejax.training import optim',
      'from mergejax.training import schedules',
      'branch_train_merge.Settings.optimizer = @optim.adamw',
      'optim.adamw.learning_rate = @schedules.warmup_cosine()',
    )
    parse('branch_train_merge', file, SEED_STEPS='7')
    total, rate = self.rate()
    self.assertEqual((total, rate['steps']), (107, 107))

  def test_a_schedule_of_its_own_length_is_told(self):
    schedule = schedules.warmup_cosine(1.0, steps=500, warmup_steps=3)
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
      train.optimizer_of(optim.adafactor(schedule), 3000)
    self.assertRegex(err.getvalue(), 'spans 500 steps, the run 3000')
    with self.assertRaisesRegex(errors.UserError, 'without parentheses'):
      optim.adafactor(schedules.warmup_cosine(1.0, warmup_steps=3))
    with self.assertRaisesRegex(errors.UserError, '3 warm-up steps'):
      train.optimizer_of(
        lambda steps: optim.adafactor(
          schedules.warmup_cosine(1.0, warmup_steps=3), steps=steps
        ),
        2,
      )

  def test_the_old_name_says_what_replaced_it(self):
    with self.assertRaisesRegex(errors.UserError, 'SEED_STEPS . BRANCH_STEPS'):
      parse('branch_train_merge', TOTAL_STEPS='3000')

  @parameterized.parameters(
    ('mergejax.run import train', 'mergejax.cli now'),
    ('mergejax.train import optim', 'mergejax.training now'),
  )
  def test_old_modules_say_where_they_went(self, line, words):
    with self.assertRaisesRegex(errors.ConfigError, words):
      common.parse_gin([self.write(f'from {line}')], [])

  def test_what_a_run_does_besides_is_bound_by_gin(self):
    file = self.write(
      'from mergejax import partition',
      'from mergejax.cli import train',
      'from mergejax.training import objective',
      'from mergejax.training import transforms',
      'train.train_model:',
      '  objective = @objective.cross_entropy()',
      '  rules = @partition.fsdp()',
      '  transforms = [@transforms.skip_nonfinite(), @transforms.ema()]',
      '  accumulate = 2',
      '  clip = 1.0',
      "  freeze = ['token_embedder/.*']",
      'objective.cross_entropy.label_smoothing = 0.1',
      'transforms.ema.decay = 0.9',
    )
    parse('text_to_text', file)
    bound = lambda name: gin.query_parameter(f'train.train_model.{name}')
    self.assertEqual(bound('accumulate'), 2)
    made = [each.scoped_configurable_fn() for each in bound('transforms')]
    self.assertEqual([each.name for each in made], ['skipped', 'ema'])
    self.assertEqual(bound('objective').scoped_configurable_fn(), (
      objective.cross_entropy(label_smoothing=0.1)))  # fmt: skip
    self.assertEqual(bound('rules').scoped_configurable_fn(), partition.fsdp())

  @parameterized.parameters(*RUNS)
  def test_numbers_of_a_job_stand_once(self, run):
    """What a gin file gives a job has no other value in Python."""
    parse(run)
    jobs = {
      'branch_train_merge.Settings': branch_train_merge.Settings,
      'grow_forest.Settings': grow_forest.Settings,
      'train.train_model': train.train_model,
    }
    checked = 0
    for line in gin.config_str(10_000).splitlines():
      name, _, value = line.partition(' = ')
      job, _, parameter = name.rpartition('.')
      # Which features there are is no number.
      if job in jobs and value and parameter != 'kind':
        default = inspect.signature(jobs[job]).parameters[parameter].default
        self.assertIn(
          default,
          (inspect.Parameter.empty, None, dataclasses.MISSING),
          f'{line}: {default}',
        )
        checked += 1
    self.assertGreater(checked, 8)

  def test_models_hold_sizes_alone(self):
    files = sorted((common.gin_folder() / 'models').glob('*.gin'))
    self.assertGreater(len(files), 3)
    for file in files:
      macros = {
        line.split(' = ')[0]
        for line in file.read_text().splitlines()
        if ' = ' in line and not line.startswith((' ', '#'))
        and '.' not in line.split(' = ')[0]
      }  # fmt: skip
      self.assertLessEqual(macros, {'MODEL', 'VOCABULARY'}, file.name)

  def test_a_model_file_given_later_wins_whole(self):
    """Nothing of the model that a run includes is left in another."""
    for run, size in (
      ('branch_train_merge', 'lm_small'),
      ('text_to_text', 't5_1_1_small'),
    ):
      file = f'models/{size}.gin'
      vocabulary = {'VOCABULARY': 'bytes'} if run == 'text_to_text' else {}
      parse(run, file, **vocabulary)
      found = models.describe(
        gin.query_parameter('%MODEL').scoped_configurable_fn()
      )
      common.parse_gin([file], list(vocabulary.items()))
      alone = models.describe(
        gin.query_parameter('%MODEL').scoped_configurable_fn()
      )
      self.assertEqual(found, alone)


if __name__ == '__main__':
  absltest.main()
