# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Laws of a ladder at work: what is read, how gates mix, decoding, meshes."""

import re

from absl.testing import absltest
from absl.testing import parameterized
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import small_adapted
import tiers

import mergejax as mj
from mergejax import partition
from mergejax.core import errors
from mergejax.core import tree
from mergejax.training import losses
from mergejax.training import step as step_lib


def built(kind='t5', adapter=None, **changes):
  """`(adapted family, params)` with leaves that are nothing special."""
  family, base = small_adapted.build(kind, **changes)
  adapted = mj.adapters.adapt(
    family, adapter or mj.adapters.ladder(reduction=2)
  )
  leaves = small_adapted.leaves(adapted.adapter_specs)
  return adapted, adapted.joined(base, leaves)


def changed(params, rules):
  """Parameters with other leaves: `{regular expression: function}`."""

  def one(path, leaf):
    for pattern, fn in rules.items():
      if re.fullmatch(pattern, path):
        leaf = jnp.asarray(fn(leaf), leaf.dtype)
    return leaf

  return tree.map_paths(one, params)


def other(leaf):
  return leaf[..., ::-1] + 0.5


def at(value):
  return lambda leaf: np.full_like(leaf, value)


class LawsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.adapted, cls.params = built()
    cls.batch = small_adapted.batch()
    cls.answer = staticmethod(jax.jit(cls.adapted.logits))
    cls.logits = cls.answer(cls.params, cls.batch)

  def differs(self, rules, than=None):
    """Largest change of the logits when some leaves are others."""
    than = {} if than is None else than
    one = self.answer(changed(self.params, than), self.batch)
    found = self.answer(changed(self.params, {**than, **rules}), self.batch)
    return float(jnp.max(jnp.abs(found - one)))

  def test_the_backbone_is_read(self):
    for part in ('encoder/layers_0/mlp/wo', 'decoder/layers_1/mlp/wo'):
      self.assertGreater(self.differs({f'{part}/kernel': other}), 1e-3, part)
    # Of the backbone's decoder the head is given nothing.
    self.assertEqual(self.differs({'decoder/decoder_norm/scale': other}), 0)

  def test_open_gates_hide_the_ladders(self):
    gates = {'.*/gate_.*': at(10.0)}
    downs = {r'side/.*/down_\d/.*': other}
    self.assertGreater(self.differs(downs), 1e-3)
    self.assertEqual(self.differs(downs, than=gates), 0)
    for stack in ('encoder', 'decoder'):
      first = {f'side/{stack}/first/kernel': other}
      self.assertGreater(self.differs(first, than=gates), 1e-3)

  def test_shut_gates_discard_the_state(self):
    gates = {'.*/gate_.*': at(-20.0)}
    before = {'side/(encoder|decoder)/(first|down_0|layers_0)/.*': other}
    self.assertGreater(self.differs(before), 1e-3)
    self.assertEqual(self.differs(before, than=gates), 0)

  def test_several_answers_to_one_input(self):
    tokens = self.batch['decoder_target_tokens']
    both = np.stack([tokens, np.roll(tokens, 1, axis=0)], axis=1)
    variables = self.adapted.variables(self.params)
    found = jax.jit(self.adapted.choice_logits)(variables, self.batch, both)
    real = tokens > 0
    np.testing.assert_allclose(
      found[:, 0][real], self.logits[real], rtol=1e-4, atol=1e-4
    )

  def test_ladders_that_are_brought(self):
    found = jax.jit(
      lambda p, b: mj.adapters.collect_ladders(self.adapted, p, b)
    )(self.params, self.batch)
    rows, inputs = self.batch['encoder_input_tokens'].shape
    self.assertEqual(found['encoder_ladders'].shape, (rows, 3, inputs, 8))
    brought = {**self.batch, **found}
    np.testing.assert_array_equal(
      self.answer(self.params, brought), self.logits
    )
    # Nothing of the backbone's layers is at work.
    broken = changed(self.params, {'(en|de)coder/layers.*': at(np.nan)})
    np.testing.assert_array_equal(self.answer(broken, brought), self.logits)
    # An answer of another length is not theirs; the backbone reads it.
    variables = self.adapted.variables(self.params)
    choices = self.batch['decoder_target_tokens'][:, None]
    score = jax.jit(self.adapted.choice_logits)
    np.testing.assert_array_equal(
      score(variables, brought, choices),
      score(variables, self.batch, choices),
    )
    short = {**brought, 'decoder_ladders': found['decoder_ladders'][:, :2]}
    with self.assertRaisesRegex(errors.DataError, 'collect them anew'):
      self.adapted.logits(self.params, short)

  def test_sharded_equals_unsharded(self):
    mesh, rules = partition.make_mesh(data=4, model=2), partition.standard()
    specs = self.adapted.specs()
    layout = partition.shardings(
      mesh, self.params, {p: spec.axes for p, spec in specs.items()}, rules
    )
    for path, place in tree.flatten(layout).items():
      if path.startswith('side/'):
        self.assertNotIn('model', place.spec, path)

    def logits(params, batch):
      with partition.rules_of(mesh, rules):
        return self.adapted.logits(params, batch)

    found = jax.jit(logits)(jax.device_put(self.params, layout), self.batch)
    np.testing.assert_allclose(found, self.logits, rtol=2e-4, atol=2e-4)


