# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Beam search against lists in Python, all answers there are, and T5X."""

import functools
import itertools

from absl.testing import absltest
from absl.testing import parameterized
import goldens
import numpy as np
import small_decoders

from mergejax import models
from mergejax.core import errors
from mergejax.core import tree
from mergejax.evaluation import beam
from mergejax.evaluation import decode
from mergejax.models import layer_stacks

# More words than the candidates of a row: some never end.
VOCAB, END, LENGTH = 9, 4, 5
PROMPTS = [[], [3, 2], [5], [2, 2, 5, 3], [5, 5, 5], [2]]


def by_lists(params, prompt, beams, alpha, stops):
  """`[(score, answer)]`, the worst first, of one row.

  What did not end is there only where nothing did.
  """
  penalty = lambda n: ((5 + n) / 6) ** alpha
  live, ended = [(0.0, ())], []
  for n in range(1, LENGTH + 1):
    found = sorted((
        (log_p + more, (*said, token))
        for log_p, said in live
        for token, more in enumerate(
          small_decoders.log_probabilities(params, [*prompt, *said])
        )
    ), reverse=True)[: 2 * beams]  # fmt: skip
    ended += [(p / penalty(n), s) for p, s in found if s[-1] == END]
    ended = sorted(ended, reverse=True)[:beams]
    live = [(p, s) for p, s in found if s[-1] != END][:beams]
    if stops and len(ended) == beams:
      if ended[-1][0] > live[0][0] / penalty(LENGTH):
        break
  return (ended or live)[::-1]


def padded(answers, beams):
  """As arrays: 0 after an answer, empty ones in front."""
  answers = [(-np.inf, ())] * (beams - len(answers)) + answers
  rows = [[*said, *[0] * (LENGTH - len(said))] for _, said in answers]
  return rows, [score for score, _ in answers]


@functools.cache
def decoder(beams, alpha):
  return decode.make_decoder(
    small_decoders.family(VOCAB), length=LENGTH, end=END,
    method=beam.Beam(beams=beams, alpha=alpha),
  )  # fmt: skip


