# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Barriers between models trained apart, before and after alignment.

    MERGEJAX_DATA=... python benchmarks/git_rebasin.py [--seeds 3]

Claim (Ainsworth et al., 2023): after alignment the midpoint of two MLPs has
(nearly) no barrier, unless they were trained briefly, and wide ResNets have a
smaller one than narrow ones.
"""

import jax
import real_data
import vision_models

from mergejax import align
from mergejax import models
from mergejax.analysis import barrier
from mergejax.evaluation import plots
from mergejax.training import arrays
from mergejax.training import objective

# name: (model, task, training steps, learning rate)
MODELS = {
  'mlp': (dict(model_type='mlp', hidden=(512, 512, 512)), 'mnist', 4000, 1e-3),
  'mlp, briefly trained': (
    dict(model_type='mlp', hidden=(512, 512, 512)), 'mnist', 600, 1e-3,
  ),
  'resnet20 x0.25': (
    dict(model_type='resnet', norm='layer', width_multiplier=0.25), 'mnist',
    600, 2e-3,
  ),
  'resnet20 x1': (
    dict(model_type='resnet', norm='layer'), 'mnist', 600, 2e-3,
  ),
}  # fmt: skip


def _file_name(name):
  return name.replace(', ', '_').replace(' ', '_')


def pair(name, seed):
  """Two models of one kind, trained from different starts on other orders."""
  fields, task, steps, rate = MODELS[name]
  module = models.build({**fields, 'classes': vision_models.classes(task)})
  data = vision_models.load(task, 'train')

  def make(one):
    return vision_models.cached(
      f'rebasin_{_file_name(name)}_{steps}_{one}',
      lambda: vision_models.train(
        module, models.family_of(module).init(jax.random.key(one)), data,
        steps=steps, learning_rate=rate, seed=one, augment=True,
      ),
    )  # fmt: skip

  return module, make(2 * seed), make(2 * seed + 1)


def run(name, seed):
  """`{matching: {barrier, loss and accuracy at the midpoint}}`."""
  fields, task, *_ = MODELS[name]
  module, a, b = pair(name, seed)
  data = vision_models.load(task, 'train')
  test = {n: x[:1000] for n, x in vision_models.load(task, 'test').items()}
  apply = lambda params, batch: models.family_of(module).logits(params, batch)
  example = {'images': data['images'][:4]}
  spec = align.derive(apply, a, example)
  stream = arrays.ArrayStream(data, 250, seed=seed)
  batches = [next(stream) for _ in range(8)]
  loss_fn = objective.make_loss(module, objective.cross_entropy(z_loss=0.0))
  loss = lambda params, batch: loss_fn(params, batch)[0]
  found = {
    'none': align.identity(spec),
    'weights': align.match_weights(spec, a, b, seed),
    'activations': align.match_activations(spec, module, a, b, batches),
  }
  # A step of a ResNet costs a hundred times that of an MLP.
  steps = 60 if name.startswith('mlp') else 10
  many = arrays.ArrayStream(data, 500, seed=seed + 100)
  found['straight-through'] = align.match_straight_through(
    spec, loss, a, b, (next(many) for _ in range(steps)),
    {n: x[:1000] for n, x in data.items()}, key=seed,
    progress=lambda step, value: None,
  ).permutation  # fmt: skip
  result, lines = {}, {}
  for matching, permutation in found.items():
    moved = align.permute(spec, permutation, b)
    align.check_function(apply, b, moved, example, tolerance=1e-3)
    line = barrier.line(
      a, moved, vision_models.evaluator(module, test), points=9
    )
    losses = -line.values['loss']
    lines[matching] = line.lambdas, losses
    result[matching] = {
      'loss barrier': line.barrier('loss'),
      'midpoint loss': float(losses[4]),
      'midpoint accuracy': float(line.values['accuracy'][4]),
      'ends accuracy': float(line.values['accuracy'][[0, -1]].mean()),
    }
  if not seed:
    plots.lines(
      lines, real_data.RESULTS / f'git_rebasin_{_file_name(name)}.png'
    )
  return result


def main():
  parser = real_data.parser()
  parser.add_argument('--models', nargs='*', default=list(MODELS))
  options = parser.parse_args()
  for name in options.models:
    runs = real_data.over_seeds(
      lambda seed, n=name: run(n, seed), options.seeds
    )
    rows = real_data.summary(runs)
    real_data.show(name, rows)
    real_data.write(
      f'git_rebasin_{_file_name(name)}', seeds=options.seeds, results=rows
    )  # fmt: skip


if __name__ == '__main__':
  main()
