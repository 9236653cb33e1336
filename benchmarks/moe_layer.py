# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Speed of a mixture-of-experts layer, forward and backward, on one device.

Ours against our dense layer of the same operations a token, and against
flaxformer's layer in its forms, in one run: all cases alternate, medians are
quoted, and the last line is JSON. Besides the time on the clock the time of all
cores is told, which other programs on the machine disturb less.

Usage:
  python benchmarks/moe_layer.py [--flaxformer PATH --peer_python PYTHON]

`--flaxformer` is a folder with flaxformer's source, `--peer_python` a Python
that imports it; without them only our cases run.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from train_step import machine

from mergejax.nn import layers
from mergejax.nn import moe
from mergejax.nn import moe_config

SIZES = dict(experts=8, batch=16, length=256, embed=256, hidden=1024)
FACTOR = 1.25


def ours(sizes) -> dict:
  """Our cases: `{name: call}`, each one step of gradients."""
  config = lambda **settings: moe_config.MoeConfig(
    num_experts=sizes['experts'],
    group_size=sizes['batch'] * sizes['length'],
    **{'eval_capacity_factor': FACTOR, **settings},
  )
  layer = lambda **settings: moe.MoeLayer(config(**settings), sizes['hidden'])
  modules = {
    'dense': layers.Mlp(sizes['hidden']),
    'top1': layer(),
    'top2': layer(top_k=2),
    'top1_dropless': layer(eval_capacity_factor=None),
    'top2_dropless': layer(top_k=2, eval_capacity_factor=None),
    'expert_choice': layer(router='experts_choose'),
  }
  shape = sizes['batch'], sizes['length'], sizes['embed']
  inputs = np.random.RandomState(0).randn(*shape).astype(np.float32)
  return {name: _step(module, inputs) for name, module in modules.items()}


def _step(module, inputs):
  params = jax.jit(module.init)(jax.random.key(0), inputs)['params']

  def loss(params, inputs):
    return jnp.sum(jnp.square(module.apply({'params': params}, inputs)))

  graded = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  return lambda: jax.block_until_ready(graded(params, inputs))


_PEER = """
import json, sys, time
import jax, jax.numpy as jnp, numpy as np
from flaxformer.architectures.moe import moe_layers, routing
from flaxformer.components import dense
sizes, factor = json.loads(sys.argv[1])
def router(cls, **settings):
  weights = routing.RouterWeights(use_bias=False, dtype=jnp.float32)
  return cls(router_weights=weights, jitter_noise=0.0, dtype=jnp.float32,
             ignore_padding_tokens=False, **settings)
def mlp():
  return dense.MlpBlock(
      use_bias=False, intermediate_dim=sizes['hidden'], activations=('relu',),
      intermediate_dropout_rate=0.0, final_dropout_rate=0.0, dtype=jnp.float32)
def layer(router):
  return moe_layers.MoeLayer(
      num_experts=sizes['experts'],
      max_group_size=sizes['batch'] * sizes['length'],
      train_capacity_factor=factor, eval_capacity_factor=factor, expert=mlp(),
      router=router, num_expert_partitions=1, num_model_partitions=1,
      min_expert_capacity=4, dropout_rate=0.0, dtype=jnp.float32,
      split_params=True)
modules = {'dense': mlp()}
for k in (1, 2):
  for form, cls in (('scatter', routing.TokensChooseScatterRouter),
                    ('mask', routing.TokensChooseMaskedRouter)):
    modules[f'top{k}_{form}'] = layer(router(
        cls, num_selected_experts=k, batch_prioritized_routing=False))
modules['expert_choice'] = layer(router(routing.ExpertsChooseMaskedRouter))
inputs = np.random.RandomState(0).randn(
    sizes['batch'], sizes['length'], sizes['embed']).astype(np.float32)
steps = {}
for name, module in modules.items():
  params = module.init(
      {'params': jax.random.PRNGKey(0)}, inputs, enable_dropout=False)['params']
  def loss(params, inputs, module=module):
    found, _ = module.apply({'params': params}, inputs, enable_dropout=False,
                            mutable=['intermediates'])
    return jnp.sum(jnp.square(found))
  graded = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  steps[name] = lambda graded=graded, params=params: jax.block_until_ready(
      graded(params, inputs))
  steps[name]()
print('PEER', json.dumps(list(steps)), flush=True)
for line in sys.stdin:
  wall, cpu = time.perf_counter(), time.process_time()
  steps[line.strip()]()
  print('PEER', json.dumps([time.perf_counter() - wall,
                            time.process_time() - cpu]), flush=True)
"""


