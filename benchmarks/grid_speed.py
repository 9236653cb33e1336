# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A grid of 21 coefficients against 21 evaluations of one fixed model.

    python benchmarks/grid_speed.py

Task arithmetic of three ResNets over 512 images; both sides are one compiled
loop, alternating, medians. Claim: at most 1.3 times.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np
import real_data

from mergejax import models
from mergejax.evaluation import base as evaluation
from mergejax.search import base as search_base
from mergejax.search import grid


def main():
  module = models.build(dict(model_type='resnet'))
  one = lambda seed: models.family_of(module).init(jax.random.key(seed))
  data = jax.random.uniform(jax.random.key(9), (4, 128, 28, 28, 1))
  evaluate = evaluation.Evaluator(
    lambda params, data: {
      'score': jax.lax.map(
        lambda images: (
          models.family_of(module).logits(params, {'images': images}).mean()
        ),
        data,
      ).mean()
    },
    data,
  )
  space = search_base.Space('task_arithmetic', 3, vary='scale')
  inputs = {'models': [one(k) for k in (1, 2, 3)], 'base': one(0)}
  merge = lambda inputs, point: space.merge(
    inputs['models'], point, base=inputs['base']
  )
  points = jnp.asarray(grid.line(space, 21), jnp.float32)
  searched = jax.jit(
    lambda inputs, data, points: jax.lax.map(
      lambda point: evaluate.score(merge(inputs, point), data), points
    )
  )
  # The points are added, so that no evaluation can be left out as a repetition.
  fixed = jax.jit(
    lambda params, data, points: jax.lax.map(
      lambda point: evaluate.score(params, data + point[0]), points
    )
  )
  sides = {
    'grid': lambda: searched(inputs, data, points),
    'fixed model': lambda: fixed(inputs['base'], data, points),
  }
  times = {name: [] for name in sides}
  for repeat in range(6):
    for name, call in sides.items():
      begin = time.perf_counter()
      jax.block_until_ready(call())
      if repeat:
        times[name].append(time.perf_counter() - begin)
  medians = {name: float(np.median(t)) for name, t in times.items()}
  for name, seconds in medians.items():
    print(f'{name:<14}{seconds:8.3f} s')
  ratio = medians['grid'] / medians['fixed model']
  print(f'ratio {ratio:.2f}')
  real_data.write('grid_speed', seconds=medians, ratio=ratio)


if __name__ == '__main__':
  main()
