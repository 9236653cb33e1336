# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Model soups of twelve fine-tunings with different hyper-parameters.

    MERGEJAX_DATA=... python benchmarks/soup.py [--seeds 3]

Claim (Wortsman et al., 2022): a greedy soup is not below the best single model
on held-out data, and often above it on the test split.
"""

import itertools

import jax
import jax.numpy as jnp
import merge_vision_tasks as family
import numpy as np
import real_data
import vision_models

from mergejax import models
from mergejax.search import gradient
from mergejax.search import greedy
from mergejax.training import arrays

TASK = 'notmnist'
# Steps that all models share: soups are of fine-tunings of a trained model.
SHARED_STEPS = 400
SETTINGS = list(
  itertools.product((3e-4, 1e-3, 3e-3), (0.0, 0.1), (False, True))
)


def run(seed):
  """Accuracies on the test split."""
  module = family.module_of(TASK)
  begin = family.with_new_head(TASK, seed)
  data = vision_models.load(TASK, 'train')
  begin = vision_models.train(
    module, begin, data, steps=SHARED_STEPS, learning_rate=1e-3, seed=seed
  )
  several = [
    vision_models.train(
      module, begin, data, steps=250, learning_rate=rate, weight_decay=decay,
      seed=seed * 100 + i, augment=augment,
    )
    for i, (rate, decay, augment) in enumerate(SETTINGS)
  ]  # fmt: skip
  held_out = vision_models.load(TASK, 'validation')
  on_held_out = vision_models.scorer(module, held_out)
  on_test = vision_models.scorer(module, vision_models.load(TASK, 'test'))
  score = lambda params: on_held_out(params)['accuracy']
  single = [score(params) for params in several]
  soup = greedy.greedy(several, score)

  def loss(params, batch, heat):
    logits = heat * models.family_of(module).logits(params, batch)
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, batch['labels'][:, None], 1))

  stream = arrays.ArrayStream(held_out, 200, seed=seed)
  learned = gradient.learn(
    several, loss, [next(stream) for _ in range(25)], granularity='leaf'
  )
  rows = {
    'best single': several[int(np.argmax(single))],
    'uniform': greedy.uniform(several),
    'greedy': soup.params,
    'learned, by leaf': learned.params,
  }
  found = {name: on_test(params)['accuracy'] for name, params in rows.items()}
  found['mean of singles'] = float(
    np.mean([on_test(params)['accuracy'] for params in several])
  )
  found['what all began with'] = on_test(begin)['accuracy']
  found['ingredients'] = len(soup.ingredients)
  return found


def main():
  options = real_data.parser().parse_args()
  runs = real_data.over_seeds(run, options.seeds)
  rows = real_data.summary([{'test accuracy': r} for r in runs])
  real_data.show('', rows)
  real_data.write(
    'soup', seeds=options.seeds, models=len(SETTINGS), results=rows
  )


if __name__ == '__main__':
  main()
