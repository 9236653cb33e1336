# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""`mergejax convert SRC DST`: a checkpoint in another format or naming."""

from collections.abc import Sequence
import dataclasses
import pathlib

from mergejax import models
from mergejax.checkpoints import checkpoint
from mergejax.cli import common
from mergejax.core import errors
from mergejax.core import files
from mergejax.core import tree
from mergejax.training import stored_states


def _axes(options, destination, store, config):
  """The axes that the source knows, if the destination has place for them."""
  npz = destination.suffix == '.npz' or options.format == 'npz'
  if options.names is not None or npz:
    return None
  if options.scan_layers is not None:
    specs = models.family_of(models.build(config)).specs()
    return {path: spec.axes for path, spec in specs.items() if spec.axes}
  return store.axes() or None


def _restacked(leaves, config, axes, **fields):
  """`(leaves, config.json)` with layers stacked, or one by one.

  Args:
    leaves: `{path: array}` by our names.
    config: their `config.json`.
    axes: of the leaves, where they are known.
    **fields: of the configuration, to change.

  Raises:
    ConfigError: no configuration, or one of a model whose layers do not stack.
  """
  family = models.family_of(models.build(config))
  if not hasattr(family.config, 'scan_layers'):
    raise errors.ConfigError(
      f'The layers of {family.model_type} models do not stack: --scan_layers '
      'is for t5x and lm.'
    )
  module = type(family.module)(dataclasses.replace(family.config, **fields))
  family = models.family_of(module)
  return family.arranged(leaves, axes), models.describe(module)


def _scanned(options, leaves, config, axes):
  """`(leaves, config.json)` in the form that the command line asks for."""
  if config is None or models.conversion(config) is not None:
    raise errors.ConfigError(
      f'--scan_layers needs a {checkpoint.CONFIG} of our own beside '
      f'{options.source}: add one, {{"model_type": "t5x", ...sizes}} with '
      '"scan_layers" as it is there; of Hugging Face names, add --names t5x.'
    )
  fields = {'scan_layers': options.scan_layers == 'true'}
  if options.param_scan_axis is not None:
    fields['param_scan_axis'] = options.param_scan_axis
  elif not fields['scan_layers']:
    fields['param_scan_axis'] = 1  # means nothing, so it is not written
  return _restacked(leaves, config, axes, **fields)


def _renamed(names, leaves, config, axes):
  """`(leaves, config.json or None)` by other names."""
  ways = {}
  for name in models.names():
    for other, way in models.family_class(name).conversions.items():
      ways[name], ways[other] = ('read', name, way), ('write', name, way)
  if names not in ways:
    raise errors.ConfigError(errors.near(names, ways, 'naming'))
  direction, model_type, way = ways[names]
  if direction == 'read':
    leaves = way.read(leaves, config or {})
    if config is not None:
      config = dict(model_type=model_type, **way.read_config(config))
    return leaves, config
  if config is not None:
    if config.get('scan_layers'):
      leaves, config = _restacked(leaves, config, axes, scan_layers=False)
    fields = dataclasses.asdict(models.build(config).config)
    config = way.write_config(fields)
  return way.write(leaves), config


def _config_of_run(source):
  """The `config.json` of a run: beside its steps, or in what it exported."""
  path = pathlib.Path(source).expanduser()
  for folder in (path, *path.parents[:2]):
    for place in (folder, folder / 'model'):
      found = checkpoint.read_config(place)
      if found is not None and models.conversion(found) is None:
        return found
  raise errors.ConfigError(
    f'--state needs a {checkpoint.CONFIG} of our own beside {source}: add one, '
    '{"model_type": "t5x", ...sizes}.'
  )


def _state(options, destination):
  """Copies a training state, and says what of it stayed behind."""
  format_ = options.format or 'orbax'
  if format_ not in stored_states.FORMATS or options.names is not None:
    raise errors.ConfigError(
      f'--state is for --format {" or ".join(stored_states.FORMATS)}, by our '
      'names: other formats hold parameters alone.'
    )
  config = _config_of_run(options.source)
  stored = stored_states.read(options.source, models.build(config))
  if options.scan_layers is not None:
    _, wanted = _scanned(
      options, tree.flatten(stored.state.params),
      dict(models.describe(stored.family)), None,
    )  # fmt: skip
    stored = stored_states.restacked(stored, models.build(wanted))
  made = stored_states.write(destination, stored, format_)
  kind = stored.settings['maker'].__name__
  told = [f'{made}: step {stored.state.step}, with the state of {kind}']
  if stored.left_out:
    told.append(f'not copied: {", ".join(stored.left_out)}')
  print('\n'.join(told))


def main(arguments: Sequence[str]) -> None:
  """Copies all parameters, bit for bit, and `config.json` where it fits."""
  options = _parsed(arguments)
  destination = pathlib.Path(options.destination)
  files.check_new(destination)
  if options.state:
    _state(options, destination)
    return
  store = checkpoint.open_checkpoint(options.source)
  leaves = tree.flatten(store.read())
  config = checkpoint.read_config(options.source)
  if options.names is not None:
    leaves, config = _renamed(options.names, leaves, config, store.axes())
  if options.scan_layers is not None:
    known = store.axes() if options.names is None else {}
    leaves, config = _scanned(options, leaves, config, known)
  axes = _axes(options, destination, store, config)
  notes = []
  if store.provenance.get('left_out'):
    notes.append(f'not copied: {", ".join(store.provenance["left_out"])}')
  if destination.suffix in ('.safetensors', '.npz') and config is not None:
    notes.append(
      'config.json is not written: a single file has no place for it'
    )
    config = None
  elif options.names is not None and config is None:
    notes.append(
      f'config.json is not written: {options.source} has none that says how '
      'many heads there are and whether the head is the embedding'
    )
  checkpoint.save_checkpoint(
    destination, leaves, format=options.format, config=config, axes=axes
  )
  print('\n'.join([f'{destination}: {len(leaves)} arrays', *notes]))


def _parsed(arguments):
  parser = common.parser('convert', 'Copy a checkpoint into another format.')
  parser.add_argument('source')
  parser.add_argument('destination')
  parser.add_argument(
    '--format',
    help=f'one of {", ".join(checkpoint.FORMATS)}; by default what the '
    'suffix of the destination says',
  )
  parser.add_argument(
    '--names',
    help='rename the parameters: t5x from Hugging Face names of T5, mT5 and '
    'umT5; hf-t5, hf-mt5 and hf-umt5 the other way',
  )
  parser.add_argument(
    '--scan_layers',
    choices=('true', 'false'),
    help='stack the layers (T5X: scalable_t5), or store them one by one',
  )
  parser.add_argument(
    '--param_scan_axis',
    type=int,
    help="with --scan_layers true: the axis of layers; by default 1, T5X's",
  )
  parser.add_argument(
    '--state', action='store_true',
    help="a run's training state: the optimizer's too, and the step; --format "
    't5x writes what T5X restores, orbax (the default) what a run of ours does',
  )  # fmt: skip
  options = parser.parse_args(arguments)
  if options.param_scan_axis is not None and options.scan_layers != 'true':
    raise errors.ConfigError(
      '--param_scan_axis says where layers are stacked: add --scan_layers true.'
    )
  if options.format is not None and options.format not in checkpoint.FORMATS:
    raise errors.ConfigError(
      errors.near(options.format, checkpoint.FORMATS, 'checkpoint format')
    )
  return options
