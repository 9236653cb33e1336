# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Embeddings and heads: vocabularies that differ, heads that are tied."""

import json

from absl.testing import absltest
from absl.testing import parameterized
import models_on_disk
import numpy as np

import mergejax as mj


class HeadsTest(models_on_disk.TestCase):
  def test_vocabulary_sizes(self):
    rng = np.random.default_rng(1)
    model = models_on_disk.llama(rng, vocab=44)
    models_on_disk.save(self.folder / 'b', model)
    with self.assertRaisesRegex(mj.UserError, 'vocabularies differ.*union'):
      mj.plan(self.recipe())
    for policy, rows in (('base', 40), ('union', 44), ('pad', 44)):
      merged = self.merged(self.recipe(vocab=policy), f'out-{policy}')
      leaf = merged['lm_head.weight']
      self.assertEqual(leaf.shape, (rows, 12))
      a, b = self.models['a']['lm_head.weight'], model['lm_head.weight']
      np.testing.assert_allclose(leaf[:40], (a + b[:40]) / 2, atol=1e-6)
      if policy == 'union':
        np.testing.assert_allclose(leaf[40:], b[40:], atol=1e-6)
      elif policy == 'pad':
        np.testing.assert_allclose(leaf[40:], b[40:] / 2, atol=1e-6)

  @parameterized.parameters('base', 'union')
  def test_rows_are_matched_by_token(self, source):
    rng = np.random.default_rng(1)
    # The same tokens in another order, and two that only b has.
    order = rng.permutation(40)
    tokens = {f't{t}': row for row, t in enumerate(order)} | {
      'new': 40,
      'also': 41,
    }
    model = models_on_disk.llama(rng, vocab=42)
    models_on_disk.save(self.folder / 'b', model, tokens)
    recipe = self.recipe(tokenizer={'source': source})
    merged = self.merged(recipe)['model.embed_tokens.weight']
    a = self.models['a']['model.embed_tokens.weight']
    b = model['model.embed_tokens.weight']
    self.assertEqual(merged.shape[0], 40 if source == 'base' else 42)
    for t in range(40):
      np.testing.assert_allclose(
        merged[t], (a[t] + b[tokens[f't{t}']]) / 2, atol=1e-6
      )
    if source == 'union':
      np.testing.assert_allclose(merged[40:], b[40:], atol=1e-6)
      saved = json.loads((self.folder / 'out' / 'tokenizer.json').read_text())
      self.assertEqual(
        [(e['id'], e['content']) for e in saved['added_tokens']],
        [(40, 'new'), (41, 'also')],
      )
      config = json.loads((self.folder / 'out' / 'config.json').read_text())
      self.assertEqual(config['vocab_size'], 42)

  def test_a_token_that_a_model_never_saw_does_not_move(self):
    rng = np.random.default_rng(1)
    model = models_on_disk.llama(rng, vocab=39)
    models_on_disk.save(self.folder / 'b', model)
    recipe = self.recipe(
      'task_arithmetic', base='base', tokenizer_source='base'
    )
    leaf = self.merged(recipe)['lm_head.weight']
    base, a = (self.models[n]['lm_head.weight'] for n in ('base', 'a'))
    np.testing.assert_allclose(leaf[39], a[39], atol=1e-6)
    np.testing.assert_allclose(
      leaf[0], a[0] + model['lm_head.weight'][0] - base[0], atol=1e-5
    )

  def test_tied_against_untied(self):
    rng = np.random.default_rng(1)
    tied = models_on_disk.llama(rng, tied=True)
    models_on_disk.save(self.folder / 'b', tied)
    with self.assertRaisesRegex(mj.UserError, 'untie: true'):
      mj.plan(self.recipe())
    merged = self.merged(self.recipe(untie=True))
    np.testing.assert_allclose(
      merged['lm_head.weight'],
      (self.models['a']['lm_head.weight'] + tied['model.embed_tokens.weight'])
      / 2,
      atol=1e-6,
    )
    config = json.loads((self.folder / 'out' / 'config.json').read_text())
    self.assertFalse(config['tie_word_embeddings'])

  def test_tied_everywhere_stays_tied(self):
    rng = np.random.default_rng(1)
    for name in ('a', 'b'):
      models_on_disk.save(
        self.folder / name, models_on_disk.llama(rng, tied=True)
      )
    merged = self.merged(self.recipe('dare_linear', ('b',), base='a'))
    self.assertNotIn('lm_head.weight', merged)
    self.assertEqual(
      mj.open_checkpoint(self.folder / 'out').tied,
      {'lm_head.weight': 'model.embed_tokens.weight'},
    )

  def test_a_repeated_head_must_repeat(self):
    for name in ('a', 'b'):
      models_on_disk.save(
        self.folder / name, self.models[name], tie_word_embeddings=True
      )
    plan = mj.plan(self.recipe())
    with self.assertRaisesRegex(mj.UserError, 'lm_head.weight should repeat'):
      mj.execute(plan, self.folder / 'out')
    self.assertFalse(list(self.folder.glob('.out*')))
    for name in ('a', 'b'):
      model = dict(self.models[name])
      model['lm_head.weight'] = model['model.embed_tokens.weight']
      models_on_disk.save(self.folder / name, model, tie_word_embeddings=True)
    self.assertNotIn('lm_head.weight', self.merged(self.recipe()))


if __name__ == '__main__':
  absltest.main()
