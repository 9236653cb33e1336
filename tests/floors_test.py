# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The shape of the house: imports point down, and the front door is light."""

import ast
import pathlib
import subprocess
import sys

from absl.testing import absltest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'mergejax'

# Folder or module directly below mergejax/ -> floor. Rooms of floor 1 do not
# know each other.
FLOORS = {
    'typing': 0, 'errors': 0, 'tree': 0, 'axes': 0, 'numerics': 0, 'mesh': 0,
    'registry': 0, 'checksums': 0, 'resume': 0, 'stacks': 0,
    'store': 1, 'merging': 1, 'nn': 1,
    'models': 2, 'api': 2, 'recipes': 2, 'peft': 2,
    'stats': 2, 'align': 2, 'architectures': 2,
    'train': 3, 'select': 3,
    'experts': 4, 'search': 4, 'analysis': 4,
    'data': 5, 'evaluation': 5,
    'streamed': 6,
    'run': 7, '__main__': 7, '__init__': 7,
}  # fmt: skip
APART = {'store', 'merging', 'nn'}
# Heavy or edge libraries, and the lowest floor that may import them.
LOWEST = {'seqio': 5, 'tensorflow': 5, 'clu': 5, 'matplotlib': 5, 'gin': 7}


def imported_modules(path: pathlib.Path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


class FloorsTest(absltest.TestCase):
  def test_imports_point_down(self):
    for path in sorted(PACKAGE.rglob('*.py')):
      here = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
      self.assertIn(here, FLOORS, f'{path} stands on no floor')
      for name in imported_modules(path):
        top, *rest = name.split('.')
        if top == 'mergejax' and rest:
          there = rest[0]
          self.assertLessEqual(FLOORS[there], FLOORS[here], f'{path}: {name}')
          if here in APART and there in APART:
            self.assertEqual(here, there, f'{path}: {name}')
        if top in LOWEST:
          self.assertGreaterEqual(FLOORS[here], LOWEST[top], f'{path}: {name}')
        self.assertNotIn(top, ('torch', 'transformers', 't5x'), str(path))

  def test_only_mesh_builds_meshes(self):
    for path in PACKAGE.rglob('*.py'):
      if path.name != 'mesh.py':
        self.assertNotRegex(
          path.read_text(), r'jax\.make_mesh|sharding\.Mesh\('
        )

  def test_front_door_is_light(self):
    code = (
      'import sys, mergejax; '
      "print([m for m in ('tensorflow', 'torch', 'seqio', 't5x', 'gin', "
      "'matplotlib', 'jax', 'orbax') if m in sys.modules])"
    )
    done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    self.assertEqual(done.stdout.strip(), '[]')

  def test_public_names_resolve(self):
    code = (
      'import mergejax as mj\n'
      'for name in mj.__all__: getattr(mj, name)\n'
      "import sys; print('tensorflow' in sys.modules)"
    )
    done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=True
    )
    self.assertEqual(done.stdout.strip(), 'False')

  def test_no_package_hides_gin(self):
    for folder in ('gin', 'configs', 'tests'):
      self.assertFalse((ROOT / folder / '__init__.py').exists())

  def test_every_file_has_its_licence_header(self):
    for folder in ('mergejax', 'tests', 'benchmarks'):
      for path in (ROOT / folder).rglob('*.py'):
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
