"""A run's folder: one process at a time, one configuration for ever."""

import errno
import fcntl
import glob
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("maxent_aug", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
PACKAGES += ("tensorflow-datasets", "array_record")


class RunFolderError(Exception):
    """The folder cannot hold this run; the message says why, and what to do."""


def file_name(name: str) -> str:
    """A row's or a phase's name for files: a folder may be copied to where no colon is allowed."""
    return name.replace(":", "_or_")


@contextmanager
def open_run_folder(workdir: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """Claims a folder, new or left by an earlier start of the same run.

    Args:
      workdir: the folder; made if its parents can be written to.
      identity: nested values that JSON can hold, fixed for the folder's life in config.json.

    Raises:
      RunFolderError: as `check_run_folder`, and if the folder cannot be written or is in use by
        another process.
    """
    check_run_folder(workdir, identity)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = (workdir / ".lock").open("a")
    except OSError as error:
        raise _unusable(workdir, error) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"workdir {workdir} is in use by another process; wait for it or choose another"
            ) from None
        check_run_folder(workdir, identity)  # another process may have come and gone
        if not (workdir / "config.json").exists():
            try:
                write_json(workdir / "config.json", identity)
            except OSError as error:
                raise _unusable(workdir, error) from None
        yield


def check_run_folder(workdir: Path, identity: Mapping[str, Any]) -> None:
    """Changes nothing on disk. What the identity has no part of is not compared.

    Raises:
      RunFolderError: if it is no folder, has * ? or [ in its path, cannot be read, holds other
        files, or holds a run of another identity; the first field that differs is named.
    """
    try:
        str(workdir.absolute()).encode()
    except UnicodeEncodeError:  # tensorstore writes the checkpoints, and takes nothing else
        raise RunFolderError(
            f"workdir {str(workdir)!a} has a name that is not UTF-8; choose another"
        ) from None
    if glob.has_magic(str(workdir.absolute())):  # orbax finds a checkpoint's files by a pattern
        raise RunFolderError(f"workdir {workdir.absolute()} has one of * ? [ in it; choose another")
    path = workdir / "config.json"
    try:
        if not path.exists():
            _check_unclaimed(workdir)
            return
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unusable(workdir, error) from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, Mapping):
        raise RunFolderError(f"{path} is damaged; put it back, or choose another workdir")
    found = flat({name: part for name, part in found.items() if name in identity})
    wanted = flat(json.loads(json.dumps(identity)))
    for name in [*wanted, *found]:
        if name not in found or name not in wanted:
            has = "has a" if name in found else "has no"
            raise RunFolderError(
                f"workdir {workdir} was begun by another version, which {has} {name}; choose "
                "another workdir"
            )
        if found[name] != wanted[name]:
            same = "images" if name.startswith("dataset.") else "value"
            raise RunFolderError(
                f"workdir {workdir} holds a run with {name}={_as_flag(found[name])}, this one has "
                f"{_as_flag(wanted[name])}; choose another workdir, or the same {same} to resume"
            )


def _as_flag(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _check_unclaimed(workdir: Path) -> None:
    """Raises RunFolderError or OSError unless a run could begin in the folder, there or not."""
    check_writable(workdir)
    # Those two are left by a process killed before config.json was whole.
    mine = {".lock", "config.json.tmp"}
    if workdir.exists() and any(p.name not in mine for p in workdir.iterdir()):
        raise RunFolderError(
            f"workdir {workdir} holds other files and no config.json; choose a new or empty one"
        )


def check_writable(folder: Path) -> None:
    """Raises OSError unless files can be written to the folder, there or to be made."""
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(nearest))
    if not os.access(nearest, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(nearest).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(code, os.strerror(code), str(nearest))


def _unusable(workdir: Path, error: OSError) -> RunFolderError:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return RunFolderError(f"workdir {workdir} is not a folder; choose another")
    return RunFolderError(
        f"workdir {workdir} cannot be used ({error.filename}: {error.strerror}); choose another"
    )


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted names, as the flags of a configuration have."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{name}.")
        else:
            values[prefix + name] = value
    return values


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file beside its place, then moves it there in one step."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def environment() -> dict[str, Any]:
    """Versions of the packages and of Python, and the devices, for a result."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    devices = jax.devices()
    device = f"{len(devices)} x {devices[0].device_kind}"
    if devices[0].platform == "cpu":
        device = f"{device} ({_processor()}, {os.cpu_count()} cores)"
    if jax.process_count() > 1:
        device = f"{device}, {jax.process_count()} processes"
    return {"versions": versions, "device": device}


def _version(package: str) -> str | None:
    """None where it is not installed: this one may be on the path alone, some are not for all."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
