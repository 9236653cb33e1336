# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`python -m mergejax`."""

import sys

from mergejax.run import main

sys.exit(main.main())