@tiers.slow('test_step_by_step1')
class DecodingTest(parameterized.TestCase):
  @parameterized.parameters('t5', 'lm')
  def test_step_by_step(self, kind):
    adapted, params = built(kind)
    batch = dict(small_adapted.batch(3))
    batch['decoder_target_tokens'] = np.maximum(
      batch['decoder_target_tokens'], 1
    )
    expected = jax.jit(adapted.logits)(params, batch)
    tokens = batch['decoder_input_tokens']

    @jax.jit
    def decoded(params):
      cache = adapted.init_cache(params, batch, tokens.shape[1])
      found = []
      for i in range(tokens.shape[1]):
        logits, cache = adapted.decode_step(params, cache, tokens[:, i])
        found.append(logits)
      return jnp.stack(found, axis=1)

    np.testing.assert_allclose(decoded(params), expected, rtol=5e-4, atol=5e-4)


@tiers.slow('test_as_one_by_one[02]')
class ScannedTest(parameterized.TestCase):
  """A backbone whose layers are scanned, against the same one by one."""

  @parameterized.parameters(
    dict(
      kind='t5', axis=1, num_decoder_layers=3,
      encoder_layers=[1], decoder_layers=[0, 2], merge_last=True,
    ),
    dict(kind='lm', axis=0),
    dict(kind='t5', axis=0, relative_per_layer=True),
  )  # fmt: skip
  def test_as_one_by_one(
    self, kind, axis, encoder_layers=None, decoder_layers=None,
    merge_last=False, **sizes,
  ):  # fmt: skip
    adapter = mj.adapters.ladder(
      reduction=2, encoder_layers=encoder_layers,
      decoder_layers=decoder_layers, merge_last=merge_last,
    )  # fmt: skip
    family, params = built(kind, adapter, **sizes)
    scanned, _ = built(
      kind, adapter, scan_layers=True, param_scan_axis=axis, **sizes
    )
    base, own = family.split(params)
    stacked = tree.unflatten(scanned.plain.arranged(tree.flatten(base)))
    pair = (family, params), (scanned, scanned.joined(stacked, own))
    batch = small_adapted.batch()
    (one, before), (other, after) = (trained(*each, batch) for each in pair)
    for name in ('logits', 'loss', 'replayed', 'ladders', 'side'):
      jax.tree.map(close, other[name], one[name])
    close(other['replayed'], other['loss'])
    for path, gradient in tree.flatten(other['base']).items():
      self.assertFalse(np.any(gradient), path)
    self.assertEqual((before, after), (0, 0))
    tokens, steps = np.arange(1, 17, dtype=np.int32), 3
    found = [
      jax.jit(
        lambda params, family=family: small_adapted.decoded(
          family, params, batch, tokens, steps
        )
      )(params)
      for family, params in pair
    ]
    close(*found)

  def test_what_else_is_watched(self):
    scanned, params = built(scan_layers=True)
    rows = small_adapted.batch(2)

    def watch(run, arguments, named, context):
      if context.method_name == '__call__' and context.module.name == 'wo':
        context.module.sow('intermediates', 'met', jnp.sum(arguments[0]))
      return run(*arguments, **named)

    left = lambda mutable: jax.eval_shape(
      lambda: scanned.call(scanned.variables(params), rows, mutable=mutable)[1]
    )
    self.assertEqual(left(['intermediates']), {})
    with nn.intercept_methods(watch):
      self.assertEqual(left([]), {})
      found = left(['intermediates'])['intermediates']
    wanted = {}
    for stack in ('encoder', 'decoder'):
      (met,) = found[stack][stack]['mlp']['wo'].pop('met')
      self.assertEqual(met.shape, (2,))
      wanted[stack] = {stack: {'mlp': {'wo': {}}}}
    self.assertEqual(found, wanted)

  def test_dropout_of_the_backbone(self):
    adapter = mj.adapters.ladder(reduction=2, backbone_dropout=True)
    adapted, params = built('lm', adapter, scan_layers=True, dropout_rate=0.5)

    @jax.jit
    def last(key):
      """What the backbone's last norm is given."""
      met = []

      def watch(run, arguments, named, context):
        if context.module.path == ('decoder', 'decoder_norm'):
          met.extend(arguments)
        return run(*arguments, **named)

      with nn.intercept_methods(watch):
        adapted.call(
          adapted.variables(params), small_adapted.batch(2), train=True,
          rngs={'dropout': key},
        )  # fmt: skip
      return met[0]

    one, two = last(jax.random.key(0)), last(jax.random.key(1))
    self.assertGreater(float(jnp.max(jnp.abs(one - two))), 1e-3)
    np.testing.assert_array_equal(one, last(jax.random.key(0)))


