# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What `adapter_transfer.py` compares: adapters, their optimizers, their names."""

import adapter_transfer_data as data_lib
import jax

from mergejax import adapters
from mergejax import training
from mergejax.training import optim
from mergejax.training import schedules

# Steps of pre-training, of many tasks, of an adaptation; and rows of a batch.
# Fewer steps than a thousand leave adapters of a model this small at chance.
STEPS = {'pretrain': 6000, 'multi': 1000, 'adapt': 1000}
BATCH = {'multi': 16, 'adapt': 8, 'score': 50}
SHOTS = (32, 128)
RANK, SKILLS, HEADS, PROMPT = 2, 8, 8, 20
TARGETS = (r'(.*/)?(query|key|value|out|wi|wi_0|wi_1|wo)/kernel',)
ROUTER_RATE = 0.1
# Those of LoRA, (IA)^3 and prompts were looked at on `subjectivity`, with 1000 rows
# and one seed. --rates tries others on two tasks that are nowhere else: with 64
# examples none is above another by more than such a trial's own noise.
RATES = {
  'full': 0.005, 'lora': 0.01, 'ia3': 0.1, 'prompt': 0.1, 'attempt': 0.1,
  'poly': 0.01, 'poly_s': 0.01,
}  # fmt: skip
TRIED = {
  'full': (0.005, 0.01, 0.02), 'lora': (0.003, 0.01, 0.03),
  'ia3': (0.01, 0.03, 0.1), 'prompt': (0.03, 0.1, 0.3),
  'attempt': (0.03, 0.1, 0.3), 'poly_s': (0.003, 0.01, 0.03),
}  # fmt: skip
SHOTS_OF_RATES = 64

FULL, SHARED, SINGLE = 'full', 'LoRA, shared', 'LoRA, single-task'
IA3, IA3_LM = '(IA)^3, three losses', '(IA)^3, LM loss alone'
TUNING, SPOT, ATTEMPT = 'prompt tuning', 'SPoT', 'ATTEMPT'
POLY, POLY_S, POLY_MU = 'Poly', 'Poly-S', 'Poly-mu'
# What each trains in the end, and what it needs from the many tasks.
ARMS = {
  FULL: ('full', 'full'),
  SHARED: ('lora', 'lora'),
  SINGLE: ('lora', None),
  IA3: ('ia3', 'ia3'),
  IA3_LM: ('ia3', 'ia3'),
  TUNING: ('prompt', None),
  SPOT: ('prompt', 'prompt'),
  ATTEMPT: ('attempt', 'prompt'),
  POLY: ('poly', 'poly'),
  POLY_S: ('poly_s', 'poly_s'),
  POLY_MU: ('lora', 'poly_s'),
}
PLAIN_ARMS = (UNADAPTED, COMMONEST) = ('not adapted', 'the commonest answer')


def adapter_of(kind: str, tasks: int | None):
  """The adapter of a kind, of several tasks or of one; None trains the model."""
  if kind == 'full':
    return None
  if kind == 'lora':
    return adapters.lora(rank=RANK, alpha=RANK, targets=TARGETS)
  if kind == 'ia3':
    return adapters.ia3()
  if kind == 'prompt':
    return adapters.prompt(length=PROMPT, tasks=tasks)
  if kind == 'attempt':
    return adapters.attempt(sources=len(data_lib.MULTI), length=PROMPT)
  return adapters.poly(
    tasks=tasks or 1, skills=SKILLS, heads=HEADS if kind == 'poly_s' else 1,
    rank=RANK, alpha=RANK, targets=TARGETS,
  )  # fmt: skip


def optimizer_of(kind: str, family, rate: float, steps: int):
  """Adafactor of models and of (IA)^3, as T-Few; AdamW of the others."""
  over = lambda peak: schedules.warmup_linear(peak, steps=steps)
  if kind in ('full', 'ia3'):
    return optim.adafactor(over(rate), max_gradient_norm=1.0)
  adamw = lambda peak: optim.adamw(
    over(peak), b2=0.999, eps=1e-8, weight_decay=1e-5, max_gradient_norm=1.0
  )
  if kind.startswith('poly'):
    groups = {'adapter': adamw(rate), 'router': adamw(ROUTER_RATE)}
    return optim.by_group(family.groups, groups)
  return adamw(rate)


class Program:
  """A kind of adapter with one compiled step, and one compiled score."""

  def __init__(self, family, optimizer, objective, steps: int, batch: int):
    self.family, self.steps, self._batch = family, steps, batch
    self._trainer = training.Trainer(family, optimizer, objective=objective)
    adapted = isinstance(family, adapters.Adapted)
    self._reads = family.adapter.reads if adapted else ()
    self._answers = isinstance(objective, training.choices.TFew)

  @property
  def trained(self) -> int:
    """How many numbers learn."""
    specs, family = self.family.specs(), self.family
    if not isinstance(family, adapters.Adapted):
      return sum(spec.size for spec in specs.values())
    return adapters.count(family.adapter, family.base_specs)

  def run(self, rows: data_lib.Batch, seed: int, params, steps=None):
    """Parameters trained on rows, for all steps or only the first."""
    names = (*data_lib.PLAIN, *self._reads)
    if self._answers:
      names = (*names, *data_lib.ANSWERS)
    stream = training.ArrayStream(
      {name: rows[name] for name in names}, self._batch, seed=seed
    )
    state = self._trainer.fit(
      stream, steps=steps or self.steps, log_every=self.steps,
      key=jax.random.key(seed), params=params,
    )  # fmt: skip
    return jax.device_get(state.params)
