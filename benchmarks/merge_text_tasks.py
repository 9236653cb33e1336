# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Merging small T5 models of sentiment and emotion domains.

    MERGEJAX_DATA=... python benchmarks/merge_text_tasks.py [--seeds 3]
        [--families ...] [--body_only]

Experts are fine-tuned from one common seed (see `text_models`). In-domain is
the mean over the merged domains; out-of-domain are domains that no merged
expert saw. Scales of task arithmetic and TIES are chosen on validation data of
the merged domains. Claim (Jin et al., 2023): RegMean is above the plain average
and Fisher averaging in-domain.

Of what these briefly trained models learn, nine tenths (of the squared norm)
lie in the output head. With `--body_only` embeddings and head stay those of the
seed while experts are fine-tuned, so that what differs is what the methods are
about.
"""

import functools

import numpy as np
import real_data
import text_models

import mergejax as mj
from mergejax import models

FAMILIES = {
  # family: (merged domains, domains left out)
  'sentiment': (text_models.SENTIMENT, text_models.SENTIMENT_LEFT_OUT),
  'emotion': (
    ('tweets', 'reddit', 'tv_dialogue', 'selfreport'),
    ('headlines', 'stimulus'),
  ),
  'emotion, all six': (text_models.EMOTION, ()),
}
STEPS = 200
SCALES = (0.2, 0.4, 0.6, 0.8, 1.0)
EXAMPLES = 512


def batches_of(name):
  data = text_models.load(name, 'train')
  return [
    {n: x[i : i + 64] for n, x in data.items()} for i in range(0, EXAMPLES, 64)
  ]


def answers_of(names):
  """`<int32>[classes, length]`, every answer of a family."""
  rows = [text_models.load(n, 'train')['decoder_target_tokens'] for n in names]
  found = np.unique(np.concatenate(rows), axis=0)
  return found[:, : int((found > 0).sum(axis=1).max())]


def statistics(module, name, params, kind, answers, of):
  path = real_data.cache_folder() / f'text_{kind}_{name}_{of}_{STEPS}'
  if not path.exists():
    if kind == 'gram':
      mj.stats.collect(
        mj.stats.gram(), module, params, batches_of(name), out=path
      )
    else:
      scores = models.family_of(module).answer_logits(answers)
      rows = batches_of(name)[:4]
      mj.stats.collect(
        mj.stats.fisher(logits=scores), module, params, rows, out=path
      )
  return dict(mj.stats.load(path))


def run(family, seed, body_only=False):
  """`{row: {'in': mean accuracy, 'out': mean accuracy}}`."""
  merged, left_out = FAMILIES[family]
  kind = family.split(',')[0]
  name = lambda domain: f'{kind}_{domain}'
  module, origin = text_models.common_seed()
  train = functools.partial(text_models.expert, seed=seed, body_only=body_only)
  experts = {d: train(name(d), steps=STEPS) for d in merged}
  of = f'{seed}_body' if body_only else f'{seed}'
  trees = list(experts.values())
  answers = answers_of([name(d) for d in merged])
  collected = {
    what: [
      statistics(module, name(d), experts[d], what, answers, of) for d in merged
    ]
    for what in ('gram', 'fisher')
  }

  def mean(params, domains, split='test'):
    if not domains:
      return float('nan')
    return float(
      np.mean([text_models.accuracy(params, name(d), split) for d in domains])
    )

  rows = {'common seed': origin}
  rows |= {f'expert {d}': tree for d, tree in experts.items()}
  rows['uniform average'] = mj.merge(trees, 'linear')
  rows['Fisher'] = mj.merge(trees, 'fisher', stats=collected['fisher'])
  for alpha in (0.1, 0.9):
    rows[f'RegMean, alpha {alpha}'] = mj.merge(
      trees, 'regmean', stats=collected['gram'], alpha=alpha
    )

  def best(make):
    tried = [(mean(make(s), merged, 'validation'), s) for s in SCALES]
    return make(max(tried)[1])

  rows['task arithmetic'] = best(
    lambda s: mj.merge(trees, 'task_arithmetic', base=origin, scale=s)
  )
  for scope in ('global', 'tensor'):
    rows[f'TIES, trimmed by {scope}'] = best(
      lambda s, scope=scope: mj.merge(
        trees, 'ties', base=origin, scale=2 * s, trim_scope=scope
      )
    )
  rows['multi-task'] = train('+'.join(map(name, merged)), steps=2 * STEPS)
  found = {
    row: {'in': mean(tree, merged), 'out': mean(tree, left_out)}
    for row, tree in rows.items()
  }
  found['each expert on its own domain'] = {
    'in': float(np.mean([mean(experts[d], [d]) for d in merged])),
    'out': float('nan'),
  }
  return found


def main():
  parser = real_data.parser()
  parser.add_argument('--families', nargs='*', default=list(FAMILIES))
  parser.add_argument('--body_only', action='store_true')
  options = parser.parse_args()
  for family in options.families:
    runs = real_data.over_seeds(
      lambda s, f=family: run(f, s, options.body_only), options.seeds
    )
    rows = real_data.summary(runs)
    real_data.show(family, rows)
    name = family.replace(', ', '_').replace(' ', '_')
    name += '_body_only' if options.body_only else ''
    real_data.write(
      f'merge_text_tasks_{name}', seeds=options.seeds, results=rows
    )


if __name__ == '__main__':
  main()
