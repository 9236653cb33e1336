# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Memory of a large T5 in training: no device holds a whole copy of it.

A T5 1.1 of a billion parameters is initialised and stepped on eight fake CPU
devices, its parameters spread over them (`fsdp`), its layers scanned and
computed anew in the backward pass, so that a kernel is whole only while its
layer is at work. Told are the bytes that the compiled programs need on each
device, those that the state really takes there, and the resident memory of the
process, which holds all eight.

Usage:
  python benchmarks/train_memory.py [--width 2048] [--layers 8] [--json FILE]
"""

import argparse
import json
import os
import pathlib
import resource
import time

os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax  # noqa: E402
import numpy as np  # noqa: E402

from mergejax import partition  # noqa: E402
from mergejax import training  # noqa: E402
from mergejax.core import tree  # noqa: E402
from mergejax.nn import t5  # noqa: E402


def megabytes(size: float) -> float:
  return round(size / 1e6, 1)


def needs(compiled) -> dict:
  """What a compiled program needs on one device, in MB."""
  found = compiled.memory_analysis()
  return {
    'arguments_mb': megabytes(found.argument_size_in_bytes),
    'outputs_mb': megabytes(found.output_size_in_bytes),
    'temporaries_mb': megabytes(found.temp_size_in_bytes),
    'donated_mb': megabytes(found.alias_size_in_bytes),
  }


def resident() -> dict:
  """Memory of this process now, and at its largest, in MB."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  return {
    'now_mb': megabytes(pages * resource.getpagesize()),
    'largest_mb': megabytes(
      1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ),
  }


def batch_of(rows: int, length_in: int, length_out: int) -> dict:
  rng = np.random.default_rng(0)
  targets = rng.integers(3, 32000, (rows, length_out)).astype(np.int32)
  inputs = rng.integers(3, 32000, (rows, length_in)).astype(np.int32)
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.pad(targets[:, :-1], [(0, 0), (1, 0)]),
    'decoder_target_tokens': targets,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--width', type=int, default=2048)
  parser.add_argument('--layers', type=int, default=8)
  parser.add_argument('--steps', type=int, default=1)
  parser.add_argument('--json', help='also write the result to this file')
  options = parser.parse_args()
  config = t5.T5Config(
    emb_dim=options.width, num_heads=options.width // 64, head_dim=64,
    mlp_dim=options.width * 5 // 2, num_encoder_layers=options.layers,
    num_decoder_layers=options.layers, scan_layers=True, param_scan_axis=0,
    remat_policy='full',
  )  # fmt: skip
  mesh = partition.make_mesh(data=8)
  trainer = training.Trainer(
    t5.Transformer(config), training.optim.adafactor(1e-3), mesh=mesh,
    rules=partition.fsdp(),
  )  # fmt: skip
  specs = trainer.family.specs()
  whole = sum(spec.nbytes for spec in specs.values())
  result = {
    'parameters': sum(spec.size for spec in specs.values()),
    'whole_copy_mb': megabytes(whole),
    'devices': mesh.size,
    'resident_before': resident(),
  }
  step = trainer.step(1)
  layout = trainer.layout(step)
  fresh = jax.jit(
    lambda key: step.init(trainer.family.init(key), key), out_shardings=layout
  )
  key = jax.random.key(0)
  started = time.perf_counter()
  made = fresh.lower(key).compile()
  result['init'] = needs(made)
  state = jax.block_until_ready(made(key))
  result['init_s'] = round(time.perf_counter() - started, 1)
  result['resident_after_init'] = resident()
  held = dict.fromkeys(range(mesh.size), 0)
  largest = 0.0
  for path, leaf in tree.flatten(state).items():
    for shard in leaf.addressable_shards:
      held[shard.device.id] += shard.data.nbytes
    if path.startswith('params/') and leaf.size > 1e5:
      largest = max(largest, leaf.addressable_shards[0].data.size / leaf.size)
  result['state_on_each_device_mb'] = megabytes(max(held.values()))
  result['largest_share_of_a_kernel'] = largest
  print(json.dumps(result, indent=2), flush=True)
  batch = trainer.placer()(batch_of(8, 64, 16))
  started = time.perf_counter()
  compiled = trainer.compile(step, layout).lower(state, batch).compile()
  result['compile_s'] = round(time.perf_counter() - started, 1)
  result['step'] = needs(compiled)
  print(json.dumps(result['step']), flush=True)
  for _ in range(options.steps):
    started = time.perf_counter()
    state, metrics = jax.block_until_ready(compiled(state, batch))
    result['step_s'] = round(time.perf_counter() - started, 1)
  result['loss'] = float(metrics['loss'])
  result['resident_after_step'] = resident()
  print(json.dumps(result, indent=2))
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + '\n')


if __name__ == '__main__':
  main()
