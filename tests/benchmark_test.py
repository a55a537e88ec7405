"""The benchmark on tiny shapes: what it checks, writes and says. Nothing asserts a time."""

import dataclasses
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from experiments import benchmark, peers
from maxent_aug import models

# Of the libraries compared with, not of ours.
pytestmark = [
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
    pytest.mark.usefixtures("quick_compilation"),
]
ROW = {"difference", "median_s", "quartiles_s", "images_per_s"}
ROW |= {"speed_to_fastest_peer", "time_to_reference"}


@pytest.fixture
def no_peers(monkeypatch):
    for module in peers.PEERS.values():
        monkeypatch.setitem(sys.modules, module, None)


def constant(value):
    return lambda: (np.full((2, 3), value),)


def fake(name="warp, fake", **contenders):
    contenders = {"ours": constant(1.0), "jax.scipy": constant(1.0), **contenders}
    return benchmark.Case(name, 2, "jax.scipy", 1e-4, lambda: contenders)


@pytest.mark.parametrize(
    ("dtype", "mode", "padding", "inside", "gradients"),
    [
        ("float32", "bilinear", "zeros", False, 2),
        ("bfloat16", "bilinear", "zeros", False, 1),
        ("float32", "bilinear", "border", False, 2),
        ("float32", "bilinear", "reflection", False, 1),
        ("float32", "bilinear", "reflection", False, 0),
        ("float32", "bilinear", "zeros", True, 0),
        ("float32", "bicubic", "zeros", False, 0),
        ("float32", "bicubic", "reflection", False, 2),
    ],
)
def test_warps_agree(dtype, mode, padding, inside, gradients):
    case = benchmark._warp_case(None, 2, 7, 3, dtype, mode, padding, inside, gradients)
    prepare = partial(benchmark.warps, (2, 7, 5, 3), dtype, mode, padding, inside, gradients)
    entry = benchmark.measure(dataclasses.replace(case, prepare=prepare), 1)
    installed = {name for name in peers.PEERS if peers.peer(name)}
    expected = {"ours, gather", "ours, matmul", "copy"} | installed & {"PyTorch"}
    if padding != "reflection" and "PyTorch" in installed:
        expected |= installed & {"kornia"}
    if mode == "bilinear":
        expected |= {"jax.scipy"}
        if gradients == 0:
            expected |= installed & {"OpenCV"}
    if inside:
        expected |= installed & {"dm_pix"}
    found = {name for name in entry["contenders"] if not name.endswith("1 thread")}
    assert found == expected
    assert entry["contenders"]["copy"]["difference"] is None
    assert all(
        set(row) == ROW | {"share_of_copy_bandwidth"} for row in entry["contenders"].values()
    )


def test_steps_agree(monkeypatch, tmp_path):
    # PyTorch 2.14's gradients of 4 channels write past their memory on some CPUs.
    tiny = partial(models.ResNet, stage_sizes=(1, 1), width=16)
    monkeypatch.setattr(models, "ResNetSmall", tiny)
    prepare = partial(benchmark.training_steps, "ResNetSmall", "float32", 4, size=8)
    (case,) = (c for c in benchmark.cases(4, tmp_path) if "Small float32" in c.name)
    case = dataclasses.replace(case, prepare=prepare)
    rows = benchmark.measure(case, 1)["contenders"]
    assert {"plain step", "phase 2", "phase 3"} <= set(rows)
    assert ("PyTorch" in rows) == (peers.peer("PyTorch") is not None)
    assert rows["phase 3"]["difference"] < 1e-6


def test_policies_agree_with_pillow(tmp_path):
    found = {case.name: case for case in benchmark.cases(6, tmp_path) if "polic" in case.name}
    assert [name.split()[1] for name in found] == [*benchmark.DRAWN_POLICIES, "every"]
    case = found["policies, trivial_augment 32x32x3, batch 6"]
    prepare = partial(benchmark.drawn_policies, "trivial_augment", (6, 8, 8, 3))
    rows = benchmark.measure(dataclasses.replace(case, prepare=prepare), 1)["contenders"]
    assert set(rows) == {"ours", "Pillow"}
    assert rows["ours"]["difference"] is not None and rows["Pillow"]["speed_to_fastest_peer"] == 1


def test_every_policy_is_measured(monkeypatch, tmp_path):
    fast = ("identity", "flip", "mixup")
    monkeypatch.setattr(benchmark, "POLICIES", {n: benchmark.POLICIES[n] for n in fast})
    (case,) = (c for c in benchmark.cases(4, tmp_path) if "every" in c.name)
    prepare = partial(benchmark.every_policy, (4, 8, 8, 3))
    rows = benchmark.measure(dataclasses.replace(case, prepare=prepare), 1)["contenders"]
    assert [*rows] == [*fast] and all(row["images_per_s"] > 0 for row in rows.values())


def test_numbers_of_an_entry(monkeypatch):
    seconds = {"ours": [1.0, 2.0, 3.0], "jax.scipy": [8.0] * 3, "PyTorch": [4.0] * 3}
    monkeypatch.setattr(benchmark, "_interleaved", lambda *_, **__: seconds)
    entry = benchmark.measure(fake(PyTorch=constant(1.00005)), 3)
    ours = entry["contenders"]["ours"]
    assert ours["median_s"] == 2.0 and ours["quartiles_s"] == [1.5, 2.5]
    assert ours["images_per_s"] == 1.0
    assert ours["speed_to_fastest_peer"] == 2.0 and ours["time_to_reference"] == 0.25
    assert entry["contenders"]["PyTorch"]["difference"] == pytest.approx(5e-5, rel=0.01)


