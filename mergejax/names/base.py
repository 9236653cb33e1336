# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the names of a family's parameters tell, as data.

Merges see files, not modules: which parameters are layers, tables of tokens,
heads or one array under two names is told by their names, and each family has
its own. One small file a family says so.
"""

from typing import NamedTuple

from mergejax.core import axes as axes_lib
from mergejax.core import typing


class Pair(NamedTuple):
  """Two names that may be one array.

  Attributes:
    alias: the one that need not be stored.
    path: the one that is.
    witness: a parameter that a model with this head stores, if such there is.
    always: tied whatever `tie_word_embeddings` says.
  """

  alias: typing.Path
  path: typing.Path
  witness: typing.Path | None = None
  always: bool = False


class Naming(NamedTuple):
  """The names of a family; all of them are parts of regular expressions.

  Attributes:
    model_types: what `config.json` calls its models.
    blocks: words before the number of a layer: `layers` of `layers.3.`. The
      outermost numbered one counts: T5 has `encoder.block.3.layer.0`.
    first: words of what comes before the layers.
    tables: parameters of one row a token, `[vocab, embed]`.
    heads: what makes logits of one number a token, `[vocab, ...]`.
    turned: parameters of the vocabulary with tokens along the last axis.
    adapted: tables that adapters of PEFT adapt by other tensors than kernels.
    ties: pairs that may be one array, in the order they are looked for.
    shared: parameters that a layer stores for all layers.
    transposed: modules whose kernel lies `[inputs, outputs]` although its name
      is a PyTorch one, in models that have them at all.
    axes: logical axes of parameters.
  """

  model_types: tuple[str, ...] = ()
  blocks: tuple[str, ...] = ()
  first: tuple[str, ...] = ()
  tables: tuple[str, ...] = ()
  heads: tuple[str, ...] = ()
  turned: tuple[str, ...] = ()
  adapted: tuple[str, ...] = ()
  ties: tuple[Pair, ...] = ()
  shared: tuple[str, ...] = ()
  transposed: tuple[str, ...] = ()
  axes: axes_lib.Rules = ()
