# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax.models.base import ModelFamily
from mergejax.models.classifier import Classifier
from mergejax.models.loading import axes
from mergejax.models.loading import check_not_converted
from mergejax.models.loading import fit_params
from mergejax.models.loading import is_converted
from mergejax.models.loading import load_model
from mergejax.models.loading import load_module
from mergejax.models.loading import load_params
from mergejax.models.outputs import Conversion
from mergejax.models.outputs import Outputs
from mergejax.models.registry import build
from mergejax.models.registry import conversion
from mergejax.models.registry import describe
from mergejax.models.registry import family_class
from mergejax.models.registry import family_for
from mergejax.models.registry import family_of
from mergejax.models.registry import names
from mergejax.models.registry import register

__all__ = [
  'Classifier',
  'Conversion',
  'ModelFamily',
  'Outputs',
  'axes',
  'build',
  'check_not_converted',
  'conversion',
  'describe',
  'family_class',
  'family_for',
  'family_of',
  'fit_params',
  'is_converted',
  'load_model',
  'load_module',
  'load_params',
  'names',
  'register',
]
