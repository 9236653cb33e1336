# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Models compiled for TPU pods that are only described; writes docs/pods.md.

The TPU compiler runs here, without a TPU: every case is compiled for all chips
of a slice, and its memory, collectives, operations and least time are read off
the compiled program. Cases are compiled one after the other, a merge in minutes
and a step in up to half an hour; those that the JSON has already are left out.
What is claimed of what a case sends is held against the figures; the script
fails if a claim does not hold.

Needs: pip install 'mergejax[tpu]'.

Usage:
  python benchmarks/pods.py [--only NAME ...] [--again]
"""

import argparse
from collections.abc import Callable
import dataclasses
import json
import os
import pathlib
import sys
from typing import Any, NamedTuple

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import mergejax as mj  # noqa: E402
from mergejax import models  # noqa: E402
from mergejax import partition  # noqa: E402
from mergejax import training  # noqa: E402
from mergejax.core import typing  # noqa: E402
from mergejax.experts import branch  # noqa: E402
from mergejax.experts import outer  # noqa: E402
from mergejax.nn import lm  # noqa: E402
from mergejax.nn import moe_config  # noqa: E402
from mergejax.nn import t5  # noqa: E402
from mergejax.pods import chips  # noqa: E402
from mergejax.pods import compiler  # noqa: E402
from mergejax.pods import work  # noqa: E402

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / 'results' / 'pods.json'
DOCS = HERE.parent / 'docs' / 'pods.md'
# Width, layers of each stack, heads of 64, width of the feed-forward block.
SIZES = {
  'base': (768, 12, 12, 2048),
  'large': (1024, 24, 16, 2816),
  'xl': (2048, 24, 32, 5120),
  'xl, 4 layers': (2048, 4, 32, 5120),
  'xxl': (4096, 24, 64, 10240),
}
# T5's rows of pre-training: 512 tokens in, 114 out, 2048 of them.
LENGTHS = {
  'encoder_input_tokens': 512,
  'decoder_input_tokens': 114,
  'decoder_target_tokens': 114,
}
ROWS = 2048
# Switch-Base: of 12 and 12 layers every other one has experts.
SWITCH_LAYERS = 12
SWITCH = t5.T5Config(
  emb_dim=768, num_encoder_layers=12, num_decoder_layers=12, num_heads=12,
  head_dim=64, mlp_dim=3072, mlp_activations=('relu',), dtype='bfloat16',
  logits_via_embedding=True, init_scale=0.1,
)  # fmt: skip
# A language model of 1.3 billion parameters, and rows of 1024 tokens for it.
LM = lm.LMConfig(
  vocab_size=50304, emb_dim=2048, num_layers=24, num_heads=32, head_dim=64,
  mlp_dim=8192, mlp_activations=('gelu',), dtype='bfloat16',
  logits_via_embedding=True, scan_layers=True, remat_policy='full',
)  # fmt: skip
LM_LENGTHS = {'decoder_input_tokens': 1024, 'decoder_target_tokens': 1024}


def config(size: str, **changes) -> t5.T5Config:
  width, layers, heads, hidden = SIZES[size]
  settings = dict(
    emb_dim=width, num_encoder_layers=layers, num_decoder_layers=layers,
    num_heads=heads, head_dim=64, mlp_dim=hidden, dtype='bfloat16',
    scan_layers=True, remat_policy='full',
  )  # fmt: skip
  return t5.T5Config(**{**settings, **changes})


def pretraining(size: str, topology: str, **mesh: int):
  """The step of pre-training, parameters spread over `data`."""
  trainer = training.Trainer(
    t5.Transformer(config(size)),
    training.optim.adafactor(1e-2),
    mesh=partition.make_mesh(devices=chips.devices(topology), **mesh),
    rules=partition.fsdp(),
  )
  return work.training_step(trainer, LENGTHS, rows=ROWS)


def switch(topology: str, **mesh: int):
  """The step of Switch-Base, its 128 experts over `expert`, else whole."""
  sparse = moe_config.MoeConfig(num_experts=128, replicas=mesh['data'])
  trainer = training.Trainer(
    t5.Transformer(dataclasses.replace(SWITCH, moe=sparse)),
    training.optim.adafactor(1e-2),
    mesh=partition.make_mesh(devices=chips.devices(topology), **mesh),
  )
  return work.training_step(trainer, LENGTHS, rows=ROWS)


def side_by_side(module, topology: str, count: int, mesh: dict, **more):
  """Trains experts side by side, each on its slice of `branch`."""
  return branch.BranchTrainer(
    module,
    training.optim.adafactor(1e-2),
    experts=[f'expert {i}' for i in range(count)],
    mesh=partition.make_mesh(devices=chips.devices(topology), **mesh),
    rules=partition.fsdp(),
    **more,
  )


def experts(size: str, topology: str, count: int, rows: int, **mesh: int):
  """The step of experts of T5."""
  module = t5.Transformer(config(size))
  trainer = side_by_side(module, topology, count, mesh)
  return work.training_step(trainer, LENGTHS, rows=rows)


def language_experts(topology: str, count: int, rows: int, **mesh: int):
  """The step of language models that become their mean every 500 steps.

  Without rows it is that merge.
  """
  trainer = side_by_side(
    lm.LanguageModel(LM), topology, count, mesh, outer=outer.local_sgd(500)
  )
  if not rows:
    return work.outer_merge(trainer)
  return work.training_step(trainer, LM_LENGTHS, rows=rows)


def merging(method, topology: str, *, base=True, scan=False, grams=False):
  """Eight models of T5 1.1 xxl in bfloat16, merged where they lie.

  Of a method that takes each leaf by itself, what is compiled is one program
  for each of the eight kinds of leaves (shape, axes, statistics); the figures
  count each as often as there are such leaves. RegMean's 433 kernels are of
  five kinds, whose Gram matrices have 4096 or 10,240 inputs.
  """
  family = models.family_of(t5.Transformer(config('xxl', scan_layers=scan)))
  specs = {
    path: typing.LeafSpec(spec.shape, np.dtype(jnp.bfloat16), spec.axes)
    for path, spec in family.specs().items()
  }
  stats = ()
  if grams:
    spec = mj.stats.gram().spec
    stats = [
      {
        path: {spec.name: typing.LeafSpec(shape, np.dtype(np.float32))}
        for path, leaf in specs.items()
        if path.endswith('kernel') and (shape := spec.shape(path, leaf))
      }
    ] * 8
  return work.merge(
    method,
    [specs] * 8,
    partition.make_mesh(devices=chips.devices(topology)),
    base=specs if base else None,
    stats=stats,
  )


# Tensor parallelism over `model` beside parameters spread over `data`.
MESHES = {
  'v5e:16x16': {'data': 32, 'model': 8},
  'v5p:4x4x4': {'data': 16, 'model': 4},
}
CASES = {
  f'{size} on {topology}': (pretraining, (size, topology), mesh)
  for topology, mesh in MESHES.items()
  for size in ('base', 'large', 'xl', 'xxl')
}
CASES |= {
  'base, data alone, on v5e:16x16': (pretraining, ('base', 'v5e:16x16'), {}),
  'xl, 4 layers on v5e:16x16': (
    pretraining, ('xl, 4 layers', 'v5e:16x16'), MESHES['v5e:16x16'],
  ),
  '16 experts of large on v5p:4x4x4': (
    experts, ('large', 'v5p:4x4x4', 16, 128), {'branch': 16},
  ),
  'linear, 8 of xxl on v5e:16x16': (
    merging, (mj.linear(), 'v5e:16x16'), {'base': False},
  ),
  'ties (each tensor), 8 of xxl on v5e:16x16': (
    merging, (mj.ties(trim_scope='tensor'), 'v5e:16x16'), {},
  ),
  'ties (whole model), 8 of xxl on v5e:16x16': (
    merging, (mj.ties(trim_scope='global'), 'v5e:16x16'), {'scan': True},
  ),
  'regmean, 8 of xxl on v5e:16x16': (
    merging, (mj.regmean(), 'v5e:16x16'), {'base': False, 'grams': True},
  ),
  'Switch-Base on v5e:16x16': (
    switch, ('v5e:16x16',), {'data': 2, 'expert': 128},
  ),
  '64 experts of a 1.3B LM on v5p:8x16x16': (
    language_experts, ('v5p:8x16x16', 64, 256), {'branch': 64, 'data': 32},
  ),
  'merge of 64 experts of a 1.3B LM on v5p:8x16x16': (
    language_experts, ('v5p:8x16x16', 64, 0), {'branch': 64, 'data': 32},
  ),
}  # fmt: skip


class Claim(NamedTuple):
  """What must hold of a case.

  Attributes:
    words: what.
    test: `figures -> (what was found, whether it holds)`.
  """

  words: str
  test: Callable[[dict[str, Any]], tuple[str, bool]]


def exchanged(found):
  kinds = {
    ' and '.join(each['axes']): each['count']
    for each in found['collectives']
    if each['kind'].endswith('all-to-all')
  }
  told = ', '.join(f'{count} over {axes}' for axes, count in kinds.items())
  return told or 'none', kinds == {'expert': 2 * 2 * SWITCH_LAYERS}


def kernels_stay(found):
  kernel = 2 * SWITCH.emb_dim * SWITCH.mlp_dim  # of one expert, in bfloat16
  largest = max(
    (
      each['largest']
      for each in found['collectives']
      if each['kind'] in ('all-gather', 'collective-permute')
    ),
    default=0,
  )
  told = f'at most {mib(largest)} MiB; a kernel of one has {mib(kernel)}'
  return told if largest else 'nothing is', largest < kernel


def apart(found):
  crossing = sum('branch' in each['axes'] for each in found['collectives'])
  kinds = len(found['collectives'])
  return f'{crossing} of {kinds} kinds', kinds > 0 and not crossing


def one_sum(found):
  """One reduction of the parameters of a chip, each in float32."""
  own = found['held']['parameters']
  rows = [
    (each['kind'], each['axes'], each['count'], each['given_bytes'])
    for each in found['collectives']
  ]
  told = ', '.join(
    f'{count} {kind} over {" and ".join(axes)} of {size:,} bytes'
    for kind, axes, count, size in rows
  )
  holds = rows == [('all-reduce', ['branch'], 1, own)]
  return f'{told}; parameters of a chip: {own:,}', holds


# Of what does not fit nothing is known.
UNKNOWN = ('it does not fit', False)
APART = Claim('no collective crosses `branch`', apart)
CLAIMS = {
  'Switch-Base on v5e:16x16': (
    Claim('two all-to-alls a sparse layer and direction', exchanged),
    Claim('no kernel of an expert is gathered or sent on', kernels_stay),
  ),
  '16 experts of large on v5p:4x4x4': (APART,),
  '64 experts of a 1.3B LM on v5p:8x16x16': (APART,),
  'merge of 64 experts of a 1.3B LM on v5p:8x16x16': (
    Claim('one reduction, as large as the parameters', one_sum),
  ),
}


def checked(done: dict) -> list[tuple[str, str, str, bool]]:
  """`(case, claim, what was found, whether it holds)` of what was compiled."""
  return [
    (name, words, *(test(done[name]) if done[name]['fits'] else UNKNOWN))
    for name, claims in CLAIMS.items()
    if name in done
    for words, test in claims
  ]


def mib(count: float) -> str:
  return f'{count / 2**20:,.2f}'


def gib(count: float) -> str:
  return f'{count / 2**30:.2f}'


def milliseconds(seconds: float) -> str:
  return f'{1e3 * seconds:.1f}'


def table(head: list[str], rows: list[list[str]]) -> list[str]:
  line = lambda cells: '| ' + ' | '.join(cells) + ' |'
  return [line(head), '|---' * len(head) + '|', *map(line, rows)]


def summary(done: dict) -> list[str]:
  """A row a case: memory, and the time that at least passes.

  Rows without the processor's time were compiled when main memory was counted
  wrongly: its time and the bound are left out.
  """
  rows = []
  for name, found in done.items():
    mesh = ', '.join(f'{n} {s}' for n, s in found['mesh'].items() if s > 1)
    held = sum(found['held'].values())
    cells = {n: milliseconds(s) for n, s in found['seconds'].items()}
    cells['bound'] = found['bound'] or ''
    if 'compile_cpu_s' not in found:
      cells |= {'memory': '', 'bound': ''}
    rows.append([
      name, mesh, gib(held), gib(found['temporaries']), gib(found['total']),
      gib(found['memory']), 'yes' if found['fits'] else '**no**',
      *(cells.get(n, '') for n in ('compute', 'memory', 'network', 'bound')),
      f'{found["compile_s"]:.0f}',
      f'{found["compile_cpu_s"]:.0f}' if 'compile_cpu_s' in found else '',
    ])  # fmt: skip
  return table(
    [
      'what', 'mesh', 'held GiB', 'temporaries GiB', 'all GiB', 'of GiB', 'fits',
      'compute ms', 'main memory ms', 'network ms', 'bound', 'compiling s',
      'processor s',
    ],
    rows,
  )  # fmt: skip


def sent(done: dict) -> list[str]:
  """A row a case and kind of collective."""
  rows = [
    [
      name, each['kind'], ' and '.join(each['axes']), str(each['count']),
      f'{each["sent_bytes"] / 2**20:,.1f}', mib(each['largest']),
    ]
    for name, found in done.items()
    for each in found['collectives']
    if each['sent_bytes'] >= 2**20 or 'merge' in found['name']
  ]  # fmt: skip
  return table(
    ['what', 'kind', 'mesh axes', 'count', 'sent MiB', 'largest MiB'], rows
  )


def claimed(done: dict) -> list[str]:
  """A row a claim."""
  rows = [
    [name, words, told, 'yes' if holds else '**no**']
    for name, words, told, holds in checked(done)
  ]
  return table(['what', 'must hold', 'found', 'holds'], rows)


def write_docs(done: dict) -> None:
  """Puts the tables between the marks of docs/pods.md."""
  text = DOCS.read_text()
  for name, lines in (
    ('summary', summary(done)),
    ('claims', claimed(done)),
    ('sent', sent(done)),
  ):
    begin, end = f'<!-- {name} -->', f'<!-- end of {name} -->'
    before, after = text.split(begin)[0], text.split(end)[1]
    text = '\n'.join([before + begin, *lines, end]) + after
  DOCS.write_text(text)


def results() -> dict:
  """What was compiled so far, in the order of the cases."""
  done = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
  return {name: done[name] for name in CASES if name in done}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--only', action='append', choices=CASES)
  parser.add_argument('--again', action='store_true')
  options = parser.parse_args()
  for name in options.only or CASES:
    if name in results() and not options.again:
      continue
    make, arguments, settings = CASES[name]
    found = compiler.report(
      make(*arguments, **settings), topology=name.split(' on ')[-1]
    )
    print(f'== {name}\n{found.to_text()}\n', flush=True)
    done = {**results(), name: found.to_json()}
    RESULTS.write_text(json.dumps(done, indent=2) + '\n')
    jax.clear_caches()
  write_docs(results())
  wrong = [row[:3] for row in checked(results()) if not row[3]]
  if wrong:
    sys.exit('\n'.join('Does not hold: ' + ': '.join(row) for row in wrong))


if __name__ == '__main__':
  main()
