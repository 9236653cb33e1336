# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""PAINT: patching a letter recogniser with handwritten alphabets.

    MERGEJAX_DATA=... python benchmarks/paint.py [--seeds 3]

The model is trained on notMNIST (the control task). The head of the patching
task, Omniglot's alphabets, is fitted to the frozen model and stays frozen while
the body is fine-tuned. Claim (Ilharco et al., 2022): interpolation gains most
of the new accuracy and loses little of the old.
"""

import merge_vision_tasks as family
import real_data
import vision_models

from mergejax.search import patch

CONTROL, PATCHING = 'notmnist', 'omniglot_alphabets'


def run(seed):
  """Accuracies before, after, and fully fine-tuned."""
  control = family.expert(CONTROL, seed)
  module = family.module_of(PATCHING)
  data = vision_models.load(PATCHING, 'train')
  fresh = family.with_new_head(PATCHING, seed)['head']
  probe = {**family.body(control), 'head': fresh}
  bodies = tuple(name for name in probe if name != 'head')
  probe = vision_models.train(
    module, probe, data, steps=300, learning_rate=3e-3, seed=seed,
    freeze=bodies,
  )  # fmt: skip
  tuned = vision_models.train(
    module, probe, data, steps=400, learning_rate=1e-3, seed=seed,
    freeze=('head',),
  )  # fmt: skip
  scorers = {
    split: {
      CONTROL: vision_models.scorer(
        family.module_of(CONTROL), vision_models.load(CONTROL, split)
      ),
      PATCHING: vision_models.scorer(
        module, vision_models.load(PATCHING, split)
      ),
    }
    for split in ('validation', 'test')
  }

  def evaluate(params, split='validation'):
    return {
      CONTROL: scorers[split][CONTROL](
        {**family.body(params), 'head': control['head']}
      )['accuracy'],
      PATCHING: scorers[split][PATCHING](params)['accuracy'],
    }

  done = patch.single(
    probe, tuned, evaluate, patch.objective([CONTROL], [PATCHING]),
    frozen='head/.*',
  )  # fmt: skip
  result = {'alpha': done.alphas[0]}
  for name, params in (
    ('before', probe), ('patched', done.params), ('fine-tuned', tuned)
  ):  # fmt: skip
    for task, value in evaluate(params, 'test').items():
      result[f'{name}, {task}'] = value
  change = lambda task: result[f'patched, {task}'] - result[f'before, {task}']
  return {**result, 'gained': change(PATCHING), 'lost': -change(CONTROL)}


def main():
  options = real_data.parser().parse_args()
  runs = real_data.over_seeds(run, options.seeds)
  rows = real_data.summary([{'test accuracy': r} for r in runs])
  real_data.show('', rows)
  real_data.write('paint', seeds=options.seeds, results=rows)


if __name__ == '__main__':
  main()
