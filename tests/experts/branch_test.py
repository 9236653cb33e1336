# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts side by side are experts alone, on every layout."""

import contextlib
import io
import json
import pathlib
import re
import socket
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import environments
import jax
import numpy as np
import tiers

from mergejax import partition
from mergejax.core import errors
from mergejax.core import tree
from mergejax.experts import branch
from mergejax.merging import on_mesh
from mergejax.methods import arithmetic
from mergejax.methods import ties
from mergejax.training import optim

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import side_by_side  # noqa: E402

SCRIPT = pathlib.Path(side_by_side.__file__)


def _iota_groups(text):
  shape, sizes, order = re.fullmatch(
    r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text
  ).groups()
  ints = lambda t: [int(i) for i in t.split(',')]
  devices = np.arange(np.prod(ints(sizes))).reshape(ints(sizes))
  if order:
    devices = devices.transpose(ints(order))
  return devices.reshape(ints(shape)).tolist()


def _mesh_groups(text):
  axes, over = re.fullmatch(r'mesh\[(.*?)\] \{(.*?)\}', text).groups()
  sizes = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", axes)}
  over = re.findall(r"'(\w+)'", over)
  devices = np.arange(np.prod(list(sizes.values()))).reshape(*sizes.values())
  names = list(sizes)
  rest = [names.index(n) for n in names if n not in over]
  devices = devices.transpose(rest + [names.index(n) for n in over])
  return devices.reshape(-1, np.prod([sizes[n] for n in over])).tolist()


def _listed_groups(text):
  groups = re.findall(r'\{([\d,]+)\}', text)
  return [[int(i) for i in g.split(',')] for g in groups]


def replica_groups(hlo: str) -> list[list[list[int]]]:
  """The device groups of every collective in compiled HLO.

  XLA writes them as lists, as a transposed iota, or by axes of a mesh.
  """
  found = []
  for line in hlo.splitlines():
    if 'collective-permute(' in line:
      pairs = re.search(r'source_target_pairs=(\{\{.*?\}\})', line)
      found.append(_listed_groups(pairs[1]))
    if not re.search(
      r' (all-reduce|all-gather|reduce-scatter|all-to-all)(-start)?\(', line
    ):
      continue
    for pattern, read in (
      (r'replica_groups=(mesh\[.*?\] \{.*?\})', _mesh_groups),
      (
        r'replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)',
        _iota_groups,
      ),
      (r'replica_groups=(\{.*?\}\}|\{\})', _listed_groups),
    ):
      match = re.search(pattern, line)
      if match:
        found.append(read(match[1]))
        break
    else:
      raise ValueError(f'unknown replica groups: {line[:300]}')
  return found


