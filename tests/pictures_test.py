"""Pictures: what is read is what Pillow decodes, in one order, and one line for an error."""

import dataclasses
import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from experiments import cli, run_inputs
from maxent_aug import data, pictures
from maxent_aug.config import PRESETS, Data

HEIGHT, WIDTH = 6, 4


def noise(height=HEIGHT, width=WIDTH, channels=3, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def fill(folder, classes=("cat", "dog"), examples=4, suffix=".png", channels=3, **size):
    """A folder of pictures of noise, no two alike."""
    for label, name in enumerate(classes):
        for index in range(examples):
            pixels = noise(channels=channels, seed=100 * label + index, **size)
            save(folder / name / f"{index}{suffix}", pixels)
    return folder


def read(split, folder, **options):
    """A split in the order of its files' names."""
    return data.Dataset(*pictures.read(folder, split, **options))


def both(folder, **options):
    return [read(split, folder, **options) for split in ("train", "test")]


def state(folder):
    """Every path below a folder, and when it was changed."""
    return {path: path.lstat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def load_error(folder, split="train", **options):
    """The error of a load, after a check that it is one line and left the folder as it was."""
    before = state(folder) if isinstance(folder, Path) and folder.is_dir() else None
    with pytest.raises((ValueError, OSError)) as caught:
        data.load("folder", split, folder, **options)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600
    assert before is None or state(folder) == before
    return message


def png_of_16_bits(pixels):
    """A PNG of uint16 [H, W, C], which Pillow does not write for more than one channel."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content))
            + name
            + content
            + struct.pack(">I", zlib.crc32(name + content))
        )

    height, width, channels = pixels.shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


# Layout


def test_train_and_test_folders_as_in_tfds_image_folder(tmp_path, capsys):
    fill(tmp_path / "train", ("b", "C", "a"), examples=3)
    fill(tmp_path / "test", ("b", "C", "a"), examples=2, suffix=".JPG")
    fill(tmp_path / "validation", ("other",))  # no split of ours
    train, test = both(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert "validation in" in line and "not read" in line
    assert train.class_names == test.class_names == ("C", "a", "b")
    np.testing.assert_array_equal(train.labels, np.repeat([0, 1, 2], 3))
    np.testing.assert_array_equal(test.labels, np.repeat([0, 1, 2], 2))
    for loaded, split in ((train, "train"), (test, "test")):
        paths = [
            path for name in ("C", "a", "b") for path in sorted((tmp_path / split / name).iterdir())
        ]
        decoded = [np.asarray(Image.open(path)) for path in paths]
        np.testing.assert_array_equal(loaded.images, decoded)


def test_a_data_set_has_the_classes_mixed_and_each_with_its_pictures(tmp_path):
    fill(tmp_path, ("a", "b", "c"), examples=20)
    for split in ("train", "test"):
        mixed, again = (data.load("folder", split, tmp_path) for _ in range(2))
        assert sorted(keys(mixed)) == sorted(keys(read(split, tmp_path)))
        assert keys(mixed) == keys(again)
        assert set(mixed.labels[:8]) == {0, 1, 2}


def test_other_files_are_ignored(tmp_path):
    fill(tmp_path)
    expected = read("train", tmp_path)
    (tmp_path / "cat" / ".hidden.png").write_bytes(b"x")
    (tmp_path / "cat" / "notes.txt").write_bytes(b"x")
    (tmp_path / "cat" / "clip.gif").write_bytes(b"x")
    (tmp_path / "cat" / ".thumbnails").mkdir()
    (tmp_path / ".git" / "x").mkdir(parents=True)
    save(tmp_path / "beside.png", noise())
    (tmp_path / "README").write_text("x")
    found = read("train", tmp_path)
    assert found.class_names == expected.class_names
    np.testing.assert_array_equal(found.images, expected.images)


@pytest.mark.parametrize("names", [("car", "train"), ("bus", "test", "train")])
def test_a_class_may_be_called_train(tmp_path, names):
    train, test = both(fill(tmp_path, names))
    assert train.class_names == test.class_names == names


def keys(dataset):
    """Each picture's class and content: those of `fill` are all different."""
    return [
        (label, image.tobytes())
        for label, image in zip(dataset.labels, dataset.images, strict=True)
    ]


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.2, (1, 2, 6)), (0.5, (2, 5, 15)), (0.01, (1, 1, 1))]
)
def test_a_folder_without_splits_is_divided_within_each_class(tmp_path, fraction, expected):
    for name, examples in (("a", 3), ("b", 10), ("c", 30)):
        fill(tmp_path / "all", (name,), examples)
    save(tmp_path / "all" / "a" / "0.png", noise(seed=1000))
    for label, name in enumerate("abc"):  # no two classes share a picture
        for path in (tmp_path / "all" / name).iterdir():
            save(path, np.asarray(Image.open(path)) ^ np.uint8(label))
    train, test = both(tmp_path / "all", test_fraction=fraction)
    np.testing.assert_array_equal(np.bincount(test.labels), expected)
    np.testing.assert_array_equal(np.bincount(train.labels), np.subtract((3, 10, 30), expected))
    assert not set(keys(train)) & set(keys(test))
    assert len({*keys(train), *keys(test)}) == 43
    other = read("test", tmp_path / "all", test_fraction=fraction, split_seed=1)
    np.testing.assert_array_equal(np.bincount(other.labels), expected)
    assert keys(other) != keys(test)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 40), st.floats(0.01, 0.99), st.integers(0, 2**40))
