# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""T5's suite as seqio tasks over TFDS: GLUE, SuperGLUE, SQuAD, CNN/DM, WMT.

Names are T5's, so that gin files which name them mean the same here. Nothing is
registered before it is asked for, and any vocabulary will do.

Source: Raffel et al. (2020), https://arxiv.org/abs/1910.10683, section 2.3 and
appendix D.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import seqio

from mergejax.core import errors
from mergejax.data import features
from mergejax.data import mixtures
from mergejax.data import postprocessors as post
from mergejax.data import text_metrics
from mergejax.data import text_preprocessors as text
from mergejax.data import tfds_sets

_part = functools.partial
_SPLITS = {name: name for name in ('train', 'validation', 'test')}


@dataclasses.dataclass(frozen=True)
class TaskSpec:
  """A task over a TFDS set, before it has a vocabulary.

  Attributes:
    name: in seqio.
    tfds: name in TFDS, with the versions that will do.
    steps: preprocessors from rows of the set to `inputs` and `targets`.
    postprocess: of texts, for the metrics.
    metrics: see `text_metrics`.
    splits: `{split: split in TFDS}`.
    examples: `{split: number}` of examples, where the steps do not make one of
      every row.
  """

  name: str
  tfds: str
  steps: Sequence[Callable[..., Any]]
  postprocess: Callable[..., Any] | None = None
  metrics: Sequence[text_metrics.Metric] = ()
  splits: Mapping[str, str] = dataclasses.field(default_factory=_SPLITS.copy)
  examples: Mapping[str, int] = dataclasses.field(default_factory=dict)


def classification(
  name: str,
  tfds: str,
  prefix: str,
  labels: Sequence[str],
  scores: Sequence[text_metrics.Metric] = (text_metrics.accuracy,),
  *,
  columns: Sequence[str] | None = None,
  before: Sequence[Callable[..., Any]] = (),
  splits: Mapping[str, str] | None = None,
) -> TaskSpec:
  """A task with a label: see `text_preprocessors.classify`."""
  step = _part(text.classify, name=prefix, labels=labels, columns=columns)
  return TaskSpec(
    name, tfds, [*before, step], _part(post.label, labels=labels), scores,
    splits or _SPLITS,
  )  # fmt: skip


_ENTAILED = ('entailment', 'not_entailment')
_NLI = ('entailment', 'neutral', 'contradiction')
_NO_YES = ('False', 'True')
_F1 = (text_metrics.f1_with_invalid, text_metrics.accuracy)
_CORRELATION = (text_metrics.matthews,)
_TEST = {'test': 'test'}


def _matched(kind):
  return {s: f'{s}_{kind}' for s in ('validation', 'test')}


def _glue():
  make = lambda name, *rest, **more: classification(
    f'glue_{name}_v002', f'glue/{name}:2.*.*', *rest, **more
  )
  return [
    make('cola', 'cola', ('unacceptable', 'acceptable'), _CORRELATION),
    make('sst2', 'sst2', ('negative', 'positive')),
    make('mrpc', 'mrpc', ('not_equivalent', 'equivalent'), _F1),
    make('qqp', 'qqp', ('not_duplicate', 'duplicate'), _F1),
    TaskSpec(
      'glue_stsb_v002', 'glue/stsb:2.*.*', [text.similarity], post.number,
      (text_metrics.pearson, text_metrics.spearman),
    ),
    make('mnli', 'mnli', _NLI, splits={'train': 'train', **_matched('matched')}),
    *(
      classification(
        f'glue_mnli_{kind}_v002', 'glue/mnli:2.*.*', 'mnli', _NLI,
        splits=_matched(kind),
      )
      for kind in ('matched', 'mismatched')
    ),
    make('qnli', 'qnli', _ENTAILED),
    make('rte', 'rte', _ENTAILED),
    make('wnli', 'wnli', _ENTAILED[::-1]),
    make('ax', 'mnli', _NLI, _CORRELATION, splits=_TEST),
  ]  # fmt: skip


def _super_glue():
  make = lambda name, *rest, **more: classification(
    f'super_glue_{name}_v102', f'super_glue/{name}:1.*.*', *rest, **more
  )
  # These are RTE's pairs by other names, and count as RTE.
  pairs = _part(
    text.renamed,
    columns={
      'premise': 'sentence1', 'hypothesis': 'sentence2', 'label': 'label',
      'idx': 'idx',
    },
  )  # fmt: skip
  multirc = make(
    'multirc', 'multirc', _NO_YES, (text_metrics.multirc,),
    columns=('question', 'answer', 'paragraph'),
  )  # fmt: skip
  wsc = _part(
    TaskSpec, tfds='super_glue/wsc.fixed:1.*.*',
    postprocess=post.same_referent, metrics=(text_metrics.accuracy,),
  )  # fmt: skip
  return [
    make('boolq', 'boolq', _NO_YES),
    make(
      'cb', 'cb', ('entailment', 'contradiction', 'neutral'),
      (_part(text_metrics.mean_f1, classes=3), text_metrics.accuracy),
    ),
    make('copa', 'copa', ('choice1', 'choice2')),
    dataclasses.replace(
      multirc, postprocess=_part(post.grouped_label, labels=_NO_YES)
    ),
    TaskSpec(
      'super_glue_record_v102', 'super_glue/record:1.*.*', [text.record],
      post.grouped_answers, (text_metrics.record,),
      examples={'train': 138_854},  # one for each right answer
    ),
    make('rte', 'rte', _ENTAILED),
    make('wic', 'wic', _NO_YES, columns=('sentence1', 'sentence2', 'word')),
    wsc(
      'super_glue_wsc_v102_simple_train',
      steps=[_part(text.referent, true_only=True)], splits={'train': 'train'},
      examples={'train': 259},
    ),
    wsc(
      'super_glue_wsc_v102_simple_eval', steps=[text.referent],
      splits={'validation': 'validation', 'test': 'test'},
    ),
    TaskSpec(
      'dpr_v001_simple', 'definite_pronoun_resolution:1.*.*',
      [text.definite_pronoun], metrics=(text_metrics.accuracy,),
      splits={'train': 'train', 'test': 'test'},
    ),
    make('axb', 'rte', _ENTAILED, _CORRELATION, before=[pairs], splits=_TEST),
    make('axg', 'rte', _ENTAILED, splits=_TEST),
  ]  # fmt: skip


