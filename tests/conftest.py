"""Eight CPU devices for the tests of several; meshes and programs name the devices they use."""

import os

import pytest

flag = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


@pytest.fixture
def quick_compilation():
    """Programs that run slowly, in tests where compiling takes the time."""
    import jax  # not before the flags are set

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
