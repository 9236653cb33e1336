# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Names of image classifiers: MLP, VGG, ResNet and a small ViT; ours."""

from mergejax.names import base

NAMING = base.Naming(
  model_types=('mlp', 'vgg', 'resnet', 'vit'),
  axes=(
    (r'batch_stats/.*', ('embed',)),
    (r'(.*/)?(\w*norm\w*)/(scale|bias)', ('embed',)),
    (r'(.*/)?(query|key|value)/kernel', ('embed', 'heads', 'kv')),
    (r'(.*/)?(query|key|value)/bias', ('heads', 'kv')),
    (r'(.*/)?attention/out/kernel', ('heads', 'kv', 'embed')),
    (r'(.*/)?(attention/out|wo|patches)/bias', ('embed',)),
    (r'(.*/)?wo/kernel', ('mlp', 'embed')),
    (r'(.*/)?(wi|dense_\d+)/kernel', ('embed', 'mlp')),
    (r'(.*/)?patches/kernel', ('height', 'width', 'channels', 'embed')),
    (r'(.*/)?(conv_\d+|stem|shortcut)/kernel', ('height', 'width', 'embed', 'mlp')),
    (r'(.*/)?(wi|dense_\d+|conv_\d+|stem|shortcut)/bias', ('mlp',)),
    (r'head/kernel', ('embed', 'classes')),
    (r'head/bias', ('classes',)),
    (r'positions', ('one', 'length', 'embed')),
  ),
)  # fmt: skip
