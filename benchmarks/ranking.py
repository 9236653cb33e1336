# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""LogME and LEEP against accuracy after fine-tuning: nine models, four tasks.

    MERGEJAX_DATA=... python benchmarks/ranking.py [--seeds 3]

Prints Kendall's tau between score and accuracy for every task.
"""

import jax
import real_data
from scipy import stats
import vision_models

from mergejax import models
from mergejax.data import images
from mergejax.select import ranking

SMALL = dict(model_type='vgg', channels=(16, 0, 32, 0, 64, 0), dense=(64,))
WIDE = {**SMALL, 'width_multiplier': 2.0}
MLP = dict(model_type='mlp', hidden=(256, 64))
SOURCES = {
  'vgg cifar10': (SMALL, 'cifar10', 1200),
  'vgg cifar10, short': (SMALL, 'cifar10', 150),
  'vgg mnist': (SMALL, 'mnist', 400),
  'vgg notmnist': (SMALL, 'notmnist', 400),
  'vgg omniglot': (SMALL, 'omniglot_alphabets', 400),
  'wide vgg cifar10': (WIDE, 'cifar10', 600),
  'wide vgg notmnist': (WIDE, 'notmnist', 300),
  'mlp notmnist': (MLP, 'notmnist', 600),
  'mlp cifar10': (MLP, 'cifar10', 600),
}


def source(name, seed):
  fields, task, steps = SOURCES[name]
  module = models.build({**fields, 'classes': vision_models.classes(task)})
  params = vision_models.cached(
    f'source_{name.replace(" ", "_").replace(",", "")}_{seed}',
    lambda: vision_models.train(
      module, models.family_of(module).init(jax.random.key(seed)),
      vision_models.load(task, 'train'), steps=steps, learning_rate=2e-3,
      seed=seed,
    ),
  )  # fmt: skip
  return module, params


def tuned_accuracy(name, task, seed):
  """Test accuracy after a short fine-tuning on a few hundred examples."""
  fields, *_ = SOURCES[name]
  module, params = source(name, seed)
  target = models.build({**fields, 'classes': vision_models.classes(task)})
  head = models.family_of(target).init(jax.random.key(seed + 50))['head']
  data = {n: x[:600] for n, x in vision_models.load(task, 'train').items()}
  params = vision_models.train(
    target, {**params, 'head': head}, data, steps=80, learning_rate=1e-3,
    seed=seed,
  )  # fmt: skip
  return vision_models.scorer(target, vision_models.load(task, 'test'))(params)['accuracy']  # fmt: skip


def run(seed):
  """`{score: {task: tau}}`; a task's own source is left out."""
  rows = [(name, *source(name, seed)) for name in SOURCES]
  tasks = {
    t: images.batches(
      {n: x[:600] for n, x in vision_models.load(t, 'train').items()}, 200
    )
    for t in vision_models.TASKS
  }
  tuned = {
    name: {t: tuned_accuracy(name, t, seed) for t in tasks} for name in SOURCES
  }
  result = {}
  for score in ('logme', 'leep', 'nce', 'h_score'):
    table = ranking.rank(rows, tasks, score=score)
    result[score] = {}
    for t in tasks:
      names = [n for n in SOURCES if SOURCES[n][1] != t]
      result[score][t] = float(
        stats.kendalltau(
          [table[n][t] for n in names], [tuned[n][t] for n in names]
        ).statistic
      )
  return result


def main():
  options = real_data.parser().parse_args()
  runs = real_data.over_seeds(run, options.seeds)
  rows = real_data.summary(runs, mean=True)
  real_data.show('Kendall tau', rows)
  real_data.write(
    'ranking', seeds=options.seeds, models=len(SOURCES), kendall_tau=rows
  )


if __name__ == '__main__':
  main()
