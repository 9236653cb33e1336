# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adafactor against T5X's and transformers' own numbers, and stacked."""

import json

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mergejax.core import errors
from mergejax.core import tree
from mergejax.training import optim
from mergejax.training import t5x_state
from mergejax.training import updates

# T5X's arguments by another name here.
OURS = {
  'beta1': 'momentum',
  'global_norm_clip_threshold': 'max_gradient_norm',
  'lr': 'learning_rate',
}
T5X = (
  'default_min4', 'default_min128', 'unfactored', 'noscale_mom', 'wd',
  'wd_lr_exp', 'noclip', 'gnclip', 'maxscale_offset',
)  # fmt: skip


def golden(name):
  """`(our optimizer, parameters, gradients, arrays)` of a golden run."""
  arrays = goldens.load('t5x_adafactor')
  settings = json.loads(str(arrays[f'cfg/{name}']))
  settings = {OURS.get(key, key): value for key, value in settings.items()}
  axes = [
    (path, tuple(names.split(',')))
    for path, names in (str(text).split(':') for text in arrays['axes'])
    if names
  ]
  if settings.get('factored', True):
    settings['logical_factor_rules'] = optim.standard_logical_factor_rules()
  else:  # T5X has no batch axes then: one root mean square for the whole stack
    axes = [('bat', ('many', 'embed', 'mlp'))]
  params = tree.flatten(goldens.subtree(arrays, 'params/'))
  grads = [
    {path: arrays[f'grads/{i}/{path}'] for path in params} for i in range(4)
  ]
  return optim.adafactor(axes=axes, **settings), params, grads, arrays


def run(optimizer, params, grads):
  """Parameters after every step."""
  return run_with_state(optimizer, params, grads)[0]


def run_with_state(optimizer, params, grads):
  """Parameters after every step, and the state after the last."""
  update = jax.jit(optimizer.update)
  state, seen = optimizer.init(params), []
  for grad in grads:
    updates, state = update(grad, state, params)
    params = optax.apply_updates(params, updates)
    seen.append(params)
  return seen, state


