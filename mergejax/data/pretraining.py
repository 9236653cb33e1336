# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Local corpora as a mixture to pre-train on."""

from collections.abc import Mapping
import os
import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils
import seqio

from mergejax.core import files
from mergejax.data import corpora as corpora_lib
from mergejax.data import machine_text
from mergejax.data import mixtures
from mergejax.data import tasks


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
    with files.atomic_path(folder) as temporary:
      sizes = corpora_lib.write_splits(
        domains, temporary, max_train_bytes=max_train_bytes
      )
      corpora_lib.check_sizes(sizes, {'train': 1})
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('corpora')
  names = tasks.add_corpora(
    folder, vocabulary, objective=objective, options=options
  )
  return mixtures.add_mixture(
    'corpora', list(names.values()), cap=cap, temperature=temperature,
    by_content=True,
  )  # fmt: skip
