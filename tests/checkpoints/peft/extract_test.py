# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Extracted adapters have the names and shapes that PEFT looks for."""

import json
import re

from absl.testing import absltest
from absl.testing import parameterized
import adapters_on_disk
import numpy as np
import safetensors.numpy

from mergejax.checkpoints import checkpoint
from mergejax.checkpoints.peft import extract
from mergejax.checkpoints.peft import fold
from mergejax.core import tree as tree_lib


def targeted(path, targets):
  """PEFT's rule: a module is a target or ends with one."""
  return any(path == t or path.endswith(f'.{t}') for t in targets)


class ExtractTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.disk = adapters_on_disk.Folder(self.create_tempdir().full_path)

  def extract(self, base, tuned, config=None, **options):
    paths = self.disk.model(base, config), self.disk.model(tuned, name='tuned')
    out = self.disk.path / 'lora'
    _, missed = extract.extract_lora(paths[1], paths[0], out, rank=4, **options)
    settings = json.loads((out / 'adapter_config.json').read_text())
    leaves = safetensors.numpy.load_file(out / 'adapter_model.safetensors')
    again = fold.AdapterStore(checkpoint.open_checkpoint(paths[0]), str(out))
    return settings, leaves, missed, tree_lib.flatten(again.read())

  def test_targets_mean_the_extracted_modules_only(self):
    shapes = {
      'model.layers.0.q.weight': (4, 4),
      'model.layers.1.q.weight': (4, 4),
      'model.projector.0.weight': (4, 4),
      'model.projector.2.weight': (4, 4),
      'model.attention.weight': (4, 4),
      'model.layers.0.attention.norm.weight': (4,),
      'model.embed_tokens.weight': (9, 4),
      'block.0.relative_attention_bias.weight': (4, 2),
    }
    base = {path: self.disk.random(*shape) for path, shape in shapes.items()}
    tuned = {
      p: leaf + self.disk.random(*leaf.shape) for p, leaf in base.items()
    }
    settings, leaves, missed, again = self.extract(base, tuned)
    targets = settings['target_modules']
    modules = {
      re.sub(r'^base_model\.model\.|\.lora_[AB]\.weight$', '', name)
      for name in leaves
    }
    parents = {'model.layers.0', 'model.projector', 'model.layers.0.attention'}
    every = {p.removesuffix('.weight') for p in shapes} | parents
    self.assertEqual({p for p in every if targeted(p, targets)}, modules)
    self.assertIn('q', targets)
    self.assertEqual(
      set(missed),
      {
        'model.layers.0.attention.norm.weight', 'model.embed_tokens.weight',
        'block.0.relative_attention_bias.weight',
      },
    )  # fmt: skip
    for path in set(shapes) - set(missed):
      np.testing.assert_allclose(again[path], tuned[path], atol=1e-5)

  def test_tables_are_left_out_even_if_they_match(self):
    base = {n: self.disk.random(9, 4) for n in ('wte.weight', 'lm_head.weight')}
    tuned = {p: leaf + 1 for p, leaf in base.items()}
    settings, _, missed, _ = self.extract(base, tuned, match=r'.*')
    self.assertEqual(settings['target_modules'], ['lm_head'])
    self.assertEqual(missed, ['wte.weight'])

  def test_kernels_of_gpt2(self):
    shapes = {'c_attn': (4, 12), 'c_proj': (4, 4)}
    base = {f'h.0.{n}.weight': self.disk.random(*s) for n, s in shapes.items()}
    tuned = {
      p: leaf + self.disk.random(*leaf.shape) for p, leaf in base.items()
    }
    config = {'architectures': ['GPT2LMHeadModel']}
    settings, leaves, _, again = self.extract(base, tuned, config)
    self.assertIs(settings['fan_in_fan_out'], True)
    self.assertEqual(settings['task_type'], 'CAUSAL_LM')
    prefix = 'base_model.model.h.0.'
    self.assertEqual(leaves[f'{prefix}c_attn.lora_A.weight'].shape, (4, 4))
    self.assertEqual(leaves[f'{prefix}c_attn.lora_B.weight'].shape, (12, 4))
    a, b = (leaves[f'{prefix}c_proj.lora_{x}.weight'] for x in 'AB')
    change = tuned['h.0.c_proj.weight'] - base['h.0.c_proj.weight']
    np.testing.assert_allclose((b @ a).T, change, atol=1e-5)
    for path, leaf in tuned.items():
      np.testing.assert_allclose(again[path], leaf, atol=1e-5)

  @parameterized.parameters(
    ('T5ForConditionalGeneration', 'SEQ_2_SEQ_LM'),
    ('BertForSequenceClassification', None),
  )
  def test_task(self, architecture, task):
    base = {'a.q.weight': self.disk.random(4, 4)}
    tuned = {'a.q.weight': base['a.q.weight'] + 1}
    settings, *_ = self.extract(base, tuned, {'architectures': [architecture]})
    self.assertEqual(settings['task_type'], task)


if __name__ == '__main__':
  absltest.main()