class AdafactorTest(parameterized.TestCase):
  def test_every_golden_run_is_compared(self):
    runs = [n[4:] for n in goldens.load('t5x_adafactor') if n[:4] == 'cfg/']
    self.assertCountEqual(runs, T5X)

  @parameterized.parameters(*T5X)
  def test_t5x(self, name):
    optimizer, params, grads, arrays = golden(name)
    seen, state = run_with_state(optimizer, params, grads)
    for i, found in enumerate(seen):
      for path in params:
        np.testing.assert_allclose(
            found[path], arrays[f'{name}/step{i + 1}/params/{path}'],
            rtol=2e-5, atol=1e-6, err_msg=f'step {i} {path}',
        )  # fmt: skip
    # Its state is T5X's: of the same shapes, in the same order of axes.
    moments = t5x_state.to_t5x(state, tree.specs(params), optimizer)
    self.assertLen(moments, 4 * len(params))
    for slot, leaf in moments.items():
      expected = arrays[f'{name}/final_state/{slot}']
      self.assertEqual(leaf.shape, expected.shape, slot)
      np.testing.assert_allclose(leaf, expected, rtol=2e-5, err_msg=slot)
    like = jax.eval_shape(optimizer.init, params)
    again = t5x_state.from_t5x(moments, 4, like, tree.specs(params), optimizer)
    jax.tree.map(np.testing.assert_array_equal, again, state)

  def test_numbers_that_would_be_nan_stay(self):
    params = {'a': jnp.ones((3, 4)), 'b': jnp.full(5, 2.0)}
    grads = {'a': jnp.ones((3, 4)).at[1, 2].set(jnp.nan), 'b': jnp.ones(5)}
    make = lambda skip: optim.adafactor(
      0.1, skip_nan_updates=skip, momentum=0.9, clipping_threshold=None
    )
    (found,) = run(make(True), params, [grads])
    (plain,) = run(make(False), params, [grads])
    stays = np.isnan(plain['a'])
    self.assertEqual(stays.sum(), 1)
    np.testing.assert_array_equal(found['a'][stays], 1.0)
    np.testing.assert_array_equal(found['a'][~stays], plain['a'][~stays])
    np.testing.assert_array_equal(found['b'], plain['b'])
    optimizer = make(True)
    state = optimizer.init(params)
    _, after = optimizer.update(grads, state, params)
    for leaf in jax.tree.leaves(after):
      self.assertFalse(np.isnan(leaf).any())
    # Without a limit by rows one NaN is one number; with one it is the leaf.
    (found,) = run(optim.adafactor(0.1, skip_nan_updates=True), params, [grads])
    np.testing.assert_array_equal(found['a'], params['a'])

  def test_a_rule_makes_a_matrix_of_more_than_two_axes(self):
    rng = np.random.default_rng(0)
    size = lambda *shape: rng.normal(size=shape).astype(np.float32)
    kernel, grad = size(2, 3, 6, 4), size(2, 3, 6, 4)  # heads stack embed kv
    path = 'query/kernel'
    axes = [(path, ('heads', 'layers', 'embed', 'kv'))]
    by_axis = dict(
      axes=axes, logical_factor_rules=optim.standard_logical_factor_rules()
    )
    by_path = dict(factor_map=[(path, ('column', 'batch', 'row', 'column'))])
    matrix = lambda x: np.transpose(x, (1, 2, 0, 3)).reshape(3, 6, 8)
    alone = run(
      optim.adafactor(0.1, min_dim_size_to_factor=1),
      dict(enumerate(matrix(kernel))), [dict(enumerate(matrix(grad)))] * 2,
    )  # fmt: skip
    for given in (by_axis, by_path):
      found = run(
        optim.adafactor(0.1, **given), {path: kernel}, [{path: grad}] * 2
      )
      for step in range(2):
        for i in range(3):
          np.testing.assert_allclose(
            matrix(found[step][path])[i], alone[step][i], rtol=1e-6
          )

  def test_mistakes_in_rules(self):
    params = {'wi': jnp.ones((3, 4, 5))}
    axes = [('wi', ('layers', 'embed', 'mlp'))]
    for message, settings in (
      ("Did you mean 'row'", dict(factor_map=[('wi', ('batch', 'rows', 'none'))])),
      ('2 parts', dict(factor_map=[('wi', ('batch', 'row'))])),
      ('matches no parameter',
       dict(axes=axes, factor_map=[('w', ('row',) * 3)])),
      ('neither row nor column',
       dict(factor_map=[('wi', ('none', 'row', 'column'))])),
      ("axis of factor rules 'mlp'",
       dict(axes=axes, logical_factor_rules={'embed': 'row'})),
    ):  # fmt: skip
      with self.assertRaisesRegex(errors.UserError, message):
        optim.adafactor(0.1, **settings).init(params)
    with self.assertRaisesRegex(errors.UserError, 'factored=False'):
      optim.adafactor(0.1, factored=False, logical_factor_rules={'a': 'row'})

  def test_settings_tell_later_options_only_where_they_are_used(self):
    # So that the record of an older run stays that of the same run.
    told = optim.describe(optim.adafactor(0.1))
    self.assertCountEqual(
      told,
      ['optimizer', 'learning_rate', 'decay_rate', 'step_offset', 'momentum',
       'clipping_threshold', 'max_gradient_norm', 'min_dim_size_to_factor',
       'axes'],
    )  # fmt: skip
    told = optim.describe(optim.adafactor(0.1, weight_decay_rate=0.1))
    self.assertEqual(told['weight_decay_rate'], 0.1)

  def test_transformers(self):
    arrays = goldens.load('adafactor_trajectory')
    names = ('vector', 'matrix')
    params = {name: jnp.asarray(arrays[f'init_{name}']) for name in names}
    optimizer = optim.adafactor(3e-3, min_dim_size_to_factor=1)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for i in range(10):
      grad = {n: 2 * (params[n] - arrays[f'target_{n}']) for n in names}
      updates, state = update(grad, state, params)
      params = optax.apply_updates(params, updates)
      for name in names:
        np.testing.assert_allclose(
            params[name], arrays[f'{name}_after_step'][i],
            rtol=2e-5, atol=1e-6, err_msg=f'step {i} {name}',
        )  # fmt: skip

  def test_a_stack_is_updated_as_its_slices_are(self):
    rng = np.random.default_rng(0)
    # Slices of very different sizes: norms of the whole would mix them.
    scales = np.float32([1e-2, 1.0, 30.0])
    size = lambda *shape: rng.normal(size=shape).astype(np.float32)
    kernel = scales[:, None, None, None] * size(3, 2, 8, 6)
    scale = scales[:, None] * size(3, 8)
    paths = ('layers/wi/kernel', 'layers/norm/scale')
    moved = lambda k, s: {
      'layers': {
        'wi': {'kernel': np.moveaxis(k, (0, 1), (1, 2))},
        'norm': {'scale': s},
      },
      'head': {'kernel': k[0, 0]},
    }
    axes = [
      (paths[0], ('embed', 'layers', 'expert', 'mlp')),
      (paths[1], ('branch', 'embed')),
    ]
    make = lambda **named: optim.adafactor(
      0.1, min_dim_size_to_factor=4, momentum=0.9, **named
    )
    grads = [(size(3, 2, 8, 6) * scales[::-1, None, None, None],
              size(3, 8) * scales[::-1, None]) for _ in range(3)]  # fmt: skip
    found = run(
      make(axes=axes), moved(kernel, scale), [moved(*g) for g in grads]
    )
    alone = run(
      make(),
      {(i, j): kernel[i, j] for i in range(3) for j in range(2)}
      | {(i,): scale[i] for i in range(3)},
      [
        {(i, j): k[i, j] for i in range(3) for j in range(2)}
        | {(i,): s[i] for i in range(3)}
        for k, s in grads
      ],
    )
    for step, (stack, single) in enumerate(zip(found, alone)):
      stack = tree.flatten(stack)
      for i in range(3):
        np.testing.assert_allclose(
            stack[paths[1]][i], single[(i,)], rtol=1e-5, err_msg=str(step))  # fmt: skip
        for j in range(2):
          np.testing.assert_allclose(
              stack[paths[0]][:, i, j], single[(i, j)], rtol=1e-5,
              err_msg=str(step),
          )  # fmt: skip
      np.testing.assert_allclose(
        stack['head/kernel'], single[(0, 0)], rtol=1e-5
      )

  def test_the_state_of_plain_parameters_is_optax_s(self):
    params = {'wi': {'kernel': jnp.ones((4, 4))}}
    self.assertEqual(
      jax.tree.structure(optim.adafactor(0.1).init(params)),
      jax.tree.structure(optax.adafactor(0.1).init(params)),
    )

  @parameterized.parameters(
    (True, 1.0), (True, 1e-3), (True, None), (False, 1e-3)
  )
  def test_few_passes_are_optax_s_two_transformations(self, factored, limit):
    settings = factored, 0.7, 3, 4, 1e-30
    ours = updates.scale_by_clipped_factored_rms(*settings, limit)
    theirs = optax.scale_by_factored_rms(*settings)
    if limit is not None:
      theirs = optax.chain(theirs, optax.clip_by_block_rms(limit))
    rng = np.random.default_rng(0)
    shapes = ((8, 6), (6, 8), (5, 5), (3, 9), (7,), (1,), (), (4, 7, 5))
    # Sizes far apart, and a row and a column without a gradient.
    grads = [
      {
        str(i): jnp.asarray(rng.normal(size=s) * 10.0 ** (i - 4), jnp.float32)
        for i, s in enumerate(shapes)
      }
      for _ in range(3)
    ]
    grads = [
      each | {'0': each['0'].at[2].set(0).at[:, 1].set(0)} for each in grads
    ]
    updates_of = [jax.jit(ours.update), jax.jit(theirs.update)]
    states = ours.init(grads[0]), theirs.init(grads[0])
    # The step offset is one of a run that goes on: its count is past it.
    states = jax.tree.map(
      lambda leaf: leaf + 3 if leaf.dtype == jnp.int32 else leaf, states
    )
    for each in grads:
      (moved, state), (expected, other) = (
        update(each, state, grads[0])
        for update, state in zip(updates_of, states)
      )
      states = state, other
      for a, b in zip(
        jax.tree.leaves((moved, state)), jax.tree.leaves((expected, other))
      ):
        np.testing.assert_allclose(a, b, rtol=2e-6)

  def test_what_is_not_known_is_asked(self):
    params = {'layers': {'query': {'kernel': jnp.ones((3, 4, 4))}}}
    with self.assertRaisesRegex(
      errors.UserError, r"axes=\[\('layers/query/kernel', \('layers'"
    ):
      optim.adafactor(0.1).init(params)
    axes = lambda *names: [('layers/query/kernel', names)]
    heads = optim.adafactor(0.1, axes=axes('embed', 'heads', 'kv'))
    self.assertEqual(
      jax.tree.structure(heads.init(params)),
      jax.tree.structure(optax.adafactor(0.1).init(params)),
    )
    with self.assertRaisesRegex(errors.UserError, 'one name an axis'):
      optim.adafactor(0.1, axes=axes('layers', 'embed')).init(params)
    with self.assertRaisesRegex(errors.UserError, 'clips the gradient of one'):
      optim.adafactor(
        0.1, axes=axes('branch', 'embed', 'mlp'), max_gradient_norm=1.0
      ).init(params)


if __name__ == '__main__':
  absltest.main()
