# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gin files in T5X's words: what they mean here, and what is refused."""

import contextlib
import dataclasses
import inspect
import io
import pathlib
import sys
import textwrap
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized

import gin
from mergejax.cli import common
from mergejax.cli import main as main_lib
from mergejax.cli import t5x_gin
from mergejax.cli import t5x_words
from mergejax.cli import train
from mergejax.core import errors
from mergejax.nn import lm
from mergejax.nn import t5
from mergejax.training import objective
from mergejax.training import optim
from mergejax.training import schedules

# As users of T5X write them: a model, another size of it, a run.
MODEL = """
from __gin__ import dynamic_registration
import seqio
from t5x import adafactor
from t5x import models
from t5x.examples.t5 import network

Z_LOSS = 0.001
DROPOUT_RATE = %gin.REQUIRED
LOSS_NORMALIZING_FACTOR = None
VOCABULARY = @seqio.SentencePieceVocabulary()
seqio.SentencePieceVocabulary.sentencepiece_model_file = 'gs://somewhere/x.model'
OPTIMIZER = @adafactor.Adafactor()
adafactor.Adafactor:
  decay_rate = 0.7
  logical_factor_rules = @adafactor.standard_logical_factor_rules()
MODEL = @models.EncoderDecoderModel()
models.EncoderDecoderModel:
  module = @network.Transformer()
  input_vocabulary = %VOCABULARY
  output_vocabulary = %VOCABULARY
  optimizer_def = %OPTIMIZER
  z_loss = %Z_LOSS
  loss_normalizing_factor = %LOSS_NORMALIZING_FACTOR
network.Transformer.config = @network.T5Config()
network.T5Config:
  vocab_size = 384
  emb_dim = 32
  num_heads = 4
  mlp_activations = ('gelu', 'linear')
  dropout_rate = %DROPOUT_RATE
"""
SMALL = """
include 't5x/model.gin'
network.T5Config:
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  mlp_dim = 32
  num_encoder_layers = 1
  num_decoder_layers = 1
"""
RUN = """
from __gin__ import dynamic_registration
import __main__ as train_script
import seqio
from t5x import partitioning
from t5x import trainer
from t5x import utils

MIXTURE_OR_TASK_NAME = %gin.REQUIRED
TASK_FEATURE_LENGTHS = %gin.REQUIRED
TRAIN_STEPS = %gin.REQUIRED
MODEL_DIR = %gin.REQUIRED
INITIAL_CHECKPOINT_PATH = %gin.REQUIRED
MIXTURE_OR_TASK_MODULE = None
DROPOUT_RATE = 0.1
BATCH_SIZE = 16
EVAL_PERIOD = 10
train_script.train:
  model = %MODEL
  model_dir = %MODEL_DIR
  train_dataset_cfg = @train/utils.DatasetConfig()
  infer_eval_dataset_cfg = @infer_eval/utils.DatasetConfig()
  checkpoint_cfg = @utils.CheckpointConfig()
  partitioner = @partitioning.PjitPartitioner()
  trainer_cls = @trainer.Trainer
  total_steps = %TRAIN_STEPS
  eval_period = %EVAL_PERIOD
  random_seed = None
  inference_evaluator_cls = @seqio.Evaluator
partitioning.PjitPartitioner:
  num_partitions = 1
  model_parallel_submesh = None
  logical_axis_rules = @partitioning.standard_logical_axis_rules()
seqio.Evaluator.num_examples = 8
train/utils.DatasetConfig:
  mixture_or_task_name = %MIXTURE_OR_TASK_NAME
  task_feature_lengths = %TASK_FEATURE_LENGTHS
  split = 'train'
  batch_size = %BATCH_SIZE
  shuffle = True
  pack = True
  module = %MIXTURE_OR_TASK_MODULE
infer_eval/utils.DatasetConfig.split = 'validation'
utils.CheckpointConfig:
  restore = @utils.RestoreCheckpointConfig()
  save = @utils.SaveCheckpointConfig()
utils.RestoreCheckpointConfig:
  path = %INITIAL_CHECKPOINT_PATH
  mode = 'specific'
  dtype = 'float32'
utils.SaveCheckpointConfig:
  period = 50
  keep = None
trainer.Trainer:
  num_microbatches = None
  learning_rate_fn = @utils.create_learning_rate_scheduler()
utils.create_learning_rate_scheduler:
  factors = 'constant'
  base_learning_rate = 0.002
"""
TASK = """
import seqio
import tensorflow as tf

def examples(split, shuffle_files=False, seed=None):
  del split, shuffle_files, seed
  rows = range(32)
  return tf.data.Dataset.from_tensor_slices({
    'inputs': [f'add {i}' for i in rows], 'targets': [str(i + 1) for i in rows]
  })

vocabulary = seqio.ByteVocabulary()
seqio.TaskRegistry.add(
  'task_of_a_t5x_user',
  source=seqio.FunctionDataSource(examples, splits=('train', 'validation')),
  preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
  output_features={n: seqio.Feature(vocabulary) for n in ('inputs', 'targets')},
)
"""
SET = {
  'MIXTURE_OR_TASK_NAME': 'a_task',
  'TASK_FEATURE_LENGTHS': "{'inputs': 16, 'targets': 8}",
  'TRAIN_STEPS': '20',
  'MODEL_DIR': '/tmp/out',
  'INITIAL_CHECKPOINT_PATH': 'None',
}