class BeamTest(parameterized.TestCase):
  @parameterized.parameters((1, 0.6), (3, 0.6), (3, 0.0), (4, 2.0))
  def test_equals_lists(self, beams, alpha):
    kinds = set()
    for seed, push in itertools.product(range(3), (-60.0, -3.0, 1.5)):
      params = small_decoders.table(VOCAB, seed=seed)
      params[:, END] += push
      found = decoder(beams, alpha).answers(
        params, small_decoders.batch(PROMPTS)
      )
      for i, prompt in enumerate(PROMPTS):
        expected = by_lists(params, prompt, beams, alpha, stops=True)
        # To stop early is less work and no other result.
        whole = by_lists(params, prompt, beams, alpha, stops=False)
        self.assertEqual(expected, whole)
        tokens, scores = padded(expected, beams)
        np.testing.assert_array_equal(found.tokens[i], tokens)
        np.testing.assert_allclose(found.scores[i], scores, rtol=1e-5)
        ends = [END in row for row in tokens]
        kinds.add('all' if all(ends) else 'some' if any(ends) else 'none')
    self.assertContainsSubset({'all', 'none'}, kinds)

  def test_few_ended_leave_empty_places(self):
    params = small_decoders.table(VOCAB)
    params[:, END] = -60.0
    # After the first token alone an answer may end.
    first = (3 * 0 + 5) % small_decoders.STATES
    params[first, END] = 0.0
    found = decoder(3, 0.6).answers(params, small_decoders.batch([[]]))
    self.assertEqual(found.tokens[0, 2].tolist(), [END, 0, 0, 0, 0])
    self.assertGreater(found.scores[0, 2], -5)
    self.assertLess(found.scores[0, 1], -20)

  def test_finds_the_best_of_all_answers(self):
    vocab, length, end = 3, 4, 1
    params = small_decoders.table(vocab, seed=5)
    wide = beam.Beam(beams=40)
    found = decode.make_decoder(
      small_decoders.family(vocab), length=length, end=end, method=wide
    ).answers(params, small_decoders.batch([[2]], 2))
    every = []
    for n in range(1, length + 1):
      for begun in itertools.product((0, 2), repeat=n - 1):
        said = (*begun, end)
        log_p = small_decoders.log_likelihood(params, [2], said)
        every.append((log_p / ((5 + n) / 6) ** 0.6, said))
    every.sort(reverse=True)
    self.assertLen(every, 15)
    for (score, said), tokens, given in zip(
      every, found.tokens[0, ::-1], found.scores[0, ::-1]
    ):
      self.assertEqual(tokens.tolist(), [*said, *[0] * (length - len(said))])
      self.assertAlmostEqual(given, score, places=5)
    self.assertTrue(np.isneginf(found.scores[0, :25]).all())

  def test_no_row_depends_on_another(self):
    params = small_decoders.table(VOCAB, seed=2)
    whole = decoder(3, 0.6).answers(params, small_decoders.batch(PROMPTS))
    part = decoder(3, 0.6).answers(
      params, small_decoders.batch(PROMPTS[2:4], width=11)
    )
    np.testing.assert_array_equal(part.tokens, whole.tokens[2:4])
    np.testing.assert_allclose(part.scores, whole.scores[2:4], rtol=1e-6)
    best = decoder(3, 0.6)(params, small_decoders.batch(PROMPTS))
    np.testing.assert_array_equal(best, whole.tokens[:, -1])
    filled = small_decoders.batch([[5], []])
    filled['decoder_target_tokens'][1] = 0
    filled['decoder_loss_weights'][1] = 0
    found = decoder(3, 0.6).answers(params, filled)
    np.testing.assert_array_equal(found.tokens[0], whole.tokens[2])
    self.assertFalse(found.tokens[1].any())

  @parameterized.parameters(False, True)
  def test_t5x(self, scan):
    arrays = goldens.load(f't5x_network_v1_{int(scan)}')
    kind = dict(scan_layers=True, relative_per_layer=True)
    if not scan:
      kind = dict(mlp_activations=('relu',), logits_via_embedding=True)
    module = models.build(dict(
        model_type='t5x', vocab_size=64, emb_dim=8, num_heads=2, head_dim=4,
        mlp_dim=16, num_encoder_layers=2, num_decoder_layers=2, **kind,
    ))  # fmt: skip
    params = tree.flatten(goldens.subtree(arrays, 'params/'))
    params = tree.unflatten(layer_stacks.restack(params, module.config))
    found = decode.make_decoder(
      module, length=7, method=beam.Beam(beams=3)
    ).answers(
      params, {'encoder_input_tokens': arrays['batch/encoder_input_tokens']}
    )
    np.testing.assert_array_equal(found.tokens, arrays['decode/beam3'])
    np.testing.assert_allclose(
      found.scores, arrays['decode/beam3_scores'], rtol=1e-5
    )

  def test_t5x_where_answers_end(self):
    """T5X's own `decoding.beam_search`, 4 beams, logits three times as large.

    It fills the places of answers that did not end with scores near -1e7.
    """
    arrays = goldens.load('t5x_network_v1_1')
    theirs = goldens.load('t5x_beams_ended')
    module = models.build(dict(
        model_type='t5x', vocab_size=64, emb_dim=8, num_heads=2, head_dim=4,
        mlp_dim=16, num_encoder_layers=2, num_decoder_layers=2,
    ))  # fmt: skip
    params = goldens.subtree(arrays, 'params/')
    params['decoder']['logits_dense']['kernel'] *= 3
    found = decode.make_decoder(
      module, length=7, end=int(theirs['end']), method=beam.Beam()
    ).answers(params, {'encoder_input_tokens': theirs['inputs']})
    given = found.scores > -np.inf
    self.assertBetween(given.mean(), 0.5, 0.9)
    np.testing.assert_array_equal(given, theirs['scores'] > -1e6)
    np.testing.assert_array_equal(found.tokens[given], theirs['tokens'][given])
    np.testing.assert_allclose(
      found.scores[given], theirs['scores'][given], rtol=1e-5
    )

  def test_mistakes(self):
    for words, said in (
      ({'beams': 0}, 'beams must be a whole number of 1 or more'),
      ({'alpha': -1}, 'alpha must be a number of 0 or more'),
      ({'alpha': 'much'}, 'alpha must be a number'),
    ):
      with self.assertRaisesRegex(errors.ConfigError, said):
        beam.Beam(**words)
    packed = small_decoders.batch([[2]])
    packed['decoder_segment_ids'] = np.ones((1, 8), np.int32)
    with self.assertRaisesRegex(errors.DataError, 'not packed'):
      decoder(3, 0.6)(small_decoders.table(VOCAB), packed)


if __name__ == '__main__':
  absltest.main()
