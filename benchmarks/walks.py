# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How often one parameter changes files on its way through the package.

    python benchmarks/walks.py

A profile hook notes every call of a function of mergejax, in each thread. A
move is a call in another file than the call before it in the same thread. Each
journey runs over models of one, two and three kernels, after a run that
compiles; the difference is what one kernel more costs, from its header to its
place in the result, its planning included and whatever is done once for a model
left out.
"""

import collections
from collections.abc import Callable
import contextlib
import io
import os
import pathlib
import sys
import tempfile
import threading

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import flax.linen as nn
import jax
import numpy as np

import mergejax as mj
from mergejax.cli import main as command
from mergejax.cli import merge as merge_command

_PACKAGE = str(pathlib.Path(mj.__file__).parent) + os.sep


def walk(
  run: Callable[[], object], *, threads: bool = True
) -> tuple[int, int, collections.Counter]:
  """`(calls, moves, calls by file)` of a function, and of threads it starts."""
  walks: dict[int, list[str]] = collections.defaultdict(list)

  def note(frame, event, argument):
    del argument
    file = frame.f_code.co_filename
    if event == 'call' and file.startswith(_PACKAGE):
      walks[threading.get_ident()].append(file[len(_PACKAGE) :])

  if threads:
    threading.setprofile(note)
  sys.setprofile(note)
  try:
    run()
  finally:
    sys.setprofile(None)
    threading.setprofile(None)
  moves = sum(
    before != after
    for files in walks.values()
    for before, after in zip(files, files[1:])
  )
  visited = collections.Counter(f for files in walks.values() for f in files)
  return sum(visited.values()), moves, visited


def of_one_more(journey: Callable[[int], Callable[[], object]], name: str):
  """Prints what one kernel more costs a journey over so many kernels."""
  found = []
  for count in (1, 3):
    journey(count)()  # compiles
    found.append(walk(journey(count)))
  (calls, moves, before), (more_calls, more_moves, after) = found
  share = lambda few, many: round((many - few) / 2)
  print(
    f'{name:<36}{share(calls, more_calls):>6} calls'
    f'{share(moves, more_moves):>6} moves     (all of a model of one kernel: '
    f'{calls}, {moves})'
  )
  visits = {file: share(before[file], n) for file, n in after.items()}
  for file, n in sorted(visits.items(), key=lambda pair: -pair[1])[:12]:
    print(f'    {n:>5}  {file}')
  return share(moves, more_moves)


def on_disk(folder: pathlib.Path, method: str, models: int, with_base: bool):
  """The journey of `mergejax merge`, safetensors to safetensors."""
  runs = iter(range(1000))

  def journey(count):
    rng = np.random.default_rng(0)
    here = folder / f'{method}_{next(runs)}'
    here.mkdir()
    paths = []
    for k in range(models + with_base):
      tree = {f'{i}/kernel': rng.normal(size=(8, 4)) for i in range(count)}
      paths.append(str(here / f'{k}.safetensors'))
      mj.save_checkpoint(paths[-1], jax.tree.map(np.float32, tree))
    base = f'base_model: {paths.pop(0)}\n' if with_base else ''
    lines = ''.join(
      f'  - model: {p}\n    parameters: {{weight: 1.0}}\n' for p in paths
    )
    recipe = here / 'recipe.yaml'
    recipe.write_text(f'merge_method: {method}\n{base}models:\n{lines}')

    def run():
      with contextlib.redirect_stdout(io.StringIO()):
        with contextlib.redirect_stderr(io.StringIO()):
          merge_command.main([str(recipe), str(here / 'out.safetensors')])

    return run

  return journey


class _Stack(nn.Module):
  layers: int

  @nn.compact
  def __call__(self, x):
    for i in range(self.layers):
      x = nn.Dense(4, use_bias=False, name=f'layers_{i}')(x)
    return x


def regmean(part: str):
  """The journeys of Gram matrices: collected of two models, then merged."""

  def journey(count):
    module = _Stack(count)
    batch = {'x': np.ones((8, 4), np.float32)}
    models = [
      module.init(jax.random.key(k), batch['x'])['params'] for k in range(2)
    ]
    apply = lambda module, params, batch: module.apply(
      {'params': params}, batch['x'], mutable=['intermediates']
    )[1]
    mask = lambda path, batch: np.ones(8, np.float32)
    statistic = mj.stats.gram(apply=apply, mask=mask)
    collect = lambda: [
      mj.stats.collect(statistic, module, model, [batch]) for model in models
    ]
    if part == 'collect':
      return collect
    stats = collect()
    return lambda: mj.merge(models, 'regmean', stats=stats, alpha=0.5)

  return journey


def training(folder: pathlib.Path, layers: int):
  """`mergejax train` for one step: a batch from text to loss and update."""
  data, model = folder / 'train.tsv', folder / 'model.gin'
  data.write_text(
    'sentence\tlabel\n' + ''.join(f'word {i}\tx\n' for i in range(64))
  )
  model.write_text(
    'from __gin__ import dynamic_registration\n'
    'from mergejax.nn import t5\n'
    "include 'models/t5_1_1_tiny.gin'\n"
    f't5.T5Config.num_encoder_layers = {layers}\n'
    f't5.T5Config.num_decoder_layers = {layers}\n'
  )
  gin_root = pathlib.Path(__file__).parents[1] / 'gin'
  arguments = [
    'train', f'--gin_file={gin_root / "runs/text_to_text.gin"}',
    f'--gin_file={model}', f'--gin_search_paths={gin_root}',
    f'--gin.TRAIN_FILE={str(data)!r}', "--gin.INPUTS='{sentence}'",
    "--gin.TARGETS='{label}'",
    f'--gin.MODEL_DIR={str(folder / f"trained_{layers}")!r}',
    '--gin.TRAIN_STEPS=1', '--gin.BATCH_SIZE=8',
    "--gin.LENGTHS={'inputs': 16, 'targets': 8}",
  ]  # fmt: skip

  def run():
    with contextlib.redirect_stdout(io.StringIO()):
      with contextlib.redirect_stderr(io.StringIO()):
        command.main(arguments)

  # Threads read ahead and write behind, as much as there is time for.
  calls, moves, visited = walk(run, threads=False)
  print(
    f'a batch through mergejax train, T5 of {layers} + {layers} layers: {calls} '
    f'calls {moves} moves (whole run, of which in experts/: '
    f'{sum(n for file, n in visited.items() if file.startswith("experts"))})'
  )
  for file, n in visited.most_common(12):
    print(f'    {n:>5}  {file}')


def main():
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    of_one_more(on_disk(folder, 'linear', 2, False), 'merge linear, 2 models')
    of_one_more(on_disk(folder, 'ties', 2, True), 'merge ties, 2 models, base')
    collected = of_one_more(regmean('collect'), 'collect gram of 2 models')
    merged = of_one_more(regmean('merge'), 'merge regmean in memory')
    print(f'collect and regmean: {collected + merged} moves')
    for layers in (1, 4):
      training(folder, layers)


if __name__ == '__main__':
  main()
