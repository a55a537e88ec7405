"""Data: one road for all of them, what it reads is what was written, and one line for an error."""

import functools
import hashlib
import http.server
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from sklearn.datasets import load_digits

from maxent_aug import data, preparation

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer"]
CIFAR10_NAMES += ["dog", "frog", "horse", "ship", "truck"]
BATCH = 20  # images in each file of the small archive


def tree(folder):
    """Every path below a folder, with its contents."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
    }


def make_archive(path, extra=()):
    """A small CIFAR-10 archive in the official binary layout; returns its records."""
    generator = np.random.default_rng(0)
    records = generator.integers(0, 256, (6 * BATCH, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(6 * BATCH) % 10
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    files = {n: records[i * BATCH : (i + 1) * BATCH].tobytes() for i, n in enumerate(names)}
    files["batches.meta.txt"] = ("\n".join(CIFAR10_NAMES) + "\n\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in [
            *((f"cifar-10-batches-bin/{n}", c) for n, c in files.items()),
            *extra,
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return records


def expected_images(records):
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def sorted_rows(dataset):
    """Images with their labels in an order that does not depend on the files' shuffle."""
    rows = np.column_stack([dataset.labels, dataset.images.reshape(len(dataset.images), -1)])
    return rows[np.lexsort(rows.T)]


def prepare(folder, name, features, examples, config=None, version="1.0.0"):
    """Prepares a data set of one split, as its owner would."""

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate(examples)

    Made.name = name
    Made(data_dir=folder).download_and_prepare(file_format="array_record")
    return folder


def picture(height=4, width=4, mode="RGB"):
    return Image.new(mode, (width, height), 7)


LABEL = tfds.features.ClassLabel(num_classes=3)
IMAGE = tfds.features.Image(shape=(None, None, 3))


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    data.load("digits", "train", folder)
    return folder


def load_error(folder, name="digits", split="train", data_dir=None):
    """The error of a load, after a check that it is one line and left the folder as it was."""
    before = tree(folder)
    with pytest.raises((ValueError, OSError)) as caught:
        data.load(name, split, folder if data_dir is None else data_dir)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert tree(folder) == before
    return message


# Digits


def test_digits_are_scikit_learns(digits_dir):
    train, test = (data.load("digits", split, digits_dir) for split in ("train", "test"))
    assert train.images.shape == (1437, 8, 8, 1)
    assert test.images.shape == (360, 8, 8, 1)
    assert train.images.dtype == np.uint8
    assert train.labels.dtype == np.int32
    assert train.class_names == tuple("0123456789")
    bunch = load_digits()
    both = data.Dataset(
        np.concatenate([train.images, test.images]),
        np.concatenate([train.labels, test.labels]),
        train.class_names,
    )
    images = np.rint(bunch.images[..., None] * 255 / 16).astype(np.uint8)
    assert images.max() == 255
    source = data.Dataset(images, bunch.target.astype(np.int32), train.class_names)
    np.testing.assert_array_equal(sorted_rows(both), sorted_rows(source))


def test_digits_split_is_stratified_and_fixed(digits_dir):
    test = data.load("digits", "test", digits_dir)
    share = np.bincount(load_digits().target) * 360 / 1797
    assert np.abs(np.bincount(test.labels) - share).max() < 1
    digest = hashlib.sha256(sorted_rows(test).astype(np.int32).tobytes()).hexdigest()
    assert digest == "294ef4038b519832a42428ad0dbbef8bfcda3bf73ccd017acda4893fcbb91791"


def test_second_load_does_not_prepare_again(digits_dir):
    before = {path: path.stat().st_mtime_ns for path in digits_dir.rglob("*")}
    first, second = (data.load("digits", "test", digits_dir) for _ in range(2))
    np.testing.assert_array_equal(first.images, second.images)
    assert {path: path.stat().st_mtime_ns for path in digits_dir.rglob("*")} == before
    assert [path.name for path in digits_dir.iterdir()] == ["digits"]