def test_a_picture_added_later_moves_at_most_one_other(examples, fraction, seed):
    paths = [Path(f"cat/{index}.png") for index in range(examples + 1)]
    train, test = pictures._divide(paths[:-1], fraction, seed)
    assert train and test and sorted(train + test) == sorted(paths[:-1])
    assert abs(len(test) - fraction * examples) <= 1
    later = pictures._divide(paths, fraction, seed)[1]
    assert len(set(test) - set(later)) <= 1
    assert len(set(later) - set(test)) <= 1


def test_the_order_and_the_split_are_the_same_everywhere(tmp_path):
    names = ["b.png", "B.png", "10.png", "9.png", "é.png", "a.PNG", "a.jpeg", "z.webp"]
    for folder, order in (("one", names), ("two", names[::-1])):
        for name in order:
            for label in "xy":
                pixels = np.full((2, 2), names.index(name), np.uint8)
                save(tmp_path / folder / label / name, pixels, format="PNG")  # of any suffix
        train, test = both(tmp_path / folder, test_fraction=0.4)
        shown = [[names[image[0, 0, 0]] for image in loaded.images] for loaded in (train, test)]
        ten = ["10.png", "9.png", "a.jpeg"]
        assert shown == [
            [*("B.png", "a.PNG", "b.png", "z.webp", "é.png"), *ten, "z.webp", "é.png"],
            [*ten, "B.png", "a.PNG", "b.png"],
        ]


# Decoding


GREY, COLOUR = noise(channels=1), noise()
ALPHA = noise(channels=1, seed=1)
DEEP = noise(channels=1).astype(np.uint16) * 256 + 7
PALETTE = Image.fromarray(COLOUR).quantize(8)
GREY_PALETTE = Image.fromarray(GREY)
GREY_PALETTE.putpalette([level for level in range(256) for _ in range(3)])


def on_white(pixels, alpha):
    share = alpha[..., None] / 255.0
    return pixels.reshape(HEIGHT, WIDTH, -1) * share + 255 * (1 - share)


