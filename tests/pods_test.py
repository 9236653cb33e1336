# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What is told of a compiled program is what the program says of itself."""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import json
import pathlib
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
from mergejax.checkpoints import checkpoint
from mergejax.cli import main as cli
from mergejax.core import errors
from mergejax.core import typing
from mergejax.experts import branch
from mergejax.methods import mean
from mergejax.methods import ties
from mergejax.nn import lm
from mergejax.pods import chips
from mergejax.pods import collectives
from mergejax.pods import compiler
from mergejax.pods import hlo
from mergejax.pods import operations
from mergejax.pods import report as report_lib
from mergejax.pods import traffic
from mergejax.pods import work as work_lib

P = jax.sharding.PartitionSpec
LENGTHS = {'decoder_input_tokens': 8, 'decoder_target_tokens': 8}


def tiny(**changes):
  """A decoder of two scanned layers."""
  sizes = dict(
    vocab_size=32, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=32,
    num_layers=2, scan_layers=True, param_scan_axis=0, remat_policy='full',
  )  # fmt: skip
  return lm.LanguageModel(lm.LMConfig(**{**sizes, **changes}))


@functools.cache
def compiled_step():
  """`(work, report, compiled)` of a tiny model on data 4, model 2."""
  trainer = training.Trainer(
    tiny(), training.optim.adafactor(0.1, min_dim_size_to_factor=8),
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


class GroupsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('replica_groups={{0,1},{2,3}}', [(0, 1), (2, 3)]),
    ('replica_groups={}, x={{9}}', [tuple(range(8))]),
    ('replica_groups=[2,4]<=[8]', [(0, 1, 2, 3), (4, 5, 6, 7)]),
    (
      'replica_groups=[4,2]<=[2,4]T(1,0), b={1}',
      [(0, 4), (1, 5), (2, 6), (3, 7)],
    ),
    (
      'replica_groups=[4,2]<=[2,2,2]T(0,2,1)',
      [(0, 2), (1, 3), (4, 6), (5, 7)],
    ),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [(0, 4), (1, 5), (2, 6), (3, 7)]),
    (
      "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,2,2]T(0,2,1)) {'b'}, x",
      [(0, 2), (1, 3), (4, 6), (5, 7)],
    ),
    ('source_target_pairs={{0,1},{1,0}}', [(0, 1), (1, 0)]),
    ('channel_id=1', None),
  )  # fmt: skip
  def test_formats(self, text, expected):
    self.assertEqual(collectives.groups_of(text, 8), expected)

  @parameterized.parameters(
    ('[2,4]<=[8]', ('data', 'model')),
    ('[4,2]<=[8]', ('model',)),
    ('[4,2]<=[2,4]T(1,0)', ('branch',)),
    ('[4,2]<=[2,2,2]T(0,2,1)', ('data',)),
    ('{{0,7},{1,6}}', ('branch', 'data', 'model')),
    ('{{0},{1}}', ()),
  )  # fmt: skip
  def test_axes(self, text, expected):
    mesh = partition.make_mesh(branch=2, data=2, model=2)
    groups = collectives.groups_of(f'replica_groups={text}', 8)
    self.assertEqual(collectives.axes_of(groups, mesh), expected)


class CollectivesTest(absltest.TestCase):
  def test_bytes_of_a_program_made_by_hand(self):
    """A sum, a gathering and a permutation, the last in a loop of five."""
    mesh = partition.make_mesh(data=4, model=2)
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def body(x):  # [16, 4] on each device
      total = jax.lax.psum(x, 'model')
      whole = jax.lax.all_gather(total, 'data', tiled=True)
      turn = lambda _, y: jax.lax.ppermute(y, 'data', ring) * 2.0
      return jax.lax.fori_loop(0, 5, turn, total) + whole[:16]

    spec = P('data', 'model')
    fn = jax.jit(
      jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )  # fmt: skip
    shape = jax.ShapeDtypeStruct(
      (64, 8), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec)
    )
    text = fn.lower(shape).compile().as_text()
    found = {
      each.kind: each for each in collectives.found(hlo.Program(text), mesh)
    }
    size = 16 * 4 * 4
    self.assertEqual(
      found,
      {
        'all-reduce': collectives.Collective(
          'all-reduce', ('model',), 1, size, size, size
        ),
        'all-gather': collectives.Collective(
          'all-gather', ('data',), 1, size, 3 * size, 4 * size
        ),
        'collective-permute': collectives.Collective(
          'collective-permute', ('data',), 5, 5 * size, 5 * size, size
        ),
      },
    )

  def test_parts_of_one_collective_count_once(self):
    """What the TPU compiler spreads over kernels has one channel."""
    line = (
      '  %{} = f32[8]{{0}} all-gather(%p), channel_id=7, '
      'replica_groups=[1,8]<=[8], dimensions={{0}}\n'
    )
    text = (
      '%a (p: f32[1]) -> f32[8] {\n  %p = f32[1]{0} parameter(0)\n  ROOT'
      + line.format('x')[1:]
      + '}\n\n%b (p: f32[1]) -> f32[8] {\n  %p = f32[1]{0} parameter(0)\n  ROOT'
      + line.format('y')[1:]
      + '}\n\nENTRY %main (p: f32[1]) -> f32[8] {\n'
      '  %p = f32[1]{0} parameter(0)\n'
      '  %s = f32[8]{0} fusion(%p), kind=kCustom, calls=%a\n'
      '  ROOT %d = f32[8]{0} fusion(%p), kind=kCustom, calls=%b\n}\n'
    )
    (row,) = collectives.found(hlo.Program(text), partition.make_mesh())
    self.assertEqual((row.count, row.given_bytes, row.sent_bytes), (1, 4, 28))


