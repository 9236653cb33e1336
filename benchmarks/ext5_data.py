# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What `ext5.py` trains on: tables and corpora as tasks, and their mixtures.

Needs the data folder in MERGEJAX_DATA.
"""

from collections.abc import Iterator
import pathlib

import numpy as np
import sentencepiece
import seqio

from mergejax import models
from mergejax.core import files as files_lib
from mergejax.data import corpora
from mergejax.data import exmix
from mergejax.data import features
from mergejax.data import mixtures
from mergejax.data import pretraining
from mergejax.data import rows
from mergejax.data import splits
from mergejax.data import task_ids
from mergejax.data import tasks

Batch = dict[str, np.ndarray]

# Pieces and T5's 100 sentinels.
VOCABULARY = 4096
LENGTHS = {'inputs': 48, 'targets': 12}
# Artificial sizes of tasks and of domains, beyond which they count no more.
CAP = 2500
CAP_OF_DOMAINS = 1000
_PAIR = ('{sentence1} and: {sentence2}', '{score}')
_NLI = ('{hypothesis} given: {premise}', '{label}')
_INFLECTION = ('{lemma} as: {features}', '{form}')
_TEXT = ('{text}', '{label}')

# family: {task: (what stands behind its name in the inputs, target)}.
MIXED = {
  'sentiment': dict.fromkeys(
    ('sentiment_tweets', 'sentiment_books', 'sentiment_dvd',
     'sentiment_electronics', 'sentiment_kitchen', 'sentiment_youtube',
     'pros_cons'),
    _TEXT,
  ),
  'toxicity': {'tweet_hate': _TEXT, 'tweet_offensive': _TEXT},
  'emoji prediction': {'tweet_emoji': _TEXT},
  'stance': {'tweet_stance': ('of {target}: {text}', '{label}')},
  'sarcasm': {'sarcasm_debates': _TEXT},
  'style': {'clickbait': _TEXT},
  'spam': {'sms_spam': _TEXT},
  'intent': {'intent_clinc150': _TEXT, 'intent_banking77': _TEXT},
  'intent and slots': {
    'slots_snips': ('{tokens}', '{label}'),
    'slots_atis': ('{tokens}', '{label}'),
  },
  'science': {'paper_field': _TEXT},
  'relation': {'relation_chemprot': _TEXT},
  'inference': {
    'nli_sick': _NLI, 'nli_rte': _NLI, 'nli_monotonicity': _NLI,
  },
  'similarity': {'similarity_sick': _PAIR, 'similarity_sts': _PAIR},
  'paraphrase': {'paraphrase_mrpc': (_PAIR[0], '{label}')},
  'acceptability': {
    'acceptability_cola': _TEXT,
    'acceptability_blimp': ('first: {sentence1} second: {sentence2}', '{label}'),
  },
  'reading': {
    'qa_babi': ('{question} given: {context}', '{answer}'),
  },
  'closed-book questions': {
    'qa_webquestions': ('{question}', '{answer}'),
    'qa_nq_open': ('{question}', '{answer}'),
  },
  'mathematics': {'math_svamp': ('{question}', '{equation}')},
  'morphology': {
    'inflect_english': _INFLECTION, 'inflect_french': _INFLECTION,
  },
}  # fmt: skip
# Fine-tuned on. The last is of a family of the mixture; of the families of the
# others the mixture has nothing, nor has it `headline_ag`, the same news.
LEFT_OUT = {
  'topic_ag_news': ('topic', _TEXT),
  'question_type_trec': ('question type', _TEXT),
  'subjectivity': ('subjectivity', _TEXT),
  'emotion_selfreport': ('emotion', _TEXT),
  'sentiment_movie': ('sentiment, in the mixture', _TEXT),
}


def module():
  """A T5 1.1 of 1.6 million parameters."""
  return models.build(
    dict(
      model_type='t5x', vocab_size=VOCABULARY, emb_dim=128,
      num_heads=4, head_dim=32, mlp_dim=256, num_encoder_layers=2,
      num_decoder_layers=1,
    )
  )  # fmt: skip


def _files(name: str) -> dict[str, str]:
  return {s: f'tasks/{name}/{s}.tsv' for s in ('train', 'validation', 'test')}


def _texts() -> Iterator[str]:
  """All text to train on; of a document, the beginning."""
  for found in corpora.find_domains(tasks.locate('corpora')).values():
    for file in found['train']:
      for text in corpora.documents(file):
        yield text[:4000]
  for name in [*(n for of in MIXED.values() for n in of), *LEFT_OUT]:
    table = rows.Rows(tasks.locate(_files(name)['train']))
    for number in range(len(table)):
      for field in table.fields(number, table.columns):
        yield field.decode()


def vocabulary(cache: pathlib.Path) -> seqio.Vocabulary:
  """A SentencePiece model of the text to train on, made once."""
  path = cache / 'pieces.model'
  if not path.exists():
    with files_lib.atomic_path(path) as temporary, open(temporary, 'wb') as out:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_texts(), model_writer=out,
        vocab_size=VOCABULARY - 100, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        input_sentence_size=60_000, shuffle_input_sentence=True, num_threads=1,
        minloglevel=2,
      )  # fmt: skip
  return features.vocabulary(path)


def table_task(name: str, templates: tuple[str, str], vocab) -> str:
  """Registers a table as a task; its name in seqio."""
  inputs, targets = templates
  return tasks.add_table_task(
    f'ext5_{name}', _files(name), inputs=f'{name.replace("_", " ")}: {inputs}',
    targets=targets, vocabulary=vocab, by_content=True,
  ).name  # fmt: skip


def mixture(ratio: float, cache: pathlib.Path) -> seqio.Mixture:
  """Tasks with denoising at this ratio beside them: 0 is none, inf only it."""
  vocab = vocabulary(cache)
  denoising = pretraining.corpora_mixture(
    corpora='corpora', directory=cache, vocabulary=vocab, cap=CAP_OF_DOMAINS
  )
  names = [
    table_task(name, templates, vocab)
    for members in MIXED.values()
    for name, templates in members.items()
  ]
  return exmix.beside_denoising(
    'ext5', names, denoising=denoising, ratio=ratio, cap=CAP
  )


def _examples(task: str, split: str) -> Batch:
  """The examples of a task as arrays."""
  batches = splits.batches(
    task, lengths=LENGTHS, batch_size=256, split=split, kind='encoder_decoder'
  )
  found = {n: np.concatenate([b[n] for b in batches]) for n in batches[0]}
  real = found['decoder_loss_weights'].any(axis=1)
  return {name: leaf[real] for name, leaf in found.items()}


def examples(task: str, cache: pathlib.Path) -> Batch:
  """Training examples as arrays; made once, text is corrupted once."""
  path = cache / 'examples' / f'{task}.npz'
  if not path.exists():
    path.parent.mkdir(exist_ok=True)
    with files_lib.atomic_path(path) as temporary:
      with open(temporary, 'wb') as out:
        np.savez(out, **_examples(task, 'train'))
  return dict(np.load(path))


class Examples:
  """All examples of the tasks of several mixtures, to draw batches from."""

  def __init__(self, name: str, cache: pathlib.Path):
    """Reads the tasks of a mixture, which has those of the others."""
    self.names = task_ids.names(seqio.get_mixture_or_task(name))
    parts = [examples(task, cache) for task in self.names]
    sizes = [len(part['decoder_target_tokens']) for part in parts]
    self._sizes = np.array(sizes)
    self._begins = np.cumsum([0, *sizes[:-1]])
    self._rows = {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}

  def draw(self, name: str, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches without end, of the tasks in proportion to a mixture's rates."""
    shares = {s.task: s.probability for s in mixtures.probabilities(name)}
    chances = [shares.get(task, 0.0) for task in self.names]
    rng = np.random.default_rng(seed)
    while True:
      drawn = rng.choice(len(chances), batch_size, p=chances)
      rows = self._begins[drawn] + rng.integers(self._sizes[drawn])
      batch = {n: leaf[rows] for n, leaf in self._rows.items()}
      real = batch['decoder_target_tokens'] > 0
      number = (drawn + 1)[:, None].astype(np.int32)
      yield {**batch, task_ids.BATCH_FEATURE: np.where(real, number, 0)}
