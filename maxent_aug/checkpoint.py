"""Checkpoints by orbax: atomic, finite, verified by a digest when read."""

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

logger = logging.getLogger(__name__)


class CheckpointError(Exception):
    """No checkpoint of a folder can be read."""


class NonFiniteError(ValueError):
    """An array that was to be saved is not finite."""


def open_manager(directory: Path) -> ocp.CheckpointManager:
    """A manager that keeps the two newest checkpoints of a folder."""
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.LatestN(2),
        enable_async_checkpointing=False,
        cleanup_tmp_directories=True,  # what a killed process was writing
        lightweight_initialize=True,  # reads no metadata: they may be damaged
    )
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
    items = ocp.args.Composite(
        tree=ocp.args.StandardSave(tree), digest=ocp.args.JsonSave({"sha256": digest(tree)})
    )
    try:
        manager.save(step, args=items, force=True)
    # Orbax and tensorstore wrap an error of the file system in a ValueError.
    except (OSError, ValueError) as error:
        target = Path(manager.directory) / str(step)
        raise OSError(f"checkpoint {target} cannot be written: {_line(error)}") from error


def restore_newest(manager: ocp.CheckpointManager, like: Any) -> tuple[int, Any] | None:
    """Reads the newest checkpoint that is whole; logs and removes the damaged ones after it.

    Args:
      manager: of the folder.
      like: a pytree of arrays or ShapeDtypeStructs with the wanted structure and shardings.

    Returns:
      (step, tree), or None if the folder holds no checkpoint.

    Raises:
      CheckpointError: if it holds some and none can be read; nothing is removed then.
    """
    folder = Path(manager.directory)
    steps = saved_steps(folder)
    for position, step in enumerate(steps):
        try:
            tree = _restore(manager, step, like)
        # A damaged file surfaces as nearly any type, from json, zlib, tensorstore or orbax.
        except Exception as error:
            path = folder / str(step)
            logger.warning("checkpoint %s is damaged, skipped: %s", path, _line(error))
            continue
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


def _restore(manager: ocp.CheckpointManager, step: int, like: Any) -> Any:
    abstract = jax.tree.map(_abstract, like)
    items = ocp.args.Composite(
        tree=ocp.args.StandardRestore(abstract), digest=ocp.args.JsonRestore()
    )
    restored = manager.restore(step, args=items)
    if restored.digest["sha256"] != digest(restored.tree):
        raise CheckpointError("its arrays are not those that were saved")
    return restored.tree


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def digest(tree: Any) -> str:
    """SHA-256 of the bytes of a pytree's arrays, in hexadecimal."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        # As bytes: bfloat16 has no buffer protocol, and a view needs no copy.
        sha.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
    return sha.hexdigest()


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
