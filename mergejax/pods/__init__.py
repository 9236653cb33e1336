# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
