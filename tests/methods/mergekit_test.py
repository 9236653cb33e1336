# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Methods against vectors made by mergekit and the TIES, Fisher, RegMean code.

Every case runs in both kernel layouts: `weight` is `[out, in]`, `kernel` its
transpose.
"""

from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import jax
import numpy as np

import mergejax as mj
from mergejax.methods import base as base_lib
from mergejax.methods import edits
from mergejax.methods import masks

GOLDEN = goldens.load('mergekit_methods')
BASE, MODELS = GOLDEN['base'], GOLDEN['models']
FAR, SPARSE = GOLDEN['far_models'], GOLDEN['sparse_models']
W, D = list(GOLDEN['weights']), list(GOLDEN['densities'])
GAMMA = list(GOLDEN['breadcrumbs_gamma'])
NU = list(GOLDEN['nuslerp_weights'])
TENSOR = dict(density=D, trim_scope='tensor')

# golden array: models, base, weights, method, options
CASES = {
    'task_arithmetic': (MODELS, BASE, W, 'task_arithmetic', {}),
    'task_arithmetic_normalize_lambda0.7':
        (MODELS, BASE, W, 'task_arithmetic', dict(normalize=True, scale=0.7)),
    'ties': (MODELS, BASE, W, 'ties', TENSOR),
    'ties_nonorm_lambda0.5':
        (MODELS, BASE, W, 'ties', dict(TENSOR, normalize=False, scale=0.5)),
    'ties_density1':
        (MODELS, BASE, W, 'ties', dict(TENSOR, density=1.0)),
    'breadcrumbs':
        (MODELS, BASE, W, 'breadcrumbs', dict(density=D, gamma=GAMMA)),
    'breadcrumbs_ties':
        (MODELS, BASE, W, 'breadcrumbs_ties', dict(density=D, gamma=GAMMA)),
    'sce_topk1.0': (MODELS, BASE, None, 'sce', {}),
    'sce_topk0.6': (MODELS, BASE, None, 'sce', dict(select_topk=0.6)),
    'sce_topk0.25': (MODELS, BASE, None, 'sce', dict(select_topk=0.25)),
    'model_stock': (MODELS, BASE, None, 'model_stock', {}),
    'model_stock_filter_wise':
        (MODELS, BASE, None, 'model_stock', dict(filter_wise=True)),
    'linear': (MODELS, None, W, 'linear', {}),
    'linear_nonorm': (MODELS, None, W, 'linear', dict(normalize=False)),
    **{
        f'slerp_t{t}': (MODELS[1:2], MODELS[0], None, 'slerp', dict(t=float(t)))
        for t in ('0.0', '0.25', '0.5', '1.0')
    },
    'slerp_colinear_t0.25':
        (1.7 * MODELS[:1], MODELS[0], None, 'slerp', dict(t=0.25)),
    'slerp_antipodal_t0.25':
        (-MODELS[:1], MODELS[0], None, 'slerp', dict(t=0.25)),
    'nuslerp_flat': (MODELS[:2], None, NU, 'nuslerp', {}),
    'nuslerp_base_flat': (MODELS[:2], BASE, NU, 'nuslerp', {}),
    'nuslerp_lastaxis':
        (MODELS[:2], None, NU, 'nuslerp', dict(flatten=False)),
    'nuslerp_row_wise_flag':
        (MODELS[:2], None, NU, 'nuslerp',
         dict(flatten=False, axis='input_feature')),
    'multislerp': (MODELS, None, W, 'multislerp', {}),
    'multislerp_base': (MODELS, BASE, W, 'multislerp', {}),
    'multislerp_nonorm':
        (MODELS, None, W, 'multislerp', dict(normalize_weights=False)),
    'multislerp_far': (FAR, None, W, 'multislerp', {}),
    'karcher': (MODELS, None, None, 'karcher', {}),
    'karcher_iter100_tol1e-8':
        (MODELS, None, None, 'karcher', dict(max_iter=100, tol=1e-8)),
    'karcher_far': (FAR, None, None, 'karcher', {}),
    'nearswap_t0.01': (MODELS[:1], BASE, None, 'nearswap', dict(t=0.01)),
    'nearswap_t0.1': (MODELS[:1], BASE, None, 'nearswap', dict(t=0.1)),
    'arcee_fusion': (MODELS[:1], BASE, None, 'arcee_fusion', {}),
    'passthrough_scale0.5':
        (MODELS[:1], None, None, 'passthrough', dict(scale=0.5)),
    'ram': (SPARSE, BASE, None, 'ram', {}),
    'ramplus_tl': (SPARSE, BASE, None, 'ram_plus', {}),
}  # fmt: skip
DELLA = dict(
    density=list(GOLDEN['della_densities']),
    epsilon=list(GOLDEN['della_epsilon']),
)  # fmt: skip
# The same for the random methods, whose draws the golden fixes.
DRAWN = {
    'dare_linear_given_masks': ('dare_linear', dict(density=D, rescale='l1')),
    'dare_linear_given_masks_norescale':
        ('dare_linear', dict(density=D, rescale='none')),
    'dare_ties_given_masks': ('dare_ties', dict(density=D, rescale='l1')),
    'della_given_masks': ('della', dict(DELLA, rescale='l1')),
    'della_linear_given_masks': ('della_linear', dict(DELLA, rescale='l1')),
}  # fmt: skip


def in_layout(leaf, layout):
  return leaf if layout == 'weight' else np.ascontiguousarray(leaf.T)


def merged(case, layout):
  models, base, weights, method, options = case
  tree = lambda leaf: {layout: in_layout(leaf, layout)}
  result = mj.merge(
    [tree(model) for model in models],
    method,
    base=None if base is None else tree(base),
    weights=weights,
    **options,
  )
  return in_layout(np.asarray(result[layout]), layout)


def given_masks(layout, view):
  """Draws that keep exactly what the golden's masks keep, model by model."""
  draws = iter(list(GOLDEN['dare_masks']) * 2)

  def uniform(key, index):
    del key
    mask = next(draws)
    mask = in_layout(mask, layout) if view == 'element' else mask
    return 1 - mask.reshape(index.shape)

  return mock.patch.object(masks, 'uniform', uniform)


