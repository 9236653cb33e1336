# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""An exported folder answers as we do, in a process that has jax alone."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

from absl.testing import absltest
from absl.testing import parameterized
import jax
from jax import export as jax_export
import numpy as np
import one_command
import pytest
import seqio
import small_decoders
import small_talkers

import mergejax as mj
from mergejax import models
from mergejax.core import errors
from mergejax.evaluation import beam
from mergejax.evaluation import decode
from mergejax.evaluation import sampling
from mergejax.evaluation import serving

LINES = ['good 0', 'bad 0', 'fine 0', 'good 1']
# What the docstring of the module tells a server, up to the parameters.
LOADER = textwrap.dedent(
  serving.__doc__[
    serving.__doc__.index('    import jax, json') : serving.__doc__.index(
      '    inputs = numpy.zeros'
    )
  ]
)
SERVER = f"""
import sys

for name in sys.argv[1:]:
{textwrap.indent(LOADER.replace("'served'", 'name'), '  ')}
  inputs = numpy.load(folder / 'inputs.npy')
  seed = [numpy.uint32(3)] if 'seed' in manifest['call'] else []
  found = jax.jit(program.call)(params, inputs, *seed)
  numpy.savez(folder / 'found.npz', **found)
for name in ('mergejax', 'flax', 'seqio', 'tensorflow'):
  assert name not in sys.modules, name
"""
CASES = {
  't5x': ('t5x', [], decode.GREEDY),
  't5x_beams': ('t5x', ['--beams', '3', '--all'], beam.Beam(beams=3)),
  'lm_draws': (
    'lm',
    ['--temperature', '2.0', '--samples', '2', '--seed', '3'],
    sampling.Sample(temperature=2.0, samples=2),
  ),
}


class NamedTable(small_decoders.TableFamily):
  """Its parameters have a name, as those of a checkpoint."""

  def decode_step(self, params, cache, tokens):
    return super().decode_step(params['table'], cache, tokens)


class ServingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def model(self, kind):
    module, params = small_talkers.build(kind)
    path = self.folder / kind
    if not path.exists():
      # So that bfloat16 holds them too.
      params = jax.tree.map(
        lambda x: np.asarray(x).astype('bfloat16').astype(np.float32), params
      )
      mj.save_checkpoint(path, params, config=models.describe(module))
    return path

  def command(self, *arguments, code=0):
    found, out, err = one_command.run(*arguments)
    self.assertEqual(found, code, err)
    return out + err

  def test_a_process_without_us_says_the_same(self):
    encode = seqio.ByteVocabulary().encode
    lines = self.folder / 'lines.txt'
    lines.write_text('\n'.join(LINES))
    for name, (kind, flags, _) in CASES.items():
      out = self.folder / f'served_{name}'
      exporting = [flag for flag in flags if flag not in ('--all',)]
      if '--seed' in exporting:  # an argument of the program
        exporting = exporting[: exporting.index('--seed')]
      self.command(
        'export', self.model(kind), out, '--input_length', 16, '--length', 6,
        '--platforms', 'cpu,tpu', *exporting,
        '--dtype', 'bfloat16' if 'beams' in name else 'float32',
      )  # fmt: skip
      inputs = np.zeros((len(LINES), 16), np.int32)
      for row, line in zip(inputs, LINES):
        ids = encode(line) + [decode.END] * (kind == 't5x')
        row[: len(ids)] = ids
      np.save(out / 'inputs.npy', inputs)
      self.command(
        'infer', self.model(kind), '--inputs', lines, '--length', 6,
        '--out', self.folder / f'{name}.jsonl', '--batch_size', len(LINES),
        '--scores', *flags,
      )  # fmt: skip
    subprocess.run(
      [
        sys.executable, '-c', SERVER,
        *(str(self.folder / f'served_{name}') for name in CASES),
      ],
      check=True, cwd=self.folder,
      env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'},
    )  # fmt: skip
    said = seqio.ByteVocabulary().decode
    for name, (_, _, method) in CASES.items():
      folder = self.folder / f'served_{name}'
      with np.load(folder / 'found.npz') as file:
        found = dict(file)
      manifest = json.loads((folder / 'manifest.json').read_text())
      self.assertEqual(manifest['platforms'], ['cpu', 'tpu'])
      for key, array in found.items():
        shape = manifest['outputs'][key]['shape']
        self.assertEqual(shape, ['batch', *array.shape[1:]])
        self.assertEqual(manifest['outputs'][key]['dtype'], str(array.dtype))
      text = (self.folder / f'{name}.jsonl').read_text()
      rows = [json.loads(line) for line in text.splitlines()]
      self.assertLen(rows, len(LINES))
      for row, tokens, scores in zip(rows, found['tokens'], found['scores']):
        texts = [said(np.trim_zeros(each, 'b').tolist()) for each in tokens]
        self.assertEqual(row['prediction'], texts[0])
        self.assertEqual(row['score'], scores[0])  # to the last bit
        if method.answers > 1:
          ended = [t for t, s in zip(texts, scores) if s > -np.inf]
          self.assertEqual(row['predictions'], ended)
      self.assertGreater(len({row['prediction'] for row in rows}), 1)

  def test_rows_that_only_fill_a_batch_are_empty(self):
    self.check_rows('t5x')

  @pytest.mark.slow
  def test_rows_that_only_fill_a_batch_of_prefixes_are_empty(self):
    self.check_rows('lm')

  def check_rows(self, kind):
    module, params = small_talkers.build(kind)
    out = self.folder / 'out'
    manifest = serving.export_decoder(
      module, params, out, input_length=8, length=5, batch_size=3,
      platforms=['cpu'], prefix=kind == 'lm',
    )  # fmt: skip
    self.assertEqual(manifest['inputs']['shape'], [3, 8])
    self.assertEqual(
      manifest['parameters'].keys(), mj.open_checkpoint(out / serving.PARAMS).specs().keys()
    )  # fmt: skip
    program = jax_export.deserialize(
      bytearray((out / serving.PROGRAM).read_bytes())
    )
    inputs = np.zeros((3, 8), np.int32)
    inputs[0, :3], inputs[2, :2] = [70, 71, 1], [80, 1]
    found = program.call(_flat(params), inputs)
    self.assertGreater(int(found['tokens'][0].max()), 0)
    self.assertEqual(int(found['tokens'][1].max()), 0)
    with self.assertRaises(ValueError):
      program.call(_flat(params), inputs[:2])

  def test_the_vocabulary_goes_along(self):
    file = self.folder / 'pieces.model'
    file.write_bytes(b'pieces')
    family = NamedTable(small_decoders.Table())
    out = self.folder / 'out'
    table = {'table': small_decoders.table()}
    named = dict(input_length=4, length=2, vocabulary=file, platforms=['cpu'])
    with self.assertRaisesRegex(errors.ConfigError, 'give a batch_size'):
      serving.export_decoder(family, table, out, **named)
    manifest = serving.export_decoder(family, table, out, batch_size=2, **named)
    self.assertEqual(manifest['vocabulary']['name'], 'pieces.model')
    self.assertEqual((out / 'pieces.model').read_bytes(), b'pieces')
    self.assertSameElements(
      [path.name for path in out.iterdir()],
      [serving.PROGRAM, serving.PARAMS, serving.MANIFEST, 'pieces.model'],
    )

  def test_mistakes(self):
    module, params = small_talkers.build('t5x')
    out = self.folder / 'out'
    named = dict(input_length=8, length=4, platforms=['cpu'])
    for changed, said in (
      ({'platforms': ['gpu']}, "Unknown platform 'gpu'"),
      ({'length': 0}, 'length must be'),
      ({'input_length': 0}, 'input_length must be'),
      ({'batch_size': 0}, 'batch_size must be'),
      ({'vocabulary': self.folder / 'none.model'}, 'no SentencePiece model'),
    ):
      with self.assertRaisesRegex(errors.UserError, said):
        serving.export_decoder(module, params, out, **{**named, **changed})
      self.assertFalse(out.exists())
    images = models.build({'model_type': 'mlp', 'hidden': (4,)})
    with self.assertRaisesRegex(errors.ConfigError, 'do not decode'):
      serving.export_decoder(images, {}, out, **named)
    told = self.command('export', self.model('t5x'), out, '--prefix', code=2)
    self.assertIn('--prefix is for decoder-only', told)


def _flat(params):
  return {
    '/'.join(key.key for key in path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
  }


if __name__ == '__main__':
  absltest.main()
