"""A user's own pictures, one subfolder a class, as numpy arrays: PNG, JPEG and WebP, by Pillow.

The layout is that of `tfds.ImageFolder`, PATH/train/CLASS/*.png and PATH/test/CLASS/*.png; from
PATH/CLASS/*.png a stratified part is put aside for testing. Nothing on disk is changed.
"""

import contextlib
import hashlib
import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_FORMATS = ("PNG", "JPEG", "WEBP")  # by content, whatever the suffix: no other decoder is reached
_SPLITS = ("train", "test")
_NAMED = 3  # how many skipped files a warning names

_Classes = dict[str, list[Path]]  # pictures of each class, both sorted


class _Undecodable(Exception):
    """A file is no picture that can be read; the message says why."""


def read(
    data_dir: str | os.PathLike[str] | None,
    split: str,
    image_size: int = 0,
    test_fraction: float = 0.2,
    split_seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images uint8 [N, H, W, C], labels int32 [N] and the sorted class names of one split.

    data_dir: holds `train` and `test`, each with one folder a class, or the class folders
    themselves, of whose pictures the share test_fraction, in (0, 1), is the split `test`, at least
    one of each class, chosen by split_seed and the files' names. Pictures lie directly in a class's
    folder and end in .png, .jpg, .jpeg or .webp; hidden files and other suffixes are ignored,
    links to files followed, links to folders refused.
    image_size: see `crop_square`; 0 leaves the pictures as they are, and they must have one size.
    C is 1 if all pictures of both splits are stored as grey, be it bilevel, by palette, with alpha
    (of 8 bits: Pillow reads 16 as colour) or in 16 bits; else 3. EXIF orientation is applied,
    transparency laid on white, of 16 bits the upper 8 are kept. The order is that of the sorted
    class names, then file names.

    A file that does not decode, or has more pixels than Pillow's limit, is skipped; one line on
    stderr counts them, another names folders beside `train` and `test`. Raises ValueError or
    OSError: one line that names the thing and the remedy.
    """
    if split not in _SPLITS:
        raise ValueError(f"a folder has no split {split!r}: allowed are train and test")
    if image_size < 0 or not 0 < test_fraction < 1:
        raise ValueError(
            f"image_size must be 0 or more and test_fraction between 0 and 1, "
            f"not {image_size} and {test_fraction}"
        )
    try:
        folder = _check_folder(data_dir)
        splits, unread = _list_splits(folder, test_fraction, split_seed)
    except PermissionError as error:
        raise ValueError(
            f"{_shown(error.filename)} cannot be read: change its permissions"
        ) from error
    if unread and split == "train":  # once for both
        names = ", ".join(map(_shown, unread))
        print(f"not read: {names} in {_shown(folder)}, beside train and test", file=sys.stderr)
    classes = splits[split]
    everything = (path for s in splits.values() for paths in s.values() for path in paths)
    mode = "RGB" if any(map(_is_coloured, everything)) else "L"
    images, labels, skipped = _decode_all(classes, mode, image_size)
    decoded = set(labels)
    for label, (name, paths) in enumerate(classes.items()):
        if label not in decoded:
            why = f"{_shown(paths[0])}: {skipped[paths[0]]}"
            raise ValueError(f"no {split} picture of the class {name} can be decoded ({why})")
    if skipped:
        print(_warning(folder, split, len(labels), skipped), file=sys.stderr)
    return images, np.array(labels, np.int32), tuple(classes)


def crop_square(picture: Image.Image, image_size: int) -> Image.Image:
    """The middle square of a picture, scaled (antialiased, bicubic) to image_size pixels a side.

    Nothing is distorted; what lies outside the square is lost. 0 returns the picture unchanged.
    """
    if not image_size:
        return picture
    return ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BICUBIC)


def allocate(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [count, *shape], uninitialised. Raises ValueError for more than the memory there is."""
    needed, there = count * math.prod(shape), memory()
    if needed > there:
        raise ValueError(
            f"{count:,} images of {'x'.join(map(str, shape))} need {needed / 2**30:,.1f} GiB, and "
            f"this machine has {there / 2**30:,.1f}: choose a smaller image_size or fewer images"
        )
    return np.empty((count, *shape), np.uint8)


def memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Listing


def _check_folder(data_dir: str | os.PathLike[str] | None) -> Path:
    if not data_dir:
        raise ValueError("data_dir must name the folder of pictures: one subfolder a class")
    folder = Path(os.path.expanduser(data_dir))
    if not folder.exists():
        raise FileNotFoundError(f"data_dir {_shown(folder)} does not exist")
    if not folder.is_dir():
        raise ValueError(f"data_dir {_shown(folder)} is a file: name the folder of pictures")
    return folder


def _list_splits(
    folder: Path, test_fraction: float, split_seed: int
) -> tuple[dict[str, _Classes], list[str]]:
    """The pictures of `train` and of `test`, of the same classes, and folders that are neither."""
    top = {entry.name: entry for entry in _visible(folder) if entry.is_dir()}
    if not top:
        raise ValueError(
            f"data_dir {_shown(folder)} has no subfolders: pictures lie in one subfolder a class"
        )
    found = [name for name in _SPLITS if name in top]
    divided = [name for name in found if any(_subfolders(top[name].path))]  # else a class: a train
    if len(found) == 2 and (divided or len(top) == 2):
        folders = {name: _own_folder(top[name]) for name in _SPLITS}
        splits = _same_classes({name: _list_classes(each) for name, each in folders.items()})
        return splits, [name for name in top if name not in _SPLITS]
    if divided:
        (missing,) = set(_SPLITS) - set(found)
        raise ValueError(
            f"data_dir {_shown(folder)} has {found[0]} but no {missing}: add it, or name "
            f"{_shown(top[found[0]].path)}, a part of which is then put aside for testing"
        )
    splits = {name: {} for name in _SPLITS}
    for name, paths in _list_classes(folder).items():
        splits["train"][name], splits["test"][name] = _divide(paths, test_fraction, split_seed)
    return splits, []


def _same_classes(splits: dict[str, _Classes]) -> dict[str, _Classes]:
    for one, other in (_SPLITS, _SPLITS[::-1]):
        if lacking := sorted(set(splits[one]) - set(splits[other])):
            raise ValueError(
                f"{other} lacks the class {lacking[0]}, which {one} has: both need the same classes"
            )
    return splits


def _list_classes(folder: Path) -> _Classes:
    """The pictures of each class. Raises ValueError for less than two classes or an empty one."""
    classes = {path.name: _pictures(path) for path in _subfolders(folder)}
    if len(classes) < 2:
        there = f"only one class, {_shown(*classes)}" if classes else "no class"
        raise ValueError(f"{_shown(folder)} has {there}: two subfolders or more are needed")
    for name in classes:
        if not name.isprintable():  # nor can it be written in a result, if it is not UTF-8
            raise ValueError(f"{_shown(folder)} has a class called {name!a}: rename it")
    return classes


def _pictures(folder: Path) -> list[Path]:
    """The pictures of one class."""
    if nested := _subfolders(folder):
        raise ValueError(
            f"{_shown(folder)} holds a folder, {_shown(nested[0].name)}: the pictures of a class "
            "must lie directly in its folder (those of splits are called train and test)"
        )
    paths = [Path(entry) for entry in _visible(folder)]
    paths = [path for path in paths if path.suffix.lower() in _SUFFIXES]
    if not paths:
        raise ValueError(
            f"{_shown(folder)} has no picture ({', '.join(_SUFFIXES)}): add some, or remove the "
            "folder"
        )
    return paths


def _subfolders(folder: str | Path) -> list[Path]:
    return [_own_folder(entry) for entry in _visible(folder) if entry.is_dir()]


def _own_folder(entry: os.DirEntry[str]) -> Path:
    """Raises ValueError for a link: pictures of elsewhere shall not come in unnoticed."""
    if entry.is_symlink():
        raise ValueError(
            f"{_shown(entry.path)} is a link to a folder, which is not followed: put the folder "
            "itself there"
        )
    return Path(entry)


def _visible(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is in a folder and not hidden, in the order of the names' code points."""
    with os.scandir(folder) as entries:
        visible = [entry for entry in entries if not entry.name.startswith(".")]
    return sorted(visible, key=lambda entry: entry.name)


def _divide(
    paths: list[Path], test_fraction: float, split_seed: int
) -> tuple[list[Path], list[Path]]:
    """A class's pictures for training and for testing, at least one of each.

    Ordered by a hash of their names, so that a picture that is added later moves at most one other.
    """
    folder = paths[0].parent
    if len(paths) < 2:
        raise ValueError(
            f"{_shown(folder)} has one picture: two are needed, one for training and one for "
            "testing"
        )
    examples = min(max(round(test_fraction * len(paths)), 1), len(paths) - 1)

    def draw(path: Path) -> bytes:
        return hashlib.sha256(os.fsencode(f"{split_seed}/{folder.name}/{path.name}")).digest()

    test = set(sorted(paths, key=draw)[:examples])
    return [path for path in paths if path not in test], [path for path in paths if path in test]


# Decoding


def _decode_all(
    classes: _Classes, mode: str, image_size: int
) -> tuple[np.ndarray, list[int], dict[Path, str]]:
    """Images and labels of all that decodes, one file at a time, and the reason for the others."""
    pictures = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
    first, _ = pictures[0]
    images = allocate(len(pictures), (image_size, image_size, len(mode)))
    labels, skipped = [], {}
    for path, label in pictures:
        try:
            pixels = _decode(path, mode, image_size)
        except _Undecodable as error:
            skipped[path] = str(error)
            continue
        if not images.size:
            first, images = path, allocate(len(pictures), pixels.shape)
        if pixels.shape != images.shape[1:]:
            raise ValueError(
                f"pictures differ in size ({_shown(first)} has {_size(images[0])} pixels, "
                f"{_shown(path)} {_size(pixels)}): set image_size, as 64, to crop and scale them"
            )
        images[len(labels)] = pixels
        labels.append(label)
    return images[: len(labels)], labels, skipped


def _decode(path: Path, mode: str, image_size: int) -> np.ndarray:
    """Pixels [H, W, len(mode)]. Raises _Undecodable, or OSError if the file cannot be read."""
    with _opened(path) as picture:
        if image_size:
            # A JPEG can be decoded at half its size, or less, while that is twice what is wanted.
            picture.draft(None, (2 * image_size, 2 * image_size))
        flat = _flatten(ImageOps.exif_transpose(picture), mode)
        pixels = np.asarray(crop_square(flat, image_size))
    return pixels.reshape(*pixels.shape[:2], len(mode))


def _flatten(picture: Image.Image, mode: str) -> Image.Image:
    """A picture in 8 bits without transparency: what is transparent becomes white."""
    if picture.mode.startswith("I"):  # 16 bits; Pillow itself would cut all above 255 off
        levels = np.asarray(picture)
        clear = levels == picture.info.get("transparency", -1)
        return Image.fromarray(np.where(clear, 255, levels >> 8).astype(np.uint8)).convert(mode)
    if picture.has_transparency_data:
        coloured = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), coloured)
    return picture.convert(mode)


