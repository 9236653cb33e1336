# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Our T5 family through transformers and back: same bits, same logits.

For T5 1.0, T5 1.1, mT5, ByT5's depths and umT5 with random weights: a checkpoint
of ours is converted to Hugging Face's names (`mergejax convert --names hf-...`),
transformers loads it, computes logits in float32 on torch's CPU and saves the
model again, and ours is loaded from what it saved.

Usage:
  python benchmarks/hf_round_trip.py --torch PYTHON [--rounds N]

`--torch` names a Python that has torch and transformers; the project needs
neither. The last line is JSON.

Expect: every parameter back bit for bit, and logits within 1e-4 both of our
model and of the one that transformers saved. transformers 5 warns that the head
and the embedding are two arrays: it writes `tie_word_embeddings: true` for all
of them, and `names/t5.py` says how the file is read.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np

import mergejax as mj
from mergejax import models
from mergejax.cli import convert
from mergejax.core import tree
from mergejax.models import layer_stacks
from mergejax.nn import t5

_SIZES = dict(
  vocab_size=96, emb_dim=48, num_heads=4, head_dim=8, num_encoder_layers=3,
  num_decoder_layers=3, mlp_dim=80,
)  # fmt: skip
_GATED = {'mlp_activations': ('gelu', 'linear')}
KINDS = {
  't5_1_0': (
    'hf-t5', {'mlp_activations': ('relu',), 'logits_via_embedding': True}
  ),
  't5_1_1': ('hf-t5', _GATED),
  'byt5': ('hf-t5', {**_GATED, 'num_decoder_layers': 1}),
  'mt5': ('hf-mt5', _GATED),
  'umt5': ('hf-umt5', {**_GATED, 'relative_per_layer': True}),
  'scanned': ('hf-t5', {**_GATED, 'scan_layers': True}),
}  # fmt: skip
TOLERANCE = 1e-4

# Runs where torch and transformers are: folder in, folder and logits out.
_THEIRS = """
import sys
import numpy as np
import torch
import transformers

source, saved, tokens, out = sys.argv[1:]
model = transformers.AutoModelForSeq2SeqLM.from_pretrained(
  source, dtype=torch.float32
).eval()
given = {k: torch.from_numpy(x) for k, x in np.load(tokens).items()}
with torch.no_grad():
  logits = model(
    input_ids=given['inputs'],
    attention_mask=(given['inputs'] > 0).long(),
    decoder_input_ids=given['targets'],
  ).logits
model.save_pretrained(saved)
np.savez(out, logits=logits.numpy())
print(transformers.__version__, torch.__version__, type(model).__name__)
"""


def random_params(module, seed):
  """Random numbers of the size that training gives, norm scales near 1.

  The initial ones would not do: all norm scales equal, small logits.
  """
  family = models.family_of(module)
  rng = np.random.default_rng(seed)
  fresh = tree.flatten(jax.device_get(family.init(jax.random.key(seed))))
  return {
    path: (leaf + 0.1 * rng.normal(size=leaf.shape)).astype(np.float32)
    for path, leaf in fresh.items()
  }


def random_tokens(seed):
  """Rows of tokens, padded on the encoder's side."""
  rng = np.random.default_rng(seed)
  inputs = rng.integers(2, _SIZES['vocab_size'], (3, 17))
  inputs[1, 11:] = 0
  targets = rng.integers(2, _SIZES['vocab_size'], (3, 9))
  targets[:, 0] = 0
  return {'inputs': inputs, 'targets': targets}


def logits_of(module, params, tokens):
  inputs, targets = (tokens[n].astype(np.int32) for n in ('inputs', 'targets'))
  # transformers masks nothing but the future in the decoder.
  return np.asarray(
    module.apply({'params': params}, inputs, targets, np.ones_like(targets))
  )


def round_trip(kind, seed, python, folder):
  """What one model kept on its way."""
  names, fields = KINDS[kind]
  module = t5.Transformer(t5.T5Config(**{**_SIZES, **fields}))
  leaves = random_params(module, seed)
  source, theirs, saved = (folder / n for n in ('ours', 'theirs', 'saved'))
  mj.save_checkpoint(
    source, tree.unflatten(leaves), config=models.describe(module)
  )
  convert.main(
    [str(source), str(theirs), '--format=safetensors', f'--names={names}']
  )
  tokens = random_tokens(seed)
  np.savez(folder / 'tokens.npz', **tokens)
  done = subprocess.run(
    [python, '-c', _THEIRS, theirs, saved, folder / 'tokens.npz',
     folder / 'logits.npz'],
    capture_output=True, text=True,
  )  # fmt: skip
  if done.returncode:
    sys.exit(done.stderr)
  expected = np.load(folder / 'logits.npz')['logits']
  again, params = mj.load_model(saved)
  apart = dataclasses.replace(module.config, scan_layers=False)
  back = tree.flatten(jax.device_get(params))
  wanted = layer_stacks.restack(leaves, apart)
  ours = logits_of(module, tree.unflatten(leaves), tokens)
  return {
    'with': done.stdout.strip(),
    'same_configuration': again.config == apart,
    'same_bits': set(back) == set(wanted)
    and all(np.array_equal(back[path], wanted[path]) for path in wanted),
    'largest_logit': float(np.abs(expected).max()),
    'difference': float(np.abs(ours - expected).max()),
    'difference_of_the_saved': float(
      np.abs(logits_of(again, params, tokens) - expected).max()
    ),
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--torch', required=True, help='a Python with torch')
  parser.add_argument('--rounds', type=int, default=1, help='seeds a model')
  options = parser.parse_args()
  results, good = {}, True
  for kind in KINDS:
    for seed in range(options.rounds):
      with tempfile.TemporaryDirectory() as folder:
        found = round_trip(kind, seed, options.torch, pathlib.Path(folder))
      good &= found['same_bits'] and found['same_configuration']
      good &= found['difference'] < TOLERANCE
      good &= found['difference_of_the_saved'] < TOLERANCE
      print(kind, seed, found, flush=True)
      results[f'{kind}/{seed}'] = found
  print(json.dumps({'tolerance': TOLERANCE, 'passed': good, **results}))
  sys.exit(not good)


if __name__ == '__main__':
  main()
