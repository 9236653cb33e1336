# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Speed of the training step, two claims, each side by side in one run.

1. K experts in one program cost no more, per expert, than one expert K times.
2. A step of our T5 1.1 is at least as fast as T5X's own step for the same
   model, batch and optimizer.

Usage:
  python benchmarks/train_step.py [--t5x PYTHON] [--t5x_path A:B:C:D]

`--t5x` names a Python that imports T5X (with `--t5x_path` as its PYTHONPATH);
without it only the first claim is measured. The two sides alternate; medians
are quoted, and the last line is JSON.
"""

import argparse
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

import jax
import numpy as np

from mergejax import partition
from mergejax.experts import branch
from mergejax.nn import lm
from mergejax.nn import t5
from mergejax.training import objective
from mergejax.training import optim
from mergejax.training import trainer as trainer_lib

# T5 1.1 by their numbers of parameters, and what is trained at a time:
# examples, tokens of inputs and of targets.
SIZES = {
  '9.7M': (
    dict(vocab_size=512, emb_dim=256, num_heads=4, num_encoder_layers=4,
         num_decoder_layers=4, head_dim=64, mlp_dim=1024),
    (8, 256, 64),
  ),
  '77M': (
    dict(vocab_size=32128, emb_dim=512, num_heads=6, num_encoder_layers=8,
         num_decoder_layers=8, head_dim=64, mlp_dim=1024),
    (4, 128, 32),
  ),
}  # fmt: skip


def seconds(call) -> float:
  started = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - started


def machine() -> dict:
  """What the numbers were measured on."""
  model = platform.processor()
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if cpuinfo.exists():
    names = [
      line.split(':')[1].strip()
      for line in cpuinfo.read_text().splitlines()
      if line.startswith('model name')
    ]
    model = names[0] if names else model
  return {
    'device': jax.devices()[0].device_kind,
    'processor': model,
    'cores': os.cpu_count(),
    'jax': jax.__version__,
    'python': platform.python_version(),
  }


def side_by_side(rounds: int, experts: int = 4) -> dict:
  """Time per expert and step: one program of K, against one expert K times."""
  mesh = partition.make_mesh(devices=jax.devices()[:1])
  results = {}
  for name, config, batch_size, length in (
      ('tiny, 0.4M', dict(emb_dim=128, num_heads=2, num_layers=2, mlp_dim=256),
       32, 64),
      ('small, 3.8M', dict(emb_dim=256, num_heads=4, num_layers=4, mlp_dim=768),
       16, 128),
  ):  # fmt: skip
    module = lm.LanguageModel(lm.LMConfig(head_dim=64, **config))
    optimizer = optim.adafactor(0.01)
    key = jax.random.key(0)
    single = trainer_lib.Trainer(module, optimizer, mesh=mesh)
    several = branch.BranchTrainer(
      module, optimizer, mesh=mesh, experts=range(experts)
    )
    step = single.step(1)
    tokens = np.random.default_rng(0).integers(
      3, 259, (experts, batch_size, length)
    )
    batch = {
      'decoder_input_tokens': tokens.astype(np.int32),
      'decoder_target_tokens': tokens.astype(np.int32),
    }
    layout, stacked = single.layout(step), several.layout(step)
    alone = [single.init(step, layout, key) for _ in range(experts)]
    together = several.init(step, stacked, key)
    one, many = single.compile(step, layout), several.compile(step, stacked)
    put_one, put_many = single.placer(), several.placer()

    def in_sequence(one=one, alone=alone, batch=batch, put=put_one):
      for i in range(experts):
        part = {k: v[i] for k, v in batch.items()}
        alone[i], metrics = one(alone[i], put(part))
      return metrics

    state = [together]

    def in_one_program(many=many, state=state, batch=batch, put=put_many):
      state[0], metrics = many(state[0], put(batch))
      return metrics

    times = {'one_program': [], 'in_sequence': []}
    for i in range(rounds + 2):
      for side, call in (
        ('one_program', in_one_program),
        ('in_sequence', in_sequence),
      ):
        took = seconds(call)
        if i >= 2:  # compiled and warm
          times[side].append(took / experts)
    medians = {k: float(np.median(v)) for k, v in times.items()}
    results[name] = {
      **{f'{k}_s': round(v, 5) for k, v in medians.items()},
      'ratio': round(medians['one_program'] / medians['in_sequence'], 3),
    }
  return results


def t5_batch(shape: tuple[int, int, int]) -> dict:
  """A batch for the T5: examples, tokens of inputs and of targets."""
  batch, length_in, length_out = shape
  rng = np.random.RandomState(0)
  targets = rng.randint(3, 512, (batch, length_out)).astype(np.int32)
  inputs = rng.randint(3, 512, (batch, length_in)).astype(np.int32)
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.pad(targets[:, :-1], [(0, 0), (1, 0)]),
    'decoder_target_tokens': targets,
    'decoder_loss_weights': np.ones_like(targets),
  }


def t5_step(size: str):
  """A call that makes one training step of the T5 and gives its loss."""
  sizes, shape = SIZES[size]
  module = t5.Transformer(t5.T5Config(**sizes))
  optimizer = optim.adafactor(0.01)
  key = jax.random.key(0)
  mesh = partition.make_mesh(devices=jax.devices()[:1])
  trainer = trainer_lib.Trainer(
    module, optimizer, mesh=mesh,
    objective=objective.cross_entropy(normalizing_factor=None),
  )  # fmt: skip
  made = trainer.step(1)
  layout = trainer.layout(made)
  state, step = trainer.init(made, layout, key), trainer.compile(made, layout)
  batch = t5_batch(shape)
  state = [state]

  def call():
    state[0], metrics = step(state[0], batch)
    return metrics['loss']

  return call


_T5X = """
import json, sys, time
import jax, jax.numpy as jnp, numpy as np, seqio
from t5x import adafactor, models, partitioning, utils
from t5x.examples.t5 import network
sizes, (batch, length_in, length_out) = json.loads(sys.argv[1])
config = network.T5Config(
    dtype=jnp.float32, mlp_activations=('gelu', 'linear'), dropout_rate=0.0,
    **sizes)