def _is_coloured(path: Path) -> bool:
    """Whether a picture is stored in colour, from its header; False if there is none."""
    try:
        with _opened(path) as picture:
            if picture.mode == "P":
                palette = np.reshape(picture.getpalette() or [], (-1, 3))
                return bool((palette != palette[:, :1]).any())
            return Image.getmodebase(picture.mode) != "L"
    except _Undecodable:
        return False


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file; what goes wrong with its contents in the body is raised as _Undecodable."""
    try:
        if not path.is_file():  # a pipe would never end
            raise _Undecodable("not a file, or a broken link")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as picture:
                yield picture
    except Image.UnidentifiedImageError as error:
        raise _Undecodable("not a PNG, JPEG or WebP file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _Undecodable(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's, not the decoder's
            raise OSError(f"{_shown(path)} cannot be read ({error.strerror})") from error
        raise _Undecodable(" ".join(str(error).split())[:80]) from error


# Words


def _warning(folder: Path, split: str, decoded: int, skipped: dict[Path, str]) -> str:
    reasons = [f"{_shown(path.relative_to(folder))} ({why})" for path, why in skipped.items()]
    named, more = reasons[:_NAMED], [f"{len(skipped) - _NAMED:,} more"] * (len(skipped) > _NAMED)
    return (
        f"warning: {len(skipped):,} of {len(skipped) + decoded:,} {split} pictures in "
        f"{_shown(folder)} cannot be decoded and are skipped: {', '.join([*named, *more])}"
    )


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def _shown(name: str | Path) -> str:
    """A name from disk that keeps to its line, whatever it contains."""
    return str(name) if str(name).isprintable() else ascii(str(name))
