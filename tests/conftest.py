"""Eight CPU devices for the tests of several, quick compilation, flags at their defaults.

Meshes and programs name the devices they use.
"""

import os
import subprocess
import sys
import tempfile

import pytest
from absl import flags

DEVICES = "--xla_force_host_platform_device_count=8"
# Compiling takes most of the suite's time, and with these about half as long.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def add_xla_flags(more):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {more}".strip()


def starts(xla_flags):
    """Whether JAX does with these flags; it ends a process at flags that it does not know."""
    environment = os.environ | {"XLA_FLAGS": xla_flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return not subprocess.run(command, env=environment, capture_output=True).returncode


flags.FLAGS.mark_as_parsed()
if "PYTEST_XDIST_WORKER" not in os.environ:  # all workers, and processes of tests, inherit these
    add_xla_flags(DEVICES)
    if starts(QUICK):
        add_xla_flags(QUICK)
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
