# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gin files as users of T5X have them: a small model, evaluation, inference."""

MODEL = """
from __gin__ import dynamic_registration
import seqio
from t5x import adafactor
from t5x import models
from t5x.examples.t5 import network

VOCABULARY = @seqio.ByteVocabulary()
DROPOUT_RATE = %gin.REQUIRED
OPTIMIZER = @adafactor.Adafactor()
adafactor.Adafactor.decay_rate = 0.7
MODEL = @models.EncoderDecoderModel()
models.EncoderDecoderModel:
  module = @network.Transformer()
  input_vocabulary = %VOCABULARY
  output_vocabulary = %VOCABULARY
  optimizer_def = %OPTIMIZER
  z_loss = 0.0001
network.Transformer.config = @network.T5Config()
network.T5Config:
  vocab_size = 384
  emb_dim = 8
  num_heads = 2
  head_dim = 4
  mlp_dim = 8
  mlp_activations = ('gelu', 'linear')
  num_encoder_layers = 1
  num_decoder_layers = 1
  dropout_rate = %DROPOUT_RATE
"""
RUN = """
from __gin__ import dynamic_registration
import __main__ as script
import seqio
from t5x import partitioning
from t5x import utils

MIXTURE_OR_TASK_NAME = %gin.REQUIRED
CHECKPOINT_PATH = %gin.REQUIRED
MIXTURE_OR_TASK_MODULE = None
script.NAME:
  model = %MODEL
  dataset_cfg = @utils.DatasetConfig()
  partitioner = @partitioning.PjitPartitioner()
  restore_checkpoint_cfg = @utils.RestoreCheckpointConfig()
partitioning.PjitPartitioner:
  num_partitions = 1
  logical_axis_rules = @partitioning.standard_logical_axis_rules()
utils.DatasetConfig:
  mixture_or_task_name = %MIXTURE_OR_TASK_NAME
  task_feature_lengths = %TASK_FEATURE_LENGTHS
  split = 'test'
  batch_size = 8
  shuffle = False
  seed = 42
  use_cached = False
  pack = False
  module = %MIXTURE_OR_TASK_MODULE
utils.RestoreCheckpointConfig:
  path = %CHECKPOINT_PATH
  mode = 'specific'
"""
EVAL = (
  RUN.replace('NAME:', 'evaluate:')
  + """
EVAL_OUTPUT_DIR = %gin.REQUIRED
TASK_FEATURE_LENGTHS = None
script.evaluate:
  output_dir = %EVAL_OUTPUT_DIR
  inference_evaluator_cls = @seqio.Evaluator
seqio.Evaluator:
  logger_cls = [@seqio.PyLoggingLogger, @seqio.JSONLogger]
  num_examples = None
  use_memory_cache = True
"""
)
INFER = (
  RUN.replace('NAME:', 'infer:')
  + """
INFER_OUTPUT_DIR = %gin.REQUIRED
TASK_FEATURE_LENGTHS = %gin.REQUIRED
script.infer:
  mode = 'predict'
  output_dir = %INFER_OUTPUT_DIR
  checkpoint_period = 100
  shard_id = 0
  num_shards = 1
utils.RestoreCheckpointConfig.dtype = 'bfloat16'
"""
)
