# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a training run writes down of itself is the same in every process."""

import functools
import json
from unittest import mock

from absl.testing import absltest

from mergejax import training
from mergejax.cli import branch_train_merge
from mergejax.cli import domain_runs
from mergejax.cli import train
from mergejax.core import errors


class Silent:
  """An objective that says nothing of itself."""

  def __call__(self, family, params, batch, rngs):
    """It is written down, and never called."""


def focal(family, params, batch, rngs, *, gamma, inner=None):
  """Likewise."""


def told(objective=None, transforms=()):
  return train.described(objective, transforms, (), 1, None)


class DescribedTest(absltest.TestCase):
  def test_no_address_and_all_numbers(self):
    for objective in (
      focal,
      functools.partial(focal, gamma=2.0),
      functools.partial(focal, gamma=2.0, inner=Silent()),
      Silent(),
      training.cross_entropy(z_loss=0.1),
    ):
      text = json.dumps(told(objective))
      self.assertNotIn('0x', text)
    self.assertNotEqual(
      told(functools.partial(focal, gamma=2.0)),
      told(functools.partial(focal, gamma=3.0)),
    )
    self.assertEqual(told(focal), {'objective': 'focal'})

  def test_a_limit_of_skipped_steps_may_be_raised(self):
    ten, twenty = [
      told(transforms=[training.skip_nonfinite(stop_after=n)]) for n in (10, 20)
    ]
    self.assertEqual(ten, twenty)
    self.assertIn('skipped', ten['transforms'])
    self.assertNotEqual(
      told(transforms=[training.ema(0.5)]), told(transforms=[training.ema(0.9)])
    )


class PerTaskTest(absltest.TestCase):
  def trained_with(self, **given):
    """What the trainer of a run of two tasks is given."""
    self.enter_context(mock.patch.object(train.stream_lib, 'find'))
    self.enter_context(
      mock.patch.object(train.task_ids, 'names', lambda provider: ['a', 'b'])
    )
    made = self.enter_context(
      mock.patch.object(train.trainer_lib, 'Trainer', side_effect=StopIteration)
    )
    with self.assertRaises(StopIteration):
      train.train_model(
        module=None, optimizer=training.optim.adafactor(0.1),
        mixture_or_task='mixture', model_dir=self.create_tempdir().full_path,
        steps=1, batch_size=8, lengths={}, seed=0, save_every=1, per_task=True,
        **given,
      )  # fmt: skip
    return made.call_args.kwargs

  def test_an_objective_of_ones_own_tells_tasks_apart_itself(self):
    for own, expected in (
      (None, training.cross_entropy(tasks=2)),
      (focal, focal),
    ):
      given = self.trained_with(objective=own)
      self.assertEqual(given['objective'], expected)
      (transform,) = given['transforms']
      self.assertEqual(transform.settings, {'tasks': ['a', 'b']})

  def test_options_of_the_loss_beside_it_are_refused(self):
    with self.assertRaisesRegex(errors.ConfigError, 'Both objective and loss'):
      self.trained_with(objective=focal, loss={'z_loss': 0.1})


class MeshesTest(absltest.TestCase):
  def meshes(self, rows, mesh=None):
    settings = branch_train_merge.Settings(
        module=None, optimizer=None, model_dir='x', seed_steps=1, branch_steps=1,
        batch_size=rows, length=8, max_train_bytes=None, seed=0, mesh=mesh,
    )  # fmt: skip
    return domain_runs.make_meshes(settings, 2)

  def test_rows_of_experts_divide_over_data(self):
    sizes = dict(self.meshes(6)[0].shape)
    self.assertEqual(sizes, dict(branch=2, data=2, expert=2, model=1))
    with self.assertRaisesRegex(errors.DataError, '6 rows.* over 4 data'):
      self.meshes(6, dict(branch=2, data=4))


if __name__ == '__main__':
  absltest.main()
