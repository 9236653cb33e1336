# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Speed of training adapters: three claims, each side by side in one run.

1. What a step costs with each family of adapters, against full fine-tuning of
   the same T5 1.1 (of 9.7 and 77 million parameters) with AdamW.
2. A batch of eight LoRA experts, each row with another one, costs at most 1.3
   times the batch of one LoRA.
3. LoRA against PEFT and transformers on torch's CPU: the same weights, batch,
   rank and targets; both begin with the same loss, which is compared.

Usage:
  python benchmarks/adapter_speed.py [--peft PYTHON] [--sizes 9.7M,77M]
    [--rounds 15] [--json FILE]

`--peft` names a Python that imports torch, transformers and peft; without it the
third is left out. The sides take turns, medians are quoted, and the last line is
JSON.
"""

import argparse
import json
import os
import pathlib
import subprocess
import tempfile

import jax
import numpy as np
import train_step

import mergejax as mj
from mergejax import models
from mergejax import partition
from mergejax.core import tree
from mergejax.models import t5_hf
from mergejax.nn import t5
from mergejax.training import objective
from mergejax.training import optim
from mergejax.training import trainer as trainer_lib

FAMILIES = {
  'full': None,
  'lora': mj.adapters.lora(rank=8),
  'bottleneck': mj.adapters.bottleneck(width=48),
  'ia3': mj.adapters.ia3(),
  'prompt': mj.adapters.prompt(length=100, start='uniform'),
  'attempt': mj.adapters.attempt(sources=6, length=100),
  'poly': mj.adapters.poly(tasks=8, skills=8, rank=1),
  'ladder': mj.adapters.ladder(reduction=8),
}
EXPERTS = 8
_WARM = 2


def step_of(size, adapter, batch, params=None):
  """A call that makes one training step and gives its loss."""
  sizes, _ = train_step.SIZES[size]
  family = models.family_of(t5.Transformer(t5.T5Config(**sizes)))
  if adapter is not None:
    family = mj.adapters.adapt(family, adapter)
    if params is not None:
      params = family.start(params, jax.random.key(1))
  trainer = trainer_lib.Trainer(
    family, optim.adamw(1e-3),
    mesh=partition.make_mesh(devices=jax.devices()[:1]),
    objective=objective.cross_entropy(z_loss=0.0),
  )  # fmt: skip
  made = trainer.step(1)
  layout = trainer.layout(made)
  state = [trainer.init(made, layout, jax.random.key(0), params)]
  step, batch = trainer.compile(made, layout), trainer.placer()(batch)

  def call():
    state[0], metrics = step(state[0], batch)
    return metrics['loss']

  return call


def in_turn(calls, rounds):
  """`{name: median seconds}` of calls that take turns."""
  times = {name: [] for name in calls}
  for i in range(rounds + _WARM):
    for name, call in calls.items():
      took = train_step.seconds(call)
      if i >= _WARM:  # compiled and warm
        times[name].append(took)
  return {name: float(np.median(each)) for name, each in times.items()}


def batch_of(size, rows=None):
  _, (usual, *lengths) = train_step.SIZES[size]
  batch = train_step.t5_batch((rows or usual, *lengths))
  ids = np.arange(rows or usual, dtype=np.int32) % EXPERTS
  return {**batch, 'task_ids': ids, 'expert_ids': ids}


def families(size, rounds):
  """Steps of every family, one beside full fine-tuning at a time."""
  batch, found = batch_of(size), {}
  full = step_of(size, None, batch)
  for name, adapter in FAMILIES.items():
    if adapter is None:
      continue
    calls = {'full': full, name: step_of(size, adapter, batch)}
    times = in_turn(calls, rounds)
    found[name] = {
      'step_s': round(times[name], 4), 'full_s': round(times['full'], 4),
      'of_full': round(times[name] / times['full'], 3),
    }  # fmt: skip
  return found


def mixed(size, rounds):
  """A batch of eight experts against a batch of one."""
  batch, lora = batch_of(size, EXPERTS), FAMILIES['lora']
  times = in_turn(
    {
      'one': step_of(size, lora, batch),
      'eight': step_of(size, mj.adapters.bank(lora, EXPERTS), batch),
    },
    rounds,
  )
  return {
    **{f'{name}_s': round(each, 4) for name, each in times.items()},
    'ratio': round(times['eight'] / times['one'], 3),
  }


_PEFT = """
import sys, time
import numpy as np, peft, torch, transformers
folder = sys.argv[1]
model = transformers.T5ForConditionalGeneration.from_pretrained(
    folder, dtype=torch.float32)
