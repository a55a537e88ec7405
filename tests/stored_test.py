"""Images that stay on disk: the same images, batches and results as of those in memory."""

import dataclasses
import pickle
import shutil
import signal

import jax
import numpy as np
import pytest
import small_run
from absl.testing import flagsaver
from train_test import joint

from experiments import cli, run_inputs
from maxent_aug import data, pictures, programs, stored, train
from maxent_aug.config import PRESETS, Data

STEPS = 3  # an epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data.load("digits", "train", folder)
    return folder


@pytest.fixture(scope="module")
def sets(folder):
    """(resident, on disk): each a training and a test set."""
    return small_run.prepared(folder, None), small_run.prepared(folder, 0)


def test_what_fits_is_read_and_what_does_not_stays_on_disk(folder):
    for most_bytes, kind in (
        (None, np.ndarray),
        (360 * 64, np.ndarray),
        (360 * 64 - 1, stored.StoredImages),
    ):
        assert type(data.load("digits", "test", folder, most_bytes=most_bytes).images) is kind
    scaled = data.load("digits", "test", folder, most_bytes=0, image_size=5).images
    expected = data.load("digits", "test", folder, image_size=5).images
    np.testing.assert_array_equal(scaled[17], expected[17])
    large = {"data_dir": folder, "image_size": 10**8, "most_bytes": 0}
    assert data.load("digits", "train", **large).images.shape == (1437, 10**8, 10**8, 1)
    with pytest.raises(ValueError, match="choose a smaller image_size"):
        data.load("digits", "test", **large | {"most_bytes": None})


@pytest.mark.parametrize(
    ("stream", "memory", "kind"),
    [
        ("auto", 2 * 1437 * 64, np.ndarray),
        ("auto", 2 * 1437 * 64 - 2, stored.StoredImages),
        ("always", 10**12, stored.StoredImages),
        ("never", 1437 * 64, np.ndarray),
    ],
)
def test_which_images_a_run_streams(folder, monkeypatch, stream, memory, kind):
    """By default those that take more than half of a device's memory, and never those of tests."""
    monkeypatch.setattr(pictures, "memory", lambda: memory * jax.local_device_count())
    with flagsaver.as_parsed(stream=stream):
        train_set, test_set = run_inputs.load_data(PRESETS["quick"], str(folder))
        assert type(train_set.images) is kind
        assert type(test_set.images) is np.ndarray


@pytest.mark.parametrize(
    ("chosen", "may_stream", "words"),
    [
        (Data("folder"), True, "pictures of a folder are always"),
        (Data("digits", rotated=9.0), True, "rotated pictures"),
        (Data("digits"), False, "this experiment's"),
    ],
)
def test_what_cannot_be_streamed_is_refused(folder, chosen, may_stream, words):
    config = dataclasses.replace(PRESETS["quick"], data=chosen)
    with flagsaver.as_parsed(stream="always"), pytest.raises(cli.UsageError, match=words):
        run_inputs.load_data(config, str(folder), may_stream=may_stream)


def test_a_run_rotates_all_its_pictures_and_does_not_stream_them(folder, monkeypatch):
    too_little = (2 * 1437 * 64 - 2) * jax.local_device_count()
    monkeypatch.setattr(pictures, "memory", lambda: too_little)
    quick = PRESETS["quick"]
    with flagsaver.as_parsed(stream="never"):
        plain = run_inputs.load_data(quick, str(folder))
    rotated = dataclasses.replace(quick, data=Data("digits", rotated=90.0))
    with flagsaver.as_parsed(stream="auto"):
        changed = run_inputs.load_data(rotated, str(folder))
    for before, after in zip(plain, changed, strict=True):
        differs = (before.images != after.images).any((1, 2, 3))
        assert differs.mean() > 0.98  # an angle may be too small to see
    with pytest.raises(ValueError, match="stay on disk cannot be rotated"):
        data.rotate(data.load("digits", "train", folder, most_bytes=0), 90.0)


def test_what_is_held_out_of_a_stream_is_read(sets):
    config = dataclasses.replace(PRESETS["quick"], data=Data("digits", held_out=12))
    (resident, held), (streamed, read) = (run_inputs.choose(*pair, config, seed=0) for pair in sets)
    assert type(streamed.images) is stored.StoredImages and len(streamed.images) > 0
    np.testing.assert_array_equal(streamed.labels, resident.labels)
    np.testing.assert_array_equal(read.images, held.images)
    np.testing.assert_array_equal(read.labels, held.labels)


def test_a_stored_image_is_the_resident_one(sets):
    (resident, _), (on_disk, _) = sets
    assert on_disk.images.shape == resident.images.shape
    np.testing.assert_array_equal(on_disk.labels, resident.labels)
    assert on_disk.class_names == resident.class_names
    for images in (on_disk.images, pickle.loads(pickle.dumps(on_disk.images))):
        np.testing.assert_array_equal(
            np.stack([images[i] for i in range(len(images))]), resident.images
        )
    for statistics in zip(*(data.channel_statistics(s[0].images) for s in sets), strict=True):
        np.testing.assert_array_equal(*statistics)


