# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What running averages cost: a step with EMA, or LAWA, beside a plain one.

The T5 1.1 of 9.7 million parameters of `train_step`, one device; the sides
alternate, medians are quoted, and the last line is JSON.

Usage:
  python benchmarks/step_transforms.py [--rounds 21] [--json FILE]
"""

import argparse
import json
import pathlib

import jax
import numpy as np
import train_step

from mergejax import partition
from mergejax import training
from mergejax.nn import t5


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=21)
  parser.add_argument('--json', help='also write the result to this file')
  options = parser.parse_args()
  sides = {
    'plain': (),
    'ema': (training.ema(0.999),),
    'lawa': (training.lawa(100, 4),),
    'skip_nonfinite': (training.skip_nonfinite(),),
  }
  calls = {name: step_with(transforms) for name, transforms in sides.items()}
  times = {name: [] for name in sides}
  for i in range(options.rounds + 2):
    for name, call in calls.items():
      took = train_step.seconds(call)
      if i >= 2:  # compiled and warm
        times[name].append(took)
  medians = {name: float(np.median(took)) for name, took in times.items()}
  result = {
    'machine': train_step.machine(),
    'seconds': {name: round(value, 4) for name, value in medians.items()},
    'ratio': {
      name: round(float(np.median(np.divide(took, times['plain']))), 4)
      for name, took in times.items()
    },
  }
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + '\n')
  print(json.dumps(result))


def step_with(transforms):
  """A call that makes one step of the T5."""
  sizes, shape = train_step.SIZES['9.7M']
  trainer = training.Trainer(
    t5.Transformer(t5.T5Config(**sizes)),
    training.optim.adafactor(0.01),
    mesh=partition.make_mesh(devices=jax.devices()[:1]),
    transforms=transforms,
  )
  made = trainer.step(1)
  layout = trainer.layout(made)
  step = trainer.compile(made, layout)
  state = [trainer.init(made, layout, jax.random.key(0))]
  batch = trainer.placer()(train_step.t5_batch(shape))

  def call():
    state[0], metrics = step(state[0], batch)
    return metrics

  return call


if __name__ == '__main__':
  main()
