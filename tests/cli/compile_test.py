# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax compile`: runs and recipes whose data are not there."""

import pathlib
from unittest import mock

from absl.testing import absltest
import jax
import numpy as np
import one_command

from mergejax.checkpoints import checkpoint
from mergejax.pods import chips
from mergejax.pods import compiler
from mergejax.pods import report as report_lib
from mergejax.pods import work as work_lib


def gin_run():
  """Arguments of a small run on data 4, model 2."""
  settings = {
    'TRAIN_FILE': '/nowhere.tsv', 'INPUTS': '{a}', 'TARGETS': '{b}',
    'MODEL_DIR': '/nowhere', 'BATCH_SIZE': '8',
    'LENGTHS': "{'inputs': 8, 'targets': 4}",
    'MESH': "{'data': 4, 'model': 2}", 't5.T5Config.emb_dim': '8',
  }  # fmt: skip
  return [
    '--gin_file=gin/runs/text_to_text.gin',
    *(f'--gin.{name}={value}' for name, value in settings.items()),
  ]


class CommandTest(absltest.TestCase):
  def run_command(self, *arguments):
    return one_command.run('compile', *arguments)

  def works_of(self, *arguments):
    """What a command would compile."""
    found = []

    def report(work, **_):
      found.append(work)
      return report_lib.Report(name='', topology='', mesh={}, held={})

    with mock.patch.object(compiler, 'report', report):
      code, _, err = self.run_command('--topology', 'here', *arguments)
    self.assertEqual((code, err), (0, ''))
    return found

  def test_a_gin_run_whose_data_are_not_there(self):
    step, init = self.works_of(*gin_run())
    self.assertEqual(dict(step.mesh.shape)['model'], 2)
    # Eight rows on four slices: three arrays of 8 inputs, five of 4 targets.
    size = work_lib.shard_bytes(step.held['batch'])
    self.assertEqual(size, 2 * 4 * (3 * 8 + 5 * 4))
    self.assertEqual(step.tokens, 8 * 12)
    self.assertEqual(init.name, 'fresh state')

  def test_a_run_of_an_adapter(self):
    """What is compiled trains it alone, and is told whose rows are whose."""
    step, _ = self.works_of(
      *gin_run(), '--gin_file=gin/runs/poly.gin', '--gin.TASKS={}',
      '--gin.NUM_TASKS=3',
    )  # fmt: skip
    ids = step.held['batch']['task_ids']
    self.assertEqual((ids.shape, ids.dtype), ((8,), np.int32))
    learned = [
      '/'.join(str(part.key) for part in path if hasattr(part, 'key'))
      for path, leaf in jax.tree.leaves_with_path(step.held['optimizer'])
      if leaf.size > 1
    ]
    self.assertNotEmpty(learned)
    for path in learned:
      self.assertIn('poly_', path)

  def test_the_largest_batch_divides_into_parts(self):
    """100 bytes hold 100 rows; in two parts over four slices, 96."""

    def report(work, **_):
      return report_lib.Report(
        name='', topology='', mesh={}, held={}, memory=100, rows=work.rows,
        temporaries=work.rows,
      )  # fmt: skip

    with (
      mock.patch.object(chips, 'devices', lambda *_: jax.devices()),
      mock.patch.object(compiler, 'report', report),
    ):
      code, out, err = self.run_command(
        '--topology=v5e:2x4', '--largest_batch', '--skip_init', *gin_run(),
        '--gin.train.train_model.accumulate=2',
      )  # fmt: skip
    self.assertEqual((code, err), (0, ''))
    self.assertIn(' 96 rows, by the straight line through 8 and 16 rows', out)

  def test_a_run_of_experts_whose_text_is_not_there(self):
    (step,) = self.works_of(
      '--gin_file=gin/runs/branch_train_merge.gin', '--experts=6',
      '--skip_init', '--gin.CORPORA=/nowhere', '--gin.BATCH_SIZE=8',
      '--gin.LENGTH=16', '--mesh=branch=2,data=4',
    )  # fmt: skip
    batch = step.held['batch']['decoder_target_tokens']
    self.assertEqual(batch.shape, (6, 8, 16))
    self.assertEqual(batch.sharding.shard_shape(batch.shape), (3, 2, 16))

  def test_experts_that_meet_while_they_train(self):
    run = (
      '--gin_file=gin/runs/diloco.gin', '--experts=4', '--skip_init',
      '--gin.CORPORA=/nowhere', '--gin.BATCH_SIZE=8', '--gin.LENGTH=16',
      '--mesh=branch=4,data=2',
    )  # fmt: skip
    step, merge = self.works_of(*run)
    self.assertEqual(step.rows, 8)
    self.assertEqual(merge.name, 'merge of 4 experts')
    (only,) = self.works_of(*run, '--phase=seed')
    self.assertEqual(only.name, 'training step')
    other = self.works_of(*run, '--gin.OUTER=@outer.local_sgd()')
    self.assertLen(other, 2)
    code, _, err = self.run_command(
      '--topology', 'here', *run, '--gin.OUTER="local_sgd"'
    )
    self.assertEqual(code, 2)
    self.assertIn("outer.diloco(every=100), not 'local_sgd'", err)

  def test_a_forest_whose_text_is_not_there(self):
    run = (
      '--gin_file=gin/runs/forest.gin', '--skip_init', '--gin.CORPORA=/nowhere',
      '--gin.BATCH_SIZE=8', '--gin.LENGTH=16', '--gin.GENERATION=4',
    )  # fmt: skip
    for experts, flags in (
      (4, ['--mesh=branch=2,data=4']),
      (2, ['--gin.SIDE_BY_SIDE=2', '--mesh=branch=2,data=4']),
    ):
      (step,) = self.works_of(*run, *flags)
      batch = step.held['batch']['decoder_target_tokens']
      self.assertEqual(batch.shape, (experts, 8, 16))
    (step,) = self.works_of(*run, '--phase=seed')
    self.assertEqual(step.held['batch']['decoder_target_tokens'].shape, (8, 16))
    code, _, err = self.run_command(
      '--topology', 'here', *run, '--phase', 'dense'
    )
    self.assertEqual(code, 2)
    self.assertIn('without a dense model', err)

  def test_a_recipe(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    params = {'a': {'kernel': np.ones((16, 4), np.float32)}}
    for name in ('one', 'two'):
      checkpoint.save_checkpoint(folder / name, params, format='safetensors')
    recipe = folder / 'recipe.yaml'
    recipe.write_text(
      'merge_method: linear\nmodels:\n'
      f'  - model: {folder}/one\n    parameters: {{weight: 1.0}}\n'
      f'  - model: {folder}/two\n    parameters: {{weight: 2.0}}\n'
    )
    code, out, err = self.run_command(
      '--topology', 'here', '--recipe', str(recipe)
    )
    self.assertEqual((code, err), (0, ''))
    self.assertIn('merge of 2 models on cpu: 8 devices (data 8)', out)
    self.assertIn('no collectives', out)

  def test_mistakes(self):
    for arguments, message in (
      (['--topology', 'v5e'], 'needs --gin_file'),
      (['--topology', 'v5e', '--recipe', 'x'], 'shape of its slice'),
      (
        ['--topology', 'here', '--recipe', 'x', '--mesh', 'date=2'],
        'Unknown mesh axis',
      ),
      (
        ['--topology', 'here', '--slices', '2', '--recipe', 'x'],
        'need a described --topology',
      ),
      (
        ['--topology', 'v5e:4x4', '--recipe', 'x', '--largest_batch'],
        '--largest_batch would change nothing for a recipe',
      ),
      (
        ['--topology', 'here', '--phase', 'seed', *gin_run()],
        '--phase would change nothing for a run of train.train_model',
      ),
      (
        [
          '--topology',
          'here',
          '--experts',
          '0',
          '--gin.CORPORA=/nowhere',
          '--gin_file=gin/runs/branch_train_merge.gin',
        ],
        '--experts must be a whole number of 1 or more, not 0',
      ),
    ):
      code, _, err = self.run_command(*arguments)
      self.assertEqual(code, 2)
      self.assertIn(message, err)


if __name__ == '__main__':
  absltest.main()
