"""Two processes on one machine, with the CPU's collectives: the same run as in one process."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small_run

from maxent_aug import metrics, processes

ROOT = Path(__file__).parent.parent
STEPS = 3  # an epoch


def start(program, folders, *arguments):
    """A process for each folder, of one run; the folders stand for hosts that share no disk."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        address = f"localhost:{found.getsockname()[1]}"
    command = [sys.executable, *program, "--preset=quick", "--workdir=run", *arguments]
    command += ["--distributed", f"--coordinator_address={address}", "--nocompilation_cache"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    return [
        subprocess.Popen(
            [*command, f"--num_processes={len(folders)}", f"--process_id={number}"],
            cwd=folder,
            env=environment | {"TFDS_DATA_DIR": str(folder / "data")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, folder in enumerate(folders)
    ]


def ends(started):
    """(exit code, stderr) of each process; one that hangs is killed."""
    try:
        errors = [process.communicate(timeout=200)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


@pytest.fixture
def hosts(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.mark.usefixtures("quick_compilation")
def test_a_stop_signal_to_one_of_two_and_resuming_equal_one_process(hosts, tmp_path):
    """Each has a device; compared with one process that has two, to float32 rounding."""
    program = [ROOT / "tests" / "small_run.py"]
    epochs = {"pretrain": 2, "augment": 1, "finetune": 1}
    epochs = [f"--config.epochs.{kind}={number}" for kind, number in epochs.items()]
    first, second = started = start(program, hosts, *epochs)
    assert "step\n" in first.stdout  # which is read until then
    second.send_signal(signal.SIGTERM)
    (code, errors), other = ends(started)
    assert other == (code, "") == (128 + signal.SIGTERM, "")
    assert errors.startswith("stopped in phase pretrain, epoch ")
    assert errors.count("\n") == 1
    assert list(hosts[1].iterdir()) == []
    assert ends(start(program, hosts, *epochs)) == [(0, ""), (0, "")]
    assert list(hosts[1].iterdir()) == []

    config = small_run.short(2, 1, 1)
    expected = small_run.go(tmp_path / "one", config=config, devices=2)
    got = small_run.go(hosts[0] / "run", config=config, devices=2)  # reads what is there
    for name, state in expected.items():
        x, y = (jax.flatten_util.ravel_pytree(s)[0] for s in (state, got[name]))
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(x)
    files = (folder / "metrics.jsonl" for folder in (tmp_path / "one", hosts[0] / "run"))
    check_close(*map(metrics.read, files))


@pytest.mark.usefixtures("quick_compilation")
def test_two_processes_read_from_disk_what_one_has_in_memory(hosts, tmp_path):
    """The images, unlike all other files, at one path for both."""
    (tmp_path / "data").mkdir()
    resident = small_run.prepared(tmp_path / "data", None)
    program, config = [ROOT / "tests" / "small_run.py"], small_run.short(2, 1, 1)
    arguments = ["--stream=always", f"--data_dir={tmp_path / 'data'}", "--config.epochs.pretrain=2"]
    assert ends(start(program, hosts, *arguments)) == [(0, ""), (0, "")]
    options = {"config": config, "devices": 2, "legs": small_run.phases(config)[:1]}
    expected, got = (
        small_run.go(folder, sets=resident, **options)[0, "pretrain"]
        for folder in (tmp_path / "one", hosts[0] / "run")  # reads what is there
    )
    x, y = (jax.flatten_util.ravel_pytree(s)[0] for s in (expected, got))
    assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(x)


def check_close(expected, got):
    assert len(expected) == len(got) == 5
    for a, b in zip(expected, got, strict=True):
        for name in a.keys() - small_run.TIMING:
            same = a[name] if isinstance(a[name], str) else pytest.approx(a[name], 1e-4, 1e-5)
            assert b[name] == same, name


def test_wrong_input_is_said_once(hosts):
    program = ["-m", "experiments.paper"]
    (code, errors), other = ends(start(program, hosts, "--config.batch_size=33"))
    assert code == 2
    assert errors == "error: --config.batch_size=33 is not a multiple of the 2 devices\n"
    assert other == (1, "")
    assert list(hosts[0].iterdir()) == list(hosts[1].iterdir()) == []


def test_alone_a_process_is_the_first():
    with pytest.raises(ValueError, match="x"):
        processes.on_first(lambda: int("x"))
    assert processes.on_first(lambda: print) is print
