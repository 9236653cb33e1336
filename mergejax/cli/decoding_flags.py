# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Flags that say how answers are decoded."""

import argparse

from mergejax import models
from mergejax.core import errors
from mergejax.evaluation import decode
from mergejax.evaluation import positions


def add(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
  """Adds the flags; returns the group of those of sampling."""
  search = parser.add_argument_group('beam search')
  search.add_argument('--beams', type=int, help='as many answers begun; try 4')
  search.add_argument('--alpha', type=float, help='of the length penalty; 0.6')
  draws = parser.add_argument_group('sampling')
  draws.add_argument('--temperature', type=float, help='1.0; 0 is greedy')
  draws.add_argument('--top_k', type=int, help='most likely tokens kept')
  draws.add_argument('--top_p', type=float, help='probability kept')
  draws.add_argument('--samples', type=int, help='answers to a row')
  return draws


def method_of(options: argparse.Namespace) -> positions.Method:
  """The way to decode that the flags name; greedy without any.

  Raises:
    ConfigError: see `decode.method_of`.
  """
  words = {name: getattr(options, name) for name in decode.OPTIONS}
  return decode.method_of({n: w for n, w in words.items() if w is not None})


def check(family: models.ModelFamily, options: argparse.Namespace) -> None:
  """Raises if the model of `options.checkpoint` cannot answer as told.

  Raises:
    ConfigError: it does not decode, or `--prefix` for an encoder-decoder.
  """
  positions.check_decodes(family, options.checkpoint)
  if options.prefix and not decode.is_decoder_only(family):
    raise errors.ConfigError(
      '--prefix is for decoder-only models; an encoder-decoder reads its '
      'inputs so anyway.'
    )
