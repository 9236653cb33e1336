# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What `t5x_adapter_test` runs in a Python that has T5X: ours beside its own.

Each model is T5X's, once with its own network and once with ours, given the
same parameters. Prints what came of both as one line of JSON.
"""

import json
import sys

import flax
import jax
import numpy as np
import seqio
from t5x import adafactor
from t5x import decoding
from t5x import models as t5x_models
from t5x import train_state
from t5x.examples.decoder_only import network as decoder_network
from t5x.examples.t5 import network

from mergejax import t5x_adapter
from mergejax.core import errors
from mergejax.core import tree
from mergejax.models import layer_stacks
from mergejax.nn import lm
from mergejax.nn import t5

_SIZES = dict(
  vocab_size=384, emb_dim=16, num_heads=2, head_dim=4, mlp_dim=24,
  mlp_activations=('gelu', 'linear'), dropout_rate=0.0, dtype='float32',
)  # fmt: skip
_T5 = dict(
  num_encoder_layers=2, num_decoder_layers=2, logits_via_embedding=False
)
_LM = dict(num_layers=2, logits_via_embedding=True)
_GREEDY = {'temperature': 0.0, 'topk': 1}


def optimizer():
  rules = adafactor.standard_logical_factor_rules()
  return adafactor.Adafactor(decay_rate=0.8, logical_factor_rules=rules)


def flat(tree_of):
  return flax.traverse_util.flatten_dict(flax.core.unfreeze(tree_of), sep='/')


def batch_of(decoder_only):
  rng = np.random.default_rng(0)
  targets = rng.integers(3, 259, (4, 9)).astype(np.int32)
  targets[2, 5:] = 0
  batch = {
    'decoder_target_tokens': targets,
    'decoder_input_tokens': np.pad(targets, ((0, 0), (1, 0)))[:, :-1],
    'decoder_loss_weights': (targets > 0).astype(np.int32),
  }
  if decoder_only:
    # Prompts of several lengths, with the start token.
    prompts = np.array([4, 6, 1, 3])[:, None]
    batch['decoder_causal_attention'] = (np.arange(9) < prompts).astype('int32')
  else:
    batch['encoder_input_tokens'] = rng.integers(3, 259, (4, 12)).astype(
      'int32'
    )
    batch['encoder_input_tokens'][1, 8:] = 0
  return batch


def variables_of(model, batch):
  shapes = {name: x.shape for name, x in batch.items()}
  types = {name: x.dtype for name, x in batch.items()}
  return model.get_initial_variables(jax.random.key(0), shapes, types)


def compared(theirs, ours, batch, convert=lambda leaves: leaves):
  """Both models on one batch, with the parameters of theirs, made livelier."""
  made, own = variables_of(theirs, batch), variables_of(ours, batch)
  rng = np.random.default_rng(1)
  leaves = {
    path: np.asarray(leaf + 0.3 * rng.normal(size=leaf.shape), np.float32)
    for path, leaf in flat(made['params']).items()
  }
  params = tree.unflatten(leaves), tree.unflatten(convert(leaves))
  state = train_state.FlaxOptimTrainState.create(ours.optimizer_def, own)
  found = {
    'same_axes': flat(made['params_axes']) == flat(own['params_axes']),
    'axes_of_all': set(flat(state.as_logical_axes().params))
    == set(flat(own['params'])),
    'loss': [
      float(model.loss_fn(given, batch, None)[0])
      for model, given in zip((theirs, ours), params)
    ],
    'scores': [
      np.asarray(model.score_batch(given, batch)).tolist()
      for model, given in zip((theirs, ours), params)
    ],
    'decoded': {},
  }
  for name, fn, answers, settings in (
    ('beam', decoding.beam_search, 3, {}),
    ('greedy', decoding.temperature_sample, 1, _GREEDY),
    ('sampled', decoding.temperature_sample, 2, {'topk': 5}),
  ):
    if settings != _GREEDY and 'encoder_input_tokens' not in batch:
      continue  # beams take no prompt; a longer way draws other numbers
    found['decoded'][name] = []
    for model, given in zip((theirs, ours), params):
      if 'encoder_input_tokens' in batch:
        model._decode_fn = fn  # one model, one initialisation
      tokens, aux = model.predict_batch_with_aux(
        given,
        batch,
        rng=jax.random.key(2) if settings else None,
        num_decodes=answers,
        decoder_params=dict(settings),
        return_all_decodes=fn is decoding.beam_search,
      )
      found['decoded'][name].append(
        [np.asarray(tokens).tolist(), np.asarray(aux['scores']).tolist()]
      )
  return found


def encoder_decoder(scanned):
  vocabulary = seqio.ByteVocabulary()
  config = t5.T5Config(**_SIZES, **_T5, scan_layers=scanned)
  theirs, ours = (
    t5x_models.EncoderDecoderModel(
      module, vocabulary, vocabulary, optimizer(), z_loss=1e-4
    )
    for module in (
      network.Transformer(network.T5Config(**_SIZES, **_T5)),
      t5x_adapter.Transformer(config),
    )
  )
  convert = lambda leaves: layer_stacks.restack(leaves, config)
  return compared(theirs, ours, batch_of(False), convert)


def decoder_only():
  vocabulary = seqio.ByteVocabulary()
  theirs = t5x_models.DecoderOnlyModel(
    decoder_network.DecoderWrapper(
      decoder_network.TransformerConfig(**_SIZES, **_LM)
    ),
    vocabulary, optimizer(),
  )  # fmt: skip
  ours = t5x_adapter.DecoderOnlyModel(
    t5x_adapter.LanguageModel(lm.LMConfig(**_SIZES, **_LM)),
    vocabulary, optimizer(),
  )  # fmt: skip
  return compared(theirs, ours, batch_of(True))


def refused():
  try:
    t5x_adapter.DecoderOnlyModel(
      None, None, None, inputs_bidirectional_attention=True
    )
  except errors.ConfigError as error:
    return error.message
  return ''


if __name__ == '__main__':
  results = {
    'apart': encoder_decoder(False),
    'scanned': encoder_decoder(True),
    'decoder_only': decoder_only(),
    'refused': refused(),
  }
  sys.stdout.write(json.dumps(results) + '\n')
