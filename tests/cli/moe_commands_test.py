# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Sparse models as a user makes them of dense ones, trains and shrinks them."""

import json
import pathlib
import tempfile

from absl.testing import absltest
import jax
import numpy as np
import one_command
import small_corpora
from tensorboard.backend.event_processing import event_accumulator

import mergejax as mj
from mergejax import models
from mergejax.core import tree
from mergejax.experts import forest as forest_lib

SIZES = dict(
  vocab_size=259, emb_dim=8, num_heads=2, head_dim=4, mlp_dim=16, num_layers=2
)
AT = 'decoder/layers_1/mlp'
KEPT = 'num_experts: 4, top_k: 2, normalize_gates: true'


def run(*arguments):
  """`(exit code, stdout, stderr)`."""
  with jax.numpy_dtype_promotion('standard'):
    return one_command.run(*arguments)


def leaves(path):
  return tree.flatten(mj.load_model(path)[1])


class MoeCommandsTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(tempfile.mkdtemp())
    domains = {'colours': 'red green blue', 'metals': 'iron tin'}
    small_corpora.write(cls.folder / 'text', domains)
    module = models.build({'model_type': 'lm', **SIZES})
    cls.family = models.family_of(module)
    for seed in (0, 1):
      params = jax.jit(cls.family.init)(jax.random.key(seed))
      mj.save_checkpoint(
        cls.folder / f'dense_{seed}', params, config=models.describe(module)
      )
    cls.dense = cls.folder / 'dense_0'
    cls.text = ('--corpora', cls.folder / 'text', '--length', 16)
    cls.upcycled = cls.folder / 'upcycled'
    cls.said = cls.done(
      'moe', 'upcycle', cls.dense, cls.upcycled, '--moe', f'{{{KEPT}}}'
    )
    # Another gin file, the four axes of a mesh, no flag that is not documented.
    cls.done(
      'train', '--gin_file=gin/runs/language_model.gin',
      '--gin_file=gin/models/of_checkpoint.gin',
      f'--gin.INITIAL_CHECKPOINT={cls.upcycled}',
      f'--gin.CORPORA={cls.folder}/text', f'--gin.MODEL_DIR={cls.folder}/run',
      '--gin.TRAIN_STEPS=4', '--gin.SAVE_EVERY=2', '--gin.WARMUP_STEPS=1',
      '--gin.BATCH_SIZE=8', '--gin.LENGTH=16',
      '--gin.train.train_model.log_every=1',
      "--gin.MESH={'branch': 1, 'data': 2, 'expert': 2, 'model': 2}",
    )  # fmt: skip
    cls.sparse = cls.folder / 'run' / 'model'

  @classmethod
  def done(cls, *arguments):
    code, out, err = run(*arguments)
    assert code == 0, err[-3000:]
    return out

  def test_upcycling_keeps_the_function(self):
    self.assertIn('1 sparse layer(s) of 4 experts', self.said)
    self.assertIn('it is the function of the dense model', self.said)
    found, wanted = leaves(self.upcycled), leaves(self.dense)
    for name in ('wi_0', 'wi_1', 'wo'):
      for kernel in found[f'{AT}/expert/{name}/kernel']:
        np.testing.assert_array_equal(kernel, wanted[f'{AT}/{name}/kernel'])
    out = self.folder / 'raw'
    said = self.done(
      'moe', 'upcycle', self.dense, out, '--moe', '{num_experts: 2}'
    )
    self.assertIn('normalize_gates: true keeps the function', said)

  def test_a_run_trains_it_on_and_draws_its_routing(self):
    found, begun = leaves(self.sparse), leaves(self.upcycled)
    kernels = [t[f'{AT}/expert/wo/kernel'] for t in (found, begun)]
    self.assertEqual(kernels[0].shape, (4, 16, 8))
    self.assertGreater(np.abs(kernels[0] - kernels[1]).max(), 1e-4)
    run_folder = self.folder / 'run' / 'train'
    rows = (run_folder / 'metrics.jsonl').read_text().splitlines()
    last = json.loads(rows[-1])
    self.assertIn('moe/expert_load/3', last)
    self.assertNotIn('moe/expert_loads', '\n'.join(rows))
    self.assertEqual((run_folder / 'routing.png').read_bytes()[1:4], b'PNG')
    events = event_accumulator.EventAccumulator(str(run_folder / 'events'))
    events.Reload()
    self.assertEqual([e.step for e in events.Tensors('routing')], [2, 4])

  def test_usage_and_fewer_experts(self):
    file, picture = self.folder / 'usage.json', self.folder / 'usage.png'
    said = self.done(
      'moe', 'usage', self.sparse, *self.text, '--json', file, '--plot', picture
    )
    told = json.loads(file.read_text())[AT]
    self.assertAlmostEqual(sum(told['load']), 1)
    self.assertIn(f'{AT}: {told["load"][0]:.3f} ', said)
    self.assertEqual(picture.read_bytes()[1:4], b'PNG')
    out = self.folder / 'pruned'
    self.done(
      'moe', 'fewer', self.sparse, out, '--experts', 2, '--how', 'prune',
      *self.text,
    )  # fmt: skip
    kept = np.sort(np.argsort(-np.array(told['load']), kind='stable')[:2])
    path = f'{AT}/expert/wo/kernel'
    np.testing.assert_array_equal(
      leaves(out)[path], leaves(self.sparse)[path][kept]
    )
    out = self.folder / 'by_load'
    self.done(
      'moe', 'dense', self.sparse, out, '--how', 'argmax', *self.text
    )  # fmt: skip
    np.testing.assert_allclose(
      leaves(out)[f'{AT}/wo/kernel'],
      leaves(self.sparse)[path][np.argmax(told['load'])], rtol=1e-6,
    )  # fmt: skip

  def test_dense_takes_upcycling_back(self):
    out = self.folder / 'back'
    self.done('moe', 'dense', self.upcycled, out)
    found, wanted = leaves(out), leaves(self.dense)
    self.assertEqual(found.keys(), wanted.keys())
    for path in wanted:
      np.testing.assert_array_equal(found[path], wanted[path])

  def test_a_student_and_its_teacher_by_gin(self):
    student = self.folder / 'student'
    self.done('moe', 'dense', self.sparse, student, '--how', 'fresh')
    run_folder = self.folder / 'distilled'
    self.done(
      'train', '--gin_file=gin/runs/language_model.gin',
      '--gin_file=gin/models/of_checkpoint.gin',
      '--gin_file=gin/objectives/distillation.gin',
      f'--gin.INITIAL_CHECKPOINT={student}', f'--gin.TEACHER={self.sparse}',
      f'--gin.CORPORA={self.folder}/text', f'--gin.MODEL_DIR={run_folder}',
      '--gin.TRAIN_STEPS=2', '--gin.SAVE_EVERY=2', '--gin.WARMUP_STEPS=1',
      '--gin.BATCH_SIZE=8', '--gin.LENGTH=16',
      '--gin.train.train_model.log_every=1',
    )  # fmt: skip
    rows = (run_folder / 'train' / 'metrics.jsonl').read_text().splitlines()
    self.assertGreater(json.loads(rows[0])['teacher_kl'], 0)
    record = json.loads((run_folder / 'run.json').read_text())
    self.assertIn('share=0.25, temperature=1.0', json.dumps(record))
    self.assertIsNone(models.load_module(run_folder / 'model').config.moe)
    # Layers without experts are the teacher's, a block is drawn anew.
    found, theirs = leaves(student), leaves(self.sparse)
    fresh = {f'{AT}/{name}/kernel' for name in ('wi_0', 'wi_1', 'wo')}
    self.assertEqual(found.keys() - theirs.keys(), fresh)
    for path in found.keys() - fresh:
      np.testing.assert_array_equal(found[path], theirs[path])

  def test_mixing_a_forest_or_its_experts(self):
    place = self.folder / 'forest'
    forest = forest_lib.create(place, self.dense)
    for i in (0, 1):
      forest.add(f'e{i}', self.folder / f'dense_{i}', parents={'seed': 1.0})
    moe = '{top_k: 1, decoder_layers: 2}'
    paths = [self.folder / f'dense_{i}' for i in (0, 1)]
    for out, given in (('a', [place]), ('b', paths)):
      self.done('moe', 'mix', *given, self.folder / out, '--moe', moe)
    found = [leaves(self.folder / out) for out in 'ab']
    for path in found[0]:
      np.testing.assert_array_equal(found[0][path], found[1][path])
    wanted = [leaves(path) for path in paths]
    for layer in ('decoder/layers_0/mlp', AT):
      np.testing.assert_array_equal(
        found[0][f'{layer}/expert/wo/kernel'],
        [own[f'{layer}/wo/kernel'] for own in wanted],
      )

  def test_matching(self):
    params = leaves(self.sparse)
    order = [2, 0, 3, 1]
    turned = {
      path: leaf[order] if '/expert/' in path
      else leaf[:, order] if '/router/' in path else leaf
      for path, leaf in params.items()
    }  # fmt: skip
    module = models.load_module(self.sparse)
    other, out = self.folder / 'turned', self.folder / 'matched'
    mj.save_checkpoint(other, turned, config=models.describe(module))
    self.done('moe', 'match', self.sparse, other, out)
    found = leaves(out)
    for path, leaf in params.items():
      np.testing.assert_array_equal(found[path], leaf)

  def test_mistakes(self):
    out, dense, sparse = self.folder / 'none', self.dense, self.upcycled
    upcycle = lambda moe, model=dense: ('upcycle', model, out, '--moe', moe)
    other = self.folder / 'narrow'
    if not other.exists():
      module = models.build({'model_type': 'lm', **SIZES, 'mlp_dim': 8})
      params = jax.jit(models.family_of(module).init)(jax.random.key(0))
      mj.save_checkpoint(other, params, config=models.describe(module))
    for message, *arguments in (
      ('has experts already', *upcycle('{num_experts: 2}', sparse)),
      ('how many experts', *upcycle('{top_k: 2}')),
      ("Unknown setting of moe, 'num_expert'", *upcycle('{num_expert: 2}')),
      ('--moe is a mapping', *upcycle('8')),
      ('cannot choose 3 experts', *upcycle('{num_experts: 2, top_k: 3}')),
      ('allow_noncausal', *upcycle('{num_experts: 2, router: experts_choose}')),
      ('there are 2', *upcycle('{num_experts: 2, decoder_layers: 3}')),
      ('has no experts', 'dense', dense, out),
      ('has no experts', 'usage', dense, *self.text),
      ('give text by --corpora', 'dense', sparse, out, '--how', 'load'),
      ('has nothing of the experts', 'dense', sparse, out, '--how', 'fresh',
       '--align'),
      ('5 experts cannot be left of 4', 'fewer', sparse, out, '--experts', 5,
       *self.text),
      ('2 models cannot be 3 experts', 'mix', dense, dense, out, '--moe',
       '{num_experts: 3}'),
      ('mlp_dim', 'mix', dense, other, out),
      ('already exists', 'dense', sparse, dense),
      ('is a single file', 'dense', sparse, self.folder / 'x.safetensors'),
    ):  # fmt: skip
      with self.subTest(message):
        code, _, err = run('moe', *arguments)
        self.assertEqual(code, 2, err)
        self.assertRegex(err, message)
        self.assertNotIn('Traceback', err)
        self.assertFalse(out.exists())


if __name__ == '__main__':
  absltest.main()
