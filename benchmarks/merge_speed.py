# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of `mergejax merge`, whole processes, warm cache.

1. Against mergekit, the same recipe files on three 374M-parameter bfloat16
   checkpoints and their base, both sides alternating in one run.
2. Against plainly reading the three files and writing one.
3. Against another version of mergejax, if its Python is named.
4. Sizes of 0.1, 0.4 and 1.1 billion parameters: time and memory.

Usage:
  python benchmarks/merge_speed.py [--mergekit PATH/mergekit-yaml]
      [--before OTHER/.venv/bin/python]
      [--folder DIR] [--repeats 3] [--methods linear,ties] [--sizes 0.1,0.4,1.1]
      [--json FILE]

Needs about 5 GB of disk for the first three (15 with the fourth). Medians are
quoted, and the last line is JSON.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy

# name -> (vocabulary, width, feed-forward, layers); parameters in billions.
SIZES = {
  '0.1': (32000, 512, 1408, 16),
  '0.4': (32000, 1024, 2816, 24),
  '1.1': (32000, 2048, 5632, 20),
}
RECIPES = {
  'linear': (3, False, '{{weight: {w}}}', {}),
  'task_arithmetic': (3, True, '{{weight: {w}}}', {}),
  'slerp': (2, True, '', {'t': 0.4}),
  'dare_ties': (3, True, '{{weight: {w}, density: 0.5}}', {}),
  'ties': (3, True, '{{weight: {w}, density: 0.5}}', {}),
}


def shapes(size: str) -> dict[str, tuple[int, ...]]:
  """Parameters of a Llama-shaped model."""
  vocab, width, hidden, layers = SIZES[size]
  result = {'model.embed_tokens.weight': (vocab, width)}
  for i in range(layers):
    layer = f'model.layers.{i}'
    for name in 'qkvo':
      result[f'{layer}.self_attn.{name}_proj.weight'] = (width, width)
    for name in ('gate', 'up'):
      result[f'{layer}.mlp.{name}_proj.weight'] = (hidden, width)
    result[f'{layer}.mlp.down_proj.weight'] = (width, hidden)
    for name in ('input', 'post_attention'):
      result[f'{layer}.{name}_layernorm.weight'] = (width,)
  result['model.norm.weight'] = (width,)
  result['lm_head.weight'] = (vocab, width)
  return result


def config(size: str) -> dict:
  vocab, width, hidden, layers = SIZES[size]
  return {
    'architectures': ['LlamaForCausalLM'], 'model_type': 'llama',
    'hidden_size': width, 'intermediate_size': hidden, 'vocab_size': vocab,
    'num_hidden_layers': layers, 'num_attention_heads': width // 64,
    'num_key_value_heads': width // 64, 'hidden_act': 'silu',
    'max_position_embeddings': 2048, 'rms_norm_eps': 1e-5,
    'initializer_range': 0.02, 'torch_dtype': 'bfloat16',
    'tie_word_embeddings': False,
  }  # fmt: skip


def make(folder: pathlib.Path, size: str) -> None:
  """Writes a base and three fine-tunes of it, base + 1e-3 noise."""
  for k, name in enumerate(('base', 'a', 'b', 'c')):
    target = folder / size / name
    if (target / 'config.json').exists():
      continue
    target.mkdir(parents=True, exist_ok=True)
    model = {}
    for i, (path, shape) in enumerate(shapes(size).items()):
      leaf = np.random.default_rng(i).standard_normal(shape, np.float32) * 0.02
      if k:
        noise = np.random.default_rng((i, k)).standard_normal(shape, np.float32)
        leaf = leaf + np.float32(1e-3) * noise
      model[path] = leaf.astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file(
      model, target / 'model.safetensors', metadata={'format': 'pt'}
    )
    (target / 'config.json').write_text(json.dumps(config(size)))


def recipe(folder: pathlib.Path, size: str, method: str) -> pathlib.Path:
  count, with_base, own, shared = RECIPES[method]
  lines = [f'merge_method: {method}', 'dtype: bfloat16']
  names = list('abc'[:count])
  if with_base:
    base = 'a' if method == 'slerp' else 'base'
    lines.append(f'base_model: {folder / size / base}')
  lines.append('models:')
  for name, w in zip(names, (1.0, 0.5, 0.25)):
    lines.append(f'  - model: {folder / size / name}')
    if own:
      lines.append(f'    parameters: {own.format(w=w)}')
  if shared:
    lines.append(f'parameters: {json.dumps(shared)}')
  file = folder / f'{size}-{method}.yaml'
  file.write_text('\n'.join(lines) + '\n')
  return file


def run(command: list[str], out: pathlib.Path) -> tuple[float, float]:
  """Seconds and peak resident megabytes of a process and its children."""
  shutil.rmtree(out, ignore_errors=True)
  script = (
    'import resource, subprocess, sys\n'
    'subprocess.run(sys.argv[1:], check=True, stdout=-3, stderr=-3)\n'
    'print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n'
  )
  started = time.perf_counter()
  done = subprocess.run(
    [sys.executable, '-S', '-c', script, *command],
    check=True, capture_output=True, text=True,
    cwd=out.parent,  # not where another version's package lies
  )  # fmt: skip
  return time.perf_counter() - started, int(done.stdout) / 1024


