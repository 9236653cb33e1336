# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gram matrices and Fishers against brute force, on one device and on eight."""

import json
import pathlib
import signal

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import goldens
import jax
import jax.numpy as jnp
import numpy as np

import mergejax as mj
from mergejax import models
from mergejax import partition
from mergejax import statistics
from mergejax.checkpoints import base as store_base
from mergejax.core import errors
from mergejax.core import tree
from mergejax.intercept import capture
from mergejax.statistics import grams

SMALL = dict(
  model_type='t5x', vocab_size=24, emb_dim=8, num_heads=2, head_dim=3,
  mlp_dim=10, num_encoder_layers=1, num_decoder_layers=1,
  logits_via_embedding=True,
)  # fmt: skip


def text_batches(count=3, rows=8, seed=0):
  """Batches with padding on both sides."""
  rng = np.random.default_rng(seed)
  result = []
  for _ in range(count):
    batch = {}
    for name, length in (('encoder_input', 6), ('decoder_target', 5)):
      tokens = rng.integers(1, 24, (rows, length))
      sizes = rng.integers(2, length + 1, rows)
      tokens[np.arange(length) >= sizes[:, None]] = 0
      batch[f'{name}_tokens'] = tokens
    targets = batch['decoder_target_tokens']
    shifted = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    result.append({**batch, 'decoder_input_tokens': shifted})
  return result


def tiny_images(count=1):
  """`(module, batches)` of a small image classifier."""
  module = models.build(
    dict(model_type='mlp', hidden=(5,), image_shape=(2, 2, 1), classes=3)
  )
  rng = np.random.default_rng(0)
  batch = lambda: {
    'images': rng.random((16, 2, 2, 1), np.float32),
    'labels': rng.integers(0, 3, 16),
  }
  return module, [batch() for _ in range(count)]


