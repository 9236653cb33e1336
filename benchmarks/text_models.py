# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Small T5 models on real text, for the benchmarks of merges and rankings.

The common seed is trained on the text at hand (dropped spans are to be written
down) and on classification tasks of other families, and kept in a cache.
Needs the data folder in MERGEJAX_DATA.
"""

import functools
import os
import re

import jax
import numpy as np
import optax
import real_data

from mergejax import models
from mergejax.checkpoints import checkpoint
from mergejax.core import errors
from mergejax.core import tree as tree_lib
from mergejax.data import features
from mergejax.data import splits
from mergejax.data import tasks
from mergejax.training import arrays
from mergejax.training import step as step_lib

SENTIMENT = ('movie', 'books', 'dvd', 'electronics', 'kitchen')
SENTIMENT_LEFT_OUT = ('youtube',)
EMOTION = (
  'tweets', 'headlines', 'reddit', 'tv_dialogue', 'selfreport', 'stimulus',
)  # fmt: skip
# Other families, which the seed may learn from.
SEED_TASKS = (
  'sentiment_tweets', 'pros_cons', 'subjectivity', 'tweet_hate', 'tweet_offensive', 'tweet_emoji',
  'tweet_stance', 'topic_ag_news', 'topic_reuters', 'question_type_trec',
  'sms_spam', 'paper_field', 'intent_banking77', 'sarcasm_debates',
)  # fmt: skip
CORPORA = ('news', 'movie_reviews', 'encyclopedia', 'tweets', 'novels_english')
VOCABULARY = 'vocab/t5_cc_all_32000/sentencepiece.model'
KEPT_PIECES = 8192
LENGTHS = {'inputs': 64, 'targets': 12}
SEED_STEPS = 3000
VOCABULARY_LEAVES = 'token_embedder/embedding|decoder/logits_dense/kernel'


def module():
  """A T5 1.1 with two layers a side and 3.3 million parameters."""
  return models.build(
    dict(
        model_type='t5x', vocab_size=KEPT_PIECES, emb_dim=128, num_heads=4,
        head_dim=32, mlp_dim=256, num_encoder_layers=2, num_decoder_layers=2,
    )
  )  # fmt: skip


def _files(name: str) -> dict[str, str]:
  return {
    split: f'tasks/{name}/{split}.tsv'
    for split in ('train', 'validation', 'test')
  }


def _prompt(name: str) -> str:
  """Tasks of one family share their prompt: experts answer one question."""
  family = name.split('_')[0]
  return (
    family if family in ('sentiment', 'emotion') else name.replace('_', ' ')
  )


@functools.cache
def _raw(name: str, split: str, prompt: str) -> dict[str, np.ndarray]:
  """A task's split as arrays of SentencePiece ids, read through seqio."""
  task = tasks.add_table_task(
    f'bench_{name}',
    _files(name),
    inputs=f'{prompt}: {{text}}',
    targets='{label}',
    vocabulary=features.vocabulary(tasks.locate(VOCABULARY)),
    by_content=True,
  )
  batches = splits.batches(
    task.name,
    lengths=LENGTHS,
    batch_size=256,
    split=split,
    kind='encoder_decoder',
  )
  rows = {n: np.concatenate([b[n] for b in batches]) for n in batches[0]}
  real = rows['encoder_input_tokens'][:, 0] > 0
  return {n: leaf[real] for n, leaf in rows.items()}


def _corpus(name: str) -> np.ndarray:
  task = tasks.add_text_task(
    f'bench_corpus_{name}',
    {'train': f'corpora/{name}/train.jsonl'},
    vocabulary=features.vocabulary(tasks.locate(VOCABULARY)),
    by_content=True,
  )
  batches = splits.batches(
    task.name,
    lengths={'targets': LENGTHS['inputs'] - 8},
    batch_size=256,
    split='train',
  )
  rows = np.concatenate([b['decoder_target_tokens'] for b in batches])
  return rows[(rows > 0).sum(axis=1) > 20]


