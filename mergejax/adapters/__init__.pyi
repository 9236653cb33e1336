# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
from mergejax.adapters.adapted import Adapted
from mergejax.adapters.adapted import adapt
from mergejax.adapters.adapted import fold
from mergejax.adapters.attempts import attempt
from mergejax.adapters.banks import bank
from mergejax.adapters.base import Adapter
from mergejax.adapters.base import Call
from mergejax.adapters.base import count
from mergejax.adapters.bottlenecks import HOULSBY
from mergejax.adapters.bottlenecks import PFEIFFER
from mergejax.adapters.bottlenecks import bottleneck
from mergejax.adapters.changes import ChangeStore
from mergejax.adapters.folded import FoldedStore
from mergejax.adapters.folded import load_model
from mergejax.adapters.ladder_files import collect as collect_ladders
from mergejax.adapters.ladder_files import load_ladders
from mergejax.adapters.ladder_files import save_ladders
from mergejax.adapters.ladders import ladder
from mergejax.adapters.library import Library
from mergejax.adapters.library import is_library
from mergejax.adapters.low_rank import lora
from mergejax.adapters.prompts import prompt
from mergejax.adapters.prompts import spot
from mergejax.adapters.routes import poly
from mergejax.adapters.saved import card
from mergejax.adapters.saved import has_layout
from mergejax.adapters.saved import load
from mergejax.adapters.saved import save
from mergejax.adapters.scales import ia3
from mergejax.adapters.sites import LayerAdapter
from mergejax.adapters.sites import Part
from mergejax.adapters.sites import Site
from mergejax.adapters.skill_gates import gates
from mergejax.adapters.starts import Start
from mergejax.adapters.starts import from_inventory
from mergejax.adapters.starts import from_mean
from mergejax.adapters.starts import from_prompts
from mergejax.adapters.starts import from_saved
from mergejax.adapters.starts import from_spot
from mergejax.adapters.written import write_changes

__all__ = [
  'Adapted',
  'Adapter',
  'Call',
  'ChangeStore',
  'FoldedStore',
  'HOULSBY',
  'LayerAdapter',
  'Library',
  'PFEIFFER',
  'Part',
  'Site',
  'Start',
  'adapt',
  'attempt',
  'bank',
  'bottleneck',
  'card',
  'collect_ladders',
  'count',
  'fold',
  'from_inventory',
  'from_mean',
  'from_prompts',
  'from_saved',
  'from_spot',
  'gates',
  'has_layout',
  'ia3',
  'is_library',
  'ladder',
  'load',
  'load_ladders',
  'load_model',
  'lora',
  'poly',
  'prompt',
  'save',
  'save_ladders',
  'spot',
  'write_changes',
]
