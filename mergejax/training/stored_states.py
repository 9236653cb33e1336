# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A stored training state in another form: T5X's or ours, scanned or not.

A checkpoint does not say which optimizer it is of. What its state looks like
does: Adafactor's moments by what is factored, AdamW's by theirs. No setting that
leaves no trace there (learning rates, decays) is needed to lay it otherwise.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import itertools
import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
import optax

from mergejax import models
from mergejax.checkpoints import checkpoint
from mergejax.core import axes as axes_lib
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import tree
from mergejax.training import checkpoints as checkpoints_lib
from mergejax.training import layer_moments
from mergejax.training import optim
from mergejax.training import state as state_lib
from mergejax.training import t5x_slots
from mergejax.training import t5x_state

FORMATS = ('t5x', 'orbax')
_T5X = 'state/param_states/'
_OURS = 'opt_state/'
# T5X's own limit, and that of optax.
_USUAL_SIZE = 128


@dataclasses.dataclass(frozen=True)
class Stored:
  """A training state, and whose it is.

  Attributes:
    family: of the model, its layers as they lie in `state`.
    settings: of an optimizer whose state looks like this: what makes it, under
      `maker`, and the options that show in the shapes.
    state: in host memory.
    left_out: parts of the checkpoint that are not in it.
  """

  family: models.ModelFamily
  settings: Mapping[str, Any]
  state: state_lib.TrainState
  left_out: tuple[str, ...] = ()

  @property
  def optimizer(self) -> optax.GradientTransformation:
    """One whose state looks like this; it has no learning rate to train by."""
    return _made(self.settings, self.family.specs())


def read(path: os.PathLike | str, model: models.ModelFamily | Any) -> Stored:
  """Reads a training state.

  Args:
    path: a step, or a run's folder, of T5X or of ours.
    model: whose it is; its layers may be scanned there or not.

  Raises:
    UserError: nothing is there, or parameters alone; moments of an optimizer
      that is neither Adafactor nor AdamW.
  """
  path = pathlib.Path(path).expanduser()
  # A run's folder has more: what it exported holds parameters alone.
  if checkpoints_lib.has_steps(path / 'checkpoints'):
    path = path / 'checkpoints'
  path = checkpoint.at_step(path)
  store, weights = checkpoint.open_state(path), checkpoint.open_checkpoint(path)
  family = models.family_of(model).stored_as(weights.specs())
  tree.check_same(
    family.specs(), weights.specs(),
    expected_name='the model', given_name=str(path),
  )  # fmt: skip
  names = [p for p in store.specs() if p.startswith((_T5X, _OURS))]
  if not names:
    raise errors.CheckpointError(
      f'{path} has parameters, and no state of an optimizer: convert it without '
      '--state.'
    )
  theirs = names[0].startswith(_T5X)
  prefix, step_name = (_T5X, 'state/step') if theirs else (_OURS, 'step')
  shapes = {n.removeprefix(prefix): store.specs()[n].shape for n in names}
  settings, like = _recognised(path, shapes, family.specs(), theirs)
  optimizer = _made(settings, family.specs())
  leaves = tree.flatten(store.read([*names, step_name]))
  step = int(np.asarray(leaves.pop(step_name)))
  moments = {name.removeprefix(prefix): x for name, x in leaves.items()}
  if theirs:
    found = t5x_state.from_t5x(moments, step, like, family.specs(), optimizer)
  else:
    found = tree.map_paths(lambda place, _: np.asarray(moments[place]), like)
  key = np.zeros(2, np.uint32)
  if 'key' in store.specs():
    key = tree.flatten(store.read(['key']))['key']
  state = state_lib.TrainState(np.int32(step), weights.read(), found, key)
  parts = {p.partition('/')[0] for p in store.specs()} if not theirs else set()
  known = {'params', 'opt_state', 'step', 'key'}
  return Stored(family, settings, state, tuple(sorted(parts - known)))


def restacked(stored: Stored, model: models.ModelFamily | Any) -> Stored:
  """The same state with its layers as another model of the kind has them.

  Raises:
    CheckpointError: see `layer_moments.restack`.
  """
  there, here = stored.family, models.family_of(model)
  optimizer = _made(stored.settings, here.specs())
  like = jax.eval_shape(optimizer.init, _shapes(here.specs()))
  moments = layer_moments.restack(
    stored.state.opt_state, (there.specs(), stored.optimizer),
    like, (here.specs(), optimizer),
  )  # fmt: skip
  leaves = tree.flatten(stored.state.params)
  state = stored.state.replace(
    params=tree.unflatten(here.arranged(leaves)), opt_state=moments
  )
  return dataclasses.replace(stored, family=here, state=state)


