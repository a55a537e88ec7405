"""Eight CPU devices for the tests of several, flags at their defaults, one compilation cache.

Meshes and programs name the devices they use.
"""

import os
import tempfile

import pytest
from absl import flags

flag = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
flags.FLAGS.mark_as_parsed()
if "PYTEST_XDIST_WORKER" not in os.environ:  # all workers, and processes of tests, share it
    cache = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture
def quick_compilation():
    """Programs that run slowly, in tests where compiling takes the time."""
    import jax  # not before the flags are set

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