def test_parts_of_splits(digits_dir):
    whole = data.load("digits", "train", digits_dir)
    first, second = (data.load("digits", s, digits_dir) for s in ("train[:1000]", "train[1000:]"))
    np.testing.assert_array_equal(np.concatenate([first.images, second.images]), whole.images)
    assert len(data.load("digits", "train+test", digits_dir).labels) == 1797


@pytest.mark.parametrize("name", ["digits:1.0.0", "digits:1.*.*"])
def test_versions_are_pinned_as_in_tfds(name, digits_dir):
    assert len(data.load(name, "test", digits_dir).labels) == 360


def test_default_data_dir_is_tfdss_and_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "a" / "b"))
    assert len(data.load("digits", "test").labels) == 360
    assert (tmp_path / "a" / "b" / "digits" / "1.0.0").is_dir()


def test_quiet(tmp_path, capfd):
    data.load("digits", "test", tmp_path)
    assert capfd.readouterr() == ("", "")


def test_no_tensorflow_and_lazy_tfds(digits_dir):
    code = (
        "import sys; import maxent_aug.data as data\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        f"data.load('digits', 'test', {str(digits_dir)!r})\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


LOAD_DIGITS = "import sys; from maxent_aug import data; data.load('digits', 'train', sys.argv[1])"


def test_two_processes_at_once(tmp_path, digits_dir):
    command = [sys.executable, "-c", LOAD_DIGITS, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert tree(tmp_path).keys() == tree(digits_dir).keys()
    np.testing.assert_array_equal(
        data.load("digits", "test", tmp_path).images, data.load("digits", "test", digits_dir).images
    )


def test_without_locks_the_second_takes_what_the_first_prepared(tmp_path, digits_dir, monkeypatch):
    """On a file system without locks another process may finish while this one prepares."""
    import fcntl

    def refuse(handle, operation):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    make_picture = preparation._picture

    def overtaken(image):
        shutil.copytree(digits_dir / "digits", tmp_path / "digits", dirs_exist_ok=True)
        monkeypatch.setattr(preparation, "_picture", make_picture)
        return make_picture(image)

    monkeypatch.setattr(preparation, "_picture", overtaken)
    assert len(data.load("digits", "test", tmp_path).labels) == 360
    assert tree(tmp_path) == tree(digits_dir)


def test_killed_while_preparing(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", LOAD_DIGITS, str(tmp_path)])
    while not list(tmp_path.glob("incomplete.*/digits")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("incomplete.*"))
    assert not (tmp_path / "digits").exists()
    assert len(data.load("digits", "test", tmp_path).labels) == 360
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_failure_while_preparing_leaves_nothing(tmp_path, monkeypatch):
    def fail(image):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preparation, "_picture", fail)
    assert "No space left" in load_error(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "new" / "folder"))
    with pytest.raises(OSError, match="No space left"):
        data.load("digits", "train")
    assert not tree(tmp_path)


# CIFAR-10


def use_small_archive(monkeypatch, path, **kwargs):
    records = make_archive(path, **kwargs)
    monkeypatch.setattr(
        preparation, "_CIFAR10_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()
    )
    return records


def manual(folder):
    return folder / "downloads" / "manual" / "cifar-10-binary.tar.gz"


def check_small_cifar10(folder, records):
    for split, part in (("train", records[: 5 * BATCH]), ("test", records[5 * BATCH :])):
        loaded = data.load("cifar10", split, folder)
        assert loaded.class_names == tuple(CIFAR10_NAMES)
        source = data.Dataset(
            expected_images(part), part[:, 0].astype(np.int32), loaded.class_names
        )
        np.testing.assert_array_equal(sorted_rows(loaded), sorted_rows(source))


def test_cifar10_round_trip_of_an_archive_fetched_by_hand(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    outside = [
        ("../outside.bin", b"x"),
        ("/absolute.bin", b"x"),
        ("cifar-10-batches-bin/../y", b""),
    ]
    records = use_small_archive(monkeypatch, manual(folder), extra=outside)
    check_small_cifar10(folder, records)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert sorted(path.name for path in folder.iterdir()) == ["cifar10", "downloads"]
    info = tfds.builder("cifar10", data_dir=folder).info  # tfds takes it for its own
    assert info.splits["train"].num_examples == 5 * BATCH
    source = tfds.data_source("cifar10", split="train[:1]", data_dir=folder)
    assert set(source[0]) == {"id", "image", "label"}


@pytest.fixture
def server(tmp_path):
    """A local web server for the folder that it returns with its address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}/cifar-10-binary.tar.gz"
        httpd.shutdown()
        thread.join()


def test_cifar10_downloads_and_verifies(tmp_path, monkeypatch, server, capfd):
    served, url = server
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(preparation, "_CIFAR10_URL", url)
    folder = tmp_path / "data"
    folder.mkdir()
    message = load_error(folder, "cifar10")  # nothing is served yet
    assert "cannot be fetched" in message and not re.search(r"\b404\b", message)  # a port: 40407
    records = make_archive(served / "cifar-10-binary.tar.gz")
    assert "checksum" in load_error(folder, "cifar10")
    use_small_archive(monkeypatch, served / "cifar-10-binary.tar.gz")
    capfd.readouterr()
    check_small_cifar10(folder, records)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["cifar10"]


def test_cifar10s_checksum_is_the_registered_one():
    from tensorflow_datasets.core.download import checksums

    assert (
        checksums.get_all_url_infos()[preparation._CIFAR10_URL].checksum
        == preparation._CIFAR10_SHA256
    )


def test_cifar10_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(preparation, "_CIFAR10_URL", "http://127.0.0.1:1/cifar-10-binary.tar.gz")
    message = load_error(tmp_path, "cifar10")
    assert "cannot be fetched" in message
    assert str(manual(tmp_path)) in message


def test_cifar10_archives_that_are_wrong(tmp_path, monkeypatch):
    make_archive(manual(tmp_path))
    assert "checksum" in load_error(tmp_path, "cifar10")
    with tarfile.open(manual(tmp_path), "w:gz"):
        pass
    digest = hashlib.sha256(manual(tmp_path).read_bytes()).hexdigest()
    monkeypatch.setattr(preparation, "_CIFAR10_SHA256", digest)
    assert "lacks data_batch_1.bin" in load_error(tmp_path, "cifar10")


# Wrong input


def test_unknown_names(tmp_path):
    assert "near matches are" in load_error(tmp_path, "cifar11")
    assert "cifar10" in load_error(tmp_path, "CIFAR-10")
    assert "digits" in load_error(tmp_path, "digit")
    for name in ("", "../digits", "a b", "no_such_thing_at_all", "kaggle:titanic", "digits/a=1"):
        assert repr(name) in load_error(tmp_path, name)


def test_known_names_that_are_not_prepared(digits_dir, tmp_path):
    assert "tfds build mnist --data_dir" in load_error(digits_dir, "mnist")
    assert "prepared there: digits" in load_error(digits_dir, "mnist")
    assert "only digits:1.0.0" in load_error(digits_dir, "digits:2.0.0")
    assert "only cifar10:3.0.2" in load_error(tmp_path, "cifar10/config")


def test_wrong_data_dirs(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    assert "does not exist" in load_error(tmp_path, data_dir=tmp_path / "missing")
    assert "is a file" in load_error(tmp_path, data_dir=tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert "cannot be written" in load_error(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be read" in load_error(tmp_path)


@pytest.mark.parametrize("split", ["validation", "train[", "train[a:]", "", "train[:-99%:]"])
def test_unknown_splits(split, digits_dir):
    message = load_error(digits_dir, split=split)
    assert repr(split) in message
    assert "test, train" in message


def test_empty_splits(digits_dir):
    assert "empty" in load_error(digits_dir, split="train[:0]")


def records_file(folder):
    return folder / "digits" / "1.0.0" / "digits-train.array_record-00000-of-00001"


def damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        path.write_bytes(
            {
                "empty": b"",
                "half": content[:middle],
                "one byte short": content[:-1],
                "longer": content + b"junk",
                "zeros": bytes(len(content)),
                "bytes flipped": content[:middle] + bytes(99) + content[middle + 99 :],
            }[how]
        )


@pytest.mark.parametrize(
    "how", ["missing", "empty", "half", "one byte short", "longer", "zeros", "bytes flipped"]
)
def test_damaged_records(how, digits_dir, tmp_path):
    shutil.copytree(digits_dir, tmp_path, dirs_exist_ok=True)
    damage(records_file(tmp_path), how)
    assert "damaged: delete" in load_error(tmp_path)


def edit_info(folder, old, new):
    info = folder / "digits" / "1.0.0" / "dataset_info.json"
    assert old in info.read_text()
    info.write_text(info.read_text().replace(old, new))


def test_damaged_metadata(digits_dir, tmp_path):
    for case in ("truncated", "count", "features", "info"):
        folder = tmp_path / case
        shutil.copytree(digits_dir, folder)
        home = folder / "digits" / "1.0.0"
        if case == "truncated":
            (home / "dataset_info.json").write_text('{"name": "dig')
        elif case == "count":
            edit_info(folder, '"1437"', '"1500"')
        elif case == "features":
            (home / "features.json").unlink()
        else:
            (home / "dataset_info.json").unlink()
        assert "delete that folder" in load_error(folder), case


def test_records_that_need_tensorflow(digits_dir, tmp_path):
    shutil.copytree(digits_dir, tmp_path, dirs_exist_ok=True)
    edit_info(tmp_path, '"array_record"', '"tfrecord"')
    message = load_error(tmp_path)
    assert "stored as tfrecord" in message
    assert "tfds convert_format" in message


def test_features_that_do_not_fit(tmp_path):
    prepare(tmp_path, "plain", {"text": tfds.features.Text()}, [{"text": "a"}])
    assert "no image and no label, only text" in load_error(tmp_path, "plain")
    prepare(tmp_path, "unlabelled", {"image": IMAGE}, [{"image": picture()}])
    assert "no label, only image" in load_error(tmp_path, "unlabelled")
    numbers = {"image": IMAGE, "label": tfds.features.Text()}
    prepare(tmp_path, "captions", numbers, [{"image": picture(), "label": "a"}])
    assert "ClassLabel" in load_error(tmp_path, "captions")


def test_examples_that_do_not_fit(tmp_path):
    features = {"image": IMAGE, "label": LABEL}
    prepare(tmp_path, "unknown", features, [{"image": picture(), "label": n} for n in (0, -1)])
    assert "[0, 3)" in load_error(tmp_path, "unknown")
    sizes = [{"image": picture(4, n), "label": 0} for n in (4, 5)]
    prepare(tmp_path, "sizes", features, sizes)
    assert "differ in size" in load_error(tmp_path, "sizes")
    junk = [{"image": io.BytesIO(b"not an image"), "label": 0}]
    prepare(tmp_path, "junk", features, junk)
    assert "image 0 is in no format" in load_error(tmp_path, "junk")
    buffer = io.BytesIO()
    picture(64, 64).save(buffer, "PNG")
    cut = [{"image": io.BytesIO(buffer.getvalue()[:80]), "label": 0}]
    prepare(tmp_path, "cut", features, cut)
    assert "image 0 cannot be decoded" in load_error(tmp_path, "cut")
    deep = [{"image": picture(mode="I;16"), "label": 0}]
    prepare(tmp_path, "deep", features, deep)
    assert "more than 8 bits" in load_error(tmp_path, "deep")


def test_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    features = {"image": IMAGE, "label": LABEL}
    prepare(tmp_path, "bomb", features, [{"image": picture(20, 20), "label": 0}])
    assert "decompression bomb" in load_error(tmp_path, "bomb")


def test_grey_pictures_of_a_colour_data_set(tmp_path):
    features = {"image": IMAGE, "label": LABEL}
    modes = ["RGB", "L", "RGBA", "P", "1"]
    prepare(tmp_path, "mixed", features, [{"image": picture(mode=m), "label": 1} for m in modes])
    assert data.load("mixed", "train", tmp_path).images.shape == (5, 4, 4, 3)


def test_configurations(tmp_path):
    features = {"image": IMAGE, "label": LABEL}
    for config, label in (("first", 1), ("second", 2)):
        prepare(tmp_path, "mine", features, [{"image": picture(), "label": label}], config)
    assert data.load("mine/first", "train", tmp_path).labels == [1]
    assert data.load("mine/second:1.0.0", "train", tmp_path).labels == [2]
    assert data.load("mine", "train", tmp_path).labels == [2]  # the default of the last builder
    shutil.rmtree(tmp_path / "mine" / ".config")
    assert "first, second" in load_error(tmp_path, "mine")
    assert "not prepared" in load_error(tmp_path, "mine/third")


def test_versions_of_a_configuration(tmp_path):
    features = {"image": IMAGE, "label": LABEL}
    for label, version in enumerate(("1.0.0", "1.9.0", "1.10.0")):
        examples = [{"image": picture(), "label": label}]
        prepare(tmp_path, "mine", features, examples, "first", version)
    for pinned, label in (("", 2), (":1.9.0", 1), (":1.0.*", 0), (":1.*.*", 2)):
        assert data.load(f"mine/first{pinned}", "train", tmp_path).labels == [label], pinned
    assert "mine/first:2.0.0 is not prepared" in load_error(tmp_path, "mine/first:2.0.0")


def test_examples_of_any_size_are_scaled_to_one(tmp_path):
    features = {"image": tfds.features.Image(shape=(None, None, 1)), "label": LABEL}
    picture = Image.fromarray(np.arange(96, dtype=np.uint8).reshape(8, 12))
    examples = [{"image": picture.resize(size), "label": 1} for size in ((12, 8), (8, 8), (5, 9))]
    prepare(tmp_path, "sizes", features, examples)
    assert "set image_size" in load_error(tmp_path, "sizes")
    images = data.load("sizes", "train", tmp_path, image_size=8).images
    assert images.shape == (3, 8, 8, 1)
    square = np.asarray(picture)[:, 2:10]
    assert any((image[..., 0] == square).all() for image in images)
    with pytest.raises(ValueError, match="GiB"):
        data.load("sizes", "train", tmp_path, image_size=10**9)
    with pytest.raises(ValueError, match="image_size"):
        data.load("sizes", "train", tmp_path, image_size=-1)


# Dataset, subset, channel_statistics


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (np.zeros((2, 4, 4, 1), np.float32), np.zeros(2, np.int32), "float32"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int32), "[2, 4, 4]"),
        (np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0, np.int32), "[0, 4, 4, 1]"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, np.int32), "[3]"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int64), "int64"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 2], np.int32), "image 1 is 2"),
    ],
)
def test_datasets_are_checked(images, labels, words):
    with pytest.raises(ValueError) as caught:
        data.Dataset(images, labels, ("a", "b"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def numbered(labels, classes):
    """A data set whose pixels spell the image's index."""
    images = np.arange(len(labels), dtype=">u4").view(np.uint8).reshape(-1, 1, 1, 4)
    names = tuple(map(str, range(classes)))
    return data.Dataset(images, np.array(labels, np.int32), names)


@settings(deadline=None)  # wall time says little on a shared machine
@given(st.data(), st.integers(2, 6), st.integers(0, 2**32))
def test_subsets_are_stratified_sorted_and_fixed(draws, classes, seed):
    label = st.integers(0, classes - 1)
    labels = draws.draw(st.lists(label, min_size=classes, max_size=80))
    examples = draws.draw(st.integers(classes, len(labels)))
    whole = numbered(labels, classes)
    part = data.subset(whole, examples, seed)
    indices = part.images.reshape(-1, 4).copy().view(">u4").ravel()
    assert len(indices) == examples
    assert (np.diff(indices) > 0).all()
    np.testing.assert_array_equal(part.labels, whole.labels[indices])
    there, got = (np.bincount(d.labels, minlength=classes) for d in (whole, part))
    share = there * examples / len(labels)
    assert (got >= np.minimum(there, 1)).all()
    # In proportion, but for what the largest give up so that the smallest have one.
    given_up = np.sum(np.where(there > 0, 1 - np.minimum(share, 1), 0))
    assert (got - share).max() < 1 and (share - got).max() < 1 + given_up
    np.testing.assert_array_equal(data.subset(whole, examples, seed).images, part.images)


def test_subsets_differ_between_seeds_and_are_the_same_everywhere():
    whole = numbered(np.arange(1000) % 10, 10)
    first, second = (data.subset(whole, 20, seed).images for seed in (0, 1))
    assert (first != second).any()
    chosen = data.subset(whole, 10, 0).images.reshape(-1, 4).copy().view(">u4").ravel()
    assert chosen.tolist() == [92, 196, 269, 403, 504, 608, 657, 850, 855, 921]


def test_a_small_class_is_not_left_out():
    labels = np.repeat(np.arange(4), (500, 2, 2, 1))
    assert np.bincount(data.subset(numbered(labels, 4), 50, 0).labels).tolist() == [47, 1, 1, 1]
    rest, held = data.hold_out(numbered(labels, 4), 50, 0)
    # The only picture of a class is trained on.
    assert np.bincount(held.labels, minlength=4).tolist() == [48, 1, 1, 0]
    assert np.bincount(rest.labels).tolist() == [452, 1, 1, 1]
    few = np.append(np.arange(10), np.repeat(10, 90))
    for seed in range(5):
        rest, held = data.hold_out(numbered(few, 11), 20, seed)
        assert held.labels.tolist() == [10] * 20 and set(rest.labels) == set(range(11))
    rest, held = data.hold_out(numbered(few, 11), 92, 0)  # more than the others have
    assert len(held.labels) == 92 and set(held.labels) | set(rest.labels) == set(range(11))


def test_which_of_many_small_classes_are_chosen_is_drawn():
    """Not those with the first names, seed by seed."""
    labels = np.repeat(np.arange(300), 2)
    chosen = [set(labels[data.stratified(labels, 30, seed)]) for seed in range(20)]
    assert all(len(classes) == 30 for classes in chosen)
    counts = np.bincount(np.concatenate([list(classes) for classes in chosen]), minlength=300)
    assert counts.max() < 10 and abs(counts[:150].sum() - 300) < 60  # of 20, and of 600


def test_held_out_images_are_a_stratified_part_and_the_rest_is_all_others():
    labels = np.repeat(np.arange(3, dtype=np.int32), (30, 60, 90))
    images = np.arange(180, dtype=np.uint8).reshape(-1, 1, 1, 1)
    rest, held = data.hold_out(data.Dataset(images, labels, ("a", "b", "c")), 18, seed=3)
    np.testing.assert_array_equal(np.bincount(held.labels), (3, 6, 9))
    both = np.concatenate([rest.images.ravel(), held.images.ravel()])
    np.testing.assert_array_equal(np.sort(both), images.ravel())
    np.testing.assert_array_equal(rest.labels, labels[rest.images.ravel()])
    with pytest.raises(ValueError, match="less than the 18 images"):
        data.hold_out(held, 18, seed=0)


@pytest.mark.parametrize("examples", [0, -1, 9, 101])
def test_subsets_of_impossible_size(examples):
    with pytest.raises(ValueError, match=rf"10, .* 100, not {examples}"):
        data.subset(numbered(np.arange(100) % 10, 10), examples, 0)
    with pytest.raises(ValueError, match="seed"):
        data.subset(numbered(np.arange(100) % 10, 10), 50, -1)


@settings(deadline=None)
@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=4, max_dims=4, max_side=6)))
def test_statistics_are_numpys(images):
    mean, deviation = data.channel_statistics(images)
    assert mean.dtype == deviation.dtype == np.float32
    scaled = images / 255.0
    np.testing.assert_allclose(mean, scaled.mean((0, 1, 2)), rtol=1e-6, atol=1e-7)
    expected = np.maximum(scaled.std((0, 1, 2)), 1 / 255)
    np.testing.assert_allclose(deviation, expected, rtol=1e-6)


