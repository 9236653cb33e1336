# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Every gin file of a model is read, and has the parameters that it should."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized

import gin
from mergejax import models
from mergejax.cli import common
from mergejax.core import errors

FOLDER = common.gin_folder() / 'models'
# What the authors published, in millions as rounded there (None where nobody
# did), and the exact number, which follows from the sizes.
COUNTS = {
  't5_1_0_small': (60, 60_506_624),
  't5_1_0_base': (220, 222_903_552),
  't5_1_0_large': (770, 737_668_096),
  't5_1_0_3b': (2_800, 2_851_598_336),
  't5_1_0_11b': (11_000, 11_307_321_344),
  't5_1_1_tiny': (None, 9_639_680),
  't5_1_1_small': (77, 76_961_152),
  't5_1_1_base': (250, 247_577_856),
  't5_1_1_large': (800, 783_150_080),
  't5_1_1_xl': (3_000, 2_849_757_184),
  't5_1_1_xxl': (11_000, 11_135_332_352),
  'mt5_small': (300, 300_176_768),
  'mt5_base': (580, 582_401_280),
  'mt5_large': (1_200, 1_229_581_312),
  'mt5_xl': (3_700, 3_742_619_648),
  'mt5_xxl': (13_000, 12_921_057_280),
  'byt5_small': (300, 299_637_760),
  'byt5_base': (582, 581_653_248),
  'byt5_large': (1_230, 1_228_183_552),
  'byt5_xl': (3_740, 3_737_801_728),
  'byt5_xxl': (12_900, 12_906_899_328),
  'decoder_only_small': (None, 35_332_800),
  'decoder_only_base': (None, 109_628_544),
  'decoder_only_large': (None, 341_231_104),
  'decoder_only_xl': (None, 1_223_527_424),
  'decoder_only_xxl': (None, 4_762_310_656),
  'lm_tiny': (None, 394_688),
  'lm_small': (None, 3_542_912),
}
FLAN = ('small', 'base', 'large', 'xl', 'xxl')
SCANNED = ('large', '3b', '11b', 'xl', 'xxl')


def module_of(*files):
  """The module that files of models describe."""
  bindings = [('VOCABULARY', 'bytes')]
  try:
    common.parse_gin(files, bindings)
  except errors.ConfigError:  # decoder-only byte models name none
    common.parse_gin(files, [])
  return gin.query_parameter('%MODEL').scoped_configurable_fn()


class ModelFilesTest(parameterized.TestCase):
  def test_every_file_is_in_the_table(self):
    names = {file.stem for file in FOLDER.glob('*.gin')}
    flan = {f'flan_t5_{size}' for size in FLAN}
    self.assertEqual(names, {*COUNTS, *flan})

  @parameterized.named_parameters(
    (name, name, *counts) for name, counts in COUNTS.items()
  )
  def test_parameters(self, name, published, expected):
    file = f'models/{name}.gin'
    module = module_of(file)
    scanned = name.endswith(tuple(f'_{size}' for size in SCANNED))
    self.assertEqual(module.config.scan_layers, scanned)
    self.assertEqual(module.config.remat_policy != 'none', scanned)
    # Scanned layers are traced in no time, and are as many.
    config = dataclasses.replace(
      module.config, scan_layers=True, remat_policy='none'
    )
    family = models.family_of(type(module)(config))
    count = sum(spec.size for spec in family.specs().values())
    self.assertEqual(count, expected)
    if published is not None:
      self.assertLess(abs(count / (published * 1e6) - 1), 0.06)

  def test_flan_is_t5_1_1(self):
    for size in FLAN:
      flan = module_of(f'models/flan_t5_{size}.gin')
      self.assertEqual(flan, module_of(f'models/t5_1_1_{size}.gin'))

  @parameterized.parameters('t5_1_0_11b', 'byt5_large')
  def test_a_file_given_last_is_that_model(self, first):
    for last in ('t5_1_1_tiny', 't5_1_0_small', 'mt5_base'):
      alone = module_of(f'models/{last}.gin')
      both = module_of(f'models/{first}.gin', f'models/{last}.gin')
      self.assertEqual(both.config, alone.config)

  def test_a_decoder_given_last_is_that_model(self):
    both = module_of('models/decoder_only_xl.gin', 'models/lm_tiny.gin')
    self.assertEqual(both.config, module_of('models/lm_tiny.gin').config)


if __name__ == '__main__':
  absltest.main()