CASES = {
    "bilevel.png": (Image.fromarray(GREY > 127), (GREY > 127) * 255),
    "grey.png": (Image.fromarray(GREY), GREY),
    "grey_alpha.png": (Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), on_white(GREY, ALPHA)),
    "grey_palette.png": (GREY_PALETTE, GREY),
    "grey_16.png": (png_of_16_bits(DEEP[..., None]), GREY),
    "alpha_16.png": (
        png_of_16_bits(np.dstack([DEEP, ALPHA * np.uint16(257)])),
        on_white(GREY, ALPHA).repeat(3, axis=2),
    ),
    "colour.png": (Image.fromarray(COLOUR), COLOUR),
    "alpha.png": (Image.fromarray(np.dstack([COLOUR, ALPHA])), on_white(COLOUR, ALPHA)),
    "palette.png": (PALETTE, np.asarray(PALETTE.convert("RGB"))),
    "colour_16.png": (png_of_16_bits(COLOUR.astype(np.uint16) * 256 + 7), COLOUR),
    "colour.webp": (Image.fromarray(COLOUR), COLOUR),
    "alpha.webp": (Image.fromarray(np.dstack([COLOUR, ALPHA])), on_white(COLOUR, ALPHA)),
    "grey.jpg": (Image.fromarray(GREY), None),
    "colour.jpeg": (Image.fromarray(COLOUR), None),
    "cmyk.jpg": (Image.fromarray(COLOUR).convert("CMYK"), None),
}
"""File name: (what is saved, the pixels to be read or None for Pillow's own)."""


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path, **({"lossless": True, "exact": True} if path.suffix == ".webp" else {}))
    return path


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_picture(tmp_path, name):
    content, expected = CASES[name]
    channels = 1 if name.startswith(("grey", "bilevel")) else 3
    for label in "ab":
        path = write(tmp_path / "train" / label / name, content)
        write(tmp_path / "test" / label / name, content)
    if expected is None:
        expected = np.asarray(Image.open(path).convert("L" if channels == 1 else "RGB"))
    train = read("train", tmp_path)
    assert train.images.shape == (2, HEIGHT, WIDTH, channels)
    expected = np.asarray(expected, float).reshape(HEIGHT, WIDTH, channels)
    tolerance = 1 if "alpha" in name else 0
    np.testing.assert_allclose(train.images[0], expected, rtol=0, atol=tolerance)


def test_all_kinds_together_are_colour(tmp_path, capfd):
    for split in ("train", "test"):
        for name, (content, _) in CASES.items():
            write(tmp_path / split / "a" / name, content)
            write(tmp_path / split / "b" / name, content)
    images = read("train", tmp_path).images
    assert images.shape == (2 * len(CASES), HEIGHT, WIDTH, 3)
    deep = images[sorted(CASES).index("grey_16.png")]
    np.testing.assert_array_equal(deep, np.dstack([GREY] * 3))
    assert capfd.readouterr().err == ""


def test_a_transparent_level_of_16_bits(tmp_path):
    level = int(DEEP[0, 0])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            Image.fromarray(DEEP).save(tmp_path / folder / f"{number}.png", transparency=level)
    image = read("train", tmp_path).images[0, ..., 0]
    np.testing.assert_array_equal(image, np.where(level == DEEP, 255, DEEP >> 8))


def test_palette_with_a_transparent_colour(tmp_path):
    index = int(np.asarray(PALETTE)[0, 0])
    for name in "ab":
        for number in range(2):
            path = tmp_path / name / f"{number}.png"
            path.parent.mkdir(exist_ok=True)
            PALETTE.save(path, transparency=index)
    image = read("train", tmp_path).images[0]
    transparent = np.asarray(PALETTE) == index
    np.testing.assert_array_equal(image[transparent], np.full((transparent.sum(), 3), 255))
    expected = np.asarray(PALETTE.convert("RGB"))
    np.testing.assert_array_equal(image[~transparent], expected[~transparent])


