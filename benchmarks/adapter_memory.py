# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Memory of a compiled training step: full fine-tuning and adapters.

T5 1.0 base, batch 32, 128 tokens in and 32 out, float32, AdamW. Steps are
compiled, not run: no parameter is made. Told are the bytes of XLA's analysis:
temporaries (activations and gradients), and all that a step needs, with
parameters and moments.

Usage:
  python benchmarks/adapter_memory.py [--layers 12] [--only full,ladder]
    [--json FILE]
"""

import argparse
import json
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import mergejax as mj  # noqa: E402
from mergejax import models  # noqa: E402
from mergejax.core import tree  # noqa: E402
from mergejax.nn import t5  # noqa: E402
from mergejax.training import optim  # noqa: E402
from mergejax.training import step as step_lib  # noqa: E402


def rows(layers: int) -> dict:
  """Adapters by name; the ladder reads the layers that the paper keeps."""
  kept = [i for i in range(layers) if i % 4]
  return {
    'full': None,
    'lora': mj.adapters.lora(rank=32),
    'bottleneck': mj.adapters.bottleneck(width=48),
    'ia3': mj.adapters.ia3(),
    'prompt': mj.adapters.prompt(length=100),
    'attempt': mj.adapters.attempt(sources=6, length=100),
    'ladder': mj.adapters.ladder(
      reduction=8, encoder_layers=kept, decoder_layers=kept
    ),
  }


def measured(module, adapter, batch) -> dict:
  family = models.family_of(module)
  if adapter is not None:
    family = mj.adapters.adapt(module, adapter)
  step = step_lib.make_step(family, optim.adamw(1e-3))
  specs = family.specs()
  params = tree.unflatten({
    path: jax.ShapeDtypeStruct(spec.shape, spec.dtype)
    for path, spec in specs.items()
  })  # fmt: skip
  state = jax.eval_shape(step.init, params, jax.random.key(0))
  update = jax.jit(step.update, donate_argnums=(0,))
  found = update.lower(state, batch).compile().memory_analysis()
  learned = sum(s.size for p, s in specs.items() if family.learns(p))
  needed = (
    found.argument_size_in_bytes
    + found.output_size_in_bytes
    + found.temp_size_in_bytes
    - found.alias_size_in_bytes
  )
  return {
    'trained': learned,
    'temporaries_mb': round(found.temp_size_in_bytes / 1e6, 1),
    'needed_mb': round(needed / 1e6, 1),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--layers', type=int, default=12)
  parser.add_argument('--only', help='rows, joined by commas')
  parser.add_argument('--json', help='also write the result to this file')
  options = parser.parse_args()
  module = t5.Transformer(t5.T5Config(
    emb_dim=768, num_heads=12, head_dim=64, mlp_dim=3072,
    num_encoder_layers=options.layers, num_decoder_layers=options.layers,
    mlp_activations=('relu',), logits_via_embedding=True,
  ))  # fmt: skip
  tokens = lambda length: jax.ShapeDtypeStruct((32, length), jnp.int32)
  batch = {
    'encoder_input_tokens': tokens(128),
    'decoder_input_tokens': tokens(32),
    'decoder_target_tokens': tokens(32),
  }
  adapters = rows(options.layers)
  names = options.only.split(',') if options.only else list(adapters)
  result = {}
  for name in names:
    result[name] = measured(module, adapters[name], batch)
    print(name, json.dumps(result[name]), flush=True)
    if options.json:
      pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + '\n')
  if 'full' in result:
    for name, found in result.items():
      saved = 1 - found['needed_mb'] / result['full']['needed_mb']
      print(f'{name}: {saved:.0%} less than full fine-tuning')


if __name__ == '__main__':
  main()