def test_statistics_of_many_images_and_constant_channels():
    images = np.zeros((3000, 2, 2, 2), np.uint8)
    images[1500:, ..., 1] = 255
    mean, deviation = data.channel_statistics(images)
    np.testing.assert_allclose(mean, [0, 0.5])
    np.testing.assert_allclose(deviation, [1 / 255, 0.5], rtol=1e-6)
    with pytest.raises(ValueError, match="uint8"):
        data.channel_statistics(images / 255)


def dots(count):
    """A bright dot, 8 pixels right of the middle of each image."""
    images = np.zeros((count, 32, 32, 1), np.uint8)
    images[:, 15:17, 23:25] = 255
    return data.Dataset(images, (np.arange(count) % 10).astype(np.int32), tuple("0123456789"))


def angles(dataset):
    """By how many degrees each image's dot was rotated, to the left; its distance to the middle."""
    weights = dataset.images[..., 0] / dataset.images.sum((1, 2, 3))[:, None, None]
    x = (weights.sum(1) * (np.arange(32) - 15.5)).sum(1)
    y = -(weights.sum(2) * (np.arange(32) - 15.5)).sum(1)
    return np.degrees(np.arctan2(y, x)), np.hypot(x, y)


@pytest.mark.parametrize("degrees", [20, 180])
def test_rotated_images_are_rotated_about_the_middle_uniformly(degrees):
    dataset = dots(2000)
    rotated = data.rotate(dataset, degrees)
    found, distance = angles(rotated)
    np.testing.assert_allclose(distance, 8, atol=0.2)
    assert np.abs(found).max() <= degrees + 0.5
    quarters = np.histogram(found, 4, (-degrees, degrees))[0]
    assert quarters.min() > 430 and quarters.max() < 570  # 500 and three standard deviations
    np.testing.assert_array_equal(rotated.labels, dataset.labels)
    again = data.rotate(dataset, degrees)
    np.testing.assert_array_equal(rotated.images, again.images)
    np.testing.assert_array_equal(dataset.images, dots(2000).images)  # and its own are left alone