@pytest.mark.parametrize(
    "divide",
    [
        lambda dataset: data.subset(dataset, 20, seed=1),
        lambda dataset: data.hold_out(dataset, 20, seed=1)[0],
        lambda dataset: data.subset(data.hold_out(dataset, 20, seed=1)[1], 12, seed=2),
    ],
)
def test_parts_are_the_same(sets, divide):
    (resident, _), (on_disk, _) = sets
    expected, part = divide(resident), divide(on_disk)
    np.testing.assert_array_equal(part.labels, expected.labels)
    np.testing.assert_array_equal(
        np.stack([part.images[i] for i in range(len(part.images))]), expected.images
    )


@pytest.mark.parametrize("counts", [(), (5, 5, 5), (1, 7, 2, 7, 2, 1, 1)])
def test_batches_come_in_order_and_may_differ_in_size(sets, counts):
    (resident, _), (on_disk, _) = sets
    rng = np.random.default_rng(0)
    order = [rng.integers(0, 48, count) for count in counts]
    got = list(stored.batches(on_disk.images, order))
    assert len(got) == len(order)
    for images, row in zip(got, order, strict=True):
        np.testing.assert_array_equal(images, resident.images[row])


@pytest.mark.parametrize(("unseen", "interval"), [(0, 1), (4, 1), (8, 1), (8, 2)])
def test_a_stream_gives_each_device_its_part(sets, unseen, interval):
    """8 unseen images are divided among 8 devices, 4 are copied to all.

    From the second of three steps on; with an interval of 2 the second does not learn.
    """
    (resident, _), (on_disk, _) = sets
    mesh, order = small_run.mesh(8), np.arange(48, dtype=np.int32)[::-1]
    plan = programs.Plan(order, jax.random.key(0), np.array([3, 5], np.int32))
    plan = programs.put(mesh, plan)[0]
    kinds = programs.Unseen(0.1, unseen, interval)
    steps = list(programs.stream(on_disk.images, mesh, plan, 16, kinds, 1))
    assert len(steps) == 2
    for i, images in enumerate(steps, 1):
        learns = unseen and (interval == 1 or i == 2)
        assert len(images) == (2 if learns else 1)
        expected = resident.images[order[16 * i : 16 * i + 16]]
        np.testing.assert_array_equal(images[0], expected)
        assert images[0].addressable_shards[3].data.shape == (2, 8, 8, 1)
        if learns:
            assert images[1].shape == (unseen, 8, 8, 1)
            allowed = {resident.images[j].tobytes() for j in (3, 5)}
            assert {np.asarray(image).tobytes() for image in images[1]} == allowed


@pytest.fixture
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("interval", [1, 2])
def test_a_stream_gives_the_same_result_bit_for_bit_also_when_stopped(sets, tmp_path, interval):
    # Of images that are trained on, and unseen ones.
    (resident, on_disk), legs = sets, (joint(interval),)
    whole = small_run.go(tmp_path / "resident", sets=resident, legs=legs)
    expected = small_run.outcome(tmp_path / "resident", whole)

    calls = []

    def stop(**_):
        calls.append(1)
        if len(calls) == 1:  # in the middle of an epoch
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(train.Interrupted, match=f"step {STEPS - 1}"):
        small_run.go(tmp_path / "stream", sets=on_disk, legs=legs, update=stop)
    final = small_run.go(tmp_path / "stream", sets=on_disk, legs=legs)
    assert small_run.outcome(tmp_path / "stream", final) == expected


def test_what_cannot_be_read_is_named(folder, tmp_path):
    shutil.copytree(folder / "digits", tmp_path / "digits")
    images = data.load("digits", "train", tmp_path, most_bytes=0).images
    other = dataclasses.replace(images, image_shape=(9, 8, 1))
    with pytest.raises(OSError, match="image 5 has 8x8"):
        list(stored.batches(other, [np.array([5])]))
    (records,) = (tmp_path / "digits" / "1.0.0").glob("*train.array_record*")
    content = bytearray(records.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    records.write_bytes(content)
    with pytest.raises(OSError, match=r"digits.1\.0\.0, split train: "):
        list(stored.batches(images, [np.arange(1437)]))


def test_a_run_says_which_image_it_cannot_read(sets, tmp_path):
    (on_disk, test), leg = sets[1], small_run.phases()[0]
    broken = dataclasses.replace(on_disk.images, indices=np.arange(48) + 10_000)
    dataset = dataclasses.replace(on_disk, images=broken)
    with pytest.raises(OSError, match="split train"):
        small_run.go(tmp_path, sets=(dataset, test), legs=(leg,))
