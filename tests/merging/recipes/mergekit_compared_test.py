# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Public recipes merged by mergekit too, where it is installed.

mergekit is found in this Python, or in the one that MERGEKIT_PYTHON names:

    MERGEKIT_PYTHON=/path/to/venv/bin/python pytest -s tests/mergekit_compared_test.py
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import unittest

from absl.testing import absltest
import numpy as np
import public_recipes
import yaml

import mergejax as mj
from mergejax.merging.recipes import mergekit_words

# Merges every recipe of a folder; writes {name: null or what went wrong}.
_RUNNER = """
import json, logging, pathlib, sys, warnings
warnings.simplefilter('ignore')
import yaml
from mergekit import config, merge, options
logging.disable(logging.ERROR)
folder, result = pathlib.Path(sys.argv[1]), {}
for file in sorted(folder.glob('*.yaml')):
  try:
    recipe = config.MergeConfiguration.model_validate(
      yaml.safe_load(file.read_text()))
    merge.run_merge(recipe, str(folder / file.stem),
                    options.MergeOptions(quiet=True, clone_tensors=True))
    result[file.stem] = None
  except Exception as error:
    result[file.stem] = f'{type(error).__name__}: {error}'
(folder / 'result.json').write_text(json.dumps(result))
"""
# Which options each method reads: those of one model, and those for all.
_WORDS = """
import json
from mergekit.merge_methods import registry
print(json.dumps({
  method.spec.name: [[p.name for p in kind] for kind in (
    method.spec.input_parameters, method.spec.shared_parameters)]
  for method in registry.registered_methods()}))
"""
PYTHON = os.environ.get('MERGEKIT_PYTHON') or (
  sys.executable if importlib.util.find_spec('mergekit') else None
)
# Largest difference in units of the last place of the result's dtype, relative
# to the largest weight: mergekit computes in that dtype, mergejax in float32.
ULPS = {'float64': 2**-23, 'float32': 2**-23, 'bfloat16': 2**-8, 'float16': 2**-11}  # fmt: skip
ALLOWED = 10


@unittest.skipUnless(PYTHON, 'mergekit is not installed')
class MergekitComparedTest(absltest.TestCase):
  def test_same_words(self):
    done = subprocess.run(
      [PYTHON, '-c', _WORDS], check=True, capture_output=True, text=True
    )
    for method, (own, shared) in json.loads(done.stdout).items():
      name = mergekit_words.METHOD_ALIASES.get(method, method)
      reads = mergekit_words.READS[name]
      self.assertCountEqual(reads[0], own, method)
      self.assertCountEqual(reads[1], shared, method)

  def test_same_numbers(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    public_recipes.save_models(folder / 'models')
    theirs, ours = folder / 'theirs', folder / 'ours'
    theirs.mkdir()
    names = {str(i): name for i, name in enumerate(public_recipes.RECIPES)}
    for stem, name in names.items():
      recipe = public_recipes.load(name, folder / 'models')
      (theirs / f'{stem}.yaml').write_text(yaml.safe_dump(recipe))
    subprocess.run(
      [PYTHON, '-c', _RUNNER, str(theirs)],
      check=True, capture_output=True, cwd=folder,
      env={**os.environ, 'HF_HUB_OFFLINE': '1', 'PYTHONPATH': ''},
    )  # fmt: skip
    run = json.loads((theirs / 'result.json').read_text())
    self.assertEqual(set(run), set(names))
    self.assertEqual({names[n]: e for n, e in run.items() if e}, {})
    apart, largest = [], 0.0
    for stem, name in names.items():
      mj.execute(
        mj.plan(public_recipes.load(name, folder / 'models')), ours / stem
      )
      if name in public_recipes.RANDOM:
        continue
      difference, bound = compared(ours / stem, theirs / stem)
      largest = max(largest, difference)
      print(f'{difference:8.1e} of {bound:8.1e}  {name}')
      if not difference <= bound:
        apart.append(f'{name}: {difference:.2e}, allowed {bound:.2e}')
    print(f'{len(names)} recipes; largest difference {largest:.1e}')
    self.assertEqual(apart, [])


def compared(ours, theirs):
  """`(largest relative difference, what rounding allows)` of two results."""
  ours, theirs = (mj.open_checkpoint(path) for path in (ours, theirs))
  a, b = (store.leaves(list(store.specs())) for store in (ours, theirs))
  if {p: x.shape for p, x in a.items()} != {p: x.shape for p, x in b.items()}:
    return np.inf, 0.0
  worst, bound = 0.0, 0.0
  for path, leaf in a.items():
    other = np.asarray(b[path], np.float64)
    leaf, dtype = np.asarray(leaf, np.float64), leaf.dtype.name
    scale = max(np.abs(other).max(), 1e-30)
    worst = max(worst, np.abs(leaf - other).max() / scale)
    bound = max(bound, ALLOWED * ULPS[dtype])
  return worst, bound


if __name__ == '__main__':
  absltest.main()
