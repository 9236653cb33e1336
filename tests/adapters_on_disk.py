# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Small models and adapters as files, for tests."""

import json
import pathlib

import numpy as np
import safetensors.numpy

from mergejax.checkpoints import checkpoint
from mergejax.checkpoints.peft import fold
from mergejax.core import tree as tree_lib

PREFIX = 'base_model.model.'


class Folder:
  """A folder of models and adapters, with random numbers of one seed."""

  def __init__(self, path: str, seed: int = 0):
    self.path = pathlib.Path(path)
    self.rng = np.random.default_rng(seed)

  def random(self, *shape):
    return self.rng.normal(size=shape).astype(np.float32)

  def model(self, leaves, config=None, name='base'):
    """Writes a model; returns its path."""
    folder = self.path / name
    folder.mkdir()
    safetensors.numpy.save_file(leaves, folder / 'model.safetensors')
    if config is not None:
      (folder / 'config.json').write_text(json.dumps(config))
    return str(folder)

  def adapter(self, leaves, name='adapter', **config):
    """Writes an adapter of tensors named without PEFT's prefix."""
    folder = self.path / name
    folder.mkdir()
    named = {
      path if path.startswith('base_model.') else PREFIX + path: leaf
      for path, leaf in leaves.items()
    }
    safetensors.numpy.save_file(named, folder / 'adapter_model.safetensors')
    config = {'peft_type': 'LORA', **config}
    (folder / 'adapter_config.json').write_text(json.dumps(config))
    return str(folder)

  def open(self, base, adapter, config=None, **settings):
    """The store of an adapter over a model."""
    return fold.AdapterStore(
      checkpoint.open_checkpoint(self.model(base, config)),
      self.adapter(adapter, **settings),
    )

  def folded(self, base, adapter, config=None, **settings):
    """`{path: array}` of a model with an adapter folded in."""
    store = self.open(base, adapter, config, **settings)
    return tree_lib.flatten(store.read())
