# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax infer`: what a model says to lines of text, to the byte."""

import contextlib
import functools
import io
import json
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import seqio
import small_talkers
import tiers

import mergejax as mj
from mergejax import models
from mergejax.cli import main as main_lib
from mergejax.core import resume
from mergejax.evaluation import beam
from mergejax.evaluation import decode
from mergejax.evaluation import sampling
from mergejax.evaluation import suite as suite_lib
from mergejax.evaluation import texts

LINES = ['good 0', 'bad 0', 'fine 0', 'good 1 é', '', 'bad 1']


@functools.cache
def built(kind):
  return small_talkers.build(kind)


@tiers.slow('test_says_what_.*0')
class InferTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def model(self, kind):
    path = self.folder / kind
    if not path.exists():
      module, params = built(kind)
      mj.save_checkpoint(path, params, config=models.describe(module))
    return path

  def inputs(self, text, suffix='.txt'):
    path = self.folder / f'inputs{suffix}'
    path.write_text(text, encoding='utf-8')
    return path

  def infer(self, *arguments, code=0):
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
      with contextlib.redirect_stderr(err):
        found = main_lib.main(['infer', *map(str, arguments)])
    self.assertEqual(found, code, err.getvalue())
    return err.getvalue()

  @parameterized.parameters('t5x', 'lm')
  def test_says_what_evaluate_scores(self, kind):
    lines = [line for line in LINES if line]
    table = self.folder / 'rows.tsv'
    rows = ''.join(f'{line}\ta\n' for line in lines)
    table.write_text('text\tlabel\n' + rows, encoding='utf-8')
    suite = suite_lib.load({
        'tasks': {'t': {'files': str(table), 'inputs': '{text}',
                        'targets': '{label}', 'metric': 'exact_match'}},
        'lengths': {'inputs': 12, 'targets': 6}, 'batch_size': 4,
    })  # fmt: skip
    module, params = built(kind)
    batches = suite.batches('t', 'test', kind=suite.kind_for('t', module))
    expected = suite.by_generation('t', 'test').predictions(
      module, params, batches
    )
    self.assertGreater(len(set(expected)), 1)
    out = self.folder / 'out.jsonl'
    self.infer(
      self.model(kind), '--inputs', self.inputs('\n'.join(lines)), '--out', out,
      '--length', 6, '--batch_size', 4, *(['--prefix'] * (kind == 'lm')),
    )  # fmt: skip
    found = [json.loads(line) for line in out.read_text('utf-8').splitlines()]
    self.assertEqual(
      found,
      [{'inputs': x, 'prediction': y} for x, y in zip(lines, expected)],
    )

  def test_every_beam_with_its_score(self):
    rows = [{'id': i, 'inputs': line} for i, line in enumerate(LINES)]
    source = self.inputs('\n'.join(map(json.dumps, rows)), '.jsonl')
    out = self.folder / 'out.jsonl'
    self.infer(
      self.model('t5x'), '--inputs', source, '--out', out, '--length', 5,
      '--batch_size', 4, '--beams', 3, '--alpha', 1.0, '--all', '--scores',
    )  # fmt: skip
    module, params = built('t5x')
    encode = seqio.ByteVocabulary().encode
    tokens = np.zeros((len(LINES), 12), np.int32)
    for row, line in zip(tokens, LINES):
      ids = [*encode(line), decode.END]
      row[: len(ids)] = ids
    wanted = decode.make_decoder(
      module, length=5, method=beam.Beam(beams=3, alpha=1.0)
    ).answers(params, {'encoder_input_tokens': tokens})
    found = [json.loads(line) for line in out.read_text('utf-8').splitlines()]
    for i, row in enumerate(found):
      self.assertEqual((row['id'], row['inputs']), (i, LINES[i]))
      self.assertEqual(row['prediction'], row['predictions'][0])
      self.assertEqual(row['score'], row['scores'][0])
      self.assertEqual(row['scores'], sorted(row['scores'], reverse=True))
      answered = wanted.scores[i] > -np.inf
      self.assertLen(row['predictions'], answered.sum())
      np.testing.assert_allclose(
        row['scores'][::-1], wanted.scores[i][answered], rtol=1e-4, atol=1e-5
      )

  def test_killed_it_continues_to_the_same_bytes(self):
    command = [
      self.model('lm'), '--inputs', self.inputs('\n'.join(LINES)),
      '--length', 5, '--batch_size', 2, '--temperature', 2.0, '--samples', 2,
      '--seed', 3, '--scores',
    ]  # fmt: skip
    whole, out = self.folder / 'whole.jsonl', self.folder / 'out.jsonl'
    self.infer(*command, '--out', whole)
    append = resume.Journal.append
    times = []

    def killed(self, row, **named):
      append(self, row, **named)
      times.append(1)
      if len(times) == 2:
        raise KeyboardInterrupt

    with mock.patch.object(resume.Journal, 'append', killed):
      self.infer(*command, '--out', out, code=130)
    self.assertFalse(out.exists())
    journal = self.folder / '.out.jsonl.answers.jsonl'
    self.assertTrue(journal.exists())
    other = [*command[:-2], 4, '--out', out]
    self.assertIn('seed', self.infer(*other, code=2))
    told = self.infer(*command, '--out', out)
    self.assertIn('4 of 6 are answered', told)
    self.assertEqual(out.read_bytes(), whole.read_bytes())
    self.assertFalse(journal.exists())
    rows = [json.loads(line) for line in out.read_text('utf-8').splitlines()]
    self.assertEqual([row['inputs'] for row in rows], LINES)
    self.assertTrue(all(len(row['predictions']) == 2 for row in rows))
    self.assertIn('already exists', self.infer(*command, '--out', out, code=2))

  def test_rows_are_numbered_through(self):
    """So that draws are the same however rows are put in batches."""
    seen = []

    class Numbers:
      method = sampling.Sample()

      def __call__(self, params, batch, *, key, rows):
        seen.append((rows.tolist(), int(jax.random.key_data(key)[-1])))
        return np.zeros((len(rows), 2), np.int32)

    family = models.family_of(built('lm')[0])
    writer = texts.Writer(
      Numbers(), family, {}, seqio.ByteVocabulary(), batch_size=4, seed=7
    )
    rows = texts.read('\n'.join(LINES), 'here', json_lines=False)
    answered = list(writer.batches(rows))
    self.assertEqual(seen, [([0, 1, 2, 3], 7), ([4, 5, 6, 7], 7)])
    self.assertEqual([len(batch) for batch in answered], [4, 2])
    self.assertLen(list(writer.batches(rows, 4)), 1)
    self.assertEqual(seen[-1], seen[1])

  def test_mistakes(self):
    model, out = self.model('t5x'), self.folder / 'out.jsonl'
    inputs = self.inputs('a\nb')
    for words, said in (
      (['--inputs', self.folder / 'none.txt'], 'There is no file'),
      (['--inputs', model], '.jsonl file or -'),
      (['--inputs', self.inputs('{"inputs": "a"}\n{"text": "b"}', '.jsonl')],
       'line 2: expected {"inputs": "some text"}, got'),
      (['--inputs', self.inputs(' \n')], 'no line to answer'),
      (['--inputs', inputs, '--beam', '3'], "'--beams'"),
      (['--inputs', inputs, '--beams', '3', '--top_k', '2'], 'different ways'),
      (['--inputs', inputs, '--length', '0'], '--length must be'),
      (['--inputs', inputs, '--temperature', '-1'], 'temperature must be'),
    ):  # fmt: skip
      inputs.write_text('a\nb')
      if 'no line' in said:
        inputs.write_text(' \n')
      told = self.infer(model, '--out', out, *words, code=2)
      self.assertIn(said, told)
    inputs.write_text('a\nb')
    told = self.infer(
      model, '--out', out, '--inputs', inputs, '--prefix', code=2
    )
    self.assertIn('--prefix is for decoder-only', told)
    self.assertFalse(out.exists())

  def test_a_token_that_the_model_does_not_know(self):
    module = models.build(dict(
        model_type='lm', vocab_size=64, emb_dim=4, num_layers=1, num_heads=1,
        head_dim=4, mlp_dim=4,
    ))  # fmt: skip
    family = models.family_of(module)
    batch = texts.batch_of(family, [[9, 70]], rows=2)
    with self.assertRaisesRegex(mj.UserError, 'knows 0 to 63'):
      family.check_batch(batch, 'the inputs')
    self.assertEqual(batch['decoder_target_tokens'].shape, (2, 16))
    self.assertEqual(jax.tree.leaves(batch)[0].dtype, np.int32)


if __name__ == '__main__':
  absltest.main()
