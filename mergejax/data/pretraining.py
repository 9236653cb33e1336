# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Local text to pre-train on: a task of files, a mixture of corpora."""

from collections.abc import Mapping
import functools
import inspect
import os
import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import seqio

from mergejax.core import errors
from mergejax.core import files as files_lib
from mergejax.data import corpora as corpora_lib
from mergejax.data import features
from mergejax.data import machine_text
from mergejax.data import mixtures
from mergejax.data import objectives
from mergejax.data import preprocessors
from mergejax.data import tasks


def add_unlabelled_task(
  name: str,
  files: Mapping[str, os.PathLike | str],
  *,
  objective: str = 'span_corruption',
  options: Mapping[str, Any] | None = None,
  vocabulary: seqio.Vocabulary | None = None,
  field: str = 'text',
  by_content: bool = False,
) -> seqio.Task:
  """Registers a pre-training task: text, and what is to be learned of it.

  Args:
    name: the task's name in seqio.
    files: `{split: file}`, as in `add_text_task`.
    objective: a name of `objectives.OBJECTIVES`.
    options: of the objective: `{'density': 0.5}`.
    vocabulary: bytes and 100 sentinels by default.
    field: where JSONL rows keep the text.
    by_content: append a digest of the content to the name, so that it cannot
      be that of another task.

  Returns:
    The task; its features are `inputs` and `targets`, or `targets` alone of a
    language model.

  Raises:
    UserError: an unknown objective or option, a missing file, mixed formats, or
      a name that is taken. What depends on the lengths is told when a stream
      is opened.
  """
  known = objectives.OBJECTIVES
  if objective not in known:
    raise errors.ConfigError(errors.near(objective, known, 'objective'))
  options = dict(options or {})
  found = inspect.signature(known[objective]).parameters.values()
  settings = [p.name for p in found if p.kind == p.KEYWORD_ONLY]
  for option in options:
    if option not in settings:
      raise errors.ConfigError(
        errors.near(option, settings, f'option of {objective}')
      )
  vocabulary = vocabulary or features.vocabulary(extra_ids=100)
  templates = tasks.text_templates(files, field)
  without_inputs = objective == 'language_model'
  return tasks.register(
    name,
    by_content,
    tasks.source_of(
      files, templates, vocabulary, example_a_row=False,
      made_by={'objective': objective, **options},
    ),
    shuffle_buffer_size=tasks.SHUFFLE_BUFFER,
    preprocessors=[
      preprocessors.format_features(templates),
      preprocessors.tokenized,
      seqio.CacheDatasetPlaceholder(),
      functools.partial(known[objective], **options),
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features=(
      features.language_model(vocabulary)
      if without_inputs
      else features.encoder_decoder(vocabulary)
    ),
  )  # fmt: skip


def corpora_mixture(
  *,
  corpora: os.PathLike | str | None,
  directory: os.PathLike | str,
  objective: str = 'span_corruption',
  options: Mapping[str, Any] | None = None,
  vocabulary: seqio.Vocabulary | None = None,
  cap: float | None = None,
  temperature: float = 1.0,
  max_train_bytes: int | None = None,
) -> seqio.Mixture:
  """Splits a folder of text and registers a mixture of its domains.

  A run that continues keeps its text, whatever became of the sources.

  Args:
    corpora: see `corpora.find_domains`, or a path below `MERGEJAX_DATA`; None
      takes `machine_text.domains()`.
    directory: of the run; the split text goes to `directory/corpora`.
    objective: a name of `objectives.OBJECTIVES`.
    options: of the objective.
    vocabulary: bytes and 100 sentinels by default.
    cap: of the documents of a domain, see `mixtures.rate`.
    temperature: likewise.
    max_train_bytes: see `corpora.write_splits`.

  Returns:
    The mixture, with domains in proportion to their documents.
  """
  folder = pathlib.Path(directory) / 'corpora'
  if jax.process_index() == 0 and not folder.exists():
    if corpora is None:
      domains = machine_text.domains()
    else:
      domains = corpora_lib.read_folder(tasks.locate(corpora))
    with files_lib.atomic_path(folder) as temporary:
      sizes = corpora_lib.write_splits(
        domains, temporary, max_train_bytes=max_train_bytes
      )
      corpora_lib.check_sizes(sizes, {'train': 1})
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('corpora')
  names = [
    add_unlabelled_task(
      f'corpus_{domain}',
      found,
      objective=objective,
      options=options,
      vocabulary=vocabulary,
      by_content=True,
    ).name
    for domain, found in tasks.corpora_files(folder).items()
  ]
  return mixtures.add_mixture(
    'corpora', names, cap=cap, temperature=temperature,
    by_content=True,
  )  # fmt: skip
