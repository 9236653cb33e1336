# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax align A B OUT`: permutes B's units to match A's."""

from collections.abc import Sequence
import importlib

import flax.linen as nn
import numpy as np

from mergejax import align
from mergejax import models
from mergejax.checkpoints import checkpoint
from mergejax.cli import common
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import tree as tree_lib
from mergejax.core import typing
from mergejax.methods import base as methods_base
from mergejax.models import architectures
from mergejax.training import objective

METHODS = ('weights', 'activations', 'straight_through')


def main(arguments: Sequence[str]) -> None:
  """Derives the groups, matches, checks the function, writes."""
  parser = common.parser('align', 'Permute the units of B to match those of A.')
  parser.add_argument('a', help='the checkpoint to match')
  parser.add_argument('b', help='the checkpoint to permute')
  parser.add_argument('out', help='what to create: B, permuted')
  parser.add_argument('--method', default='weights', choices=METHODS)
  parser.add_argument('--seed', type=int, default=0, help='of the visits')
  parser.add_argument('--tries', type=int, default=1, help='seeds to try')
  parser.add_argument('--fixed', action='append', default=[], metavar='GROUP')
  parser.add_argument('--suite', help='tasks, for methods that look at data')
  parser.add_argument('--split', default='train')
  parser.add_argument('--steps', type=int, default=200, help='straight_through')
  parser.add_argument('--permutation', help='also save the indices as .npz')
  parser.add_argument('--dry_run', action='store_true', help='list the groups')
  options = parser.parse_args(arguments)
  for name in ('tries', 'steps'):
    methods_base.check_option(
      f'--{name}', getattr(options, name), lambda n: n >= 1, '1 or above'
    )
  if not options.dry_run:
    for path in filter(None, (options.out, options.permutation)):
      files.check_new(path)
  module, a = models.load_model(options.a)
  other, b = models.load_model(options.b)
  tree_lib.check_same(
    tree_lib.specs(a), tree_lib.specs(b),
    expected_name=options.a, given_name=options.b,
  )  # fmt: skip
  architectures.check(
    {options.a: models.describe(module), options.b: models.describe(other)},
    'Units of one cannot be matched to units of the other.',
  )
  apply = models.family_of(module).logits
  batch = random_batch(module)
  spec = align.derive(apply, a, batch)
  print(spec.describe(), flush=True)
  if options.dry_run:
    return
  before = align.objective(spec, a, b)
  permutation = _match(options, spec, module, a, b)
  moved = align.permute(spec, permutation, b)
  worst = align.check_function(apply, b, moved, batch)
  after = align.objective(spec, a, b, permutation)
  scale = align.objective(spec, a, a)
  checkpoint.save_checkpoint(
    options.out, moved, config=models.describe(module),
    axes=models.axes(options.b) or None,
  )  # fmt: skip
  if options.permutation:
    with files.atomic_path(options.permutation) as temporary:
      with open(temporary, 'wb') as stream:
        np.savez(stream, **permutation)
  print(
    f'<a, b> / |a|^2 from {before / scale:.4f} to {after / scale:.4f}; the '
    f'permuted model gives the same outputs (largest difference {worst:.1e}): '
    f'{options.out}'
  )


def _match(options, spec, module, a, b):
  seeds = range(options.seed, options.seed + options.tries)
  if options.method == 'weights':
    tried = [
      align.match_weights(spec, a, b, seed, fixed=options.fixed)
      for seed in seeds
    ]
    return max(tried, key=lambda found: align.objective(spec, a, b, found))
  if not options.suite:
    raise errors.ConfigError(f'{options.method} looks at data: give --suite.')
  # Imports seqio, which takes seconds.
  suite_lib = importlib.import_module('mergejax.evaluation.suite')
  suite = suite_lib.load(options.suite)
  by_task = suite.read(options.split, model=module)
  batches = [batch for several in by_task.values() for batch in several]
  if options.method == 'activations':
    return align.match_activations(spec, module, a, b, batches)
  loss_fn = objective.make_loss(module, objective.cross_entropy(z_loss=0.0))
  stream = (batches[i % len(batches)] for i in range(options.steps))
  return align.match_straight_through(
    spec, lambda params, batch: loss_fn(params, batch)[0], a, b, stream,
    batches[0], key=options.seed,
  ).permutation  # fmt: skip


def random_batch(module: nn.Module, rows: int = 4) -> dict[str, typing.Array]:
  """Random numbers or tokens that a model accepts, for checks of equality."""
  rng = np.random.default_rng(0)
  family = models.family_of(module)
  sizes = {
    name: getattr(family.config, field, 2)
    for field, names in family.sizes.items()
    for name in names
  }
  return {
    name: rng.random(leaf.shape).astype(np.float32)
    if np.issubdtype(leaf.dtype, np.floating)
    else rng.integers(1, sizes.get(name, 2), leaf.shape).astype(np.int32)
    for name, leaf in family.example_batch(rows, length=8).items()
  }
