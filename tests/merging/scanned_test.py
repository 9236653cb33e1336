# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The law of scanned models, over the table of all methods."""

import pathlib
import re
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import laws
import numpy as np
import tiers

import mergejax as mj
from mergejax.core import tree
from mergejax.merging import on_mesh
from mergejax.methods import masks
from mergejax.methods import named

FURTHER = '|'.join(name for name, _ in laws.FURTHER)
# Where the layers of each leaf of a scanned model lie; T5X has them second.
SCANNED = {'layers/kernel': 0, 'layers/bias': 0, 'enc/enc/kernel': 1}
SCANNED_AXES = (
  ('layers/kernel', ('layers', 'embed', 'mlp')),
  ('layers/bias', ('layers', 'mlp')),
  ('enc/enc/kernel', ('embed', 'layers', 'mlp')),
)


def make_layers(count):
  """Models of two layers, unscanned: `layers_0/kernel`."""
  rng = np.random.default_rng(3)
  shapes = {'kernel': (5, 3), 'bias': (3,)}
  return [
    {
      f'{scope}_{i}/{name}': rng.normal(size=shapes[name]).astype(np.float32)
      for scope, name in (path.rsplit('/', 1) for path in SCANNED)
      for i in range(2)
    }
    for _ in range(count)
  ]


def scan(model):
  """The same model with its layers stacked."""
  return {
    path: np.stack(
      [model[f'{path.rsplit("/", 1)[0]}_{i}/{path.rsplit("/", 1)[1]}']
       for i in range(2)],
      axis,
    )
    for path, axis in SCANNED.items()
  }  # fmt: skip


def make_layer_stats(row, models):
  rng = np.random.default_rng(4)
  result = []
  for model in models:
    own = {}
    for path, leaf in model.items():
      if row.stats == 'fisher':
        own[path] = {'fisher': rng.gamma(1.0, size=leaf.shape)}
      elif leaf.ndim == 2:
        x = rng.normal(size=(20, 5))
        own[path] = {'gram': x.T @ x / 20}
    result.append(jax.tree.map(lambda leaf: leaf.astype(np.float32), own))
  return result


def scan_stats(row, stats):
  """A Fisher is stacked as its leaf; Gram matrices have the stack in front."""
  kinds = {path: own[row.stats] for path, own in stats.items()}
  result = {}
  for path, axis in SCANNED.items():
    scope, name = path.rsplit('/', 1)
    if f'{scope}_0/{name}' in kinds:
      axis = axis if row.stats == 'fisher' else 0
      own = [kinds[f'{scope}_{i}/{name}'] for i in range(2)]
      result[path] = {row.stats: np.stack(own, axis)}
  return result


def on_disk(folder, row, base, count, stats):
  """The merge of checkpoints that know their axes, by a recipe without any."""
  paths = [str(folder / f'{k}') for k in range(count)]
  stats_paths = []
  for k, own in enumerate(stats or ()):
    stats_paths.append(str(folder / f'stats_{row.name}_{k}.safetensors'))
    leaves = {f'{path}/{n}': x for path, kinds in own.items()
              for n, x in kinds.items()}  # fmt: skip
    mj.save_checkpoint(stats_paths[-1], leaves, overwrite=True)
  recipe = laws.recipe_of(
    row, str(folder / 'base') if base else None, paths, stats_paths
  )
  out = folder / f'{row.name}_out'
  mj.execute(mj.plan(recipe), out)
  return mj.open_checkpoint(out)


@tiers.slow(f'test_.*_({FURTHER})')
class ScannedTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(cls.enter_context_folder())
    base, *layers = make_layers(max(row.models for row in laws.ROWS) + 1)
    for name, model in [('base', base), *enumerate(layers)]:
      mj.save_checkpoint(
        cls.folder / str(name), scan(model), 'safetensors', axes=SCANNED_AXES
      )

  @classmethod
  def enter_context_folder(cls):
    folder = tempfile.TemporaryDirectory()
    cls.addClassCleanup(folder.cleanup)
    return folder.name

  @parameterized.named_parameters(laws.ALL)
  def test_axes_come_from_the_checkpoint(self, row):
    """Nobody is told them, and a scanned model equals its layers."""
    expected, stats = self.expected(row)
    opened = lambda name: mj.open_checkpoint(self.folder / str(name))
    stores = [opened(k) for k in range(row.models)]
    merged = laws.run(row, stores, opened('base'), stats=stats, axes=())
    laws.assert_close(tree.flatten(merged), expected, 1e-7)
    method = named.resolve(row.name, **row.options)
    if row.stats is None:
      side_by_side = on_mesh.merge_experts(
        jax.tree.map(lambda *own: np.stack(own), *(s.read() for s in stores)),
        method,
        base=opened('base').read()
        if row.base or method.base == 'required'
        else None,
        weights=row.weights,
        axes=stores[0].axes(),
      )
      laws.assert_close(tree.flatten(side_by_side), expected, 2e-7)
    if any(row is one for _, one in laws.ONE):
      with_base = row.base or method.base == 'required'
      result = on_disk(self.folder, row, with_base, row.models, stats)
      found = tree.flatten(result.read())
      laws.assert_close(found, expected, max(row.tolerance, 2e-6))
      self.assertEqual(result.axes(), dict(SCANNED_AXES))

  def expected(self, row):
    """`(the merge of unscanned models, stacked; statistics of the stacks)`."""
    base, *layers = make_layers(row.models + 1)
    given = None
    if row.stats is not None:
      given = make_layer_stats(row, layers)
    real = masks.mask_key
    # Masks are drawn by name; the slices of a stack have names of their own.
    as_slice = lambda path: re.sub(r'_(\d)/(\w+)', r'/\2[\1]', path)
    keys = lambda seed, path, model: real(seed, as_slice(path), model)
    with mock.patch.object(masks, 'mask_key', keys):
      expected = scan(laws.run(row, layers, base, stats=given))
    return expected, given and [scan_stats(row, one) for one in given]

  @parameterized.named_parameters(laws.ALL)
  def test_a_scanned_model_equals_its_layers(self, row):
    """With axes to the last bits; without them the same, or an error."""
    base, *layers = make_layers(row.models + 1)
    expected, stats = self.expected(row)
    scanned, origin = [scan(m) for m in layers], scan(base)
    merged = laws.run(row, scanned, origin, stats=stats, axes=SCANNED_AXES)
    laws.assert_close(merged, expected, 1e-7)
    if row.stats is None:
      method = named.resolve(row.name, **row.options)
      side_by_side = on_mesh.merge_experts(
        jax.tree.map(lambda *leaves: np.stack(leaves), *scanned),
        method,
        base=origin if row.base or method.base == 'required' else None,
        weights=row.weights,
        axes=SCANNED_AXES,
      )
      laws.assert_close(side_by_side, expected, 2e-7)
    try:
      merged = laws.run(row, scanned, origin, stats=stats)
    except mj.UserError as error:
      for path in scanned[0]:
        self.assertIn(f'({path!r}, (', error.message)
    else:
      # A mask without axes is another draw, not another number.
      if not row.drawn:
        laws.assert_close(merged, expected, 1e-7)


if __name__ == '__main__':
  absltest.main()
