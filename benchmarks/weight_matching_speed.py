# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Weight matching of VGG16 against the code of its authors.

    python benchmarks/weight_matching_speed.py --original DIR [--orders 10]

DIR holds `weight_matching.py` of samuela/git-re-basin (and what it imports).
Both sides match the same two models, in as many random visit orders,
alternating. Claim: at least 4 times faster, with an objective at least as high
in the mean.
"""

import argparse
import contextlib
import io
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import real_data

from mergejax import align
from mergejax import models
from mergejax.core import tree


def models_to_match():
  """A VGG16 with LayerNorm, and two random ones: the hardest case."""
  module = models.build(dict(model_type='vgg', image_shape=(32, 32, 3)))

  def one(seed):
    params = models.family_of(module).init(jax.random.key(seed))
    # Not the same noise in two leaves of one shape.
    rng = np.random.default_rng(seed)
    noise = lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32)
    return jax.tree.map(lambda leaf: leaf + noise(leaf), params)

  return module, one(0), one(1)


def in_their_names(params):
  """`{path: array}` with the names of the original's VGG."""
  result = {}
  for path, leaf in tree.flatten(params).items():
    layer, what = path.split('/')
    layer = layer.replace('head', 'dense_2').replace('conv', 'Conv')
    layer = layer.replace('norm', 'LayerNorm').replace('dense', 'Dense')
    result[f'{layer}/{what}'] = leaf
  for i in range(13):
    kernel = result[f'Conv_{i}/kernel']
    result[f'Conv_{i}/bias'] = jnp.zeros(kernel.shape[-1])
  return result


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--original', required=True)
  parser.add_argument('--orders', type=int, default=10)
  options = parser.parse_args()
  jax.tree_map = jax.tree.map  # the original is of an older JAX
  sys.path.insert(0, options.original)
  import weight_matching as original

  module, a, b = models_to_match()
  batch = models.family_of(module).example_batch()
  spec = align.derive(
    lambda params, images: models.family_of(module).logits(params, {'images': images}),
    a, batch['images'],
  )  # fmt: skip
  their_spec = original.vgg16_permutation_spec()
  their_a, their_b = in_their_names(a), in_their_names(b)
  rows = {'mergejax': [], 'original': []}
  for order in range(options.orders):
    begin = time.perf_counter()
    found = align.match_weights(spec, a, b, order)
    seconds = time.perf_counter() - begin
    rows['mergejax'].append((seconds, align.objective(spec, a, b, found)))
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
      found = original.weight_matching(
        jax.random.PRNGKey(order), their_spec, their_a, their_b
      )
    seconds = time.perf_counter() - begin
    moved = original.apply_permutation(their_spec, found, their_b)
    objective = sum(float(jnp.vdot(their_a[p], moved[p])) for p in their_a)
    rows['original'].append((seconds, objective))
    print(order, rows['mergejax'][-1], rows['original'][-1], flush=True)
  sides = {
    name: {
      'seconds': float(np.median([s for s, _ in own])),
      'objective': float(np.mean([o for _, o in own])),
    }
    for name, own in rows.items()
  }
  times_faster = sides['original']['seconds'] / sides['mergejax']['seconds']
  real_data.write(
    'weight_matching_speed', orders=options.orders, **sides,
    times_faster=times_faster,
  )  # fmt: skip


if __name__ == '__main__':
  main()
