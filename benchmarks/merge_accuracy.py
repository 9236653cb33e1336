# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Numbers of `mergejax merge` against mergekit's, and of both against float64.

1. Agreement: the same recipe file through both, per method: the largest
   difference in units in the last place (ulp) of bfloat16, and how many
   entries differ at all. Sums in float32 on both sides (`dtype: float32`,
   `out_dtype: bfloat16`).
2. Precision: eight bfloat16 models, base + 1e-3 noise, `dtype: bfloat16` as
   most recipes say: error of both against a float64 oracle, in ulp.

Usage:
  python benchmarks/merge_accuracy.py --mergekit PATH/mergekit-yaml [--json FILE]
"""

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

import merge_speed
import ml_dtypes
import numpy as np
import safetensors.numpy

import mergejax as mj
from mergejax.core import tree

merge_speed.SIZES['small'] = (500, 128, 352, 4)
# method -> (models besides the base, base, settings of a model, of all).
AGREEMENT = {
  'linear': ('abc', None, {'weight': [1.0, 0.5, 0.25]}, {}),
  'slerp': ('ab', 'a', {}, {'t': 0.4}),
  'nuslerp': ('ab', 'base', {'weight': [1.0, 0.5]}, {}),
  'task_arithmetic': ('abc', 'base', {'weight': [1.0, 0.5, 0.25]}, {}),
  'ties': ('abc', 'base', {'weight': [1.0, 0.5, 0.25]}, {'density': 0.4}),
  'breadcrumbs': (
    'abc', 'base', {'weight': [1.0, 0.5, 0.25]},
    {'density': 0.6, 'gamma': 0.05},
  ),
  'model_stock': ('abc', 'base', {}, {}),
  'sce': ('abc', 'base', {}, {'select_topk': 0.5}),
  'karcher': ('abc', None, {}, {}),
}  # fmt: skip


def write(folder, name, model, size):
  target = folder / name
  target.mkdir()
  safetensors.numpy.save_file(
    model, target / 'model.safetensors', metadata={'format': 'pt'}
  )
  config = merge_speed.config(size)
  (target / 'config.json').write_text(json.dumps(config))


def models(count: int, dtype) -> dict[str, dict[str, np.ndarray]]:
  """A base and `count` models of tiny differences."""
  result = {name: {} for name in ('base', *'abcdefgh'[:count])}
  for i, (path, shape) in enumerate(merge_speed.shapes('small').items()):
    rng = np.random.default_rng(i)
    base = rng.normal(size=shape) * 0.02
    result['base'][path] = base.astype(dtype)
    for name in 'abcdefgh'[:count]:
      noise = rng.normal(size=shape) * 1e-3
      result[name][path] = (base + noise).astype(dtype)
  return result


def recipe(folder, method, names, base, own, shared, **more):
  entries = []
  for k, name in enumerate(names):
    entry = {'model': str(folder / name)}
    if own:
      entry['parameters'] = {key: values[k] for key, values in own.items()}
    entries.append(entry)
  data = {
    'merge_method': method,
    'models': entries,
    'parameters': shared,
    **more,
  }
  if base:
    data['base_model'] = str(folder / base)
  file = folder / f'{method}.yaml'
  file.write_text(json.dumps(data))  # JSON is YAML
  return file


def both(folder, file, mergekit):
  """The result of both sides as `{path: array}`."""
  results = []
  for side, command in (
    ('ours', [sys.executable, '-m', 'mergejax', 'merge']),
    ('mergekit', [mergekit, '--quiet']),
  ):
    out = folder / f'out-{side}'
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(
      [*command, str(file), str(out)], check=True, capture_output=True
    )
    results.append(tree.flatten(mj.open_checkpoint(out).read()))
  return results


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Distance of bfloat16 numbers in units in the last place."""

  def order(x):
    bits = x.view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)

  return np.abs(order(a) - order(b))


