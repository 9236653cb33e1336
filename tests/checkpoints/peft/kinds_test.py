# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Every other kind against float64, written from the papers with loops."""

from absl.testing import absltest
from absl.testing import parameterized
import adapters_on_disk
import numpy as np

import mergejax as mj

Q = 'layers.0.q'
KERNEL = f'{Q}.weight'


def wide(array):
  return np.asarray(array, np.float64)


def skew(upper, size):
  matrix = np.zeros((size, size))
  place = 0
  for row in range(size):
    for column in range(row + 1, size):
      matrix[row, column] = upper[place]
      matrix[column, row] = -upper[place]
      place += 1
  return matrix


def block_diagonal(blocks):
  size = blocks[0].shape[0]
  matrix = np.zeros((size * len(blocks),) * 2)
  for i, block in enumerate(blocks):
    matrix[i * size : (i + 1) * size, i * size : (i + 1) * size] = block
  return matrix


class KindTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.disk = adapters_on_disk.Folder(self.create_tempdir().full_path)
    self.random = self.disk.random

  def check(self, expected, base, adapter, leaf=KERNEL, **config):
    disk = adapters_on_disk.Folder(self.create_tempdir().full_path)
    named = {
      k if k.startswith('base_model.') else f'{Q}.{k}': v
      for k, v in adapter.items()
    }
    got = disk.folded(base, named, **config)
    np.testing.assert_allclose(got[leaf], expected, rtol=2e-5, atol=5e-6)
    return got

  def test_ia3(self):
    base = {KERNEL: self.random(6, 4), f'{Q}.bias': self.random(6)}
    kernel = wide(base[KERNEL])
    rows, columns = self.random(6, 1), self.random(1, 4)
    got = self.check(rows * kernel, base, {'ia3_l': rows}, peft_type='IA3')
    # Outputs are multiplied, and the bias is part of them.
    np.testing.assert_array_equal(
      got[f'{Q}.bias'], base[f'{Q}.bias'] * rows[:, 0]
    )
    got = self.check(
      kernel * columns, base, {'ia3_l': columns}, peft_type='IA3'
    )
    np.testing.assert_array_equal(got[f'{Q}.bias'], base[f'{Q}.bias'])

  @parameterized.parameters(False, True)
  def test_ia3_of_gpt2(self, feed_forward):
    # Square, and stored as inputs by outputs.
    base = {
      'h.attn.c_attn.weight': self.random(4, 12),
      'h.attn.c_proj.weight': self.random(4, 4),
    }
    vector = self.random(*((1, 4) if feed_forward else (4, 1)))
    got = self.disk.folded(
      base, {'h.attn.c_proj.ia3_l': vector}, peft_type='IA3'
    )
    kernel = base['h.attn.c_proj.weight']
    for i in range(4):
      for o in range(4):
        by = vector.reshape(-1)[i if feed_forward else o]
        self.assertEqual(got['h.attn.c_proj.weight'][i, o], kernel[i, o] * by)

  @parameterized.parameters((1, False), (1, True), (2, True))
  def test_ia3_of_convolutions(self, groups, feed_forward):
    base = {KERNEL: self.random(6, 4 // groups, 3, 3)}
    vector = self.random(1, 4 if feed_forward else 6, 1, 1)
    expected = wide(base[KERNEL]).copy()
    for o in range(6):
      for i in range(4 // groups):
        first = o // (6 // groups) * (4 // groups)
        expected[o, i] *= vector[0, first + i if feed_forward else o, 0, 0]
    self.check(
      expected, base, {'ia3_l': vector}, peft_type='IA3',
      feedforward_modules=['q'] if feed_forward else [],
    )  # fmt: skip

  def test_hira(self):
    base = {KERNEL: self.random(6, 4)}
    a, b = self.random(2, 4), self.random(6, 2)
    expected = wide(base[KERNEL]) * (1 + wide(b) @ wide(a))
    self.check(expected, base, {'hira_A': a, 'hira_B': b}, peft_type='HIRA')

  def test_loha(self):
    base = {KERNEL: self.random(6, 4)}
    w = {
      'hada_w1_a': self.random(6, 2), 'hada_w1_b': self.random(2, 4),
      'hada_w2_a': self.random(6, 2), 'hada_w2_b': self.random(2, 4),
    }  # fmt: skip
    change = (wide(w['hada_w1_a']) @ wide(w['hada_w1_b'])) * (
      wide(w['hada_w2_a']) @ wide(w['hada_w2_b'])
    )
    expected = wide(base[KERNEL]) + 5 / 2 * change
    self.check(expected, base, w, peft_type='LOHA', alpha=5, r=2)

  def test_loha_with_a_core(self):
    base = {KERNEL: self.random(6, 4, 3, 3)}
    parts, factors = {}, []
    for side in '12':
      core, a, b = (self.random(*s) for s in ((2, 2, 3, 3), (2, 6), (2, 4)))
      parts |= {
        f'hada_t{side}': core, f'hada_w{side}_a': a, f'hada_w{side}_b': b
      }  # fmt: skip
      factor = np.zeros((6, 4, 3, 3))
      for i in range(2):
        for j in range(2):
          outer = np.outer(wide(a[i]), wide(b[j]))
          factor += outer[:, :, None, None] * wide(core[i, j])
      factors.append(factor)
    expected = wide(base[KERNEL]) + 5 / 2 * factors[0] * factors[1]
    self.check(expected, base, parts, peft_type='LOHA', alpha=5, r=2)

  @parameterized.parameters(False, True)
  def test_lokr(self, split):
    base = {KERNEL: self.random(6, 4)}
    one, a, b = self.random(2, 2), self.random(3, 1), self.random(1, 2)
    parts = {'lokr_w1': one}
    parts |= {'lokr_w2_a': a, 'lokr_w2_b': b} if split else {'lokr_w2': a @ b}
    expected, two = wide(base[KERNEL]), wide(a) @ wide(b)
    for o in range(6):
      for i in range(4):
        # The rank of the settings counts, even where nothing is split.
        expected[o, i] += 5 / 3 * one[o // 3, i // 2] * two[o % 3, i % 2]
    self.check(expected, base, parts, peft_type='LOKR', alpha=5, r=3)

  @parameterized.parameters(
    ({'use_cayley_neumann': False}, None),
    ({'num_cayley_neumann_terms': 5}, (2, 2, 2, 1)),
    ({'num_cayley_neumann_terms': 3}, (2, 2, 1)),
    ({'num_cayley_neumann_terms': 2}, (2,)),
  )
  def test_oft(self, config, series):
    base, stored = {KERNEL: self.random(5, 6)}, 0.3 * self.random(2, 3)
    blocks = []
    for upper in wide(stored):
      q, eye = skew(upper, 3), np.eye(3)
      if series is None:
        blocks.append((eye - q) @ np.linalg.inv(eye + q))
      else:
        powers = (np.linalg.matrix_power(q, k + 1) for k in range(len(series)))
        blocks.append(
          eye + sum(c * p for c, p in zip(series, powers, strict=True))
        )
    expected = (block_diagonal(blocks) @ wide(base[KERNEL]).T).T
    self.check(
      expected, base, {'oft_R.weight': stored}, peft_type='OFT', **config
    )

  @parameterized.parameters(1, 2, 3)
  def test_boft(self, factors):
    base = {KERNEL: self.random(5, 8)}
    stored, scale = 0.3 * self.random(factors, 4, 2, 2), self.random(5, 1)
    rotation = np.eye(8)
    for factor in range(factors):
      blocks = []
      for block in wide(stored[factor]):
        q = (block - block.T) / 2
        blocks.append((np.eye(2) - q) @ np.linalg.inv(np.eye(2) + q))
      order, permutation = list(range(8)), np.zeros((8, 8))
      if factors > 1:
        size = 2 * 2**factor
        order = [
          start + i for start in range(0, 8, size)
          for parity in (0, 1) for i in range(parity, size, 2)
        ]  # fmt: skip
      for row, column in enumerate(order):
        permutation[row, column] = 1
      rotation = permutation @ block_diagonal(blocks) @ permutation.T @ rotation
    expected = wide(scale) * (rotation @ wide(base[KERNEL]).T).T
    self.check(
      expected, base, {'boft_R': stored, 'boft_s': scale}, peft_type='BOFT'
    )

  @parameterized.parameters(False, True)
  def test_hra(self, orthogonal):
    base, u = {KERNEL: self.random(5, 6)}, self.random(6, 3)
    units = wide(u)
    if orthogonal:
      units = np.linalg.qr(units)[0]
    expected = wide(base[KERNEL])
    for unit in (units / np.linalg.norm(units, axis=0)).T:
      expected = expected @ (np.eye(6) - 2 * np.outer(unit, unit))
    self.check(
      expected, base, {'hra_u': u}, peft_type='HRA', apply_GS=orthogonal
    )

  @parameterized.parameters('road_1', 'road_2', 'road_4')
  def test_road(self, variant):
    base = {KERNEL: self.random(8, 3), f'{Q}.bias': self.random(8)}
    count = {'road_1': 4, 'road_2': 8, 'road_4': 16}[variant]
    angle, length = self.random(count), self.random(count)
    turn = np.zeros((8, 8))
    for o in range(8):
      group, place = divmod(o, 4)
      partner = group * 4 + (place + 2) % 4
      if variant == 'road_1':
        cosine = sine = group * 2 + place % 2
      elif variant == 'road_2':
        cosine = sine = o
      else:
        cosine, sine = group * 8 + place, group * 8 + 4 + place
      turn[o, o] = length[cosine] * np.cos(angle[cosine])
      sign = -1 if place < 2 else 1
      turn[o, partner] = sign * length[sine] * np.sin(angle[sine])
    got = self.check(
      turn @ wide(base[KERNEL]), base, {'road_theta': angle, 'road_alpha': length},
      peft_type='ROAD', variant=variant, group_size=4,
    )  # fmt: skip
    np.testing.assert_allclose(
      got[f'{Q}.bias'], turn @ wide(base[f'{Q}.bias']), rtol=1e-5, atol=1e-6
    )

  def test_miss(self):
    base, block = {KERNEL: self.random(6, 8)}, self.random(3, 6)
    expected = wide(base[KERNEL])
    for i in range(8):
      expected[:, i] += block[i % 3]
    self.check(expected, base, {'miss_block': block}, peft_type='MISS')
    block = self.random(3, 2)
    expected = wide(base[KERNEL])
    for i in range(8):
      for o in range(6):
        expected[o, i] += block[i % 3, o % 2]
    self.check(
      expected,
      base,
      {'miss_block': block},
      peft_type='MISS',
      init_weights='mini',
    )
    block = self.random(3, 2, 2)
    expected = wide(base[KERNEL])
    for row in range(3):
      for column in range(4):
        place = slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2)
        expected[place] += expected[place] @ block[row] + block[row]
    self.check(
      expected,
      base,
      {'miss_block': block},
      peft_type='MISS',
      init_weights='bat',
    )

  def test_c3a(self):
    base, first = {KERNEL: self.random(6, 9)}, self.random(2, 3, 3)
    expected = wide(base[KERNEL])
    for o in range(6):
      for i in range(9):
        expected[o, i] += first[o // 3, i // 3, (i - o) % 3] / 9
    self.check(expected, base, {'c3a_kernel': first}, peft_type='C3A')

  def test_shira(self):
    base, new = {KERNEL: self.random(6, 4)}, self.random(3)
    places = np.array([[0, 5, 2], [3, 0, 2]], np.int32)
    expected = wide(base[KERNEL])
    for row, column, value in zip(*places, new, strict=True):
      expected[row, column] += value
    self.check(
      expected, base, {'shira_weight': new, 'shira_indices': places},
      peft_type='SHIRA',
    )  # fmt: skip

  def test_delora(self):
    base = {KERNEL: self.random(6, 4)}
    a, b, norms = self.random(2, 4), self.random(6, 2), self.random(4)
    strength = self.random(1)
    expected = wide(base[KERNEL])
    for k in range(2):
      outer = np.outer(wide(b[:, k]), wide(a[k]))
      expected += strength / 2 * outer / np.linalg.norm(outer) * norms
    self.check(
      expected, base,
      {
        'delora_A': a, 'delora_B': b, 'delora_lambda': strength,
        'delora_w_norm': norms,
      },
      peft_type='DELORA',
    )  # fmt: skip

  def test_vera(self):
    base = {KERNEL: self.random(6, 4)}
    a, b = self.random(2, 7), self.random(9, 2)
    by, along = self.random(6), self.random(2)
    expected = wide(base[KERNEL])
    for o in range(6):
      for i in range(4):
        expected[o, i] += by[o] * sum(
          float(b[o, k]) * along[k] * a[k, i] for k in range(2)
        )
    parts = {'vera_lambda_b': by, 'vera_lambda_d': along}
    shared = {'base_model.vera_A': a, 'base_model.vera_B': b}
    self.check(expected, base, parts | shared, peft_type='VERA')
    with self.assertRaisesRegex(mj.UserError, 'vera_A and vera_B'):
      self.check(expected, base, parts, peft_type='VERA')

  def test_vblora(self):
    base, bank = {KERNEL: self.random(6, 4)}, self.random(5, 2)
    logits = {'A': self.random(2, 2, 5), 'B': self.random(3, 2, 5)}
    mixed, short = {}, {}
    for side, table in logits.items():
      mixed[side] = np.zeros((*table.shape[:2], 2))
      for place in np.ndindex(table.shape[:2]):
        best = np.argsort(-table[place])[:2]
        weights = np.exp(wide(table[place][best]))
        weights /= weights.sum()
        mixed[side][place] = weights @ wide(bank[best])
        short.setdefault(side, []).append((best, weights[:1]))
    a = mixed['A'].reshape(2, 4)
    b = np.stack([mixed['B'][:, k].reshape(-1) for k in range(2)], 1)
    expected = wide(base[KERNEL]) + b @ a
    bank = {'base_model.vblora_vector_bank': bank}
    parts = {f'vblora_logits_{s}': t for s, t in logits.items()}
    self.check(expected, base, parts | bank, peft_type='VBLORA', topk=2)
    parts = {}
    for side, found in short.items():
      shape = logits[side].shape[:2]
      name = f'vblora_logits_{side}_topk'
      parts[f'{name}_indices'] = np.array([x for x, _ in found]).astype(np.uint8).reshape(*shape, 2)  # fmt: skip
      parts[f'{name}_weights'] = np.array([w for _, w in found]).astype(np.float32).reshape(*shape, 1)  # fmt: skip
    self.check(expected, base, parts | bank, peft_type='VBLORA', topk=2)

  @parameterized.parameters((6, 4), (4, 6))
  def test_randlora(self, outputs, inputs):
    base = {KERNEL: self.random(outputs, inputs)}
    by, along = self.random(2, 3), self.random(3, 4)
    a, b = self.random(2, 1, 5), self.random(7, 4, 2)
    change = np.zeros((6, 4))
    for flat in range(6):
      # Place `flat` of [3, 2] meets place `flat` of [2, 3].
      column = wide(b[:6, flat // 2, flat % 2])
      row = wide(
        by[flat // 3, flat % 3] * a[flat // 3, 0, :4] * along[flat % 3]
      )
      change += np.outer(column, row)
    change = change if outputs > inputs else change.T
    self.check(
      wide(base[KERNEL]) + 5 / 2 * change, base,
      {
        'randlora_lambda': by, 'randlora_gamma': along,
        'base_model.randlora_A': a, 'base_model.randlora_B': b,
      },
      peft_type='RANDLORA', randlora_alpha=5,
    )  # fmt: skip

  def test_gralora(self):
    base = {KERNEL: self.random(6, 8)}
    a, b = self.random(2, 4, 4), self.random(2, 4, 3)
    q, p = self.random(1, 8), self.random(6, 1)
    change = wide(p) @ wide(q)
    for o in range(6):
      for i in range(8):
        n, m = i // 4, o // 3
        change[o, i] += sum(
          float(a[n, i % 4, 2 * m + s]) * b[m, 2 * n + s, o % 3]
          for s in range(2)
        )
    self.check(
      wide(base[KERNEL]) + 3 / 5 * change, base,
      {
        'gralora_A': a, 'gralora_B': b, 'gralora_A_general.weight': q,
        'gralora_B_general.weight': p,
      },
      peft_type='GRALORA', alpha=3,
    )  # fmt: skip


if __name__ == '__main__':
  absltest.main()
