# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the words of T5X's gin files are called here, one table.

A word is `Configurable.argument`, without the module that T5X has it in, and
with a scope before it where the scope counts. `*` stands for any argument. One
that is not here is refused by its name.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any, NamedTuple

EVALUATION = 'evaluation while training; see `mergejax evaluate`'
DECODING = 'decoding'
DATA = 'how data are read'
KEEPING = 'what is kept of a run'
COMPUTING = 'how the machine computes'


class Word(NamedTuple):
  """One word of T5X.

  Attributes:
    target: `section.field` here, or None if it has none.
    values: the only ones that mean the same; any if empty. References count
      by how they are written, without modules: `'@Adafactor()'`.
    aside: why it may be left out: what it changes, which is not what is
      trained. Empty: it may not.
    convert: `its value -> ours`.
    advice: what to do if its value has no meaning here.
  """

  target: str | None = None
  values: tuple[Any, ...] = ()
  aside: str = ''
  convert: Callable[[Any], Any] = lambda value: value
  advice: str = ''


def _same(target: str, **more: Any) -> Word:
  return Word(target, **more)


def _only(*values: Any, advice: str = '') -> Word:
  return Word(values=values, advice=advice)


def _aside(what: str) -> Word:
  return Word(aside=what)


def _one_path(path):
  """T5X takes a path, or a list of them; an empty one restores nothing."""
  if isinstance(path, (list, tuple)):
    return path[0] if path else None
  return path


def _model_size(submesh):
  return None if submesh is None else math.prod(submesh)


