"""Everything going wrong, with real processes: minutes, so only `pytest -m campaign` runs them.

What comes out is compared, bit by bit, with a run that nothing happened to. CAMPAIGN_SEED repeats
the moments of a failure.
"""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import pytest
import tensorstore

from experiments import cli, paper
from maxent_aug import checkpoint, config, data, metrics, models

pytestmark = pytest.mark.campaign

KILLS = 20
FLAGS = [f"--config.epochs.{kind}=2" for kind in ("pretrain", "augment", "finetune")]
FLAGS += ["--config.augmenter.loss_forms=intended", "--config.data.train_examples=256"]
FLAGS += ["--preset=quick", "--workdir=run", "--cpu_devices=1"]
# Each process is forked from one that has imported all and done nothing: a moment is of training.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["experiments.paper", "pytest", "tensorflow_datasets", "maxent_aug.figures"]
)


def command(folder, environment, *flags):
    """What a process does: `python -m experiments.paper` there, with a classifier of few layers."""
    folder = Path(folder)
    os.chdir(folder)
    os.environ |= environment
    for number, suffix in ((1, ".stdout"), (2, ".stderr")):
        file = os.open(folder.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    models.ResNetSmall = partial(models.ResNet, stage_sizes=(1,), width=4)
    sys.argv = ["paper.py", *flags]
    cli.run("paper", config.PRESETS, paper.main)


def limited_command(most_bytes, *given):
    """`command`, where no file may be larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    command(*given)


class Place:
    """A folder that runs are started in, all with the same data and compiled programs."""

    def __init__(self, folder, shared, *flags):
        folder.mkdir()
        self.folder, self.run = folder, folder / "run"
        environment = {
            "TFDS_DATA_DIR": str(shared / "data"),
            "XDG_CACHE_HOME": str(shared / "cache"),
            "XLA_FLAGS": "",
        }
        self.given = str(folder), environment, *FLAGS, *flags  # to `command`

    def start(self):
        self.folder.with_suffix(".stderr").write_text("")  # it may be killed before it opens it
        process = PROCESSES.Process(target=command, args=self.given)
        process.start()
        return process

    def end(self, process):
        """Waits for it: (exit code, negative for a signal, and stderr)."""
        process.join()
        return process.exitcode, self.errors()

    def errors(self):
        return self.folder.with_suffix(".stderr").read_text()

    def checkpoints(self):
        return list(self.run.glob("checkpoints/*/*/*/sha256.json"))

    def outcome(self):
        """All that must not depend on what happened to the run."""
        result = json.loads((self.run / "result.json").read_text())
        lines = metrics.read(self.run / "metrics.jsonl")
        timing = ("seconds", "images_per_second", "date")
        arrays = {}
        for phase in (self.run / "checkpoints" / "seed0").iterdir():
            newest = phase / str(checkpoint.saved_steps(phase)[0]) / "default"
            kept = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{newest}/"})
            kept = kept.result()
            for name in kept.list().result():
                arrays[phase.name, newest.parent.name, name] = kept.read(name).result().value
        assert len(arrays) > 100
        results = [{k: v for k, v in each.items() if k not in timing} for each in (result, *lines)]
        return results, arrays


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    (folder / "data").mkdir()
    data.load("digits", "test", folder / "data")
    return folder


@pytest.fixture(scope="module")
def uninterrupted(shared):
    """(outcome, seconds that it takes, its place)."""
    compiling = Place(shared / "compiling", shared)
    assert compiling.end(compiling.start()) == (0, "")
    place, started = Place(shared / "uninterrupted", shared), time.monotonic()
    assert place.end(place.start()) == (0, "")
    return place.outcome(), time.monotonic() - started, place


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_20_signals_at_random_moments(uninterrupted, shared, tmp_path, number):
    """A run is started again after each, until it ends; then the next run, until it was 20."""
    expected, seconds, _ = uninterrupted
    seed = int(os.environ.get("CAMPAIGN_SEED", time.time_ns() % 10**6))
    log = [f"CAMPAIGN_SEED={seed}, a run takes {seconds:.1f} s"]
    draw, kills, runs = random.Random(seed), 0, 0
    while kills < KILLS:
        place = Place(tmp_path / str(runs), shared)
        while not (place.run / "result.json").exists():
            moment = draw.uniform(0, seconds) if kills < KILLS else None
            process = place.start()
            process.join(moment)
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it has ended just now
                    os.kill(process.pid, number)
            code, errors = place.end(process)
            done = len(place.checkpoints())
            log.append(f"run {runs}, {moment} s: exit code {code}, {done} checkpoints, {errors!r}")
            # SIGTERM ends at once what has not begun to train, and nothing that has trained all.
            assert code in {0, -number, 128 + number} - {128 + signal.SIGKILL}, log
            said = errors.count("is damaged, skipped") + errors.count("was not finished, removed")
            assert errors.count("\n") == (code > 0) + said, log
            kills += code != 0
        runs += 1
        assert place.outcome() == expected, log
    print("\n".join(log), f"{kills} signals, {runs} runs, each as if there had been none", sep="\n")


def test_a_second_process_in_the_same_folder(uninterrupted, shared, tmp_path):
    """It refuses, and the first goes on as if there had been none."""
    first = Place(tmp_path / "first", shared)
    second = Place(tmp_path / "second", shared, f"--workdir={first.run}")
    process = first.start()
    while not (first.run / "config.json").exists():
        assert process.is_alive()
        time.sleep(0.1)
    code, errors = second.end(second.start())
    assert code == 2 and errors.count("\n") == 1 and "in use by another process" in errors
    assert first.end(process) == (0, "")
    assert first.outcome() == uninterrupted[0]


def end_in_namespace(place, prepare, after=":"):
    """A run after a mount that it alone sees: (exit code, stderr)."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which(unshare[0]) or subprocess.run([*unshare, "true"], check=False).returncode:
        pytest.skip("no namespace may be made here")
    tests = Path(__file__).parent
    program = f"import campaign_test; campaign_test.command(*{place.given!r})"
    script = (
        f"{prepare} && {sys.executable} -c {shlex.quote(program)}; code=$?; {after}; exit $code"
    )
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}"}
    done = subprocess.run(
        [*unshare, "sh", "-c", script], cwd=place.folder.parent, env=environment, check=False
    )
    return done.returncode, place.errors()


