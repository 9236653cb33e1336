# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Trains four small experts on the mesh of this process and prints losses.

Usage: side_by_side.py BRANCHES DATA [COORDINATOR PROCESSES INDEX]
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

EXPERTS = 4


def tokens(expert):
  rng = np.random.default_rng(expert)
  # Every expert has its own, learnable, kind of sequence.
  start = rng.integers(3, 20, (64, 1))
  targets = (start + np.arange(8) * (expert + 1)) % 17 + 3
  inputs = np.pad(targets[:, :-1], [(0, 0), (1, 0)])
  return {
    'decoder_input_tokens': inputs.astype(np.int32),
    'decoder_target_tokens': targets.astype(np.int32),
  }


def build(mesh, optimizer=None, batched=None):
  """`(compiled step, state, stream, place)` of four experts."""
  from mergejax.experts import branch
  from mergejax.nn import lm
  from mergejax.training import arrays
  from mergejax.training import optim

  module = lm.LanguageModel(
      lm.LMConfig(vocab_size=20, emb_dim=16, num_heads=2, head_dim=8,
                  num_layers=1, mlp_dim=32)
  )  # fmt: skip
  optimizer = optimizer or optim.adafactor(0.05)
  trainer = branch.BranchTrainer(
    module, optimizer, experts='abcd', mesh=mesh, batched=batched
  )
  one_step = trainer.step(1)
  layout = trainer.layout(one_step)
  state = trainer.init(one_step, layout, jax.random.key(0))
  stream = branch.StackedStream(
    [
      arrays.ArrayStream(tokens(i), 8, seed=i)
      for i in branch.local_experts(mesh, EXPERTS)
    ]
  )
  step = trainer.compile(one_step, layout)
  return step, state, stream, trainer.placer(), one_step.update


def main(branches, data, *distributed):
  if distributed:
    coordinator, processes, index = distributed
    from mergejax import partition as first

    first.join_processes(coordinator, int(processes), int(index))
  from mergejax import partition
  from mergejax.merging import on_mesh
  from mergejax.methods import mean

  mesh = partition.make_mesh(branch=int(branches), data=int(data))
  step, state, stream, place, _ = build(mesh)
  losses = []
  for _ in range(10):
    state, metrics = step(state, place(next(stream)))
    losses.append(partition.to_host(metrics['loss']).tolist())
  merged = jax.jit(lambda p: on_mesh.merge_experts(p, mean.linear()))(
    state.params
  )
  norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(merged)))
  norm = float(partition.to_host(norm))
  if jax.process_index() == 0:
    print(json.dumps({'losses': losses, 'merged_norm': norm}))


if __name__ == '__main__':
  main(*sys.argv[1:])
