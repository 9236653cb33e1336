# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""LogME against the released NumPy code.

    python benchmarks/logme_speed.py --original DIR

DIR holds `LogME.py` of thuml/LogME (it needs numba). Both sides score the same
features, alternating, medians of seven. Claim: at least as fast.
"""

import argparse
import sys
import time

import numpy as np
import real_data

from mergejax import select

SHAPES = ((5000, 256, 10), (2000, 768, 20), (500, 1024, 5))


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--original', required=True)
  options = parser.parse_args()
  sys.path.insert(0, options.original)
  from LogME import LogME

  rows = []
  for count, width, classes in SHAPES:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    features = (
      rng.normal(size=(count, width))
      + rng.normal(size=(classes, width))[labels]
    )
    times = {'mergejax': [], 'original': []}
    for repeat in range(8):
      for name, call in (
        ('mergejax', select.logme),
        ('original', lambda f, y: LogME(regression=False).fit(f, y)),
      ):
        begin = time.perf_counter()
        score = call(features, labels)
        if repeat:
          times[name].append(time.perf_counter() - begin)
        else:
          print(name, count, width, classes, score)
    medians = {name: float(np.median(t)) for name, t in times.items()}
    medians['times faster'] = medians['original'] / medians['mergejax']
    rows.append({'shape': [count, width, classes], **medians})
    print(rows[-1], flush=True)
  real_data.write('logme_speed', results=rows)


if __name__ == '__main__':
  main()
