# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Soups, patches and searches: goldens, laws, and being killed."""

import json
import pathlib
import signal

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mergejax as mj
from mergejax import partition
from mergejax.core import errors
from mergejax.evaluation import base as evaluation
from mergejax.merging.recipes import recipe as recipe_lib
from mergejax.search import base
from mergejax.search import evolve
from mergejax.search import gradient
from mergejax.search import greedy
from mergejax.search import grid
from mergejax.search import patch


class DoubleCase(parameterized.TestCase):
  """Goldens in float64: accuracy is a step function."""

  def setUp(self):
    super().setUp()
    x64 = jax.enable_x64(True)
    x64.__enter__()
    self.addCleanup(x64.__exit__, None, None, None)


def soup_models(arrays):
  return [
    {'bias': arrays['bias'][k], 'kernel': arrays['kernel'][k]} for k in range(7)
  ]


def accuracy(params, x, y):
  logits = np.asarray(x) @ np.asarray(params['kernel'])
  logits = logits + np.asarray(params['bias'])
  return float((np.argmax(logits, axis=1) == y).mean())


class SoupGoldenTest(DoubleCase):
  def test_uniform(self):
    arrays = goldens.load('model_soups')
    soup = greedy.uniform(soup_models(arrays))
    for name in ('kernel', 'bias'):
      np.testing.assert_allclose(
        soup[name], arrays[f'uniform_{name}'], rtol=1e-9
      )

  @parameterized.parameters(('gt', 'greedy'), ('ge', 'greedy_ge'))
  def test_greedy(self, accept, prefix):
    arrays = goldens.load('model_soups')
    calls = []

    def evaluate(params):
      calls.append(params)
      return accuracy(params, arrays['x_val'], arrays['y_val'])

    soup = greedy.greedy(soup_models(arrays), evaluate, accept=accept)
    np.testing.assert_allclose(soup.single_scores, arrays['individual_acc'])
    np.testing.assert_array_equal(soup.order, arrays['greedy_order'])
    np.testing.assert_array_equal(
      soup.ingredients, arrays[f'{prefix}_ingredients']
    )
    if accept == 'gt':
      np.testing.assert_allclose(
        soup.candidate_scores, arrays['greedy_candidate_acc']
      )
    self.assertAlmostEqual(soup.score, float(arrays[f'{prefix}_acc']))
    for name in ('kernel', 'bias'):
      np.testing.assert_allclose(
        soup.params[name], arrays[f'{prefix}_{name}'], rtol=1e-9
      )
    self.assertLen(calls, 7 + 6)

  def test_learned(self):
    arrays = goldens.load('model_soups')
    models = soup_models(arrays)
    order = {'k': 'kernel', 'b': 'bias'}
    rows = [order[str(c)] for c in arrays['learned_leaf_order']]

    def loss(params, batch, heat):
      logits = heat * (batch['x'] @ params['kernel'] + params['bias'][None])
      log_p = jax.nn.log_softmax(logits)
      return -jnp.mean(jnp.take_along_axis(log_p, batch['y'][:, None], axis=1))

    batch = {'x': arrays['x_val'], 'y': arrays['y_val']}
    learned = gradient.learn(models, loss, [batch] * 10, granularity='leaf')
    np.testing.assert_allclose(
      learned.losses, arrays['learned_losses'], rtol=1e-9
    )
    for i, name in enumerate(rows):
      np.testing.assert_allclose(
        learned.raw[name], arrays['learned_alpha_raw_after10'][i], rtol=1e-9
      )
      np.testing.assert_allclose(
        learned.coefficients[name], arrays['learned_alpha_after10'][i],
        rtol=1e-9,
      )  # fmt: skip
      np.testing.assert_allclose(
        learned.params[name], arrays[f'learned_{name}_after10'], rtol=1e-9
      )
    self.assertAlmostEqual(
      learned.temperature, float(arrays['learned_beta_after10']), places=9
    )
    # With plain descent of rate 1, one update is the gradient itself.
    step = gradient.learn(
      models, loss, [batch], granularity='leaf', optimizer=optax.sgd(1.0)
    )
    for i, name in enumerate(rows):
      np.testing.assert_allclose(
        1 / 7 - step.raw[name], arrays['learned_grad_alpha_raw_step0'][i],
        rtol=1e-7, atol=1e-12,
      )  # fmt: skip
    self.assertAlmostEqual(
      1 - step.temperature, float(arrays['learned_grad_beta_step0']), places=9
    )

  def test_entropy(self):
    arrays = goldens.load('ties_global_trim')
    value, told = gradient.entropy(jnp.asarray(arrays['entropy_logits']))
    np.testing.assert_allclose(value, arrays['entropy_loss'], rtol=1e-5)
    self.assertBetween(float(told['largest_class']), 0.2, 1.0)
    padded = np.pad(arrays['entropy_logits'], ((0, 2), (0, 0)))
    weights = jnp.asarray(
      np.arange(len(padded)) < len(padded) - 2, padded.dtype
    )
    # However small the weights are, and whatever stands in rows without any.
    padded[-1] = np.nan
    weights = weights / 64
    again, _ = gradient.entropy(jnp.asarray(padded), weights)
    np.testing.assert_allclose(again, value, rtol=1e-6)


