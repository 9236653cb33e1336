# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""A command of `mergejax`, run in this process."""

import contextlib
import io

import gin
from mergejax.cli import main


def run(*arguments):
  """`(exit code, stdout, stderr)`."""
  gin.clear_config()
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = main.main([str(a) for a in arguments])
  return code, out.getvalue(), err.getvalue()