def test_one_picture_in_colour_makes_both_splits_colour(tmp_path):
    fill(tmp_path / "train", channels=1)
    fill(tmp_path / "test", channels=1)
    assert [loaded.images.shape[-1] for loaded in both(tmp_path)] == [1, 1]
    save(tmp_path / "test" / "dog" / "1.png", noise())
    train, test = both(tmp_path)
    assert train.images.shape[-1] == test.images.shape[-1] == 3
    np.testing.assert_array_equal(train.images[..., 0], train.images[..., 2])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_cameras(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    upright = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
        8: lambda p: np.rot90(p),
    }[orientation]
    for name in "ab":
        for number, suffix in enumerate((".png", ".jpg")):
            path = save(tmp_path / name / f"{number}{suffix}", noise(), exif=exif)
            save(tmp_path / "plain.jpg", noise())
    train, test = both(tmp_path)
    stored = {"png": noise(), "jpg": np.asarray(Image.open(tmp_path / "plain.jpg"))}
    expected = {upright(pixels).tobytes() for pixels in stored.values()}
    assert {image.tobytes() for image in [*train.images, *test.images]} == expected
    assert train.images.shape[1:] == upright(noise()).shape
    assert path.exists()


# Sizes


def test_sizes_that_differ_are_refused_or_cropped_and_scaled(tmp_path):
    fill(tmp_path / "train", height=32, width=32)
    fill(tmp_path / "test", height=40, width=20)
    save(tmp_path / "train" / "dog" / "1.png", noise(32, 48))
    message = load_error(tmp_path)
    assert "32x32" in message
    assert "48x32" in message
    assert "1.png" in message
    assert "set image_size" in message
    train, test = both(tmp_path, image_size=8)
    assert train.images.shape[1:] == test.images.shape[1:] == (8, 8, 3)


@pytest.mark.parametrize(("height", "width"), [(40, 40), (40, 60), (70, 40)])
def test_the_middle_square_is_scaled_antialiased(tmp_path, height, width):
    for name in "ab":
        for number in range(2):
            save(tmp_path / name / f"{number}.png", noise(height, width, seed=3))
    top, left = (height - 40) // 2, (width - 40) // 2
    pixels, box = noise(height, width, seed=3), (left, top, left + 40, top + 40)
    square = pixels[top : top + 40, left : left + 40]
    image = read("train", tmp_path, image_size=10).images[0]
    expected = Image.fromarray(pixels).resize((10, 10), Image.Resampling.BICUBIC, box)
    np.testing.assert_array_equal(image, np.asarray(expected))
    # Antialiased: of noise little is left, where a sample of every fourth pixel keeps all of it.
    assert image.std() < 0.5 * square.std()
    whole = read("train", tmp_path, image_size=40).images[0]
    np.testing.assert_array_equal(whole, square)


def test_large_jpegs_are_read_fast_and_nearly_as_well(tmp_path):
    smooth = Image.fromarray(noise(80, 80)).resize((640, 640), Image.Resampling.BICUBIC)
    for name in "ab":
        for number in range(2):
            path = save(tmp_path / name / f"{number}.jpg", np.asarray(smooth))
    for size, tolerance in ((32, 1), (100, 3)):
        image = read("train", tmp_path, image_size=size).images[0]
        whole = Image.open(path).resize((size, size), Image.Resampling.BICUBIC)
        difference = np.abs(image - np.asarray(whole, float)).mean()
        assert 0 < difference < tolerance


def test_what_does_not_fit_into_memory_is_refused_at_once(tmp_path, monkeypatch):
    fill(tmp_path, examples=10)
    message = load_error(tmp_path, image_size=10**12)
    assert "16 images of 1000000000000x1000000000000x3 need" in message
    assert "GiB" in message
    monkeypatch.setattr(pictures, "memory", lambda: 16 * HEIGHT * WIDTH * 3)
    assert len(read("train", tmp_path).images) == 16
    monkeypatch.setattr(pictures, "memory", lambda: 16 * HEIGHT * WIDTH * 3 - 1)
    assert "16 images of 6x4x3 need" in load_error(tmp_path)


def test_memory_is_bounded(tmp_path):
    fill(tmp_path, examples=50, height=64, width=64)
    tracemalloc.start()
    images = read("train", tmp_path).images
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * images.nbytes


# Damage


