"""Eight CPU devices for the tests of several; meshes and programs name the devices they use."""

import os

flag = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