_MODULES = ('@Transformer()', '@DecoderWrapper()')
_NETWORK = {
  name: _same(f'network.{name}')
  for name in (
    'vocab_size', 'emb_dim', 'num_heads', 'head_dim', 'mlp_dim',
    'mlp_activations', 'dropout_rate', 'logits_via_embedding', 'dtype',
    'float32_attention_logits', 'remat_policy', 'scan_layers',
    'param_scan_axis', 'num_encoder_layers', 'num_decoder_layers', 'num_layers',
  )
}  # fmt: skip
_ADAFACTOR = {
  **{
    name: _same(f'optimizer.{name}')
    for name in (
      'factored', 'multiply_by_parameter_scale', 'decay_rate', 'step_offset',
      'clipping_threshold', 'weight_decay_rate', 'min_dim_size_to_factor',
      'epsilon1', 'epsilon2', 'weight_decay_rate_lr_exponent',
      'max_parameter_scale', 'skip_nan_updates',
    )
  },
  'beta1': _same('optimizer.momentum'),
  'global_norm_clip_threshold': _same('optimizer.max_gradient_norm'),
  'logical_factor_rules': _same(
    'optimizer.logical_factor_rules',
    values=(None, '@standard_logical_factor_rules()'),
    advice='bind optim.adafactor.logical_factor_rules in a gin file of ours',
  ),
  'learning_rate': _only(None, advice='bind create_learning_rate_scheduler'),
}  # fmt: skip
_SCHEDULE = {
  name: _same(f'schedule.{name}')
  for name in (
    'factors', 'base_learning_rate', 'warmup_steps', 'decay_factor',
    'steps_per_decay', 'steps_per_cycle', 'step_offset', 'min_learning_rate',
  )
}  # fmt: skip
_MODEL = {
  'module': _only(*_MODULES, advice='only networks of T5X are known'),
  'input_vocabulary': _aside('the vocabulary, which is that of the task'),
  'output_vocabulary': _aside('the vocabulary, which is that of the task'),
  'vocabulary': _aside('the vocabulary, which is that of the task'),
  'optimizer_def': _only(
    '@Adafactor()',
    advice='bind train.train_model.optimizer in a gin file of ours',
  ),
  'z_loss': _same('loss.z_loss'),
  'label_smoothing': _same('loss.label_smoothing'),
  'loss_normalizing_factor': _same('loss.normalizing_factor'),
  'decode_fn': _aside(DECODING),
  'default_decoder_params': _aside(DECODING),
  'inputs_bidirectional_attention': _same('features.bidirectional'),
  'feature_converter_cls': _only(None),
}
_TRAIN = {
  'model': _only('@EncoderDecoderModel()', '@DecoderOnlyModel()'),
  'model_dir': _same('job.model_dir'),
  'total_steps': _same('job.steps'),
  'relative_steps': _only(
    None,
    advice="set TRAIN_STEPS to the checkpoint's step and these together",
  ),
  'random_seed': _same('job.seed', convert=lambda seed: seed or 0),
  'train_dataset_cfg': _only('@train/DatasetConfig()'),
  'train_eval_dataset_cfg': _aside(EVALUATION),
  'infer_eval_dataset_cfg': _aside(EVALUATION),
  'eval_steps': _aside(EVALUATION),
  'eval_period': _aside(EVALUATION),
  'inference_evaluator_cls': _aside(EVALUATION),
  'run_eval_before_training': _aside(EVALUATION),
  'train_eval_get_dataset_fn': _aside(EVALUATION),
  'checkpoint_cfg': _only('@CheckpointConfig()'),
  'partitioner': _only('@PjitPartitioner()'),
  'trainer_cls': _only('@Trainer'),
  'use_hardware_rng': _aside('which random numbers are drawn'),
  'summarize_config_fn': _aside(KEEPING),
  'stats_period': _aside(KEEPING),
  'use_orbax': _aside(KEEPING),
  'concurrent_metrics': _aside(COMPUTING),
  'gc_period': _aside(COMPUTING),
  'verify_matching_vocabs_fn': _aside('the vocabulary, which is checked'),
}
_DATA = {
  'mixture_or_task_name': _same('job.mixture_or_task'),
  'task_feature_lengths': _same('job.lengths'),
  'split': _only('train', advice='only the split train is trained on'),
  'batch_size': _same('job.batch_size'),
  'shuffle': _only(True, advice='examples are always shuffled'),
  'seed': _aside('the order of examples, which follows train.random_seed'),
  'use_cached': _aside(DATA),
  'pack': _same('job.pack'),
  'module': _same('imports.module'),
  'use_custom_packing_ops': _aside(DATA),
  'use_memory_cache': _aside(DATA),
  'trim_output_features': _only(True),
  'num_prefetch_threads': _aside(DATA),
  'num_workers': _aside(DATA),
  'runtime_preprocessors': _only(None),
}
_RESTORE = {
  'path': _same('job.initial_checkpoint', convert=_one_path),
  'mode': _only('specific', 'latest'),
  'dtype': _only(None, 'float32', advice='parameters are float32'),
  'assignment_map': _only(
    None, [], advice='bind train.train_model.restore_rules in a gin file of '
    "ours, and .restore = 'params'",
  ),
  'fallback_to_scratch': _only(
    False, advice='bind train.train_model.fallback_to_scratch in a gin file of '
    "ours, and .restore = 'params'",
  ),
  'strict': _only(True),
  'restore_dataset': _only(False),
  'state_transformation_fns': _only([], ()),
  'checkpointer_cls': _aside(KEEPING),
  'checkpoint_manager_cls': _aside(KEEPING),
}  # fmt: skip
_SAVE = {
  'period': _same('job.save_every'),
  'dtype': _only('float32', advice='checkpoints of a run are float32'),
  'keep': _aside(KEEPING),
  'keep_dataset_checkpoints': _aside(KEEPING),
  'save_dataset': _aside('the position in the data, which is always saved'),
  'checkpointer_cls': _aside(KEEPING),
  'checkpoint_manager_cls': _aside(KEEPING),
}
_MESH = {
  'num_partitions': _same('mesh.model'),
  'model_parallel_submesh': _same('mesh.model', convert=_model_size),
  'logical_axis_rules': _only('@standard_logical_axis_rules()'),
  'params_on_devices': _only(True),
  'backend': _only(None),
}
_RULES = {
  'activation_partitioning_dims': _only(
    1, advice='bind train.train_model.rules in a gin file of ours'
  ),
  'parameter_partitioning_dims': _same('rules.dims', values=(1, 2)),
  'additional_rules': _only(None, ()),
}
ALL: Mapping[str, Mapping[str, Word]] = {
  'train': _TRAIN,
  'train/DatasetConfig': _DATA,
  'train_eval/DatasetConfig': {'*': _aside(EVALUATION)},
  'infer_eval/DatasetConfig': {'*': _aside(EVALUATION)},
  'Evaluator': {'*': _aside(EVALUATION)},
  'JSONLogger': {'*': _aside(EVALUATION)},
  'TensorBoardLogger': {'*': _aside(EVALUATION)},
  'CheckpointConfig': {
    name: Word(
      f'checkpoint.{name}',
      values=(None, f'@{name.title()}CheckpointConfig()'),
      convert=lambda config: config is not None,
    )
    for name in ('restore', 'save')
  },
  'RestoreCheckpointConfig': _RESTORE,
  'SaveCheckpointConfig': _SAVE,
  'PjitPartitioner': _MESH,
  'standard_logical_axis_rules': _RULES,
  'Trainer': {
    'num_microbatches': _same(
      'job.accumulate', convert=lambda number: number or 1
    ),
    'learning_rate_fn': _only(
      '@create_learning_rate_scheduler()',
      advice='bind optim.adafactor.learning_rate in a gin file of ours',
    ),
  },
  'create_learning_rate_scheduler': _SCHEDULE,
  'Adafactor': _ADAFACTOR,
  'EncoderDecoderModel': _MODEL,
  'DecoderOnlyModel': _MODEL,
  'EncoderDecoderModel.predict_batch_with_aux': {'*': _aside(DECODING)},
  'DecoderOnlyModel.predict_batch_with_aux': {'*': _aside(DECODING)},
  'beam_search': {'*': _aside(DECODING)},
  'temperature_sample': {'*': _aside(DECODING)},
  'DecoderParams': {'*': _aside(DECODING)},
  'Transformer': {'config': _only('@T5Config()')},
  'DecoderWrapper': {'config': _only('@TransformerConfig()')},
  'T5Config': _NETWORK,
  'TransformerConfig': _NETWORK,
  'SentencePieceVocabulary': {
    '*': _aside('the vocabulary, which is that of the task')
  },
  'ByteVocabulary': {'*': _aside('the vocabulary, which is that of the task')},
}
# What T5X's own defaults are where ours are others.
DEFAULTS: Mapping[str, Any] = {
  'network.num_heads': 8,
  'network.mlp_dim': 2048,
  'network.mlp_activations': ('relu',),
  'network.dropout_rate': 0.1,
  'loss.z_loss': 0.0,
  'loss.normalizing_factor': None,
  'job.pack': False,
  'job.seed': 0,
}


def find(scope: str, name: str, argument: str) -> Word | None:
  """The word of a binding; None if it is not known.

  Args:
    scope: of the binding, '' for none.
    name: of the configurable without modules, with the class of a method.
    argument: what is bound.
  """
  arguments = ALL.get(f'{scope}/{name}' if scope else name, {})
  return arguments.get(argument) or arguments.get('*')


def all_alike(scope: str, name: str) -> bool:
  """Whether all arguments of a configurable mean the same, see `find`."""
  return '*' in ALL.get(f'{scope}/{name}' if scope else name, {})