def damaged(path, how):
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "empty": b"",
            "half": content[:middle],
            "zeros": bytes(len(content)),
            "text": b"<html>404</html>",
            "header": content[:20],
        }[how]
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("how", ["empty", "half", "zeros", "text", "header"])
def test_a_picture_that_does_not_decode_is_named_and_skipped(tmp_path, capfd, suffix, how):
    fill(tmp_path / "train", suffix=suffix, height=64, width=64)
    fill(tmp_path / "test", suffix=suffix, height=64, width=64)
    whole = read("train", tmp_path)
    damaged(tmp_path / "train" / "cat" / f"2{suffix}", how)
    left = read("train", tmp_path)
    keep = np.arange(8) != 2
    np.testing.assert_array_equal(left.images, whole.images[keep])
    np.testing.assert_array_equal(left.labels, whole.labels[keep])
    out, errors = capfd.readouterr()
    assert out == ""
    assert errors.count("\n") == 1
    assert errors.startswith("warning: 1 of 8 train pictures")
    assert f"train/cat/2{suffix} (" in errors


def test_damaged_metadata_of_webp_are_damage(tmp_path, capfd):
    exif = Image.Exif()
    exif[0x112] = 6
    for split in ("train", "test"):
        fill(tmp_path / split, suffix=".webp")
    path = save(tmp_path / "train" / "cat" / "2.webp", noise(WIDTH, HEIGHT), exif=exif)
    assert len(read("train", tmp_path).images) == 8
    path.write_bytes(path.read_bytes().replace(b"MM\0*", b"XX\0*"))
    assert len(read("train", tmp_path).images) == 7
    assert "cat/2.webp (not a TIFF file" in capfd.readouterr().err


def test_one_line_for_many(tmp_path, capfd):
    fill(tmp_path, examples=20)
    for index in range(10):
        damaged(tmp_path / "cat" / f"{index}.png", "half")
    assert len(read("train", tmp_path, split_seed=4).images) < 32
    errors = capfd.readouterr().err
    assert errors.count("\n") == 1
    assert errors.count(".png") == 3
    assert "more" in errors


def test_a_class_of_which_nothing_decodes(tmp_path, capfd):
    fill(tmp_path, examples=3)
    for index in range(3):
        damaged(tmp_path / "dog" / f"{index}.png", "zeros")
    message = load_error(tmp_path)
    assert "no train picture of the class dog can be decoded" in message
    assert "dog" in message
    assert capfd.readouterr().err == ""


def test_bombs_are_refused(tmp_path, monkeypatch, capfd):
    for split in ("train", "test"):
        fill(tmp_path / split)
    for name, (height, width) in (("cat", (11, 10)), ("dog", (30, 30))):  # over once, over twice
        save(tmp_path / "train" / name / "0.png", noise(height, width))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert len(read("train", tmp_path).images) == 6
    assert capfd.readouterr().err.count("(more than 100 pixels)") == 2


def test_only_three_formats_are_ever_opened(tmp_path, capfd):
    fill(tmp_path / "train")
    fill(tmp_path / "test")
    Image.fromarray(noise()).save(tmp_path / "train" / "cat" / "1.png", "TIFF")
    Image.fromarray(noise()).save(tmp_path / "train" / "cat" / "2.png", "WEBP")
    assert len(read("train", tmp_path).images) == 7
    assert "cat/1.png (not a PNG, JPEG or WebP file)" in capfd.readouterr().err


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([".png", ".jpg", ".webp"]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=5),
    st.floats(0, 1),
)
def test_damage_of_any_kind_is_an_undecodable_picture(tmp_path_factory, suffix, changes, length):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x112] = 6
    Image.fromarray(noise(16, 12)).save(buffer, {".jpg": "JPEG"}.get(suffix, suffix[1:]), exif=exif)
    content = bytearray(buffer.getvalue())
    for place, value in changes:
        content[place % len(content)] = value
    if length < 0.3:
        content = content[: int(len(content) * length / 0.3)]
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    path.write_bytes(content)
    try:
        pixels = pictures._decode(path, "RGB", 8)
    except pictures._Undecodable as error:
        assert str(error)
        assert str(error).isprintable()
    else:
        assert pixels.shape == (8, 8, 3)