def plain(folder: pathlib.Path, size: str) -> float:
  """Seconds of a process that reads three models and writes one."""
  out = folder / 'plain'
  out.unlink(missing_ok=True)
  files = [str(folder / size / n / 'model.safetensors') for n in 'abc']
  script = (
    'import sys\n'
    'for name in sys.argv[1:4]: data = open(name, "rb").read()\n'
    'open(sys.argv[4], "wb").write(data)\n'
  )
  started = time.perf_counter()
  subprocess.run(
    [sys.executable, '-S', '-c', script, *files, str(out)], check=True
  )
  return time.perf_counter() - started


def machine() -> dict:
  cpuinfo = pathlib.Path('/proc/cpuinfo').read_text()
  model = [
    line.split(':')[1] for line in cpuinfo.splitlines() if 'model name' in line
  ]
  return {
    'cpu': model[0].strip(), 'cores': os.cpu_count(),
    'python': platform.python_version(), 'jax': jax.__version__,
    'numpy': np.__version__,
  }  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--mergekit')
  parser.add_argument('--before')
  parser.add_argument('--folder', default='/tmp/mergejax-benchmark')
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--methods', default=','.join(RECIPES))
  parser.add_argument('--sizes', default='')
  parser.add_argument('--json')
  options = parser.parse_args()
  folder = pathlib.Path(options.folder)
  ours = [sys.executable, '-m', 'mergejax', 'merge']
  result = {'machine': machine(), 'against': {}, 'sizes': {}}
  make(folder, '0.4')
  print(f'{"method":<18}{"mergejax":>20}{"mergekit":>22}{"ratio":>8}')
  for method in filter(None, options.methods.split(',')):
    file = recipe(folder, '0.4', method)
    sides = {'mergejax': [*ours, str(file)]}
    if options.mergekit:
      sides['mergekit'] = [options.mergekit, str(file)]
    if options.before:
      sides['before'] = [
        options.before, '-m', 'mergejax', 'merge', str(file)
      ]  # fmt: skip
    times = {side: [] for side in (*sides, 'plain')}
    memory = {side: [] for side in sides}
    for _ in range(options.repeats):
      for side, command in sides.items():
        out = folder / f'out-{side}'
        extra = ['--quiet'] if side == 'mergekit' else []
        seconds, peak = run([*command, str(out), *extra], out)
        times[side].append(seconds)
        memory[side].append(peak)
      times['plain'].append(plain(folder, '0.4'))
    row = {
      side: {
        'seconds': round(statistics.median(own), 2),
        'all': [round(t, 2) for t in own],
        **({'peak_mb': round(max(memory[side]))} if side in memory else {}),
      }
      for side, own in times.items()
    }
    text = f'{method:<18}{row["mergejax"]["seconds"]:>9.2f} s'
    text += f'{row["mergejax"]["peak_mb"]:>7} MB'
    if 'mergekit' in row:
      row['ratio'] = round(
        row['mergekit']['seconds'] / row['mergejax']['seconds'], 2
      )
      text += f'{row["mergekit"]["seconds"]:>11.2f} s'
      text += f'{row["mergekit"]["peak_mb"]:>7} MB{row["ratio"]:>8.1f}'
    if 'before' in row:
      row['times_before'] = round(
        row['mergejax']['seconds'] / row['before']['seconds'], 3
      )
      text += f'   before {row["before"]["seconds"]:.2f} s'
      text += f'{row["before"]["peak_mb"]:>7} MB{row["times_before"]:>8.3f}'
    row['times_plain'] = round(
      row['mergejax']['seconds'] / row['plain']['seconds'], 2
    )
    print(f'{text}   {row["times_plain"]:.2f} x plain', flush=True)
    result['against'][method] = row
  for size in filter(None, options.sizes.split(',')):
    make(folder, size)
    count = sum(int(np.prod(s)) for s in shapes(size).values())
    for method in ('linear', 'ties'):
      file = recipe(folder, size, method)
      out = folder / 'out-size'
      runs = [run([*ours, str(file), str(out)], out) for _ in range(3)]
      seconds = statistics.median(s for s, _ in runs)
      peak = max(p for _, p in runs)
      result['sizes'][f'{size} {method}'] = {
        'parameters': count,
        'seconds': round(seconds, 2),
        'peak_mb': round(peak),
      }
      print(f'{count / 1e9:.2f}B {method:<10}{seconds:>8.2f} s{peak:>8.0f} MB', flush=True)  # fmt: skip
    if size != '0.4':
      shutil.rmtree(folder / size)
  shutil.rmtree(folder / 'out-size', ignore_errors=True)
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + '\n')
  print(json.dumps(result))


if __name__ == '__main__':
  main()
