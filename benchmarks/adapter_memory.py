# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Memory of a compiled training step: full fine-tuning and adapters.

T5 1.0 base and large, batch 32, 128 tokens in and 32 out, float32, AdamW. Steps
are compiled, not run: no parameter is made. Told are the bytes of XLA's
analysis: temporaries (activations and gradients), and all that a step needs,
with parameters and moments.

Usage:
  python benchmarks/adapter_memory.py [--size base] [--topology v5e:2x2]
    [--only full,ladder]

With a topology a step is compiled for one chip of it by the TPU compiler, which
needs libtpu and no TPU. Every row is put into results/adapter_memory.json when it
is done.
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
from mergejax.pods import chips  # noqa: E402
from mergejax.training import optim  # noqa: E402
from mergejax.training import step as step_lib  # noqa: E402

RESULTS = pathlib.Path(__file__).parent / 'results' / 'adapter_memory.json'
# Width, layers of each stack, heads of 64, width of the feed-forward block; and
# the layers that the paper's ladder reads.
SIZES = {
  'base': ((768, 12, 12, 3072), [i for i in range(12) if i % 4]),
  'large': ((1024, 24, 16, 4096), list(range(1, 24, 2))),
}


def rows(size: str) -> dict:
  """Adapters by name."""
  _, kept = SIZES[size]
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


def measured(module, adapter, batch, device) -> dict:
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
  if device is not None:
    place = jax.sharding.SingleDeviceSharding(device)
    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    state, batch = jax.tree.map(put, (state, batch))
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
  parser.add_argument('--size', default='base', choices=SIZES)
  parser.add_argument('--topology', help='such as v5e:2x2; by default the CPU')
  parser.add_argument('--only', help='rows, joined by commas')
  options = parser.parse_args()
  device = None
  if options.topology:
    device = chips.devices(options.topology)[0]
  (width, layers, heads, hidden), _ = SIZES[options.size]
  module = t5.Transformer(t5.T5Config(
    emb_dim=width, num_heads=heads, head_dim=64, mlp_dim=hidden,
    num_encoder_layers=layers, num_decoder_layers=layers,
    mlp_activations=('relu',), logits_via_embedding=True,
  ))  # fmt: skip
  tokens = lambda length: jax.ShapeDtypeStruct((32, length), jnp.int32)
  batch = {
    'encoder_input_tokens': tokens(128),
    'decoder_input_tokens': tokens(32),
    'decoder_target_tokens': tokens(32),
  }
  adapters = rows(options.size)
  names = options.only.split(',') if options.only else list(adapters)
  where = options.topology.split(':')[0] if options.topology else 'cpu'
  case = f'{options.size} on {where}'
  for name in names:
    found = measured(module, adapters[name], batch, device)
    print(case, name, json.dumps(found), flush=True)
    done = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    done.setdefault(case, {})[name] = found
    RESULTS.write_text(json.dumps(done, indent=2) + '\n')
    jax.clear_caches()
  result = json.loads(RESULTS.read_text())[case]
  if 'full' in result:
    for name, found in result.items():
      saved = 1 - found['needed_mb'] / result['full']['needed_mb']
      print(f'{name}: {saved:.0%} less than full fine-tuning')


if __name__ == '__main__':
  main()
