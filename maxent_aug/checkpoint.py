"""Checkpoints by orbax: atomic, finite, each file verified before it is read."""

import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from maxent_aug.run_folder import write_json

logger = logging.getLogger(__name__)

# Beside the arrays: the SHA-256 of every other file. A checkpoint is whole when it has this.
DIGESTS = "sha256.json"


class CheckpointError(Exception):
    """No checkpoint of a folder can be read."""


class NonFiniteError(ValueError):
    """An array that was to be saved is not finite."""


def open_manager(directory: Path) -> ocp.CheckpointManager:
    """A manager that keeps the two newest checkpoints of a folder."""
    # Of several processes the first alone has a manager: the state is a copy in each.
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    options = ocp.CheckpointManagerOptions(
        multiprocessing_options=alone,
        create=False,
        preservation_policy=checkpoint_managers.LatestN(2),
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,  # what a killed process was writing
        lightweight_initialize=True,  # reads no metadata: they may be damaged
    )
    directory.mkdir(parents=True, exist_ok=True)
    return ocp.CheckpointManager(directory.absolute(), options=options)


def save(manager: ocp.CheckpointManager, step: int, tree: Any) -> None:
    """Writes a pytree of arrays as checkpoint `step`; complete or not there at all.

    Raises:
      NonFiniteError: if an array holds a value that is not finite; nothing is written then.
      OSError: if it cannot be written, to a full disk for instance.
    """
    tree = jax.device_get(tree)
    for path, leaf in jax.tree.leaves_with_path(tree):
        # Not np.isfinite: NumPy does not know that bfloat16 is a float.
        if not bool(np.all(np.abs(leaf.astype(np.float32)) < np.inf)):
            raise NonFiniteError(f"{jax.tree_util.keystr(path)} is not finite")
    folder = Path(manager.directory) / str(step)
    try:
        with _quiet():
            manager.save(step, args=ocp.args.StandardSave(tree), force=True)
        write_json(folder / DIGESTS, _digests(folder))
    # Orbax and tensorstore wrap an error of the file system in a ValueError.
    except (OSError, ValueError) as error:
        raise OSError(f"checkpoint {folder} cannot be written: {_line(error)}") from error


def restore_newest(manager: ocp.CheckpointManager, like: Any) -> tuple[int, Any] | None:
    """Reads the newest checkpoint that is whole; logs and removes those after it.

    Args:
      manager: of the folder.
      like: a pytree of arrays or ShapeDtypeStructs with the wanted structure.

    Returns:
      (step, tree of NumPy arrays), or None if the folder holds no checkpoint that was finished.

    Raises:
      CheckpointError: if it holds some and none can be read, or the newest has another structure;
        no finished one is removed then.
    """
    folder = Path(manager.directory)
    steps = saved_steps(folder)
    if steps and not (folder / str(steps[0]) / DIGESTS).exists():
        # A kill came between the arrays and their digests.
        unfinished = folder / str(steps.pop(0))
        shutil.rmtree(unfinished)
        logger.warning("checkpoint %s was not finished, removed", unfinished)
        manager.reload()
    for position, step in enumerate(steps):
        # Before orbax opens it: what a damaged file raises there has nearly any type.
        damage = _damage(folder / str(step))
        if damage is not None:
            logger.warning("checkpoint %s is damaged, skipped: %s", folder / str(step), damage)
            continue
        abstract = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), like)
        try:
            tree = manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {folder / str(step)} was written by another version of the program; "
                f"delete {folder} to train its phase again, or choose another workdir"
            ) from error
        for later in steps[:position]:
            shutil.rmtree(folder / str(later))
        manager.reload()
        return step, tree
    if steps:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read; delete that folder to train its phase again"
        )
    return None


def saved_steps(folder: Path) -> list[int]:
    """The checkpoints of a folder, newest first, whole or damaged."""
    # Not manager.all_steps(): it leaves out a checkpoint whose own metadata are gone.
    return sorted((int(p.name) for p in folder.glob("*") if p.name.isdecimal()), reverse=True)


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint, by its path in the folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != DIGESTS)
    return {p.relative_to(folder).as_posix(): _sha256(p) for p in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing is."""
    try:
        wanted = json.loads((folder / DIGESTS).read_bytes())
    except (OSError, ValueError):
        return f"it has no readable {DIGESTS}"
    found = _digests(folder)
    if not isinstance(wanted, dict) or not wanted:
        return f"its {DIGESTS} lists no files"
    for name, sha in wanted.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != sha:
            return f"{name} is not what was written"
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the tracebacks of what is raised in orbax's and tensorstore's threads.

    It reaches us all the same. After an error tensorstore's other threads, which may end later than
    this, only find orbax's event loop closed: their hook stays.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    before, logger.disabled = logger.disabled, True
    sys.unraisablehook = partial(_unraisable, hook)
    try:
        yield
        sys.unraisablehook = hook
    finally:
        logger.disabled = before


def _unraisable(hook: Callable[[Any], Any], error: Any) -> None:
    if str(error.exc_value) != "Event loop is closed":
        hook(error)


def _line(error: BaseException) -> str:
    if code := re.search(r"os_error_code='(\d+)'", str(error)):  # at the end of a long line
        return os.strerror(int(code[1]))
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
