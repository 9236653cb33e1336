# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A folder of text as a suite of domains, for as long as a command needs it."""

from collections.abc import Iterator
import contextlib
import os
import pathlib
import tempfile
from typing import Any

from mergejax.core import errors
from mergejax.data import corpora
from mergejax.data import features
from mergejax.data import tasks
from mergejax.evaluation import scoring
from mergejax.evaluation import suite as suite_lib


@contextlib.contextmanager
def opened(
  folder: os.PathLike | str,
  vocabulary: os.PathLike | str,
  split: str,
  **sizes: Any,
) -> Iterator[scoring.Suite]:
  """The suite of a folder with one file or folder of text a domain.

  Args:
    folder: see `corpora.find_domains`.
    vocabulary: `'bytes'` or a SentencePiece model.
    split: that must have text.
    **sizes: of `suite.of_corpora`: length, batch_size, max_sequences.

  Raises:
    UserError: no folder, no text, none of this split, or a split that is none.
  """
  if split not in corpora.SPLITS:
    raise errors.ConfigError(errors.near(split, corpora.SPLITS, 'split'))
  known = features.vocabulary(vocabulary)
  with tempfile.TemporaryDirectory() as temporary:
    found = corpora.write_splits(
      corpora.read_folder(tasks.locate(folder)), pathlib.Path(temporary)
    )
    corpora.check_sizes(found, {split: 1})
    yield suite_lib.of_corpora(
      tasks.add_corpora(temporary, known), vocabulary=known, **sizes
    )
