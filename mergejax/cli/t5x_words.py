# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What the words of T5X's gin files are called here: those of training.

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
VOCABULARY = 'the vocabulary, which is that of the task'


class Word(NamedTuple):
  """One word of T5X.

  Attributes:
    target: `section.field` here, or None if it has none.
    values: the only ones that mean the same; any if empty. References count
      by how they are written, without modules: `'@Adafactor()'`.
    aside: why it may be left out: what it changes, which is not what the
      command is for. Empty: it may not.
    convert: `its value -> ours`.
    advice: what to do if its value has no meaning here.
  """

  target: str | None = None
  values: tuple[Any, ...] = ()
  aside: str = ''
  convert: Callable[[Any], Any] = lambda value: value
  advice: str = ''


def same(target: str, **more: Any) -> Word:
  """A word whose value means the same here, as a field of another name."""
  return Word(target, **more)


def only(*values: Any, advice: str = '') -> Word:
  """A word that may have these values alone, which change nothing here."""
  return Word(values=values, advice=advice)


def aside(what: str) -> Word:
  """A word that may be left out."""
  return Word(aside=what)


def one_path(path: Any) -> Any:
  """T5X takes a path, or a list of them; an empty one restores nothing."""
  if isinstance(path, (list, tuple)):
    return path[0] if path else None
  return path


def model_size(submesh: Any) -> int | None:
  """Devices of a submesh, all of which share a parameter here."""
  return None if submesh is None else math.prod(submesh)


