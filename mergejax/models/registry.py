# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Families by name: from a `config.json` to a module, and back."""

from collections.abc import Mapping
import dataclasses
import importlib
import sys
from typing import Any

import flax.linen as nn

from mergejax.core import errors
from mergejax.models import base
from mergejax.models import classifier
from mergejax.models import outputs
from mergejax.names import known as known_names

# model_type -> family, or the module of this package that registers it.
_FAMILIES: dict[str, type[base.ModelFamily] | str] = {
  't5x': 'mergejax.models.t5',
  'lm': 'mergejax.models.lm',
  'mlp': 'mergejax.models.vision',
  'vgg': 'mergejax.models.vision',
  'resnet': 'mergejax.models.vision',
  'vit': 'mergejax.models.vision',
}


def register(family: type[base.ModelFamily]) -> type[base.ModelFamily]:
  """Makes a family known by its `model_type`; a decorator of the class.

  Args:
    family: a subclass of `ModelFamily` with `model_type`, `config_class` and
      `module_class`.

  Returns:
    The family.

  Raises:
    ConfigError: another family has the name, or one of the three is missing.
  """
  name = family.model_type
  if not name or family.config_class is None:
    raise errors.ConfigError(
      f'{family.__name__} needs model_type, config_class and module_class '
      'before it can be found by name.'
    )
  known = _FAMILIES.get(name)
  # A module that is loaded again brings its families again.
  place = lambda one: f'{one.__module__}.{one.__qualname__}'
  taken = isinstance(known, type) and place(known) != place(family)
  if taken or (isinstance(known, str) and known != family.__module__):
    where = known if isinstance(known, str) else place(known)
    raise errors.ConfigError(
      f'The model_type {name!r} is that of {where} already: choose another.'
    )
  _FAMILIES[name] = family
  # Who saves and opens checkpoints without linen knows the axes too.
  known_names.register(name, family.axes)
  return family


def names() -> list[str]:
  """All known model types."""
  return sorted(_FAMILIES)


def family_class(model_type: str) -> type[base.ModelFamily]:
  """The family of a `model_type`.

  Args:
    model_type: a registered name, or `'package.module:Class'` of a module that
      is imported already: a file of weights never decides what is imported.

  Raises:
    ConfigError: an unknown name (near ones are offered), or a module that is
      not imported.
  """
  found = _FAMILIES.get(model_type)
  if isinstance(found, str):
    importlib.import_module(found)
    found = _FAMILIES[model_type]
  if found is not None:
    return found
  module, _, name = str(model_type).partition(':')
  if not name:
    raise errors.ConfigError(
      errors.near(str(model_type), _FAMILIES, 'model_type')
      + ' A family of your own is known once its module is imported '
      '(`--import MODULE` on the command line).'
    )
  if module not in sys.modules:
    raise errors.ConfigError(
      f'The model is of the family {model_type!r}, whose module is not '
      'imported, and no checkpoint may choose what is: import it first '
      f'(`import {module}`, or `--import {module}` on the command line).'
    )
  found = getattr(sys.modules[module], name, None)
  if not (isinstance(found, type) and issubclass(found, base.ModelFamily)):
    raise errors.ConfigError(f'{module} has no model family {name!r}.')
  return found


def family_of(model: nn.Module | base.ModelFamily) -> base.ModelFamily:
  """The family of a module; a family is its own.

  Raises:
    ConfigError: no family knows such a module.
  """
  found = _find(model)
  if found is not None:
    return found
  raise errors.ConfigError(
    f'No model family knows the module {type(model).__name__}; there are '
    f'{", ".join(names())}. Give yours one: see mj.models.ModelFamily, or wrap '
    'it in one, `mj.models.Classifier(module)`.'
  )


def _find(model):
  """The family of a module, or None."""
  if isinstance(model, base.ModelFamily):
    return model
  for name in names():
    family = family_class(name)
    if type(model) is family.module_class:
      return family(model)
  return None


# A module without a family is called as its batch's names tell.
_CONVENTIONS = (
  ('encoder_input_tokens', 't5x'),
  ('decoder_target_tokens', 'lm'),
  ('images', 'mlp'),
)


def family_for(
  model: nn.Module | base.ModelFamily | None, batch: Mapping[str, Any]
) -> base.ModelFamily:
  """`family_of`, and for other modules, or batches, one that the batch tells.

  A module that no family knows, or that is called with other batches than its
  family takes, is taken for one of T5X's signature where they have seqio's
  names, for an image classifier where they have `images`; otherwise they must
  at least weigh their rows.

  Args:
    model: a family or a module; None is a module that nothing is known of.
    batch: one that it is called with.

  Raises:
    ConfigError: no family knows the module, and the batch has other names.
  """
  family = _find(model)
  if family is not None and family.takes(batch):
    return family
  module = model if family is None else family.module
  for name, model_type in _CONVENTIONS:
    if name in batch:
      return family_class(model_type)(module)
  if 'weights' in batch:
    return classifier.Classifier(module, collections=['batch_stats'])
  raise errors.ConfigError(
    f'A batch of {", ".join(sorted(batch))} is not one that the model, '
    f'{type(module).__name__}, is known to take. Give the model its family (see '
    'mj.models.ModelFamily, and mj.models.Classifier for modules of your own), '
    'or batches with the names that its family reads.'
  )


def conversion(
  config: Mapping[str, Any],
) -> tuple[type[base.ModelFamily], outputs.Conversion] | None:
  """The family, and its conversion, of another library's `config.json`.

  Returns:
    None where no family converts such models.
  """
  for name in names():
    family = family_class(name)
    for other in family.conversions.values():
      if other.model_type == config.get('model_type'):
        return family, other
  return None


def build(config: Mapping[str, Any]) -> nn.Module:
  """Builds the module that a `config.json` of this project describes.

  Args:
    config: `model_type` (`'t5x'`, `'lm'`, `'mlp'`, `'vgg'`, `'resnet'`,
      `'vit'`, or of a family of your own) and the fields of its config class;
      missing fields take their defaults.

  Raises:
    ConfigError: unknown `model_type` or field (near names are offered).

  Example:
    >>> build({'model_type': 'lm', 'emb_dim': 8}).config.emb_dim
    8
  """
  fields = dict(config)
  kind = fields.pop('model_type', None)
  family = family_class(str(kind))
  known = [field.name for field in dataclasses.fields(family.config_class)]
  for name, value in fields.items():
    if name not in known:
      raise errors.ConfigError(
        errors.near(name, known, f'setting of a {kind} model,')
      )
    if isinstance(value, list):
      fields[name] = tuple(value)
  return family.module_class(family.config_class(**fields))


def describe(model: nn.Module | base.ModelFamily) -> dict[str, Any]:
  """The `config.json` from which `build` makes the module again.

  A field whose metadata say `describe='changed'` is there if it has not its
  default, so that what does not use it stays as it was before there was such a
  field; one with `describe='never'` says how to compute, not what.

  Raises:
    ConfigError: no family knows the module.
  """
  family = family_of(model)
  if not dataclasses.is_dataclass(family.config):
    raise errors.ConfigError(
      f'{type(family.module).__name__} cannot be described by a config.json: '
      'its family has no config_class.'
    )
  fields = dataclasses.asdict(family.config)
  for field in dataclasses.fields(family.config):
    told = field.metadata.get('describe', 'always')
    default = told == 'changed' and fields[field.name] == field.default
    if told == 'never' or default:
      del fields[field.name]
  return {'model_type': family.model_type, **fields}
