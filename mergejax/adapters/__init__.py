# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Experts of a few thousand numbers: what is added to a frozen model.

`adapt(model, adapter)` is a family like any other, so that whoever trains,
watches, decodes or evaluates a model does so with an adapter too.
"""

from mergejax.core import lazy

__getattr__, __dir__, __all__ = lazy.attach(__name__, __file__)