def test_oblong_pictures_are_rotated_and_not_distorted():
    row, column = np.mgrid[:24, :40]
    radius = np.hypot(row - 11.5, column - 19.5)
    disc = 255 * (radius < 8)
    images = np.tile(disc[None, ..., None], (20, 1, 1, 1)).astype(np.uint8)
    rotated = data.rotate(data.Dataset(images, np.zeros(20, np.int32), ("a",)), 180).images
    assert (rotated[:, radius < 6] == 255).all()
    assert rotated[:, (radius > 9) & (radius < 11)].max() < 5  # further out it is mirrored


def test_a_rotation_leaves_no_empty_corner_and_no_overflow():
    random = np.random.default_rng(0)
    white = data.Dataset(np.full((50, 9, 12, 3), 255, np.uint8), np.zeros(50, np.int32), ("a",))
    np.testing.assert_array_equal(data.rotate(white, 180).images, white.images)
    extremes = random.choice(np.uint8([0, 255]), (50, 9, 12, 3))
    noise = data.Dataset(extremes, np.zeros(50, np.int32), ("a",))
    assert np.abs(data.rotate(noise, 180).images.mean() - extremes.mean()) < 5  # not wrapped around
    np.testing.assert_array_equal(data.rotate(noise, 0).images, noise.images)


@pytest.mark.parametrize("degrees", [-1, 181, np.nan])
def test_rotations_that_are_refused(degrees):
    with pytest.raises(ValueError, match=r"must lie in \[0, 180\]"):
        data.rotate(dots(20), degrees)
