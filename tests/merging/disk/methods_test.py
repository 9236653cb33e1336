# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Methods from outside the package, and methods as values, merge on disk."""

import errno
import importlib
import os
import pathlib
import sys
import textwrap
from unittest import mock

from absl.testing import absltest
import numpy as np

import mergejax as mj
from mergejax.core import errors
from mergejax.core import registry
from mergejax.merging.disk import work_folder
from mergejax.merging.recipes import recipe as recipe_lib
from mergejax.methods import entries
from mergejax.methods import named
from mergejax.methods import ties

SHRINK = '''
  from typing import Any

  import jax.numpy as jnp

  from mergejax.methods import base

  BUILT = []


  def shrink(*, by: Any, rounds: int = 1, loud: bool = False) -> base.Merge:
    """Adds task vectors divided by their size and a constant."""
    BUILT.append((by, rounds, loud))

    def measure(leaves, origin, contexts, weights):
      return [jnp.sum(jnp.abs(leaf - origin)) for leaf in leaves]

    def conclude(found, contexts, weights):
      return [{'size': one} for one in found]

    def update(state, leaf, origin, weight, context):
      factor = base.of_model(by, context, leaf.dtype) ** rounds
      delta = (leaf - origin) / (1 + context.note['size'])
      return state + weight * factor * delta

    return base.leafwise(
      lambda zeros: zeros,
      update,
      lambda state, origin: origin + state,
      first_passes=(base.FirstPass(measure, conclude),),
      base='required',
    )


  def number():
    return 3
'''


def shrunk(base, models, by, rounds=1):
  """What `shrink` gives, in float64."""
  result = np.asarray(base, np.float64)
  for k, model in enumerate(models):
    delta = model.astype(np.float64) - base
    factor = (by[k] if isinstance(by, list) else by) ** rounds
    result = result + factor * delta / (1 + np.abs(delta).sum())
  return result


class MethodsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    # A name of its own: what is imported stays.
    self.module = f'outside_{self.id().rsplit(".")[-1]}'
    file = self.folder / f'{self.module}.py'
    file.write_text(textwrap.dedent(SHRINK))
    sys.path.insert(0, str(self.folder))
    self.addCleanup(sys.path.remove, str(self.folder))
    rng = np.random.default_rng(0)
    self.trees = [
      {
        f'{i}/kernel': rng.normal(size=(5, 3)).astype(np.float32)
        for i in range(3)
      }
      for _ in range(3)
    ]
    self.paths = [str(self.folder / f'{k}.safetensors') for k in range(3)]
    for path, tree in zip(self.paths, self.trees):
      mj.save_checkpoint(path, tree)

  def recipe(self, method, **more):
    base, *models = self.paths
    entries_ = [{'model': path} for path in models]
    data = {'merge_method': method, 'base_model': base, 'models': entries_}
    return {**data, **more}

  def merged(self, recipe, name='out', **kwargs):
    out = self.folder / f'{name}.safetensors'
    mj.execute(mj.plan(recipe, **kwargs), out)
    leaves = mj.open_checkpoint(out).leaves([f'{i}/kernel' for i in range(3)])
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}

  def test_a_function_of_another_module_merges_on_disk(self):
    name = f'{self.module}:shrink'
    recipe = self.recipe(name, parameters={'by': 0.5, 'rounds': 2})
    merged = self.merged(recipe)
    base, *models = self.trees
    for path, leaf in merged.items():
      wanted = shrunk(base[path], [m[path] for m in models], 0.5, 2)
      np.testing.assert_allclose(leaf, wanted, rtol=1e-6, atol=1e-6)
    in_memory = mj.merge(models, name, base=base, by=0.5, rounds=2)
    for path, leaf in merged.items():
      np.testing.assert_array_equal(leaf, in_memory[path])

  def test_its_options_may_differ_by_model_and_by_rule(self):
    name = f'{self.module}:shrink'
    recipe = self.recipe(
      'task_arithmetic',
      rules=[{'match': '1/.*', 'method': name, 'parameters': {'by': 2}}],
    )
    recipe['models'][0]['parameters'] = {'weight': 1.0}
    merged = self.merged(recipe)
    base, *models = self.trees
    path = '1/kernel'
    wanted = shrunk(base[path], [m[path] for m in models], 2.0)
    np.testing.assert_allclose(merged[path], wanted, rtol=1e-6, atol=1e-6)
    recipe = self.recipe(name)
    for entry, by in zip(recipe['models'], (0.25, 0.75)):
      entry['parameters'] = {'by': by}
    merged = self.merged(recipe, 'each')
    wanted = shrunk(base[path], [m[path] for m in models], [0.25, 0.75])
    np.testing.assert_allclose(merged[path], wanted, rtol=1e-6, atol=1e-6)

  def test_a_mistake_in_its_name_or_options_is_told(self):
    for method, parameters, pattern in (
      ('no_such_module:fn', {}, 'cannot be imported'),
      (f'{self.module}:shrnk', {}, "Did you mean 'shrink'"),
      (f'{self.module}:shrink', {}, "needs 'by'"),
      (f'{self.module}:shrink', {'by': 1, 'round': 2}, "mean 'rounds'"),
      (f'{self.module}:shrink', {'by': 1, 'rounds': 'x'}, 'whole number'),
      (f'{self.module}:shrink', {'by': 1, 'loud': 3}, 'true or false'),
      (f'{self.module}:number', {}, 'should return a Merge'),
    ):
      recipe = self.recipe(method, parameters=parameters)
      with self.assertRaisesRegex(errors.UserError, pattern):
        mj.plan(recipe)

  def test_a_recipe_in_a_sandbox_imports_nothing(self):
    recipe = self.recipe(f'{self.module}:shrink', parameters={'by': 1})
    with self.assertRaisesRegex(errors.RecipeError, 'sandbox'):
      mj.plan(recipe, sandbox=self.folder)
    self.assertNotIn(self.module, sys.modules)
    with self.assertRaisesRegex(errors.RecipeError, 'sandbox'):
      mj.plan(recipe_lib.parse_recipe(recipe), sandbox=self.folder)

  def test_its_source_is_part_of_the_plan(self):
    recipe = self.recipe(f'{self.module}:shrink', parameters={'by': 1})
    before = mj.plan(recipe).identity
    self.assertEqual(mj.plan(recipe).identity, before)
    file = self.folder / f'{self.module}.py'
    file.write_text(file.read_text() + '# another version\n')
    # What is loaded computes the numbers, not what the file says since.
    self.assertEqual(mj.plan(recipe).identity, before)
    importlib.reload(sys.modules[self.module])
    self.assertNotEqual(mj.plan(recipe).identity, before)

  def test_a_module_that_is_loaded_again_merges_as_it_says_now(self):
    name = f'{self.module}:number'
    file = self.folder / f'{self.module}.py'
    text = file.read_text()
    for scale in (0.5, 3.0):
      file.write_text(
        f'import mergejax as mj\n{text}\n\ndef number():\n'
        f'  return mj.task_arithmetic(scale={scale})\n'
      )
      if self.module in sys.modules:
        os.utime(file, (1, 1))  # a time that no cache has
        importlib.reload(sys.modules[self.module])
      base, *models = self.trees
      wanted = mj.merge(models, mj.task_arithmetic(scale=scale), base=base)
      merged = self.merged(self.recipe(name), f'by_{scale}')
      for found in (merged, mj.merge(models, name, base=base)):
        for path in wanted:
          np.testing.assert_allclose(found[path], wanted[path], rtol=1e-6)

  def test_an_option_without_annotation_may_be_counted_with(self):
    file = self.folder / f'{self.module}.py'
    file.write_text("""
import functools
import mergejax as mj

def halved(*, times=1):
  return mj.task_arithmetic(scale=0.5 ** len(range(times)))

twice = functools.partial(halved, times=2)
built_in = len
""")
    base, *models = self.trees
    wanted = mj.merge(models, mj.task_arithmetic(scale=0.25), base=base)
    recipe = self.recipe(f'{self.module}:halved', parameters={'times': 2})
    for i, data in enumerate((recipe, self.recipe(f'{self.module}:twice'))):
      for path, leaf in self.merged(data, f'out_{i}').items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-6)
    with self.assertRaisesRegex(errors.ConfigError, 'write it as a function'):
      mj.merge(models, f'{self.module}:built_in')

  def test_a_value_merges_on_disk_as_in_memory(self):
    base, *models = self.trees
    method = mj.ties(density=0.3, trim_scope='tensor')
    merged = self.merged(self.recipe(method), identity='ties 0.3')
    wanted = mj.merge(models, method, base=base)
    for path, leaf in merged.items():
      np.testing.assert_array_equal(leaf, wanted[path])
    # Known again by what its maker calls it, in this process and another.
    plan = mj.plan(self.recipe(method), identity='ties 0.3')
    report = mj.execute(plan, self.folder / 'out.safetensors')
    self.assertEqual(report.computed, 0)
    other = mj.plan(self.recipe(method), identity='ties 0.4')
    with self.assertRaisesRegex(errors.CheckpointError, 'already exists'):
      mj.execute(other, self.folder / 'out.safetensors')

  def test_a_value_takes_no_options_but_weights(self):
    recipe = self.recipe(mj.linear(normalize=False))
    for entry, weight in zip(recipe['models'], (1.0, -2.0)):
      entry['parameters'] = {'weight': weight}
    merged = self.merged(recipe)
    _, a, b = self.trees
    for path, leaf in merged.items():
      np.testing.assert_allclose(leaf, a[path] - 2 * b[path], atol=1e-6)
    for option in ('density', 'normalise', 'normalize', 'far_away'):
      recipe['parameters'] = {option: 0.5}
      with self.assertRaisesRegex(errors.RecipeError, option):
        mj.plan(recipe)

  def test_a_value_without_identity_is_never_taken_for_another(self):
    plan = lambda: mj.plan(self.recipe(mj.linear()))
    out = self.folder / 'out.safetensors'
    first = plan()
    mj.execute(first, out)
    self.assertEqual(mj.execute(first, out).computed, 0)
    with self.assertRaisesRegex(errors.CheckpointError, 'identity='):
      mj.execute(plan(), out)
    out.unlink()
    full = OSError(errno.ENOSPC, 'full')
    with mock.patch.object(work_folder.WorkFolder, 'note', side_effect=full):
      with self.assertRaisesRegex(errors.CheckpointError, 'free some space'):
        mj.execute(plan(), out)
    with self.assertRaisesRegex(errors.CheckpointError, 'identity='):
      mj.execute(plan(), out)
    mj.execute(plan(), out, resume=False)

  def test_a_method_is_built_once_for_all_parameters_of_one_setting(self):
    built = []
    constructor = ties.ties

    def counted(**options):
      built.append(options)
      return constructor(**options)

    entry = named.METHODS.entry('ties')
    self.addCleanup(object.__setattr__, entry, 'constructor', constructor)
    self.assertIn('density', entry.options)  # of the signature
    object.__setattr__(entry, 'constructor', counted)
    recipe = self.recipe('ties', parameters={'density': 0.5})
    plan = mj.plan(recipe)
    plan.describe()
    self.assertLen(built, 1)
    self.assertLen({id(task.settings) for task in plan.tasks}, 1)
    mj.execute(plan, self.folder / 'a.safetensors')
    mj.execute(plan, self.folder / 'b.safetensors')
    # Once more for each program that is compiled, whatever the parameters.
    self.assertLess(len(built), 6)

  def test_entries_say_what_the_methods_are(self):
    for name in named.METHODS:
      entry = named.METHODS.entry(name)
      needed = {
        n: entries._VALUES[o.kind]
        for n, o in entry.options.items()
        if o.default is o.empty
      }
      self.assertEqual(entry.base, entry.build(**needed).base, name)
      traits = [*entry.counted, *entry.recipe_defaults]
      traits += [entry.averages] if isinstance(entry.averages, str) else []
      self.assertContainsSubset(traits, entry.options, name)

  def test_a_method_of_the_menu_says_what_it_wants_of_a_base(self):
    with self.assertRaisesRegex(ValueError, 'wants of a base'):
      entries.register('nothing_said')

  def test_import_paths(self):
    self.assertTrue(registry.is_import_path('a.b:c'))
    for name in ('ties', 'a:b:c', 'a b:c', ':c', 'a:', 'C:\\models'):
      self.assertFalse(registry.is_import_path(name), name)


if __name__ == '__main__':
  absltest.main()