@functools.cache
def _kept() -> np.ndarray:
  """`<int32>[old vocabulary]` new number of each piece; rare ones are 2."""
  counts = np.zeros(32_128, np.int64)
  names = [(n, _prompt(n)) for n in SEED_TASKS]
  names += [(f'sentiment_{n}', 'sentiment') for n in SENTIMENT]
  names += [(f'emotion_{n}', 'emotion') for n in EMOTION]
  for name, prompt in names:
    rows = _raw(name, 'train', prompt)
    for leaf in ('encoder_input_tokens', 'decoder_target_tokens'):
      # Every word of a label counts as often as it takes to be kept.
      boost = 1 if leaf.startswith('enc') else 1000
      counts += boost * np.bincount(rows[leaf].ravel(), minlength=len(counts))
  for name in CORPORA:
    counts += np.bincount(_corpus(name).ravel(), minlength=len(counts))
  counts[:3] = 0
  # The last numbers are free: sentinels for dropped spans.
  best = np.argsort(-counts, kind='stable')[: KEPT_PIECES - 3 - 8]
  table = np.full(len(counts), 2, np.int32)
  table[:3] = range(3)
  table[best] = 3 + np.arange(len(best))
  return table


def load(name: str, split: str) -> dict[str, np.ndarray]:
  """A task's split as arrays: `sentiment_movie`, `emotion_reddit`, ..."""
  table = _kept()
  return {
    n: table[leaf] if 'tokens' in n else leaf
    for n, leaf in _raw(name, split, _prompt(name)).items()
  }


def _denoising(rows: np.ndarray, rng: np.random.Generator):
  """Drops spans; the target writes them down behind their sentinels."""
  inputs = np.zeros((len(rows), LENGTHS['inputs']), np.int32)
  targets = np.zeros((len(rows), LENGTHS['targets']), np.int32)
  for i, row in enumerate(rows):
    row = row[row > 1]
    size = len(row)
    places = max(size - 3, 1)
    starts = np.sort(rng.choice(places, min(3, places), replace=False))
    source, answer, at = [], [], 0
    for s, start in enumerate(starts):
      if start < at:
        continue
      end = min(start + int(rng.integers(1, 4)), size)
      sentinel = KEPT_PIECES - 1 - s
      source += [*row[at:start], sentinel]
      answer += [sentinel, *row[start:end]]
      at = end
    source += list(row[at:])
    source, answer = source[: LENGTHS['inputs'] - 1] + [1], answer + [1]
    inputs[i, : len(source)] = source
    answer = answer[: LENGTHS['targets']]
    targets[i, : len(answer)] = answer
  return inputs, targets


def _as_batch(inputs, targets):
  shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': shifted,
    'decoder_target_tokens': targets,
    'decoder_loss_weights': (targets > 0).astype(np.int32),
  }


