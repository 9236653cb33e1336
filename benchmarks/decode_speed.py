# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of decoding, side by side with T5X and transformers.

T5 1.1 of 9.7 and of 77 million parameters, random weights, float32; greedy, and
a beam search of 4. No answer ends before its last token, so that all sides do
the same steps; a time is that of a whole call, inputs read and answers given.

Usage:
  python benchmarks/decode_speed.py [--t5x PYTHON --t5x_path A:B:C:D]
                                    [--torch PYTHON] [--sizes 9.7M,77M]

`--t5x` names a Python that imports T5X (with `--t5x_path` as its PYTHONPATH),
`--torch` one that imports transformers and torch; without them our side runs
alone. Every side has a process of its own; they take turns, and medians are
quoted. T5X has our weights, and must say the same tokens. The last line is
JSON.
"""

import argparse
from collections.abc import Callable
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import train_step

from mergejax import models
from mergejax.core import tree
from mergejax.evaluation import beam
from mergejax.evaluation import decode
from mergejax.nn import t5

SIZES = train_step.SIZES
METHODS = {'greedy': decode.GREEDY, 'beam': beam.Beam(beams=4)}
_NEVER = -1  # as the end token

# Both peers answer a line on standard input, 'greedy' or 'beam', by the seconds
# that it took. They are given: sizes, shapes, folder.
_COMMON = """
import json, sys, time
import numpy as np
sizes, (rows, length_in, length_out), folder = json.loads(sys.argv[1])
inputs = np.load(folder + '/inputs.npy')
"""
_SERVE = """
print('READY', flush=True)
for line in sys.stdin:
  started = time.perf_counter()
  tokens = call(line.strip())
  print('TOOK', time.perf_counter() - started, flush=True)
  np.save(f'{folder}/{NAME}_{line.strip()}.npy', tokens)
"""
_T5X = """
import functools
import jax, jax.numpy as jnp, seqio
from flax import traverse_util
from t5x import decoding, models
from t5x.examples.t5 import network
NAME = 't5x'
config = network.T5Config(
    dtype=jnp.float32, mlp_activations=('gelu', 'linear'), dropout_rate=0.0,
    **sizes)
vocab = seqio.PassThroughVocabulary(size=config.vocab_size, eos_id=1)
with np.load(folder + '/params.npz') as archive:
  params = traverse_util.unflatten_dict(
      {tuple(k.split('/')): jnp.asarray(v) for k, v in archive.items()})
batch = dict(encoder_input_tokens=inputs,
             decoder_input_tokens=np.zeros((rows, length_out), np.int32))
def made(decode_fn, num_decodes):
  model = models.EncoderDecoderModel(
      module=network.Transformer(config=config), input_vocabulary=vocab,
      output_vocabulary=vocab, optimizer_def=None, decode_fn=decode_fn)
  return jax.jit(lambda params, batch: model.predict_batch_with_aux(
      params, batch, decoder_params={'eos_id': -1}, num_decodes=num_decodes,
      return_all_decodes=False)[0])
calls = {
    'greedy': made(
        functools.partial(decoding.temperature_sample, temperature=0.0), 1),
    'beam': made(decoding.beam_search, 4)}
def call(name):
  return np.asarray(calls[name](params, batch))
"""
_TORCH = """
import torch, transformers
NAME = 'torch'
torch.manual_seed(0)
model = transformers.T5ForConditionalGeneration(transformers.T5Config(
    vocab_size=sizes['vocab_size'], d_model=sizes['emb_dim'],
    d_kv=sizes['head_dim'], d_ff=sizes['mlp_dim'],
    num_heads=sizes['num_heads'], num_layers=sizes['num_encoder_layers'],
    num_decoder_layers=sizes['num_decoder_layers'],
    feed_forward_proj='gated-gelu', tie_word_embeddings=False,
    decoder_start_token_id=0, eos_token_id=None)).eval()
model.generation_config.eos_token_id = None
given = torch.tensor(inputs, dtype=torch.long)
mask = torch.ones_like(given)
def call(name):
  with torch.inference_mode():
    found = model.generate(
        given, attention_mask=mask, do_sample=False, use_cache=True,
        num_beams=4 if name == 'beam' else 1, max_new_tokens=length_out,
        min_new_tokens=length_out)
  return found[:, 1:].numpy()
