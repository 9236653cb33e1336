# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gin files of ours that say what T5X's do: the text, from fields by name.

`fields` are `{section.field: value}`, as the tables of words name them.
"""

from collections.abc import Mapping
import re
from typing import Any

from mergejax.cli import t5x_reader
from mergejax.core import errors

Fields = Mapping[str, Any]
_NETWORKS = re.compile(r't5x\.examples\.(t5|scalable_t5)\.network')


def section(fields: Fields, name: str) -> dict[str, Any]:
  """Fields of one section, without its name."""
  return {
    field.removeprefix(f'{name}.'): value
    for field, value in fields.items()
    if field.startswith(f'{name}.')
  }


def write_train(fields: Fields, read: t5x_reader.Reader) -> str:
  """The text for `mergejax train`.

  Raises:
    ConfigError: the files do not describe a model and a run.
  """
  module, lines = _network(fields, read, 'train', 'finetune')
  job = section(fields, 'job')
  _check_given(
    job, 'mixture_or_task', 'lengths', 'steps', 'batch_size', 'model_dir',
    run='finetune',
  )  # fmt: skip
  if job.get('initial_checkpoint') and fields.get('checkpoint.restore', True):
    job['restore'] = 'state'  # as T5X does: moments and step number too
  else:
    job.pop('initial_checkpoint', None)
  if not (job.get('save_every') and fields.get('checkpoint.save', True)):
    job['save_every'] = job['steps']
  job['kind'] = _kind(fields, job['lengths'], module)
  job['loss'] = section(fields, 'loss')
  job |= _mesh(fields)
  optimizer = section(fields, 'optimizer')
  rules = optimizer.get('logical_factor_rules')
  lines = [
    'from __gin__ import dynamic_registration',
    'from mergejax import partition',
    'from mergejax.cli import train',
    'from mergejax.training import optim',
    'from mergejax.training import schedules',
    *lines,
    'train.run.job = @train.train_model',
    f'train.train_model.module = @{module}()',
    'train.train_model.optimizer = @optim.adafactor',
    *_block('train.train_model', job),
    'optim.adafactor.learning_rate = @schedules.factors()',
    *_block('schedules.factors', section(fields, 'schedule')),
  ]
  if rules is not None:
    del optimizer['logical_factor_rules']
    lines.append(
      'optim.adafactor.logical_factor_rules = '
      '@optim.standard_logical_factor_rules()'
    )
  lines += _block('optim.adafactor', optimizer)
  if fields.get('rules.dims') == 2:
    lines.append('train.train_model.rules = @partition.fsdp()')
  return '\n'.join(lines) + '\n'


def write_evaluate(fields: Fields, read: t5x_reader.Reader) -> str:
  """The text for `mergejax evaluate`; see `write_train`."""
  module, lines = _network(fields, read, 'evaluate', 'eval')
  data, job = _inference(fields, module, 'eval')
  suite = {
    'name': data['mixture'],
    'lengths': data.get('lengths'),
    'split': data['split'],
    'metric': 'seqio',
    'batch_size': data['batch_size'],
    'max_examples': None,
    'decoding': _decoding(fields, module),
  }
  job['checkpoints'] = [job.pop('checkpoint')]
  return '\n'.join([
    'from __gin__ import dynamic_registration',
    'from mergejax.cli import evaluate',
    'from mergejax.evaluation import suite',
    *lines,
    f'evaluate.evaluate_models.module = @{module}()',
    'evaluate.evaluate_models.suite = @suite.of_mixture()',
    *_block('suite.of_mixture', suite),
    *_block('evaluate.evaluate_models', job),
  ]) + '\n'  # fmt: skip


def write_infer(fields: Fields, read: t5x_reader.Reader) -> str:
  """The text for `mergejax infer`; see `write_train`."""
  module, lines = _network(fields, read, 'infer', 'infer')
  data, job = _inference(fields, module, 'infer')
  _check_given(data, 'lengths', run='infer')
  job |= {
    'mixture_or_task': data['mixture'],
    'lengths': data['lengths'],
    'batch_size': data['batch_size'],
  }
  if job.get('mode') != 'score':
    job['decoding'] = _decoding(fields, module)
  return '\n'.join([
    'from __gin__ import dynamic_registration',
    'from mergejax.cli import infer',
    *lines,
    f'infer.infer_task.module = @{module}()',
    *_block('infer.infer_task', job),
  ]) + '\n'  # fmt: skip


def _network(fields, read, command, run):
  """`(module, the lines that describe it)`."""
  model = read.bindings.get(('', command, 'model'))
  if model is None:
    raise errors.ConfigError(
      f'The gin files bind no {command}.model: give the file of a model, such '
      'as t5x/examples/t5/t5_1_1/base.gin, and that of a run, such as '
      f't5x/configs/runs/{run}.gin.'
    )
  found = section(fields, 'network')
  if str(read.resolved(model)) == '@DecoderOnlyModel()':
    module, config = 'lm.LanguageModel', 'lm.LMConfig'
    found = {'num_layers': 6, **found}
  else:
    module, config = 't5.Transformer', 't5.T5Config'
    defaults = {'num_encoder_layers': 6, 'num_decoder_layers': 6}
    networks = [name for name in read.modules if _NETWORKS.fullmatch(name)]
    if networks and 'scalable' in networks[-1]:
      defaults |= {'scan_layers': True, 'relative_per_layer': True}
    found = {**defaults, **found}
  return module, [
    f'from mergejax.nn import {module.split(".")[0]}',
    f'{module}.config = @{config}()',
    *_block(config, found),
  ]


def _inference(fields, module, run):
  """`(fields of the data, those that both runs of inference have)`."""
  data = section(fields, 'data')
  _check_given(data, 'mixture', 'split', 'batch_size', run=run)
  checkpoint = section(fields, 'checkpoint')
  _check_given(checkpoint, 'path', run=run)
  # An evaluation finds out the lengths; inputs there are, or none.
  _kind(fields, data.get('lengths') or {'inputs': None}, module)
  return data, {
    **section(fields, 'job'),
    'checkpoint': checkpoint['path'],
    'dtype': checkpoint.get('dtype', 'float32'),
    'split': data['split'],
    'mesh': {},
    **_mesh(fields),
  }


def _decoding(fields, module):
  """How T5X decodes, as options of ours.

  Raises:
    ConfigError: a way that means something else here, or nothing.
  """
  given = section(fields, 'decoding')
  plain = module == 'lm.LanguageModel'
  function = given.get('function') or (
    '@temperature_sample' if plain else '@beam_search'
  )
  count = given.get('num_decodes') or 1
  if function == '@beam_search':
    if plain:
      raise errors.ConfigError(
        "beam_search of a decoder-only model counts the prompt in an answer's "
        'length in T5X, and does not here: bind the decoding in a gin file of '
        'ours (gin/runs/infer.gin).'
      )
    return {'beams': count, 'alpha': given.get('alpha', 0.6)}
  if count > 1:
    raise errors.ConfigError(
      f'temperature_sample with num_decodes = {count} answers with the most '
      'likely of several draws in T5X; here samples are all told, by '
      "decoding = {'samples': ...} of infer.infer_task in a gin file of ours."
    )
  top_k, top_p = given.get('topk', 1), given.get('topp', 0.0)
  if top_k and top_p:
    raise errors.ConfigError(
      f'topk = {top_k} and topp = {top_p}: T5X takes one of them; set the '
      'other to 0.'
    )
  temperature = given.get('temperature', 1.0)
  if top_k == 1 or not temperature:
    return {'temperature': 0}
  return {'temperature': temperature, 'top_k': top_k, 'top_p': top_p or 1.0}


def _kind(fields, lengths, module):
  """Which features the model is given."""
  if module != 'lm.LanguageModel':
    return 'encoder_decoder'
  if fields.get('features.bidirectional'):
    return 'prefix_lm'
  if 'inputs' in lengths:
    raise errors.ConfigError(
      'A decoder-only model of T5X with inputs and targets that is causal '
      'throughout has no counterpart here: set '
      'DecoderOnlyModel.inputs_bidirectional_attention = True (a prefix '
      'language model), or train on targets alone.'
    )
  return 'lm'


def _mesh(fields):
  size = fields.get('mesh.model') or 1
  return {'mesh': {'model': size}} if size > 1 else {}


def _check_given(fields, *names, run):
  for name in names:
    if fields.get(name) is None:
      raise errors.ConfigError(
        f'The gin files do not bind {name}: give the file of a run of T5X, '
        f'such as t5x/configs/runs/{run}.gin.'
      )


def _block(name, values):
  return [f'{name}.{field} = {value!r}' for field, value in values.items()]