def _seed_data(seed: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  texts, parts = [], []
  table = _kept()
  for name in CORPORA:
    rows = table[_corpus(name)]
    texts.append(np.pad(rows, ((0, 0), (0, 8))))
  for name in SEED_TASKS:
    rows = load(name, 'train')
    parts.append({n: rows[n] for n in _as_batch(*[np.zeros((1, 1))] * 2)})
    texts.append(rows['encoder_input_tokens'])
  for family, names in (('sentiment', SENTIMENT), ('emotion', EMOTION)):
    for name in names:
      rows = load(f'{family}_{name}', 'train')
      texts.append(rows['encoder_input_tokens'])
  # Three parts of classification to one of denoising.
  labelled = {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}
  rows = np.concatenate(texts)
  rows = rows[rng.permutation(len(rows))[: len(labelled['decoder_target_tokens']) // 3]]  # fmt: skip
  denoised = _as_batch(*_denoising(rows, rng))
  return {n: np.concatenate([labelled[n], denoised[n]]) for n in denoised}


def train(
  the_module, params, data, *, steps, learning_rate, seed, batch_size=64,
  freeze=None,
):  # fmt: skip
  """Trains with Adam, a short warm-up and a cosine decay to zero.

  Leaves whose path matches `freeze` stay as they are.
  """
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, learning_rate, min(100, steps // 5), steps
  )
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98)
  )
  if freeze is not None:
    still = tree_lib.map_paths(
      lambda path, _: bool(re.fullmatch(freeze, path)), params
    )
    optimizer = optax.transforms.selective_transform(
      optimizer, freeze_mask=still
    )
  made = step_lib.make_step(the_module, optimizer)
  step = jax.jit(made.update, donate_argnums=0)
  state = made.init(jax.tree.map(jax.numpy.array, params), jax.random.key(seed))
  stream = arrays.ArrayStream(data, batch_size, seed=seed)
  for i in range(steps):
    state, metrics = step(state, next(stream))
    if (i + 1) % 500 == 0:
      print(
        f'  step {i + 1}: loss {float(metrics["loss"]):.3f}, '
        f'accuracy {float(metrics["accuracy"]):.3f}',
        flush=True,
      )
  return jax.device_get(state.params)


def common_seed():
  """`(module, params)` of the model that all others start from, cached."""
  if not os.environ.get('MERGEJAX_DATA'):
    raise errors.UserError('Set MERGEJAX_DATA to the data folder first.')
  path = real_data.cache_folder() / f'text_seed_{SEED_STEPS}'
  if not path.exists():
    print(f'training the common seed, {SEED_STEPS} steps', flush=True)
    the_module = module()
    # The embedding begins small: Adam moves every entry by the same amount.
    params = models.family_of(the_module).init(jax.random.key(0))
    params['token_embedder']['embedding'] *= 0.1
    params = train(
        the_module, params, _seed_data(0), steps=SEED_STEPS,
        learning_rate=1e-3, seed=0,
    )  # fmt: skip
    checkpoint.save_checkpoint(path, params, config=models.describe(the_module))
  return models.load_model(path)


def expert(name: str, seed: int, *, steps: int = 300, body_only: bool = False):
  """Parameters of the seed fine-tuned on a task (or several, joined by '+').

  With `body_only` embeddings and output head stay those of the seed.
  """
  body = '_body' if body_only else ''
  path = (
    real_data.cache_folder()
    / f'text_{SEED_STEPS}_{name}_{seed}_{steps}{body}.npz'
  )
  if path.exists():
    return checkpoint.open_checkpoint(path).read()
  the_module, params = common_seed()
  parts = [load(one, 'train') for one in name.split('+')]
  data = {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}
  params = train(
    the_module, params, data, steps=steps, learning_rate=1e-3, seed=seed,
    freeze=VOCABULARY_LEAVES if body_only else None,
  )  # fmt: skip
  checkpoint.save_checkpoint(path, params)
  return params


@functools.cache
def _scorer():
  the_module = module()

  @jax.jit
  def exact(params, batch):
    logits = models.family_of(the_module).logits(params, batch)
    right = logits.argmax(-1) == batch['decoder_target_tokens']
    return (right | (batch['decoder_target_tokens'] == 0)).all(axis=1)

  return exact


def accuracy(params, name: str, split: str = 'test') -> float:
  """Share of examples whose whole answer greedy decoding gets right."""
  rows = load(name, split)
  size = len(rows['decoder_target_tokens'])
  hits = []
  for start in range(0, size, 256):
    batch = {n: leaf[start : start + 256] for n, leaf in rows.items()}
    missing = 256 - len(batch['decoder_target_tokens'])
    batch = {n: np.pad(x, ((0, missing), (0, 0))) for n, x in batch.items()}
    hits.append(np.asarray(_scorer()(params, batch))[: 256 - missing])
  return float(np.concatenate(hits).mean())


if __name__ == '__main__':
  common_seed()
  for task in ('sentiment_books', 'emotion_selfreport'):
    tuned = expert(task, 0)
    print(task, accuracy(tuned, task, 'validation'), accuracy(tuned, task))
