"""A run's folder: whose it is, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from maxent_aug import run_folder
from maxent_aug.run_folder import (
    RunFolderError,
    check_run_folder,
    environment,
    open_run_folder,
    write_json,
)

IDENTITY = {"experiment": "paper", "config": {"batch_size": 64, "data": {"names": ("a", "b")}}}


def snapshot(folder):
    return {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}


def refuse(workdir, identity, match):
    before = snapshot(workdir.parent)
    with pytest.raises(RunFolderError, match=match) as error, open_run_folder(workdir, identity):
        pytest.fail("not refused")
    assert "\n" not in str(error.value)
    assert snapshot(workdir.parent) == before


def test_a_new_folder_is_made_and_opened_again(tmp_path):
    workdir = tmp_path / "a" / "b"
    check_run_folder(workdir, IDENTITY)
    assert not (tmp_path / "a").exists()
    for _ in range(2):
        with open_run_folder(workdir, IDENTITY):
            pass
    assert json.loads((workdir / "config.json").read_text())["config"]["batch_size"] == 64


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"batch_size": 32, "data": {"names": ["a", "b"]}},
            "config.batch_size=64, this one has 32",
        ),
        ({"batch_size": 64, "data": {"names": ["a"]}}, "config.data.names=a,b, this one has a; "),
        ({"batch_size": 64}, "another version, which has a config.data.names"),
        (
            {"batch_size": 64, "data": {"names": ["a", "b"]}, "new": 1},
            "another version, which has no config.new",
        ),
    ],
)
def test_another_config_is_refused_and_the_field_named(tmp_path, config, words):
    with open_run_folder(tmp_path / "run", IDENTITY):
        pass
    refuse(tmp_path / "run", {"experiment": "paper", "config": config}, words)


def test_another_experiment_is_refused(tmp_path):
    with open_run_folder(tmp_path / "run", IDENTITY):
        pass
    refuse(tmp_path / "run", IDENTITY | {"experiment": "other"}, "experiment=paper, this one has")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\0" * 40, b"\xff\xfe{}"])
def test_a_broken_config_is_named(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_bytes(content)
    refuse(tmp_path / "run", IDENTITY, "config.json is damaged; put it back, or choose another")


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    refuse(tmp_path / "run", IDENTITY, "holds other files and no config.json")


def test_what_a_kill_left_before_the_config_was_whole_is_no_hindrance(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "config.json.tmp").write_text("{")
    with open_run_folder(tmp_path, IDENTITY):
        pass


def test_a_file_is_refused(tmp_path):
    (tmp_path / "run").touch()
    refuse(tmp_path / "run", IDENTITY, "is not a folder")
    with (
        pytest.raises(RunFolderError, match="is not a folder"),
        open_run_folder(tmp_path / "run" / "below", IDENTITY),
    ):
        pass


def test_a_config_that_is_a_folder_is_refused(tmp_path):
    (tmp_path / "run" / "config.json").mkdir(parents=True)
    refuse(tmp_path / "run", IDENTITY, "cannot be used")


def test_a_parent_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    """By a stand-in, since root may write everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    refuse(tmp_path / "run", IDENTITY, f"{tmp_path}: Permission denied")


def test_a_parent_that_cannot_be_written_is_refused(tmp_path, monkeypatch):

    def mkdir(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refuse(tmp_path / "run", IDENTITY, r"run: Permission denied\); choose another")


def test_a_second_process_is_refused(tmp_path):
    code = (
        "import sys; from maxent_aug.run_folder import *; from pathlib import Path\n"
        f"with open_run_folder(Path({str(tmp_path / 'run')!r}), {IDENTITY!r}):\n"
        "    print(flush=True); sys.stdin.readline()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe) as other:
        other.stdout.readline()
        refuse(tmp_path / "run", IDENTITY, "in use by another process")
        other.kill()
    with open_run_folder(tmp_path / "run", IDENTITY):  # a lock dies with its process
        pass


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_environment_names_versions_and_device(monkeypatch):
    monkeypatch.setattr(run_folder, "PACKAGES", (*run_folder.PACKAGES, "absent"))
    found = environment()
    assert found["versions"]["absent"] is None
    assert {"python", "jax", "numpy", "maxent_aug"} <= set(found["versions"])
    assert "cpu" in found["device"].lower() or found["device"]
