# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""How families name their parameters: what merges of checkpoints go by."""
