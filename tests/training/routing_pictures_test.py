# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of the routing: which rows they have, when and where they are."""

import contextlib
import io
import pathlib
import sys
from unittest import mock

from absl.testing import absltest
import numpy as np
from tensorboard.backend.event_processing import event_accumulator

from mergejax import models
from mergejax.nn import moe_config
from mergejax.nn import moe_metrics
from mergejax.training import routing_pictures
from mergejax.training import run as run_lib

SIZES = dict(vocab_size=8, emb_dim=4, num_heads=1, head_dim=4, mlp_dim=4)


def family(layers, **settings):
  return models.family_of(
    models.build(dict(model_type='lm', num_layers=layers, **SIZES, **settings))
  )


class RoutingPicturesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.sparse = family(2, moe={'num_experts': 3})

  def run_with(self, loads, model=None, experts=None):
    """What a callback does of a run that saves at steps 3 and 5."""
    drawn = routing_pictures.routing()
    drawn.on_start(
      run_lib.Run(
        model or self.sparse, mock.Mock(), 5, directory=self.folder,
        experts=experts,
      )
    )  # fmt: skip
    drawn.on_save(1, None)  # nothing is known yet
    drawn.on_log(2, {'loss': np.float32(1), moe_metrics.LOADS: loads})
    drawn.on_save(3, None)
    drawn.on_log(5, {moe_metrics.LOADS: loads})
    drawn.on_save(5, None)
    drawn.close()

  def images(self):
    events = event_accumulator.EventAccumulator(str(self.folder / 'events'))
    events.Reload()
    return {
      tag: [event.step for event in events.Tensors(tag)]
      for tag in events.Tags()['tensors']
    }

  def test_one_model(self):
    self.run_with(np.float32([[0.5, 0.5, 0.0]]))
    self.assertEqual((self.folder / 'routing.png').read_bytes()[1:4], b'PNG')
    # Under the step that was measured.
    self.assertEqual(self.images(), {'routing': [2, 5]})

  def test_models_side_by_side(self):
    loads = np.float32([[[1, 0, 0]], [[0, 1, 0]]])
    self.run_with(loads, experts=['law', 'code'])
    files = sorted(p.name for p in self.folder.glob('*.png'))
    self.assertEqual(files, ['routing_code.png', 'routing_law.png'])
    self.assertEqual(
      self.images(), {'routing/law': [2, 5], 'routing/code': [2, 5]}
    )

  def test_dense_models_have_none(self):
    self.run_with(np.float32([[1]]), family(1))
    self.assertEmpty(list(self.folder.iterdir()))

  def test_without_matplotlib_it_says_so_and_goes_on(self):
    err = io.StringIO()
    with mock.patch.dict(sys.modules, {'matplotlib': None}):
      with contextlib.redirect_stderr(err):
        self.run_with(np.float32([[1, 0, 0]]))
    self.assertIn("pip install 'mergejax[plots]'", err.getvalue())
    self.assertEmpty(list(self.folder.iterdir()))

  def test_layers_in_the_order_of_their_loads(self):
    """Of twelve, the tenth is not behind the first; scanned ones likewise."""
    every = {'num_experts': 3, 'decoder_layers': 12}
    layers = [f'decoder/layers_{i}' for i in range(12)]
    for settings in ({}, {'scan_layers': True}):
      found = routing_pictures.layers_of(family(12, moe=every, **settings))
      self.assertEqual(found, layers)
    left = {
      layer: {'mlp': {
        'router_entropy': np.float32(0),
        'auxiliary_loss': np.float32(0),
        'router_z_loss': np.float32(0),
        'expert_load': np.float32([i, 0, 0]),
      }}
      for i, layer in enumerate(layers)
    }  # fmt: skip
    _, metrics = moe_metrics.totals(moe_config.MoeConfig(num_experts=3), left)
    np.testing.assert_array_equal(metrics[moe_metrics.LOADS][:, 0], range(12))

  def test_what_is_never_used_is_black(self):
    """A fair share is light, more is red, less is blue."""
    made = routing_pictures.figure(
      np.float32([[0.25, 0.5, 0.25, 0.0], [0.05, 0.45, 0.25, 0.25]]), ['a', 'b']
    )
    (image,) = made.axes[0].images
    shown = image.to_rgba(image.get_array())
    np.testing.assert_array_equal(image.get_array().mask[0], [0, 0, 0, 1])
    self.assertEqual(made.axes[0].get_facecolor()[:3], (0, 0, 0))
    self.assertGreater(shown[0, 0][:3].min(), 0.9)
    self.assertGreater(shown[0, 1][0], shown[0, 1][2])
    self.assertGreater(shown[1, 0][2], shown[1, 0][0])
    pixels = routing_pictures.pixels(np.float32([[1, 0]]), ['a'])
    self.assertEqual((pixels.dtype, pixels.shape[-1]), (np.uint8, 3))


if __name__ == '__main__':
  absltest.main()
