# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""All that has a row for every token follows the tokens, and nothing else."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import adapters_on_disk
import ml_dtypes
import models_on_disk
import numpy as np

import mergejax as mj
from mergejax.core import tree as tree_lib

V, WIDTH = 8, 3


class VocabulariesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.rng = np.random.default_rng(0)

  def save(self, name, tokens, more, rows=V):
    """A model with more leaves than usual, and the leaves themselves."""
    model = models_on_disk.llama(self.rng, vocab=rows, width=WIDTH, layers=1)
    for path, shape in more.items():
      model[path] = self.rng.normal(size=shape).astype(np.float32)
    tokens = {token: row for row, token in enumerate(tokens)}
    models_on_disk.save(self.folder / name, model, tokens)
    return model

  def merged(self, **recipe):
    models = [str(self.folder / name) for name in 'ab']
    plan = mj.plan({'merge_method': 'linear', 'models': models, **recipe})
    mj.execute(plan, self.folder / 'out')
    return tree_lib.flatten(mj.open_checkpoint(self.folder / 'out').read())

  @parameterized.parameters(
    ('lm_head.bias', (V,), True),
    ('cls.predictions.bias', (V,), True),
    ('cls.predictions.decoder.weight', (V, WIDTH), True),
    ('generator_lm_head.weight', (V, WIDTH), True),
    ('model.decoder.output_projection.weight', (V, WIDTH), True),
    ('model.token_embedding.weight', (V, WIDTH), True),
    ('tok_embeddings.weight', (V, WIDTH), True),
    ('model.embedding_norm.weight', (WIDTH,), False),
    ('embeddings_project.weight', (2, WIDTH), False),
    ('model.embed_vision.embedding.weight', (4, WIDTH), False),
    ('mask_decoder.mlps.0.proj_out.weight', (3, 3), False),
    ('encoder.attention.proj_out.weight', (V, WIDTH, 1, 1), False),
  )
  def test_what_follows_the_tokens(self, path, shape, follows):
    a = self.save('a', 'abcdefgh', {path: shape})
    b = self.save('b', 'hgfedcba', {path: shape})
    merged = self.merged(tokenizer={'source': 'base'})
    for leaf in (path, 'model.embed_tokens.weight', 'lm_head.weight'):
      own = b[leaf][::-1] if follows or leaf != path else b[leaf]
      np.testing.assert_allclose(merged[leaf], (a[leaf] + own) / 2, atol=1e-6)

  @parameterized.parameters(
    ('final_logits_bias', (1, V)),
    ('lm_head/kernel', (WIDTH, V)),
    ('embed_tokens_per_layer.weight', (V - 1, 2)),
  )
  def test_what_cannot_follow_stays_or_is_refused(self, path, shape):
    a = self.save('a', 'abcdefgh', {path: shape})
    b = self.save('b', 'abcdefgh', {path: shape})
    merged = self.merged(tokenizer={'source': 'base'})
    np.testing.assert_allclose(merged[path], (a[path] + b[path]) / 2, atol=1e-6)
    self.save('b', 'abcdefhg', {path: shape})
    with self.assertRaisesRegex(mj.UserError, rf'cannot follow:\n *{path}'):
      self.merged(tokenizer={'source': 'base'})
    self.save('b', 'abcdefghi', {path: shape}, rows=V + 1)
    for policy in ('union', 'pad'):
      with self.assertRaisesRegex(mj.UserError, rf'cannot follow:\n *{path}'):
        self.merged(vocab=policy)

  def test_tokens_that_move_need_a_table(self):
    leaves = {'model.lookup.weight': np.zeros((3, 2), np.float32)}
    for name, tokens in (('a', 'abc'), ('b', 'bac')):
      self.save(name, tokens, {}, rows=3)
      file = self.folder / name / 'model.safetensors'
      mj.save_checkpoint(file, leaves, overwrite=True)
    with self.assertRaisesRegex(
      mj.UserError, 'b: its tokens lie at other rows'
    ):
      self.merged(tokenizer={'source': 'base'})

  @parameterized.parameters('base', 'union')
  def test_a_head_is_untied_before_its_rows_move(self, source):
    # The base, whose rows stand in for those of others, stores no head.
    a = self.save('a', 'abcdefgh', {})
    del a['lm_head.weight']
    rows = {token: row for row, token in enumerate('abcdefgh')}
    models_on_disk.save(self.folder / 'a', a, rows)
    head = self.save('b', 'hgfedcbax', {}, rows=V + 1)['lm_head.weight']
    merged = self.merged(
      base_model=str(self.folder / 'a'), merge_method='task_arithmetic',
      models=[str(self.folder / 'b')], parameters={'weight': 1},
      tokenizer={'source': source}, untie=True,
    )  # fmt: skip
    order = [7, 6, 5, 4, 3, 2, 1, 0] + [8] * (source == 'union')
    np.testing.assert_allclose(merged['lm_head.weight'], head[order], atol=1e-5)

  def test_the_dtype_is_that_of_the_stored_model(self):
    # An adapter makes leaves float32 until the end, whatever lies around it.
    tokens = {token: row for row, token in enumerate('abcdefgh')}
    a = models_on_disk.llama(
      self.rng, ml_dtypes.bfloat16, vocab=V, width=WIDTH, layers=1, tied=True
    )
    models_on_disk.save(self.folder / 'a', a, tokens)
    self.save('b', 'hgfedcbax', {}, rows=V + 1)
    disk = adapters_on_disk.Folder(self.folder)
    path = disk.adapter({
      'model.layers.0.mlp.up_proj.lora_A.weight': disk.random(1, WIDTH),
      'model.layers.0.mlp.up_proj.lora_B.weight': disk.random(7, 1),
    })  # fmt: skip
    models = [f'{self.folder / "a"}+{path}', str(self.folder / 'b')]
    for more in ({}, {'tokenizer': {'source': 'union'}}):
      plan = mj.plan({
        'merge_method': 'linear', 'models': models[: 1 + len(more)],
        'untie': True, **more,
      })  # fmt: skip
      self.assertEqual({t.spec.dtype.name for t in plan.tasks}, {'bfloat16'})
      self.assertIn('lm_head.weight', [task.path for task in plan.tasks])

  def test_rows_of_no_token_stay(self):
    a = self.save('a', 'abcdef', {})
    b = self.save('b', 'abcdef', {})
    merged = self.merged(tokenizer={'source': 'base'})
    path = 'lm_head.weight'
    np.testing.assert_allclose(merged[path], (a[path] + b[path]) / 2, atol=1e-6)
    # A model that has a token there has no padding row.
    (self.folder / 'out').rename(self.folder / 'first')
    b = self.save('b', 'abcdefgh', {})
    merged = self.merged(tokenizer={'source': 'base'})
    np.testing.assert_allclose(merged[path][6:], a[path][6:], atol=1e-6)


if __name__ == '__main__':
  absltest.main()
