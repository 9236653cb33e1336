# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Gram matrices and Fishers against brute force, on one device and on eight."""

from absl.testing import absltest
from absl.testing import parameterized
import drawn
import flax.linen as nn
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import small_batches

from mergejax import models
from mergejax import partition
from mergejax import statistics
from mergejax.core import errors
from mergejax.core import tree
from mergejax.intercept import capture
from mergejax.statistics import grams


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


class GramTest(parameterized.TestCase):
  def test_every_kind_of_kernel(self):
    module = Tall()
    x = np.random.default_rng(0).normal(size=(8, 5, 6)).astype(np.float32)
    params = module.init(jax.random.key(0), jnp.asarray(x))['params']
    found = statistics.collect(
      statistics.gram(apply=small_batches.sown),
      module,
      params,
      [{'x': x[:4]}, {'x': x[4:]}],
    )
    self.assertLen(found, 7)
    dense = nn.Dense(6).apply({'params': params['dense']}, x)
    for path, inputs in (
      ('dense/kernel', x),
      ('attention/query/kernel', dense),
      ('attention/key/kernel', dense),
    ):
      np.testing.assert_allclose(
        found[path]['gram'], small_batches.gram_of(inputs), rtol=2e-5, atol=1e-6
      )
      self.assertEqual(found[path]['count'], 40)
    attend = nn.MultiHeadDotProductAttention(2)
    attended = attend.apply({'params': params['attention']}, dense, dense)
    split = nn.DenseGeneral((2, 3)).apply({'params': params['split']}, attended)
    np.testing.assert_allclose(
      found['join/kernel']['gram'],
      small_batches.gram_of(np.asarray(split).reshape(8, 5, 6)),
      rtol=2e-5,
      atol=1e-6,
    )

  def test_convolution_answers_as_its_kernel_lies(self):
    module = nn.Conv(3, (3, 2), strides=2, padding='VALID', use_bias=False)
    x = np.random.default_rng(0).normal(size=(2, 7, 6, 4)).astype(np.float32)
    params = module.init(jax.random.key(0), x)['params']
    found = capture.inputs_of(
        module, params, {'x': x}, lambda path, inputs: inputs,
        wanted=lambda path: True, apply=small_batches.sown,
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
      statistics.gram(apply=small_batches.sown), module, params, [{'x': x}]
    )['layers/dense/kernel']
    carry = jnp.asarray(x)
    for i in range(3):
      np.testing.assert_allclose(
        found['gram'][i], small_batches.gram_of(carry), rtol=1e-5, atol=1e-6
      )
      layer = jax.tree.map(lambda leaf, i=i: leaf[i], params['layers']['dense'])
      carry = carry + nn.relu(nn.Dense(5).apply({'params': layer}, carry))
    np.testing.assert_array_equal(found['count'], [8, 8, 8])

  def test_layers_that_hide_are_an_error(self):
    module = Scanned(lifted=False)
    params = module.init(jax.random.key(0), jnp.ones((2, 5)))['params']
    with self.assertRaisesRegex(errors.UserError, 'variable_axes') as raised:
      statistics.collect(
        statistics.gram(apply=small_batches.sown),
        module,
        params,
        [{'x': jnp.ones((2, 5))}],
      )
    self.assertIn('layers/dense/kernel', raised.exception.message)

  def test_experts_count_the_tokens_they_got(self):
    module = Experts()
    x = np.random.default_rng(0).normal(size=(6, 2, 3)).astype(np.float32)
    x[2:, 1] = 0  # the second expert got two tokens
    params = module.init(jax.random.key(0), x)['params']
    found = statistics.collect(
        statistics.gram(
          apply=small_batches.sown, mask=lambda path, batch: capture.NONZERO
        ),
        module, params, [{'x': x}],
    )['expert/kernel']  # fmt: skip
    np.testing.assert_array_equal(found['count'], [6, 2])
    np.testing.assert_allclose(
      found['gram'][1], small_batches.gram_of(x[:2, 1]), rtol=1e-5
    )

  def test_padding_and_batches_do_not_matter(self):
    module = models.build(small_batches.TEXT_MODEL)
    params = drawn.params(models.family_of(module))
    batches = small_batches.text_batches()
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
    module = models.build(small_batches.TEXT_MODEL)
    params = drawn.params(models.family_of(module))
    with self.assertRaisesRegex(errors.UserError, 'matches no parameter'):
      statistics.collect(
        statistics.gram(include=['nothing']),
        module,
        params,
        small_batches.text_batches(),
      )
    with self.assertRaisesRegex(errors.ConfigError, 'not a regular expression'):
      statistics.collect(
        statistics.gram(exclude=['(']),
        module,
        params,
        small_batches.text_batches(),
      )
    with self.assertRaisesRegex(errors.UserError, 'nothing to collect'):
      statistics.collect(
        statistics.gram(exclude=['.*']),
        module,
        params,
        small_batches.text_batches(),
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
    sampled = self.fisher(estimator='sampled', samples=2000)
    for path, own in whole.items():
      np.testing.assert_allclose(
        sampled[path]['fisher'], own['fisher'], rtol=0.25, atol=2e-3
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
    module = models.build(small_batches.TEXT_MODEL)
    params = drawn.params(models.family_of(module))
    (batch,) = small_batches.text_batches(1, rows=2)
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
    module = models.build({**small_batches.TEXT_MODEL, 'vocab_size': 4})
    params = drawn.params(models.family_of(module), 1)
    (batch,) = small_batches.text_batches(1, rows=2)
    batch = {n: np.minimum(x, 3)[:, :1] for n, x in batch.items()}
    batch['decoder_target_tokens'] = np.ones((2, 1), int)
    batch['decoder_input_tokens'] = np.zeros((2, 1), int)
    sampled = statistics.collect(
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
      sampled[path]['fisher'], exact[path]['fisher'], rtol=0.25, atol=1e-3
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
      module, batches = (
        models.build(small_batches.TEXT_MODEL),
        small_batches.text_batches(),
      )
    else:
      statistic = statistics.fisher(estimator='sampled')
      module, batches = small_batches.tiny_images()
    params = drawn.params(models.family_of(module))
    one = statistics.collect(statistic, module, params, batches)
    many = statistics.collect(statistic, module, params, batches, mesh=mesh)
    for path, own in one.items():
      for name, leaf in own.items():
        np.testing.assert_allclose(
          many[path][name], leaf, rtol=2e-4, atol=2e-6, err_msg=path
        )

  def test_no_device_waits_for_another_before_the_end(self):
    module = models.build(dict(model_type='mlp', hidden=(8,)))
    params = drawn.params(models.family_of(module))
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


class AnswersTest(absltest.TestCase):
  def test_scores_are_log_likelihoods(self):
    module = models.build(small_batches.TEXT_MODEL)
    params = drawn.params(models.family_of(module))
    (batch,) = small_batches.text_batches(1, rows=2)
    answers = np.array([[5, 6, 1, 0], [7, 1, 0, 0]])
    family = models.family_of(module)
    found = jax.jit(family.answer_logits(answers))(params, batch)
    logits = jax.jit(family.logits)
    for c, answer in enumerate(answers):
      targets = np.stack([answer] * 2)
      given = logits(
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
