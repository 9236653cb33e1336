# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`python -m mergejax`."""

import sys

from mergejax.cli import main

sys.exit(main.main())