class PaintGoldenTest(DoubleCase):
  def setUp(self):
    super().setUp()
    self.arrays = goldens.load('paint')
    self.model = lambda name: {
      leaf: self.arrays[f'{name}__{leaf}'] for leaf in ('kernel', 'bias')
    }

  def check(self, params, name):
    for leaf in ('kernel', 'bias'):
      np.testing.assert_allclose(
        params[leaf], self.arrays[f'{name}__{leaf}'], rtol=1e-9
      )

  def scores_of_grid(self):
    """The stored accuracies, looked up by alpha."""
    zero, tuned = self.model('zeroshot'), self.model('ft0')
    moved = tuned['kernel'][0, 0] - zero['kernel'][0, 0]

    def evaluate(params):
      alpha = float((params['kernel'][0, 0] - zero['kernel'][0, 0]) / moved)
      i = int(np.argmin(np.abs(self.arrays['alpha_grid'] - alpha)))
      return {
        's0': self.arrays['supported_val_acc'][0, i],
        's1': self.arrays['supported_val_acc'][1, i],
        'p0': self.arrays['patching_val_acc'][0, i],
      }

    return evaluate

  def test_single(self):
    for alpha in (0.0, 0.3, 1.0):
      found = patch.at(self.model('zeroshot'), self.model('ft0'), alpha)
      self.check(found, f'patched_ft0_alpha{alpha}')
    done = patch.single(
      self.model('zeroshot'),
      self.model('ft0'),
      self.scores_of_grid(),
      patch.objective(['s0', 's1'], ['p0']),
    )
    np.testing.assert_allclose(
      [one.objective for one in done.log.candidates],
      self.arrays['selection_score'],
      rtol=1e-9,
    )
    self.assertAlmostEqual(done.alphas[0], float(self.arrays['selected_alpha']))

  def test_ends_are_exact_copies(self):
    zero, tuned = self.model('zeroshot'), self.model('ft0')
    for alpha, expected in ((0.0, zero), (1.0, tuned)):
      found = patch.at(zero, tuned, alpha)
      for leaf in found:
        np.testing.assert_array_equal(found[leaf], expected[leaf])

  def test_parallel(self):
    alphas = self.arrays['parallel_alphas'].tolist()
    tuned = [self.model(f'ft{i}') for i in range(3)]
    found = mj.merge(
      tuned, 'task_arithmetic', base=self.model('zeroshot'), weights=alphas
    )
    self.check(found, 'parallel')

  def test_sequential(self):
    first, second = self.arrays['sequential_alphas'].tolist()
    asked = []
    steps = [self.model('ft0'), self.model('sequential_ft2')]

    def evaluate(params, tasks):
      asked.append(tuple(tasks))
      return {task: 1.0 for task in tasks}

    def fine_tune(params, i):
      return steps[i]

    one = patch.sequential(
      self.model('zeroshot'), lambda p, i: steps[0], evaluate, ['s'], ['a'],
      alphas=[first],
    )  # fmt: skip
    self.check(one.params, 'sequential_patch1')
    two = patch.at(one.params, steps[1], second)
    self.check(two, 'sequential_patch2')
    asked.clear()
    patch.sequential(
      self.model('zeroshot'), fine_tune, evaluate, ['s'], ['a', 'b'],
      alphas=[0.0, 0.5],
    )  # fmt: skip
    self.assertEqual(asked, [('s', 'a')] * 2 + [('s', 'a', 'b')] * 2)