def trained(adapted, params, batch):
  """What training computes, and the numbers of a moment that the base has."""

  def loss(params, batch):
    logits = adapted.logits(adapted.variables(params)['params'], batch)
    each, _ = losses.token_cross_entropy(logits, adapted.targets(batch))
    return jnp.mean(each), logits

  @jax.jit
  def run(params):
    (mean, logits), gradient = jax.value_and_grad(loss, has_aux=True)(
      params, batch
    )
    brought = mj.adapters.collect_ladders(adapted, params, batch)
    # Layers do not run where the batch brings what they say.
    layers = '(en|de)coder/(layers_.|encoder|decoder)/.*'
    broken = changed(params, {layers: lambda x: jnp.full_like(x, jnp.nan)})
    base, side = adapted.split(gradient)
    return dict(
      loss=mean, logits=logits, base=base, side=side, ladders=brought,
      replayed=loss(broken, {**batch, **brought})[0],
    )  # fmt: skip

  step = step_lib.make_step(adapted, optax.sgd(0.1, momentum=0.9))
  state = step.init(params, jax.random.key(0))
  size = lambda x: sum(leaf.size for leaf in jax.tree.leaves(x))
  more = size(state.opt_state) - size(adapted.split(params)[1])
  return run(params), more


def close(found, wanted):
  scale = float(jnp.max(jnp.abs(wanted)))
  np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * scale)


class VariantsTest(parameterized.TestCase):
  def test_a_ladder_as_wide_as_the_backbone_can_be_it(self):
    adapted, params = built(adapter=mj.adapters.ladder(reduction=1))
    base, _ = adapted.split(params)
    params = adapted.start(base, jax.random.key(0))
    same = {
      r'side/.*/gate_\d': at(10.0),
      'side/((en|de)coder/first|up)/kernel': lambda x: np.eye(len(x)),
    }
    params = changed(params, same)
    batch = small_adapted.batch()
    np.testing.assert_allclose(
      jax.jit(adapted.logits)(params, batch),
      jax.jit(adapted.plain.logits)(base, batch),
      rtol=1e-4, atol=1e-4,
    )  # fmt: skip

  def test_merge_last(self):
    adapter = mj.adapters.ladder(reduction=2, merge_last=True)
    adapted, params = built(adapter=adapter)
    batch = small_adapted.batch()
    run = jax.jit(adapted.logits)
    base, _ = adapted.split(params)
    plain = jax.jit(adapted.plain.logits)(base, batch)
    shut = run(changed(params, {'side/gate_last': at(-20.0)}), batch)
    np.testing.assert_allclose(shut, plain, rtol=1e-5, atol=1e-5)
    half = run(changed(params, {'side/gate_last': at(0.0)}), batch)
    side = run(changed(params, {'side/gate_last': at(20.0)}), batch)
    np.testing.assert_allclose(half, (shut + side) / 2, rtol=1e-4, atol=1e-4)
    found = mj.adapters.collect_ladders(adapted, params, batch)
    self.assertIn('decoder_last', found)
    np.testing.assert_allclose(
      run(params, {**batch, **found}), run(params, batch), rtol=1e-4, atol=1e-4
    )

  def test_mixing_after_the_block_and_sums(self):
    adapter = mj.adapters.ladder(
      reduction=2, decoder_layers=[1], residual='after'
    )
    adapted, params = built('lm', adapter)
    batch = small_adapted.batch()
    run = jax.jit(adapted.logits)
    shut = changed(params, {'.*/gate_.*': at(-20.0)})
    # Behind the block the ladder alone goes on.
    block = changed(shut, {'side/decoder/(first|layers_1)/.*': other})
    np.testing.assert_array_equal(run(block, batch), run(shut, batch))
    self.assertGreater(
      float(jnp.max(jnp.abs(run(params, batch) - run(shut, batch)))), 1e-3
    )
    # Two ladders that are equal, and blocks that do nothing: s + D(h).
    summed = mj.adapters.ladder(reduction=2, decoder_layers=[1], gates='sum')
    adapted, params = built('lm', summed)
    idle = {'side/decoder/layers_1/.*/(out|wo)/kernel': at(0.0)}
    params = changed(params, idle)
    run = jax.jit(adapted.logits)
    first = changed(params, {'side/decoder/down_1/.*': at(0.0)})
    moved = changed(
      first, {'side/decoder/first/bias': lambda b: b + np.float32(0.25)}
    )
    through = changed(first, {'side/decoder/down_1/bias': at(0.25)})
    np.testing.assert_allclose(
      run(through, batch), run(moved, batch), rtol=1e-5, atol=1e-5
    )
    self.assertGreater(
      float(jnp.max(jnp.abs(run(moved, batch) - run(first, batch)))), 1e-3
    )

  def test_dropout(self):
    adapted, params = built(dropout_rate=0.5)
    batch, variables = small_adapted.batch(), adapted.variables(params)
    apply = jax.jit(
      lambda key: adapted.call(
        variables, batch, train=True, rngs={'dropout': key}
      )[0]
    )
    one, two = apply(jax.random.key(0)), apply(jax.random.key(1))
    self.assertGreater(float(jnp.max(jnp.abs(one - two))), 1e-3)
    np.testing.assert_array_equal(one, apply(jax.random.key(0)))


if __name__ == '__main__':
  absltest.main()