@tiers.slow('test_stacked_.*_adafactor', 'test_no_collective_.*1')
class BranchTest(parameterized.TestCase):
  def test_the_reader_of_hlo_sees_crossings(self):
    self.assertEqual(
      replica_groups(
        'x = all-reduce(y), replica_groups={{0,1},{2,3}}, a\n'
        'x = all-reduce(y), channel_id=1, replica_groups=[2,2]<=[2,2]T(1,0), b\n'
        'x = all-gather(y), replica_groups=[2,2]<=[4], b\n'
        "x = all-reduce(y), replica_groups=mesh['a'=2,'b'=2] {'a'}, c\n"
      ),
      [
        [[0, 1], [2, 3]],
        [[0, 2], [1, 3]],
        [[0, 1], [2, 3]],
        [[0, 2], [1, 3]],
      ],
    )

  @parameterized.parameters(True, False)
  def test_no_collective_crosses_branch(self, batched):
    mesh = partition.make_mesh(branch=4, data=2)
    step, state, stream, place, _ = side_by_side.build(mesh, batched=batched)
    batch = place(next(stream))
    hlo = step.lower(state, batch).compile().as_text()
    groups = replica_groups(hlo)
    self.assertNotEmpty(groups, 'data parallelism must reduce gradients')
    branch_of = {
      device.id: i
      for i, devices in enumerate(mesh.devices)
      for device in devices.flat
    }
    for one in groups:
      self.assertNotEmpty(one, 'an empty group is all devices')
      for group in one:
        self.assertLen({branch_of[d] for d in group}, 1, str(one))

  def test_merging_does_cross_branch(self):
    mesh = partition.make_mesh(branch=4, data=2)
    _, state, *_ = side_by_side.build(mesh)
    from mergejax.methods import mean

    merge = jax.jit(lambda p: on_mesh.merge_experts(p, mean.linear()))
    hlo = merge.lower(state.params).compile().as_text()
    self.assertTrue(
      any(len(g) >= 4 for one in replica_groups(hlo) for g in one)
    )

  @parameterized.named_parameters(
    ('none', None, {}, 'give it with `base='),
    # Shapes that would be broadcast.
    ('of_other_shapes', {'w': (4,), 'b': (4,)}, {}, r'! w \[4\] expected'),
    ('lacks_a_leaf', {'w': (3, 4)}, {}, r'\+ b'),
    ('has_more', {'w': (3, 4), 'b': (4,), 'c': (4,)}, {}, r'- c'),
    ('other_counts', None, {'b': (3, 4)}, r'b: \[3, 4\]'),
    ('no_axis', None, {'b': ()}, r'b: \[\]'),
  )
  def test_what_does_not_fit_is_not_merged(self, base, changed, message):
    shapes = {'w': (2, 3, 4), 'b': (2, 4)} | changed
    tree = lambda own: {path: np.ones(shape) for path, shape in own.items()}
    base = None if base is None else tree(base)
    for method in (arithmetic.task_arithmetic(), ties.ties()):
      with self.assertRaisesRegex(errors.UserError, message):
        on_mesh.merge_experts(tree(shapes), method, base=base)

  @parameterized.named_parameters(
    ('adafactor', optim.adafactor(0.05)),
    ('adamw_clipped', optim.adamw(0.01, max_gradient_norm=0.1)),
  )
  def test_stacked_equals_separate_runs(self, optimizer):
    mesh = partition.make_mesh(branch=2, data=4)
    step, state, stream, place, one_step = side_by_side.build(mesh, optimizer)
    alone = [
      jax.tree.map(lambda x, i=i: np.asarray(x)[i], state)
      for i in range(side_by_side.EXPERTS)
    ]
    one_step = jax.jit(one_step)
    # optax raises floats to integer powers for Adam's bias correction.
    promotion = jax.numpy_dtype_promotion('standard')
    promotion.__enter__()
    self.addCleanup(promotion.__exit__, None, None, None)
    for _ in range(5):
      batch = next(stream)
      state, metrics = step(state, place(batch))
      for i in range(side_by_side.EXPERTS):
        alone[i], single = one_step(
          alone[i], {name: leaf[i] for name, leaf in batch.items()}
        )
        np.testing.assert_allclose(
          metrics['loss'][i], single['loss'], rtol=1e-5
        )
        np.testing.assert_allclose(
          metrics['grad_norm'][i], single['grad_norm'], rtol=1e-4
        )
    for i in range(side_by_side.EXPERTS):
      mine = tree.flatten(branch.unstack(state.params, i))
      for path, leaf in tree.flatten(alone[i].params).items():
        np.testing.assert_allclose(
          mine[path], leaf, rtol=1e-3, atol=1e-4, err_msg=path
        )

  def test_batched_equals_one_after_the_other(self):
    mesh = partition.make_mesh(branch=2, data=4)
    results = []
    for batched in (True, False):
      step, state, stream, place, _ = side_by_side.build(mesh, batched=batched)
      for _ in range(3):
        state, metrics = step(state, place(next(stream)))
      results.append(np.asarray(metrics['loss']))
    np.testing.assert_allclose(*results, rtol=1e-5)

  def test_experts_get_their_own_keys(self):
    mesh = partition.make_mesh(branch=4, data=2)
    _, state, *_ = side_by_side.build(mesh)
    self.assertLen({tuple(k) for k in np.asarray(state.key).tolist()}, 4)

  def test_experts_must_divide_over_branches(self):
    mesh = partition.make_mesh(branch=4, data=2)
    with self.assertRaisesRegex(errors.UserError, '6 experts .* 4 branches'):
      branch.check_experts(6, mesh)

  def test_rows_must_divide_over_data(self):
    mesh = partition.make_mesh(branch=2, data=4)
    batch = {'x': np.zeros((2, 6, 3), np.float32)}
    with self.assertRaisesRegex(errors.DataError, '6 rows.* over 4 data'):
      branch.place_batch(mesh, partition.standard(), batch)
    whole = partition.standard().replace(activations={'batch': None})
    placed = branch.place_batch(mesh, whole, batch)
    self.assertEqual(placed['x'].addressable_shards[0].data.shape, (1, 6, 3))

  def test_optimizer_leaves_follow_their_parameters(self):
    mesh = partition.make_mesh(branch=2, data=1, model=4)
    _, state, *_ = side_by_side.build(mesh, optim.adamw(0.01))
    flat = jax.tree_util.tree_flatten_with_path(
      jax.tree.map(lambda leaf: leaf.sharding, state)
    )[0]
    matching = [s for p, s in flat if "'wi_0'" in str(p)]
    self.assertLen(matching, 3)  # the parameter and two moments
    for one in matching:
      self.assertEqual(tuple(one.spec), ('branch', None, 'model'))


def run_script(*arguments, devices):
  return subprocess.Popen(
    [sys.executable, SCRIPT, *map(str, arguments)],
    env=environments.of(devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def result(process):
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err[-3000:]
  lines = [line for line in out.splitlines() if line.startswith('{')]
  return json.loads(lines[-1]) if lines else None


class LayoutsTest(absltest.TestCase):
  def trained(self, branches, data):
    """What the script prints, in this process."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
      side_by_side.main(branches, data)
    return json.loads(said.getvalue())

  def test_one_device_eight_devices_and_two_processes_agree(self):
    with environments.one_device():
      one = self.trained(1, 1)
    eight = self.trained(4, 2)
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      address = f'127.0.0.1:{probe.getsockname()[1]}'
    pair = [run_script(4, 2, address, 2, i, devices=4) for i in range(2)]
    two = [result(process) for process in pair][0]
    self.assertLess(one['losses'][-1][0], one['losses'][0][0])
    for other in (eight, two):
      np.testing.assert_allclose(other['losses'], one['losses'], rtol=1e-5)
      np.testing.assert_allclose(
        other['merged_norm'], one['merged_norm'], rtol=1e-5
      )


if __name__ == '__main__':
  absltest.main()
