# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a training run writes down of itself is the same in every process."""

import functools
import json

from absl.testing import absltest

from mergejax import training
from mergejax.cli import train


class Silent:
  """An objective that says nothing of itself."""

  def __call__(self, family, params, batch, rngs):
    raise NotImplementedError


def focal(family, params, batch, rngs, *, gamma, inner=None):
  raise NotImplementedError


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


if __name__ == '__main__':
  absltest.main()