def test_contenders_are_timed_in_turn():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) or () for name in "ab"}
    seconds = benchmark._interleaved(contenders, 3, 2, untimed=1)
    assert calls == list("aaabbb" * 3)
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize("value", [1.1, np.nan])
def test_disagreement_fails(value, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        benchmark, "cases", lambda *_: iter([fake(), fake("warp, wrong", kornia=constant(value))])
    )
    with pytest.raises(SystemExit) as stopped:
        benchmark.run(["--suite=warp", f"--workdir={tmp_path / 'run'}", "--repetitions=1"])
    errors = capsys.readouterr().err
    assert stopped.value.code == 1
    assert errors.count("\n") == 1 and "warp, wrong: kornia and jax.scipy differ" in errors
    written = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    assert list(written["cases"]) == ["warp, fake"]


def test_command_without_peers(no_peers, tmp_path, capsys):
    command = [f"--workdir={tmp_path / 'run'}", "--suite=warp", "--only=32x32x1 forward"]
    command += ["--batch=2", "--repetitions=2"]
    benchmark.run(command)
    out = capsys.readouterr().out
    assert "not installed: PyTorch, kornia, OpenCV, dm_pix, keras" in out
    assert "ours, gather" in out and "cores" in out
    result = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    assert set(result) == {"versions", "device", "threads", "cases"}
    assert result["versions"]["PyTorch"] is None and result["versions"]["jax"]
    (entry,) = result["cases"].values()
    assert entry["repetitions"] == 2 and entry["tolerance"] == 1e-4
    assert set(entry["contenders"]) == {"ours, gather", "ours, matmul", "jax.scipy", "copy"}
    assert (tmp_path / "run" / "warp.png").read_bytes().startswith(b"\x89PNG")


def test_stopped_run_keeps_its_cases(no_peers, monkeypatch, tmp_path):
    measured = []

    def interrupt():
        raise KeyboardInterrupt

    def run(second):
        first = fake("warp, a", ours=lambda: measured.append("a") or constant(1.0)())
        monkeypatch.setattr(
            benchmark, "cases", lambda *_: iter([first, fake("startup, b", ours=second)])
        )
        benchmark.run(["--suite=all", f"--workdir={tmp_path / 'run'}", "--repetitions=1"])

    with pytest.raises(SystemExit) as stopped:
        run(interrupt)
    assert stopped.value.code == 130
    before = len(measured)
    run(constant(1.0))
    assert len(measured) == before > 0
    result = json.loads((tmp_path / "run" / "benchmark.json").read_text())
    assert list(result["cases"]) == ["warp, a", "startup, b"]


def test_a_stream_has_the_losses_of_resident_images(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "ResNetSmall", partial(models.ResNet, stage_sizes=(1,), width=4))
    case = benchmark._stream_case(16, tmp_path)
    found = benchmark.streams(tmp_path, 16, 3)
    assert case.batch == 704 and case.reference in found
    assert found["resident"]()[0] == found["streamed"]()[0] != 0
    assert found["reading alone"]()[0][0].shape == (16, 32, 32, 1)


def test_starts_with_an_empty_and_a_full_cache(monkeypatch, tmp_path):
    caches = []

    def child(command, *, env, **_):
        cache = tmp_path / "cache"
        assert env["XDG_CACHE_HOME"] == str(cache)
        caches.append(cache.exists())
        cache.mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0, stdout="a line\n2.5\n")

    monkeypatch.setattr(benchmark.subprocess, "run", child)
    found = benchmark.starts(tmp_path)
    results = [found[name + " start"]() for name in ("first", "second", "first", "second")]
    assert caches == [False, True, False, True]
    assert results == [(2.5,)] * 4


def test_start_that_fails(monkeypatch, tmp_path):
    failed = subprocess.CompletedProcess([], 3, stdout="")
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(benchmark.BenchmarkError, match="exit code 3"):
        benchmark.starts(tmp_path)["first start"]()


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--suite=wrap", "wrap"),
        ("--suite", "--suite"),
        ("--repetitions=0", "'0' is not allowed"),
        ("--repetitions=many", "many"),
        ("--batch=-1", "'-1' is not allowed"),
        ("--only=nothing such", "nothing such"),
        ("--speed=9", "--speed=9"),
    ],
)
def test_wrong_flags(flag, named, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.run(["--suite=warp", f"--workdir={tmp_path / 'run'}", flag])
    errors = capsys.readouterr().err
    assert stopped.value.code == 2
    assert errors.startswith("error: ") and errors.count("\n") == 1 and named in errors
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{", "[]", '{"cases": 1}'])
def test_damaged_result(content, no_peers, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "cases", lambda *_: iter([fake()]))
    command = ["--suite=warp", f"--workdir={tmp_path / 'run'}", "--repetitions=1"]
    benchmark.run(command)
    (tmp_path / "run" / "benchmark.json").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        benchmark.run(command)
    assert stopped.value.code == 2 and "is damaged" in capsys.readouterr().err