class LoopsTest(absltest.TestCase):
  def test_counted_by_the_condition(self):
    """A loop that does not say its length: from 0, below 8, two at a time."""
    text = """
%cond (s: (s32[], f32[4])) -> pred[] {
  %s = (s32[], f32[4]{0}) parameter(0)
  %n = s32[] constant(8)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]{0}) parameter(0)
  %two = s32[] constant(2)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[4]{0} get-tuple-element(%s), index=1
  %next = s32[] add(%i, %two)
  %y = f32[4]{0} add(%x, %x)
  ROOT %t = (s32[], f32[4]{0}) tuple(%next, %y)
}

ENTRY %main (x: f32[4]) -> (s32[], f32[4]) {
  %x = f32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[4]{0}) tuple(%zero, %x)
  ROOT %w = (s32[], f32[4]{0}) while(%t), condition=%cond, body=%body
}
"""
    program = hlo.Program(text)
    self.assertEqual(program.runs['body'], 4)
    # Two operands and a result of 16 bytes; the counter's 4 + 4 + 4, and the
    # condition's 4 + 4 + 1.
    self.assertEqual(traffic.found(program), 4 * (48 + 12 + 9))

  def test_a_slice_counts_alone(self):
    """Of a stack of layers that a scan walks, each step reads its own."""
    stack = jax.ShapeDtypeStruct((16, 256, 256), jnp.float32)
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)

    def fn(stack, x):
      return jax.lax.scan(lambda x, w: (jnp.tanh(x + w), None), x, stack)[0]

    text = jax.jit(fn).lower(stack, x).compile().as_text()
    one = 256 * 256 * 4
    found = traffic.found(hlo.Program(text))
    # Read a layer and x, write x; copies of x may come to it.
    self.assertGreaterEqual(found, 16 * 3 * one)
    self.assertLess(found, 16 * 6 * one)


