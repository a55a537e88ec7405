"""Checkpoints by orbax: atomic, verified by a digest when read, the damaged ones passed over."""

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

logger = logging.getLogger(__name__)


class CheckpointError(Exception):
    """No checkpoint of a folder can be read."""


def open_manager(directory: Path) -> ocp.CheckpointManager:
    """A manager that keeps the two newest checkpoints of a folder."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(directory.absolute(), options=options)


def save(manager: ocp.CheckpointManager, step: int, tree: Any) -> None:
    """Writes a pytree of arrays as checkpoint `step`; complete or not there at all."""
    items = ocp.args.Composite(
        tree=ocp.args.StandardSave(tree), digest=ocp.args.JsonSave({"sha256": _digest(tree)})
    )
    manager.save(step, args=items, force=True)


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
    # Not manager.all_steps(): it leaves out a checkpoint whose own metadata are gone.
    folder = Path(manager.directory)
    steps = sorted((int(p.name) for p in folder.glob("*") if p.name.isdecimal()), reverse=True)
    for position, step in enumerate(steps):
        try:
            tree = _restore(manager, step, like)
        # A damaged file surfaces as nearly any type, from json, zlib, tensorstore or orbax.
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
            logger.warning("checkpoint %s is damaged, skipped: %s", folder / str(step), reason)
            continue
        for damaged in steps[:position]:
            shutil.rmtree(folder / str(damaged))
        manager.reload()
        return step, tree
    if steps:
        raise CheckpointError(
            f"no checkpoint in {folder} can be read; delete that folder to train its phase again"
        )
    return None


def _restore(manager: ocp.CheckpointManager, step: int, like: Any) -> Any:
    abstract = jax.tree.map(_abstract, like)
    items = ocp.args.Composite(
        tree=ocp.args.StandardRestore(abstract), digest=ocp.args.JsonRestore()
    )
    restored = manager.restore(step, args=items)
    if restored.digest["sha256"] != _digest(restored.tree):
        raise CheckpointError("its arrays are not those that were saved")
    return restored.tree


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
