# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Logical axes by rules, and the parts that the axes of a leaf play."""

from absl.testing import absltest
import numpy as np

from mergejax.core import axes
from mergejax.core import errors
from mergejax.core import typing
from mergejax.names import t5x


def spec(*shape, names=None):
  return typing.LeafSpec(shape, np.dtype('float32'), names)


class LogicalAxesTest(absltest.TestCase):
  def test_an_unknown_kernel_is_an_error(self):
    specs = {'encoder/conv/kernel': spec(3, 3)}
    with self.assertRaisesRegex(errors.UserError, 'encoder/conv/kernel'):
      axes.logical_axes(specs, t5x.AXES)

  def test_a_stacked_kernel_needs_its_own_axes(self):
    path = 'encoder/mlp/wi/kernel'
    with self.assertRaisesRegex(errors.UserError, 'stacked'):
      axes.logical_axes({path: spec(8, 2, 16)}, t5x.AXES)
    names = ('embed', 'layers', 'mlp')
    found = axes.logical_axes({path: spec(8, 2, 16, names=names)}, t5x.AXES)
    self.assertEqual(found, {path: names})


class ViewTest(absltest.TestCase):
  def test_kernels_of_many_axes(self):
    for path, one, inputs, outputs in (
      ('Conv_0/kernel', spec(3, 3, 4, 8), (0, 1, 2), (3,)),
      ('features.0.conv.weight', spec(8, 4, 3, 3), (1, 2, 3), (0,)),
      ('layers_0/attention/query/kernel', spec(8, 2, 4), (0,), (1, 2)),
      ('layers_0/attention/out/kernel', spec(2, 4, 8), (0, 1), (2,)),
      ('layers_0/attention/key/bias', spec(2, 4), (0, 1), ()),
      ('attn/key/bias', spec(2, 4, names=('heads', 'kv')), (0, 1), ()),
      (
        'proj/kernel',
        spec(8, 2, 4, names=('inputs', 'outputs', 'outputs')),
        (0,),
        (1, 2),
      ),
      ('w', spec(2, 8, names=('outputs', 'inputs')), (1,), (0,)),
    ):
      view = axes.view(path, one)
      self.assertEqual((view.inputs, view.outputs), (inputs, outputs), path)
    stacked = spec(3, 8, 2, 4, names=('layers', 'embed', 'heads', 'kv'))
    self.assertEqual(
      axes.view('layers/attn/query/kernel', stacked), ((0,), (1,), (2, 3))
    )

  def test_what_no_name_proves_is_asked_for(self):
    for path, one in (
      ('layers/attn/query/kernel', spec(3, 8, 2, 4)),
      ('attn/query/kernel', spec(3, 8, 2, 4)),
      ('model.layers.self_attn.q_proj.weight', spec(3, 8, 8)),
      ('layers/ConvBlock_0/Conv_0/kernel', spec(3, 3, 3, 8, 8)),
      ('layers/attn/query/bias', spec(3, 8)),
      ('layers_0/proj/kernel', spec(8, 2, 4)),
      ('layers_0/attention/qkv/kernel', spec(8, 3, 2, 4)),
      ('w', spec(2, 8)),
      ('w', spec(3, 2, 8, names=('layers', 'mlp', 'embed'))),
    ):
      with self.assertRaisesRegex(
        errors.UserError, rf"axes=\[\s*\('{path}', \("
      ):
        axes.view(path, one)


if __name__ == '__main__':
  absltest.main()