def agreement(folder, mergekit):
  rows = {}
  print(f'{"method":<18}{"max ulp":>9}{"differing":>14}{"beyond 1 ulp":>14}')
  for method, (names, base, own, shared) in AGREEMENT.items():
    file = recipe(
      folder, method, names, base, own, shared,
      dtype='float32', out_dtype='bfloat16',
    )  # fmt: skip
    ours, theirs = both(folder, file, mergekit)
    assert ours.keys() == theirs.keys()
    off = np.concatenate([ulps(ours[p], theirs[p]).ravel() for p in ours])
    rows[method] = {
      'max_ulp': int(off.max()),
      'differing': float(np.mean(off > 0)),
      'beyond_one': int(np.count_nonzero(off > 1)),
      'entries': int(off.size),
    }
    print(
      f'{method:<18}{off.max():>9}{np.mean(off > 0):>14.2e}'
      f'{np.count_nonzero(off > 1):>14}'
    )
    for path in ours:
      for at in np.argwhere(ulps(ours[path], theirs[path]) > 1)[:3]:
        pair = [float(side[path][tuple(at)]) for side in (ours, theirs)]
        rows[method].setdefault('examples', []).append(
          [path, at.tolist(), *pair]
        )
        print(f'  {path} {at.tolist()}: ours {pair[0]}, mergekit {pair[1]}')
  return rows


def precision(folder, mergekit, made):
  """Root mean square and largest error in bfloat16 ulp of the exact result."""
  names = 'abcdefgh'
  rows = {}
  print(f'\n{"":<18}{"rms ulp ours":>14}{"mergekit":>10}{"max ours":>10}{"mergekit":>10}')  # fmt: skip
  for method in ('linear', 'task_arithmetic'):
    weight = [0.3] * 8 if method == 'task_arithmetic' else [1.0] * 8
    base = 'base' if method == 'task_arithmetic' else None
    file = recipe(
      folder, method, names, base, {'weight': weight}, {}, dtype='bfloat16'
    )
    results = both(folder, file, mergekit)
    errors = [[], []]
    for path, origin in made['base'].items():
      wide = [made[n][path].astype(np.float64) for n in names]
      if method == 'linear':
        exact = sum(wide) / 8
      else:
        start = origin.astype(np.float64)
        exact = start + sum(0.3 * (w - start) for w in wide)
      # Where terms cancel to almost nothing, the unit is that of the terms.
      size = np.maximum(np.abs(exact), np.abs(origin.astype(np.float64)))
      unit = 2.0 ** (np.floor(np.log2(size)) - 7)
      for side, result in zip(errors, results):
        side.append(((result[path].astype(np.float64) - exact) / unit).ravel())
    flat = [np.concatenate(side) for side in errors]
    rms = [float(np.sqrt(np.mean(np.square(f)))) for f in flat]
    worst = [float(np.max(np.abs(f))) for f in flat]
    rows[method] = {'rms_ulp': rms, 'max_ulp': worst}
    print(f'{method:<18}{rms[0]:>14.3f}{rms[1]:>10.3f}{worst[0]:>10.2f}{worst[1]:>10.2f}')  # fmt: skip
  return rows


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--mergekit', required=True)
  parser.add_argument('--json')
  options = parser.parse_args()
  result = {'machine': merge_speed.machine()}
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name) / 'agreement'
    folder.mkdir()
    # Unrelated directions would hide differences of the spherical methods;
    # float32 sources have no equal magnitudes to break ties among.
    for k, model in models(3, np.float32).items():
      write(folder, k, model, 'small')
    result['agreement'] = agreement(folder, options.mergekit)
    folder = pathlib.Path(name) / 'precision'
    folder.mkdir()
    made = models(8, ml_dtypes.bfloat16)
    for k, model in made.items():
      write(folder, k, model, 'small')
    result['precision'] = precision(folder, options.mergekit, made)
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + '\n')
  print(json.dumps(result))


if __name__ == '__main__':
  main()
