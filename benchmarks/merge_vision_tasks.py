# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Merging small convolutional nets of four image tasks from one start.

    MERGEJAX_DATA=... python benchmarks/merge_vision_tasks.py [--seeds 3]

Each task keeps its own head; the bodies are merged. Scales of task arithmetic
and TIES are chosen on validation data. Claim (Jin et al., 2023): RegMean is
above the plain average and Fisher averaging.
"""

import jax
import numpy as np
import optax
import real_data
import vision_models

import mergejax as mj
from mergejax import models
from mergejax.training import arrays
from mergejax.training import objective

FIELDS = dict(model_type='vgg', channels=(16, 0, 32, 0, 64, 0), dense=(64,))
START_STEPS, STEPS = 1500, 400
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)


def module_of(task):
  return models.build({**FIELDS, 'classes': vision_models.classes(task)})


def body(params):
  return {n: leaf for n, leaf in params.items() if n != 'head'}


def start():
  """The common start: trained on grey CIFAR-10."""
  module = module_of('cifar10')
  return vision_models.cached(
    f'vision_start_{START_STEPS}',
    lambda: vision_models.train(
      module, models.family_of(module).init(jax.random.key(0)),
      vision_models.load('cifar10', 'train'), steps=START_STEPS,
      learning_rate=2e-3, seed=0, augment=True,
    ),
  )  # fmt: skip


def with_new_head(task, seed):
  fresh = models.family_of(module_of(task)).init(jax.random.key(seed))
  return {**body(start()), 'head': fresh['head']}


def expert(task, seed, steps=STEPS):
  return vision_models.cached(
    f'vision_{task}_{seed}_{steps}',
    lambda: vision_models.train(
      module_of(task), with_new_head(task, seed),
      vision_models.load(task, 'train'), steps=steps, learning_rate=1e-3,
      seed=seed,
    ),
  )  # fmt: skip


def multi_task(seed):
  """One body with a head a task, trained on all tasks together."""
  tasks = vision_models.TASKS
  params = {
    'body': body(start()),
    'heads': {t: with_new_head(t, seed)['head'] for t in tasks},
  }
  optimizer = optax.adamw(optax.cosine_decay_schedule(1e-3, STEPS), weight_decay=0.0)  # fmt: skip
  plain = objective.cross_entropy(z_loss=0.0)
  fns = {t: objective.make_loss(module_of(t), plain) for t in tasks}

  def loss(params, batches):
    return sum(
      fns[t]({**params['body'], 'head': params['heads'][t]}, batches[t])[0]
      for t in tasks
    )

  @jax.jit
  def step(params, state, batches):
    gradient = jax.grad(loss)(params, batches)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  streams = {
    t: arrays.ArrayStream(vision_models.load(t, 'train'), 64, seed=seed)
    for t in tasks
  }
  for _ in range(STEPS):
    params, state = step(
      params, state, {t: next(s) for t, s in streams.items()}
    )
  return params


def statistics(task, params, kind):
  data = vision_models.load(task, 'train')
  # One gradient at a time: convolutions over many kernels are slow on a CPU.
  count = 1024 if kind == 'gram' else 256
  batches = [
    {n: x[i : i + 128] for n, x in data.items()} for i in range(0, count, 128)
  ]
  if kind == 'gram':
    return mj.stats.collect(
      mj.stats.gram(conv=True, exclude=['head/.*']), module_of(task), params,
      batches,
    )  # fmt: skip
  found = mj.stats.collect(
    mj.stats.fisher(microbatch=1), module_of(task), params, batches
  )
  return {p: own for p, own in found.items() if not p.startswith('head')}


def run(seed):
  """`{row: {task: test accuracy}}`."""
  tasks = vision_models.TASKS
  experts = {t: expert(t, seed) for t in tasks}
  scorers = {
    (t, split): vision_models.scorer(module_of(t), vision_models.load(t, split))
    for t in tasks for split in ('validation', 'test')
  }  # fmt: skip
  accuracy = lambda t, merged, split='test': scorers[t, split](
    {**merged, 'head': experts[t]['head']}
  )['accuracy']
  table = {}
  for source in tasks:
    table[f'expert {source}'] = {
      t: accuracy(t, body(experts[source])) for t in tasks
    }
  bodies = [body(experts[t]) for t in tasks]
  origin = body(start())
  plain = lambda kind: [dict(statistics(t, experts[t], kind)) for t in tasks]
  grams, fishers = plain('gram'), plain('fisher')
  rows = {'uniform average': mj.merge(bodies, 'linear')}
  rows['Fisher'] = mj.merge(bodies, 'fisher', stats=fishers)
  for alpha in (0.9, 0.1):
    rows[f'RegMean, alpha {alpha}'] = mj.merge(
      bodies, 'regmean', stats=grams, alpha=alpha
    )

  def best(make):
    tried = []
    for scale in SCALES:
      merged = make(scale)
      mean = np.mean([accuracy(t, merged, 'validation') for t in tasks])
      tried.append((mean, scale, merged))
    return max(tried, key=lambda one: one[0])[2]

  rows['task arithmetic'] = best(
    lambda s: mj.merge(bodies, 'task_arithmetic', base=origin, scale=s)
  )
  rows['TIES'] = best(
    lambda s: mj.merge(bodies, 'ties', base=origin, scale=2 * s)
  )
  for name, merged in rows.items():
    table[name] = {t: accuracy(t, merged) for t in tasks}
  joint = multi_task(seed)
  table['multi-task'] = {
    t: scorers[t, 'test']({**joint['body'], 'head': joint['heads'][t]})['accuracy']
    for t in tasks
  }  # fmt: skip
  return table


def main():
  options = real_data.parser().parse_args()
  runs = real_data.over_seeds(run, options.seeds)
  rows = real_data.summary(runs, mean=True)
  real_data.show('model', rows)
  real_data.write('merge_vision_tasks', seeds=options.seeds, results=rows)


if __name__ == '__main__':
  main()
