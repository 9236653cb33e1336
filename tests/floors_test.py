# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The shape of the house: imports point down, those of stubs too."""

import ast
import pathlib

from absl.testing import absltest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'mergejax'

# Folder or module directly below mergejax/ -> floor. Rooms of one floor do not
# know each other.
FLOORS = {
    'core': 0,
    'partition': 1, 'names': 1,
    'checkpoints': 2, 'nn': 2, 'methods': 2,
    'models': 3,
    'intercept': 4, 't5x_adapter': 4,
    'adapters': 5, 'data': 5, 'statistics': 5,
    'merging': 6, 'align': 6,
    'training': 7,
    'experts': 8, 'select': 8,
    'evaluation': 9, 'pods': 9,
    'search': 10,
    'analysis': 11,
    'cli': 12, '__main__': 13, '__init__': 13,
}  # fmt: skip
# Heavy or edge libraries, and the lowest floor that may import them.
LOWEST = {'seqio': 5, 'tensorflow': 5, 'clu': 5, 'matplotlib': 5, 'gin': 12}


def room_of(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).parts[0].split('.')[0]


def imported_modules(path: pathlib.Path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)
    elif isinstance(node, ast.Call):
      # importlib.import_module('mergejax.room.module')
      if getattr(node.func, 'attr', None) == 'import_module':
        first = node.args[0]
        if isinstance(first, ast.Constant):
          yield first.value


class FloorsTest(absltest.TestCase):
  def test_imports_point_down(self):
    paths = sorted(PACKAGE.rglob('*.py'))
    self.assertGreater(len(paths), 150)
    # Public names that load when they are used are imports of the stubs.
    paths += sorted(PACKAGE.rglob('*.pyi'))
    rooms = {room_of(path) for path in paths}
    self.assertEqual(rooms, set(FLOORS))
    arrows = 0
    for path in paths:
      here = room_of(path)
      self.assertIn(here, FLOORS, f'{path} stands on no floor')
      for name in imported_modules(path):
        top, *rest = name.split('.')
        if top == 'mergejax' and rest:
          there = rest[0]
          if here != there:
            self.assertLess(FLOORS[there], FLOORS[here], f'{path}: {name}')
            arrows += 1
        if top in LOWEST:
          self.assertGreaterEqual(FLOORS[here], LOWEST[top], f'{path}: {name}')
        self.assertNotIn(top, ('torch', 'transformers'), str(path))
        if here != 't5x_adapter':
          self.assertNotEqual(top, 't5x', str(path))
    self.assertGreater(arrows, 500)  # or none was looked at

  def test_only_partition_builds_meshes(self):
    for path in PACKAGE.rglob('*.py'):
      if path != PACKAGE / 'partition' / 'meshes.py':
        self.assertNotRegex(
          path.read_text(), r'jax\.make_mesh|sharding\.Mesh\('
        )

  def test_no_package_hides_gin(self):
    for folder in ('gin', 'configs', 'tests'):
      self.assertFalse((ROOT / folder / '__init__.py').exists())

  def test_every_file_has_its_licence_header(self):
    for folder in ('mergejax', 'tests', 'benchmarks'):
      files = [*(ROOT / folder).rglob('*.py'), *(ROOT / folder).rglob('*.pyi')]
      self.assertGreater(len(files), 5)
      for path in files:
        lines = path.read_text().splitlines()[:2]
        self.assertEqual(
          lines,
          [
            '# Copyright 2026 The mergejax Authors.',
            '# SPDX-License-Identifier: Apache-2.0',
          ],
          str(path),
        )


if __name__ == '__main__':
  absltest.main()