"""


class Peer:
  """Another library, in a process of its own."""

  def __init__(self, name, python, code, given, path):
    env = dict(os.environ, JAX_PLATFORMS='cpu')
    if path:
      env['PYTHONPATH'] = path
    self._name = name
    self._process = subprocess.Popen(
      [python, '-c', _COMMON + code + _SERVE, json.dumps(given)],
      env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    self._word('READY')

  def __call__(self, method: str) -> float:
    """Seconds of one call."""
    self._process.stdin.write(f'{method}\n')
    self._process.stdin.flush()
    return float(self._word('TOOK'))

  def close(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    self._process.wait()

  def _word(self, word):
    for line in self._process.stdout:
      if line.startswith(word):
        return line.removeprefix(word)
    raise RuntimeError(
      f'{self._name} ended. Run its Python with the code in this file to see '
      'why.'
    )


def ours(sizes, shape, folder) -> Callable[[str], float]:
  """A call of our decoders; leaves weights and inputs for the peers."""
  rows, length_in, length_out = shape
  module = t5.Transformer(t5.T5Config(**sizes))
  family = models.family_of(module)
  params = jax.jit(family.init)(jax.random.key(0))
  inputs = np.random.RandomState(0).randint(3, 512, (rows, length_in))
  inputs = inputs.astype(np.int32)
  np.savez(f'{folder}/params.npz', **jax.device_get(tree.flatten(params)))
  np.save(f'{folder}/inputs.npy', inputs)
  decoders = {
    name: decode.make_decoder(
      family, length=length_out, end=_NEVER, method=method
    )
    for name, method in METHODS.items()
  }

  def call(name):
    started = time.perf_counter()
    tokens = decoders[name](params, {'encoder_input_tokens': inputs})
    took = time.perf_counter() - started
    np.save(f'{folder}/ours_{name}.npy', tokens)
    return took

  return call


def measure(size: str, options: argparse.Namespace) -> dict:
  """Tokens per second of every side, by method."""
  sizes, shape = SIZES[size]
  with tempfile.TemporaryDirectory() as folder:
    sides = {'ours': ours(sizes, shape, folder)}
    given = [sizes, shape, folder]
    if options.t5x:
      sides['t5x'] = Peer('T5X', options.t5x, _T5X, given, options.t5x_path)
    if options.torch:
      sides['torch'] = Peer('torch', options.torch, _TORCH, given, '')
    result = {}
    for method in METHODS:
      times = {name: [] for name in sides}
      for i in range(options.rounds + 2):
        for name, call in sides.items():
          took = call(method)
          if i >= 2:  # compiled and warm
            times[name].append(took)
      tokens = shape[0] * shape[2]
      row = {n: round(tokens / np.median(t), 1) for n, t in times.items()}
      for peer in sides.keys() - {'ours'}:
        row[f'times_{peer}'] = round(row['ours'] / row[peer], 2)
      if options.t5x:
        said = [np.load(f'{folder}/{n}_{method}.npy') for n in ('ours', 't5x')]
        row['equal_to_t5x'] = float(np.mean(said[0] == said[1]))
      result[method] = row
    for peer in list(sides.values())[1:]:
      peer.close()
  return result


def machine(options: argparse.Namespace) -> dict:
  """What the numbers were measured on, and with."""
  found = {**train_step.machine(), 'load': round(os.getloadavg()[0], 1)}
  if options.torch:
    text = (
      'import torch, transformers as t; print(torch.__version__, t.__version__)'
    )
    said = subprocess.run(
      [options.torch, '-c', text], capture_output=True, text=True, check=True
    ).stdout.split()
    found |= dict(zip(('torch', 'transformers'), said[-2:]))
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--sizes', default=','.join(SIZES))
  parser.add_argument('--t5x', help='a Python that imports T5X')
  parser.add_argument('--t5x_path', default='', help='its PYTHONPATH')
  parser.add_argument('--torch', help='a Python that imports transformers')
  parser.add_argument('--json', help='also write the result to this file')
  options = parser.parse_args()
  result = {'machine': machine(options)}
  print(
    ' '.join(f'{name}={value}' for name, value in result['machine'].items())
  )
  for size in options.sizes.split(','):
    result[size] = measure(size, options)
    for method, row in result[size].items():
      words = ', '.join(f'{name} {value}' for name, value in row.items())
      print(f'T5 1.1 {size}, {method}, tokens/s: {words}')
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + '\n')
  print(json.dumps(result))


if __name__ == '__main__':
  sys.exit(main())
