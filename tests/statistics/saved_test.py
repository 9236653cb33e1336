# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Statistics that are saved: files, fingerprints, interrupted collections."""

import importlib.util
import json
import pathlib
import signal

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import small_batches

import mergejax as mj
from mergejax import models
from mergejax import partition
from mergejax import statistics
from mergejax.core import errors
from mergejax.merging.recipes import recipe as recipe_lib


class SavedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.module, self.batches = small_batches.tiny_images(5)
    self.params = models.family_of(self.module).init(jax.random.key(0))

  def collect(self, out=None, params=None, mask=None, **options):
    return statistics.collect(
        statistics.gram(mask=mask), self.module, params or self.params,
        self.batches, out=out, **options,
    )  # fmt: skip

  def interrupt(self, **options):
    """Leaves a collection to `out` that is killed at the third batch."""

    class Killed(Exception):
      pass

    def progress(number):
      if number == 3:
        raise Killed

    with self.assertRaises(Killed):
      self.collect(
        self.folder / 'out', save_every=2, progress=progress, **options
      )

  def test_save_and_load(self):
    found = self.collect(self.folder / 'a')
    again = statistics.load(self.folder / 'a')
    self.assertEqual(again.fingerprint, statistics.fingerprint(self.params))
    self.assertEqual(json.dumps(again.settings), json.dumps(
      json.loads((self.folder / 'a/statistics.json').read_text())
    ))  # fmt: skip
    self.assertEqual(again.keys(), found.keys())
    for path, own in found.items():
      np.testing.assert_array_equal(own['gram'], again[path]['gram'])

  def test_fingerprint(self):
    mark = statistics.fingerprint(self.params)
    for format in ('npz', 'safetensors', 'orbax'):
      path = (
        self.folder / f'{format}.npz'
        if format == 'npz'
        else self.folder / format
      )
      mj.save_checkpoint(path, self.params, format)
      self.assertEqual(statistics.fingerprint(mj.open_checkpoint(path)), mark)
    changed = jax.tree.map(lambda leaf: leaf * 1.001, self.params)
    self.assertNotEqual(statistics.fingerprint(changed), mark)

  def test_merge_refuses_statistics_of_another_model(self):
    other = jax.tree.map(lambda leaf: leaf * 1.1, self.params)
    mine = self.collect(self.folder / 'mine')
    theirs = self.collect(self.folder / 'theirs', params=other)
    mj.merge([self.params, other], 'regmean', stats=[mine, theirs])
    with self.assertRaisesRegex(errors.UserError, 'fingerprint'):
      mj.merge([self.params, other], 'regmean', stats=[theirs, mine])
    for name, tree_ in (('a', self.params), ('b', other)):
      mj.save_checkpoint(self.folder / name, tree_, 'safetensors')
    recipe = {
      'merge_method': 'regmean',
      'models': [str(self.folder / 'a'), str(self.folder / 'b')],
      'stats': [str(self.folder / 'mine'), str(self.folder / 'theirs')],
    }

    mj.plan(recipe_lib.parse_recipe(recipe))
    recipe['stats'].reverse()
    with self.assertRaisesRegex(errors.UserError, 'fingerprint'):
      mj.plan(recipe_lib.parse_recipe(recipe))

  def test_one_more_model_later(self):
    several = [
      jax.tree.map(lambda leaf, k=k: leaf * (1 + 0.1 * k), self.params)
      for k in range(3)
    ]
    parts = [self.collect(params=one) for one in several]
    weights = [1.0, 2.0, 0.5]
    joint = mj.merge(several, 'regmean', stats=parts, weights=weights)
    two = mj.merge(several[:2], 'regmean', stats=parts[:2], weights=weights[:2])
    together = statistics.combine(parts[:2], two, weights[:2])
    later = mj.merge(
        [two, several[2]], 'regmean', stats=[together, parts[2]],
        weights=[3.0, 0.5],
    )  # fmt: skip
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
      later,
      joint,
    )

  def test_killed_and_resumed_gives_the_same_bytes(self):
    whole = self.folder / 'whole'
    self.collect(whole, save_every=2)
    out = self.folder / 'out'

    class Killed(Exception):
      pass

    for stop in (1, 3, 4):

      def progress(number, stop=stop):
        if number == stop:
          raise Killed

      try:
        self.collect(out, save_every=2, progress=progress)
      except Killed:
        self.assertFalse(out.exists())
    self.collect(out, save_every=2)
    for name in ('statistics.safetensors', 'statistics.json'):
      self.assertEqual(
        (out / name).read_bytes(), (whole / name).read_bytes(), name
      )
    self.assertEqual(
      sorted(p.name for p in self.folder.iterdir()), ['out', 'whole']
    )

  def test_stopped_and_resumed_gives_the_same_bytes(self):
    whole, out = self.folder / 'whole', self.folder / 'out'
    self.collect(whole, save_every=2)

    def progress(number):
      if number == 3:
        signal.raise_signal(signal.SIGTERM)

    with self.assertRaisesRegex(errors.Stopped, 'after 3 batches'):
      self.collect(out, save_every=2, progress=progress)
    self.assertFalse(out.exists())
    numbers = []
    self.collect(out, save_every=2, progress=numbers.append)
    self.assertEqual(numbers[0], 3)
    for name in ('statistics.safetensors', 'statistics.json'):
      self.assertEqual((out / name).read_bytes(), (whole / name).read_bytes())

  def test_continuing_something_else_is_refused(self):
    self.interrupt()
    other = jax.tree.map(lambda leaf: leaf * 1.1, self.params)
    with self.assertRaisesRegex(
      errors.UserError, r'other settings:\n  model: \w+ there, \w+ asked for'
    ):
      self.collect(self.folder / 'out', params=other)

  def test_continuing_with_another_function_is_refused(self):
    def mask_of(name):
      file = self.folder / f'{name}.py'
      file.write_text(f'# {name}\ndef mask(path, batch):\n  return None\n')
      spec = importlib.util.spec_from_file_location(name, file)
      module = importlib.util.module_from_spec(spec)
      spec.loader.exec_module(module)
      return module.mask

    first, second = mask_of('first'), mask_of('second')
    self.interrupt(mask=first)
    with self.assertRaisesRegex(errors.UserError, 'source of mask: '):
      self.collect(self.folder / 'out', save_every=2, mask=second)
    self.collect(self.folder / 'out', save_every=2, mask=first)

  def test_continuing_on_other_data_is_refused(self):
    self.interrupt()
    right = self.batches
    shuffled = [right[1], right[0], *right[2:]]
    halves = [
      {name: leaf[part] for name, leaf in batch.items()}
      for batch in right
      for part in (slice(8), slice(8, 16))
    ]
    for wrong in (shuffled, halves, right[:1]):
      self.batches = wrong
      with self.assertRaisesRegex(errors.UserError, 'other data.*first 2'):
        self.collect(self.folder / 'out', save_every=2)
    # On another mesh it continues, as positions are those of whole batches.
    self.batches = right
    mesh = partition.make_mesh(data=8)
    found = self.collect(self.folder / 'out', save_every=2, mesh=mesh)
    for path, own in self.collect().items():
      self.assertEqual(found[path]['count'], own['count'])
      np.testing.assert_allclose(
        found[path]['gram'], own['gram'], rtol=1e-5, atol=1e-6
      )


if __name__ == '__main__':
  absltest.main()
