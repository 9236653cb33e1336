# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at random moments of a merge, then the same command: the same bytes.

Usage:
  python benchmarks/merge_resume.py [--kills 30] [--folder DIR] [--size 0.1]

Runs `mergejax merge` to its end once, for reference. Then starts it again and
again with another name for the result, kills it after a random time, and
checks that nothing is visible under that name; whenever a run ends by itself,
all files of its result must be the reference's.
"""

import argparse
import hashlib
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import merge_speed
import numpy as np


def sums(folder: pathlib.Path) -> dict[str, str]:
  return {
    file.name: hashlib.sha256(file.read_bytes()).hexdigest()
    for file in sorted(folder.iterdir())
  }


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--kills', type=int, default=30)
  parser.add_argument('--size', default='0.1')
  parser.add_argument('--folder', default='/tmp/mergejax-benchmark')
  parser.add_argument('--json')
  options = parser.parse_args()
  folder = pathlib.Path(options.folder)
  merge_speed.make(folder, options.size)
  recipe = merge_speed.recipe(folder, options.size, 'ties')
  command = [sys.executable, '-m', 'mergejax', 'merge', str(recipe)]
  quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  whole = folder / 'resume-whole'
  shutil.rmtree(whole, ignore_errors=True)
  started = time.perf_counter()
  subprocess.run([*command, str(whole)], check=True, **quiet)
  seconds = time.perf_counter() - started
  reference = sums(whole)
  rng = np.random.default_rng(0)
  kills, inside, ended = 0, 0, 0
  out = folder / 'resume-out'
  work = folder / '.resume-out.partial'
  shutil.rmtree(out, ignore_errors=True)
  shutil.rmtree(work, ignore_errors=True)
  while kills < options.kills or ended == 0:
    process = subprocess.Popen([*command, str(out)], **quiet)
    try:
      # Once enough were killed, the last one may end.
      limit = seconds * rng.uniform(0.2, 1.1) if kills < options.kills else None
      code = process.wait(limit)
      assert code == 0, code
      assert sums(out) == reference, 'other bytes'
      assert not work.exists()
      ended += 1
      shutil.rmtree(out)
    except subprocess.TimeoutExpired:
      process.send_signal(signal.SIGKILL)
      process.wait()
      kills += 1
      inside += work.exists()
      assert not out.exists() or sums(out) == reference, 'a half result'
      shutil.rmtree(out, ignore_errors=True)
  result = {'kills': kills, 'while_merging': inside, 'completed': ended}
  print(
    f'{kills} kills, {inside} of them with work in progress; {ended} results '
    'completed after them, all of them the bytes of the uninterrupted merge'
  )
  shutil.rmtree(whole)
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(result, indent=2) + '\n')
  print(json.dumps(result))


if __name__ == '__main__':
  main()
