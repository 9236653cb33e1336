# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The metrics of T5's tasks: `(targets, predictions) -> {name: 0 to 100}`.

seqio calls them with lists over the examples of a split, after a task's
`postprocess_fn`. What has no value, a correlation with a constant, is NaN.

Source: Raffel et al. (2020), https://arxiv.org/abs/1910.10683, section 2.3.
"""

import collections
from collections.abc import Callable, Hashable, Mapping, Sequence
import functools
import re
import string
from typing import Any
import warnings

import numpy as np
from scipy import stats

from mergejax.core import errors

Scores = dict[str, float]
Metric = Callable[[Sequence[Any], Sequence[Any]], Scores]


def accuracy(targets: Sequence[Any], predictions: Sequence[Any]) -> Scores:
  """Share of the predictions that are their target."""
  hits = [a == b for a, b in zip(targets, predictions, strict=True)]
  return {'accuracy': 100 * float(np.mean(hits))}


def sequence_accuracy(
  targets: Sequence[Any], predictions: Sequence[Any]
) -> Scores:
  """Share of the texts that are their target, to the letter."""
  return {'sequence_accuracy': accuracy(targets, predictions)['accuracy']}


def _f1(targets, predictions, label):
  """`2 TP / (2 TP + FP + FN)` of one class; 0 where it does not occur."""
  actual, said = targets == label, predictions == label
  both = actual.sum() + said.sum()
  return 2 * float((actual & said).sum()) / both if both else 0.0


def f1_with_invalid(
  targets: Sequence[int], predictions: Sequence[int]
) -> Scores:
  """F1 of class 1 of two; what is neither class counts as the wrong one."""
  targets, predictions = np.asarray(targets), np.asarray(predictions)
  valid = (predictions == 0) | (predictions == 1)
  predictions = np.where(valid, predictions, 1 - targets)
  return {'f1': 100 * _f1(targets, predictions, 1)}


def mean_f1(
  targets: Sequence[int], predictions: Sequence[int], *, classes: int
) -> Scores:
  """Mean over classes of their F1 (CommitmentBank's, with 3 classes)."""
  targets, predictions = np.asarray(targets), np.asarray(predictions)
  values = [_f1(targets, predictions, label) for label in range(classes)]
  return {f'mean_{classes}class_f1': 100 * float(np.mean(values))}


def matthews(targets: Sequence[int], predictions: Sequence[int]) -> Scores:
  """Matthews' correlation over all classes that occur; 0 if one is alone.

  With the confusion matrix C it is the correlation of the one-hot labels:
  `(n tr C - sum_k t_k p_k) / sqrt((n^2 - sum p_k^2) (n^2 - sum t_k^2))`.
  """
  labels = np.unique(np.concatenate([targets, predictions]))
  actual = np.asarray(targets)[:, None] == labels
  said = np.asarray(predictions)[:, None] == labels
  count = float(len(targets))
  in_actual, in_said = actual.sum(0), said.sum(0)
  over = count * float((actual & said).sum()) - float(in_actual @ in_said)
  under = (count**2 - in_said @ in_said) * (count**2 - in_actual @ in_actual)
  value = over / np.sqrt(under) if under else 0.0
  return {'matthews_corrcoef': 100 * float(value)}


def _correlation(function, targets, predictions):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', stats.ConstantInputWarning)
    return 100 * float(function(targets, predictions)[0])


def pearson(targets: Sequence[float], predictions: Sequence[float]) -> Scores:
  """Linear correlation."""
  value = _correlation(stats.pearsonr, targets, predictions)
  return {'pearson_corrcoef': value}


def spearman(targets: Sequence[float], predictions: Sequence[float]) -> Scores:
  """Correlation of the ranks."""
  value = _correlation(stats.spearmanr, targets, predictions)
  return {'spearman_corrcoef': value}


# Answers to questions --------------------------------------------------------


def _normalized(text, punctuation, instead):
  """Lower case, without punctuation, articles and superfluous spaces."""
  text = ''.join(instead if c in punctuation else c for c in text.lower())
  return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def _squad_form(text):
  return _normalized(text, string.punctuation, '')


def _trivia_form(text):
  return _normalized(text.replace('_', ' '), string.punctuation + '‘’´`', ' ')


def _token_f1(target, prediction):
  """F1 of the words two texts share, each as often as it stands in both."""
  target, prediction = target.split(), prediction.split()
  both = collections.Counter(target) & collections.Counter(prediction)
  shared = sum(both.values())
  return 2 * shared / (len(target) + len(prediction)) if shared else 0.0


def _answered(targets, predictions, form) -> Scores:
  exact, overlap = [], []
  for answers, said in zip(targets, predictions, strict=True):
    answers, said = [form(answer) for answer in answers], form(said)
    exact.append(max((said == answer for answer in answers), default=False))
    overlap.append(max((_token_f1(a, said) for a in answers), default=0.0))
  return {
    'em': 100 * float(np.mean(exact)),
    'f1': 100 * float(np.mean(overlap)),
  }


def squad(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> Scores:
  """Exact match and word F1, the best over the answers that are right.

  Letter case, punctuation and articles do not count.
  """
  return _answered(targets, predictions, _squad_form)


def trivia_qa(
  targets: Sequence[Sequence[str]], predictions: Sequence[str]
) -> Scores:
  """As `squad`; punctuation parts words, `_` and curly quotes do as well."""
  return _answered(targets, predictions, _trivia_form)


# Groups ----------------------------------------------------------------------


def _in_groups(targets, predictions):
  """`{group: [(target, prediction)]}` of what `postprocessors` grouped."""
  groups: dict[Hashable, list[tuple[Any, Any]]] = {}
  for target, said in zip(targets, predictions, strict=True):
    pair = target['value'], said['value']
    groups.setdefault(target['group'], []).append(pair)
  return groups


def multirc(
  targets: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]
) -> Scores:
  """F1 over all answers ("F1a"), and questions with every answer right.

  Args:
    targets: `{'group': question, 'value': 0 or 1}`.
    predictions: likewise; a value of -1 is no answer.
  """
  pairs = _in_groups(targets, predictions).values()
  whole = [all(target == said for target, said in group) for group in pairs]
  flat = [pair for group in pairs for pair in group]
  return {
    **f1_with_invalid(*zip(*flat)),
    'exact_match': 100 * float(np.mean(whole)),
  }


def record(
  targets: Sequence[Mapping[str, Any]], predictions: Sequence[Mapping[str, Any]]
) -> Scores:
  """As `squad`, over queries: one with several answers stands there as often.

  Args:
    targets: `{'group': query, 'value': answers}`.
    predictions: `{'group': query, 'value': text}`; the first of a query counts.
  """
  firsts = [pairs[0] for pairs in _in_groups(targets, predictions).values()]
  return squad(*zip(*firsts))


# Texts -----------------------------------------------------------------------


def _needs(library, install):
  return errors.ConfigError(
    f'This metric needs {library}, which is not installed: pip install '
    f"'mergejax[metrics]', or pip install {install}."
  )


def bleu(targets: Sequence[str], predictions: Sequence[str]) -> Scores:
  """BLEU of a corpus: sacrebleu with the `intl` tokenizer, cased.

  Raises:
    ConfigError: sacrebleu is not installed.
  """
  try:
    import sacrebleu  # pylint: disable=import-outside-toplevel
  except ImportError as error:
    raise _needs('sacrebleu', 'sacrebleu') from error
  found = sacrebleu.corpus_bleu(
    list(predictions), [list(targets)], smooth_method='exp', tokenize='intl'
  )
  return {'bleu': float(found.score)}


_ROUGES = ('rouge1', 'rouge2', 'rougeLsum')


@functools.cache
def _rouge_scorer():
  try:
    from rouge_score import rouge_scorer  # pylint: disable=import-outside-toplevel
  except ImportError as error:
    raise _needs('rouge-score', 'rouge-score') from error
  return rouge_scorer.RougeScorer(_ROUGES)


# Intervals ask for the same pairs again and again.
@functools.lru_cache(maxsize=1 << 16)
def _rouge(target, said):
  lines = lambda text: text.replace(' . ', ' .\n')  # "Lsum" is by sentences
  found = _rouge_scorer().score(target=lines(target), prediction=lines(said))
  return [found[name].fmeasure for name in _ROUGES]


def rouge(targets: Sequence[str], predictions: Sequence[str]) -> Scores:
  """Mean ROUGE-1, ROUGE-2 and ROUGE-Lsum F-measures.

  T5 reports the median of bootstrap means, which is random; this is the mean.

  Raises:
    ConfigError: rouge-score is not installed.
  """
  pairs = zip(targets, predictions, strict=True)
  means = np.mean([_rouge(*pair) for pair in pairs], axis=0)
  return {name: 100 * float(mean) for name, mean in zip(_ROUGES, means)}