def quadratic(target):
  """An evaluator whose score is best where 'w' is the target."""
  return evaluation.Evaluator(
    lambda params, data: {'t': -jnp.sum(jnp.square(params['w'] - data))},
    jnp.asarray(target, jnp.float32),
  )


class PatchTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2)).astype(np.float32)
    # Each task mostly looks at the feature that its labels are of.
    self.tasks = {
      'old': (x * np.float32([1, 0.3]), x[:, 0] > 0),
      'new': (x * np.float32([0.3, 1]), x[:, 1] > 0),
    }
    self.zero = {'w': np.array([1.0, 0], np.float32)}
    self.tuned = {'w': np.array([0, 1.0], np.float32)}

  def evaluate(self, params):
    return {
      name: float(np.equal(x @ np.asarray(params['w']) > 0, y).mean())
      for name, (x, y) in self.tasks.items()
    }

  def test_two_tasks_in_conflict(self):
    done = patch.single(
      self.zero, self.tuned, self.evaluate, patch.objective(['old'], ['new'])
    )
    self.assertBetween(done.alphas[0], 0.05, 0.95)
    mean = [one.objective for one in done.log.candidates]
    self.assertGreater(max(mean), max(mean[0], mean[-1]))
    before = self.evaluate(self.zero)
    bounded = patch.single(
      self.zero, self.tuned, self.evaluate,
      patch.objective(['old'], ['new'], most_lost=0.05, before=before),
    )  # fmt: skip
    after = self.evaluate(bounded.params)
    self.assertGreaterEqual(after['old'], before['old'] - 0.05)
    self.assertGreater(after['new'], before['new'])

  def test_joint_is_one_fine_tuning_and_one_alpha(self):
    done = patch.joint(
      self.zero, lambda params: self.tuned, self.evaluate, ['old'], ['new']
    )
    goal = patch.objective(['old'], ['new'])
    single = patch.single(self.zero, self.tuned, self.evaluate, goal)
    self.assertEqual(done.alphas, single.alphas)
    np.testing.assert_array_equal(done.params['w'], single.params['w'])

  def test_parallel_search(self):
    goal = patch.objective(['old'], ['new'])
    models = [self.tuned, {'w': np.array([1.0, 0.5], np.float32)}]
    runs = [
      patch.parallel(self.zero, models, self.evaluate, goal, budget=12)
      for _ in range(2)
    ]
    self.assertEqual(runs[0].alphas, runs[1].alphas)
    self.assertLen(runs[0].log.candidates, 12)
    alone = patch.parallel(self.zero, models[:1], self.evaluate, goal)
    single = patch.single(self.zero, self.tuned, self.evaluate, goal)
    self.assertEqual(alone.alphas, single.alphas)

  def test_bad_input(self):
    goal = patch.objective(['old'], ['new'])
    for message, call in (
      ('alpha goes from 0', lambda: patch.single(
          self.zero, self.tuned, self.evaluate, goal, alphas=[1.5])),
      ('should have been frozen', lambda: patch.single(
          self.zero, self.tuned, self.evaluate, goal, frozen='w')),
      ('neww', lambda: patch.single(
          self.zero, self.tuned, self.evaluate,
          patch.objective(['old'], ['neww']))),
      ('at least one task', lambda: patch.objective(['old'], [])),
      ('both', lambda: patch.objective(['old'], ['old'])),
    ):  # fmt: skip
      with self.assertRaisesRegex(errors.UserError, message):
        call()


