# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a mergekit recipe means, read slowly, for decoders of Llama's names.

Written from mergekit's documentation and from what its release 0.1.5 does; it
shares nothing with the package but the float64 oracles of the methods.
"""

import re

import numpy as np
from reference import merging
from reference import spheres
from reference import words

# method: {option a model may have of its own: default}, {option for all}, words
# that are fixed where a recipe is merged.
SHARED = {'normalize': None, 'lambda': 1.0}
METHODS = {
  'linear': ({'weight': 1.0}, {'normalize': True}),
  'slerp': ({}, {'t': None}),
  'task_arithmetic': ({'weight': 1.0}, {**SHARED, 'normalize': False}),
  'ties': (
    {'weight': 1.0, 'density': 1.0},
    {**SHARED, 'normalize': True, 'rescale': False},
  ),
  'dare_ties': (
    {'weight': 1.0, 'density': 1.0},
    {**SHARED, 'normalize': False, 'rescale': True},
  ),
  'breadcrumbs': (
    {'weight': 1.0, 'density': 1.0, 'gamma': 0.01},
    {**SHARED, 'normalize': False, 'rescale': False},
  ),
  'della': ({'weight': 1.0}, {**SHARED, 'normalize': True}),
  'della_linear': ({'weight': 1.0}, {**SHARED, 'normalize': False}),
  'model_stock': ({}, {'filter_wise': False}),
  'sce': ({}, {'select_topk': 1.0}),
  'nuslerp': ({'weight': 1.0}, {'nuslerp_flatten': True}),
  'multislerp': ({'weight': 1.0}, {'normalize_weights': True, 'eps': 1e-8}),
  'karcher': ({}, {'max_iter': 10, 'tol': 1e-5}),
  'nearswap': ({}, {'t': None}),
  'arcee_fusion': ({}, {}),
  'ram': ({}, {'epsilon': 1e-5}),
  'ramplus_tl': ({}, {'r': 0.1, 'alpha': 0.2, 'epsilon': 1e-5}),
  'passthrough': ({'scale': 1.0}, {}),
}
METHODS['dare_linear'] = METHODS['dare_ties']
METHODS['breadcrumbs_ties'] = METHODS['breadcrumbs']
# These average the base with the models.
BASE_IS_A_MODEL = ('linear', 'karcher')
FLAGS = {'true': True, 'yes': True, 'y': True, 'on': True, 'false': False}


def _plain(value):
  """The number or flag that a text stands for."""
  if isinstance(value, str):
    return FLAGS[value] if value in FLAGS else float(value)
  return value


def value_of(setting, name, t):
  """A setting for one tensor at depth t, or None."""
  if isinstance(setting, dict):
    setting = [setting]
  if not isinstance(setting, list):
    return _plain(setting)
  if isinstance(setting[0], dict):
    for one in setting:
      if one.get('filter', '*') == '*' or one['filter'] in name:
        return value_of(one['value'], name, t)
    return None
  places = np.linspace(0, 1, len(setting)) if len(setting) > 1 else [0]
  return float(np.interp(t, places, [_plain(v) for v in setting]))


def _resolve(option, default, scopes, name, t):
  for scope in scopes:
    value = value_of((scope or {}).get(option), name, t)
    if value is not None:
      return value
  return default


def _slices(recipe, base, layers):
  if 'slices' in recipe:
    return recipe['slices']
  sources = [
    {**entry, 'layer_range': [0, layers]} for entry in recipe['models']
  ]
  if base and base not in [_name(s['model']) for s in sources]:
    sources.append({'model': base, 'layer_range': [0, layers]})
  return [{'sources': sources}]


def _name(model):
  if isinstance(model, dict):
    model = model.get('model', model)
    model = model['path'] if isinstance(model, dict) else model
  return model.split('@')[0]


def merge(recipe, models):
  """The result of a recipe.

  Args:
    recipe: as YAML gives it.
    models: `{name: {path: array}}` of every model that it names.

  Returns:
    `{path: float64 array}`.
  """
  base = recipe.get('base_model')
  first = next(iter(models.values()))
  layers = 1 + max(
    int(i) for i in re.findall(r'layers\.(\d+)', str(list(first)))
  )
  slices = _slices(recipe, base, layers)
  result = {}
  for path in first:
    if '.layers.' not in path:
      one = slices[0] if 'embed' in path else slices[-1]
      names = [path] * len(one['sources'])
      result[path] = _leaf(recipe, models, one, path, names, 0.0)
  at = 0
  for one in slices:
    starts = [source['layer_range'][0] for source in one['sources']]
    count = one['sources'][0]['layer_range'][1] - starts[0]
    for i in range(count):
      t = i / (count - 1) if count > 1 else 1.0
      for path in first:
        if '.layers.0.' not in path:
          continue
        layer = lambda n, path=path: path.replace('.0.', f'.{n}.', 1)
        names = [layer(start + i) for start in starts]
        result[layer(at)] = _leaf(recipe, models, one, layer(at), names, t)
      at += 1
  return result


def _leaf(recipe, models, one, path, names, t):
  method = recipe['merge_method']
  base = one.get('base_model') or recipe.get('base_model')
  own, shared = METHODS[method]
  outer = [one.get('parameters'), recipe.get('parameters')]
  options = {o: _resolve(o, d, outer, path, t) for o, d in shared.items()}
  leaves, per_model, origin = [], {o: [] for o in own}, None
  for source, name in zip(one['sources'], names):
    leaf = np.asarray(models[_name(source['model'])][name], np.float64)
    if _name(source['model']) == base and method not in BASE_IS_A_MODEL:
      if method != 'passthrough':
        origin = leaf
        continue
    leaves.append(leaf)
    for option, default in own.items():
      scopes = [source.get('parameters'), *outer]
      per_model[option].append(_resolve(option, default, scopes, name, t))
  weights = per_model.pop('weight', [1.0] * len(leaves))
  return _merged(
    method, path, leaves, origin, weights, {**options, **per_model}
  )


def _merged(method, path, leaves, base, weights, options):
  """Hands one leaf to the oracle of its method."""
  options = dict(options)
  if 'lambda' in options:
    options['scale'] = options.pop('lambda')
  elif 'scale' in options:
    options['scale'] = options['scale'][0]
  if 'rescale' in options:
    if method.startswith('dare'):
      options['rescale'] = 'l1' if options['rescale'] else 'none'
    elif options.pop('rescale'):
      leaves = _rescaled(method, leaves, base, options)
      options['density'] = 1.0
  if method == 'ties':
    options['trim_scope'] = 'tensor'
    # The oracle keeps at least one element.
    leaves = [
      base if share == 0 else leaf
      for leaf, share in zip(
        leaves, np.broadcast_to(options['density'], len(leaves))
      )
    ]
  if 'nuslerp_flatten' in options:
    options['flatten'] = bool(options.pop('nuslerp_flatten'))
  if method.startswith('della'):
    options['density'] = 1.0
  if 'max_iter' in options:
    options['max_iter'] = int(options['max_iter'])
  # The oracles lay units as Flax does, in columns.
  turned = np.ndim(leaves[0]) == 2 and method in (
    'model_stock', 'nuslerp', 'arcee_fusion', 'della', 'della_linear'
  )  # fmt: skip
  turn = (lambda x: x.T) if turned else (lambda x: x)
  name = {'ramplus_tl': 'ram_plus'}.get(method, method)
  home = merging if hasattr(merging, name) else spheres
  merged = getattr(home, name)(
    [{path: turn(leaf)} for leaf in leaves],
    None if base is None else {path: turn(base)},
    weights,
    **options,
  )
  return turn(merged[path])


def _rescaled(method, leaves, base, options):
  """Models whose task vectors are trimmed and have their sum of magnitudes."""
  result = []
  for k, leaf in enumerate(leaves):
    delta, share = leaf - base, options['density'][k]
    if method == 'ties':
      kept = max(1, int(share * delta.size))
      sparse = np.where(words.top(np.abs(delta), kept), delta, 0)
    else:
      sparse = words.crumbs(delta, share, options['gamma'][k])
    result.append(base + sparse * np.abs(delta).sum() / np.abs(sparse).sum())
  return result
