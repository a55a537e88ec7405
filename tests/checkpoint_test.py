"""Damage of every kind to every file of a checkpoint, and what may not be saved."""

import shutil
from unittest import mock

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from maxent_aug import checkpoint


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
    """It is named, and the one before is read."""
    files = [p.relative_to(saved) for p in (saved / "3").rglob("*") if p.is_file()]
    assert len(files) > 5
    for number, name in enumerate(files):
        if how in ("truncated", "emptied", "zeroed") and not (saved / name).stat().st_size:
            continue  # nothing to damage
        folder = shutil.copytree(saved, tmp_path / str(number))
        damage(folder / name, how)
        caplog.clear()
        step, restored = restore(folder)
        assert step == 2, name
        chex.assert_trees_all_equal(restored, tree(2))
        if how == "deleted" and name.name == checkpoint.DIGESTS:  # as a kill leaves it
            assert f"checkpoint {folder / '3'} was not finished, removed" in caplog.text
        else:
            assert f"checkpoint {folder / '3'} is damaged, skipped: " in caplog.text
            assert name.name in caplog.text
        assert caplog.text.count("\n") == 1
        assert checkpoint.saved_steps(folder) == [2]


def test_a_flipped_bit_is_found(saved, tmp_path, caplog):
    for seed in range(12):
        folder = shutil.copytree(saved, tmp_path / str(seed))
        generator = np.random.default_rng(seed)
        files = sorted(p for p in (folder / "3").rglob("*") if p.is_file() and p.stat().st_size)
        path = max(files, key=lambda p: p.stat().st_size) if seed % 2 else generator.choice(files)
        content = bytearray(path.read_bytes())
        content[generator.integers(len(content))] ^= 1 << generator.integers(8)
        path.write_bytes(content)
        step, restored = restore(folder)
        assert step == 2, path
        chex.assert_trees_all_equal(restored, tree(2))
    assert caplog.text.count("is damaged, skipped") == 12


def test_arrays_of_another_checkpoint_are_found(folder, caplog):
    for item in ("2", "3"):
        assert (folder / item / "default").is_dir()
    shutil.rmtree(folder / "3" / "default")
    shutil.copytree(folder / "2" / "default", folder / "3" / "default")
    assert restore(folder)[0] == 2
    assert "default/" in caplog.text


def test_a_kill_before_the_list_of_digests_costs_one_checkpoint(folder, caplog):
    (folder / "3" / checkpoint.DIGESTS).unlink()
    assert restore(folder)[0] == 2
    assert "3 was not finished, removed" in caplog.text


def test_a_kill_before_those_of_the_first_checkpoint_costs_that(folder):
    shutil.rmtree(folder / "2")
    (folder / "3" / checkpoint.DIGESTS).unlink()
    with checkpoint.open_manager(folder) as manager:
        assert checkpoint.restore_newest(manager, tree(0)) is None
        checkpoint.save(manager, 3, tree(30))
    assert restore(folder)[0] == 3


def test_all_bad_refuses_and_removes_nothing(folder):
    for step in ("2", "3"):
        (folder / step / checkpoint.DIGESTS).write_text("{}")
    before = sorted(folder.rglob("*"))
    for _ in range(2):
        with pytest.raises(checkpoint.CheckpointError, match=f"no checkpoint in {folder} can be"):
            restore(folder)
    assert sorted(folder.rglob("*")) == before


def test_training_goes_on_after_a_damaged_one(folder):
    shutil.rmtree(folder / "3" / "default")
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
    (folder / "4.orbax-checkpoint-tmp" / checkpoint.DIGESTS).unlink()
    assert restore(folder)[0] == 3
    assert sorted(p.name for p in folder.iterdir()) == ["2", "3"]


def test_what_the_system_said_is_named_and_the_newest_checkpoint_left(folder, monkeypatch):
    words = "RESOURCE_EXHAUSTED: a long line [os_error_code='122']\nand another"  # a quota
    with checkpoint.open_manager(folder) as manager:
        monkeypatch.setattr(manager, "save", mock.Mock(side_effect=ValueError(words)))
        with pytest.raises(OSError, match=r"^checkpoint \S+/4 cannot be written: .* quota \w+$"):
            checkpoint.save(manager, 4, tree(4))
    assert restore(folder)[0] == 3


@pytest.mark.parametrize("change", [{"new": np.zeros(2)}, {"new": None}])
def test_another_structure_is_refused_in_one_line_and_removes_nothing(folder, change):
    before = sorted(folder.rglob("*"))
    with (
        checkpoint.open_manager(folder) as manager,
        pytest.raises(checkpoint.CheckpointError, match="another version") as error,
    ):
        checkpoint.restore_newest(manager, tree(0) | change)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert sorted(folder.rglob("*")) == before
