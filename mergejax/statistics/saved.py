# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Statistics as files, and the fingerprint that ties them to their model."""

from collections.abc import Mapping, Sequence
import json
import os
import pathlib
from typing import Any

import numpy as np

from mergejax.checkpoints import base as store_base
from mergejax.checkpoints import checkpoint
from mergejax.checkpoints import fingerprints
from mergejax.checkpoints import safetensors
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import statistic_specs
from mergejax.core import tree as tree_lib
from mergejax.core import typing

_SIDE_CAR = 'statistics.json'
_WEIGHTS = 'statistics.safetensors'
# Where the side car keeps the spec.
_SPEC = 'statistic'
fingerprint = fingerprints.fingerprint


class Statistics(dict):
  """`{path: {name of the statistic: array, 'count': array}}` of one model.

  Attributes:
    spec: what the statistic is.
    fingerprint: of the model they were collected with.
    settings: how they were collected.
  """

  def __init__(
    self,
    means: Mapping[typing.Path, Mapping[str, typing.Array]],
    spec: statistic_specs.StatisticSpec,
    fingerprint: str | None,
    settings: Mapping[str, Any],
  ):
    super().__init__(means)
    self.spec = spec
    self.fingerprint = fingerprint
    self.settings = dict(settings)

  @property
  def kind(self) -> str:
    """Name of the statistic: 'gram', 'fisher', ..."""
    return self.spec.name

  def save(self, path: os.PathLike | str) -> None:
    """Writes a directory: a safetensors file, and what it is in JSON.

    Raises:
      UserError: the path exists, or the disk is full.
    """
    leaves = {
      f'{path}/{name}': np.asarray(leaf)
      for path, own in self.items()
      for name, leaf in own.items()
    }
    # Settings that were loaded hold both too, of what was loaded.
    about = {
      **self.settings,
      'fingerprint': self.fingerprint,
      _SPEC: self.spec.record(),
    }
    with files.atomic_path(path) as temporary:
      temporary.mkdir()
      safetensors.write(temporary / _WEIGHTS, leaves)
      (temporary / _SIDE_CAR).write_text(json.dumps(about, indent=2) + '\n')


def about(path: os.PathLike | str) -> dict[str, Any]:
  """What a statistics directory says of itself; empty if it says nothing."""
  file = pathlib.Path(path).expanduser() / _SIDE_CAR
  return checkpoint.read_json(file) if file.is_file() else {}


def load(path: os.PathLike | str) -> Statistics:
  """Reads statistics that `collect` or `mergejax stats` saved.

  Raises:
    UserError: there are none, or they are of no known kind.
  """
  settings = about(path)
  leaves = tree_lib.flatten(checkpoint.open_checkpoint(path).read())
  means: dict[str, dict[str, Any]] = {}
  for name, leaf in leaves.items():
    parameter, _, what = name.rpartition('/')
    means.setdefault(parameter, {})[what] = leaf
  spec = _spec_of(settings, {name for own in means.values() for name in own})
  if spec is None:
    raise errors.DataError(
      f'{path} does not hold statistics: its leaves should be called '
      'PARAMETER/gram or PARAMETER/fisher, or as its '
      f'{_SIDE_CAR} says. `mergejax stats` collects them.'
    )
  return Statistics(means, spec, settings.get('fingerprint'), settings)


def _spec_of(settings, names) -> statistic_specs.StatisticSpec | None:
  """What statistic leaves of these names are; None if that is not known."""
  record = settings.get(_SPEC)
  if record is not None:
    spec = statistic_specs.read(record)
    return spec if spec.name in names else None
  # Files of before specs were kept, and of other makers.
  known = [spec for spec in map(statistic_specs.named, names) if spec]
  return known[0] if len(known) == 1 else None


def check_fingerprint(
  model_name: str,
  model: typing.Tree | store_base.ParamStore,
  stats_name: str,
  expected: str | None,
) -> None:
  """Refuses statistics that were collected with another model.

  Args:
    model_name: how messages call the model.
    model: the model.
    stats_name: how messages call the statistics.
    expected: the fingerprint they carry; None (made by other means) passes.

  Raises:
    UserError: the fingerprints differ.
  """
  if expected is None:
    return
  found = fingerprint(model)
  if found != expected:
    raise errors.DataError(
      f'{stats_name} was collected with a model whose fingerprint is '
      f'{expected}, but {model_name} has {found}: these are other weights. '
      'Collect statistics of this model with `mergejax stats`, or, if the '
      f'difference is meant, remove "fingerprint" from its {_SIDE_CAR}.'
    )


def combine(
  parts: Sequence[Statistics],
  merged: typing.Tree | store_base.ParamStore,
  weights: Sequence[float] | None = None,
) -> Statistics:
  """Statistics of a merged model, so that one more model can be merged later.

  `G = sum_k w_k G_k / sum_k w_k`: as `(sum_k w_k G_k) W` is `sum_k w_k G_k W_k`
  for the merged kernel W, merging W (of weight `sum_k w_k`) with a further
  model by the same alpha gives exactly the joint solution.

  Args:
    parts: Gram statistics of the models that were merged.
    merged: the result, for its fingerprint.
    weights: those of the merge; 1 each by default.

  Returns:
    Statistics for the merged model; use it with weight `sum_k w_k`.

  Raises:
    UserError: Fisher statistics (their scales are a matter of the merge),
      parts with different parameters, or weights that sum to 0.
  """
  spec = parts[0].spec
  if any(part.spec != spec for part in parts) or not spec.combines:
    raise errors.ConfigError(
      'Only Gram statistics, and others that say so, combine: a Fisher merge '
      'rescales each model.'
    )
  weights = [1.0] * len(parts) if weights is None else list(weights)
  if len(weights) != len(parts):
    raise errors.ConfigError(
      f'{len(weights)} weight(s) for {len(parts)} statistics: one for each.'
    )
  if not sum(weights):
    raise errors.ConfigError(
      f'The weights {weights} sum to 0: there is no mean of these statistics.'
    )
  paths = [set(part) for part in parts]
  if any(one != paths[0] for one in paths):
    lines = sorted(set.union(*paths) - set.intersection(*paths))
    raise errors.DataError(
      f'Some of these statistics lack parameters:\n{errors.listed(lines)}'
    )
  means = {}
  for path in parts[0]:
    wide = [np.asarray(part[path][spec.name], np.float64) for part in parts]
    total = np.asarray(sum(w * each for w, each in zip(weights, wide)))
    total = total / sum(weights)
    count = sum(np.asarray(part[path]['count']) for part in parts)
    means[path] = {spec.name: total.astype(np.float32), 'count': count}
  settings = {**parts[0].settings, 'combined': len(parts)}
  return Statistics(means, spec, fingerprints.fingerprint(merged), settings)