model = peft.get_peft_model(model, peft.LoraConfig(
    r=8, lora_alpha=8, target_modules=['q', 'v'], task_type='SEQ_2_SEQ_LM'))
model.train()
given = {k: torch.from_numpy(x).long()
         for k, x in np.load(folder + '/batch.npz').items()}
inputs = given['encoder_input_tokens']
optimizer = torch.optim.AdamW(
    [p for p in model.parameters() if p.requires_grad], lr=1e-3)
def step():
  loss = model(input_ids=inputs, attention_mask=torch.ones_like(inputs),
               decoder_input_ids=given['decoder_input_tokens'],
               labels=given['decoder_target_tokens']).loss
  optimizer.zero_grad()
  loss.backward()
  torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
  optimizer.step()
  return loss.item()
for line in sys.stdin:
  started = time.perf_counter()
  loss = step()
  print('PEFT', time.perf_counter() - started, loss, flush=True)
"""


def against_peft(size, python, rounds):
  """LoRA's step here and there, in turn, each in its process."""
  sizes, _ = train_step.SIZES[size]
  family = models.family_of(t5.Transformer(t5.T5Config(**sizes)))
  params = jax.device_get(jax.jit(family.init)(jax.random.key(0)))
  batch = batch_of(size)
  with tempfile.TemporaryDirectory() as folder:
    model = pathlib.Path(folder) / 'model'
    described = models.describe(family.module)
    config = t5_hf.config_to_hf(described, 't5') | {'dropout_rate': 0.0}
    mj.save_checkpoint(
      model, t5_hf.to_hf(tree.flatten(params)), format='safetensors',
      config=config,
    )  # fmt: skip
    np.savez(model / 'batch.npz', **batch)
    process = subprocess.Popen(
      [python, '-c', _PEFT, str(model)],
      env=dict(os.environ, HF_HUB_OFFLINE='1'), stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    losses = {}

    def theirs():
      process.stdin.write('step\n')
      process.stdin.flush()
      for line in process.stdout:
        if line.startswith('PEFT '):
          took, loss = map(float, line.split()[1:])
          losses.setdefault('peft', loss)
          return took
      raise RuntimeError('PEFT ended; run its code in this file to see why.')

    call = step_of(size, FAMILIES['lora'], batch, params)

    def ours():
      loss = call()
      losses.setdefault('ours', float(loss))
      return loss

    times = {'ours': [], 'peft': []}
    for i in range(rounds + _WARM):
      took = theirs(), train_step.seconds(ours)
      if i >= _WARM:
        times['peft'].append(took[0])
        times['ours'].append(took[1])
    process.stdin.close()
    process.wait()
  medians = {name: float(np.median(each)) for name, each in times.items()}
  return {
    **{f'{name}_s': round(each, 4) for name, each in medians.items()},
    'times_faster': round(medians['peft'] / medians['ours'], 3),
    'first_losses_differ_by': abs(losses['ours'] - losses['peft']),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--sizes', default=','.join(train_step.SIZES))
  parser.add_argument('--peft', help='a Python that imports peft')
  parser.add_argument('--json', help='also write the result to this file')
  options = parser.parse_args()
  result = {'machine': train_step.machine()}
  for size in options.sizes.split(','):
    result[size] = {'families': families(size, options.rounds)}
    for name, row in result[size]['families'].items():
      print(
        f'{size}, {name}: {row["step_s"]:.3f} s a step, {row["of_full"]:.2f} of '
        'full fine-tuning',
        flush=True,
      )
    row = result[size]['experts'] = mixed(size, options.rounds)
    print(
      f'{size}, eight LoRA experts in a batch: {row["ratio"]:.2f} of one',
      flush=True,
    )
    if options.peft:
      row = against_peft(size, options.peft, options.rounds)
      result[size]['peft'] = row
      print(
        f'{size}, LoRA: ours {row["ours_s"]:.3f} s, PEFT {row["peft_s"]:.3f} s, '
        f'{row["times_faster"]:.2f} times faster'
      )
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + '\n')
  print(json.dumps(result))


if __name__ == '__main__':
  main()
