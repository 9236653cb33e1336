# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The command line: results, and one teaching message with exit code 2."""

import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
from one_command import run
import yaml

import gin
import mergejax as mj
from mergejax import models
from mergejax import partition
from mergejax.cli import common
from mergejax.merging.recipes import recipe as recipe_lib
from mergejax.methods import named
from mergejax.models import t5_hf as t5_names
from mergejax.nn import lm
from mergejax.nn import t5

ROOT = pathlib.Path(__file__).parents[2]


class CommandsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.a = {'w': np.zeros(2, np.float32), 'b': np.full(1, 4, np.float32)}
    self.b = {'w': np.ones(2, np.float32), 'b': np.zeros(1, np.float32)}
    for name in 'ab':
      mj.save_checkpoint(self.folder / name, getattr(self, name))

  def recipe(self, **changes):
    data = {
      'merge_method': 'linear',
      'models': [
        {'model': str(self.folder / 'a'), 'parameters': {'weight': 3}},
        {'model': str(self.folder / 'b'), 'parameters': {'weight': 1}},
      ],
    } | changes
    path = self.folder / 'recipe.yaml'
    path.write_text(yaml.safe_dump(data))
    return path

  def refused(self, message, *arguments):
    before = sorted(self.folder.rglob('*'))
    code, _, err = run(*arguments)
    self.assertEqual(code, 2, err)
    self.assertRegex(err, message)
    self.assertNotIn('Traceback', err)
    self.assertEqual(sorted(self.folder.rglob('*')), before)

  def test_merge(self):
    code, out, err = run('merge', self.recipe(), self.folder / 'out')
    self.assertEqual(code, 0, err)
    self.assertIn('2 parameters in', out)
    merged = mj.open_checkpoint(self.folder / 'out').read()
    np.testing.assert_array_equal(merged['w'], [0.25, 0.25])

  def test_merge_with_a_base_and_options(self):
    path = self.recipe(
        merge_method='task_arithmetic', base_model=str(self.folder / 'a'),
        models=[str(self.folder / 'b')], parameters={'lambda': 0.5},
        out_dtype='bfloat16',
    )  # fmt: skip
    code, _, err = run('merge', path, self.folder / 'out.safetensors')
    self.assertEqual(code, 0, err)
    merged = mj.open_checkpoint(self.folder / 'out.safetensors')
    self.assertEqual(merged.specs()['w'].dtype, jax.numpy.bfloat16)
    np.testing.assert_array_equal(merged.read()['b'], [2])

  def test_dry_run_writes_nothing(self):
    code, out, _ = run('merge', self.recipe(), self.folder / 'out', '--dry_run')
    self.assertEqual(code, 0)
    self.assertIn('weights [3.0, 1.0]', out)
    self.assertFalse((self.folder / 'out').exists())

  @parameterized.parameters(
      (dict(merge_method='liner'), "Did you mean 'linear'"),
      (dict(parameters={'normalise': True}), "Did you mean 'normalize'"),
      (dict(merge_methd='linear'), "Did you mean 'merge_method'"),
      (dict(merge_method='task_arithmetic'), 'give `base_model:`'),
      (dict(merge_method='interpolate'), "needs 'alpha'"),
      (dict(models=[]), 'models must be a list'),
      (dict(models=[{'model': 'x', 'parameters': {'wieght': 1}}]),
       "Did you mean 'weight'"),
      (dict(models=['nowhere/x']), 'no checkpoint at nowhere/x'),
      (dict(out_dtype='float23'), "Did you mean 'float32'"),
  )  # fmt: skip
  def test_mistakes_in_recipes(self, changes, message):
    self.refused(message, 'merge', self.recipe(**changes), self.folder / 'out')

  def test_differing_models(self):
    mj.save_checkpoint(self.folder / 'c', {'w': np.ones(3, np.float32)})
    path = self.recipe(models=[str(self.folder / n) for n in 'ac'])
    self.refused(
      r'! w \[2\] expected, \[3\] given', 'merge', path, self.folder / 'out'
    )
    self.refused(r'- b \[1\]', 'merge', path, self.folder / 'out')

  def test_mistakes_on_the_command_line(self):
    self.refused("Did you mean 'merge'", 'merg')
    self.refused('already exists', 'merge', self.recipe(), self.folder / 'a')
    self.refused('no recipe', 'merge', self.folder / 'r.yaml', 'x')
    self.refused('no checkpoint', 'inspect', self.folder / 'z')
    self.refused("Did you mean '--json'", 'inspect', self.folder / 'a', '--jsn')
    self.refused('required', 'convert', self.folder / 'a')
    self.refused(
        "Did you mean 'safetensors'", 'convert', self.folder / 'a',
        self.folder / 'x', '--format', 'safetensor',
    )  # fmt: skip
    self.refused(
        'corpora folder .* does not exist|There is no',
        'evaluate', self.model(), '--corpora', self.folder / 'none',
    )  # fmt: skip
    self.refused('has no config.json', 'evaluate', self.folder / 'a',
                 '--corpora', self.folder)  # fmt: skip

  def model(self):
    path = self.folder / 'model'
    if not path.exists():
      module = lm.LanguageModel(
          lm.LMConfig(emb_dim=8, num_heads=2, head_dim=4, num_layers=1,
                      mlp_dim=16)
      )  # fmt: skip
      params = models.family_of(module).init(jax.random.key(0))
      mj.save_checkpoint(path, params, config=models.describe(module))
    return path

  def test_evaluate(self):
    corpora = self.folder / 'text'
    corpora.mkdir()
    rows = [json.dumps({'text': f'{i} is a number, is it not? ' * 3})
            for i in range(60)]  # fmt: skip
    (corpora / 'numbers.jsonl').write_text('\n'.join(rows))
    recipe = self.recipe(models=[str(self.model())])
    code, out, err = run(
        'evaluate', self.model(), recipe, '--corpora', corpora,
        '--json', self.folder / 't.json', '--plot', self.folder / 't.png',
    )  # fmt: skip
    self.assertEqual(code, 0, err)
    self.assertIn('bits per byte (lower is better)', out)
    self.assertIn('numbers', out)
    self.assertTrue((self.folder / 't.png').exists())
    table = json.loads((self.folder / 't.json').read_text())
    # A recipe of one model is that model.
    self.assertEqual(table[str(recipe)], table[str(self.model())])
    found = table[str(self.model())]['domains']['numbers']
    self.assertLess(found['low'], found['bits_per_byte'])
    # An untrained model knows little more than that there are 259 tokens.
    self.assertBetween(found['bits_per_byte'], 7, 13)

  def test_text_is_written_whole_and_through_links(self):
    file, link = self.folder / 'file', self.folder / 'link'
    link.symlink_to(file)
    common.write_text(link, 'first')
    self.assertTrue(link.is_symlink())
    common.write_text(file, 'second')
    self.assertEqual(link.read_text(), 'second')
    self.assertEmpty(list(self.folder.glob('.file*')))

  def test_inspect(self):
    code, out, _ = run('inspect', self.folder / 'a')
    self.assertEqual(code, 0)
    self.assertRegex(out, r'w  float32 +\[2\]')
    self.assertIn('orbax: 2 arrays, 3 numbers', out)
    data = json.loads(run('inspect', self.folder / 'a', '--json')[1])
    self.assertEqual(
      data['parameters']['w'], {'shape': [2], 'dtype': 'float32'}
    )

  def test_convert_there_and_back(self):
    first, second = self.folder / 'x.safetensors', self.folder / 'back'
    self.assertEqual(run('convert', self.folder / 'a', first)[0], 0)
    self.assertEqual(run('convert', first, second)[0], 0)
    restored = mj.open_checkpoint(second).read()
    np.testing.assert_array_equal(restored['b'], self.a['b'])

  def test_convert_t5_names(self):
    module = t5.Transformer(
        t5.T5Config(vocab_size=32, emb_dim=8, num_heads=2, head_dim=4,
                    num_encoder_layers=1, num_decoder_layers=1, mlp_dim=16)
    )  # fmt: skip
    params = models.family_of(module).init(jax.random.key(0))
    source = self.folder / 't5'
    mj.save_checkpoint(source, params, config=models.describe(module))
    hf = self.folder / 'hf'
    code, _, err = run(
      'convert', source, hf, '--format', 'safetensors', '--names', 'hf-t5'
    )
    self.assertEqual(code, 0, err)
    names = mj.open_checkpoint(hf).specs()
    self.assertIn('encoder.block.0.layer.0.SelfAttention.q.weight', names)
    (hf / 'config.json').write_text(json.dumps({
        'model_type': 't5', 'vocab_size': 32, 'd_model': 8, 'num_heads': 2,
        'num_layers': 1, 'd_kv': 4, 'd_ff': 16, 'tie_word_embeddings': False,
        'feed_forward_proj': 'gated-gelu',
    }))  # fmt: skip
    loaded, restored = mj.load_model(hf)
    self.assertEqual(loaded.config, module.config)
    jax.tree.map(np.testing.assert_array_equal, restored, dict(params))
    with self.assertRaisesRegex(mj.UserError, 'not a parameter of T5'):
      t5_names.to_hf({'encoder/conv/kernel': np.ones(1)})

  def test_methods(self):
    code, out, _ = run('methods')
    self.assertEqual(code, 0)
    self.assertIn('task_arithmetic', out)
    self.assertIn('2212.04089', run('methods', 'task_arithmetic')[1])
    self.refused("Did you mean 'linear'", 'methods', 'liner')

  @parameterized.parameters((['methods'],), (['--help'],))
  def test_reader_of_the_output_may_leave(self, arguments):
    code = 'import sys; from mergejax.cli import main; sys.exit(main.main())'
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
      [sys.executable, '-c', code, *arguments],
      stdout=write_end, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(write_end)
    self.assertEqual((done.returncode, done.stderr), (141, ''))

  @parameterized.parameters('.', '/', '', './')
  def test_result_without_a_name(self, out):
    self.refused('already exists', 'merge', self.recipe(), out)

  def test_shipped_recipes_parse(self):
    files = sorted((ROOT / 'configs' / 'merge').glob('*.yaml'))
    self.assertNotEmpty(files)
    shipped = {recipe_lib.load_recipe(file).method for file in files}
    self.assertEqual(shipped, set(named.METHODS))


