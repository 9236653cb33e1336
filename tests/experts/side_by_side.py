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
  from mergejax import models
  from mergejax.experts import branch
  from mergejax.nn import lm
  from mergejax.training import arrays
  from mergejax.training import losses
  from mergejax.training import optim
  from mergejax.training import step as step_lib

  module = lm.LanguageModel(
      lm.LMConfig(vocab_size=20, emb_dim=16, num_heads=2, head_dim=8,
                  num_layers=1, mlp_dim=32)
  )  # fmt: skip
  optimizer = optimizer or optim.adafactor(0.05)
  key = jax.random.key(0)
  seed = step_lib.create(models.init_params(module, key), optimizer, key)
  state = branch.place_state(
    mesh, branch.branch_state(seed, EXPERTS), stacked=True
  )
  step_fn = step_lib.make_step(losses.make_loss(module), optimizer)
  stream = branch.StackedStream(
    [
      arrays.ArrayStream(tokens(i), 8, seed=i)
      for i in branch.local_experts(mesh, EXPERTS)
    ]
  )
  step = branch.compile_step(
    step_fn, mesh, state, stacked=True, batched=batched
  )
  return step, state, stream, branch.batch_placer(mesh, stacked=True), step_fn


def main(branches, data, *distributed):
  if distributed:
    coordinator, processes, index = distributed
    from mergejax import mesh as first

    first.join_processes(coordinator, int(processes), int(index))
  from mergejax import mesh as mesh_lib
  from mergejax.merging import on_mesh
  from mergejax.methods import mean

  mesh = mesh_lib.make_mesh(branch=int(branches), data=int(data))
  step, state, stream, place, _ = build(mesh)
  losses = []
  for _ in range(10):
    state, metrics = step(state, place(next(stream)))
    losses.append(mesh_lib.to_host(metrics['loss']).tolist())
  merged = jax.jit(lambda p: on_mesh.merge_experts(p, mean.linear()))(
    state.params
  )
  norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(merged)))
  norm = float(mesh_lib.to_host(norm))
  if jax.process_index() == 0:
    print(json.dumps({'losses': losses, 'merged_norm': norm}))


if __name__ == '__main__':
  main(*sys.argv[1:])