@pytest.mark.parametrize("kib", [1200, 1700, 2100])
def test_a_full_disk(uninterrupted, shared, tmp_path, kib):
    """Full in another phase each time; then the run goes on, on a larger one."""
    place = Place(tmp_path / "place", shared)
    code, errors = end_in_namespace(
        place, f"mount -t tmpfs -o size={kib}k tmpfs place", "cp -a place/run run"
    )
    assert (code, errors.count("\n")) == (1, 1), errors
    assert errors.startswith("error: ") and "No space left on device" in errors
    (tmp_path / "run").rename(place.run)
    print(f"{kib} KiB: {len(place.checkpoints())} checkpoints; {errors}")
    code, errors = place.end(place.start())
    assert code == 0 and errors.count("\n") == errors.count("is damaged, skipped"), errors
    assert place.outcome() == uninterrupted[0]


@pytest.mark.parametrize("kib", [20, 300])
def test_a_limit_on_files(uninterrupted, shared, tmp_path, kib):
    """As a quota has it, which does not show in what is free."""
    place = Place(tmp_path / "place", shared)
    process = PROCESSES.Process(target=limited_command, args=(kib * 1024, *place.given))
    process.start()
    code, errors = place.end(process)
    print(f"{kib} KiB: {len(place.checkpoints())} checkpoints; {errors}")
    assert (code, errors.count("\n")) == (1, 1), errors
    assert errors.startswith("error: ") and "File too large" in errors
    assert place.end(place.start()) == (0, "")
    assert place.outcome() == uninterrupted[0]


@pytest.mark.parametrize("workdir", ["run", "new", "run/new"])
def test_a_folder_that_can_only_be_read(uninterrupted, shared, tmp_path, workdir):
    place = Place(tmp_path / "place", shared, f"--workdir={workdir}")
    shutil.copytree(uninterrupted[2].run, place.run)
    before = sorted(place.folder.rglob("*"))
    code, errors = end_in_namespace(
        place, "mount --bind place place && mount -o remount,bind,ro place"
    )
    assert (code, errors.count("\n")) == (2, 1), errors
    assert errors.startswith(f"error: workdir {workdir} cannot be used (")
    assert sorted(place.folder.rglob("*")) == before
    assert place.outcome() == uninterrupted[0]
