# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of vision transformers: ViT, CLIP and SigLIP."""

from mergejax.names import base

NAMING = base.Naming(
  blocks=('layer', 'layers', 'blocks', 'resblocks'),
  first=('embed',),
)
