# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Training as a library: a model, an optimizer, batches; the rest has defaults."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import functools
import os
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mergejax import models
from mergejax import partition
from mergejax.checkpoints import base as store_base
from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.training import batches as batches_lib
from mergejax.training import callbacks as callbacks_lib
from mergejax.training import checkpoints as checkpoints_lib
from mergejax.training import frozen
from mergejax.training import layer_moments
from mergejax.training import loop
from mergejax.training import objective as objective_lib
from mergejax.training import optim
from mergejax.training import run as run_lib
from mergejax.training import state as state_lib
from mergejax.training import step as step_lib
from mergejax.training import streams
from mergejax.training import t5x_state
from mergejax.training import transforms as transforms_lib


class Trainer:
  """Trains one model on a mesh.

  Parameters and moments are born in their shards, saved from them, and read
  back into those of any other mesh.

  Example:
    >>> import optax
    >>> module = models.build({'model_type': 'mlp', 'hidden': (4,)})
    >>> batch = models.family_of(module).example_batch(8)
    >>> trainer = Trainer(module, optax.sgd(0.1))
    >>> int(trainer.fit([batch] * 3, steps=3).step)
    3
  """

  # Logical axes in front of every array of the state.
  lead: tuple[str, ...] = ()
  # Names of experts that train side by side.
  experts: Sequence[str] | None = None

  def __init__(
    self,
    model: nn.Module | models.ModelFamily,
    optimizer: optim.OptimizerLike,
    *,
    objective: objective_lib.Objective | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: partition.ShardingRules | None = None,
    transforms: Sequence[transforms_lib.StepTransform] = (),
    callbacks: Sequence[callbacks_lib.Callback] = (),
    freeze: Sequence[str] = (),
    accumulate: int = 1,
    clip: float | None = None,
    allow_float16: bool = False,
  ):
    """Says what is trained, how and where.

    Args:
      model: a module that a family knows, or a family: your own module in
        `models.Classifier(module, example=batch)`.
      optimizer: an optax transformation, or a function that makes one when it
        is given `steps=`, such as `functools.partial(optim.adafactor, rate)`.
      objective: what is minimised; `objective.cross_entropy()` by default.
      mesh: where; by default all devices, rows of a batch over them.
      rules: what lies where on the mesh; `partition.ShardingRules()` by
        default, tensor parallelism over `model`.
      transforms: what a step does besides; see `transforms`.
      callbacks: what the run tells and asks; see `callbacks`, `scoring.evaluate`.
      freeze: see `step.make_step`.
      accumulate: likewise.
      clip: likewise.
      allow_float16: a model that computes in float16, whose largest number is
        65504, is refused otherwise: feed-forward blocks of T5 exceed it, and
        nothing here scales the loss. bfloat16 is as fast.

    Raises:
      ConfigError: the model computes in float16.
    """
    self.family = models.family_of(model)
    if not allow_float16:
      _refuse_float16(self.family)
    self.mesh = partition.make_mesh() if mesh is None else mesh
    self.rules = rules or partition.ShardingRules()
    self.optimizer = optimizer
    self._fresh = jax.jit(self.family.init)
    self._transforms = tuple(transforms)
    self._callbacks = tuple(callbacks)
    self._settings = {
      'objective': objective,
      'transforms': self._transforms,
      'freeze': tuple(freeze),
      'accumulate': accumulate,
      'clip': clip,
    }
    # What `step` was asked for last with its step, and that step's programs.
    self._kept: tuple[tuple[Any, ...], step_lib.Step] | None = None
    self._programs: dict[tuple[Any, ...], Callable[..., Any]] = {}

  def fit(
    self,
    batches: Iterable[Mapping[str, Any]] | loop.Stream,
    *,
    steps: int,
    directory: os.PathLike | str | None = None,
    key: jax.Array | None = None,
    params: typing.Tree | None = None,
    state: state_lib.TrainState | Sequence[state_lib.TrainState] | None = None,
    local_rows: bool = False,
    save_every: int = 1000,
    log_every: int = 10,
    phase: str = 'train',
  ) -> state_lib.TrainState:
    """Trains until step `steps`; the same call continues a run in its folder.

    Another call compiles nothing anew where batches have the same shapes and
    the step is the same, see `step`.

    Args:
      batches: dicts of arrays, a stream without end or an iterable.
      steps: the step number to reach.
      directory: where the run is kept: `checkpoints`, and what callbacks
        write. Without it nothing is saved.
      key: seeds fresh parameters and everything random; `key(0)` by default.
      params: to start from; fresh ones by default.
      state: to start from, with its moments and step number, instead; of one
        model, and left as it is. Experts side by side may have one each.
      local_rows: see `batches.placer`.
      save_every: steps between checkpoints.
      log_every: steps between logged metrics.
      phase: its name, for people.

    Returns:
      The trained state, on the mesh.

    Raises:
      errors.Stopped: SIGTERM came; the state is saved.
      UserError: see `loop.fit`; a batch that the model does not know.
    """
    loop.check_numbers(steps=steps, save_every=save_every, log_every=log_every)
    key = jax.random.key(0) if key is None else key
    # Of experts, and of rows of its own, each process gives others.
    whole = not local_rows and not self.lead
    stream = streams.of(batches, whole=whole)
    step = self.step(steps)
    layout = self.layout(step)
    directory = None if directory is None else pathlib.Path(directory)
    run = run_lib.Run(
      self.family, self.mesh, steps, phase, directory, self.experts,
      {each.name: each for each in self._transforms},
      optim.of_run(self.optimizer, steps),
    )  # fmt: skip
    callbacks = [
      each
      for each in self._callbacks
      if each.everywhere or jax.process_index() == 0
    ]
    # Whatever fails, everything is closed: callbacks in order, then checkpoints.
    with contextlib.ExitStack() as closing:
      checkpoints = None
      if directory is not None:
        checkpoints = checkpoints_lib.Checkpoints(directory / 'checkpoints')
        closing.callback(checkpoints.close)
      for callback in reversed(callbacks):
        closing.callback(callback.close)
      for callback in callbacks:
        callback.on_start(run)
      if checkpoints is not None and checkpoints.latest() is not None:
        begin = self._shapes(step, layout)
      else:
        begin = self.init(step, layout, key, params, state)
      return loop.fit(
        self.compile(step, layout),
        begin,
        stream,
        steps=steps,
        checkpoints=checkpoints,
        save_every=save_every,
        log_every=log_every,
        callbacks=callbacks,
        checks=[each.check for each in self._transforms if each.check],
        place=self._ready(self.placer(str(stream), local_rows)),
      )

  # Its parts, for whoever runs a loop of their own ----------------------------

  @functools.cached_property
  def specs(self) -> typing.SpecTree:
    """What the parameters are, with logical axes."""
    # Traced here and compiled in `init`, the model is read once for both.
    return self.family.specs(jax.eval_shape(self._fresh, jax.random.key(0)))

  def step(self, steps: int) -> step_lib.Step:
    """The step of one model in a run of `steps` steps.

    The last one is kept with what was compiled of it, and given again as long
    as the optimizer, the mesh, the rules and, of an optimizer that is made for
    a number of steps, that number are the same.
    """
    fixed = isinstance(self.optimizer, optax.GradientTransformation)
    asked = (
      self.optimizer, None if fixed else steps, self.mesh, self.rules,
      *self._settings.values(),
    )  # fmt: skip
    if self._kept is None or self._kept[0] != asked:
      optimizer = optim.of_run(self.optimizer, steps, self._stacks())
      made = step_lib.make_step(self.family, optimizer, **self._settings)
      self._kept = asked, made
      self._programs.clear()
    return self._kept[1]

  def layout(self, step: step_lib.Step) -> state_lib.TrainState:
    """Where every array of the state lies: a `TrainState` of shardings."""
    return state_lib.shardings(
      self._abstract(step), self.specs, self.mesh, self.rules,
      lead=self.lead,
    )  # fmt: skip

  def init(
    self,
    step: step_lib.Step,
    layout: state_lib.TrainState,
    key: jax.Array,
    params: typing.Tree | None = None,
    state: Any = None,
  ) -> state_lib.TrainState:
    """A state to start from, every array born in its shards."""
    if state is not None:
      self._check_state(step, state)
      # A copy: a step overwrites its state, the one given is the caller's.
      placed = self._put(state, self._single(step), alias=False)
      if not self.lead:
        return placed
      return self._program('expand', step, layout, self.expand)(placed)
    if params is None:
      fresh = lambda key: self.expand(step.init(self._fresh(key), key))
      return self._program('fresh', step, layout, fresh)(key)
    tree.check_same(
      self.specs, tree.specs(params),
      expected_name='the model', given_name='the given parameters',
    )  # fmt: skip
    params = self._put(params, self._single(step).params)
    begin = lambda params, key: self.expand(step.init(params, key))
    return self._program('begin', step, layout, begin)(params, key)

  def compile(
    self, step: step_lib.Step, layout: state_lib.TrainState
  ) -> loop.StepFn:
    """The compiled step; its state is donated and keeps its layout."""

    def update(state, batch):
      with partition.rules_of(self.mesh, self.rules):
        return step.update(state, batch)

    metrics = partition.sharding(self.mesh, self.lead)
    return self._program(
      'update', step, (layout, metrics), self.map(update), donate_argnums=(0,)
    )

  def placer(
    self, source: str = 'the data', local_rows: bool = False
  ) -> Callable[[Mapping[str, Any]], dict[str, jax.Array]]:
    """A function that checks a batch and puts it on the mesh."""
    check = self._checker(source)
    place = batches_lib.placer(self.mesh, self.rules, local_rows=local_rows)
    return lambda batch: place(check(batch))

  def begin(
    self,
    steps: int,
    params: typing.Tree,
    key: jax.Array,
    store: store_base.ParamStore | None = None,
  ) -> state_lib.TrainState:
    """A state to start from: of step 0, or with a stored run's moments.

    Args:
      steps: the step number to reach.
      params: of one model.
      key: of the run.
      store: from `checkpoint.open_state`, of T5X or of a run of ours with the
        same optimizer; its step number counts on. Layers may be scanned there
        and not here, or the other way.

    Raises:
      UserError: the moments are none of this optimizer's; the stored run is at
        or beyond `steps` already.
    """
    state = jax.jit(self.step(steps).init)(params, key)
    if store is None:
      return state
    there = self.family.stored_as(_parameters(store))
    optimizer = optim.of_run(self.optimizer, steps, self._stacks())
    if there is not self.family:
      other = Trainer(
        there, self.optimizer, mesh=self.mesh, rules=self.rules,
        freeze=self._settings['freeze'], allow_float16=True,
      )  # fmt: skip
      given = tree.unflatten(there.arranged(tree.flatten(params)))
      found = other.begin(steps, given, key, store)
      form = other.specs, optim.of_run(self.optimizer, steps, other._stacks())
      moments = layer_moments.restack(
        found.opt_state, form, state.opt_state, (self.specs, optimizer)
      )
      return state.replace(step=found.step, opt_state=moments)
    if any(path.startswith('opt_state/') for path in store.specs()):
      state = checkpoints_lib.continued(store, state)
    else:
      state = t5x_state.restore(store, state, self.specs, optimizer)
    if state.step >= steps:
      raise errors.ConfigError(
        f'{store.name} is of step {state.step}, and the run is to reach step '
        f'{steps}: steps made before count too. Ask for {state.step} and as '
        'many more as it should train.'
      )
    return state

  # What a trainer of several models does otherwise -----------------------------

  def expand(self, state: state_lib.TrainState) -> state_lib.TrainState:
    """The state of this run from that of one model; traceable."""
    return state

  def map(self, fn: Callable[..., Any]) -> Callable[..., Any]:
    """A step of this run from that of one model."""
    return fn

  def _checker(self, source):
    return batches_lib.checker(
      self.family, source, stacked=bool(self.lead),
      objective=self._settings['objective'],
    )  # fmt: skip

  def _ready(self, place):
    """Places batches, and adds what the objective computes before a step."""
    prepared = getattr(self._settings['objective'], 'prepared', None)
    if prepared is None:
      return place
    ready = prepared(self.mesh, self.rules, stacked=bool(self.lead))
    return lambda batch: ready(place(batch))

  def _program(self, name, step, layout, fn, **settings):
    """A compiled function of a step, results in their layout; made once.

    Of other shapes or shardings of its arguments jax compiles it again.
    """
    asked = (name, step, *jax.tree.leaves(layout))
    if asked not in self._programs:
      if self._kept is not None and step is not self._kept[1]:
        return jax.jit(fn, out_shardings=layout, **settings)  # an older step
      self._programs[asked] = jax.jit(fn, out_shardings=layout, **settings)
    return self._programs[asked]

  def _stacks(self):
    """Axes of the stacked parameters that learn, by path."""
    stacked = {
      path: spec.axes
      for path, spec in self.specs.items()
      if axes_lib.stacked(spec)
    }
    if not stacked:
      return {}
    every, freeze = dict.fromkeys(self.specs, 0), self._settings['freeze']
    fixed = frozen.paths(self.family, every, freeze)
    return {path: axes for path, axes in stacked.items() if path not in fixed}

  def _abstract(self, step):
    """Shapes of the state of one model."""
    params = tree.unflatten(
      {
        path: jax.ShapeDtypeStruct(spec.shape, spec.dtype)
        for path, spec in self.specs.items()
      }
    )
    return jax.eval_shape(step.init, params, jax.random.key(0))

  def _shapes(self, step, layout):
    """Shapes of the state of this run, each with its sharding."""
    return jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=place
      ),
      jax.eval_shape(self.expand, self._abstract(step)),
      layout,
    )

  def _single(self, step):
    """Where the state of one model lies."""
    return state_lib.shardings(
      self._abstract(step), self.specs, self.mesh, self.rules
    )

  def _check_state(self, step, state):
    """Raises if a state is not one of this run's model, with all it keeps."""
    tree.check_same(
      tree.specs(self._abstract(step)), tree.specs(state),
      expected_name='this run (model, optimizer, freeze, transforms)',
      given_name='the given state',
    )  # fmt: skip

  def _put(self, values, layout, alias=True):
    put = functools.partial(batches_lib.whole, alias=alias)
    return jax.tree.map(put, values, layout)


def _parameters(store):
  """The parameters of a stored run, ours or T5X's, as specs."""
  return {
    path.partition('/')[2]: spec
    for path, spec in store.specs().items()
    if path.startswith(('params/', 'target/'))
  }


def _refuse_float16(family):
  dtype = getattr(family.config, 'dtype', None)
  if dtype is not None and jnp.dtype(dtype) == jnp.float16:
    raise errors.ConfigError(
      f'The {family.model_type} model computes in float16, whose largest number '
      'is 65504: activations of T5 exceed it, and the loss becomes NaN. Set '
      "dtype='bfloat16', which is as fast; allow_float16=True trains it all the "
      'same.'
    )
