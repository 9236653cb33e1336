# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mj.merge`: methods and stores joined, for people."""

from collections.abc import Sequence
import logging
import os
from typing import Any

import jax

from mergejax.adapters import changes
from mergejax.checkpoints import base as store_base
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import quantised
from mergejax.checkpoints.peft import fold
from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import numerics
from mergejax.core import typing
from mergejax.merging import adapters
from mergejax.merging import in_memory
from mergejax.methods import base as merge_base
from mergejax.methods import named
from mergejax.models import architectures
from mergejax.statistics import saved


def merge(
  models: Sequence[Any],
  method: str | merge_base.Merge,
  *,
  base: Any = None,
  weights: Sequence[Any] | typing.Array | None = None,
  stats: Sequence[Any] | None = None,
  axes: axes_lib.Rules = (),
  rules: Sequence[tuple[str, str | merge_base.Merge]] = (),
  dtype: Any = None,
  seed: int = 0,
  **options: Any,
) -> typing.Tree:
  """Merges models given as trees, stores or paths.

  Args:
    models: pytrees of arrays, stores from `open_checkpoint`, or paths;
      `BASE+ADAPTER` is a base with an adapter of PEFT's format folded in.
      Adapters themselves, from `mj.adapters.ChangeStore`, are merged by what they
      change: the result is for `mj.adapters.write_changes`.
    method: a name of the menu (`'linear'`, `'task_arithmetic'`, ...) or a
      `Merge` built from one: `mj.task_arithmetic(scale=0.4)`.
    base: the common ancestor, where the method needs one. Of adapters, the
      model they were trained on (a path, to be compared with what they tell of
      it) or the adapter they were begun from; by default one that changes
      nothing.
    weights: one coefficient a model; see the method for the default.
    stats: statistics of each model for `fisher` and `regmean`: what
      `mj.stats.collect` returns, a path where it was saved, or
      `{path: {name: array}}`.
    axes: `(regular expression, logical axes)` of leaves whose layout their
      path does not tell, or that are stacks of layers.
    rules: `(regular expression, method)` for leaves that are to be merged
      otherwise: the name of a method, one built from options, or `'copy'`.
    dtype: dtype of the result's floating leaves; by default as stored.
    seed: seeds random methods.
    **options: options of the named method.

  Returns:
    The merged tree; see `merging.in_memory` for precision, sharding and jit.

  Raises:
    UserError: unknown method or option, a missing base, differing trees,
      `config.json` of different functions, a quantised model, weights that do
      not fit, statistics of another model.

  Example:
    >>> merge([{'w': np.zeros(2)}, {'w': np.ones(2)}], 'linear')
    {'w': Array([0.5, 0.5], dtype=float32)}
  """
  models = [_opened(model) for model in models]
  resolved = named.resolve(method, **options)
  if any(isinstance(model, changes.ChangeStore) for model in models):
    base = _start(resolved, models, base)
  base = _opened(base)
  _check_configs([base, *models])
  if stats is not None:
    stats = [
      saved.load(found) if isinstance(found, (str, os.PathLike)) else found
      for found in stats
    ]
    for i, (model, found) in enumerate(zip(models, stats)):
      leaves = jax.tree.leaves(model)
      if not any(numerics.is_traced(leaf) for leaf in leaves):
        saved.check_fingerprint(
          getattr(model, 'name', f'model {i}'), model,
          f'statistics {i}', getattr(found, 'fingerprint', None),
        )  # fmt: skip
  return in_memory.merge(
    models,
    resolved,
    base=base,
    weights=weights,
    stats=stats,
    axes=axes,
    rules=_with_methods(rules, method, None if options else resolved),
    dtype=dtype,
    seed=seed,
  )


def _start(method, stores, base):
  """What adapters are merged against."""
  start = adapters.gather(stores, base)
  if start is None and method.base == 'required':
    raise adapters.no_start('This method', stores[0].kind)
  return start


def _with_methods(rules, name, resolved):
  """Rules with methods for names; one name is one method, however often.

  Args:
    rules: as given.
    name: of the method of all other leaves, if it has one.
    resolved: that method, if it has no options; else None.
  """
  built = {}
  if isinstance(name, str) and resolved is not None:
    built[name] = resolved
  result = []
  for pattern, method in rules:
    if isinstance(method, str) and method != in_memory.COPY:
      if method not in built:
        built[method] = named.resolve(method)
      method = built[method]
    result.append((pattern, method))
  return result


def _check_configs(models):
  """Checkpoints with a `config.json` describe one function."""
  paths = [
    model.name for model in models if isinstance(model, store_base.ParamStore)
  ]
  remarks = architectures.check_checkpoints(
    paths,
    'If the difference changes nothing, merge what they hold: '
    '`mj.open_checkpoint(PATH).read()`.',
  )
  if remarks:
    logging.warning(
      'These settings differ between the models; the weights are merged all '
      'the same:\n%s', errors.listed(remarks),
    )  # fmt: skip


def _opened(model):
  if isinstance(model, (str, os.PathLike)):
    path, adapter = changes.parts(model)
    if adapter is not None:
      fold.check_model(path)
      return adapters.fold_into(checkpoint.open_weights(path), path, adapter)
  fold.check_model(model)
  if isinstance(model, (str, os.PathLike)):
    return checkpoint.open_weights(model)
  if isinstance(model, store_base.ParamStore):
    quantised.check(model)
  elif model is not None:
    quantised.check(store_base.MemoryStore(model))
  return model
