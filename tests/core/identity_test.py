# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""The same work has the same record, in whatever process."""

import dataclasses
import functools
import json
import pathlib
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import numpy as np

from mergejax.core import errors
from mergejax.core import identity
from mergejax.core import typing


@dataclasses.dataclass(frozen=True)
class Work:
  options: dict
  spec: typing.LeafSpec


class CanonicalTest(parameterized.TestCase):
  def test_order_does_not_count(self):
    spec = typing.LeafSpec((2, 3), np.dtype('float32'))
    one = Work({'a': 1, 'b': {'x', 'y', 'z'}}, spec)
    two = Work({'b': {'z', 'y', 'x'}, 'a': 1}, spec)
    self.assertEqual(identity.digest(one), identity.digest(two))
    self.assertEqual(list(identity.canonical(two)['options']), ['a', 'b'])

  @parameterized.parameters(
    ({'a': 1}, {'a': 2}),
    ({'a': 1}, {'b': 1}),
    ([1, 2], [2, 1]),
    (1, '1'),
    (1, 1.5),
    (True, 'true'),
    (None, 0.0),
    (np.zeros(2), np.zeros((2, 1))),
    (np.zeros(2), np.zeros(2, np.float32)),
    (np.zeros(2), np.array([0.0, 1e-300])),
    (np.dtype('float32'), np.dtype('float16')),
  )
  def test_different_work_differs(self, first, second):
    self.assertNotEqual(identity.digest(first), identity.digest(second))

  def test_comes_back_from_json_as_it_was(self):
    value = identity.canonical({
      'a': (1, np.float32(0.1), pathlib.Path('x/y')), 'b': np.int64(3), 2: None,
    })  # fmt: skip
    self.assertEqual(json.loads(json.dumps(value)), value)
    self.assertEqual(list(value), ['2', 'a', 'b'])

  def test_an_object_of_its_own_is_refused(self):
    with self.assertRaisesRegex(TypeError, 'object has no canonical form'):
      identity.canonical({'a': object()})


class RecordTest(absltest.TestCase):
  def test_differences_are_told(self):
    found = identity.record({'seed': 0, 'data': {'rows': 2, 'name': 'x'}})
    wanted = identity.record({'seed': 1, 'data': {'rows': 2}})
    with self.assertRaisesRegex(
      errors.UserError,
      'log was begun with other settings:\n  data/name: x there, None asked for'
      '\n  seed: 0 there, 1 asked for\nRemove it',
    ):
      identity.check_same(found, wanted, 'log')
    identity.check_same(found, identity.record(found['work']), 'log')

  def test_other_code_is_other_work(self):
    wanted = identity.record({'seed': 0})
    found = {**wanted, 'code': {**wanted['code'], 'jax': '0.1'}}
    with self.assertRaisesRegex(errors.UserError, 'jax: 0.1 there'):
      identity.check_same(found, wanted, 'log')

  def test_old_journals_are_refused(self):
    for found in (None, {}, {'kind': 'grid'}, 'text'):
      with self.assertRaisesRegex(errors.UserError, 'begun with other'):
        identity.check_same(found, identity.record({'seed': 0}), 'log')

  def test_the_code_is_the_source(self):
    package = pathlib.Path(identity.__file__).resolve().parent.parent
    self.assertLen(identity.code()['mergejax'], 64)
    self.assertTrue((package / 'merging').is_dir())
    mended = package / 'merging' / 'engine.py'
    read = pathlib.Path.read_bytes
    edited = lambda file: read(file) + b'# mended' * (file == mended)
    with mock.patch.object(pathlib.Path, 'read_bytes', edited):
      other = identity.code.__wrapped__()
    self.assertNotEqual(other, identity.code())
    self.assertEqual(identity.code.__wrapped__(), identity.code())


class DifferencesTest(absltest.TestCase):
  def test_long_values_are_shown_where_they_differ(self):
    models = lambda name: [{'model': 'a' * 70, 'weight': 1}, {'model': name}]
    (line,) = errors.differences(
      {'models': models('b')}, {'models': models('c')}
    )
    there, asked = line.removesuffix(' asked for').split(' there, ')
    self.assertIn("'b'", there)
    self.assertIn("'c'", asked)
    self.assertLess(len(line), 160)
    line = errors.differences({'a': 'x' * 99}, {'a': 'y'})[0]
    self.assertEqual(line, f'a: {"x" * 57}... there, y asked for')


class ToldTest(absltest.TestCase):
  def test_functions_tell_what_they_close_over(self):
    def make(number, inner=None):
      def function(x, *, power=2):
        return (inner or abs)(number * x**power)

      return function

    told = lambda value: json.dumps(identity.told(value))
    self.assertEqual(told(make(1)), told(make(1)))
    different = [
      make(1), make(2), make(1, make(1)), make(1, make(2)),
      functools.partial(make(1), power=3), Work({'f': make(1)}, None),
      {'f': make(2)}, lambda x: 0.5 * x, lambda x: 0.25 * x,
    ]  # fmt: skip
    self.assertLen({told(one) for one in different}, len(different))
    for one in (*different, object(), print, Work, np.ones(2)):
      self.assertNotIn('0x', told(one))
    (line,) = errors.differences(
      identity.told(make(1, make(3))), identity.told(make(1, make(4)))
    )
    self.assertEqual(line, 'inner/number: 3 there, 4 asked for')

  def test_what_holds_itself_comes_to_an_end(self):
    held = {}
    held['again'] = lambda: held
    self.assertIn('itself', json.dumps(identity.told(held)))


if __name__ == '__main__':
  absltest.main()