class MergekitTest(parameterized.TestCase):
  @parameterized.product(name=list(CASES), layout=['weight', 'kernel'])
  def test_method(self, name, layout):
    np.testing.assert_allclose(
      merged(CASES[name], layout), GOLDEN[name], rtol=1e-5, atol=3e-6
    )

  @parameterized.product(name=list(DRAWN), layout=['weight', 'kernel'])
  def test_random_method_with_given_masks(self, name, layout):
    method, options = DRAWN[name]
    view = 'unit' if 'della' in method else 'element'
    with given_masks(layout, view):
      result = merged((MODELS, BASE, W, method, options), layout)
    np.testing.assert_allclose(result, GOLDEN[name], rtol=1e-5, atol=1e-6)

  @parameterized.parameters('dare', 'della')
  def test_paper_rescale_with_given_masks(self, family):
    for k in range(3):
      draws = 1 - GOLDEN['dare_masks'][k]
      edit = (
        edits.drop(D[k])
        if family == 'dare'
        else edits.drop_by_rank(DELLA['density'][k], DELLA['epsilon'][k])
      )
      context = base_lib.LeafContext(
        key=np.zeros(2, np.uint32), place=((9, 14), 0)
      )
      with mock.patch.object(masks, 'uniform', lambda key, index, d=draws: d):
        sparse = edit.apply(jax.numpy.asarray(MODELS[k] - BASE), context)
      np.testing.assert_allclose(
        sparse,
        GOLDEN[f'{family}_paper_rescaled_deltas'][k],
        rtol=1e-5,
        atol=1e-7,
      )

  def test_trimmed_task_vectors(self):
    for k in range(3):
      only = merged(
        (MODELS[k : k + 1], BASE, None, 'ties', dict(TENSOR, density=D[k])),
        'weight',
      )
      np.testing.assert_allclose(
        only - BASE, GOLDEN['ties_trimmed_deltas'][k], rtol=1e-4, atol=1e-6
      )


class GlobalTiesTest(parameterized.TestCase):
  @parameterized.parameters('mean', 'sum', 'max')
  def test_merged_delta(self, aggregate):
    arrays = goldens.load('ties_global_trim')
    # The original concatenates leaves by sorted name: bias, then kernel.
    models = [
      {name: arrays[f'delta_{name}'][k] for name in ('bias', 'kernel')}
      for k in range(3)
    ]
    result = mj.merge(
      models,
      'ties',
      base={name: np.zeros_like(leaf) for name, leaf in models[0].items()},
      density=0.2,
      keep='reference',
      normalize=aggregate == 'mean',
      aggregate='max' if aggregate == 'max' else 'sum',
    )
    for name in ('bias', 'kernel'):
      np.testing.assert_allclose(
        result[name],
        arrays[f'merged_delta_{name}_{aggregate}'],
        rtol=1e-5,
        atol=1e-6,
      )

  def test_counts(self):
    arrays = goldens.load('ties_global_trim')
    for k in range(3):
      model = {n: arrays[f'delta_{n}'][k] for n in ('bias', 'kernel')}
      base = {name: np.zeros_like(leaf) for name, leaf in model.items()}
      for keep, extra in (('exact', 0), ('reference', 1)):
        result = mj.merge([model], 'ties', base=base, density=0.2, keep=keep)
        kept = sum(np.count_nonzero(leaf) for leaf in result.values())
        self.assertEqual(kept, int(0.2 * 140) + extra)
      self.assertEqual(kept, arrays['kept_per_model'][k])
      np.testing.assert_array_equal(
        np.asarray(result['kernel']) != 0, arrays['trim_mask_kernel'][k]
      )


