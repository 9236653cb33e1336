# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What collecting Gram matrices costs over the forward pass alone.

    python benchmarks/statistics_speed.py

T5 1.1 small, float32, the same batches on both sides, alternating, medians.
Claim: at most 1.35 times the forward pass.
"""

import argparse
import time

import jax
import numpy as np
import real_data

from mergejax import models
from mergejax import statistics
from mergejax.statistics import base as stats_base


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--rows', type=int, default=8)
  options = parser.parse_args()
  module = models.build(dict(model_type='t5x'))
  params = models.family_of(module).init(jax.random.key(0))
  rng = np.random.default_rng(0)
  targets = rng.integers(1, 32_000, (options.rows, 64))
  batch = jax.device_put({
    'encoder_input_tokens': rng.integers(1, 32_000, (options.rows, 128)),
    'decoder_target_tokens': targets,
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
  })  # fmt: skip
  statistic = statistics.gram()
  forward = jax.jit(
    lambda params, batch: models.family_of(module).logits(params, batch)
  )
  measure = lambda p, b: stats_base.distinct(
    statistic.measure(module, p, b, np.uint32(0), 1)
  )[0]
  shapes = jax.eval_shape(measure, params, batch)
  sums = jax.tree.map(lambda s: jax.numpy.zeros(s.shape, s.dtype), shapes)
  collect = jax.jit(
    lambda sums, params, batch: jax.tree.map(
      jax.numpy.add, sums, measure(params, batch)
    ),
    donate_argnums=0,
  )
  jax.block_until_ready(forward(params, batch))
  sums = jax.block_until_ready(collect(sums, params, batch))
  times = {'forward': [], 'forward and Gram': []}
  for _ in range(options.repeats):
    begin = time.perf_counter()
    jax.block_until_ready(forward(params, batch))
    times['forward'].append(time.perf_counter() - begin)
    begin = time.perf_counter()
    sums = jax.block_until_ready(collect(sums, params, batch))
    times['forward and Gram'].append(time.perf_counter() - begin)
  medians = {name: float(np.median(t)) for name, t in times.items()}
  for name, seconds in medians.items():
    print(f'{name:<20}{seconds:8.3f} s')
  ratio = medians['forward and Gram'] / medians['forward']
  print(f'ratio {ratio:.2f}')
  real_data.write(
    'statistics_speed', seconds=medians, ratio=ratio, kernels=len(shapes)
  )


if __name__ == '__main__':
  main()
