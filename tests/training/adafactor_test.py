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

# T5X's arguments of each golden run -> ours.
T5X = {
    'default_min4': dict(min_dim_size_to_factor=4),
    # T5X factors stacked matrices however small; ours obey the law below.
    'default_min128': dict(leave_out='bat'),
    'gnclip': dict(min_dim_size_to_factor=4, max_gradient_norm=1.0),
}  # fmt: skip


def run(optimizer, params, grads):
  """Parameters after every step."""
  update = jax.jit(optimizer.update)
  state, seen = optimizer.init(params), []
  for grad in grads:
    updates, state = update(grad, state, params)
    params = optax.apply_updates(params, updates)
    seen.append(params)
  return seen


class AdafactorTest(parameterized.TestCase):
  @parameterized.parameters(*T5X)
  def test_t5x(self, name):
    arrays = goldens.load('t5x_adafactor')
    settings = json.loads(str(arrays[f'cfg/{name}']))
    named = dict(T5X[name])
    left_out = named.pop('leave_out', None)
    axes = [
      (path, tuple(names.split(',')))
      for path, names in (str(text).split(':') for text in arrays['axes'])
      if names
    ]
    params = tree.flatten(goldens.subtree(arrays, 'params/'))
    grads = [
      {path: arrays[f'grads/{i}/{path}'] for path in params} for i in range(4)
    ]
    optimizer = optim.adafactor(settings['lr'], axes=axes, **named)
    for i, found in enumerate(run(optimizer, params, grads)):
      for path in sorted(set(params) - {left_out}):
        np.testing.assert_allclose(
            found[path], arrays[f'{name}/step{i + 1}/params/{path}'],
            rtol=2e-5, atol=1e-6, err_msg=f'step {i} {path}',
        )  # fmt: skip

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
