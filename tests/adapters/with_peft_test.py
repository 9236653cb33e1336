# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters that PEFT reads and writes compute the same, where it is installed.

A small T5 with random numbers in Hugging Face's files, which transformers loads
and we do; adapters with random numbers, written by one and read by the other.
"""

import pathlib
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np
import pytest
import small_adapted

import mergejax as mj
from mergejax.core import tree
from mergejax.models import t5_hf

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
peft = pytest.importorskip('peft')
pytestmark = pytest.mark.filterwarnings('ignore')

TARGETS = '.*/(query|value|wo)/kernel'
ADAPTERS = {
  'lora': mj.adapters.lora(rank=3, alpha=5, targets=TARGETS),
  'rslora': mj.adapters.lora(
    rank=[('decoder/.*', 3), ('.*', 2)], alpha=3, rank_stabilised=True,
    targets='.*/(query|wo)/kernel',
  ),
  'ia3': mj.adapters.ia3(),
  'prompt': mj.adapters.prompt(length=3),
  'poly': mj.adapters.poly(tasks=3, skills=4, heads=2, rank=2, targets=TARGETS),
}  # fmt: skip
_Q = {'target_modules': ['q', 'v']}
CONFIGS = {
  'lora': lambda: peft.LoraConfig(r=3, lora_alpha=5, task_type='SEQ_2_SEQ_LM', **_Q),
  'rslora': lambda: peft.LoraConfig(
    r=3, rank_pattern={'decoder.*q': 2}, use_rslora=True,
    task_type='SEQ_2_SEQ_LM', **_Q,
  ),
  'ia3': lambda: peft.IA3Config(task_type='SEQ_2_SEQ_LM'),
  'prompt': lambda: peft.PromptTuningConfig(
    num_virtual_tokens=3, task_type='SEQ_2_SEQ_LM',
    num_transformer_submodules=1,
  ),
  'poly': lambda: peft.PolyConfig(
    r=2, n_tasks=3, n_skills=4, n_splits=2, task_type='SEQ_2_SEQ_LM', **_Q
  ),
}  # fmt: skip


class WithPeftTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    cls.family, base = small_adapted.build('t5')
    # Numbers of a usual size: sharp attention makes rounding large.
    cls.base = tree.map_paths(
      lambda path, x: x if path.endswith('scale') else x / 2, base
    )
    config = t5_hf.config_to_hf(mj.models.describe(cls.family.module), 't5')
    mj.save_checkpoint(
      cls.folder / 'base', t5_hf.to_hf(tree.flatten(cls.base)),
      format='safetensors', config=config,
    )  # fmt: skip
    cls.batch = small_adapted.batch(4)
    cls.batch['task_ids'] = np.array([0, 2, 1, 2], np.int32)

  def ours(self, family, params):
    outputs = family.apply(family.variables(params), self.batch)
    return np.asarray(outputs.logits)

  def theirs(self, model, name):
    given = {
      key: torch.from_numpy(np.asarray(self.batch[ours]).astype(np.int64))
      for key, ours in (
        ('input_ids', 'encoder_input_tokens'),
        ('decoder_input_ids', 'decoder_input_tokens'),
      )
    }
    if name == 'poly':
      given['task_ids'] = torch.from_numpy(self.batch['task_ids']).long()
    with torch.no_grad():
      model = model.eval()
      mask = (given['input_ids'] > 0).long()
      return model(attention_mask=mask, **given).logits.numpy()

  def model(self):
    return transformers.T5ForConditionalGeneration.from_pretrained(
      self.folder / 'base', dtype=torch.float32
    )

  def assert_close(self, found, expected):
    # Padding has no logits to compare.
    real = np.asarray(self.batch['decoder_target_tokens']) > 0
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=1e-5)

  @parameterized.parameters(*ADAPTERS)
  def test_peft_reads_what_we_write(self, name):
    family = mj.adapters.adapt(self.family, ADAPTERS[name])
    own = small_adapted.leaves(family.adapter_specs)
    params = family.joined(self.base, own)
    path = self.folder / f'ours_{name}'
    mj.adapters.save(path, family, params, base_name=str(self.folder / 'base'))
    model = peft.PeftModel.from_pretrained(self.model(), path)
    expected = self.ours(family, params)
    self.assert_close(self.theirs(model, name), expected)
    plain = self.ours(self.family, self.base)
    self.assertGreater(np.abs(plain - expected).max(), 0.01)

  @parameterized.parameters(*CONFIGS)
  def test_we_read_what_peft_writes(self, name):
    model = peft.get_peft_model(self.model(), CONFIGS[name]())
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
      for parameter in model.parameters():
        if parameter.requires_grad:
          parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.5)
    path = self.folder / f'theirs_{name}'
    model.save_pretrained(path)
    family, leaves = mj.adapters.load(path, self.family, self.base)
    found = self.ours(family, family.joined(self.base, leaves))
    self.assert_close(found, self.theirs(model, name))


if __name__ == '__main__':
  absltest.main()
