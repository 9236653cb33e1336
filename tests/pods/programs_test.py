# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""What is read of a program: what it sends, moves and computes, loops included."""

import functools

from absl.testing import absltest
from absl.testing import parameterized
import described_chips
import jax
import jax.numpy as jnp
from jax.scipy import linalg

from mergejax import partition
from mergejax.pods import collectives
from mergejax.pods import hlo
from mergejax.pods import operations
from mergejax.pods import traffic

P = jax.sharding.PartitionSpec
# Of four slices of four: two and two, chip by chip, and all together.
PAIRS_OF_SLICES = '{{0,4},{1,5},{2,6},{3,7},{8,12},{9,13},{10,14},{11,15}}'
ALL_CHIPS = '{{' + ','.join(map(str, range(16))) + '}}'


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
    ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2}", None),  # a part of an axis
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


class CollectivesTest(parameterized.TestCase):
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
    self.assertEndsWith(found['all-gather'].source, 'all_gather')
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

  def test_a_sum_of_which_parts_are_kept(self):
    """The TPU compiler names the computation of a reduce-scatter so."""
    text = """
%all-reduce-scatter.1 (p: f32[16]) -> f32[2] {
  %p = f32[16]{0} parameter(0)
  %zero = s32[] constant(0)
  %sum = f32[16]{0} all-reduce(%p), channel_id=1, replica_groups=[1,8]<=[8]
  ROOT %part = f32[2]{0} dynamic-slice(%sum, %zero), dynamic_slice_sizes={2}
}

ENTRY %main (p: f32[16]) -> f32[2] {
  %p = f32[16]{0} parameter(0)
  ROOT %f = f32[2]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (row,) = collectives.found(hlo.Program(text), partition.make_mesh())
    self.assertEqual(
      (row.kind, row.given_bytes, row.sent_bytes), ('reduce-scatter', 64, 56)
    )

  @parameterized.parameters(
    # A sum of each chip with its like in all slices, or in pairs of slices.
    (dict(data=16), '"{1,2,3,4}x{0:3}"', 'ALL_REDUCE', ('data',), 6 / 4),
    (dict(branch=2, data=8), PAIRS_OF_SLICES, 'ALL_REDUCE', ('data',), 1),
    (dict(branch=2, data=8), '"{1,3}x{0:3}"', 'ALL_REDUCE', ('branch',), 1),
    # All exchange with all; a quarter stays in its slice.
    (dict(data=16), ALL_CHIPS, 'ALL_TO_ALL', ('data',), 3 / 4),
    (dict(data=16), '{{3->4},{7->8},{11->12}}', 'ONE_TO_ONE', ('data',), 1),
  )  # fmt: skip
  def test_slices_send_through_their_hosts(
    self, sizes, target, kind, axes, share
  ):
    text = f"""
ENTRY %main (x: f32[16,4]) -> f32[16,4] {{
  %x = f32[16,4]{{1,0}} parameter(0)
  %a = token[] after-all()
  %s = (f32[16,4]{{1,0}}, u32[], token[]) send(%x, %a), channel_id=4, is_host_transfer=true, frontend_attributes={{_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}
  %r = (f32[16,4]{{1,0}}, u32[], token[]) recv(%a), channel_id=3, is_host_transfer=true, frontend_attributes={{_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}
  %sd = token[] send-done(%s), channel_id=4, is_host_transfer=true
  %rd = (f32[16,4]{{1,0}}, token[]) recv-done(%r), channel_id=3, is_host_transfer=true
  %y = f32[16,4]{{1,0}} get-tuple-element(%rd), index=0
  ROOT %z = f32[16,4]{{1,0}} all-reduce(%y), channel_id=5, replica_groups={{{{0,1,2,3}}}}
}}
"""
    mesh = partition.make_mesh(devices=described_chips.CHIPS, **sizes)
    program = hlo.Program(text)
    (between,) = [
      each for each in collectives.found(program, mesh) if each.between
    ]
    self.assertEqual(between.axes, axes)
    self.assertEqual(between.sent_bytes, 256 * share)
    (inside,) = [
      each for each in collectives.found(program, mesh) if not each.between
    ]
    self.assertEqual((inside.axes, inside.sent_bytes), (('data',), 256 * 6 / 4))
    # The hosts' part reads and writes x once, and so does the sum.
    self.assertEqual(traffic.found(program), 4 * 256)


class TrafficTest(absltest.TestCase):
  def test_halves_count_as_one(self):
    """A slice and a copy into fast memory, and a gathering."""
    text = """
ENTRY %main (w: f32[16,256], x: f32[8]) -> f32[64] {
  %w = f32[16,256]{1,0} parameter(0)
  %x = f32[8]{0} parameter(1)
  %s = ((f32[16,256]{1,0}), f32[1,256]{1,0:S(1)}, s32[]) slice-start(%w)
  %sd = f32[1,256]{1,0:S(1)} slice-done(%s)
  %c = (f32[8]{0:S(1)}, f32[8]{0}, u32[]) copy-start(%x)
  %cd = f32[8]{0:S(1)} copy-done(%c)
  %g = (f32[8]{0}, f32[64]{0}) all-gather-start(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %gd = f32[64]{0} all-gather-done(%g)
}
"""
    program = hlo.Program(text)
    self.assertEqual(traffic.found(program), 256 * 4 + 32 + (32 + 256))
    (row,) = collectives.found(program, partition.make_mesh())
    self.assertEqual((row.count, row.given_bytes, row.sent_bytes), (1, 32, 224))

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

  def test_what_each_device_does_counts_on_all(self):
    mesh = partition.make_mesh(data=4, model=2)
    product = jax.shard_map(
      lambda x, w: x @ w, mesh=mesh, in_specs=(P('data'), P(None, 'model')),
      out_specs=P('data', 'model'),
    )  # fmt: skip
    x = jax.ShapeDtypeStruct((8, 6), jnp.float32)
    w = jax.ShapeDtypeStruct((6, 4), jnp.float32)
    self.assertEqual(operations.products(product, x, w), 2 * 8 * 6 * 4)

  def test_linear_systems(self):
    gram = jax.ShapeDtypeStruct((6, 6), jnp.float32)
    product = jax.ShapeDtypeStruct((6, 4), jnp.float32)
    solve = lambda a, b: linalg.cho_solve(linalg.cho_factor(a, lower=True), b)
    self.assertEqual(
      operations.products(solve, gram, product), 6**3 // 3 + 2 * 6**2 * 4
    )


if __name__ == '__main__':
  absltest.main()
