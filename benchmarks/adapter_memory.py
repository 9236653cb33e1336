# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Memory of a compiled training step: full fine-tuning and adapters.

T5 1.0 base and large, batch 32, 128 tokens in and 32 out, float32, AdamW. Steps
are compiled, not run: no parameter is made. Told are the bytes of XLA's
analysis: temporaries (activations and gradients), and all that a step needs,
with parameters and moments; of a chip also the program.

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

import mergejax as mj  # noqa: E402
from mergejax import models  # noqa: E402
from mergejax import partition  # noqa: E402
from mergejax import training  # noqa: E402
from mergejax.nn import t5  # noqa: E402
from mergejax.pods import chips  # noqa: E402
from mergejax.pods import compiler  # noqa: E402
from mergejax.pods import work  # noqa: E402

RESULTS = pathlib.Path(__file__).parent / 'results' / 'adapter_memory.json'
# Width, layers of each stack, heads of 64, width of the feed-forward block; and
# the layers that the paper's ladder reads.
SIZES = {
  'base': ((768, 12, 12, 3072), [i for i in range(12) if i % 4]),
  'large': ((1024, 24, 16, 4096), list(range(1, 24, 2))),
}

LENGTHS = {
  'encoder_input_tokens': 128,
  'decoder_input_tokens': 32,
  'decoder_target_tokens': 32,
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


def measured(module, adapter, topology: str) -> dict:
  family = models.family_of(module)
  if adapter is not None:
    family = mj.adapters.adapt(module, adapter)
  devices = chips.devices(topology) if topology else jax.devices()
  trainer = training.Trainer(
    family,
    training.optim.adamw(1e-3),
    mesh=partition.make_mesh(devices=devices[:1]),
  )
  found = compiler.report(
    work.training_step(trainer, LENGTHS, rows=32), topology=topology
  )
  specs = trainer.specs
  figures = {
    'trained': sum(s.size for p, s in specs.items() if family.learns(p)),
    'temporaries_mb': round(found.temporaries / 1e6, 1),
    'needed_mb': round(found.total / 1e6, 1),
  }
  if topology:
    figures |= {'fits': found.fits, 'compile_cpu_s': found.compile_cpu_s}
  return figures


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--size', default='base', choices=SIZES)
  parser.add_argument(
    '--topology', default='', help='such as v5e:2x2; by default the CPU'
  )
  parser.add_argument('--only', help='rows, joined by commas')
  options = parser.parse_args()
  (width, layers, heads, hidden), _ = SIZES[options.size]
  module = t5.Transformer(t5.T5Config(
    emb_dim=width, num_heads=heads, head_dim=64, mlp_dim=hidden,
    num_encoder_layers=layers, num_decoder_layers=layers,
    mlp_activations=('relu',), logits_via_embedding=True,
  ))  # fmt: skip
  adapters = rows(options.size)
  names = options.only.split(',') if options.only else list(adapters)
  where = options.topology.split(':')[0] if options.topology else 'cpu'
  case = f'{options.size} on {where}'
  for name in names:
    found = measured(module, adapters[name], options.topology)
    print(case, name, json.dumps(found), flush=True)
    done = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    done.setdefault(case, {})[name] = found
    RESULTS.write_text(json.dumps(done, indent=2) + '\n')
    jax.clear_caches()
  show(case, json.loads(RESULTS.read_text())[case])


def show(case: str, result: dict) -> None:
  """The rows of a case, each beside full fine-tuning."""
  print(
    f'{case:<16}{"trained":>14}{"temporaries":>14}{"all MB":>10}{"saved":>8}'
  )
  for name, found in result.items():
    saved = ''
    if 'full' in result:
      saved = f'{1 - found["needed_mb"] / result["full"]["needed_mb"]:.0%}'
    print(
      f'{name:<16}{found["trained"]:>14,}{found["temporaries_mb"]:>14,.1f}'
      f'{found["needed_mb"]:>10,.1f}{saved:>8}'
    )


if __name__ == '__main__':
  main()