class T5XGinTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    (self.folder / 't5x').mkdir()
    for name, text in (('model', MODEL), ('small', SMALL), ('run', RUN)):
      (self.folder / 't5x' / f'{name}.gin').write_text(text)

  def translated(
    self, *more, files=('t5x/model.gin', 't5x/run.gin'), **changed
  ):
    """`(text, what is left aside)`; `more` are texts of further files."""
    files = list(files)
    for i, text in enumerate(more):
      file = self.folder / f'more_{i}.gin'
      file.write_text(textwrap.dedent(text))
      files.append(str(file))
    bindings = {**SET, **changed}
    return t5x_gin.translate(
      files, [(n, v) for n, v in bindings.items() if v], [str(self.folder)]
    )

  def read(self, *more, **changed):
    """What gin binds: `read()('train.train_model.steps')`."""
    text, _ = self.translated(*more, **changed)
    file = self.folder / 'ours.gin'
    file.write_text(text)
    common.parse_gin([str(file)], [])
    return gin.query_parameter

  def test_every_word_has_a_place_here(self):
    places = {
      'job': inspect.signature(train.train_model).parameters,
      'network': {
        field.name
        for config in (t5.T5Config, lm.LMConfig)
        for field in dataclasses.fields(config)
      },
      'optimizer': inspect.signature(optim.adafactor).parameters,
      'schedule': inspect.signature(schedules.factors).parameters,
      'loss': inspect.signature(objective.cross_entropy).parameters,
    }
    checked = 0
    for words in t5x_words.ALL.values():
      for argument, word in words.items():
        self.assertFalse(word.aside and (word.target or word.values), argument)
        section, _, field = (word.target or '').partition('.')
        if section in places:
          self.assertIn(field, places[section])
          checked += 1
    self.assertGreater(checked, 50)

  def test_a_model_and_a_run(self):
    found = self.read()
    job = 'train.train_model.'
    for name, value in dict(
      steps=20, batch_size=16, model_dir='/tmp/out', mixture_or_task='a_task',
      lengths={'inputs': 16, 'targets': 8}, pack=True, seed=0, save_every=50,
      accumulate=1, kind='encoder_decoder',
      loss={'z_loss': 0.001, 'normalizing_factor': None},
    ).items():  # fmt: skip
      self.assertEqual(found(job + name), value, name)
    for name in ('initial_checkpoint', 'restore', 'mesh', 'rules'):
      with self.assertRaises(ValueError):
        found(job + name)
    self.assertEqual(found('optim.adafactor.decay_rate'), 0.7)
    self.assertEqual(found('schedules.factors.base_learning_rate'), 0.002)
    module = found('train.train_model.module').scoped_configurable_fn()
    # What the files leave out is T5X's default, not ours.
    expected = t5.T5Config(
      vocab_size=384, emb_dim=32, num_heads=4, head_dim=64, mlp_dim=2048,
      num_encoder_layers=6, num_decoder_layers=6, dropout_rate=0.1,
      mlp_activations=('gelu', 'linear'),
    )  # fmt: skip
    self.assertEqual(module.config, expected)

  def test_later_files_and_the_command_line_win(self):
    found = self.read(
      """
      from t5x import partitioning
      from t5x.examples.scalable_t5 import network
      BATCH_SIZE = 4
      Z_LOSS = 0.0
      network.T5Config:
        emb_dim = 16
        remat_policy = 'minimal'
      partitioning.PjitPartitioner.num_partitions = 2
      partitioning.standard_logical_axis_rules.parameter_partitioning_dims = 2
      """,
      TRAIN_STEPS='30',
      INITIAL_CHECKPOINT_PATH='/data/checkpoint_100',
    )
    job = 'train.train_model.'
    self.assertEqual(found(job + 'steps'), 30)
    self.assertEqual(found(job + 'batch_size'), 4)
    self.assertEqual(found(job + 'initial_checkpoint'), '/data/checkpoint_100')
    self.assertEqual(found(job + 'restore'), 'state')
    self.assertEqual(found(job + 'mesh'), {'model': 2})
    self.assertEqual(found(job + 'loss')['z_loss'], 0.0)
    self.assertIn('fsdp', repr(found(job + 'rules')))
    config = found(job + 'module').scoped_configurable_fn().config
    self.assertEqual(config.emb_dim, 16)
    self.assertEqual(config.remat_policy, 'minimal')
    # The other network of T5X scans, and has a table a layer.
    self.assertTrue(config.scan_layers and config.relative_per_layer)

  def test_of_two_words_for_the_mesh_the_last_counts(self):
    submesh = 'partitioning.PjitPartitioner.model_parallel_submesh = (1, 2, 1)'
    number = 'partitioning.PjitPartitioner.num_partitions = 4'
    for words, size in (((submesh,), 2), ((submesh, number), 4)):
      found = self.read(*words)
      self.assertEqual(found('train.train_model.mesh'), {'model': size})

  def test_nothing_is_restored_where_restore_is_none(self):
    found = self.read(
      'from t5x import utils\nutils.CheckpointConfig.restore = None\n'
      'utils.CheckpointConfig.save = None\n',
      INITIAL_CHECKPOINT_PATH='/data/checkpoint_100',
    )
    self.assertEqual(found('train.train_model.save_every'), 20)
    with self.assertRaises(ValueError):
      found('train.train_model.restore')

  def test_what_is_left_aside_is_told(self):
    _, asides = self.translated()
    text = '\n'.join(asides)
    for name in ('Evaluator.*', 'infer_eval/DatasetConfig.*',
                 'train.eval_period', 'SentencePieceVocabulary.*'):  # fmt: skip
      self.assertIn(name, text)
    self.assertNotIn('total_steps', text)

  def test_words_without_meaning_are_refused_all_at_once(self):
    with self.assertRaises(errors.ConfigError) as caught:
      self.translated(
        """
        from t5x import optimizers
        from t5x import utils
        import optax
        OPTIMIZER = @optimizers.adamw()
        optax.adamw.b1 = 0.9
        train_script.train.relative_steps = 5
        network.T5Config.surprise = 1
        utils.DatasetConfig.seed = 1
        train/utils.DatasetConfig.shuffle = False
        train/utils.DatasetConfig.task_feature_lengths = {'inputs': @seqio.x}
        utils.SaveCheckpointConfig.dtype = 'bfloat16'
        """
      )
    for name in (
      'EncoderDecoderModel.optimizer_def = @adamw()', 'adamw.b1',
      'train.relative_steps = 5', 'T5Config.surprise', 'DatasetConfig.seed',
      'train/DatasetConfig.shuffle = False', 'DatasetConfig.dtype', 'lengths',
    ):  # fmt: skip
      expected = name.replace(
        'DatasetConfig.dtype', 'SaveCheckpointConfig.dtype'
      )
      self.assertIn(expected, caught.exception.message)

  @parameterized.parameters(
    ({'TRAIN_STEPS': None, 'MODEL_DIR': None}, 'must be set.*TRAIN_STEPS'),
    ({'TRAIN_STEP': '3'}, "Did you mean 'TRAIN_STEPS'"),
    ({'files': ('t5x/run.gin',)}, "Unknown gin name 'MODEL'"),
    ({'files': ('t5x/model.gin',), 'DROPOUT_RATE': '0.0',
      **dict.fromkeys(SET)}, 'no train.model'),
    ({'files': ('t5x/nothing.gin',)}, 'gin_search_paths'),
    ({'MIXTURE_OR_TASK_MODULE': 'no_such_module'}, 'no_such_module'),
  )  # fmt: skip
  def test_mistakes(self, changed, message):
    with self.assertRaisesRegex(errors.ConfigError, message):
      self.translated(**changed)

  @parameterized.parameters(
    'from t5x.contrib.moe import trainer',
    'from t5x.contrib.gpu.t5 import network',
  )
  def test_other_parts_of_t5x_are_refused_by_name(self, line):
    with self.assertRaisesRegex(errors.ConfigError, 't5x.contrib'):
      self.translated(line)

  def test_decoder_only(self):
    model = """
      from t5x import models
      from t5x.examples.decoder_only import network
      MODEL = @models.DecoderOnlyModel()
      models.DecoderOnlyModel:
        module = @network.DecoderWrapper()
        vocabulary = %VOCABULARY
        optimizer_def = %OPTIMIZER
      network.DecoderWrapper.config = @network.TransformerConfig()
      network.TransformerConfig:
        vocab_size = 384
        num_layers = 2
        logits_via_embedding = True
      """
    found = self.read(model, TASK_FEATURE_LENGTHS="{'targets': 8}")
    self.assertEqual(found('train.train_model.kind'), 'lm')
    config = found('train.train_model.module').scoped_configurable_fn().config
    self.assertIsInstance(config, lm.LMConfig)
    self.assertEqual(config.num_layers, 2)
    with self.assertRaisesRegex(errors.ConfigError, 'bidirectional'):
      self.read(model)
    prefix = 'models.DecoderOnlyModel.inputs_bidirectional_attention = True'
    found = self.read(model, prefix)
    self.assertEqual(found('train.train_model.kind'), 'prefix_lm')

  def test_files_without_t5x_stay_as_they_are(self):
    files = ['gin/runs/text_to_text.gin', 'no_such_file.gin']
    self.assertEqual(t5x_gin.divide(files), ([], files))

  def test_the_command_begins_to_train(self):
    (self.folder / 'tasks_of_a_t5x_user.py').write_text(TASK)
    sys.path.insert(0, str(self.folder))
    self.addCleanup(sys.path.remove, str(self.folder))
    # A file of ours binds what T5X has no word for.
    (self.folder / 'ours.gin').write_text(
      'from __gin__ import dynamic_registration\n'
      'from mergejax.cli import train\n'
      'train.train_model.clip = 1.0\n'
    )
    macros = {
      **SET, 'MODEL_DIR': f"'{self.folder}/out'", 'TRAIN_STEPS': '2',
      'BATCH_SIZE': '8', 'MIXTURE_OR_TASK_NAME': 'task_of_a_t5x_user',
      'MIXTURE_OR_TASK_MODULE': 'tasks_of_a_t5x_user',
    }  # fmt: skip
    command = [
      'train', f'--gin_search_paths={self.folder}',
      '--gin_file=t5x/small.gin', '--gin_file=t5x/run.gin',
      f'--gin_file={self.folder}/ours.gin',
      *(f'--gin.{name}={value}' for name, value in macros.items()),
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as out:
      self.assertEqual(main_lib.main([*command, '--dry_run']), 0)
    self.assertIn('train.train_model.clip = 1.0', out.getvalue())
    # All of a run but its steps, which other tests make.
    with (
      contextlib.redirect_stderr(io.StringIO()) as said,
      mock.patch.object(train.trainer_lib.Trainer, 'fit', autospec=True) as fit,
      mock.patch.object(train.checkpoints, 'export') as export,
    ):
      self.assertEqual(main_lib.main(command), 0, said.getvalue())
    self.assertIn('left aside', said.getvalue())
    trainer, stream = fit.call_args.args
    self.assertEqual(fit.call_args.kwargs['steps'], 2)
    self.assertEqual(trainer.family.config.emb_dim, 16)
    self.assertEqual(trainer.family.config.dropout_rate, 0.1)
    batch = next(stream)
    self.assertEqual(batch['encoder_input_tokens'].shape, (8, 16))
    self.assertIn('decoder_segment_ids', batch)  # packed
    export.assert_called_once()


if __name__ == '__main__':
  absltest.main()
