# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Logical axes beside the weights: kept, found, inherited, and defended."""

import json
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import flax.serialization
import numpy as np
import safetensors.numpy

import mergejax as mj
from mergejax.core import errors

AXES = {
  'layers/mlp/kernel': ('layers', 'embed', 'mlp'),
  'layers/mlp/bias': ('layers', 'mlp'),
}
FORMATS = (
  ('orbax', 'ck', 'orbax'),
  ('t5x', 'ck', 't5x'),
  ('safetensors_file', 'ck.safetensors', None),
  ('safetensors_folder', 'ck', 'safetensors'),
)


def model(seed=0):
  rng = np.random.default_rng(seed)
  return {
    'layers': {
      'mlp': {
        'kernel': rng.normal(size=(2, 3, 4)).astype(np.float32),
        'bias': rng.normal(size=(2, 4)).astype(np.float32),
      }
    },
    'scale': np.ones(3, np.float32),
  }


class AxesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  @parameterized.named_parameters(*FORMATS)
  def test_round_trip(self, name, format):
    path = self.folder / name
    mj.save_checkpoint(path, model(), format, axes=AXES)
    store = mj.open_checkpoint(path)
    self.assertEqual(store.axes(), AXES)
    self.assertEqual(
      store.specs()['layers/mlp/bias'].axes, AXES['layers/mlp/bias']
    )
    self.assertIsNone(store.specs()['scale'].axes)
    np.testing.assert_array_equal(
      store.read()['layers']['mlp']['bias'], model()['layers']['mlp']['bias']
    )
    # Again, and as before, without any.
    mj.save_checkpoint(path, model(), format, overwrite=True)
    self.assertEqual(mj.open_checkpoint(path).axes(), {})

  def test_others_read_the_file_as_before(self):
    path = self.folder / 'ck.safetensors'
    mj.save_checkpoint(path, model(), axes=AXES)
    found = safetensors.numpy.load_file(path)
    self.assertCountEqual(found, [*AXES, 'scale'])
    self.assertEqual(
      safetensors.safe_open(path, 'numpy').metadata()['format'], 'pt'
    )

  def test_a_step_of_a_run_knows_them(self):
    mj.save_checkpoint(
      self.folder / 'run' / '7' / 'default', model(), axes=AXES
    )
    self.assertEqual(mj.open_checkpoint(self.folder / 'run').axes(), AXES)

  def test_a_step_of_a_run_of_t5x_knows_them(self):
    step = self.folder / 'run' / 'checkpoint_7'
    step.parent.mkdir()
    mj.save_checkpoint(step, model(), 't5x', axes=AXES)
    for path in (step.parent, step, step / 'checkpoint'):
      self.assertEqual(mj.open_checkpoint(path).axes(), AXES)

  def test_what_lies_around_a_checkpoint_is_not_asked(self):
    around = self.folder / 'merged'
    mj.save_checkpoint(around, model(), 'safetensors', axes=AXES)
    mj.save_checkpoint(around / 'tree', model(), 'orbax')
    self.assertEqual(mj.open_checkpoint(around / 'tree').axes(), {})

  def test_rules_and_mistakes(self):
    rules = [(r'layers/.*kernel', AXES['layers/mlp/kernel'])]
    path = self.folder / 'ck'
    mj.save_checkpoint(path, model(), axes=rules)
    self.assertCountEqual(mj.open_checkpoint(path).axes(), list(AXES)[:1])
    save = lambda axes, name='new': mj.save_checkpoint(
      self.folder / name, model(), axes=axes
    )
    with self.assertRaisesRegex(errors.StructureError, 'one name an axis'):
      save({'scale': ('layers', 'embed')})
    with self.assertRaisesRegex(errors.StructureError, "'scale'"):
      save({'scales': ('embed',)})
    with self.assertRaisesRegex(errors.CheckpointError, 'no place'):
      save(AXES, 'new.npz')
    self.assertEqual([p.name for p in self.folder.iterdir()], ['ck'])

  def test_damage_and_strangers(self):
    path = self.folder / 'ck'
    for text, what in (
      ('{"scale": "embed"}', 'JSON object'),
      ('[', 'JSON object'),
      ('{"scale": ["layers", "embed"]}', r'scale is \[3\]'),
    ):
      mj.save_checkpoint(path, model(), overwrite=True)
      (path / 'axes.json').write_text(text)
      with self.assertRaisesRegex(errors.CheckpointError, what):
        mj.open_checkpoint(path)

  def test_the_family_of_a_config_gives_them(self):
    leaves = {
      'encoder/layers_0/mlp/wi/kernel': np.zeros((4, 8), np.float32),
      # A stack, or something of the user's: no rule tells.
      'encoder/encoder/mlp/wi/kernel': np.zeros((4, 2, 8), np.float32),
    }
    path = self.folder / 'ck'
    mj.save_checkpoint(path, leaves, config={'model_type': 't5x'})
    known = {'encoder/layers_0/mlp/wi/kernel': ('embed', 'mlp')}
    self.assertEqual(mj.open_checkpoint(path).axes(), known)
    (path / 'axes.json').unlink()  # of a checkpoint from before
    self.assertEqual(mj.open_checkpoint(path).axes(), known)
    mj.save_checkpoint(path, leaves, config={'model_type': 'x'}, overwrite=True)
    self.assertEqual(mj.open_checkpoint(path).axes(), {})

  def test_fused_experts_of_other_libraries(self):
    rng = np.random.default_rng(0)
    name = 'model.layers.0.mlp.experts.gate_up_proj'
    models = []
    for k in range(2):
      path = self.folder / f'{k}'
      leaves = {name: rng.normal(size=(2, 3, 4)).astype(np.float32)}
      mj.save_checkpoint(path, leaves, 'safetensors')
      (path / 'config.json').write_text('{"model_type": "gpt_oss"}')
      models.append(leaves)
    merged = mj.merge([str(self.folder / f'{k}') for k in range(2)], 'karcher')[
      name
    ]
    for i in range(2):
      one = mj.merge([{'w.weight': m[name][i]} for m in models], 'karcher')[
        'w.weight'
      ]
      np.testing.assert_allclose(merged[i], one, rtol=1e-6, atol=1e-7)

  def test_t5x_says_it_itself(self):
    path = self.folder / 'checkpoint_3'
    mj.save_checkpoint(path, model(), 't5x')
    file = path / 'checkpoint'
    data = flax.serialization.msgpack_restore(file.read_bytes())
    names = lambda *own: {'names': {str(i): n for i, n in enumerate(own)}}
    mlp = {
      'kernel_axes': names('layers', 'embed', 'mlp'),
      'bias_axes': names('layers', None),
    }
    data['optimizer']['flax_mutables'] = {
      'params_axes': {'layers': {'mlp': mlp}}
    }
    file.write_bytes(flax.serialization.msgpack_serialize(data))
    store = mj.open_checkpoint(path)
    self.assertEqual(
      store.axes(),
      {**AXES, 'layers/mlp/bias': ('layers', 'unnamed')},
    )
    self.assertNotIn('left_out', store.provenance)

  def test_merges_use_and_keep_them(self):
    recipe = {
      'merge_method': 'karcher',
      'models': [{'model': str(self.folder / f'{k}')} for k in range(2)],
    }  # fmt: skip
    for k in range(2):
      mj.save_checkpoint(
        self.folder / f'{k}', model(k), 'safetensors', axes=AXES
      )
    for name in ('out', 'out.safetensors', 'orbax'):
      format = 'orbax' if name == 'orbax' else None
      mj.execute(mj.plan(recipe), self.folder / name, format=format)
      found = mj.open_checkpoint(self.folder / name)
      self.assertEqual(found.axes(), AXES, name)
    # What a user says comes first: one parameter, not a stack.
    own = [['layers/mlp/kernel', ['one', 'inputs', 'outputs']]]
    mj.execute(mj.plan({**recipe, 'axes': own}), self.folder / 'own')
    other = mj.open_checkpoint(self.folder / 'own')
    self.assertEqual(other.axes()['layers/mlp/kernel'], tuple(own[0][1]))
    kernels = [s.read()['layers']['mlp']['kernel'] for s in (found, other)]
    self.assertGreater(np.abs(kernels[0] - kernels[1]).max(), 1e-3)
    paths = [str(self.folder / f'{k}') for k in range(2)]
    merged = mj.merge(paths, 'karcher', axes=[tuple(own[0])])
    np.testing.assert_allclose(
      merged['layers']['mlp']['kernel'], kernels[1], rtol=1e-5
    )

  def test_models_that_stack_differently_do_not_merge(self):
    square = {'w': np.ones((2, 2, 3), np.float32)}
    for k, axes in enumerate(
      (('layers', 'embed', 'mlp'), ('embed', 'layers', 'mlp'))
    ):
      mj.save_checkpoint(self.folder / f'{k}', square, axes={'w': axes})
    paths = [str(self.folder / f'{k}') for k in range(2)]
    with self.assertRaisesRegex(mj.UserError, 'stack layers differently'):
      mj.merge(paths, 'linear')
    recipe = {
      'merge_method': 'linear', 'models': [{'model': p} for p in paths]
    }  # fmt: skip
    with self.assertRaisesRegex(mj.UserError, 'stack layers differently'):
      mj.plan(recipe)
    # One that does not say takes the other's word.
    mj.save_checkpoint(self.folder / '1', square, overwrite=True)
    self.assertIsNotNone(mj.plan(recipe).tasks[0].spec.axes)
    self.assertEqual(json.loads((self.folder / '0' / 'axes.json').read_text()),
                     {'w': ['layers', 'embed', 'mlp']})  # fmt: skip

  def test_models_of_which_one_is_transposed_do_not_merge(self):
    square = {'w': np.ones((3, 3), np.float32)}
    for k, axes in enumerate((('inputs', 'outputs'), ('outputs', 'inputs'))):
      mj.save_checkpoint(self.folder / f'{k}', square, axes={'w': axes})
    paths = [str(self.folder / f'{k}') for k in range(2)]
    with self.assertRaisesRegex(mj.UserError, 'one is transposed'):
      mj.merge(paths, 'linear')
    with self.assertRaisesRegex(mj.UserError, 'one is transposed'):
      mj.plan({'merge_method': 'linear', 'models': paths})


if __name__ == '__main__':
  absltest.main()