vocab = seqio.PassThroughVocabulary(size=config.vocab_size, eos_id=1)
optimizer = adafactor.Adafactor(
    decay_rate=0.8, step_offset=0,
    logical_factor_rules=adafactor.standard_logical_factor_rules())
model = models.EncoderDecoderModel(
    module=network.Transformer(config=config), input_vocabulary=vocab,
    output_vocabulary=vocab, optimizer_def=optimizer, z_loss=1e-4)
partitioner = partitioning.PjitPartitioner(
    num_partitions=1,
    logical_axis_rules=partitioning.standard_logical_axis_rules())
rng = np.random.RandomState(0)
targets = rng.randint(3, 512, (batch, length_out)).astype(np.int32)
data = dict(
    encoder_input_tokens=rng.randint(3, 512, (batch, length_in)).astype(np.int32),
    decoder_input_tokens=np.pad(targets[:, :-1], [(0, 0), (1, 0)]),
    decoder_target_tokens=targets, decoder_loss_weights=np.ones_like(targets))
init = utils.TrainStateInitializer(
    optimizer_def=optimizer, init_fn=model.get_initial_variables,
    input_shapes={k: v.shape for k, v in data.items()}, partitioner=partitioner)
state = init.from_scratch(jax.random.PRNGKey(0))
def step(state, data):
  loss = lambda p: model.loss_fn(p, data, jax.random.PRNGKey(0))
  (value, _), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
  return state.apply_gradient(grads, learning_rate=0.01), value
compiled = partitioner.partition(
    step, in_axis_resources=(init.train_state_axes,
                             partitioner.data_partition_spec),
    out_axis_resources=(init.train_state_axes, None), donate_argnums=(0,))
for line in sys.stdin:
  started = time.perf_counter()
  state, value = compiled(state, data)
  jax.block_until_ready((state, value))
  print('T5X', time.perf_counter() - started, flush=True)
"""


def against_t5x(size: str, python: str, path: str, rounds: int) -> dict:
  """Our step and T5X's, one after the other in turn, each in its process."""
  settings = json.dumps(SIZES[size])
  process = subprocess.Popen(
    [python, '-c', _T5X, settings],
    env=dict(os.environ, PYTHONPATH=path, JAX_PLATFORMS='cpu'),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )

  def theirs():
    process.stdin.write('step\n')
    process.stdin.flush()
    for line in process.stdout:
      if line.startswith('T5X '):
        return float(line.split()[1])
    raise RuntimeError('T5X ended; run it alone to see why.')

  ours = t5_step(size)
  times = {'ours': [], 't5x': []}
  for i in range(rounds + 2):
    a, b = theirs(), seconds(ours)
    if i >= 2:  # compiled and warm
      times['t5x'].append(a)
      times['ours'].append(b)
  process.stdin.close()
  process.wait()
  medians = {k: float(np.median(v)) for k, v in times.items()}
  return {
    **{f'{k}_s': round(v, 4) for k, v in medians.items()},
    'times_faster': round(medians['t5x'] / medians['ours'], 3),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--t5x', help='a Python that imports T5X')
  parser.add_argument('--t5x_path', default='', help='its PYTHONPATH')
  parser.add_argument('--json', help='also write the result to this file')
  options = parser.parse_args()
  result = {'machine': machine(), 'experts': side_by_side(options.rounds)}
  for name, row in result['experts'].items():
    print(
      f'K=4 experts, {name}: one program {1e3 * row["one_program_s"]:.1f} ms '
      f'an expert, in sequence {1e3 * row["in_sequence_s"]:.1f} ms, ratio '
      f'{row["ratio"]:.3f}'
    )
  if options.t5x:
    for size, (_, shape) in SIZES.items():
      row = against_t5x(size, options.t5x, options.t5x_path, options.rounds)
      result[f't5_1_1_{size}'] = row | {'examples_inputs_targets': shape}
      print(
        f'T5 1.1, {size} parameters: ours {row["ours_s"]:.3f} s, T5X '
        f'{row["t5x_s"]:.3f} s a step, {row["times_faster"]:.2f} times faster'
      )
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + '\n')
  print(json.dumps(result))


if __name__ == '__main__':
  sys.exit(main())