class GinTest(parameterized.TestCase):
  def tearDown(self):
    super().tearDown()
    gin.clear_config()

  @parameterized.parameters(
    (['--gin.CORPRA=x'], "Did you mean 'CORPORA'"),
    ([], 'must be set: CORPORA'),
    (['--gin.CORPORA=x', '--gin.MODEL_DIR=y', '--gin_file=no.gin'], 'no.gin'),
    (['--gin_fle=x'], "Did you mean '--gin_file'"),
    (
      ['--gin.branch_train_merge.Settings.lenth=3'],
      "Did you mean 'length'",
    ),
    (['--gin.CORPORA=nowhere', '--gin.MODEL_DIR=y'], 'no nowhere'),
    (
      ['--gin.CORPORA=x', '--gin_file=gin/runs/diloco.gin', '--gin.OUTER="x"'],
      "diloco.every=100., not 'x'",
    ),
    (
      ['--gin.CORPORA=x', '--gin_file=gin/runs/diloco.gin', '--gin.EVERY=999'],
      'never meet between steps 400 and 500',
    ),
  )
  def test_mistakes(self, flags, message):
    folder = pathlib.Path(self.create_tempdir().full_path)
    here = os.getcwd()
    os.chdir(folder)
    self.addCleanup(os.chdir, here)
    code, _, err = run(
      'train', '--gin_file=gin/runs/branch_train_merge.gin', *flags
    )
    self.assertEqual(code, 2, err)
    self.assertRegex(err, message)
    self.assertNotIn('Traceback', err)
    self.assertEmpty(list(folder.iterdir()))

  def test_train_needs_a_file(self):
    code, _, err = run('train')
    self.assertEqual(code, 2)
    self.assertIn('--gin_file', err)

  def test_text_to_text_trains_and_continues(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    rows = [f'{i} plus one\t{i + 1}' for i in range(300)]
    (folder / 'train.tsv').write_text('\n'.join(['sum\tresult', *rows]))
    (folder / 'tiny.gin').write_text(
      'from __gin__ import dynamic_registration\n'
      'from mergejax.nn import t5\n'
      "include 'runs/text_to_text.gin'\n"
      't5.T5Config:\n  emb_dim = 16\n  num_heads = 2\n  head_dim = 8\n'
      '  num_encoder_layers = 1\n  num_decoder_layers = 1\n  mlp_dim = 32\n'
    )

    def train(steps):
      return run(
        'train',
        f'--gin_file={folder}/tiny.gin',
        f'--gin.TRAIN_FILE={folder}/train.tsv',
        '--gin.INPUTS=what is {sum}',
        '--gin.TARGETS={result}',
        f'--gin.MODEL_DIR={folder}/out',
        f'--gin.TRAIN_STEPS={steps}',
        '--gin.BATCH_SIZE=8',
        "--gin.LENGTHS={'inputs': 32, 'targets': 16}",
        "--gin.MESH={'data': 4, 'model': 2}",
      )

    for steps in (3, 5):
      code, _, err = train(steps)
      self.assertEqual(code, 0, err)
      self.assertIn(f'train: step {steps}/{steps}', err)
    module, _ = mj.load_model(folder / 'out' / 'model')
    self.assertEqual(module.config.dropout_rate, 0.1)
    self.assertEqual(
      sorted(p.name for p in (folder / 'out/train/checkpoints').iterdir()),
      ['3', '5'],
    )

  @parameterized.parameters('t5_1_1_tiny', 't5_1_1_small')
  def test_every_t5_builds(self, size):
    settings = [(n, 'x') for n in ('INPUTS', 'TARGETS', 'MODEL_DIR')]
    settings += [('TRAIN_FILE', 'x'), ('VOCABULARY', 'bytes')]
    common.parse_gin(['runs/text_to_text.gin', f'models/{size}.gin'], settings)
    module = gin.get_configurable(t5.Transformer)()
    count = sum(s.size for s in models.family_of(module).specs().values())
    self.assertBetween(
      count, *{'t5_1_1_tiny': (9e6, 10e6), 't5_1_1_small': (76e6, 78e6)}[size]
    )

  @parameterized.parameters('lm_tiny', 'lm_small')
  def test_every_size_builds(self, size):
    common.parse_gin(
      ['runs/branch_train_merge.gin', f'models/{size}.gin'],
      [('CORPORA', 'None'), ('MODEL_DIR', 'x')],
    )
    from mergejax.cli import branch_train_merge

    settings = gin.get_configurable(branch_train_merge.Settings)()
    self.assertNotEmpty(models.family_of(settings.module).specs())

  def test_bare_words_are_strings(self):
    common.parse_gin(
      ['runs/branch_train_merge.gin'],
      [('CORPORA', '/some/folder'), ('MODEL_DIR', "'quoted'"), ('SEED', '3')],
    )
    self.assertEqual(gin.query_parameter('%CORPORA'), '/some/folder')
    self.assertEqual(gin.query_parameter('%MODEL_DIR'), 'quoted')
    self.assertEqual(gin.query_parameter('%SEED'), 3)

  def test_a_mesh_of_all_devices_by_default(self):
    from mergejax.cli import branch_train_merge
    from mergejax.cli import domain_runs

    settings = branch_train_merge.Settings(
        module=None, optimizer=None, model_dir='x', seed_steps=1, branch_steps=1,
        batch_size=12, length=8, max_train_bytes=None, seed=0,
    )  # fmt: skip
    side_by_side, single = domain_runs.make_meshes(settings, 4)
    self.assertEqual(partition.AXES, side_by_side.axis_names)
    self.assertEqual(dict(side_by_side.shape)['branch'], 4)
    self.assertEqual(dict(single.shape)['data'], 4)


if __name__ == '__main__':
  absltest.main()
