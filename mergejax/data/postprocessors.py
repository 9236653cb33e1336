# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""From what a model says to what metrics compare.

seqio calls each with a text, `example` (a row of the task) and `is_target`.
What is no answer at all becomes one that is wrong.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

# Words before a noun, which do not say which it is.
_DETERMINERS = frozenset(
  'a an few her his each every many much my our some that the their these '
  'this those which whose your'.split()
)


def _text(value):
  return value.decode('utf-8') if isinstance(value, bytes) else str(value)


def number(text: str, default: float = -1.0, **unused: Any) -> float:
  """The number that a text is, or `default`.

  Example:
    >>> number('2.4'), number('two')
    (2.4, -1.0)
  """
  del unused
  try:
    return float(text)
  except ValueError:
    return default


def label(
  text: str, labels: Sequence[str], default: int = -1, **unused: Any
) -> int:
  """The place of a text in `labels`, to the letter, or `default`.

  Example:
    >>> label('yes', ['no', 'yes']), label(' yes', ['no', 'yes'])
    (1, -1)
  """
  del unused
  return labels.index(text) if text in labels else default


def grouped_label(
  text: str, labels: Sequence[str], example: Row, **unused: Any
) -> dict[str, Any]:
  """As `label`, with the question of MultiRC that it answers."""
  del unused
  group = tuple(int(example[f'idx/{part}']) for part in _PARTS)
  return {'group': group, 'value': label(text, labels)}


_PARTS = ('paragraph', 'question')


def answers(
  text: str, example: Row, is_target: bool = False, **unused: Any
) -> str | list[str]:
  """What is said; of the target, all the answers that are right."""
  del unused
  return [_text(each) for each in example['answers']] if is_target else text


def grouped_answers(
  text: str, example: Row, is_target: bool = False, **unused: Any
) -> dict[str, Any]:
  """As `answers`, with the query of ReCoRD that they answer."""
  del unused
  group = tuple(int(example[f'idx/{part}']) for part in ('passage', 'query'))
  return {'group': group, 'value': answers(text, example, is_target)}


def _bare(text):
  """Without letter case and determiners."""
  words = _text(text).strip().lower().split(' ')
  return ' '.join(word for word in words if word not in _DETERMINERS)


def same_referent(
  text: str, example: Row, is_target: bool = False, **unused: Any
) -> int:
  """WSC: 1 if what is said names the candidate; the target is the label.

  Of "the tall tree" and "the tree", either names the other; "Bob's" and "Bob"
  do not.
  """
  del unused
  if is_target:
    return int(example['label'])
  said, candidate = _bare(text), _bare(example['targets_pretokenized'])
  if not said or ("'" in said) != ("'" in candidate):
    return 0
  ours, theirs = set(said.split(' ')), set(candidate.split(' '))
  return int(ours <= theirs or theirs <= ours)
