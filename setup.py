# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Installs mergejax; see README.md."""

import pathlib
import re

import setuptools

_HERE = pathlib.Path(__file__).parent
_VERSION = re.search(
  r"__version__ = '(.*)'", (_HERE / 'mergejax/__init__.py').read_text()
)[1]

_DATA = [
  'clu>=0.0.12',
  'seqio>=0.0.20',
  'tensorboard>=2.20',
  'tensorflow>=2.20',
  'tensorflow-datasets>=4.9.9',
  'tensorflow-text>=2.20',
]
_PLOTS = ['matplotlib>=3.9']
_SEARCH = ['cmaes>=0.11']
_CLUSTERS = ['scikit-learn>=1.5']
# Newer sentencepiece needs a newer protobuf than Beam takes.
_BEAM = ['apache-beam[tfrecord]>=2.60', 'sentencepiece<0.2.2']
# BLEU and ROUGE.
_METRICS = ['rouge-score>=0.1.2', 'sacrebleu>=2.4']

setuptools.setup(
  name='mergejax',
  version=_VERSION,
  description='Train experts and merge models in JAX',
  long_description=(_HERE / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=[
    *setuptools.find_packages(include=['mergejax', 'mergejax.*']),
    'mergejax._gin',
    'mergejax._configs',
  ],
  package_dir={'mergejax._gin': 'gin', 'mergejax._configs': 'configs'},
  package_data={
    'mergejax': ['py.typed', '**/*.pyi'],
    'mergejax._gin': ['**/*.gin'],
    'mergejax._configs': ['**/*.yaml'],
  },
  install_requires=[
    'absl-py>=2.1',
    'flax>=0.12',
    'gin-config>=0.5',
    'jax>=0.10,<0.13',
    'ml_dtypes>=0.5',
    'numpy>=2.0',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11.30',
    'PyYAML>=6.0',
    'safetensors>=0.6',
    'scipy>=1.13',
    'tqdm>=4.66',
  ],
  extras_require={
    'beam': [*_DATA, *_BEAM],
    'clusters': _CLUSTERS,
    'data': _DATA,
    'metrics': _METRICS,
    'plots': _PLOTS,
    'search': _SEARCH,
    'tpu': ['jax[tpu]>=0.10,<0.13'],
    'test': [
      *_DATA,
      *_PLOTS,
      *_SEARCH,
      *_CLUSTERS,
      *_METRICS,
      'hypothesis>=6.100',
      'pytest>=8.3',
      'pytest-xdist>=3.6',
    ],
    # With node as a wheel: nothing is fetched when it first runs.
    'dev': ['pyright[nodejs]>=1.1.400', 'ruff>=0.12'],
  },
  entry_points={'console_scripts': ['mergejax = mergejax.cli.main:main']},
)
