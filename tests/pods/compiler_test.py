# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What is told of a compiled program is what the program says of itself."""

import dataclasses
import functools
import importlib.util
import json
import unittest
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mergejax import partition
from mergejax import training
from mergejax.core import errors
from mergejax.core import typing
from mergejax.experts import branch
from mergejax.experts import outer
from mergejax.methods import mean
from mergejax.methods import ties
from mergejax.nn import lm
from mergejax.pods import chips
from mergejax.pods import collectives
from mergejax.pods import compiler
from mergejax.pods import report as report_lib
from mergejax.pods import work as work_lib

LENGTHS = {'decoder_input_tokens': 8, 'decoder_target_tokens': 8}


def tiny(**changes):
  """A decoder of two scanned layers."""
  sizes = dict(
    vocab_size=32, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32,
    num_layers=2, scan_layers=True, param_scan_axis=0, remat_policy='full',
  )  # fmt: skip
  return lm.LanguageModel(lm.LMConfig(**{**sizes, **changes}))


def sine():
  """Work of one program."""
  program = work_lib.Program(jax.jit(jnp.sin), (jnp.ones(8),))
  return work_lib.Work('step', partition.make_mesh(), (program,), {})


@functools.cache
def compiled_step():
  """`(work, report, compiled)` of a tiny model on data 4, model 2."""
  trainer = training.Trainer(
    tiny(), optax.sgd(0.1, momentum=0.9),
    mesh=partition.make_mesh(data=4, model=2), rules=partition.fsdp(),
  )  # fmt: skip
  work = work_lib.training_step(trainer, LENGTHS, rows=8)
  kept = []
  lower = jax.stages.Lowered.compile

  def compile_(*args, **kwargs):
    kept.append(lower(*args, **kwargs))
    return kept[-1]

  with mock.patch.object(jax.stages.Lowered, 'compile', compile_):
    found = compiler.report(work)
  return trainer, work, found, kept[0]


