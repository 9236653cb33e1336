# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Words of T5X's `eval.py` and `infer.py`, as `t5x_words` has those of training.

T5X decodes by a beam search of one beam where nothing is said, a decoder-only
model greedily; so do these. What is drawn at a temperature is drawn from the
same distribution, by other random numbers.
"""

from collections.abc import Mapping
from typing import Any

from mergejax.cli import t5x_words as words

_TRAINING = 'training'
_ALL_ANSWERS = 'bind infer.infer_task.every = True in a gin file of ours'
_MODEL = {
  **words.MODEL,
  **{
    name: words.aside(_TRAINING)
    for name in (
      'optimizer_def', 'z_loss', 'label_smoothing', 'loss_normalizing_factor'
    )
  },
  'decode_fn': words.Word(
    'decoding.function', ('@beam_search', '@temperature_sample'), convert=str
  ),
  'default_decoder_params': words.only(None, '@DecoderParams()'),
}  # fmt: skip
_ANSWERS = {
  'num_decodes': words.same('decoding.num_decodes'),
  'return_all_decodes': words.only(None, False, advice=_ALL_ANSWERS),
  'decoder_params': words.only(None),
}
_DATA_SET = {
  **words.DATA_SET,
  'mixture_or_task_name': words.same('data.mixture'),
  'task_feature_lengths': words.same('data.lengths'),
  'split': words.same('data.split'),
  'batch_size': words.same('data.batch_size'),
  'shuffle': words.only(False, advice='examples stay in their order'),
  'seed': words.aside('the order of examples'),
  'pack': words.only(False, advice='a row is one example'),
}
_RESTORE = {
  **words.RESTORE,
  'path': words.same('checkpoint.path', convert=words.one_path),
  'mode': words.only(
    'specific', 'latest', advice='evaluate one checkpoint after the other'
  ),
  'dtype': words.same(
    'checkpoint.dtype',
    values=(None, 'float32', 'bfloat16'),
    convert=lambda dtype: dtype or 'float32',
  ),
  'assignment_map': words.only(
    None, [], (), advice='write the parameters with their names here first'
  ),
  'fallback_to_scratch': words.only(False),
  'strict': words.aside('the optimizer, which is not read'),
}
_LOGGING = {'*': words.aside(words.KEEPING)}
_SHARED: Mapping[str, Mapping[str, words.Word]] = {
  'DatasetConfig': _DATA_SET,
  'RestoreCheckpointConfig': _RESTORE,
  'PjitPartitioner': words.MESH,
  'standard_logical_axis_rules': {
    **words.RULES,
    'parameter_partitioning_dims': words.only(1),
  },
  **{
    name: {'*': words.aside(_TRAINING)}
    for name in (
      'Adafactor', 'Trainer', 'create_learning_rate_scheduler',
      'CheckpointConfig', 'SaveCheckpointConfig',
    )
  },
  'EncoderDecoderModel': _MODEL,
  'DecoderOnlyModel': _MODEL,
  'EncoderDecoderModel.predict_batch_with_aux': _ANSWERS,
  'DecoderOnlyModel.predict_batch_with_aux': _ANSWERS,
  'DecoderParams': _ANSWERS,
  'beam_search': {'alpha': words.same('decoding.alpha')},
  'temperature_sample': {
    'temperature': words.same('decoding.temperature'),
    'topk': words.same('decoding.topk'),
    'topp': words.same('decoding.topp'),
  },
  **{
    name: words.ALL[name]
    for name in (
      'Transformer', 'DecoderWrapper', 'T5Config', 'TransformerConfig',
      'SentencePieceVocabulary', 'ByteVocabulary',
    )
  },
}  # fmt: skip
_RUN = {
  'model': words.only('@EncoderDecoderModel()', '@DecoderOnlyModel()'),
  'dataset_cfg': words.only('@DatasetConfig()'),
  'restore_checkpoint_cfg': words.only('@RestoreCheckpointConfig()'),
  'partitioner': words.only('@PjitPartitioner()'),
  'output_dir': words.same('job.output_dir'),
  'summarize_config_fn': words.aside(words.KEEPING),
  'verify_matching_vocabs_fn': words.aside('the vocabulary, which is checked'),
  'train_state_initializer_cls': words.only('@TrainStateInitializer'),
  'fallback_init_rng': words.only(None),
  'use_orbax': words.aside(words.KEEPING),
}
EVALUATE: Mapping[str, Mapping[str, words.Word]] = {
  **_SHARED,
  'evaluate': {
    **_RUN,
    'inference_evaluator_cls': words.only('@Evaluator'),
    'training_evaluator_cls': words.only(
      None, advice='losses are a metric of `mergejax evaluate --suite`'
    ),
    'train_eval_get_dataset_fn': words.aside(words.EVALUATION),
  },
  'Evaluator': {
    'num_examples': words.only(
      None,
      advice='bind suite.of_mixture.max_examples in a gin file of ours, which '
      'takes a fixed sample and not the first ones',
    ),
    'logger_cls': words.aside(words.KEEPING),
    'log_dir': words.aside(words.KEEPING),
    'use_memory_cache': words.aside(words.DATA),
    'async_compute_metrics': words.aside(words.COMPUTING),
  },
  'JSONLogger': _LOGGING,
  'TensorBoardLogger': _LOGGING,
  'PyLoggingLogger': _LOGGING,
}
INFER: Mapping[str, Mapping[str, words.Word]] = {
  **_SHARED,
  'infer': {
    **_RUN,
    'mode': words.same(
      'job.mode', values=('predict', 'predict_with_aux', 'score')
    ),
    'checkpoint_period': words.aside('after how many batches answers are kept'),
    'checkpoint_ds_iter': words.aside('how answering goes on'),
    'shard_id': words.only(0, advice='spread the rows of a batch over devices'),
    'num_shards': words.only(
      1, advice='spread the rows of a batch over devices'
    ),
    'merge_chunked_results': words.only(True),
    'write_fn': words.only('@write_inferences_to_file'),
    'merge_fn': words.only('@merge_chunks_to_file'),
    'output_vocab_feature_name': words.only('targets'),
    'file_extension': words.only('jsonl'),
    'keep_aux_as_numpy': words.aside(words.KEEPING),
  },
}
# What T5X's own defaults are where ours are others.
DEFAULTS: Mapping[str, Any] = {
  'network.num_heads': 8,
  'network.mlp_dim': 2048,
  'network.mlp_activations': ('relu',),
}
