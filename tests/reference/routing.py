# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Routing written as loops over tokens and experts, from the papers."""

import numpy as np


def softmax(logits):
  """Probabilities in float64, `[..., experts]`."""
  raised = np.exp(logits - logits.max(-1, keepdims=True).astype(np.float64))
  return raised / raised.sum(-1, keepdims=True)


def best(scores, k):
  """The k largest of a row, the lower index first where they are equal."""
  return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def tokens_choose(probabilities, k, capacity, real=None, prioritise=False):
  """`[(token, expert, weight)]` of one group that were kept.

  Args:
    probabilities: `[tokens, experts]`.
    k: experts a token.
    capacity: room of an expert, or None.
    real: `[tokens]`, or None.
    prioritise: whether tokens queue by their first choice's probability.
  """
  tokens, experts = probabilities.shape
  queue = [t for t in range(tokens) if real is None or real[t]]
  if prioritise:
    queue.sort(key=lambda t: (-probabilities[t].max(), t))
  filled, kept = [0] * experts, []
  for choice in range(k):
    for token in queue:
      expert = best(probabilities[token], k)[choice]
      if capacity is None or filled[expert] < capacity:
        kept.append((token, expert, probabilities[token, expert]))
      filled[expert] += 1
  return kept


def gshard_top2(logits, capacity, real, before):
  """The same of fairseq's top-2, its second expert the second most probable."""
  tokens, experts = logits.shape
  gates = softmax(logits)
  queue = [t for t in range(tokens) if real is None or real[t]]
  pairs, filled = {t: [] for t in queue}, [0] * experts
  for choice in (0, 1):
    for token in queue:
      expert = best(logits[token], 2)[choice]
      fits = capacity is None or filled[expert] < capacity
      filled[expert] += 1
      if fits or before:
        pairs[token].append((expert, gates[token, expert], fits))
  kept = []
  for token, own in pairs.items():
    total = sum(gate for _, gate, _ in own)
    kept += [(token, e, gate / total) for e, gate, fits in own if fits]
  return kept


def experts_choose(probabilities, capacity, real=None):
  """`[(token, expert, weight)]` of one group, each expert's best first."""
  tokens, experts = probabilities.shape
  found = []
  for expert in range(experts):
    queue = [t for t in range(tokens) if real is None or real[t]]
    queue.sort(key=lambda t: (-probabilities[t, expert], t))
    found += [(t, expert, probabilities[t, expert]) for t in queue[:capacity]]
  return found


def combined(pairs, tokens, outputs):
  """`sum of weight outputs[expert][token]` over pairs, `[tokens, embed]`."""
  found = np.zeros((tokens, outputs.shape[-1]))
  for token, expert, weight in pairs:
    found[token] += weight * outputs[expert, token]
  return found