class FisherTest(parameterized.TestCase):
  @parameterized.parameters(
    ('merged_fisher_norm_favor', {}),
    ('merged_fisher_norm_nofavor', dict(favor_first=False)),
    ('merged_fisher_raw_favor', dict(normalize_fishers='none')),
    ('merged_fisher_norm_favor_floor1e-2', dict(floor=1e-2)),
    ('merged_iso', None),
  )
  def test_merge(self, name, options):
    arrays = goldens.load('fisher_merging')
    leaves = [
      f'Dense_{i}__{part}' for i in (0, 1) for part in ('kernel', 'bias')
    ]
    models = [{n: arrays[f'model{k}__{n}'] for n in leaves} for k in range(3)]
    stats = [
      {n: {'fisher': arrays[f'fisher_zeroed{k}__{n}']} for n in leaves}
      for k in range(3)
    ]
    weights = list(arrays['coeffs'])
    if options is None:
      result = mj.merge(models, 'linear', weights=weights)
    else:
      result = mj.merge(
        models, 'fisher', weights=weights, stats=stats, **options
      )
    for leaf in leaves:
      np.testing.assert_allclose(
        result[leaf], arrays[f'{name}__{leaf}'], rtol=1e-4, err_msg=leaf
      )

  @parameterized.product(
    norm=['None', 'param', 'model'], weights=['uniform', 'coeffs']
  )
  def test_regmean_projects_variant(self, norm, weights):
    arrays = goldens.load('fisher_regmean_variant')
    with jax.enable_x64(True):
      result = mj.merge(
        [{n: arrays[n][k] for n in ('kernel', 'bias')} for k in range(3)],
        'fisher',
        weights=list(arrays['coeffs']) if weights == 'coeffs' else None,
        stats=[
          {n: {'fisher': arrays[f'fisher_{n}'][k]} for n in ('kernel', 'bias')}
          for k in range(3)
        ],
        normalize_fishers={'None': 'none', 'param': 'leaf'}.get(norm, norm),
        smoothing=1e-10,
        floor=0.0,
        favor_first=False,
      )
    for leaf in ('kernel', 'bias'):
      np.testing.assert_allclose(
        result[leaf], arrays[f'merged_{leaf}_norm_{norm}_{weights}'], rtol=1e-9
      )

  @parameterized.product(
    size=[1e-25, 1e-20, 1.0, 1e19, 1e30],
    normalize=['model', 'leaf'],
    mode=['absolute', 'relative'],
  )
  def test_any_size_of_information(self, size, normalize, mode):
    """Squares of these are no float32 numbers; their ratios are."""
    rng = np.random.default_rng(0)
    models = [
      {'w': rng.normal(size=40).astype(np.float32), 'v': np.float32([k, 1.0])}
      for k in range(3)
    ]
    stats = [
      {
        'w': {'fisher': (size * rng.gamma(1.0, size=40)).astype(np.float32)},
        'v': {'fisher': np.float32([size, size * k])},
      }
      for k in range(3)
    ]
    floor = 0.0 if mode == 'absolute' else 1e-3
    found = mj.merge(
      models, 'fisher', stats=stats, normalize_fishers=normalize,
      floor=floor, floor_mode=mode,
    )  # fmt: skip
    for scope in ({'w', 'v'},) if normalize == 'model' else ({'w'}, {'v'}):
      own = [
        {p: np.asarray(s[p]['fisher'], np.float64) for p in scope}
        for s in stats
      ]
      norms = [np.sqrt(sum(np.sum(f**2) for f in s.values())) for s in own]
      if mode == 'relative':
        flat = np.concatenate([f.ravel() for f in own[0].values()])
        own[0] = {
          p: np.maximum(f, 1e-3 * flat.mean()) for p, f in own[0].items()
        }
      for path in scope:
        top = sum(s[path] / n * m[path] for s, n, m in zip(own, norms, models))
        bottom = sum(s[path] / n for s, n in zip(own, norms))
        np.testing.assert_allclose(
          found[path], top / bottom, rtol=2e-5, atol=1e-6
        )

  def test_no_information_and_zero_weight_give_no_nan(self):
    models = [{'w': np.ones(2, np.float32)}, {'w': np.zeros(2, np.float32)}]
    stats = [{'w': {'fisher': np.zeros(2, np.float32)}}] * 2
    for weights in ([0.0, 1.0], [1.0, 1.0]):
      result = mj.merge(models, 'fisher', weights=weights, stats=stats)
      np.testing.assert_array_equal(result['w'], [1.0, 1.0])


