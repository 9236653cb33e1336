# Copyright 2026 The mergejax Authors.
# SPDX-License-Identifier: Apache-2.0
"""Eight fake devices, strict promotion, warnings as errors."""

import gc
import os
import pathlib
import shutil
import sys
import tempfile

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'
# Tests wait for the compiler, not for what it makes: without LLVM's passes they
# take little more than half as long. `make test-all` compiles as users do.
if 'MERGEJAX_TEST_OPTIMISED' not in os.environ:
  os.environ['XLA_FLAGS'] += ' --xla_backend_optimization_level=0'
# As many threads as XLA would have on 32 cores. With two, a sum over eight fake
# devices now and then waits for one that gets no thread, until XLA aborts.
os.environ['NPROC'] = '32'
sys.path.insert(0, str(pathlib.Path(__file__).parent))
# One folder for all processes of a run, commands that tests start included:
# what one of them compiled the others load, and no test writes to ~/.cache.
_OWNS_CACHE = 'MERGEJAX_TEST_CACHE' not in os.environ
if _OWNS_CACHE:
  os.environ['MERGEJAX_TEST_CACHE'] = tempfile.mkdtemp(prefix='mergejax-tests-')
_CACHE = os.environ['MERGEJAX_TEST_CACHE']
os.environ['XDG_CACHE_HOME'] = _CACHE
os.environ['JAX_COMPILATION_CACHE_DIR'] = _CACHE + '/jax'
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

from absl import flags  # noqa: E402  (after the flags of XLA)
import jax  # noqa: E402
import pytest  # noqa: E402

# Modules make almost a million objects that stay: no garbage is looked for among
# them, neither while they are imported nor later.
gc.disable()
flags.FLAGS.mark_as_parsed()
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_collection_modifyitems(items):
  """Longest first; warnings are errors, but for those of other packages."""
  items.sort(key=lambda item: 'resume_test' not in item.nodeid)
  for item in items:
    item.add_marker(pytest.mark.filterwarnings('error'))
    for module in ('tensorflow', 'seqio', 'orbax', 'tensorboard', 'google'):
      item.add_marker(
        pytest.mark.filterwarnings(f'ignore:::{module}.*'), append=True
      )
    # Tests kill processes and fill disks: what JAX was writing then is cut off,
    # and is compiled again.
    item.add_marker(
      pytest.mark.filterwarnings(
        'ignore:Error (reading|writing) persistent compilation'
      ),
      append=True,
    )


def pytest_collection_finish():
  """From here on garbage is collected, of what the tests make."""
  gc.freeze()
  gc.enable()


def _is_full():
  """Whether this process holds much of what it may, where Linux tells."""
  own = pathlib.Path('/proc/self')
  if not own.exists():
    return True
  resident = int((own / 'statm').read_text().split()[1]) * os.sysconf(
    'SC_PAGE_SIZE'
  )
  # A program takes a few mappings, of 65,530 that a process may have.
  mappings = (own / 'maps').read_text().count('\n')
  return resident > 2**31 or mappings > 20_000


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
  """Thousands of compiled programs would fill the memory of a long run.

  Until then a module goes on with what those before it compiled.
  """
  yield
  if _is_full():
    jax.clear_caches()


def pytest_sessionfinish():
  """Removes the folder, in the process that made it."""
  if _OWNS_CACHE:
    shutil.rmtree(_CACHE, ignore_errors=True)
