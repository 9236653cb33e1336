# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A forest of experts on disk: a seed, and what branched from it.

    FOREST/
      forest.json               what it holds, and the priors of domains
      vocabulary.model          of SentencePiece, if it has one
      seed/model  seed/state    a checkpoint; moments and step, if kept
      experts/NAME/model        a checkpoint
      experts/NAME/state        moments and step, if kept
      experts/NAME/README.md    its model card
      experts/NAME/statistics/  such as a Fisher

All paths are relative: a forest can be moved. An expert is in it if
`forest.json` says so, which is written in one rename: after the folder of one
that is added, before that of one that is removed goes. Killed in between, it is
not in the forest, and the same call ends what it began. Processes change a
forest one after the other. No call touches a file of another expert.

Source: Li et al., "Branch-Train-Merge" (2022),
https://arxiv.org/abs/2208.03306.
"""

from collections.abc import Sequence
import os
import pathlib
import shutil
from typing import Any

import flax.linen as nn
import numpy as np

from mergejax import models
from mergejax.checkpoints import base as store_base
from mergejax.checkpoints import checkpoint
from mergejax.core import checksums
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import tree
from mergejax.core import typing
from mergejax.experts import ensemble
from mergejax.experts import manifest as manifest_lib
from mergejax.experts import records
from mergejax.models import architectures
from mergejax.statistics import saved

MANIFEST = manifest_lib.FILE
_VOCABULARY = 'vocabulary.model'
_SAME_RUN = (
  'Experts of one forest have one architecture and one seed, or neither their '
  'outputs nor their weights can be mixed.'
)


def create(
  path: os.PathLike | str,
  seed: Any,
  *,
  model: nn.Module | models.ModelFamily | None = None,
  vocabulary: os.PathLike | str = 'bytes',
  state: typing.Tree | None = None,
  steps: int = 0,
) -> 'Forest':
  """Makes a forest of a seed alone.

  Args:
    path: the folder to create.
    seed: a checkpoint with its `config.json`; or parameters, with `model`.
    model: of the parameters.
    vocabulary: `'bytes'`, or a SentencePiece `.model`, which is copied.
    state: `{'opt_state': ..., 'step': ...}` of the seed's run, which branches
      go on with; see `beginnings`.
    steps: updates that the seed has had: where a schedule that spans seed and
      branch is.

  Raises:
    UserError: the folder exists, or the checkpoint is no model.
  """
  errors.check_whole('steps', steps, least=0)
  path = pathlib.Path(path).expanduser()
  files.check_new(path)
  family, params = _loaded(seed, model)
  with files.atomic_path(path) as temporary:
    temporary.mkdir()
    (temporary / 'experts').mkdir()
    _write_model(temporary / 'seed', family, params, state)
    manifest = manifest_lib.new(
      model=models.describe(family), vocabulary=_identity_of(vocabulary),
      seed={'steps': steps, 'fingerprint': saved.fingerprint(params)},
    )  # fmt: skip
    if os.fspath(vocabulary) != 'bytes':
      shutil.copyfile(
        pathlib.Path(vocabulary).expanduser(), temporary / _VOCABULARY
      )
    manifest_lib.write(temporary, manifest)
  return Forest(path)


class Forest:
  """A forest that is there; what it holds is read when it is asked for.

  Example:
    >>> import tempfile
    >>> module = models.build({'model_type': 'lm', 'vocab_size': 8,
    ...   'emb_dim': 4, 'num_heads': 1, 'head_dim': 4, 'num_layers': 1,
    ...   'mlp_dim': 4})
    >>> import jax
    >>> params = models.family_of(module).init(jax.random.key(0))
    >>> folder = tempfile.mkdtemp()
    >>> forest = create(f'{folder}/forest', params, model=module)
    >>> forest.add('law', params, parents={'seed': 1.0})
    >>> list(forest.experts), forest.prior('law')
    (['law'], None)
  """

  def __init__(self, path: os.PathLike | str):
    """Opens a forest.

    Raises:
      UserError: there is none, or a newer version wrote it.
    """
    self.path = pathlib.Path(path).expanduser()
    if not (self.path / MANIFEST).is_file():
      raise errors.CheckpointError(
        f'{self.path} is no forest: it has no {MANIFEST}. `mergejax forest '
        'create FOREST SEED` makes one of a seed.'
      )
    manifest_lib.read(self.path)

  # What it holds -------------------------------------------------------------

  @property
  def experts(self) -> dict[str, records.Expert]:
    """Its experts by name, in the order in which they came."""
    return manifest_lib.experts(self.path)

  def names(self) -> list[str]:
    """The names of its experts, for what needs one at least.

    Raises:
      ConfigError: there is none.
    """
    names = list(self.experts)
    if not names:
      raise errors.ConfigError(
        f'{self.path} has no expert yet: add one (`mergejax forest add`).'
      )
    return names

  @property
  def ancestry(self) -> dict[str, records.Expert]:
    """Its experts, and before them those that were removed and have children."""
    return {**manifest_lib.experts(self.path, 'removed'), **self.experts}

  @property
  def seed(self) -> dict[str, Any]:
    """Of the seed: `steps` and `fingerprint`."""
    return manifest_lib.read(self.path)['seed']

  @property
  def module(self) -> nn.Module:
    """The module of the seed and of every expert."""
    return models.build(manifest_lib.read(self.path)['model'])

  @property
  def vocabulary(self) -> str:
    """`'bytes'`, or the path of the SentencePiece model in the forest."""
    file = self.path / _VOCABULARY
    return str(file) if file.is_file() else 'bytes'

  def folder(self, name: str) -> pathlib.Path:
    """Where an expert, or the seed, lies.

    Raises:
      ConfigError: there is no such expert; near names are offered.
    """
    if name == records.SEED:
      return self.path / 'seed'
    known = manifest_lib.read(self.path)['experts']
    if name not in known:
      raise errors.ConfigError(
        errors.near(name, known, f'expert of {self.path}')
      )
    return self.path / 'experts' / name

  def model(self, name: str) -> pathlib.Path:
    """The checkpoint of an expert, or of the seed."""
    return self.folder(name) / 'model'

  def params(self, name: str) -> typing.Tree:
    """The parameters of an expert, or of the seed."""
    return models.load_model(self.model(name))[1]

  def state(self, name: str) -> store_base.ParamStore | None:
    """Moments and step of an expert or the seed, if the forest keeps them."""
    folder = self.folder(name) / 'state'
    return checkpoint.open_state(folder) if folder.is_dir() else None

  def prior(self, domain: str) -> np.ndarray | None:
    """`<float64>[K]` cached prior of a domain over the experts, in their order.

    An expert that came after it was estimated has 0: `set_prior` is for that.
    None if no prior of the domain was set.
    """
    return self.priors.get(domain)

  @property
  def priors(self) -> dict[str, np.ndarray]:
    """`{domain: <float64>[K]}` cached, over the experts in their order."""
    manifest = manifest_lib.read(self.path)
    return {
      domain: np.array([known.get(name, 0.0) for name in manifest['experts']])
      for domain, known in manifest['priors'].items()
    }

  def check_vocabulary(self, vocabulary: os.PathLike | str) -> None:
    """Raises if text is to be read by another vocabulary than the forest's."""
    own, given = (
      manifest_lib.read(self.path)['vocabulary'],
      _identity_of(vocabulary),
    )
    if own != given:
      raise errors.ConfigError(
        f'The experts of {self.path} were trained with another vocabulary '
        f'({own[:16]}) than {vocabulary} ({given[:16]}): a token is another '
        f'word then. The forest has its own: {self.vocabulary}.'
      )

  # Changes -------------------------------------------------------------------

  def add(
    self,
    name: str,
    model: Any,
    *,
    domain: str | None = None,
    state: typing.Tree | None = None,
    statistics: Sequence[os.PathLike | str] = (),
    vocabulary: os.PathLike | str | None = None,
    **about: Any,
  ) -> None:
    """Adds a trained expert.

    Args:
      name: letters, digits, `_`, `.` and `-`.
      model: a checkpoint with its `config.json`, or parameters.
      domain: what it was trained on; its name by default.
      state: `{'opt_state': ..., 'step': ...}`, for those that branch from it.
      statistics: folders of statistics of it, which are copied.
      vocabulary: that it was trained with, to be compared.
      **about: fields of `records.Expert`: parents, branched_by, steps, data.

    Raises:
      UserError: the name is taken or is none, another architecture, vocabulary
        or structure (the first differences are listed), statistics of another
        model, a parent that is not there.
    """
    records.check_name(name)
    self._check_free(name, about.get('parents', {}))
    beside = [pathlib.Path(one).name for one in statistics]
    if len(set(beside)) < len(beside):
      raise errors.ConfigError(
        f'Statistics lie beside an expert by the names of their folders, and '
        f'{", ".join(beside)} are not all different: rename one.'
      )
    if vocabulary is not None:
      self.check_vocabulary(vocabulary)
    family, params = _loaded(model, self.module)
    self._check_like_seed(name, model, params)
    record = records.Expert(
      domain=domain or name,
      fingerprint=saved.fingerprint(params),
      statistics=beside,
      **about,
    )
    for one in statistics:
      saved.check_fingerprint(
        name, params, str(one), saved.load(one).fingerprint
      )
    with manifest_lib.locked(self.path) as manifest:
      self._check_free(name, record.parents)
      # A folder without an entry is of an `add` that was killed.
      with files.atomic_path(
        self.path / 'experts' / name, overwrite=True
      ) as folder:
        _write_model(folder, family, params, state)
        for one, own in zip(statistics, beside):
          shutil.copytree(one, folder / 'statistics' / own)
        card = records.card(name, record, models.describe(family))
        (folder / 'README.md').write_text(card)
      manifest['experts'][name] = record.to_json()
      manifest_lib.write(self.path, manifest)

  def remove(self, name: str) -> list[str]:
    """Takes an expert out, with its files; priors of domains are renormalised.

    A domain whose prior was all on it has none then.

    Returns:
      The experts that branched from it, however far: its influence stays in
      them.

    Raises:
      ConfigError: there is no such expert, or no other one.
    """
    if name == records.SEED:
      raise errors.ConfigError(
        'The seed stays: it is what experts have in common. Remove the forest.'
      )
    records.check_name(name)
    with manifest_lib.locked(self.path) as manifest:
      every, left = self.ancestry, manifest['experts']
      folder = self.path / 'experts' / name
      if name in left or not folder.is_dir():
        self._forget(name, manifest)
      # Killed from here on, the same call takes the files away.
      shutil.rmtree(folder)
    return [one for one in records.descendants(every, name) if one in left]

  def _forget(self, name, manifest):
    """Takes an expert out of the manifest; its files stay."""
    self.folder(name)
    if len(manifest['experts']) == 1:
      raise errors.ConfigError(
        f'{name} is the last expert of {self.path}, and a forest of none says '
        'nothing: add another one first, or remove the folder.'
      )
    manifest_lib.forget(manifest, name)
    manifest_lib.write(self.path, manifest)

  def set_prior(self, domain: str, prior: typing.Array) -> None:
    """Notes the prior of a domain over the experts, `[K]` in their order.

    Raises:
      ConfigError: not one probability an expert.
    """
    with manifest_lib.locked(self.path) as manifest:
      prior = ensemble.check_prior(prior, len(manifest['experts']))
      manifest['priors'][domain] = dict(
        zip(manifest['experts'], prior.tolist())
      )
      manifest_lib.write(self.path, manifest)

  def _check_free(self, name, parents):
    manifest = manifest_lib.read(self.path)
    known = manifest['experts']
    if name in manifest['removed']:
      raise errors.ConfigError(
        f'{self.path} had an expert {name}, which was removed and is in those '
        'that branched from it: give this one another name.'
      )
    if name in known:
      raise errors.ConfigError(
        f'{self.path} has an expert {name} already: remove it first, or give '
        'this one another name.'
      )
    for parent in parents:
      if parent != records.SEED and parent not in known:
        raise errors.ConfigError(
          errors.near(parent, known, f'expert of {self.path}, a parent')
        )

  def _check_like_seed(self, name, model, params):
    seed = self.model(records.SEED)
    if isinstance(model, (str, os.PathLike)):
      architectures.check_checkpoints([str(seed), os.fspath(model)], _SAME_RUN)
    tree.check_same(
      checkpoint.open_checkpoint(seed).specs(), tree.specs(params),
      expected_name=f'the seed of {self.path}', given_name=name,
    )  # fmt: skip


def _loaded(model, module):
  """`(family, parameters)` of a checkpoint, or of parameters and a module."""
  if isinstance(model, (str, os.PathLike)):
    found, params = models.load_model(model)
    return models.family_of(found), params
  if module is None:
    raise errors.ConfigError(
      'Parameters alone do not say what model they are of: give the module, '
      'model=module, or a checkpoint with its config.json.'
    )
  return models.family_of(module), model


def _write_model(folder, family, params, state):
  """`model`, and `state` if there is one, in a new folder."""
  folder.mkdir()
  checkpoint.save_checkpoint(
    folder / 'model', params, config=models.describe(family)
  )
  if state is not None:
    checkpoint.save_checkpoint(folder / 'state', state)


def _identity_of(vocabulary):
  """What makes two vocabularies the same."""
  if os.fspath(vocabulary) == 'bytes':
    return 'bytes'
  file = pathlib.Path(vocabulary).expanduser()
  if not file.is_file():
    raise errors.DataError(f'There is no SentencePiece model at {file}.')
  return checksums.SUMS.of(file)