class GreedyTest(absltest.TestCase):
  def test_a_bad_model_is_left_out(self):
    rng = np.random.default_rng(0)
    good = [
      {'w': (1 + 0.1 * rng.normal(size=4)).astype(np.float32)} for _ in range(3)
    ]
    models = [*good, {'w': rng.normal(size=4).astype(np.float32) * 9}]
    loss = lambda params: float(np.square(params['w'] - 1).sum())
    soup = greedy.greedy(models, loss, higher_is_better=False)
    self.assertNotIn(3, soup.ingredients)
    self.assertLessEqual(soup.score, min(soup.single_scores))

  def test_undefined_scores_are_worst(self):
    models = [{'w': np.full(1, k, np.float32)} for k in range(3)]
    score = lambda p: float('nan') if p['w'][0] == 1 else float(p['w'][0])
    soup = greedy.greedy(models, score)
    self.assertEqual(soup.order[-1], 1)
    self.assertEqual(soup.ingredients, (2,))

  def test_integers_and_dtypes(self):
    models = [
      {'n': np.array([3]), 'w': np.full(2, k, jnp.bfloat16)} for k in range(2)
    ]
    soup = greedy.greedy(models, lambda p: 1.0)
    self.assertEqual(soup.params['w'].dtype, jnp.bfloat16)
    np.testing.assert_array_equal(soup.params['n'], [3])

  def test_killed_and_resumed(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    rng = np.random.default_rng(0)
    models = [{'w': rng.normal(size=3).astype(np.float32)} for _ in range(4)]
    score = lambda p: -float(np.square(p['w']).sum())
    greedy.greedy(models, score, log=base.Log(folder / 'whole.jsonl'))
    for stop in (1, 3, 6):
      calls = []

      def evaluate(params, calls=calls, stop=stop):
        calls.append(1)
        if len(calls) > stop:
          raise KeyboardInterrupt
        return score(params)

      try:
        greedy.greedy(models, evaluate, log=base.Log(folder / 'log.jsonl'))
      except KeyboardInterrupt:
        with open(folder / 'log.jsonl', 'a') as stream:
          stream.write('{"point": [1')  # killed within a line
    soup = greedy.greedy(models, score, log=base.Log(folder / 'log.jsonl'))
    self.assertNotEmpty(soup.ingredients)
    self.assertEqual(
      (folder / 'log.jsonl').read_bytes(), (folder / 'whole.jsonl').read_bytes()
    )

  def test_bad_input(self):
    with self.assertRaisesRegex(errors.UserError, 'at least one'):
      greedy.greedy([], lambda p: 0.0)
    with self.assertRaisesRegex(errors.UserError, 'each of 0 to 0'):
      greedy.greedy([{'w': np.ones(1)}], lambda p: 0.0, order=[1])
    with self.assertRaisesRegex(errors.UserError, '- w'):
      greedy.greedy([{'w': np.ones(1)}, {'v': np.ones(1)}], lambda p: 0.0)


def make_models(count=3, seed=0):
  rng = np.random.default_rng(seed)
  tree = lambda: {
    'layers_0': {'w': rng.normal(size=(4, 3)).astype(np.float32)},
    'layers_1': {'w': rng.normal(size=(4, 3)).astype(np.float32)},
    'norm': rng.normal(size=3).astype(np.float32),
  }
  return [tree() for _ in range(count)]


def square_loss(params, batch, heat):
  hidden = jnp.tanh(batch @ params['layers_0']['w'])
  out = heat * jnp.sum(hidden @ params['layers_1']['w'].T, axis=1)
  return jnp.mean(jnp.square(out - 1)) + jnp.sum(jnp.square(params['norm']))


class GradientTest(parameterized.TestCase):
  @parameterized.product(
    granularity=('model', 'block', 'leaf'), constraint=('softmax', 'none')
  )
  def test_streamed_gradient_equals_autodiff(self, granularity, constraint):
    models, origin = make_models(), make_models(1, seed=1)[0]
    batch = jnp.asarray(
      np.random.default_rng(2).normal(size=(5, 4)), jnp.float32
    )
    step = gradient.learn(
        models, square_loss, [batch], granularity=granularity,
        constraint=constraint, base_model=origin, optimizer=optax.sgd(1.0),
        temperature=False,
    )  # fmt: skip
    groups = list(step.raw)
    self.assertLen(groups, {'model': 1, 'block': 3, 'leaf': 3}[granularity])

    def whole(raw):
      mixed = {}
      for path, leaf in {
        'layers_0/w': origin['layers_0']['w'],
        'layers_1/w': origin['layers_1']['w'],
        'norm': origin['norm'],
      }.items():
        if granularity == 'model':
          group = '*'
        elif granularity == 'leaf':
          group = path
        else:
          group = next((g for g in groups if g in path), '*')
        weights = raw[group]
        if constraint == 'softmax':
          weights = jax.nn.softmax(weights)
        get = lambda m, path=path: (
          m['norm'] if path == 'norm' else m[path[:8]]['w']
        )
        mixed[path] = leaf + sum(
          weights[k] * (get(m) - leaf) for k, m in enumerate(models)
        )
      return square_loss({
          'layers_0': {'w': mixed['layers_0/w']},
          'layers_1': {'w': mixed['layers_1/w']}, 'norm': mixed['norm'],
      }, batch, 1.0)  # fmt: skip

    raw = {g: jnp.full(3, 0.3) for g in groups}
    value, expected = jax.value_and_grad(whole)(raw)
    self.assertAlmostEqual(step.losses[0], float(value), places=4)
    for g in groups:
      np.testing.assert_allclose(
        0.3 - step.raw[g], expected[g], rtol=1e-4, atol=2e-6
      )

  def test_a_dominated_model_shrinks(self):
    models = [{'w': np.zeros(3, np.float32)}, {'w': np.full(3, 5, np.float32)}]
    loss = lambda params, batch, heat: jnp.sum(jnp.square(params['w']))
    learned = gradient.learn(models, loss, [None] * 30, temperature=False)
    weights = learned.coefficients['*']
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)
    self.assertLess(weights[1], 0.25)
    self.assertLess(learned.losses[-1], learned.losses[0])

  def test_sharded_equals_unsharded(self):
    mesh = partition.make_mesh(data=2, model=4)
    layout = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec('model', 'data')
    )
    rng = np.random.default_rng(0)
    models = [
      {'w': rng.normal(size=(8, 4)).astype(np.float32)} for _ in range(3)
    ]
    loss = lambda p, batch, heat: jnp.sum(jnp.square(p['w'] - batch))
    one = gradient.learn(models, loss, [1.0] * 5)
    spread = [jax.device_put(m, layout) for m in models]
    many = gradient.learn(spread, loss, [1.0] * 5)
    self.assertEqual(many.params['w'].sharding.device_set, set(jax.devices()))
    np.testing.assert_allclose(one.losses, many.losses, rtol=1e-5)
    np.testing.assert_allclose(
      one.coefficients['*'], many.coefficients['*'], rtol=1e-5
    )

  def test_killed_and_resumed_gives_the_same_bits(self):
    journal = pathlib.Path(self.create_tempdir().full_path) / 'journal'
    models = make_models()
    batches = list(np.random.default_rng(2).normal(size=(9, 5, 4)))
    batches = [jnp.asarray(b, jnp.float32) for b in batches]
    whole = gradient.learn(models, square_loss, batches, granularity='leaf')

    def progress(step, loss):
      if step == 5:
        raise KeyboardInterrupt

    run = lambda **more: gradient.learn(
        models, square_loss, batches, granularity='leaf', journal=journal,
        save_every=2, **more,
    )  # fmt: skip
    with self.assertRaises(KeyboardInterrupt):
      run(progress=progress)
    again = run()
    self.assertEqual(again.losses, whole.losses)
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    self.assertFalse(journal.exists())

    def terminate(step, loss):
      self.assertGreater(step, 0)
      if step == 5:
        signal.raise_signal(signal.SIGTERM)

    with self.assertRaisesRegex(errors.Stopped, 'after 5 updates'):
      run(progress=terminate)
    steps = []
    again = run(progress=lambda step, loss: steps.append(step))
    self.assertEqual(steps, [6, 7, 8, 9])  # all five were kept, not four
    self.assertEqual(again.losses, whole.losses)
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)
    with self.assertRaises(KeyboardInterrupt):
      run(progress=progress)
    with self.assertRaisesRegex(errors.UserError, 'constraint: softmax there'):
      run(constraint='clip')

  def test_bad_input(self):
    models = make_models(2)
    nan = lambda params, batch, heat: jnp.nan * params['norm'][0]
    with self.assertRaisesRegex(errors.UserError, 'loss of update 0'):
      gradient.learn(models, nan, [None])
    with self.assertRaisesRegex(errors.UserError, 'at least one'):
      gradient.learn([], nan, [None])
    with self.assertRaisesRegex(errors.UserError, "'leaf'"):
      gradient.learn(models, nan, [None], granularity='leav')


