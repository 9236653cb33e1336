# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax evaluate | infer --gin_file`: our gin files, and T5X's."""

import inspect
import json
import pathlib
import shutil
import tempfile
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import one_command
import seqio
import small_talkers
import t5x_files
import tensorflow as tf

import gin
import mergejax as mj
from mergejax import models
from mergejax.cli import common
from mergejax.cli import evaluate
from mergejax.cli import infer
from mergejax.cli import t5x_gin
from mergejax.cli import t5x_inference_words
from mergejax.core import errors
from mergejax.core import resume
from mergejax.core import tree
from mergejax.data import splits
from mergejax.evaluation import beam
from mergejax.evaluation import decode
from mergejax.evaluation import suite
from mergejax.evaluation import texts

TASKS = ('gin_inference_a', 'gin_inference_b')
MIXTURE = 'gin_inference'
LENGTHS = "{'inputs': 12, 'targets': 6}"


def rows(split, shuffle_files=False, seed=None):
  del split, shuffle_files, seed
  texts = [f'{word} {i}' for i in range(3) for word in ('good', 'bad', 'fine')]
  return tf.data.Dataset.from_tensor_slices(
    {'inputs': texts, 'targets': ['a'] * len(texts)}
  )


def share_of_a(targets, predictions):
  del targets
  return {'a': np.mean([text.count('a') for text in predictions])}


def setUpModule():  # pylint: disable=invalid-name
  vocabulary = seqio.ByteVocabulary()
  for name in TASKS:
    seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(rows, splits=('test',)),
      preprocessors=[
        seqio.preprocessors.tokenize, seqio.preprocessors.append_eos
      ],
      output_features={
        n: seqio.Feature(vocabulary) for n in ('inputs', 'targets')
      },
      metric_fns=[share_of_a],
    )  # fmt: skip
  seqio.MixtureRegistry.add(MIXTURE, TASKS, default_rate=1)


def tearDownModule():  # pylint: disable=invalid-name
  seqio.MixtureRegistry.remove(MIXTURE)
  for name in TASKS:
    seqio.TaskRegistry.remove(name)


class GinInferenceTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.shared = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.shared)
    (cls.shared / 't5x').mkdir()
    for name, text in (
      ('model', t5x_files.MODEL),
      ('eval', t5x_files.EVAL),
      ('infer', t5x_files.INFER),
    ):
      (cls.shared / 't5x' / f'{name}.gin').write_text(text)
    cls.module, cls.params = small_talkers.build('t5x')
    cls.ours = cls.shared / 'model'
    mj.save_checkpoint(cls.ours, cls.params, config=models.describe(cls.module))
    # As T5X leaves it: nothing beside the weights says what they are of.
    cls.theirs = cls.shared / 'checkpoint_7'
    mj.save_checkpoint(cls.theirs, cls.params, format='t5x')

  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def run_command(self, command, *arguments, code=0, **macros):
    given = [f'--gin.{name}={value}' for name, value in macros.items()]
    found, out, err = one_command.run(command, *arguments, *given)
    self.assertEqual(found, code, err)
    return err if code else out

  def of_t5x(self, run, *more, command=None, code=0, **macros):
    """Runs T5X's files; `more` are lines after them."""
    if more:
      (self.folder / 'more.gin').write_text('\n'.join(more))
    files = ['t5x/model.gin', f't5x/{run}.gin']
    files += [f'{self.folder}/more.gin'] if more else []
    given = {
      'MIXTURE_OR_TASK_NAME': TASKS[0], 'CHECKPOINT_PATH': self.theirs,
      'DROPOUT_RATE': 0.0,
    }  # fmt: skip
    if run == 'infer':
      given['TASK_FEATURE_LENGTHS'] = LENGTHS
    return self.run_command(
      command or {'eval': 'evaluate'}.get(run, run),
      f'--gin_search_paths={self.shared}',
      *(f'--gin_file={file}' for file in files),
      code=code,
      **{**given, **macros},
    )

  def answers(self, folder, task=TASKS[0], mode='predict'):
    file = folder / f'{task}-{mode}.jsonl-00000-of-00001'
    return [json.loads(line) for line in file.read_text().splitlines()]

  def test_every_word_has_a_place_here(self):
    places = {
      'job': {
        *inspect.signature(evaluate.evaluate_models).parameters,
        *inspect.signature(infer.infer_task).parameters,
      },
      'checkpoint': {'path', 'dtype'},
      'data': {'mixture', 'lengths', 'split', 'batch_size'},
    }
    checked = 0
    for table in (t5x_inference_words.EVALUATE, t5x_inference_words.INFER):
      for words in table.values():
        for argument, word in words.items():
          self.assertFalse(word.aside and (word.target or word.values))
          section, _, field = (word.target or '').partition('.')
          if section in places:
            self.assertIn(field, places[section], argument)
            checked += 1
    self.assertGreater(checked, 14)

  def test_flags_and_gin_score_alike(self):
    scored = suite.of_mixture(
      MIXTURE, lengths={'inputs': 12, 'targets': 6}, metric='seqio',
      max_examples=None,
    ).table([('model', self.module, self.params)])  # fmt: skip
    out = self.folder / 'scores'
    self.run_command(
      'evaluate', '--gin_file=gin/runs/eval.gin', MIXTURE=MIXTURE,
      CHECKPOINT=self.ours, OUTPUT_DIR=out, LENGTHS=LENGTHS,
    )  # fmt: skip
    found = json.loads((out / 'scores.json').read_text())['raw']
    (row,) = found.values()
    (wanted,) = scored.to_json().values()
    self.assertEqual(row, wanted)
    self.assertSameElements(TASKS, row['tasks'])

  def test_t5x_files_score_a_checkpoint_without_a_config(self):
    out = self.folder / 'eval'
    self.of_t5x(
      'eval', 'from t5x import models',
      'models.EncoderDecoderModel.predict_batch_with_aux.num_decodes = 2',
      EVAL_OUTPUT_DIR=out,
    )  # fmt: skip
    (row,) = json.loads((out / 'scores.json').read_text())['raw'].values()
    # T5X finds out the lengths; its decoding is a beam search.
    found = splits.longest(TASKS[0], 'test')
    self.assertEqual(found, {'inputs': 7, 'targets': 2})
    (wanted,) = suite.of_mixture(
      TASKS[0], lengths=found, metric='seqio', max_examples=None,
      batch_size=8, decoding={'beams': 2},
    ).table([('model', self.module, self.params)]).to_json().values()  # fmt: skip
    self.assertEqual(row, wanted)

  def test_a_task_is_answered_as_lines_are(self):
    out = self.folder / 'answers'
    command = ('infer', '--gin_file=gin/runs/infer.gin')
    macros = dict(
      MIXTURE=MIXTURE, CHECKPOINT=self.ours, OUTPUT_DIR=out, LENGTHS=LENGTHS,
      BATCH_SIZE=4, MODE='predict_with_aux',
    )  # fmt: skip
    append, times = resume.Journal.append, []

    def killed(self, row, **named):
      append(self, row, **named)
      times.append(1)
      if len(times) == 4:  # in the second task
        raise KeyboardInterrupt

    with mock.patch.object(resume.Journal, 'append', killed):
      self.run_command(*command, code=130, **macros)
    mode = 'predict_with_aux'
    self.assertLen(self.answers(out, mode=mode), 9)
    self.assertIn(
      'split', self.run_command(*command, code=2, **macros, SPLIT='none')
    )
    told = self.run_command(
      *command, code=2, **{**macros, 'LENGTHS': "{'inputs': 9, 'targets': 5}"}
    )
    self.assertIn('holds a run with other settings', told)
    self.run_command(*command, **macros)
    said_of = [
      bytes(row['inputs']).decode() for row in rows('test').as_numpy_iterator()
    ]
    lines = self.folder / 'lines.txt'
    lines.write_text('\n'.join(said_of))
    plain = self.folder / 'plain.jsonl'
    self.run_command(
      'infer', self.ours, '--inputs', lines, '--out', plain, '--length', 6,
      '--batch_size', 4, '--scores',
    )  # fmt: skip
    said = [json.loads(line) for line in plain.read_text().splitlines()]
    self.assertGreater(len({row['prediction'] for row in said}), 1)
    for task in TASKS:
      found = self.answers(out, task, mode)
      self.assertEqual(
        [row['inputs'] for row in found],
        [
          {'inputs_pretokenized': text, 'targets_pretokenized': 'a'}
          for text in said_of
        ],
      )
      for row, wanted in zip(found, said, strict=True):
        self.assertEqual(row['prediction'], wanted['prediction'])
        self.assertNotIn('score', row)
        self.assertAlmostEqual(row['aux']['scores'], wanted['score'], places=4)

  def test_targets_are_scored(self):
    out = self.folder / 'scored'
    self.of_t5x(
      'infer', 'script.infer.mode = "score"',
      'utils.RestoreCheckpointConfig.dtype = None', INFER_OUTPUT_DIR=out,
    )  # fmt: skip
    found = [row['score'] for row in self.answers(out, mode='score')]
    scored = suite.of_mixture(
      TASKS[0], lengths={'inputs': 12, 'targets': 6}, metric='loss',
      max_examples=None, batch_size=9,
    )  # fmt: skip
    (batch,) = scored.batches(TASKS[0], 'test')
    family = models.family_of(self.module)
    logits = jax.jit(family.logits)(self.params, batch)
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    targets = batch['decoder_target_tokens']
    told = np.take_along_axis(log_p, targets[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(
      found, np.sum(told * (targets > 0), axis=1), rtol=1e-5
    )

  def test_t5x_files_answer_with_rounded_parameters(self):
    out = self.folder / 'infer'
    self.of_t5x(
      'infer', 'script.infer.mode = "predict_with_aux"', INFER_OUTPUT_DIR=out
    )
    rounded = {
      path: np.asarray(leaf).astype('bfloat16').astype(np.float32)
      for path, leaf in tree.flatten(self.params).items()
    }
    task = seqio.TaskRegistry.get(TASKS[0])
    lines, tokens = texts.of_task(task, 'test', {'inputs': 12, 'targets': 6})
    family = models.family_of(self.module)
    writer = texts.Writer(
      decode.make_decoder(family, length=6, method=beam.Beam(beams=1)),
      family, tree.unflatten(rounded), seqio.ByteVocabulary(), batch_size=16,
      scored=True,
    )  # fmt: skip
    (wanted,) = writer.batches(lines, tokens=tokens)
    found = self.answers(out, mode='predict_with_aux')
    for row, other in zip(found, wanted, strict=True):
      self.assertEqual(row['prediction'], other['prediction'])
      self.assertAlmostEqual(row['aux']['scores'], other['score'], places=4)

  @parameterized.parameters(
    ('eval', 'seqio.Evaluator.num_examples = 10', 'num_examples = 10'),
    ('eval', 'utils.RestoreCheckpointConfig.mode = "all"', 'mode = all'),
    ('infer', 'script.infer.mode = "scores"', 'mode = scores'),
    ('infer', 'script.infer.num_shards = 2', 'num_shards = 2'),
    ('infer', 'utils.DatasetConfig.shuffle = True', 'shuffle = True'),
    ('infer', 'models.EncoderDecoderModel.decode_fn = @decoding.mine', '@mine'),
    ('infer', 'decoding.temperature_sample.surprise = 1', 'surprise: not'),
  )
  def test_words_without_meaning_are_refused(self, run, line, said):
    told = self.of_t5x(
      run, 'from t5x import decoding', 'from t5x import models', line, code=2,
      **{f'{run.upper()}_OUTPUT_DIR': self.folder / 'out'},
    )  # fmt: skip
    self.assertIn('mean nothing here', told)
    self.assertIn(said, told)
    self.assertFalse((self.folder / 'out').exists())

  @parameterized.parameters(
    ((), {'beams': 1, 'alpha': 0.6}),
    (('beam_search.alpha = 1.0', 'DecoderParams.num_decodes = 4'),
     {'beams': 4, 'alpha': 1.0}),
    (('decode_fn = @temperature_sample',), {'temperature': 0}),
    (('decode_fn = @temperature_sample', 'temperature_sample.topk = 0',
      'temperature_sample.topp = 0.9', 'temperature_sample.temperature = 0.5'),
     {'temperature': 0.5, 'top_k': 0, 'top_p': 0.9}),
    (('decode_fn = @temperature_sample', 'temperature_sample.topp = 0.9'),
     'takes one of them'),
    (('decode_fn = @temperature_sample', 'DecoderParams.num_decodes = 4'),
     'several draws'),
  )  # fmt: skip
  def test_decoding(self, lines, expected):
    lines = [
      f'models.EncoderDecoderModel.{line}'.replace('@', '@decoding.')
      if line.startswith('decode_fn')
      else f'{"models" if "Params" in line else "decoding"}.{line}'
      for line in lines
    ]
    if any('DecoderParams' in line for line in lines):
      lines.append(
        'models.EncoderDecoderModel.default_decoder_params = '
        '@models.DecoderParams()'
      )
    file = self.folder / 'decoding.gin'
    file.write_text(
      'from t5x import decoding\nfrom t5x import models\n' + '\n'.join(lines)
    )
    files = ['t5x/model.gin', 't5x/infer.gin', str(file)]
    bindings = [
      ('DROPOUT_RATE', '0.0'), ('MIXTURE_OR_TASK_NAME', TASKS[0]),
      ('CHECKPOINT_PATH', 'x'), ('INFER_OUTPUT_DIR', 'y'),
      ('TASK_FEATURE_LENGTHS', LENGTHS),
    ]  # fmt: skip
    translate = lambda: t5x_gin.translate(
      files, bindings, [str(self.shared)], 'infer'
    )
    if isinstance(expected, str):
      with self.assertRaisesRegex(errors.ConfigError, expected):
        translate()
      return
    text, asides = translate()
    self.assertIn('Adafactor', '\n'.join(asides))
    common.parse_gin([self.create_tempfile(content=text).full_path], [])
    self.assertEqual(gin.query_parameter('infer.infer_task.decoding'), expected)

  def test_mistakes(self):
    told = self.of_t5x('eval', command='train', code=2, EVAL_OUTPUT_DIR='out')
    self.assertIn('evaluate.model: not known here', told)
    told = self.run_command('infer', '--gin_file=gin/runs/eval.gin', code=2,
                            MIXTURE=MIXTURE, CHECKPOINT=self.ours)  # fmt: skip
    self.assertIn('do not bind infer.infer_task.checkpoint', told)
    told = self.run_command(
      'evaluate', '--gin_file=gin/runs/eval.gin', code=2, MIXTURE=MIXTURE,
      CHECKPOINT_PATH=self.ours,
    )  # fmt: skip
    self.assertIn("Did you mean 'CHECKPOINT'", told)
    told = self.run_command(
      'evaluate', '--gin_file=gin/runs/eval.gin', code=2, MIXTURE=MIXTURE,
      CHECKPOINT=self.theirs,
    )  # fmt: skip
    self.assertIn('has no config.json', told)


if __name__ == '__main__':
  absltest.main()