class Peer:
  """flaxformer's cases, in a process of their own."""

  def __init__(self, python: str, source: str, sizes):
    self._process = subprocess.Popen(
      [python, '-c', _PEER, json.dumps((sizes, FACTOR))],
      env=dict(os.environ, PYTHONPATH=source, JAX_PLATFORMS='cpu'),
      stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    self.names = self._read()

  def _read(self):
    for line in self._process.stdout:
      if line.startswith('PEER '):
        return json.loads(line.removeprefix('PEER '))
    raise RuntimeError('flaxformer ended; run it alone to see why.')

  def timed(self, name):
    """`(wall, cpu)` seconds of one step."""
    self._process.stdin.write(name + '\n')
    self._process.stdin.flush()
    return self._read()

  def close(self):
    self._process.stdin.close()
    self._process.wait()


def timed(call) -> tuple[float, float]:
  """`(wall, cpu)` seconds of one call."""
  wall, cpu = time.perf_counter(), time.process_time()
  call()
  return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=15)
  parser.add_argument('--flaxformer', help="a folder with flaxformer's source")
  parser.add_argument('--peer_python', default=sys.executable)
  parser.add_argument('--json', help='also write the result to this file')
  options = parser.parse_args()
  cases = {f'ours/{n}': lambda c=c: timed(c) for n, c in ours(SIZES).items()}
  peer = None
  if options.flaxformer:
    peer = Peer(options.peer_python, options.flaxformer, SIZES)
    cases |= {f'flaxformer/{n}': lambda n=n: peer.timed(n) for n in peer.names}
  times = {name: [] for name in cases}
  for i in range(options.rounds + 2):
    for name, call in cases.items():
      took = call()
      if i >= 2:  # compiled and warm
        times[name].append(took)
  if peer is not None:
    peer.close()
  medians = {name: np.median(own, axis=0) for name, own in times.items()}
  result = {
    'machine': machine(), 'sizes': SIZES, 'capacity_factor': FACTOR,
    'milliseconds': {
      name: {'wall': round(1e3 * wall, 1), 'cpu': round(1e3 * cpu, 1)}
      for name, (wall, cpu) in medians.items()
    },
    'ratios': ratios(medians),
  }  # fmt: skip
  for name, row in result['milliseconds'].items():
    print(f'{name:28s} {row["wall"]:7.1f} ms, cores {row["cpu"]:7.1f} ms')
  for name, row in result['ratios'].items():
    print(f'{name:44s} {row["wall"]:.2f}, cores {row["cpu"]:.2f}')
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + '\n')
  print(json.dumps(result))


def ratios(medians) -> dict:
  """What the claims are about: each of ours over what it is compared with."""
  found = {}

  def tell(mine, other):
    wall, cpu = medians[f'ours/{mine}'] / medians[other]
    name = f'{mine} / {other}'
    found[name] = {'wall': round(wall, 3), 'cpu': round(cpu, 3)}

  for name in (
    'top1',
    'top2',
    'top1_dropless',
    'top2_dropless',
    'expert_choice',
  ):
    tell(name, 'ours/dense')
  if 'flaxformer/dense' in medians:
    for k in (1, 2):
      forms = [f'flaxformer/top{k}_{form}' for form in ('scatter', 'mask')]
      fastest = min(forms, key=lambda form: medians[form][0])
      tell(f'top{k}', fastest)
      tell(f'top{k}_dropless', fastest)
    tell('expert_choice', 'flaxformer/expert_choice')
  return found


if __name__ == '__main__':
  sys.exit(main())
