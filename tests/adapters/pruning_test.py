# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Structured pruning against the released code's choice and a slow oracle."""

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import numpy as np
import small_adapted

from mergejax.adapters import pruning
from mergejax.core import errors
from mergejax.core import tree
from mergejax.models import t5_hf


def below(arrays, prefix):
  """Leaves of a golden by our names."""
  given = {
    k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)
  }
  return t5_hf.from_hf(given, tied_head=True)


class GoldenTest(parameterized.TestCase):
  @parameterized.parameters('pruned_fisher', 'pruned_magnitude_code_default')
  def test_released_code(self, name):
    arrays = goldens.load('lst_pruning')
    family, base = small_adapted.of_golden(arrays, tied=True)
    importance = None
    if name == 'pruned_fisher':
      importance = tree.unflatten(below(arrays, 'importance/'))
    found = pruning.prune(family.specs(), base, 4, importance)
    wanted = below(arrays, f'{name}/')
    wanted.pop('token_embedder/embedding')
    self.assertEqual({*found}, {*wanted})
    for path, leaf in wanted.items():
      np.testing.assert_array_equal(found[path], leaf, err_msg=path)
    if importance is not None:
      # Squared gradients are small numbers: their products leave float32.
      small = tree.map_paths(lambda _, x: x * np.float32(1e-18), importance)
      again = pruning.prune(family.specs(), base, 4, small)
      for path, leaf in wanted.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


class LawsTest(parameterized.TestCase):
  @parameterized.parameters('t5', 'lm')
  def test_nothing_pruned(self, kind):
    family, base = small_adapted.build(kind)
    base_leaves = tree.flatten(base)
    found = pruning.prune(family.specs(), base, 1)
    for path, leaf in found.items():
      np.testing.assert_array_equal(leaf, base_leaves[path], err_msg=path)
    left = {p.split('/')[-2] for p in base_leaves if p not in found}
    tables = {'token_embedder', 'relpos_bias'}
    self.assertEqual(left - {'logits_dense'}, tables)

  def test_gated_blocks_choose_together(self):
    family, base = small_adapted.build('lm', num_layers=1)
    leaves = tree.flatten(base)
    found = pruning.prune(family.specs(), base, 2)
    best = lambda importance: np.sort(
      np.argsort(np.abs(importance).sum(0), kind='stable')[
        -found_size(importance) :
      ]
    )
    layer = 'decoder/layers_0/'
    kernel = lambda name: leaves[f'{layer}{name}/kernel']
    units = best(leaves['decoder/token_embedder/embedding'])
    attention = [
      kernel(f'self_attention/{n}') for n in ('query', 'key', 'value')
    ]
    inner = best(np.prod([w[units] for w in attention], axis=0))
    units = best(kernel('self_attention/out')[inner])
    gates = [kernel('mlp/wi_0')[units], kernel('mlp/wi_1')[units]]
    hidden = best(gates[0] * gates[1])
    for name, w in zip(('wi_0', 'wi_1'), gates):
      np.testing.assert_array_equal(
        found[f'{layer}mlp/{name}/kernel'], w[:, hidden]
      )
    outputs = best(kernel('mlp/wo')[hidden])
    np.testing.assert_array_equal(
      found[f'{layer}mlp/wo/kernel'], kernel('mlp/wo')[hidden][:, outputs]
    )
    np.testing.assert_array_equal(
      found['decoder/decoder_norm/scale'],
      leaves['decoder/decoder_norm/scale'][outputs],
    )

  def test_rounds_by_hand(self):
    family, base = small_adapted.build(
      't5', mlp_dim=20, num_encoder_layers=1, num_decoder_layers=1
    )
    leaves = tree.flatten(base)
    importance = {
      p: np.random.default_rng(len(p)).uniform(0.1, 1, x.shape)
      for p, x in leaves.items()
    }
    given = tree.unflatten({p: np.float32(x) for p, x in importance.items()})
    found = pruning.prune(family.specs(), base, 4, given, rounds=2)
    kept = by_rounds(importance, family.specs(), 4, rounds=2)
    self.assertEqual({*found}, {*kept})
    for path, units in kept.items():
      np.testing.assert_array_equal(found[path], leaves[path][np.ix_(*units)])
    once = by_rounds(importance, family.specs(), 4, rounds=1)
    same = lambda path: all(map(np.array_equal, once[path], kept[path]))
    self.assertFalse(all(map(same, kept)))
    with self.assertRaisesRegex(errors.ConfigError, 'rounds must be'):
      pruning.prune(family.specs(), base, 4, rounds=0)


def by_rounds(importance, specs, reduction, rounds):
  """`{path: [kept units of every axis]}`, numbered as in the wide model."""
  (table,) = (p for p, s in specs.items() if s.axes == ('vocab', 'embed'))
  parts = 'attention', 'self_attention', 'encoder_decoder_attention', 'mlp'
  # Which units of its outputs a matrix still has; first all of them.
  left = {p: np.arange(x.shape[-1]) for p, x in importance.items()}
  for number in range(1, rounds + 1):
    kept = {}

    def choose(paths, inputs, number=number, kept=kept, left=left):
      """The best of what is left, by inputs that this walk has kept."""
      size = importance[paths[0]].shape[-1]
      count = size - round(number / rounds * (1 - 1 / reduction) * size)
      score = {}
      for unit in left[paths[0]]:
        score[unit] = sum(
          np.prod([importance[p][i, unit] for p in paths]) for i in inputs
        )
      best = np.array(sorted(sorted(score, key=score.get)[-count:]))
      for path in paths:
        kept[path] = [inputs, best]
      return best

    stream = choose([table], np.arange(importance[table].shape[0]))
    del kept[table]
    left[table] = stream
    for stack in ('encoder', 'decoder'):
      for part in parts:
        inside = f'{stack}/layers_0/{part}/'
        own = [p for p in importance if p.startswith(inside)]
        if not own:
          continue
        norm = part.replace('encoder_decoder', 'cross')
        kept[f'{stack}/layers_0/pre_{norm}_layer_norm/scale'] = [stream]
        last = [p for p in own if p.endswith(('out/kernel', 'wo/kernel'))]
        inner = choose([p for p in own if p not in last], stream)
        stream = choose(last, inner)
      if f'{stack}/{stack}_norm/scale' in importance:
        kept[f'{stack}/{stack}_norm/scale'] = [stream]
    left |= {path: units[-1] for path, units in kept.items()}
  return kept


def found_size(importance):
  """Half of the units."""
  units = importance.shape[1]
  return units - round(units / 2)


if __name__ == '__main__':
  absltest.main()
