# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What makes a model sparse: which layers, how many experts, which router."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from mergejax.core import errors
from mergejax.nn import routing

TOKENS_CHOOSE, EXPERTS_CHOOSE, GSHARD = (
  'tokens_choose',
  'experts_choose',
  'gshard',
)
ROUTERS = (TOKENS_CHOOSE, EXPERTS_CHOOSE, GSHARD)
MIXED, BOTTOM, MIDDLE, TOP = 'mixed', 'bottom', 'middle', 'top'
LAYOUTS = (MIXED, BOTTOM, MIDDLE, TOP)
AUTO, PADDED, ROWS = 'auto', 'padded', 'rows'
DISPATCHES = (AUTO, PADDED, ROWS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
  """Sizes and rules of a model's mixture-of-experts layers.

  The defaults are those of Switch-Base but for the number of experts.

  Attributes:
    num_experts: feed-forward blocks of a sparse layer.
    encoder_layers: how many layers of the encoder are sparse; None is every
      other one.
    decoder_layers: of the decoder, or of a decoder-only model.
    layout: which ones: 'mixed' evenly, the last of each run; 'bottom',
      'middle', 'top'.
    router: 'tokens_choose', 'gshard' (fairseq's top-2), or 'experts_choose',
      which is refused in decoders: it looks at later tokens.
    decoder_router: of the decoder if it is another one: with experts choosing
      in the encoder, 'tokens_choose' or 'gshard'.
    top_k: experts that a token chooses; 1 in Switch, 2 in ST-MoE. Of 'gshard' it
      is 2 always.
    train_capacity_factor: room of an expert, as times a fair share of a group's
      tokens, as in flaxformer: of `top_k` 2 a factor of 1.25 drops at least
      three choices of eight. None drops nothing. Of 'gshard' in training it is
      2, unless None.
    eval_capacity_factor: the same in evaluation; of 'gshard' a quarter of all
      tokens, unless None.
    min_capacity: least room of an expert.
    group_size: tokens that are routed together, see `token_groups`.
    strict_group_size: refuse batches whose groups have another size.
    replicas: copies of the experts on a mesh, see `token_groups.group_count`.
      Results depend on groups, so it is no matter of the mesh at hand.
    batch_prioritised: in the encoder, tokens with the most certain first choice
      queue first; see `routing.tokens_choose`.
    normalize_gates: weights of a token's choices sum to 1, so that equal experts
      make the function of one of them (`experts.upcycle`); always in 'gshard'.
    second_expert: see `routing.gshard_top2`.
    normalize_before_dropping: likewise.
    jitter: a router's inputs are multiplied by uniform noise of 1 +- this much
      in training; 0.01 in the paper, 0 in its JAX configurations.
    balance_loss: factor of the mean load balance loss of the sparse layers.
    z_loss: factor of their mean router z-loss; 1e-3 in ST-MoE.
    dropout_rate: inside experts; None is that of the model. Switch fine-tunes
      with 0.4 here and 0.1 elsewhere.
    extra_mlp: a dense block with a norm of its own behind every sparse one, as
      in ST-MoE.
    allow_noncausal: allows routers in a decoder that look at later tokens.
    legacy_padding: None: padding meets no expert and counts in no loss;
      'routed' takes it for tokens like others (flaxformer's default), 'mask' and
      'scatter' are its routers with ignore_padding_tokens.
    dispatch: 'rows' or 'padded', see `dispatch` and, on a mesh,
      `dispatch_mesh`; 'auto' takes rows where nothing is dropped. The results
      are the same.

  Raises:
    ConfigError: a setting that is none of the above.
  """

  num_experts: int
  encoder_layers: int | None = None
  decoder_layers: int | None = None
  layout: str = MIXED
  router: str = TOKENS_CHOOSE
  decoder_router: str | None = None
  top_k: int = 1
  train_capacity_factor: float | None = 1.25
  eval_capacity_factor: float | None = 2.0
  min_capacity: int = 4
  group_size: int = 8192
  strict_group_size: bool = False
  replicas: int = 1
  batch_prioritised: bool = False
  normalize_gates: bool = False
  second_expert: str = routing.SAMPLING
  normalize_before_dropping: bool = False
  jitter: float = 0.0
  balance_loss: float = 0.01
  z_loss: float = 0.0
  dropout_rate: float | None = None
  extra_mlp: bool = False
  allow_noncausal: bool = False
  legacy_padding: str | None = None
  dispatch: str = AUTO

  def __post_init__(self):
    for name, known in (
      ('layout', LAYOUTS), ('router', ROUTERS), ('decoder_router', ROUTERS),
      ('second_expert', routing.SECOND_EXPERT), ('dispatch', DISPATCHES),
      ('legacy_padding', routing.LEGACY_PADDING),
    ):  # fmt: skip
      value = getattr(self, name)
      if value not in (*known, *self._none(name)):
        raise errors.ConfigError(errors.near(str(value), known, name))
    for name in (
      'num_experts',
      'top_k',
      'min_capacity',
      'group_size',
      'replicas',
    ):
      errors.check_whole(name, getattr(self, name))
    for name in (
      'strict_group_size', 'batch_prioritised', 'normalize_gates',
      'normalize_before_dropping', 'extra_mlp', 'allow_noncausal',
    ):  # fmt: skip
      # A text such as 'false' would be taken for true.
      errors.check_bool(name, getattr(self, name))
    for name in ('train_capacity_factor', 'eval_capacity_factor'):
      if getattr(self, name) is not None:
        errors.check_number(name, getattr(self, name), 0.0, open_below=True)
    errors.check_number('jitter', self.jitter, 0.0, 1.0)
    for name in ('balance_loss', 'z_loss'):
      errors.check_number(name, getattr(self, name), 0.0)
    if self.dropout_rate is not None:
      errors.check_number('dropout_rate', self.dropout_rate, 0.0, 1.0)
    for router in {self.router, self.decoder_router} - {None}:
      self._check_router(router)

  def _none(self, name):
    """None, for the settings that may be left open."""
    return (None,) if name in ('decoder_router', 'legacy_padding') else ()

  def _check_router(self, router):
    if router == EXPERTS_CHOOSE:
      factors = self.train_capacity_factor, self.eval_capacity_factor
      if None in factors:
        raise errors.ConfigError(
          'Experts that choose must be told how many tokens they take: give '
          'train_capacity_factor and eval_capacity_factor a number.'
        )
    else:
      k = 2 if router == GSHARD else self.top_k
      routing.check_choices(k, self.num_experts)

  def router_of(self, decoder: bool) -> str:
    """The router of a stack."""
    if decoder and self.decoder_router is not None:
      return self.decoder_router
    return self.router

  def sums_to_one(self, decoder: bool) -> bool:
    """Whether the weights of a token's experts do, in a stack."""
    router = self.router_of(decoder)
    given = router == TOKENS_CHOOSE and self.normalize_gates
    return given or router == GSHARD

  def check_causal(self) -> None:
    """Raises if the router of a decoder looks at later tokens."""
    if self.router_of(True) == EXPERTS_CHOOSE and not self.allow_noncausal:
      raise errors.ConfigError(
        'Experts that choose look at later tokens, which a decoder must not '
        'see: give the decoder tokens that choose (decoder_router='
        "'tokens_choose'), or allow it with allow_noncausal=True."
      )

  def draws(self, decoder: bool) -> bool:
    """Whether the router itself draws random numbers in training."""
    drawn = self.second_expert != routing.ARGMAX
    return self.router_of(decoder) == GSHARD and drawn

  def sparse_layers(self, layers: int, *, decoder: bool) -> tuple[bool, ...]:
    """Which layers of a stack are sparse.

    Args:
      layers: of the stack.
      decoder: which of the two stacks.

    Raises:
      ConfigError: more sparse layers than layers, or a number that does not
        divide theirs, where they are mixed.

    Example:
      >>> MoeConfig(num_experts=4).sparse_layers(4, decoder=False)
      (False, True, False, True)
    """
    count = self.decoder_layers if decoder else self.encoder_layers
    if count is None:
      count = layers // 2
    stack = 'decoder_layers' if decoder else 'encoder_layers'
    errors.check_whole(stack, count, least=0)
    if count > layers:
      raise errors.ConfigError(
        f'{stack}={count} layers cannot be sparse: there are {layers}.'
      )
    return layout(self.layout, layers, count)


def from_fields(fields: Mapping[str, Any]) -> MoeConfig:
  """The configuration of fields by name, as a `config.json` has them.

  Raises:
    ConfigError: no fields, one that there is not, or no number of experts.
  """
  if not isinstance(fields, Mapping):
    raise errors.ConfigError(
      f'moe must be settings by name, {{"num_experts": 8}}, not {fields!r}.'
    )
  known = [field.name for field in dataclasses.fields(MoeConfig)]
  for name in fields:
    if name not in known:
      raise errors.ConfigError(errors.near(name, known, 'setting of moe,'))
  if 'num_experts' not in fields:
    raise errors.ConfigError('moe must say how many experts: num_experts.')
  return MoeConfig(**fields)


def layout(kind: str, layers: int, count: int) -> tuple[bool, ...]:
  """Which of some layers are sparse, see `MoeConfig.layout`.

  Raises:
    ConfigError: a number that does not divide that of mixed layers.
  """
  if kind == MIXED:
    if count and layers % count:
      raise errors.ConfigError(
        f'{count} sparse layers do not lie evenly among {layers}: with '
        "layout='mixed' their number must divide it. Choose another number, or "
        f'one of the layouts {", ".join(LAYOUTS[1:])}.'
      )
    every = layers // count if count else layers + 1
    return tuple(i % every == every - 1 for i in range(layers))
  sparse = {
    BOTTOM: lambda i: i < count,
    TOP: lambda i: i >= layers - count,
    MIDDLE: lambda i: layers - count <= 2 * i < layers + count,
  }[kind]
  return tuple(sparse(i) for i in range(layers))
