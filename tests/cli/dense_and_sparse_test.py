# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The quickstart of sparse models, on a model of a few hundred numbers."""

import json
import pathlib
from unittest import mock

from absl.testing import absltest
import jax
import one_command
import pytest
import small_corpora

from mergejax import models
from mergejax.cli import dense_and_sparse
from mergejax.cli import train
from mergejax.evaluation import base
from mergejax.evaluation import metrics

_GIN = """
from __gin__ import dynamic_registration
from mergejax.nn import lm
from mergejax.cli import dense_and_sparse

include 'runs/dense_and_sparse.gin'
SEED_STEPS = 3
BRANCH_STEPS = 3
BATCH_SIZE = 8
LENGTH = 8
WARMUP_STEPS = 1
SWITCH = {'num_experts': 2, 'group_size': 8}
UPCYCLED = {'num_experts': 2, 'top_k': 2, 'normalize_gates': True}
dense_and_sparse.Settings.test_sequences = 8
lm.LMConfig:
  emb_dim = 8
  num_heads = 1
  head_dim = 8
  num_layers = 2
  mlp_dim = 8
"""


def run(*arguments):
  with jax.numpy_dtype_promotion('standard'):
    return one_command.run(*arguments)


class DenseAndSparseTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def write(self):
    domains = {'a': 'red green', 'b': 'iron tin'}
    small_corpora.write(self.folder / 'text', domains)
    (self.folder / 'small.gin').write_text(_GIN)
    return (
      'train', f'--gin_file={self.folder}/small.gin',
      f'--gin.CORPORA={self.folder}/text', f'--gin.MODEL_DIR={self.folder}/out',
    )  # fmt: skip

  @pytest.mark.slow
  def test_from_text_to_report(self):
    arguments = self.write()
    code, out, err = run(*arguments)
    self.assertEqual(code, 0, err[-3000:])
    place = self.folder / 'out'
    text = (place / 'report.md').read_text()
    self.assertIn(text, out)
    found = json.loads((place / 'table.json').read_text())
    names = ['dense', 'switch', 'upcycled', 'ensemble of experts', 'mix',
             'mix, trained on']  # fmt: skip
    self.assertEqual(list(found['table']), names)
    # Six steps of eight rows of eight tokens; of two experts three each.
    self.assertRegex(text, r'\| switch \| fresh \| 6 \| 384 \| [\d,]+ \| 2 \|')
    self.assertRegex(
      text, r'\| upcycled \| dense \| 3 \| 192 \| [\d,]+ \| 3 \|'
    )
    self.assertRegex(
      text, r'\| ensemble of experts \| dense \| 3 \| 384 \| [\d,]+ \| 4 \|'
    )
    for name in ('dense', 'switch', 'upcycled', 'mix'):
      models.load_module(place / 'checkpoints' / name)
    self.assertTrue((place / 'train/switch/routing.png').exists())
    code, out, _ = run(*arguments)
    self.assertIn('nothing was computed', out)

  def test_settings_that_are_refused_before_anything_is_trained(self):
    arguments = self.write()
    for message, flag in (
      ("'num_expert'", "--gin.SWITCH={'num_expert': 2}"),
      ('cannot choose 3 experts', "--gin.MIXED={'top_k': 3}"),
      ('has experts already', '--gin.lm.LMConfig.moe=@moe_config.MoeConfig()'),
    ):
      more = self.folder / 'more.gin'
      more.write_text(
        'from __gin__ import dynamic_registration\n'
        'from mergejax.nn import moe_config\n'
        'moe_config.MoeConfig.num_experts = 2\n'
      )
      code, _, err = run(*arguments, f'--gin_file={more}', flag)
      self.assertEqual(code, 2, err)
      self.assertIn(message, err)
      self.assertFalse((self.folder / 'out' / 'train').exists())

  def test_what_is_expected_is_read_from_the_table(self):
    score = lambda value: metrics.score([[value]], [1], 'bits_per_byte')
    table = lambda **means: base.Table({
      name: {'a': score(value)} for name, value in means.items()
    })  # fmt: skip
    means = {
      'dense': 3.0, 'switch': 2.0, 'upcycled': 3.5, 'mix': 5.0,
      'mix, trained on': 4.0, 'ensemble of experts': 4.5,
    }  # fmt: skip
    held = list(dense_and_sparse.expectations(table(**means)).values())
    self.assertEqual(held, [True, False, True, True])

  def test_the_command(self):
    asked = []
    with mock.patch.object(train, 'main', asked.append):
      code, _, err = run('quickstart', '--moe', '--seed', 3)
      self.assertEqual(code, 0, err)
      code, _, err = run('quickstart', '--moe', '--size', 'small')
    self.assertEqual(code, 2)
    self.assertIn('--moe is of the tiny size', err)
    self.assertEqual(
      asked,
      [['--gin_file=runs/dense_and_sparse.gin', '--gin.CORPORA=None',
        "--gin.MODEL_DIR='quickstart_moe'", '--gin.SEED=3']],
    )  # fmt: skip

  def test_blocks_of_a_token(self):
    family = lambda moe: models.family_of(
      models.build({'model_type': 'lm', 'num_layers': 4, 'moe': moe})
    )
    for blocks, moe in (
      (4, None), (4, {'num_experts': 8}), (6, {'num_experts': 8, 'top_k': 2}),
      (8, {'num_experts': 8, 'top_k': 2, 'decoder_layers': 4}),
    ):  # fmt: skip
      self.assertEqual(dense_and_sparse.blocks_of_token(family(moe)), blocks)


if __name__ == '__main__':
  absltest.main()