# The original multiplied off-diagonals by float32 factors, in float64 arrays:
# its `reduced_gram_alpha09 / gram` is 0.8999999761581421.
ALPHA09 = float(np.float32(0.9))


class RegMeanTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    x64 = jax.enable_x64(True)
    x64.__enter__()
    self.addCleanup(x64.__exit__, None, None, None)
    self.arrays = goldens.load('regmean')

  def merge(self, leaves, grams, weights=None, axes=(), alpha=ALPHA09):
    count = len(next(iter(leaves.values())))
    return mj.merge(
      [{n: leaf[k] for n, leaf in leaves.items()} for k in range(count)],
      'regmean',
      weights=weights,
      axes=axes,
      stats=[
        {n: {'gram': gram[k]} for n, gram in grams.items()}
        for k in range(count)
      ],
      alpha=alpha,
    )

  @parameterized.parameters(
    (1.0, 'alpha1'), (ALPHA09, 'alpha09'),
    (float(np.float32(0.1)), 'alpha01'), (0.0, 'alpha0'),
    (0.0, 'diag'),
  )  # fmt: skip
  def test_kernel(self, alpha, name):
    a = self.arrays
    names = ('kernel', 'bias', 'layernorm_scale')
    result = self.merge(
      {n: a[n] for n in names}, {'kernel': a['gram']}, alpha=alpha
    )
    np.testing.assert_allclose(
      result['kernel'], a[f'merged_kernel_{name}'], rtol=1e-9
    )
    np.testing.assert_allclose(result['bias'], a['merged_bias'], rtol=1e-9)
    np.testing.assert_allclose(
      result['layernorm_scale'], a['merged_layernorm_scale'], rtol=1e-9
    )

  def test_torch_layout_and_coefficients(self):
    a = self.arrays
    result = self.merge(
      {'weight': np.swapaxes(a['kernel'], 1, 2), 'bias': a['bias']},
      {'weight': a['gram']},
      weights=list(a['coeffs']),
    )
    np.testing.assert_allclose(
      result['weight'].T, a['merged_kernel_alpha09_coeffs'], rtol=1e-9
    )
    np.testing.assert_allclose(
      result['bias'], a['merged_bias_coeffs'], rtol=1e-9
    )

  def test_attention_kernels(self):
    a = self.arrays
    acts = a['out_acts'].reshape(3, 40, 6)
    out_gram = np.swapaxes(acts, 1, 2) @ acts / 40
    result = self.merge(
      {'query/kernel': a['qkv_kernel'], 'out/kernel': a['out_kernel']},
      {'query/kernel': a['gram'], 'out/kernel': out_gram},
      axes=[
        ('query/kernel', ('embed', 'heads', 'kv')),
        ('out/kernel', ('heads', 'kv', 'embed')),
      ],
    )
    for name, golden in (('query', 'qkv'), ('out', 'out')):
      np.testing.assert_allclose(
        result[f'{name}/kernel'],
        a[f'merged_{golden}_kernel_alpha09'],
        rtol=1e-9,
      )

  def test_excluded_kernel_is_averaged(self):
    a = self.arrays
    result = self.merge(
      {'kernel': a['kernel'], 'dense/kernel': a['kernel']},
      {'dense/kernel': a['gram']},
    )
    np.testing.assert_allclose(
      result['kernel'], a['merged_kernel_excluded'], rtol=1e-9
    )

  def test_rank_deficient(self):
    a = self.arrays
    acts = a['acts_rankdef']
    grams = np.swapaxes(acts, 1, 2) @ acts / acts.shape[1]
    result = self.merge({'kernel': a['kernel']}, {'kernel': grams})
    np.testing.assert_allclose(
      result['kernel'], a['merged_kernel_rankdef_alpha09'], rtol=1e-8
    )
    with self.assertRaisesRegex(mj.UserError, 'kernel: .*lower alpha'):
      self.merge({'kernel': a['kernel'][:1]}, {'kernel': grams[:1]}, alpha=1.0)

  def test_is_the_minimum(self):
    a = self.arrays
    kernel = np.asarray(
      self.merge({'kernel': a['kernel']}, {'kernel': a['gram']}, alpha=1.0)[
        'kernel'
      ]
    )

    def loss(w):
      return sum(
        np.trace((w - own).T @ gram @ (w - own))
        for own, gram in zip(a['kernel'], a['gram'])
      )

    np.testing.assert_allclose(loss(kernel), a['objective_alpha1'], rtol=1e-9)
    np.testing.assert_allclose(
      loss(a['kernel'].mean(0)), a['objective_mean'], rtol=1e-9
    )
    rng = np.random.default_rng(0)
    for _ in range(20):
      self.assertGreater(
        loss(kernel + 1e-3 * rng.normal(size=kernel.shape)), loss(kernel)
      )


if __name__ == '__main__':
  absltest.main()