class StepTest(absltest.TestCase):
  def test_bytes_are_those_of_shards_and_of_the_compiler(self):
    trainer, work, found, compiled = compiled_step()
    memory = compiled.memory_analysis()
    self.assertEqual(
      sum(found.held.values()) + found.padding, memory.argument_size_in_bytes
    )
    self.assertEqual(found.temporaries, memory.temp_size_in_bytes)
    self.assertEqual(
      found.total,
      memory.argument_size_in_bytes + memory.output_size_in_bytes
      - memory.alias_size_in_bytes + memory.temp_size_in_bytes
      + memory.generated_code_size_in_bytes,
    )  # fmt: skip
    # A real state takes what was told of the described one.
    step = trainer.step(1000)
    state = trainer.init(step, trainer.layout(step), jax.random.key(0))
    held = lambda t: sum(
      leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(t)
    )
    self.assertEqual(found.held['parameters'], held(state.params))
    self.assertEqual(found.held['optimizer'], held(state.opt_state))
    # Rows lie on data: 8 rows of 16 tokens on 4 slices.
    self.assertEqual(found.held['batch'], 2 * 16 * 4)
    self.assertEqual(found.parameters, tree_size(state.params))
    self.assertEqual(found.tokens, 8 * 8)

  def test_what_is_compiled_is_what_trains(self):
    trainer, work, _, compiled = compiled_step()
    step = trainer.step(1000)
    layout = trainer.layout(step)
    state = trainer.init(step, layout, jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = trainer.placer()({
      name: rng.integers(3, 32, (8, length)).astype(np.int32)
      for name, length in LENGTHS.items()
    })  # fmt: skip
    state, metrics = compiled(state, batch)
    self.assertTrue(np.isfinite(metrics['loss']))

  def test_text_and_json(self):
    found = compiled_step()[2]
    text = found.to_text()
    for word in (
      'parameters',
      'optimizer',
      'temporaries',
      'all-reduce',
      '6 N D',
    ):
      self.assertIn(word, text)
    data = json.loads(json.dumps(found.to_json()))
    self.assertEqual(data['total'], found.total)
    self.assertIsNone(data['fits'])

  def test_experts_send_nothing_over_branch(self):
    trainer = branch.BranchTrainer(
      tiny(num_layers=1, scan_layers=False, remat_policy='none'),
      optax.sgd(0.1), experts=['a', 'b', 'c', 'd'],
      mesh=partition.make_mesh(branch=2, data=2, model=2),
    )  # fmt: skip
    found = compiler.report(work_lib.training_step(trainer, LENGTHS, rows=4))
    self.assertNotEmpty(found.crosses('data'))
    self.assertEmpty(found.crosses('branch'))
    self.assertEqual(found.tokens, 4 * 4 * 8)

  def test_the_merge_of_experts_is_one_reduction(self):
    trainer = branch.BranchTrainer(
      tiny(), optax.sgd(0.1), experts=['a', 'b', 'c', 'd'],
      mesh=partition.make_mesh(branch=2, data=2, model=2),
      rules=partition.fsdp(), outer=outer.local_sgd(100),
    )  # fmt: skip
    found = compiler.report(work_lib.training_step(trainer, LENGTHS, rows=4))
    self.assertEmpty(found.crosses('branch'))
    merge = compiler.report(work_lib.outer_merge(trainer))
    (sent,) = merge.collectives
    self.assertEqual((sent.kind, sent.axes), ('all-reduce', ('branch',)))
    # Of two experts a chip holds, one sum.
    self.assertEqual(sent.given_bytes, merge.held['parameters'] // 2)
    self.assertEqual(merge.name, 'merge of 4 experts')

  def test_no_merge_of_experts_that_never_meet(self):
    with self.assertRaisesRegex(errors.ConfigError, 'merges nothing'):
      work_lib.outer_merge(compiled_step()[0])

  def test_a_sum_of_experts_crosses_branch(self):
    mesh = partition.make_mesh(branch=2, data=4)
    stacked = jax.ShapeDtypeStruct(
      (2, 8), jnp.float32, sharding=partition.sharding(mesh, ('branch', None))
    )
    program = work_lib.Program(jax.jit(lambda x: x.sum(axis=0)), (stacked,))
    found = compiler.report(work_lib.Work('sum', mesh, (program,), {}))
    self.assertNotEmpty(found.crosses('branch'))

  def test_rows_that_do_not_divide(self):
    trainer = compiled_step()[0]
    with self.assertRaisesRegex(errors.DataError, '7 rows'):
      work_lib.training_step(trainer, LENGTHS, rows=7)


def tree_size(params):
  return sum(leaf.size for leaf in jax.tree.leaves(params))


class FitsTest(parameterized.TestCase):
  def report(self, **changes):
    figures = dict(
      name='step', topology='v5e:4x4', mesh={'data': 16},
      held={'parameters': 100}, temporaries=50, memory=200,
      chip=chips.CHIPS['v5e'], rows=32,
    )  # fmt: skip
    return report_lib.Report(**{**figures, **changes})

  def test_verdict(self):
    self.assertTrue(self.report().fits)
    self.assertFalse(self.report(temporaries=101).fits)
    refused = self.report(used=300)
    self.assertFalse(refused.fits)
    self.assertEqual(refused.total, 300)
    self.assertIn('DOES NOT FIT', refused.to_text())
    self.assertIsNone(refused.bound)

  def test_the_bound_is_what_takes_longest(self):
    chip = chips.CHIPS['v5e']
    row = lambda axes, sent, between=False: collectives.Collective(
      'all-reduce', axes, 1, 1, sent, 1, between
    )
    found = self.report(
      operations=chip.flops, traffic=2 * chip.memory_bandwidth,
      collectives=[row(('data',), 3 * chip.ici), row(('branch',), chip.ici)],
    )  # fmt: skip
    self.assertEqual(
      found.seconds, {'compute': 1.0, 'memory': 2.0, 'network': 4.0}
    )
    self.assertEqual(found.bound, 'network')
    # What crosses slices goes by the slower network.
    over = dataclasses.replace(
      found,
      slices=2,
      collectives=[found.collectives[0], row(('branch',), chip.ici, True)],
    )
    self.assertEqual(over.seconds['network'], 3.0)
    self.assertEqual(
      over.seconds['network between slices'], chip.ici / chip.dcn
    )
    self.assertEqual(over.bound, 'network between slices')

  def test_the_largest_batch_is_on_the_line(self):
    # 100 for what stays, 2 a row, in 16 slices: 200 hold 50 rows, so 48.
    make = lambda rows: self.report(rows=rows, temporaries=2 * rows)
    rows, second = compiler.largest_rows(make(32), make, 16)
    self.assertEqual((rows, second.rows), (48, 16))
    rows, second = compiler.largest_rows(make(16), make, 16)
    self.assertEqual((rows, second.rows), (48, 32))

  @parameterized.parameters(
    (
      'Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. '
      'Exceeded hbm capacity by 4.75G.',
      int(20.5 * 2**30),
    ),
    (
      'Ran out of memory in memory space hbm. Used 1.50T of 15.75G hbm.',
      int(1.5 * 2**40),
    ),
    (
      'Ran out of memory on HBM, the total memory required for HLO temporaries '
      '(35.76G) exceeds available HBM (15.75G).',
      int(35.76 * 2**30) + 32,
    ),
  )
  def test_a_refusal_is_read(self, message, used):
    """What the TPU compiler says when a program does not fit."""
    work = sine()
    refuse = lambda text: mock.patch.object(
      jax.stages.Lowered, 'compile',
      side_effect=jax.errors.JaxRuntimeError(text),
    )  # fmt: skip
    with refuse('RESOURCE_EXHAUSTED: ' + message):
      found = compiler.report(work)
    self.assertEqual(found.used, used)
    self.assertEqual(found.memory, int(15.75 * 2**30))
    self.assertFalse(found.fits)
    with refuse('INTERNAL: a fault'):
      with self.assertRaises(jax.errors.JaxRuntimeError):
        compiler.report(work)

  def test_a_compiler_of_another_version(self):
    """Newer ones make programs that an older JAX cannot write down."""
    with mock.patch.object(
      jax.stages.Compiled, 'as_text',
      side_effect=jax.errors.JaxRuntimeError('INTERNAL: RET_CHECK failure'),
    ):  # fmt: skip
      with self.assertRaisesRegex(errors.ConfigError, r'libtpu .*\[tpu\]'):
        compiler.report(sine())


class MergeTest(absltest.TestCase):
  def specs(self, layers=3):
    leaf = typing.LeafSpec((16, 8), np.dtype('float32'), ('embed', 'mlp'))
    scale = typing.LeafSpec((16,), np.dtype('float32'))
    found = {f'layers_{i}/wi/kernel': leaf for i in range(layers)}
    return {**found, 'norm/scale': scale, 'steps': STEPS}

  def test_leaves_of_a_kind_are_compiled_once(self):
    mesh = partition.make_mesh()
    work = work_lib.merge(mean.linear(), [self.specs()] * 4, mesh)
    self.assertEqual(sorted(p.times for p in work.programs), [1, 3])
    found = compiler.report(work)
    numbers = (3 * 16 * 8 + 16) // 8
    self.assertEqual(found.held, {'models': 4 * 4 * numbers})
    self.assertEqual(found.outputs, 4 * numbers)
    self.assertEmpty(found.collectives)

  def test_a_whole_model_is_one_program(self):
    method = ties.ties(trim_scope='global')
    specs = self.specs(1)
    work = work_lib.merge(
      method, [specs] * 2, partition.make_mesh(), base=specs
    )
    self.assertLen(work.programs, 1)
    found = compiler.report(work)
    kinds = {each.kind for each in found.collectives}
    self.assertEqual(kinds, {'all-reduce'})  # numbers of the model, no leaf


STEPS = typing.LeafSpec((), np.dtype('int32'))


class TopologiesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('v5e', 'shape of its slice'),
    ('v9z:4x4', 'Unknown chip'),
    ('v5p:4x4', '3 dimensions'),
  )
  def test_unknown(self, name, message):
    with self.assertRaisesRegex(errors.ConfigError, message):
      chips.devices(name)

  def test_without_the_compiler(self):
    with mock.patch.object(importlib.util, 'find_spec', return_value=None):
      with self.assertRaisesRegex(errors.ConfigError, r'pip install .*\[tpu\]'):
        chips.devices('v5e:4x4')

  @unittest.skipIf(
    importlib.util.find_spec('libtpu') is None, 'libtpu is not installed'
  )
  def test_a_program_for_sixteen_chips(self):
    mesh = partition.make_mesh(
      data=8, model=2, devices=chips.devices('v5e:4x4')
    )
    spec = typing.LeafSpec((64, 64), np.dtype('float32'), ('embed', 'mlp'))
    work = work_lib.merge(mean.linear(), [{'wi/kernel': spec}] * 2, mesh)
    found = compiler.report(work, topology='v5e:4x4')
    self.assertTrue(found.fits)
    self.assertEqual(found.held, {'models': 2 * 64 * 64 * 4 // 16})
    self.assertEqual(found.bound, 'memory')
    self.assertEmpty(found.collectives)


if __name__ == '__main__':
  absltest.main()
