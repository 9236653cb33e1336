# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The front door and its rooms: what they name is there, typed and explained."""

import ast
import importlib
import inspect
import math
import pathlib
import re
import subprocess
import sys
import types

from absl.testing import absltest
from absl.testing import parameterized

import mergejax as mj
from mergejax.core import lazy
from mergejax.methods import named

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = (
  'models', 'methods', 'stats', 'align', 'search', 'select', 'training',
  'adapters', 'experts', 'evaluation', 'analysis', 'partition',
)  # fmt: skip
# Packages whose names load when they are first used.
LAZY = {
  package.__name__: package
  for package in (mj, *(getattr(mj, room) for room in ROOMS))
  if hasattr(package, '__path__')
}


def read_stub(package):
  """`({name: (module, attribute)}, __all__)` of the stub beside a package."""
  file = pathlib.Path(package.__file__).with_suffix('.pyi')
  places, every = {}, []
  for node in ast.parse(file.read_text()).body:
    if isinstance(node, ast.ImportFrom):
      for alias in node.names:
        places[alias.asname or alias.name] = (node.module, alias.name)
    elif isinstance(node, ast.Assign):
      every = ast.literal_eval(node.value)
  return places, every


def printed(code):
  """What a program prints, in a process of its own."""
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  return done.stdout.strip()


class PublicTest(parameterized.TestCase):
  def test_rooms_are_there(self):
    self.assertContainsSubset(ROOMS, mj.__all__)
    self.assertLen(LAZY, len(ROOMS) + 1)
    self.assertContainsSubset(
      [
        'mergejax',
        'mergejax.methods',
        'mergejax.search',
        'mergejax.evaluation',
      ],
      LAZY,
    )

  @parameterized.parameters(*LAZY)
  def test_names_are_what_the_stub_says(self, name):
    package = LAZY[name]
    places, every = read_stub(package)
    for public, (module, attribute) in places.items():
      value = (
        importlib.import_module(f'{module}.{attribute}')
        if module == name
        else getattr(importlib.import_module(module), attribute)
      )
      self.assertIs(getattr(package, public), value)
    beside = ['__version__'] if package is mj else []
    self.assertEqual(package.__all__, [*sorted(places), *beside])
    self.assertEqual(every, package.__all__)
    self.assertEqual(dir(package), sorted(package.__all__))

  def test_every_method_is_at_the_front_door(self):
    for name in named.METHODS:
      self.assertIs(getattr(mj, name), named.METHODS[name])
    self.assertNotEmpty(list(named.METHODS))

  @parameterized.parameters('mergejax', *ROOMS)
  def test_names_are_explained(self, room):
    package = mj if room == 'mergejax' else getattr(mj, room)
    self.assertGreater(len(inspect.getdoc(package) or ''), 15)
    public = getattr(package, '__all__', None) or [
      name
      for name, value in vars(package).items()
      if getattr(value, '__module__', None) == package.__name__
      and not name.startswith('_')
    ]
    self.assertNotEmpty(public)
    for name in public:
      value = getattr(package, name)
      if isinstance(value, types.ModuleType):
        self.assertNotEmpty(
          [n for n in dir(value) if not n.startswith('_')], name
        )
      if callable(value) or isinstance(value, types.ModuleType):
        explained = re.sub(r'\s+', ' ', inspect.getdoc(value) or '')
        self.assertGreater(len(explained), 15, f'{room}.{name}')

  @parameterized.parameters(*LAZY)
  def test_a_name_of_a_module_is_that_module(self, name):
    """Whoever imports the module sets the name to it."""
    package = LAZY[name]
    folder = pathlib.Path(package.__file__).parent
    for public, place in read_stub(package)[0].items():
      if (folder / f'{public}.py').exists() or (folder / public).is_dir():
        self.assertEqual(place, (name, public))

  def test_rooms_name_what_is_theirs(self):
    """And nouns of the core, which belong to every room."""
    for name, package in LAZY.items():
      for public, place in read_stub(package)[0].items():
        self.assertStartsWith(
          '.'.join(place), (f'{name}.', 'mergejax.core.'), public
        )

  def test_front_door_is_light(self):
    code = (
      'import sys, mergejax; '
      "print([m for m in ('tensorflow', 'torch', 'seqio', 't5x', 'gin', "
      "'matplotlib', 'jax', 'orbax') if m in sys.modules])"
    )
    self.assertEqual(printed(code), '[]')

  def test_public_names_resolve(self):
    code = (
      'import types, mergejax as mj\n'
      'for name in mj.__all__:\n'
      '  value = getattr(mj, name)\n'
      '  assert not isinstance(value, types.ModuleType) or value.__doc__, name\n'
      "import sys; print('tensorflow' in sys.modules)"
    )
    self.assertEqual(printed(code), 'False')

  def test_patches_and_branches_are_reached(self):
    code = (
      'import mergejax as mj; mj.experts.branch.map_experts; '
      'mj.search.patch.single; mj.search.greedy.greedy; mj.evaluation.Score; '
      'mj.evaluation.metrics.bootstrap; import sys; '
      "print([m for m in ('tensorflow', 'seqio', 'gin') if m in sys.modules])"
    )
    self.assertEqual(printed(code), '[]')

  def test_merging_needs_no_linen(self):
    code = (
      'import sys, mergejax as mj; mj.merge, mj.plan, mj.execute; '
      "print('mergejax.methods.ties' in sys.modules, 'flax.linen' in sys.modules)"
    )
    self.assertEqual(printed(code), 'True False')

  def test_types_are_shipped(self):
    self.assertTrue((ROOT / 'mergejax' / 'py.typed').exists())
    setup = (ROOT / 'setup.py').read_text()
    self.assertIn("'mergejax': ['py.typed', '**/*.pyi']", setup)

  def test_errors_have_kinds(self):
    for name in ('Recipe', 'Checkpoint', 'Structure', 'Config', 'Data'):
      self.assertTrue(issubclass(getattr(mj, f'{name}Error'), mj.UserError))
    self.assertFalse(issubclass(mj.Stopped, mj.UserError))


class LazyTest(absltest.TestCase):
  def test_an_unknown_name_has_neighbours(self):
    with self.assertRaisesRegex(AttributeError, "Did you mean 'task_arith"):
      _ = mj.task_arithmetics
    with self.assertRaises(AttributeError):
      _ = mj.search.nothing

  def test_loads_once_and_only_what_is_used(self):
    module = types.ModuleType('a_lazy_package')
    sys.modules[module.__name__] = module
    self.addCleanup(sys.modules.pop, module.__name__)
    stub = self.create_tempfile(
      '__init__.pyi',
      'from a_lazy_package import gone\n'
      'from math import e as euler\n'
      'from math import pi\n'
      "\n__all__ = ['euler', 'gone', 'pi']\n",
    ).full_path
    file = str(pathlib.Path(stub).with_suffix('.py'))
    load, names_in, every = lazy.attach(module.__name__, file)
    self.assertEqual(names_in(), ['euler', 'gone', 'pi'])
    self.assertEqual(every, ['euler', 'gone', 'pi'])
    self.assertIs(load('pi'), math.pi)
    self.assertIs(load('euler'), math.e)
    self.assertIn('pi', vars(module))
    with self.assertRaises(ModuleNotFoundError):
      load('gone')


if __name__ == '__main__':
  absltest.main()
