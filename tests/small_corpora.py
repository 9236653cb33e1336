# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Small domains of text, which their words tell apart."""

import json
import random

DOMAINS = {
  'colours': 'red green blue grey',
  'metals': 'iron lead zinc tin',
  'numbers': '11 22 33 44',
}


def write(folder, domains):
  """A new folder with a file of 40 documents for each `{domain: 'its words'}`."""
  rng = random.Random(0)
  folder.mkdir()
  for domain, words in domains.items():
    rows = [' '.join(rng.choices(words.split(), k=20)) for _ in range(40)]
    (folder / f'{domain}.jsonl').write_text(
      '\n'.join(json.dumps({'text': row}) for row in rows)
    )
  return folder