class SpaceTest(parameterized.TestCase):
  @parameterized.parameters(
    dict(method='linear', vary='weights'),
    dict(method='task_arithmetic', vary='scale'),
    dict(method='task_arithmetic', vary='weight', high=2.0),
    dict(method='ties', vary='scale', options={'density': 0.5}),
    dict(
      method='ties',
      vary='scale',
      options={'density': [0.5, 0.3]},
      weights=(0.4, 0.9),
    ),
    dict(method='linear', vary='weights', blocks=('layers_0/', '*')),
    dict(method='task_arithmetic', vary='scale', blocks=('layers_0/', '*')),
    dict(
      method='ties',
      vary='weights',
      options={'density': 0.5, 'trim_scope': 'tensor'},
      blocks=('layers_0/', '*'),
    ),
  )
  def test_the_recipe_gives_the_same_merge(self, **fields):
    folder = pathlib.Path(self.create_tempdir().full_path)
    models = make_models(2)
    origin = make_models(1, seed=1)[0]
    names = []
    for i, model in enumerate([origin, *models]):
      names.append(str(folder / f'{i}'))
      mj.save_checkpoint(names[-1], model, 'safetensors')
    space = base.Space(count=2, **fields)
    point = np.random.default_rng(0).uniform(0.1, 1, len(space.names))
    needs_base = fields['method'] != 'linear'
    here = jax.jit(lambda models, point: space.merge(
        models, point, base=origin if needs_base else None
    ))(models, jnp.asarray(point, jnp.float32))  # fmt: skip
    recipe = space.to_recipe(point, names[1:], names[0] if needs_base else None)
    if fields['method'] == 'ties':
      recipe['parameters']['normalize'] = space.options.get('normalize', True)
    out = folder / 'out'
    mj.execute(mj.plan(recipe_lib.parse_recipe(recipe)), out)
    there = mj.open_checkpoint(out).read()
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
      here,
      there,
    )

  def test_blocks_of_what_looks_at_a_whole_model_are_refused(self):
    """Their recipe would not be what was scored."""
    for method, options in (('ties', {'trim_scope': 'global'}), ('fisher', {})):
      make = lambda blocks, method=method, options=options: base.Space(
        method, 2, options=options, blocks=blocks
      )
      make(('*',))
      with self.assertRaisesRegex(errors.ConfigError, 'looks at a whole model'):
        make(('layers_0/', '*'))

  def test_learned_coefficients_of_leaves_that_share_part_of_their_path(self):
    rng = np.random.default_rng(0)
    tree = lambda: {
      'conv': {'kernel': rng.normal(size=3).astype(np.float32)},
      'layer': {'conv': {'kernel': rng.normal(size=3).astype(np.float32)}},
    }
    models = [tree(), tree()]
    coefficients = {
      'conv/kernel': np.array([1.0, 0.0]),
      'layer/conv/kernel': np.array([0.0, 1.0]),
    }
    space, point = base.learned_space('linear', coefficients)
    merged = space.merge(models, np.float32(point))
    np.testing.assert_allclose(
      merged['conv']['kernel'], models[0]['conv']['kernel']
    )
    np.testing.assert_allclose(
      merged['layer']['conv']['kernel'], models[1]['layer']['conv']['kernel']
    )

  def test_bad_spaces(self):
    with self.assertRaisesRegex(errors.UserError, "'scale'"):
      base.Space('task_arithmetic', 2, vary='scail')
    with self.assertRaisesRegex(errors.UserError, 'low < high'):
      base.Space('linear', 2, low=1.0, high=0.0)


