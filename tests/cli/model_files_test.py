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
  'switch_tiny': (None, 2_805_376),
  'switch_base': (7_400, 7_415_217_408),
  'switch_large': (26_000, 26_309_291_008),
  'switch_xxl': (395_000, 394_675_073_024),
  'switch_c': (1_571_000, 1_571_327_875_360),
  'moe_lm_tiny': (None, 755_776),
  'moe_lm_15b': (15_000, 14_593_150_080),
  'moe_lm_52b': (52_000, 51_798_787_584),
  'moe_lm_207b': (207_000, 207_079_443_456),
  'moe_lm_1t': (1_100_000, 1_104_046_461_952),
}
FLAN = ('small', 'base', 'large', 'xl', 'xxl')
SCANNED = ('large', '3b', '11b', 'xl', 'xxl')
SPARSE = ('switch', 'moe_lm')


def size(module, **changes):
  """Parameters of a module, its configuration changed."""
  config = dataclasses.replace(module.config, **changes)
  specs = models.family_of(type(module)(config)).specs()
  return sum(spec.size for spec in specs.values())


def sparse_size(module):
  """The same of one whose layers come in pairs, traced for few of them."""
  fields = {f.name for f in dataclasses.fields(module.config)}
  counts = fields & {'num_layers', 'num_encoder_layers', 'num_decoder_layers'}
  (layers,) = {getattr(module.config, name) for name in counts}
  plain = dict(remat_policy='none', scan_layers=False)
  all_sparse = module.config.moe.decoder_layers == layers

  def of(few):
    moe = module.config.moe
    if all_sparse:
      moe = dataclasses.replace(moe, encoder_layers=few, decoder_layers=few)
    return size(module, moe=moe, **dict.fromkeys(counts, few), **plain)

  few = 1 if all_sparse else 2
  one, two = of(few), of(2 * few)
  return one + (layers // few - 1) * (two - one)


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
    self.assertEqual(names, {*COUNTS, *flan, 'of_checkpoint'})

  @parameterized.named_parameters(
    (name, name, *counts) for name, counts in COUNTS.items()
  )
  def test_parameters(self, name, published, expected):
    file = f'models/{name}.gin'
    module = module_of(file)
    if name.startswith(SPARSE):
      self._check(sparse_size(module), published, expected)
      return
    scanned = name.endswith(tuple(f'_{each}' for each in SCANNED))
    self.assertEqual(module.config.scan_layers, scanned)
    self.assertEqual(module.config.remat_policy != 'none', scanned)
    # Scanned layers are traced in no time, and are as many.
    count = size(module, scan_layers=True, remat_policy='none')
    self._check(count, published, expected)

  def _check(self, count, published, expected):
    self.assertEqual(count, expected)
    if published is not None:
      self.assertLess(abs(count / (published * 1e6) - 1), 0.06)

  def test_flan_is_t5_1_1(self):
    for size in FLAN:
      flan = module_of(f'models/flan_t5_{size}.gin')
      self.assertEqual(flan, module_of(f'models/t5_1_1_{size}.gin'))

  @parameterized.parameters('t5_1_0_11b', 'byt5_large', 'switch_c')
  def test_a_file_given_last_is_that_model(self, first):
    for last in ('t5_1_1_tiny', 't5_1_0_small', 'mt5_base', 'switch_xxl'):
      alone = module_of(f'models/{last}.gin')
      both = module_of(f'models/{first}.gin', f'models/{last}.gin')
      self.assertEqual(both.config, alone.config)

  def test_a_sparse_decoder_given_last_is_that_model(self):
    for first in ('switch_c', 'lm_tiny'):
      files = f'models/{first}.gin', 'models/moe_lm_15b.gin'
      self.assertEqual(module_of(*files).config, module_of(files[1]).config)

  def test_a_decoder_given_last_is_that_model(self):
    both = module_of('models/decoder_only_xl.gin', 'models/lm_tiny.gin')
    self.assertEqual(both.config, module_of('models/lm_tiny.gin').config)


if __name__ == '__main__':
  absltest.main()