class OperationsTest(absltest.TestCase):
  def test_products_in_loops_and_backward_passes(self):
    w = jax.ShapeDtypeStruct((6, 8, 8), jnp.float32)
    x = jax.ShapeDtypeStruct((4, 8), jnp.float32)

    def loss(w, x, remat):
      layer = lambda x, w: (jnp.tanh(x @ w), None)
      layer = jax.checkpoint(layer) if remat else layer
      return jnp.sum(jax.lax.scan(layer, x, w)[0])

    forward = 6 * 2 * 4 * 8 * 8
    of = lambda fn, remat: operations.products(
      functools.partial(fn, remat=remat), w, x
    )
    self.assertEqual(of(loss, False), forward)
    both = jax.grad(loss, argnums=(0, 1))
    self.assertEqual(of(both, False), 3 * forward)
    self.assertEqual(of(both, True), 4 * forward)

  def test_convolutions_and_the_dearest_branch(self):
    image = jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 2, 5), jnp.float32)
    conv = lambda x, k: jax.lax.conv_general_dilated(
      x, k, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    self.assertEqual(
      operations.products(conv, image, kernel), 2 * 4 * 4 * 5 * 3 * 3 * 2
    )
    square = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    either = lambda x: jax.lax.cond(
      x[0, 0] > 0, lambda x: x @ x, lambda x: x @ x @ x, x
    )
    self.assertEqual(operations.products(either, square), 4 * 4**3)


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

  def test_rows_that_do_not_divide(self):
    trainer = compiled_step()[0]
    with self.assertRaisesRegex(errors.DataError, '7 rows'):
      work_lib.training_step(trainer, LENGTHS, rows=7)


def tree_size(params):
  return sum(leaf.size for leaf in jax.tree.leaves(params))


class FitsTest(absltest.TestCase):
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
    row = lambda axes, sent: collectives.Collective(
      'all-reduce', axes, 1, 1, sent, 1
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
    over = dataclasses.replace(found, slices=2, crossing=('branch',))
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

  def test_a_refusal_is_read(self):
    """What the TPU compiler says when a program does not fit."""
    work = work_lib.Work(
      'step', partition.make_mesh(),
      (work_lib.Program(jax.jit(jnp.sin), (jnp.ones(8),)),), {},
    )  # fmt: skip
    message = (
      'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G '
      'of 15.75G hbm. Exceeded hbm capacity by 4.75G.'
    )
    refuse = mock.patch.object(
      jax.stages.Lowered, 'compile',
      side_effect=jax.errors.JaxRuntimeError(message),
    )  # fmt: skip
    with refuse:
      found = compiler.report(work)
    self.assertEqual(found.used, int(20.5 * 2**30))
    self.assertEqual(found.memory, int(15.75 * 2**30))
    self.assertFalse(found.fits)


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


class CommandTest(absltest.TestCase):
  def run_command(self, *arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      code = cli.main(['compile', *arguments])
    return code, out.getvalue(), err.getvalue()

  def works_of(self, *arguments):
    """What a command would compile."""
    found = []

    def report(work, **_):
      found.append(work)
      return report_lib.Report(name='', topology='', mesh={}, held={})

    with mock.patch.object(compiler, 'report', report):
      code, _, err = self.run_command('--topology', 'here', *arguments)
    self.assertEqual((code, err), (0, ''))
    return found

  def test_a_gin_run_whose_data_are_not_there(self):
    settings = {
      'TRAIN_FILE': '/nowhere.tsv', 'INPUTS': '{a}', 'TARGETS': '{b}',
      'MODEL_DIR': '/nowhere', 'BATCH_SIZE': '8',
      'LENGTHS': "{'inputs': 8, 'targets': 4}",
      'MESH': "{'data': 4, 'model': 2}", 't5.T5Config.emb_dim': '8',
    }  # fmt: skip
    step, init = self.works_of(
      '--gin_file=gin/runs/text_to_text.gin',
      *(f'--gin.{name}={value}' for name, value in settings.items()),
    )
    self.assertEqual(dict(step.mesh.shape)['model'], 2)
    # Eight rows on four slices: three arrays of 8 inputs, five of 4 targets.
    size = work_lib.shard_bytes(step.held['batch'])
    self.assertEqual(size, 2 * 4 * (3 * 8 + 5 * 4))
    self.assertEqual(step.tokens, 8 * 12)
    self.assertEqual(init.name, 'fresh state')

  def test_a_run_of_experts_whose_text_is_not_there(self):
    (step,) = self.works_of(
      '--gin_file=gin/runs/branch_train_merge.gin', '--experts=6',
      '--skip_init', '--gin.CORPORA=/nowhere', '--gin.BATCH_SIZE=8',
      '--gin.LENGTH=16', '--mesh=branch=2,data=4',
    )  # fmt: skip
    batch = step.held['batch']['decoder_target_tokens']
    self.assertEqual(batch.shape, (6, 8, 16))
    self.assertEqual(batch.sharding.shard_shape(batch.shape), (3, 2, 16))

  def test_a_recipe(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    params = {'a': {'kernel': np.ones((16, 4), np.float32)}}
    for name in ('one', 'two'):
      checkpoint.save_checkpoint(folder / name, params, format='safetensors')
    recipe = folder / 'recipe.yaml'
    recipe.write_text(
      'merge_method: linear\nmodels:\n'
      f'  - model: {folder}/one\n    parameters: {{weight: 1.0}}\n'
      f'  - model: {folder}/two\n    parameters: {{weight: 2.0}}\n'
    )
    code, out, err = self.run_command(
      '--topology', 'here', '--recipe', str(recipe)
    )
    self.assertEqual((code, err), (0, ''))
    self.assertIn('merge of 2 models on cpu: 8 devices (data 8)', out)
    self.assertIn('no collectives', out)

  def test_mistakes(self):
    for arguments, message in (
      (['--topology', 'v5e'], 'needs --gin_file'),
      (['--topology', 'v5e', '--recipe', 'x'], 'shape of its slice'),
      (
        ['--topology', 'here', '--recipe', 'x', '--mesh', 'date=2'],
        'Unknown mesh axis',
      ),
    ):
      code, _, err = self.run_command(*arguments)
      self.assertEqual(code, 2)
      self.assertIn(message, err)


if __name__ == '__main__':
  absltest.main()