class GridTest(absltest.TestCase):
  def test_one_program_finds_the_best(self):
    models = [{'w': np.zeros(2, np.float32)}, {'w': np.ones(2, np.float32)}]
    space = base.Space('linear', 2, options={'normalize': False})
    traces = []

    def merge(models, point):
      traces.append(1)
      return space.merge(models, jnp.stack([1 - point[0], point[0]]))

    points = np.linspace(0, 1, 21)[:, None]
    log = grid.grid(merge, models, quadratic(0.35), points)
    self.assertAlmostEqual(log.best().point[0], 0.35)
    self.assertLen(log.candidates, 21)
    self.assertLen(traces, 1)
    plain = grid.grid(
      merge, models,
      lambda p: {'t': -float(np.square(p['w'] - 0.35).sum())}, points,
    )  # fmt: skip
    np.testing.assert_allclose(
      [one.objective for one in plain.candidates],
      [one.objective for one in log.candidates],
      atol=1e-6,
    )

  def test_lattice(self):
    points = grid.lattice(base.Space('linear', 2), 3)
    self.assertEqual(points.shape, (9, 2))
    with self.assertRaisesRegex(errors.UserError, "'cmaes'"):
      grid.lattice(base.Space('linear', 8), 11)

  def test_pairs(self):
    points = grid.pairs(5)
    np.testing.assert_allclose(
      points, goldens.load('fisher_merging')['pairwise_grid_5']
    )
    drawn = grid.dirichlet(3, 4, seed=1)
    np.testing.assert_allclose(drawn.sum(axis=1), 1)
    np.testing.assert_array_equal(drawn, grid.dirichlet(3, 4, seed=1))


