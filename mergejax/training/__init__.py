# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Training as a library: state, step, loop, checkpoints, schedules."""