class Tall(nn.Module):
  """Every kind of linear map that flax has."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(6, name='dense')(x)
    x = nn.MultiHeadDotProductAttention(2, name='attention')(x, x)
    x = nn.DenseGeneral((2, 3), axis=-1, name='split')(x)
    return nn.DenseGeneral(4, axis=(-2, -1), name='join')(x)


class Scanned(nn.Module):
  """Stacked layers; the collection is lifted or it is not."""

  lifted: bool = True

  @nn.compact
  def __call__(self, x):
    class Layer(nn.Module):
      @nn.compact
      def __call__(self, carry, _):
        return carry + nn.relu(nn.Dense(5, name='dense')(carry)), None

    axes = {'params': 0, **({'intermediates': 0} if self.lifted else {})}
    scanned = nn.scan(
      Layer, variable_axes=axes, split_rngs={'params': True}, length=3
    )
    return scanned(name='layers')(x, None)[0]


class Experts(nn.Module):
  """Two experts, each over the slots that were filled for it."""

  @nn.compact
  def __call__(self, x):
    expert = nn.vmap(
        nn.Dense, variable_axes={'params': 0, 'intermediates': 0},
        split_rngs={'params': True}, in_axes=1, out_axes=1,
    )  # fmt: skip
    return expert(4, name='expert')(x)


def plain(module, params, batch):
  return module.apply({'params': params}, batch['x'], mutable='intermediates')[
    1
  ]


def inner_products(rows):
  rows = np.asarray(rows, np.float64).reshape(-1, rows.shape[-1])
  return rows.T @ rows / len(rows)


class GramTest(parameterized.TestCase):
  def test_every_kind_of_kernel(self):
    module = Tall()
    x = np.random.default_rng(0).normal(size=(8, 5, 6)).astype(np.float32)
    params = module.init(jax.random.key(0), jnp.asarray(x))['params']
    found = statistics.collect(
      statistics.gram(apply=plain), module, params, [{'x': x[:4]}, {'x': x[4:]}]
    )
    self.assertLen(found, 7)
    dense = nn.Dense(6).apply({'params': params['dense']}, x)
    for path, inputs in (
      ('dense/kernel', x),
      ('attention/query/kernel', dense),
      ('attention/key/kernel', dense),
    ):
      np.testing.assert_allclose(
        found[path]['gram'], inner_products(inputs), rtol=2e-5, atol=1e-6
      )
      self.assertEqual(found[path]['count'], 40)
    attend = nn.MultiHeadDotProductAttention(2)
    attended = attend.apply({'params': params['attention']}, dense, dense)
    split = nn.DenseGeneral((2, 3)).apply({'params': params['split']}, attended)
    np.testing.assert_allclose(
      found['join/kernel']['gram'],
      inner_products(np.asarray(split).reshape(8, 5, 6)),
      rtol=2e-5,
      atol=1e-6,
    )

  def test_convolution_answers_as_its_kernel_lies(self):
    module = nn.Conv(3, (3, 2), strides=2, padding='VALID', use_bias=False)
    x = np.random.default_rng(0).normal(size=(2, 7, 6, 4)).astype(np.float32)
    params = module.init(jax.random.key(0), x)['params']
    found = capture.inputs_of(
        module, params, {'x': x}, lambda path, inputs: inputs,
        wanted=lambda path: True, apply=plain,
    )['kernel']  # fmt: skip
    kernel = np.asarray(params['kernel']).reshape(-1, 3)
    np.testing.assert_allclose(
      np.asarray(found) @ kernel, module.apply({'params': params}, x), atol=1e-5
    )

  def test_scanned_layers(self):
    module = Scanned()
    x = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    params = module.init(jax.random.key(0), x)['params']
    found = statistics.collect(
      statistics.gram(apply=plain), module, params, [{'x': x}]
    )['layers/dense/kernel']
    carry = jnp.asarray(x)
    for i in range(3):
      np.testing.assert_allclose(
        found['gram'][i], inner_products(carry), rtol=1e-5, atol=1e-6
      )
      layer = jax.tree.map(lambda leaf, i=i: leaf[i], params['layers']['dense'])
      carry = carry + nn.relu(nn.Dense(5).apply({'params': layer}, carry))
    np.testing.assert_array_equal(found['count'], [8, 8, 8])

  def test_layers_that_hide_are_an_error(self):
    module = Scanned(lifted=False)
    params = module.init(jax.random.key(0), jnp.ones((2, 5)))['params']
    with self.assertRaisesRegex(errors.UserError, 'variable_axes') as raised:
      statistics.collect(
        statistics.gram(apply=plain), module, params, [{'x': jnp.ones((2, 5))}]
      )
    self.assertIn('layers/dense/kernel', raised.exception.message)

  def test_experts_count_the_tokens_they_got(self):
    module = Experts()
    x = np.random.default_rng(0).normal(size=(6, 2, 3)).astype(np.float32)
    x[2:, 1] = 0  # the second expert got two tokens
    params = module.init(jax.random.key(0), x)['params']
    found = statistics.collect(
        statistics.gram(apply=plain, mask=lambda path, batch: capture.NONZERO),
        module, params, [{'x': x}],
    )['expert/kernel']  # fmt: skip
    np.testing.assert_array_equal(found['count'], [6, 2])
    np.testing.assert_allclose(
      found['gram'][1], inner_products(x[:2, 1]), rtol=1e-5
    )

  def test_padding_and_batches_do_not_matter(self):
    module = models.build(SMALL)
    params = models.family_of(module).init(jax.random.key(0))
    batches = text_batches()
    whole = statistics.collect(
      statistics.gram(tied_head=True), module, params, batches, save_every=1
    )
    longer = [
      {n: np.pad(leaf, ((0, 0), (0, 3))) for n, leaf in batch.items()}
      for batch in batches
    ]
    joined = [{n: np.concatenate([b[n] for b in batches]) for n in batches[0]}]
    for other in (longer, joined):
      again = statistics.collect(
        statistics.gram(tied_head=True), module, params, other
      )
      for path, own in whole.items():
        np.testing.assert_array_equal(again[path]['count'], own['count'])
        np.testing.assert_allclose(
          again[path]['gram'], own['gram'], rtol=2e-4, atol=2e-6
        )
    self.assertIn('token_embedder/embedding', whole)
    self.assertEqual(
      whole['encoder/layers_0/mlp/wo/kernel']['count'],
      sum((b['encoder_input_tokens'] > 0).sum() for b in batches),
    )
    self.assertEqual(
      whole['decoder/layers_0/encoder_decoder_attention/key/kernel']['count'],
      whole['encoder/layers_0/mlp/wo/kernel']['count'],
    )

  @parameterized.parameters(1, 64, 130, 200, 520)
  def test_strips_give_the_whole_matrix(self, size):
    rows = np.random.default_rng(0).normal(size=(2, 30, size))
    rows = rows.astype(np.float32)
    strips = jax.device_get(grams._strips(rows, rows))
    found = grams._whole(strips)
    np.testing.assert_allclose(
      found, np.swapaxes(rows, 1, 2) @ rows, rtol=1e-4, atol=1e-4
    )
    np.testing.assert_array_equal(found, np.swapaxes(found, 1, 2))
    if size > 500:
      self.assertLess(sum(s.size for s in strips), 0.65 * found.size)

  def test_nothing_to_collect(self):
    module, params = models.build(SMALL), None
    params = models.family_of(module).init(jax.random.key(0))
    with self.assertRaisesRegex(errors.UserError, 'matches no parameter'):
      statistics.collect(
        statistics.gram(include=['nothing']), module, params, text_batches()
      )
    with self.assertRaisesRegex(errors.UserError, 'nothing to collect'):
      statistics.collect(
        statistics.gram(exclude=['.*']), module, params, text_batches()
      )
    with self.assertRaisesRegex(errors.UserError, 'no batch'):
      statistics.collect(statistics.gram(), module, params, [])


def golden_classifier(arrays, k):
  params = goldens.subtree(arrays, f'model{k}__')
  return tree.unflatten(
    {p.replace('__', '/'): jnp.asarray(x) for p, x in params.items()}
  )


def golden_logits(params, batch):
  dense = lambda x, name: (
    x @ params[name]['kernel'] + params[name]['bias'][None]
  )
  return dense(jnp.tanh(dense(batch['images'], 'Dense_0')), 'Dense_1')


class FisherTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.arrays = goldens.load('fisher_merging')
    x = self.arrays['x']
    self.batch = {'images': x, 'labels': np.arange(len(x)) % 3}

  def fisher(self, k=0, batches=None, **options):
    return statistics.collect(
      statistics.fisher(logits=golden_logits, **options),
      nn.Dense(1),
      golden_classifier(self.arrays, k),
      batches or [self.batch],
    )

  @parameterized.parameters(0, 1, 2)
  def test_golden(self, k):
    for microbatch in (1, 4):
      for path, own in self.fisher(k, microbatch=microbatch).items():
        expected = self.arrays[f'fisher{k}__{path.replace("/", "__")}']
        np.testing.assert_allclose(
          own['fisher'], expected, rtol=1e-4, atol=1e-9
        )

  def test_batches_and_padding_do_not_matter(self):
    whole = self.fisher()
    cut = lambda a, b: {n: x[a:b] for n, x in self.batch.items()}
    padded = {
      n: np.concatenate(
        [x, x[:2] * np.float32(np.nan) if x.ndim > 1 else x[:2]]
      )
      for n, x in self.batch.items()
    }
    padded['weights'] = np.array([1.0] * 12 + [0.0] * 2, np.float32)
    for batches in ([cut(0, 5), cut(5, 12)], [padded]):
      again = self.fisher(batches=batches)
      for path, own in whole.items():
        self.assertEqual(again[path]['count'], 12)
        np.testing.assert_allclose(
          again[path]['fisher'], own['fisher'], rtol=1e-5, atol=1e-10
        )

  def test_sampled_converges_to_exact(self):
    whole = self.fisher()
    drawn = self.fisher(estimator='sampled', samples=2000)
    for path, own in whole.items():
      np.testing.assert_allclose(
        drawn[path]['fisher'], own['fisher'], rtol=0.25, atol=2e-3
      )

  def test_empirical_is_the_square_of_each_example(self):
    params = golden_classifier(self.arrays, 0)

    def log_p(params, x, label):
      given = golden_logits(params, {'images': x[None]})[0]
      return jax.nn.log_softmax(given)[label]

    squares = [
      jax.tree.map(jnp.square, jax.grad(log_p)(params, x, y))
      for x, y in zip(self.batch['images'], self.batch['labels'])
    ]
    expected = jax.tree.map(lambda *s: sum(s) / len(s), *squares)
    found = self.fisher(estimator='empirical')
    for path, leaf in tree.flatten(expected).items():
      np.testing.assert_allclose(found[path]['fisher'], leaf, rtol=1e-5)

  def test_sequences(self):
    module = models.build(SMALL)
    params = models.family_of(module).init(jax.random.key(0))
    (batch,) = text_batches(1, rows=2)
    path = 'decoder/decoder_norm/scale'

    def log_p(scale):
      changed = tree.unflatten({**tree.flatten(params), path: scale})
      given = jax.nn.log_softmax(
        models.family_of(module).logits(changed, batch)
      )
      targets = batch['decoder_target_tokens'][..., None]
      picked = jnp.take_along_axis(given, jnp.asarray(targets), axis=2)
      return jnp.where(targets > 0, picked, 0.0)[..., 0]

    scale = params['decoder']['decoder_norm']['scale']
    # [row, token, parameter]: gradient of each token's log-likelihood.
    gradients = np.asarray(jax.jit(jax.jacrev(log_p))(scale))
    for per_token, expected in (
      (False, np.square(gradients.sum(axis=1))),
      (True, np.square(gradients).sum(axis=1)),
    ):
      found = statistics.collect(
          statistics.fisher(estimator='empirical', per_token=per_token),
          module, params, [batch],
      )  # fmt: skip
      np.testing.assert_allclose(
        found[path]['fisher'], expected.mean(axis=0), rtol=1e-4
      )
    with self.assertRaisesRegex(errors.UserError, 'answer_logits'):
      statistics.collect(statistics.fisher(), module, params, [batch])

  def test_sampled_answers_are_the_models_own(self):
    # With two answers to choose from, sampling whole answers and summing over
    # both exactly must agree about a parameter.
    module = models.build({**SMALL, 'vocab_size': 4})
    params = models.family_of(module).init(jax.random.key(1))
    (batch,) = text_batches(1, rows=2)
    batch = {n: np.minimum(x, 3)[:, :1] for n, x in batch.items()}
    batch['decoder_target_tokens'] = np.ones((2, 1), int)
    batch['decoder_input_tokens'] = np.zeros((2, 1), int)
    drawn = statistics.collect(
        statistics.fisher(estimator='sampled', samples=1000), module, params, [batch]
    )  # fmt: skip
    first = lambda params, batch: models.family_of(module).logits(
      params, batch
    )[:, 0]
    exact = statistics.collect(
      statistics.fisher(logits=first), module, params, [batch]
    )
    path = 'decoder/decoder_norm/scale'
    np.testing.assert_allclose(
      drawn[path]['fisher'], exact[path]['fisher'], rtol=0.25, atol=1e-3
    )

  def test_bad_options(self):
    with self.assertRaisesRegex(errors.UserError, "'exact'"):
      statistics.fisher(estimator='exakt')
    with self.assertRaisesRegex(errors.UserError, 'samples'):
      statistics.fisher(samples=0)


class ShardedTest(parameterized.TestCase):
  @parameterized.parameters(
    (dict(data=4, model=2), 'gram'), (dict(data=8), 'fisher')
  )
  def test_sharded_equals_unsharded(self, sizes, kind):
    mesh = partition.make_mesh(**sizes)
    if kind == 'gram':
      statistic = statistics.gram(tied_head=True)
      module, batches = models.build(SMALL), text_batches()
    else:
      statistic = statistics.fisher(estimator='sampled')
      module, batches = tiny_images()
    params = models.family_of(module).init(jax.random.key(0))
    one = statistics.collect(statistic, module, params, batches)
    many = statistics.collect(statistic, module, params, batches, mesh=mesh)
    for path, own in one.items():
      for name, leaf in own.items():
        np.testing.assert_allclose(
          many[path][name], leaf, rtol=2e-4, atol=2e-6, err_msg=path
        )

  def test_no_device_waits_for_another_before_the_end(self):
    module = models.build(dict(model_type='mlp', hidden=(8,)))
    params = models.family_of(module).init(jax.random.key(0))
    mesh = partition.make_mesh(data=8)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    batch = jax.device_put(models.family_of(module).example_batch(8), rows)
    params = jax.device_put(params, partition.replicated(mesh))
    for statistic in (statistics.gram(), statistics.fisher()):
      measure = jax.jit(
        lambda p, b, s=statistic: s.measure(module, p, b, jnp.uint32(0), 8)
      )
      text = measure.lower(params, batch).compile().as_text()
      for collective in ('all-reduce', 'all-gather', 'all-to-all'):
        self.assertNotIn(f' {collective}(', text)


class SavedTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)
    self.module, self.batches = tiny_images(5)
    self.params = models.family_of(self.module).init(jax.random.key(0))

  def collect(self, out=None, params=None, **options):
    return statistics.collect(
        statistics.gram(), self.module, params or self.params, self.batches,
        out=out, **options,
    )  # fmt: skip

  def test_save_and_load(self):
    found = self.collect(self.folder / 'a')
    again = statistics.load(self.folder / 'a')
    self.assertEqual(again.fingerprint, statistics.fingerprint(self.params))
    self.assertEqual(json.dumps(again.settings), json.dumps(
      json.loads((self.folder / 'a/statistics.json').read_text())
    ))  # fmt: skip
    self.assertEqual(again.keys(), found.keys())
    for path, own in found.items():
      np.testing.assert_array_equal(own['gram'], again[path]['gram'])

  def test_fingerprint(self):
    mark = statistics.fingerprint(self.params)
    for format in ('npz', 'safetensors', 'orbax'):
      path = (
        self.folder / f'{format}.npz'
        if format == 'npz'
        else self.folder / format
      )
      mj.save_checkpoint(path, self.params, format)
      self.assertEqual(statistics.fingerprint(mj.open_checkpoint(path)), mark)
    changed = jax.tree.map(lambda leaf: leaf * 1.001, self.params)
    self.assertNotEqual(statistics.fingerprint(changed), mark)

  def test_merge_refuses_statistics_of_another_model(self):
    other = jax.tree.map(lambda leaf: leaf * 1.1, self.params)
    mine = self.collect(self.folder / 'mine')
    theirs = self.collect(self.folder / 'theirs', params=other)
    mj.merge([self.params, other], 'regmean', stats=[mine, theirs])
    with self.assertRaisesRegex(errors.UserError, 'fingerprint'):
      mj.merge([self.params, other], 'regmean', stats=[theirs, mine])
    for name, tree_ in (('a', self.params), ('b', other)):
      mj.save_checkpoint(self.folder / name, tree_, 'safetensors')
    recipe = {
      'merge_method': 'regmean',
      'models': [str(self.folder / 'a'), str(self.folder / 'b')],
      'stats': [str(self.folder / 'mine'), str(self.folder / 'theirs')],
    }
    from mergejax.merging.recipes import recipe as recipe_lib

    mj.plan(recipe_lib.parse_recipe(recipe))
    recipe['stats'].reverse()
    with self.assertRaisesRegex(errors.UserError, 'fingerprint'):
      mj.plan(recipe_lib.parse_recipe(recipe))

  def test_one_more_model_later(self):
    several = [
      jax.tree.map(lambda leaf, k=k: leaf * (1 + 0.1 * k), self.params)
      for k in range(3)
    ]
    parts = [self.collect(params=one) for one in several]
    weights = [1.0, 2.0, 0.5]
    joint = mj.merge(several, 'regmean', stats=parts, weights=weights)
    two = mj.merge(several[:2], 'regmean', stats=parts[:2], weights=weights[:2])
    together = statistics.combine(parts[:2], two, weights[:2])
    later = mj.merge(
        [two, several[2]], 'regmean', stats=[together, parts[2]],
        weights=[3.0, 0.5],
    )  # fmt: skip
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4),
      later,
      joint,
    )

  def test_killed_and_resumed_gives_the_same_bytes(self):
    whole = self.folder / 'whole'
    self.collect(whole, save_every=2)
    out = self.folder / 'out'

    class Killed(Exception):
      pass

    for stop in (1, 3, 4):

      def progress(number, stop=stop):
        if number == stop:
          raise Killed

      try:
        self.collect(out, save_every=2, progress=progress)
      except Killed:
        self.assertFalse(out.exists())
    self.collect(out, save_every=2)
    for name in ('statistics.safetensors', 'statistics.json'):
      self.assertEqual(
        (out / name).read_bytes(), (whole / name).read_bytes(), name
      )
    self.assertEqual(
      sorted(p.name for p in self.folder.iterdir()), ['out', 'whole']
    )

  def test_stopped_and_resumed_gives_the_same_bytes(self):
    whole, out = self.folder / 'whole', self.folder / 'out'
    self.collect(whole, save_every=2)

    def progress(number):
      if number == 3:
        signal.raise_signal(signal.SIGTERM)

    with self.assertRaisesRegex(errors.Stopped, 'after 3 batches'):
      self.collect(out, save_every=2, progress=progress)
    self.assertFalse(out.exists())
    numbers = []
    self.collect(out, save_every=2, progress=numbers.append)
    self.assertEqual(numbers[0], 3)
    for name in ('statistics.safetensors', 'statistics.json'):
      self.assertEqual((out / name).read_bytes(), (whole / name).read_bytes())

  def test_continuing_something_else_is_refused(self):
    class Killed(Exception):
      pass

    def progress(number):
      if number == 3:
        raise Killed

    with self.assertRaises(Killed):
      self.collect(self.folder / 'out', save_every=2, progress=progress)
    other = jax.tree.map(lambda leaf: leaf * 1.1, self.params)
    with self.assertRaisesRegex(
      errors.UserError, r'other settings:\n  model: \w+ there, \w+ asked for'
    ):
      self.collect(self.folder / 'out', params=other)

  def test_continuing_on_other_data_is_refused(self):
    class Killed(Exception):
      pass

    def progress(number):
      if number == 3:
        raise Killed

    with self.assertRaises(Killed):
      self.collect(self.folder / 'out', save_every=2, progress=progress)
    right = self.batches
    shuffled = [right[1], right[0], *right[2:]]
    halves = [
      {name: leaf[part] for name, leaf in batch.items()}
      for batch in right
      for part in (slice(8), slice(8, 16))
    ]
    for wrong in (shuffled, halves, right[:1]):
      self.batches = wrong
      with self.assertRaisesRegex(errors.UserError, 'other data.*first 2'):
        self.collect(self.folder / 'out', save_every=2)
    # On another mesh it continues, as positions are those of whole batches.
    self.batches = right
    mesh = partition.make_mesh(data=8)
    found = self.collect(self.folder / 'out', save_every=2, mesh=mesh)
    for path, own in self.collect().items():
      self.assertEqual(found[path]['count'], own['count'])
      np.testing.assert_allclose(
        found[path]['gram'], own['gram'], rtol=1e-5, atol=1e-6
      )


class SurveyTest(absltest.TestCase):
  def test_against_numpy(self):
    rng = np.random.default_rng(0)
    base = {'a': rng.normal(size=(4, 3)).astype(np.float32), 'n': np.arange(2)}
    several = [
      {'a': base['a'] + rng.normal(size=(4, 3)).astype(np.float32),
       'n': base['n']} for _ in range(3)
    ]  # fmt: skip
    found = statistics.survey(several, base)
    self.assertEqual(found.paths, ('a',))
    deltas = np.stack([(m['a'] - base['a']).ravel() for m in several])
    np.testing.assert_allclose(
      found.norms[0], np.linalg.norm(deltas, axis=1), rtol=1e-5
    )
    unit = deltas / np.linalg.norm(deltas, axis=1, keepdims=True)
    np.testing.assert_allclose(
      found.whole_cosines(), unit @ unit.T, rtol=1e-4, atol=1e-6
    )
    same = (np.abs(np.sign(deltas).sum(axis=0)) == 3).mean()
    self.assertAlmostEqual(found.agreement[0], same)
    self.assertIn('whole model', found.to_text())

  def test_stacked_layers_are_leaves_of_their_own(self):
    rng = np.random.default_rng(0)
    apart = [
      {f'layers_{i}': {'w': rng.normal(size=(3, 2))} for i in range(4)}
      for _ in range(3)
    ]
    stacked = [
      store_base.MemoryStore(
        {'layers': {'w': np.stack([m[f'layers_{i}']['w'] for i in range(4)], 1)}},
        axes=[('layers/w', ('embed', 'layers', 'mlp'))],
      )
      for m in apart
    ]  # fmt: skip
    expected = statistics.survey(apart[1:], apart[0])
    found = statistics.survey(stacked[1:], stacked[0])
    self.assertEqual(found.paths, tuple(f'layers/w[{i}]' for i in range(4)))
    for name in ('base_norms', 'norms', 'products', 'moved', 'agreement'):
      np.testing.assert_allclose(
        getattr(found, name), getattr(expected, name), rtol=1e-6, err_msg=name
      )

  def test_entries_that_nobody_moved_do_not_agree(self):
    base = {'still': np.ones(98), 'two': np.ones(2)}
    models = [{**base, 'two': np.float64(two)} for two in ([2, 2], [2, 0])]
    whole = statistics.survey(models, base).to_rows()[-1]
    self.assertEqual(whole['sign_agreement'], 0.5)

  def test_models_that_differ(self):
    with self.assertRaisesRegex(errors.UserError, '- a'):
      statistics.survey([{'b': np.zeros(2)}], {'a': np.zeros(2)})


class AnswersTest(absltest.TestCase):
  def test_scores_are_log_likelihoods(self):
    module = models.build(SMALL)
    params = models.family_of(module).init(jax.random.key(0))
    (batch,) = text_batches(1, rows=2)
    answers = np.array([[5, 6, 1, 0], [7, 1, 0, 0]])
    found = models.family_of(module).answer_logits(answers)(params, batch)
    for c, answer in enumerate(answers):
      targets = np.stack([answer] * 2)
      given = models.family_of(module).logits(
        params,
        {
          'encoder_input_tokens': batch['encoder_input_tokens'],
          'decoder_target_tokens': targets,
          'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
        },
      )
      log_p = np.asarray(jax.nn.log_softmax(given))
      expected = [
        sum(log_p[row, t, token] for t, token in enumerate(answer) if token)
        for row in range(2)
      ]
      np.testing.assert_allclose(found[:, c], expected, rtol=1e-4)


if __name__ == '__main__':
  absltest.main()