def test_what_is_no_file(tmp_path, capfd):
    fill(tmp_path / "train")
    fill(tmp_path / "test")
    os.mkfifo(tmp_path / "train" / "cat" / "pipe.png")
    (tmp_path / "train" / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert len(read("train", tmp_path).images) == 8
    errors = capfd.readouterr().err
    assert "gone.png (not a file" in errors
    assert "pipe.png (not a file" in errors


# Links


def test_links_to_files_are_followed_and_links_to_folders_refused(tmp_path):
    fill(tmp_path / "elsewhere", height=2, width=2)
    folder = fill(tmp_path / "all", height=2, width=2)
    (folder / "cat" / "4.png").symlink_to(tmp_path / "elsewhere" / "dog" / "3.png")
    assert sum(len(loaded.images) for loaded in both(folder)) == 9
    (tmp_path / "link").symlink_to(folder)
    assert sum(len(loaded.images) for loaded in both(tmp_path / "link")) == 9
    (folder / "bird").symlink_to(tmp_path / "elsewhere" / "dog")
    assert "bird is a link to a folder" in load_error(folder)
    (folder / "bird").unlink()
    (folder / "cat" / "more").symlink_to(folder)
    assert "more is a link to a folder" in load_error(folder)


def test_a_link_beside_train_and_test_is_not_read_one_of_them_refused(tmp_path, capsys):
    for split in ("train", "test"):
        fill(tmp_path / "all" / split, height=2, width=2)
    (tmp_path / "all" / "old").symlink_to(tmp_path / "all" / "train")
    assert len(read("train", tmp_path / "all").images) == 8
    assert "not read: old in" in capsys.readouterr().err
    (tmp_path / "all" / "test").rename(tmp_path / "elsewhere")
    (tmp_path / "all" / "test").symlink_to(tmp_path / "elsewhere")
    assert "test is a link to a folder" in load_error(tmp_path / "all")


# Wrong folders


def test_wrong_folders(tmp_path):
    assert "data_dir must name" in load_error(None)
    assert "does not exist" in load_error(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "no subfolders" in load_error(tmp_path / "empty")
    save(tmp_path / "flat" / "0.png", noise())
    assert "no subfolders" in load_error(tmp_path / "flat")
    assert "is a file" in load_error(tmp_path / "flat" / "0.png")
    assert "only one class, cat" in load_error(fill(tmp_path / "one", ("cat",)))


def test_wrong_classes(tmp_path):
    fill(tmp_path)
    (tmp_path / "bird").mkdir()
    (tmp_path / "bird" / "0.heic").write_bytes(b"x")
    assert "bird has no picture (.png, .jpg" in load_error(tmp_path)
    save(tmp_path / "bird" / "0.png", noise())
    assert "bird has one picture: two are needed" in load_error(tmp_path)
    save(tmp_path / "bird" / "young" / "0.png", noise())
    assert "bird holds a folder, young" in load_error(tmp_path)


def test_wrong_splits(tmp_path):
    assert "no split 'validation'" in load_error(fill(tmp_path / "all"), "validation")
    fill(tmp_path / "half" / "train")
    message = load_error(tmp_path / "half")
    assert "has train but no test" in message
    assert len(both(tmp_path / "half" / "train")) == 2  # as the message says
    fill(tmp_path / "half" / "test", ("dog", "fish"))
    assert "test lacks the class cat" in load_error(tmp_path / "half")
    fill(tmp_path / "half" / "test", ("cat",))
    assert "train lacks the class fish" in load_error(tmp_path / "half")
    for split in ("train", "test"):
        save(tmp_path / "flat" / split / "0.png", noise())
    assert "train has no class" in load_error(tmp_path / "flat")


def test_names_that_do_not_fit_a_line(tmp_path, capfd):
    fill(tmp_path, ("cat", "a\nb"))
    assert r"'a\nb'" in load_error(tmp_path)
    os.rename(tmp_path / "a\nb", os.fsencode(tmp_path) + b"/\xff")
    assert r"\udcff" in load_error(tmp_path)
    os.rename(os.fsencode(tmp_path) + b"/\xff", tmp_path / "dog")
    os.rename(tmp_path / "dog" / "1.png", os.fsencode(tmp_path) + b"/dog/a\n\xff.png")
    train, test = both(tmp_path)
    assert len(train.images) + len(test.images) == 8
    (tmp_path / "cat" / "x\ny.png").write_bytes(b"x")
    both(tmp_path)
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [{"image_size": -1}, {"test_fraction": 0}, {"test_fraction": 1.0}, {"test_fraction": np.nan}],
)
def test_wrong_options(tmp_path, options):
    assert next(iter(options)) in load_error(fill(tmp_path), **options)


def refuse(monkeypatch, name, refused):
    """Makes os.NAME refuse one path, as permissions do not for root."""
    original = getattr(os, name)

    def call(path, *arguments, **options):
        if Path(path) == refused:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("below", ["", "train", "train/cat", "test/dog"])
def test_folders_without_permission(tmp_path, monkeypatch, below):
    fill(tmp_path / "train")
    fill(tmp_path / "test")
    with monkeypatch.context() as patch:
        refuse(patch, "scandir", tmp_path / below)
        with pytest.raises(ValueError, match=f"{tmp_path / below} cannot be read: change its perm"):
            read("train", tmp_path)


def test_files_without_permission_and_broken_disks_stop_the_run(tmp_path, monkeypatch):
    """They may be whole tomorrow: skipped, they would make another data set of the same folder."""
    fill(tmp_path)
    original = Image.open
    for number, words in ((13, "Permission denied"), (5, "Input/output error")):

        def refuse(path, *, number=number, words=words, **options):
            if Path(path).name == "3.png":
                raise OSError(number, words, str(path))
            return original(path, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", refuse)
            assert f"cat/3.png cannot be read ({words})" in load_error(tmp_path, split="train")


# From the command line


def test_from_the_configuration_to_the_trainer(tmp_path, capfd):
    fill(tmp_path, ("cat", "dog", "fish"), examples=30, height=20, width=24)
    before = state(tmp_path)
    config = dataclasses.replace(
        PRESETS["quick"],
        data=Data(name="folder", image_size=8, test_fraction=0.3, split_seed=2, held_out=6),
        batch_size=8,
    )
    train_set, test_set = run_inputs.load_data(config, str(tmp_path))
    assert train_set.images.shape == (63, 8, 8, 3)
    assert test_set.images.shape == (27, 8, 8, 3)
    assert train_set.class_names == ("cat", "dog", "fish")
    chosen, held = run_inputs.choose(train_set, test_set, config, seed=0)
    np.testing.assert_array_equal(np.bincount(chosen.labels), (19, 19, 19))
    np.testing.assert_array_equal(np.bincount(held.labels), (2, 2, 2))
    again, _ = run_inputs.load_data(config, str(tmp_path))
    np.testing.assert_array_equal(again.images, train_set.images)
    assert state(tmp_path) == before
    assert capfd.readouterr() == ("", "")


def test_errors_name_the_flag(tmp_path):
    config = dataclasses.replace(PRESETS["quick"], data=Data(name="folder"))
    with pytest.raises(cli.UsageError, match=r"^--config\.data\.name=folder: .*no subfolders"):
        run_inputs.load_data(config, str(tmp_path))
    fill(tmp_path / "train", examples=32)
    fill(tmp_path / "test", height=5)
    with pytest.raises(cli.UsageError, match=r"test images \(5, 4, 3\): set --config.data.image_"):
        run_inputs.load_data(config, str(tmp_path))
