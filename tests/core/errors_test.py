# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Mistakes have kinds, so that a caller can catch one of them."""

import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import yaml

import mergejax as mj
from mergejax.core import errors
from mergejax.core import tree

KINDS = ('Recipe', 'Checkpoint', 'Structure', 'Config', 'Data')


def leaf(size=2):
  return {'w': np.ones(size, np.float32)}


class KindsTest(parameterized.TestCase):
  def assert_kind(self, kind, call, pattern):
    with self.assertRaisesRegex(mj.UserError, pattern) as caught:
      call()
    self.assertIs(type(caught.exception), getattr(errors, f'{kind}Error'))

  def folder(self):
    return pathlib.Path(self.create_tempdir().full_path)

  def test_recipe(self):
    file = self.folder() / 'r.yaml'
    self.assert_kind('Recipe', lambda: mj.load_recipe(file), 'no recipe at')
    file.write_text('merge_method: [')
    self.assert_kind('Recipe', lambda: mj.load_recipe(file), 'not YAML')
    file.write_text('merge_methods: linear')
    self.assert_kind('Recipe', lambda: mj.load_recipe(file), 'r.yaml: .*')

  def test_nothing_known_is_said(self):
    self.assertEqual(
      errors.near('a', [], 'task'), "Unknown task 'a'. None is known here."
    )

  def test_checkpoint(self):
    path = self.folder() / 'model.npz'
    self.assert_kind('Checkpoint', lambda: mj.open_checkpoint(path), 'model')
    mj.save_checkpoint(path, leaf(), format='npz')
    save = lambda: mj.save_checkpoint(path, leaf(), format='npz')
    self.assert_kind('Checkpoint', save, 'already exists')
    read = lambda: mj.open_checkpoint(path).read(['v'])
    self.assert_kind('Checkpoint', read, "'v'")

  @parameterized.named_parameters(
    ('shape', lambda: mj.merge([leaf(2), leaf(3)], 'linear'), 'w'),
    ('key', lambda: tree.specs({'k': jax.random.key(0)}), 'k: A random key'),
    ('none_floating', lambda: mj.search.gradient.learn(
        [{'n': np.arange(2)}], lambda *_: 0.0, []), 'no floating'),
  )  # fmt: skip
  def test_structure(self, call, pattern):
    self.assert_kind('Structure', call, pattern)

  @parameterized.named_parameters(
    ('method', lambda: mj.merge([leaf()], 'liner'), "Did you mean 'linear'"),
    ('option', lambda: mj.ties(density=7.0), 'density'),
    ('base', lambda: mj.merge([leaf()], 'ties'), 'base='),
    ('none', lambda: mj.merge([], 'linear'), 'at least one model'),
    ('rule', lambda: mj.merge(
        [leaf()], 'linear', rules=[('x', 'copy')]), 'first match of no leaf'),
    ('mesh', lambda: mj.make_mesh(branch=3), 'does not fit'),
    ('prior', lambda: mj.experts.ensemble.check_prior(np.ones(2), 2), 'sum'),
    ('barrier', lambda: mj.analysis.line(
        leaf(), leaf(), lambda p: {}, points=1), 'at least two points'),
    ('format', lambda: mj.save_checkpoint('x', leaf(), format='nzp'), 'npz'),
  )  # fmt: skip
  def test_config(self, call, pattern):
    self.assert_kind('Config', call, pattern)

  @parameterized.named_parameters(
    ('statistics', lambda: mj.merge([leaf(), leaf()], 'fisher'), 'statistics'),
    ('labels', lambda: mj.select.logme(np.ones((3, 2)), [0, 1]), 'labels'),
  )  # fmt: skip
  def test_data(self, call, pattern):
    self.assert_kind('Data', call, pattern)

  def test_no_finite_score_is_of_the_data(self):
    log = mj.search.Log()
    log.add([0.0], {'t': float('nan')})
    self.assert_kind('Data', log.best, 'finite')

  @parameterized.parameters(*KINDS)
  def test_where_a_mistake_was_made_keeps_its_kind(self, kind):
    error = getattr(errors, f'{kind}Error')('No row.')
    found = error.at(pathlib.Path('a.tsv'))
    self.assertIs(type(found), type(error))
    self.assertEqual(found.message, 'a.tsv: No row.')

  def test_a_suite_tells_the_kind_and_the_file(self):
    file = self.folder() / 'suite.yaml'
    file.write_text(yaml.safe_dump({'tasks': {}}))
    load = lambda: mj.evaluation.suite.load(file)
    self.assert_kind('Config', load, 'suite.yaml: ')


if __name__ == '__main__':
  absltest.main()