class EvolveTest(parameterized.TestCase):
  @parameterized.parameters('random', 'one_plus_one', 'cmaes')
  def test_finds_resumes_and_repeats(self, strategy):
    folder = pathlib.Path(self.create_tempdir().full_path)
    space = base.Space('linear', 3, low=-1.0)
    target = np.array([0.3, -0.2, 0.6])
    calls = []

    def evaluate(point):
      calls.append(1)
      return {'t': -float(np.square(point - target).sum())}

    run = lambda name, evaluate=evaluate, **more: evolve.evolve(
        space, evaluate, budget=60, strategy=strategy, seed=3,
        log=base.Log(folder / name, {'strategy': strategy}), **more,
    )  # fmt: skip
    whole = run('whole')
    self.assertGreater(
      whole.best().objective, -0.3 if strategy == 'random' else -0.04
    )

    def progress(done, total):
      if done == 25:
        raise KeyboardInterrupt

    with self.assertRaises(KeyboardInterrupt):
      run('killed', progress=progress)
    calls.clear()
    run('killed')
    self.assertLen(calls, 35)
    self.assertEqual(
      (folder / 'whole').read_bytes(), (folder / 'killed').read_bytes()
    )

  @parameterized.parameters('evolve', 'grid', 'grid_compiled', 'greedy')
  def test_stopped_when_the_answer_is_written(self, strategy):
    folder = pathlib.Path(self.create_tempdir().full_path)
    rng = np.random.default_rng(0)
    models = [{'w': rng.normal(size=3).astype(np.float32)} for _ in range(4)]
    space = base.Space('linear', 4)
    calls = []

    def score(params):
      calls.append(1)
      if len(calls) == 3 and terminate:
        signal.raise_signal(signal.SIGTERM)
      return {'t': -float(np.square(params['w']).sum())}

    traced = evaluation.Evaluator(
      lambda p, data: {'t': -jnp.vdot(p['w'], p['w'])}, 0
    )
    points = grid.dirichlet(4, 6)

    def progress(done, total):
      if terminate and done == 2 and strategy == 'grid_compiled':
        signal.raise_signal(signal.SIGTERM)

    def run(name):
      with base.Log(folder / name, {'strategy': strategy, 'n': 4}) as log:
        if strategy == 'greedy':
          greedy.greedy(models, score, log=log)
        elif strategy == 'evolve':
          evaluate = lambda p: score(space.merge(models, jnp.asarray(p)))
          evolve.evolve(space, evaluate, budget=6, log=log)
        else:
          evaluate = score if strategy == 'grid' else traced
          grid.grid(
              space.merge, models, evaluate, points, log=log, chunk=2,
              progress=progress,
          )  # fmt: skip
      return log

    terminate = False
    run('whole')
    terminate = True
    calls.clear()
    count = 2 if strategy == 'grid_compiled' else 3
    with self.assertRaisesRegex(errors.Stopped, f'after {count} candidates'):
      run('stopped')
    self.assertLen((folder / 'stopped').read_text().splitlines(), 1 + count)
    terminate = False
    run('stopped')
    self.assertEqual(
      (folder / 'whole').read_bytes(), (folder / 'stopped').read_bytes()
    )

  def test_log_of_another_search(self):
    path = pathlib.Path(self.create_tempdir().full_path) / 'log'
    base.Log(path, {'seed': 1})
    with self.assertRaisesRegex(errors.UserError, 'other settings'):
      base.Log(path, {'seed': 2})
    found = json.loads(path.read_text())['search']['work']
    self.assertEqual(found, {'seed': 1})

  def test_no_finite_score(self):
    log = base.Log()
    log.add([0.0], {'t': float('nan')})
    with self.assertRaisesRegex(errors.UserError, 'finite'):
      log.best()


if __name__ == '__main__':
  absltest.main()
