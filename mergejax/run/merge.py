# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax merge RECIPE OUT`: merges checkpoints leaf by leaf."""

from collections.abc import Sequence
import pathlib

from mergejax import api
from mergejax import errors
from mergejax import recipe as recipe_lib
from mergejax import tree
from mergejax.run import common
from mergejax.store import checkpoint


def main(arguments: Sequence[str]) -> None:
  """Checks everything that headers show, merges, and saves atomically."""
  parser = common.parser('merge', 'Merge checkpoints as a recipe says.')
  parser.add_argument('recipe', help='a YAML file')
  parser.add_argument('out', help='what to create')
  parser.add_argument(
    '--dry_run', action='store_true', help='check and print, merge nothing'
  )
  options = parser.parse_args(arguments)
  recipe = recipe_lib.load_recipe(options.recipe)
  out = pathlib.Path(options.out)
  if out.exists():
    raise errors.UserError(
      f'{out} already exists. Choose another name, or remove it.'
    )
  stores = [checkpoint.open_checkpoint(path) for path in recipe.models]
  base = checkpoint.open_checkpoint(recipe.base) if recipe.base else None
  reference = base or stores[0]
  specs = reference.specs()
  for store in stores:
    tree.check_same(
      specs,
      store.specs(),
      expected_name=reference.name,
      given_name=store.name,
    )
  print(f'{recipe.method}, options {dict(recipe.options)}')
  print(f'  base    {recipe.base}')
  for i, path in enumerate(recipe.models):
    weight = recipe.weights[i] if recipe.weights else 'default'
    print(f'  model   {path}, weight {weight}')
  read = sum(s.nbytes for store in stores for s in store.specs().values())
  print(f'  {len(specs)} arrays, {read / 1e6:,.1f} MB to read')
  if options.dry_run:
    return
  merged = api.merge(
    stores,
    recipe.method,
    base=base,
    weights=recipe.weights,
    dtype=recipe.dtype,
    seed=recipe.seed,
    **recipe.options,
  )
  config = None
  if out.suffix not in ('.safetensors', '.npz'):
    config = checkpoint.read_config(recipe.base or recipe.models[0])
  checkpoint.save_checkpoint(out, merged, format=recipe.format, config=config)
  print(f'wrote {out}')
