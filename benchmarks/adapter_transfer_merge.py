# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Four LoRA experts of one base merged, for `adapter_transfer.py`.

Each is trained on one of four tasks and written in PEFT's files. They are merged
as adapters, by what they change: no product of the base is read or written.
Scales are searched on validation data of the four tasks.
"""

from collections.abc import Callable
import functools
import pathlib
import tempfile

import adapter_transfer_data as data_lib
import jax
import jax.numpy as jnp
import numpy as np
import real_data

import mergejax as mj
from mergejax import adapters
from mergejax.adapters import tensors
from mergejax.search import grid
from mergejax.training import choices

UNIFORM, ARITHMETIC, TIES = 'uniform', 'task arithmetic', 'TIES'
REGMEAN, REGMEAN_T5 = 'RegMean, alpha 0.9', 'RegMean, alpha 0.1'
ENSEMBLE, ALL = 'ensemble of outputs', 'one LoRA of all four'
WAYS = (UNIFORM, ARITHMETIC, TIES, REGMEAN, REGMEAN_T5, ENSEMBLE, ALL)
NONE, OWN = 'not adapted', 'each expert on its own task'
ROWS_OF_GRAMS = 512
# Of task arithmetic, whose changes add up, and of TIES, which averages them.
SCALES = {
  ARITHMETIC: np.array([0.05, 0.1, 0.15, 0.2, 0.4, 0.7]),
  TIES: np.array([0.05, 0.1, 0.2, 0.35, 0.5, 1.0]),
}


def expert(task: str) -> str:
  """A row of the table."""
  return f'expert of {task}'


class Merging:
  """Trains, merges and scores the experts of an `Experiment`."""

  def __init__(self, run):
    self._run = run
    self.rows = real_data.Rows(run.folder / 'merged.jsonl')
    self._grams = functools.lru_cache(1)(self._make_grams)

  @functools.cached_property
  def _program(self):
    return self._run.program('lora', 'multi')

  # Experts ---------------------------------------------------------------------

  def _train(self, names, seed):
    """A LoRA of some tasks, from the pre-trained model."""
    rows = data_lib.together(names, self._run.cache)
    fresh = self._run.fresh(self._program.family, seed)
    return self._program.run(rows, seed, fresh)

  def _path(self, task, seed) -> pathlib.Path:
    """Where an expert lies, in PEFT's files; trained if it is not there."""
    path = self._run.folder / 'experts' / f'{task}_{seed}'
    if not path.exists():
      params = self._train([task], seed)
      path.parent.mkdir(exist_ok=True)
      adapters.save(path, self._program.family, params)
    return path

  def _adapted(self, path, seed):
    """`(family, parameters)` of the base with an adapter on disk."""
    base = self._run.base
    family, leaves = adapters.load(path, self._run.module, base)
    return family, family.joined(base, leaves)

  def _folded(self, path, seed):
    """Parameters of the plain model."""
    return adapters.fold(*self._adapted(path, seed))

  # Merges ----------------------------------------------------------------------

  def _stores(self, seed):
    return [
      adapters.ChangeStore(self._path(task, seed)) for task in data_lib.MERGED
    ]

  def _as_model(self, merged, stores, seed):
    """Merged changes written as one adapter, read, and folded into the base."""
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'merged'
      adapters.write_changes(path, merged, stores, rank='exact')
      return self._folded(path, seed)

  def _merge(self, seed, method, **options):
    stores = self._stores(seed)
    merged = mj.merge(stores, method, **options)
    return self._as_model(merged, stores, seed)

  def _searched(self, seed, method, scales):
    """The best scale on validation data."""
    merge = lambda point: self._merge(seed, method, scale=float(point[0]))
    score = self._run.scorer('full')
    evaluate = lambda params: {
      task: score(params, task, 'validation') for task in data_lib.MERGED
    }
    log = grid.grid(
      lambda _, point: merge(point), None, evaluate, scales[:, None]
    )
    (best,) = log.best().point
    return merge([best]), best

  def _make_grams(self, seed):
    """What the kernels that experts adapt are given, under adapters' names."""
    family = self._program.family
    modules = tensors.modules_of(family.plain, family.base_specs)
    found = []
    for task in data_lib.MERGED:
      rows = data_lib.load(task, 'train', self._run.cache)
      rows = data_lib.some(rows, ROWS_OF_GRAMS, seed)
      plain = {name: rows[name] for name in data_lib.PLAIN}
      stats = mj.stats.collect(
        mj.stats.gram(include=family.adapter.targets), self._run.module,
        self._folded(self._path(task, seed), seed), _in_parts(plain),
      )  # fmt: skip
      found.append({f'{modules[p]}.weight': own for p, own in stats.items()})
    return found

  def _make(self, way: str, seed: int):
    """`(parameters of the plain model, what was chosen)`."""
    if way == NONE:
      return self._run.base, None
    if way == UNIFORM:
      return self._merge(seed, 'linear'), None
    if way in SCALES:
      method = {ARITHMETIC: 'task_arithmetic', TIES: 'ties'}[way]
      return self._searched(seed, method, SCALES[way])
    if way in (REGMEAN, REGMEAN_T5):
      alpha = {REGMEAN: 0.9, REGMEAN_T5: 0.1}[way]
      stats = self._grams(seed)
      return self._merge(seed, 'regmean', stats=stats, alpha=alpha), None
    if way == ALL:
      params = self._train(data_lib.MERGED, seed)
      return adapters.fold(self._program.family, params), None
    (task,) = (task for task in data_lib.MERGED if way == expert(task))
    return self._folded(self._path(task, seed), seed), None

  # Scores ----------------------------------------------------------------------

  @functools.cached_property
  def _probabilities(self):
    """`(parameters, batches) -> <float32>[batches, rows, choices]`."""
    module = self._run.module

    def of_batch(params, batch):
      return jax.nn.softmax(-choices.rank(module, params, batch).scores)

    return jax.jit(
      lambda params, batches: jax.lax.map(
        functools.partial(of_batch, params), batches
      )
    )

  def _ensemble(self, seed: int, task: str) -> float:
    """Accuracy of the answer that has the highest mean probability."""
    batches = self._run.scored(task, 'test')
    data = {n: np.stack([b[n] for b in batches]) for n in batches[0]}
    mean = sum(
      np.nan_to_num(
        self._probabilities(self._folded(self._path(other, seed), seed), data)
      )
      for other in data_lib.MERGED
    )
    real = data[choices.MASK].any(axis=-1)
    right = jnp.argmax(mean, axis=-1) == data[choices.LABELS]
    return float(np.asarray(right)[real].mean())

  def run_seed(self, seed: int) -> None:
    """Every way of merging, on the test data of every task."""
    for way in (NONE, *map(expert, data_lib.MERGED), *WAYS):
      self._run_way(way, seed)

  def _run_way(self, way, seed):
    made: Callable = functools.cache(lambda: self._make(way, seed))

    def score(task):
      if way == ENSEMBLE:
        return {'accuracy': self._ensemble(seed, task)}
      params, chosen = made()
      accuracy = self._run.scorer('full')(params, task)
      found = {'accuracy': accuracy}
      return found if chosen is None else {**found, 'scale': chosen}

    for task in data_lib.MERGED:
      self.rows.once(seed, way, task, functools.partial(score, task))


def _in_parts(rows, size=64):
  """Batches of rows that fill them all."""
  count = len(rows['decoder_target_tokens']) // size
  return [
    {n: leaf[i * size : (i + 1) * size] for n, leaf in rows.items()}
    for i in range(count)
  ]