def _texts():
  translations = [
    (14, 'de', 'wmt14_ende_v003'), (14, 'fr', 'wmt14_enfr_v003'),
    (15, 'fr', 'wmt15_enfr_v003'), (16, 'ro', 'wmt16_enro_v003'),
    (19, 'de', 'wmt19_ende_v003'),
  ]  # fmt: skip
  return [
    TaskSpec(
      'squad_v010_allanswers', 'squad/v1.1:3.*.*', [text.squad], post.answers,
      (text_metrics.squad,),
      {'train': 'train', 'validation': 'validation'},
    ),
    TaskSpec(
      'cnn_dailymail_v002', 'cnn_dailymail:3.*.*',
      [_part(text.summarize, article='article', summary='highlights')],
      metrics=(text_metrics.rouge,),
    ),
    *(
      TaskSpec(
        name, f'wmt{year}_translate/{code}-en:1.*.*',
        [_part(text.translate, source='en', target=code)],
        metrics=(text_metrics.bleu,),
        splits=_SPLITS if year != 19 else {s: s for s in ('train', 'validation')},
      )
      for year, code, name in translations
    ),
  ]  # fmt: skip


TASKS: Mapping[str, TaskSpec] = {
  spec.name: spec for spec in [*_glue(), *_super_glue(), *_texts()]
}


class _Source(seqio.TfdsDataSource):
  """Rows of a set, whose number is that of the examples made of them."""

  def __init__(self, spec: TaskSpec, data_dir: str | None):
    splits = dict(spec.splits)
    super().__init__(spec.tfds, tfds_data_dir=data_dir, splits=splits)
    self._made = spec.examples

  def num_input_examples(self, split: str) -> int | None:
    return self._made.get(split) or super().num_input_examples(split)


def add(
  name: str | TaskSpec,
  *,
  vocabulary: seqio.Vocabulary | None = None,
  data_dir: str | None = None,
) -> seqio.Task:
  """Registers a task of the suite; a second time, gives the one there is.

  Args:
    name: a name of `TASKS`, or a `TaskSpec` of your own.
    vocabulary: bytes and 100 sentinels by default.
    data_dir: of TFDS; its own by default.

  Returns:
    The task, with `inputs` and `targets` ended by the end token, unless that is
    cut off with what is over their lengths, as in T5.

  Raises:
    DataError: an unknown name, or the same one with another vocabulary.
  """
  if not isinstance(name, TaskSpec) and name not in TASKS:
    raise errors.DataError(errors.near(name, TASKS, "task of T5's suite"))
  spec = name if isinstance(name, TaskSpec) else TASKS[name]
  vocabulary = vocabulary or features.vocabulary(extra_ids=100)
  if spec.name in seqio.TaskRegistry.names():
    found = seqio.TaskRegistry.get(spec.name)
    before = found.output_features['targets'].vocabulary
    if before != vocabulary:
      raise errors.DataError(
        f'There is a task {spec.name!r} already, with another vocabulary '
        f'({before}, not {vocabulary}). Use that one, or remove the task with '
        f'seqio.TaskRegistry.remove({spec.name!r}).'
      )
    return found
  return seqio.TaskRegistry.add(
    spec.name,
    source=_Source(spec, data_dir),
    preprocessors=[
      *spec.steps,
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      seqio.preprocessors.append_eos,
    ],
    output_features=features.encoder_decoder(vocabulary),
    postprocess_fn=spec.postprocess,
    metric_fns=list(spec.metrics),
  )


def add_mixture(
  names: Sequence[str],
  *,
  cap: float | None = 1 << 19,
  temperature: float = 1.0,
  vocabulary: seqio.Vocabulary | None = None,
  data_dir: str | None = None,
) -> seqio.Mixture:
  """Registers tasks of the suite and their mixture, by numbers of examples.

  Args:
    names: of `TASKS`.
    cap: see `mixtures.rate`; T5's 2^19.
    temperature: likewise.
    vocabulary: see `add`.
    data_dir: likewise.

  Returns:
    The mixture, named after its content.

  Raises:
    DataError: see `add`; sets that are not on this machine, all at once.
  """
  options = dict(vocabulary=vocabulary, data_dir=data_dir)
  tasks = [add(name, **options) for name in names]
  tfds_sets.check(tasks)
  return mixtures.add_mixture(
    't5_tasks', [task.name for task in tasks], cap=cap, temperature=temperature,
    by_content=True,
  )  # fmt: skip