def write(path: os.PathLike | str, stored: Stored, format: str) -> pathlib.Path:
  """Writes a state: what T5X restores, or `restore='state'` of a run of ours.

  Args:
    path: the folder to create; the checkpoint is `checkpoint_STEP` of T5X, or
      `STEP`, in it.
    stored: what is written.
    format: of `FORMATS`.

  Returns:
    The checkpoint.

  Raises:
    UserError: the folder exists; T5X knows Adafactor alone.
  """
  with files.atomic_path(pathlib.Path(path)) as folder:
    if format == 't5x':
      made = t5x_state.save(
        folder, stored.family, stored.optimizer, stored.state
      ).name
    else:
      kept = checkpoints_lib.Checkpoints(folder)
      kept.save(jax.tree.map(np.asarray, stored.state), b'')
      kept.close()
      made = str(state_lib.step_number(stored.state))
    text = json.dumps(dict(models.describe(stored.family)), indent=2) + '\n'
    (folder / checkpoint.CONFIG).write_text(text)
  return pathlib.Path(path) / made


def _recognised(path, shapes, specs, theirs):
  """`(settings, shapes of the state)` of an optimizer with such a state."""
  for settings in _candidates(shapes, specs, theirs):
    optimizer = _made(settings, specs)
    like = jax.eval_shape(optimizer.init, _shapes(specs))
    if _fits(like, shapes, specs, optimizer, theirs):
      return settings, like
  raise errors.CheckpointError(
    f'The state of the optimizer in {path} is none that optim.adafactor or '
    f'optim.adamw makes for this model ({errors.some(list(shapes))}). Convert '
    'the parameters alone, without --state.'
  )


def _fits(like, shapes, specs, optimizer, theirs):
  """Whether a stored state is one of an optimizer."""
  leaves = tree.flatten(like)
  if not theirs:
    return {name: tuple(x.shape) for name, x in leaves.items()} == shapes
  try:
    slots = t5x_slots.slots(leaves, specs, optimizer).values()
  except errors.ConfigError:  # a stack that T5X factors otherwise
    return False
  wanted = {f'{name}/{slot.name}': slot.shape for name, slot in slots}
  return (
    all(wanted.get(name, (1,)) == shape for name, shape in shapes.items())
    and wanted.keys() <= shapes.keys()
  )


def _candidates(shapes, specs, theirs) -> Iterator[dict[str, Any]]:
  """Settings that show in the shapes of a state, the usual ones first."""
  if theirs:
    moving = any(n.endswith('/m') and s != (1,) for n, s in shapes.items())
    rest = [(_scheduled, None)]
  else:
    moving = any('ema' in name.split('/') for name in shapes)
    rest = list(itertools.product((_scheduled, 1.0), (None, 1.0)))
  second = {sorted(s.shape)[-2] for s in specs.values() if len(s.shape) > 1}
  rules = (None, optim.standard_logical_factor_rules())
  sizes = [_USUAL_SIZE, *sorted(second), max(second, default=0) + 1]
  for rule, size, (rate, norm) in itertools.product(rules, sizes, rest):
    yield {
      'maker': optim.adafactor, 'learning_rate': rate,
      'max_gradient_norm': norm, 'logical_factor_rules': rule,
      'min_dim_size_to_factor': size, 'momentum': 0.9 if moving else None,
    }  # fmt: skip
  for rate, norm in rest if not theirs else ():
    yield {
      'maker': optim.adamw,
      'learning_rate': rate,
      'max_gradient_norm': norm,
    }


def _scheduled(step):
  """A learning rate that counts its steps, as those of T5 do."""
  return 1.0 / (step + 1)


def _made(settings, specs):
  """An optimizer that knows which parameters are stacks."""
  stacks = {
    path: spec.axes for path, spec in specs.items() if axes_lib.stacked(spec)
  }
  settings = dict(settings)
  return optim.of_run(settings.pop('maker')(**settings), 1, stacks)


def _shapes(specs):
  return tree.unflatten(
    {p: jax.ShapeDtypeStruct(s.shape, np.float32) for p, s in specs.items()}
  )