_MODULES = ('@Transformer()', '@DecoderWrapper()')
NETWORK = {
  name: same(f'network.{name}')
  for name in (
    'vocab_size', 'emb_dim', 'num_heads', 'head_dim', 'mlp_dim',
    'mlp_activations', 'dropout_rate', 'logits_via_embedding', 'dtype',
    'float32_attention_logits', 'remat_policy', 'scan_layers',
    'param_scan_axis', 'num_encoder_layers', 'num_decoder_layers', 'num_layers',
  )
}  # fmt: skip
_ADAFACTOR = {
  **{
    name: same(f'optimizer.{name}')
    for name in (
      'factored', 'multiply_by_parameter_scale', 'decay_rate', 'step_offset',
      'clipping_threshold', 'weight_decay_rate', 'min_dim_size_to_factor',
      'epsilon1', 'epsilon2', 'weight_decay_rate_lr_exponent',
      'max_parameter_scale', 'skip_nan_updates',
    )
  },
  'beta1': same('optimizer.momentum'),
  'global_norm_clip_threshold': same('optimizer.max_gradient_norm'),
  'logical_factor_rules': same(
    'optimizer.logical_factor_rules',
    values=(None, '@standard_logical_factor_rules()'),
    advice='bind optim.adafactor.logical_factor_rules in a gin file of ours',
  ),
  'learning_rate': only(None, advice='bind create_learning_rate_scheduler'),
}  # fmt: skip
_SCHEDULE = {
  name: same(f'schedule.{name}')
  for name in (
    'factors', 'base_learning_rate', 'warmup_steps', 'decay_factor',
    'steps_per_decay', 'steps_per_cycle', 'step_offset', 'min_learning_rate',
  )
}  # fmt: skip
MODEL = {
  'module': only(*_MODULES, advice='only networks of T5X are known'),
  'input_vocabulary': aside(VOCABULARY),
  'output_vocabulary': aside(VOCABULARY),
  'vocabulary': aside(VOCABULARY),
  'optimizer_def': only(
    '@Adafactor()',
    advice='bind train.train_model.optimizer in a gin file of ours',
  ),
  'z_loss': same('loss.z_loss'),
  'label_smoothing': same('loss.label_smoothing'),
  'loss_normalizing_factor': same('loss.normalizing_factor'),
  'decode_fn': aside(DECODING),
  'default_decoder_params': aside(DECODING),
  'inputs_bidirectional_attention': same('features.bidirectional'),
  'feature_converter_cls': only(None),
}
_TRAIN = {
  'model': only('@EncoderDecoderModel()', '@DecoderOnlyModel()'),
  'model_dir': same('job.model_dir'),
  'total_steps': same('job.steps'),
  'relative_steps': only(
    None,
    advice="set TRAIN_STEPS to the checkpoint's step and these together",
  ),
  'random_seed': same('job.seed', convert=lambda seed: seed or 0),
  'train_dataset_cfg': only('@train/DatasetConfig()'),
  'train_eval_dataset_cfg': aside(EVALUATION),
  'infer_eval_dataset_cfg': aside(EVALUATION),
  'eval_steps': aside(EVALUATION),
  'eval_period': aside(EVALUATION),
  'inference_evaluator_cls': aside(EVALUATION),
  'run_eval_before_training': aside(EVALUATION),
  'train_eval_get_dataset_fn': aside(EVALUATION),
  'checkpoint_cfg': only('@CheckpointConfig()'),
  'partitioner': only('@PjitPartitioner()'),
  'trainer_cls': only('@Trainer'),
  'use_hardware_rng': aside('which random numbers are drawn'),
  'summarize_config_fn': aside(KEEPING),
  'stats_period': aside(KEEPING),
  'use_orbax': aside(KEEPING),
  'concurrent_metrics': aside(COMPUTING),
  'gc_period': aside(COMPUTING),
  'verify_matching_vocabs_fn': aside('the vocabulary, which is checked'),
}
DATA_SET = {
  'mixture_or_task_name': same('job.mixture_or_task'),
  'task_feature_lengths': same('job.lengths'),
  'split': only('train', advice='only the split train is trained on'),
  'batch_size': same('job.batch_size'),
  'shuffle': only(True, advice='examples are always shuffled'),
  'seed': aside('the order of examples, which follows train.random_seed'),
  'use_cached': aside(DATA),
  'pack': same('job.pack'),
  'module': same('imports.module'),
  'use_custom_packing_ops': aside(DATA),
  'use_memory_cache': aside(DATA),
  'trim_output_features': only(True),
  'num_prefetch_threads': aside(DATA),
  'num_workers': aside(DATA),
  'runtime_preprocessors': only(None),
}
RESTORE = {
  'path': same('job.initial_checkpoint', convert=one_path),
  'mode': only('specific', 'latest'),
  'dtype': only(None, 'float32', advice='parameters are float32'),
  'assignment_map': only(
    None, [], advice='bind train.train_model.restore_rules in a gin file of '
    "ours, and .restore = 'params'",
  ),
  'fallback_to_scratch': only(
    False, advice='bind train.train_model.fallback_to_scratch in a gin file of '
    "ours, and .restore = 'params'",
  ),
  'strict': only(True),
  'restore_dataset': only(False),
  'state_transformation_fns': only([], ()),
  'checkpointer_cls': aside(KEEPING),
  'checkpoint_manager_cls': aside(KEEPING),
}  # fmt: skip
_SAVE = {
  'period': same('job.save_every'),
  'dtype': only('float32', advice='checkpoints of a run are float32'),
  'keep': aside(KEEPING),
  'keep_dataset_checkpoints': aside(KEEPING),
  'save_dataset': aside('the position in the data, which is always saved'),
  'checkpointer_cls': aside(KEEPING),
  'checkpoint_manager_cls': aside(KEEPING),
}
MESH = {
  'num_partitions': same('mesh.model'),
  'model_parallel_submesh': same('mesh.model', convert=model_size),
  'logical_axis_rules': only('@standard_logical_axis_rules()'),
  'params_on_devices': only(True),
  'backend': only(None),
}
RULES = {
  'activation_partitioning_dims': only(
    1, advice='bind train.train_model.rules in a gin file of ours'
  ),
  'parameter_partitioning_dims': same('rules.dims', values=(1, 2)),
  'additional_rules': only(None, ()),
}
ALL: Mapping[str, Mapping[str, Word]] = {
  'train': _TRAIN,
  'train/DatasetConfig': DATA_SET,
  'train_eval/DatasetConfig': {'*': aside(EVALUATION)},
  'infer_eval/DatasetConfig': {'*': aside(EVALUATION)},
  'Evaluator': {'*': aside(EVALUATION)},
  'JSONLogger': {'*': aside(EVALUATION)},
  'TensorBoardLogger': {'*': aside(EVALUATION)},
  'CheckpointConfig': {
    name: Word(
      f'checkpoint.{name}',
      values=(None, f'@{name.title()}CheckpointConfig()'),
      convert=lambda config: config is not None,
    )
    for name in ('restore', 'save')
  },
  'RestoreCheckpointConfig': RESTORE,
  'SaveCheckpointConfig': _SAVE,
  'PjitPartitioner': MESH,
  'standard_logical_axis_rules': RULES,
  'Trainer': {
    'num_microbatches': same(
      'job.accumulate', convert=lambda number: number or 1
    ),
    'learning_rate_fn': only(
      '@create_learning_rate_scheduler()',
      advice='bind optim.adafactor.learning_rate in a gin file of ours',
    ),
  },
  'create_learning_rate_scheduler': _SCHEDULE,
  'Adafactor': _ADAFACTOR,
  'EncoderDecoderModel': MODEL,
  'DecoderOnlyModel': MODEL,
  'EncoderDecoderModel.predict_batch_with_aux': {'*': aside(DECODING)},
  'DecoderOnlyModel.predict_batch_with_aux': {'*': aside(DECODING)},
  'beam_search': {'*': aside(DECODING)},
  'temperature_sample': {'*': aside(DECODING)},
  'DecoderParams': {'*': aside(DECODING)},
  'Transformer': {'config': only('@T5Config()')},
  'DecoderWrapper': {'config': only('@TransformerConfig()')},
  'T5Config': NETWORK,
  'TransformerConfig': NETWORK,
  'SentencePieceVocabulary': {
    'sentencepiece_model_file': same('vocabulary.name'),
    'extra_ids': same('vocabulary.extra_ids'),
    '*': aside(VOCABULARY),
  },
  'ByteVocabulary': {'*': aside(VOCABULARY)},
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


Table = Mapping[str, Mapping[str, Word]]


def find(table: Table, scope: str, name: str, argument: str) -> Word | None:
  """The word of a binding; None if it is not known.

  Args:
    table: of words.
    scope: of the binding, '' for none.
    name: of the configurable without modules, with the class of a method.
    argument: what is bound.
  """
  arguments = table.get(f'{scope}/{name}' if scope else name, {})
  return arguments.get(argument) or arguments.get('*')


def all_alike(table: Table, scope: str, name: str) -> bool:
  """Whether all arguments of a configurable mean the same, see `find`."""
  return list(table.get(f'{scope}/{name}' if scope else name, {})) == ['*']
