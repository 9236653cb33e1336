# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A run of a tiny model on this process's share of a mesh; prints its losses.

Usage: processes.py FOLDER STEPS MODEL_AXIS [COORDINATOR PROCESSES INDEX]
"""

import json
import sys

import jax
import numpy as np


def main(folder, steps, model, *distributed):
  from mergejax import partition

  if distributed:
    coordinator, processes, index = distributed
    partition.join_processes(coordinator, int(processes), int(index))
  import optax

  from mergejax import models
  from mergejax import training

  module = models.build(
    dict(model_type='mlp', hidden=(16, 8), image_shape=(4, 4, 1), classes=3)
  )
  rng = np.random.default_rng(0)
  data = {
    'images': rng.uniform(size=(32, 4, 4, 1)).astype(np.float32),
    'labels': rng.integers(0, 3, 32).astype(np.int32),
  }
  seen = {}
  trainer = training.Trainer(
    module,
    optax.sgd(0.3, momentum=0.9),
    mesh=partition.make_mesh(model=int(model)),
    rules=partition.fsdp(),
    transforms=[training.ema(0.5)],
    callbacks=[
      training.callbacks.on_log(
        lambda at, m: seen.update({at: float(m['loss'])})
      )
    ],
  )
  state = trainer.fit(
    training.ArrayStream(data, 8, seed=1), steps=int(steps), directory=folder,
    log_every=1,
  )  # fmt: skip
  average = partition.to_host(state.extras['ema'])
  if jax.process_index() == 0:
    sums = [float(np.sum(leaf)) for leaf in jax.tree.leaves(average['state'])]
    print(json.dumps({'losses': seen, 'average': sums}))


if __name__ == '__main__':
  main(*sys.argv[1:])
