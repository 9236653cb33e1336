# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Polytropon and multi-head routing: tasks share an inventory of skills."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mergejax.adapters import banks
from mergejax.adapters import base as base_lib
from mergejax.adapters import low_rank
from mergejax.adapters import sites as sites_lib
from mergejax.adapters import skill_gates
from mergejax.core import errors
from mergejax.core import tree
from mergejax.core import typing
from mergejax.intercept import linear
from mergejax.intercept import replace

TASK_IDS = 'task_ids'
A, B, LOGITS = 'poly_a', 'poly_b', 'poly_logits'
_LEARN = ('all', 'routing', 'inventory')
_SMALL = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poly(sites_lib.LayerAdapter):
  """See `poly`."""

  reads = (TASK_IDS,)
  tasks: int
  skills: int = 8
  heads: int = 1
  rank: int = 1
  alpha: float = 1.0
  targets: tuple[str, ...] = ()
  selector: str = 'sigmoid'
  shared_skill: bool = False
  noise: bool = False
  gate_dropout: float = 0.0
  mix: str = 'factors'
  selectors: str = 'map'
  start: str = 'original'
  learn: str = 'all'
  kernels: Mapping[type, linear.Describe] = dataclasses.field(
    default_factory=dict, hash=False
  )

  def __post_init__(self):
    for name in ('tasks', 'skills', 'heads', 'rank'):
      errors.check_whole(name, getattr(self, name))
    errors.check_number('alpha', self.alpha, 0, open_below=True)
    for name, known in (
      ('selector', skill_gates.SELECTORS), ('mix', ('factors', 'outputs')),
      ('selectors', skill_gates.OWNERS), ('start', ('original', 'peft')), ('learn', _LEARN),
    ):  # fmt: skip
      if getattr(self, name) not in known:
        raise errors.ConfigError(errors.near(getattr(self, name), known, name))
    if self.noise and self.selector != 'sigmoid':
      raise errors.ConfigError(
        f'noise draws relaxed gates of a sigmoid; selector={self.selector!r} has '
        "none to relax: set noise=False, or selector='sigmoid'."
      )
    errors.check_number('gate_dropout', self.gate_dropout, 0, 1)
    if self.gate_dropout and self.selector in ('l2', 'uniform'):
      raise errors.ConfigError(
        f'gate_dropout drops gates, and selector={self.selector!r} has none: '
        "set gate_dropout=0, or selector='sigmoid'."
      )
    if self.gate_dropout == 1:
      raise errors.ConfigError('gate_dropout=1 drops all: give a smaller one.')
    if self.mix == 'outputs' and self.heads > 1:
      raise errors.ConfigError(
        f"mix='outputs' mixes whole outputs, of which {self.heads} heads are "
        "slices: set heads=1, or mix='factors'."
      )

  @functools.cached_property
  def expert(self) -> low_rank.Lora:
    """The LoRA that a task has."""
    # Outputs mixed are one LoRA too, of all skills side by side.
    wide = self.skills if self.mix == 'outputs' else 1
    return low_rank.lora(
      rank=self.rank * wide, alpha=self.alpha * wide, targets=self.targets,
      kernels=self.kernels,
    )  # fmt: skip

  def sites(self, base):
    return sites_lib.find(base, self.targets)

  def learns(self, path):
    if self.group(path) == base_lib.ROUTER:
      return self.learn != 'inventory' and self.selector != 'uniform'
    return self.learn != 'routing'

  def group(self, path):
    routing = path.endswith(LOGITS) or path.startswith(skill_gates.FOLDER)
    return base_lib.ROUTER if routing else base_lib.ADAPTER

  def parts(self, site):
    (inputs, of_inputs), (outputs, of_outputs) = site.inputs, site.outputs
    d_in, d_out, heads = math.prod(inputs), math.prod(outputs), self.heads
    if d_in % heads or d_out % heads:
      raise errors.ConfigError(
        f'{heads} heads do not divide {site.path}, which has {d_in} inputs and '
        f'{d_out} outputs: take heads that divide both.'
      )
    bound = 1 / math.sqrt(
      3 * d_in if self.start == 'original' else d_in // heads
    )
    one = lambda names, many: names[0] if len(names) == 1 else many
    lead = ('routes', 'experts')
    part, shape = sites_lib.Part, (heads, self.skills)
    found = {
      A: part(
        (*shape, d_in // heads, self.rank),
        (*lead, one(of_inputs, 'inputs'), 'rank'),
        _uniform(bound),
      ),
      B: part(
        (*shape, self.rank, d_out // heads),
        (*lead, 'rank', one(of_outputs, 'outputs')),
        lambda key, shape: jnp.zeros(shape, jnp.float32),
      ),
    }
    if self.selectors == 'map':
      found[LOGITS] = self._logits()
    return found

  def _logits(self):
    shape = self.tasks, self.heads * self.skills
    return sites_lib.Part(shape, ('tasks', 'outputs'), _uniform(_SMALL))

  def specs(self, base):
    found = super().specs(base)
    shape, names, _ = self._logits()
    for site in self.sites(base):
      owner = skill_gates.owner(self.selectors, site)
      if owner is not None:
        found[owner] = typing.LeafSpec(shape, np.dtype('float32'), names)
    return found

  def init(self, base, key, params=None):
    leaves = tree.flatten(super().init(base, key, params))
    shape, _, draw = self._logits()
    for path in self.specs(base):
      if path not in leaves:
        leaves[path] = draw(sites_lib.of_path(key, path), shape)
    return tree.unflatten(leaves)

  def rng_streams(self, *, train):
    return ('dropout',) if train and (self.noise or self.gate_dropout) else ()

  def check_batch(self, batch, source):
    base_lib.check_ids(batch, TASK_IDS, self.tasks, 'task', source)

  def edit(self, site, call):
    def after(module, inputs, outputs):
      parts = self.read(site, module)
      owner = skill_gates.owner(self.selectors, site)
      if owner is not None:
        parts[LOGITS] = call.adapter[owner]
      logits = banks.taken(parts[LOGITS], call.batch[TASK_IDS])
      drawn = module.has_rng('dropout') and self.rng_streams(train=call.train)
      key = module.make_rng('dropout') if drawn else None
      weights = self._weights(logits, key)
      own = {
        name: banks.repeated(leaf, outputs.shape[0], site.path)
        for name, leaf in self.mixed(parts, weights).items()
      }
      each = lambda parts, x, y: self.expert.after(site, parts, x, y)
      return jax.vmap(each)(own, inputs, outputs)

    return replace.Edit(None, after)

  def _weights(self, logits, key=None):
    """`<float32>[rows, heads, skills]`; with a key as in training."""
    drops = None
    if key is not None and self.gate_dropout:
      drops = jax.random.fold_in(key, 1)
    return skill_gates.gates(
      logits.reshape(-1, self.heads, self.skills), self.selector,
      shared_skill=self.shared_skill, key=key if self.noise else None,
      dropout=self.gate_dropout, dropout_key=drops,
    )  # fmt: skip

  def mixed(
    self, parts: sites_lib.Parts, weights: jax.Array
  ) -> dict[str, jax.Array]:
    """The LoRA of every row.

    Args:
      parts: `poly_a [heads, skills, in / heads, rank]`, `poly_b [heads, skills,
        rank, out / heads]`.
      weights: `<float32>[rows, heads, skills]`.

    Returns:
      `lora_a [rows, in, rank]` and `lora_b [rows, rank, out]`; with
      `mix='outputs'` the rank is skills times as large.
    """
    a, b, rows = parts[A], parts[B], weights.shape[0]
    if self.mix == 'outputs':
      narrow = jnp.moveaxis(a[0], 0, 1)  # [in, skills, rank]
      narrow = narrow.reshape(1, narrow.shape[0], -1)
      wide = jnp.einsum('bs,srd->bsrd', weights[:, 0], b[0])
      return {
        'lora_a': jnp.repeat(narrow, rows, axis=0),
        'lora_b': wide.reshape(rows, -1, wide.shape[-1]),
      }
    mix = functools.partial(jnp.einsum, precision='highest')
    narrow = mix('bhs,hsdr->bhdr', weights, a)
    wide = mix('bhs,hsrd->brhd', weights, b)
    return {
      'lora_a': narrow.reshape(rows, -1, self.rank),
      'lora_b': wide.reshape(rows, self.rank, -1),
    }

  # From an inventory to one adapter --------------------------------------------

  def of_task(
    self, base: typing.SpecTree, adapter: typing.Tree, task: int
  ) -> typing.Tree:
    """A task's own LoRA, leaves of `expert`, which folds as any.

    Raises:
      ConfigError: there is no such task.
    """
    base_lib.check_number('task', task, self.tasks)
    return self._as_lora(
      base, adapter, lambda logits: self._weights(logits[task])
    )

  def alone(self, base, adapter, number):
    return self.expert, self.of_task(base, adapter, number)

  def collapsed(
    self, base: typing.SpecTree, adapter: typing.Tree
  ) -> typing.Tree:
    """Poly-mu: the mean of all skills as one LoRA, leaves of `expert`.

    With Adam begun anew, and a small epsilon, it learns as all skills would
    that have equal weights (`selector='uniform'`), at the cost of one. Under
    SGD each skill has 1/skills of the gradient: divide the rate by skills.

    Raises:
      ConfigError: outputs are mixed, whose mean is no narrower.
    """
    if self.mix == 'outputs':
      raise errors.ConfigError(
        "mix='outputs' keeps skills side by side: their mean is not one LoRA of "
        "their rank. Collapse an inventory of mix='factors'."
      )
    shape = 1, self.heads, self.skills
    return self._as_lora(
      base, adapter, lambda logits: jnp.full(shape, 1 / self.skills)
    )

  def _as_lora(self, base, adapter, weights):
    mine = base_lib.own_leaves(adapter, self.specs(base))
    found = {}
    for site in self.sites(base):
      parts = {
        name: site.by_layer(mine[site.leaf(name)]) for name in self.parts(site)
      }
      owner = skill_gates.owner(self.selectors, site)
      if owner is not None:
        count = len(parts[A])
        parts[LOGITS] = jnp.stack([jnp.asarray(mine[owner])] * count)

      def one(parts, site=site):
        own = self.mixed(parts, weights(parts[LOGITS]))
        shapes = self.expert.parts(site)
        return {n: x[0].reshape(shapes[n].shape) for n, x in own.items()}

      for name, leaf in jax.vmap(one)(parts).items():
        found[site.leaf(name)] = site.of_layers(leaf)
    return tree.unflatten(found)

  def with_tasks(
    self,
    base: typing.SpecTree,
    adapter: typing.Tree,
    tasks: int,
    key: jax.Array,
  ) -> tuple['Poly', typing.Tree]:
    """The same inventory for other tasks, whose logits begin anew.

    Returns:
      `(adapter, leaves)`: skills bit for bit, logits from U(-1e-3, 1e-3).
    """
    other = dataclasses.replace(self, tasks=tasks)
    mine = base_lib.own_leaves(adapter, self.specs(base))
    fresh = tree.flatten(other.init(base, key))
    kept = {
      path: fresh[path] if self.group(path) == base_lib.ROUTER else leaf
      for path, leaf in mine.items()
    }
    return other, tree.unflatten(kept)

  def fold(self, base, params, adapter):
    raise errors.ConfigError(
      'An inventory of skills is many models: fold the LoRA of one task, '
      '`poly.expert.fold(base, params, poly.of_task(base, leaves, task))`, or '
      'that of their mean, `poly.collapsed(base, leaves)`.'
    )


def _uniform(bound):
  return lambda key, shape: jax.random.uniform(
    key, shape, jnp.float32, -bound, bound
  )


def poly(
  *,
  tasks: int,
  skills: int = 8,
  heads: int = 1,
  rank: int = 1,
  alpha: float = 1.0,
  targets: str | Sequence[str] = (
    r'(.*/)?(query|key|value|out|wi|wi_0|wi_1|wo)/kernel',
  ),
  selector: str = 'sigmoid',
  shared_skill: bool = False,
  noise: bool = False,
  gate_dropout: float = 0.0,
  mix: str = 'factors',
  selectors: str = 'map',
  start: str = 'original',
  learn: str = 'all',
  kernels: Mapping[type, linear.Describe] | None = None,
) -> Poly:
  """Polytropon, and Poly-S (multi-head routing): LoRAs mixed by task.

  `A = concat_h sum_s w[h,s] A[h,s]`, `B` likewise along the outputs, `y = x W +
  b + alpha / r (x A) B`; `w` of a task as `gates` has it. Leaves beside a
  kernel: `poly_a <float32>[heads, skills, in / heads, rank]`, `poly_b [heads,
  skills, rank, out / heads]`, `poly_logits [tasks, heads * skills]`, head by
  head.

  Args:
    tasks: T; a batch has `task_ids <int32>[batch]`, 0 to T - 1.
    skills: S, the papers' 8.
    heads: slices of inputs and outputs that choose by themselves; 1 is
      Polytropon, more is Poly-S.
    rank: r; 1 as on T0, 16 on Natural Instructions.
    alpha: the scale times the rank; 1, as PEFT's.
    targets: regular expressions over whole paths of kernels; by default all of
      attention and feed-forward blocks, as on T0.
    selector: see `gates`. 'uniform' is Poly-mu with all skills kept;
      `collapsed` is its cheap form.
    shared_skill: see `gates`.
    noise: relaxed Bernoulli gates in training, drawn for each row and layer.
      Off, as in the T0 settings; PEFT has it always on.
    gate_dropout: share of gates that are 0 in training, drawn likewise; see
      `gates`. The released code drops them while it evaluates, too.
    mix: 'factors', so that weights enter squared, or 'outputs', `sum_s w_s (x
      A_s) B_s`, in which they enter once.
    selectors: who has logits of its own: every 'map', a 'sublayer' or a 'block'
      (of layers that are not scanned), a 'stack' (the first part of a path,
      encoder or decoder), or the 'model'.
    start: of A: 'original', U(-b, b) with b = 1/sqrt(3 in), or 'peft',
      1/sqrt(in / heads). B is 0, logits are U(-1e-3, 1e-3).
    learn: 'all', 'routing' (Z alone) or 'inventory'.
    kernels: `{class: describe}` of modules of your own with linear maps.

  Returns:
    An adapter, for `adapt`, with `of_task`, `collapsed` and `with_tasks`. One
    adapter a task, without sharing, is `bank(lora(...), tasks)`. Logits learn
    at a rate of their own with `by_group`.

  Raises:
    ConfigError: numbers that are none, heads that do not divide a kernel, noise
      of gates that are none. A `DataError` for a batch without ids, or with
      others; NaN in a compiled program.

  Example:
    >>> poly(tasks=3, heads=4).expert.scale_at('wi/kernel')
    1.0

  Source: Ponti et al., "Combining Modular Skills in Multitask Learning" (2022),
  https://arxiv.org/abs/2202.13914; Caccia et al., "Multi-Head Adapter Routing
  for Cross-Task Generalization" (2022), https://arxiv.org/abs/2211.03831.
  """
  return Poly(
    tasks=tasks,
    skills=skills,
    heads=heads,
    rank=rank,
    alpha=alpha,
    targets=(targets,) if isinstance(targets, str) else tuple(targets),
    selector=selector,
    shared_skill=shared_skill,
    noise=noise,
    gate_dropout=gate_dropout,
    mix=mix,
    selectors=selectors,
    start=start,
    learn=learn,
    kernels=kernels or {},
  )
