"""Damage of every kind to every file of a checkpoint, and what may not be saved."""

import shutil
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxent_aug import checkpoint

# tensorstore's threads report to an event loop that orbax closed at the first damaged array.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def tree(value):
    return {
        "weights": jnp.full((3, 4), value, jnp.float32),
        "half": jnp.arange(5, dtype=jnp.bfloat16) + value,
        "step": jnp.int32(value),
        "none": (),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints 2 and 3 of 1, 2, 3."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with checkpoint.open_manager(folder) as manager:
        for step in (1, 2, 3):
            checkpoint.save(manager, step, tree(step))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def restore(folder):
    with checkpoint.open_manager(folder) as manager:
        return checkpoint.restore_newest(manager, tree(0))


def test_the_two_newest_are_kept_and_the_newest_is_read(folder):
    assert checkpoint.saved_steps(folder) == [3, 2]
    step, restored = restore(folder)
    assert step == 3
    chex.assert_trees_all_equal(restored, tree(3))
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, tree(3))


def test_an_empty_folder_has_none(tmp_path):
    assert restore(tmp_path / "new") is None


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        path.write_bytes(bytes(len(content)))


@pytest.mark.parametrize("how", ["deleted", "truncated", "emptied", "zeroed"])
def test_each_file_of_the_newest_damaged_in_turn(saved, tmp_path, caplog, how):
    """Either the content is whole all the same, or it is named and the one before is read."""
    skipped = 0
    files = [p.relative_to(saved) for p in (saved / "3").rglob("*") if p.is_file()]
    assert len(files) > 5
    for number, name in enumerate(files):
        folder = shutil.copytree(saved, tmp_path / str(number))
        damage(folder / name, how)
        caplog.clear()
        step, restored = restore(folder)
        chex.assert_trees_all_equal(restored, tree(step))
        if step == 2:
            skipped += 1
            assert f"checkpoint {folder / '3'} is damaged, skipped: " in caplog.text
            assert caplog.text.count("\n") == 1
            assert checkpoint.saved_steps(folder) == [2]
    assert skipped >= 3


def test_a_flipped_bit_in_the_arrays_is_found(saved, tmp_path, caplog):
    found = 0
    for number, seed in enumerate(range(12)):
        folder = shutil.copytree(saved, tmp_path / str(number))
        generator = np.random.default_rng(seed)
        files = sorted(p for p in (folder / "3" / "tree").rglob("d/*") if p.is_file())
        path = max(files, key=lambda p: p.stat().st_size) if seed % 2 else generator.choice(files)
        content = bytearray(path.read_bytes())
        content[generator.integers(len(content))] ^= 1 << generator.integers(8)
        path.write_bytes(content)
        step, restored = restore(folder)
        chex.assert_trees_all_equal(restored, tree(step))
        found += step == 2
    assert found >= 3
    assert caplog.text.count("is damaged, skipped") == found


def test_arrays_of_another_checkpoint_are_found_by_the_digest(folder, caplog):
    shutil.rmtree(folder / "3" / "tree")
    shutil.copytree(folder / "2" / "tree", folder / "3" / "tree")
    assert restore(folder)[0] == 2
    assert "its arrays are not those that were saved" in caplog.text


def test_all_bad_refuses_and_removes_nothing(folder):
    for step in ("2", "3"):
        (folder / step / "digest" / "metadata").unlink()
    before = sorted(folder.rglob("*"))
    for _ in range(2):
        with pytest.raises(checkpoint.CheckpointError, match=f"no checkpoint in {folder} can be"):
            restore(folder)
    assert sorted(folder.rglob("*")) == before


def test_training_goes_on_after_a_damaged_one(folder):
    shutil.rmtree(folder / "3" / "tree")
    with checkpoint.open_manager(folder) as manager:
        assert checkpoint.restore_newest(manager, tree(0))[0] == 2
        checkpoint.save(manager, 3, tree(30))
    step, restored = restore(folder)
    assert step == 3
    chex.assert_trees_all_equal(restored, tree(30))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_nothing_that_is_not_finite_is_saved(folder, value, dtype):
    bad = tree(4) | {"half": jnp.ones(3, dtype).at[1].set(value)}
    with (
        checkpoint.open_manager(folder) as manager,
        pytest.raises(checkpoint.NonFiniteError, match="'half'"),
    ):
        checkpoint.save(manager, 4, bad)
    assert checkpoint.saved_steps(folder) == [3, 2]


def test_what_a_kill_left_half_written_is_removed(folder):
    shutil.copytree(folder / "3", folder / "4.orbax-checkpoint-tmp")
    shutil.rmtree(folder / "4.orbax-checkpoint-tmp" / "digest")
    assert restore(folder)[0] == 3
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]


def test_the_digest_is_of_all_bytes_and_cheap():
    assert checkpoint.digest(tree(1)) == checkpoint.digest(jax.device_get(tree(1)))
    for name in ("weights", "half", "step"):
        changed = tree(1) | {name: tree(2)[name]}
        assert checkpoint.digest(changed) != checkpoint.digest(tree(1))
    started = time.process_time()
    checkpoint.digest(np.zeros(2**23, np.float32))  # 32 MB
    assert time.process_time() - started < 1
