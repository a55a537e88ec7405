"""Labelled images by tfds name, as numpy arrays: builder -> array_record -> data source -> arrays.

No TensorFlow: prepared data are read by `tfds.data_source`; `cifar10` and `digits` prepare
themselves, every other name must have been prepared as array_record. `folder` is a user's own
pictures, read by `maxent_aug.pictures`.
"""

import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from maxent_aug import pictures, stored
from maxent_aug.spatial import affine_matrix, warp_affine

_PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images with their labels, checked when built.

    images: uint8 [N, H, W, C], N >= 1, an array or `stored.StoredImages`; labels: int32 [N] in
    [0, len(class_names)). Raises ValueError otherwise.
    """

    images: Any
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        _check_images(self.images)
        if self.labels.dtype != np.int32 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int32 [{len(self.images)}], one for each image, "
                f"not {self.labels.dtype} {list(self.labels.shape)}"
            )
        outside = (self.labels < 0) | (self.labels >= len(self.class_names))
        if outside.any():
            index = int(outside.argmax())
            raise ValueError(
                f"labels must lie in [0, {len(self.class_names)}), but that of image {index} is "
                f"{self.labels[index]}, and {outside.sum()} of {len(self.labels)} lie outside"
            )


def load(
    name: str,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_size: int = 0,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    most_bytes: int | None = None,
) -> Dataset:
    """Reads one split of a tfds data set whose examples have `image` and `label`, or of a folder.

    name: as in tfds: `name`, `name/config`, `name:version`, `name/config:version`; the newest
    prepared version that fits is read. split: as in tfds: `train`, `test`, `train[:45000]`, ...
    data_dir: an existing folder of prepared data; None is tfds' default (the environment's
    TFDS_DATA_DIR, or ~/tensorflow_datasets). `cifar10` (downloaded) and `digits` (from
    scikit-learn) are prepared there at first use; bad input changes nothing on disk.
    image_size: pixels a side of the middle square that each image is scaled to; 0 leaves them as
    they are, all of one size.
    The name `folder` stands for pictures in data_dir, one subfolder a class; test_fraction and
    split_seed divide them where there is no train and test: see `maxent_aug.pictures.read`. They
    come in a random order, always the same: the first are of many classes.
    most_bytes: images of a tfds data set that would take more stay on disk, `StoredImages`; None
    reads all.
    Raises ValueError or FileNotFoundError, or another OSError (full disk) while preparing: one
    line that names the thing and the remedy.
    """
    if image_size < 0:
        raise ValueError(f"image_size must be 0 or more, not {image_size}")
    if name == "folder":
        return _mixed(*pictures.read(data_dir, split, image_size, test_fraction, split_seed))
    from tensorflow_datasets.core import naming

    from maxent_aug.preparation import prepare  # which needs `stratified`

    folder = _resolve_data_dir(data_dir)
    if not naming.is_valid_dataset_name(name):
        raise _unknown_name(name)
    dataset_name, options = naming.parse_builder_name_kwargs(name)
    if dataset_name.namespace or set(options) - {"config", "version"}:
        raise ValueError(f"{name!r}: neither a namespace nor builder arguments are supported")
    config, version = options.get("config"), options.get("version")
    try:
        prepared = _find_prepared(folder, dataset_name.name, config, version)
        if prepared is None:
            _check_preparable(name, dataset_name.name, config, version, folder)
            prepared = prepare(dataset_name.name, folder)
    except PermissionError as error:
        raise ValueError(f"data_dir {folder}: {error.filename} cannot be read") from error
    return _read(name, prepared, split, image_size, most_bytes)


def _mixed(images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> Dataset:
    """In a random order, in place: there may be no memory for a copy."""
    for array in (images, labels[:, None]):  # both by rows, by which the two orders are one
        np.random.default_rng(0).shuffle(array)
    return Dataset(images, labels, class_names)


def base_name(name: str) -> str:
    """Of a data set, without its configuration and version: cifar10 of CIFAR10:3.0.2."""
    return re.split("[/:]", name)[0].lower()


def subset(dataset: Dataset, examples: int, seed: int) -> Dataset:
    """A stratified random part: an image of each class or more, else in proportion.

    examples: in [number of classes, N]; seed: >= 0, fixes the choice on every platform. The order
    is that of `dataset`. Raises ValueError.
    """
    _check_part(dataset, examples, seed)
    return _taken(dataset, stratified(dataset.labels, examples, seed, least=1))


def hold_out(dataset: Dataset, examples: int, seed: int) -> tuple[Dataset, Dataset]:
    """(the rest, a stratified random part), each in the order of `dataset`.

    The part is in proportion, but has an image or more of each class that has two or more, and, as
    long as there are others, leaves one of each.
    examples: in [number of classes, N - 1]; seed: >= 0. Raises ValueError.
    """
    if examples >= len(dataset.images):
        raise ValueError(f"examples must be less than the {len(dataset.images)} images")
    _check_part(dataset, examples, seed)
    held = stratified(dataset.labels, examples, seed, least=1, spared=1)
    rest = np.setdiff1d(np.arange(len(dataset.images)), held)
    return _taken(dataset, rest), _taken(dataset, held)


def _check_part(dataset: Dataset, examples: int, seed: int) -> None:
    classes, available = len(dataset.class_names), len(dataset.images)
    if not classes <= examples <= available:
        raise ValueError(
            f"examples must lie between the number of classes, {classes}, and the number of "
            f"images, {available}, not {examples}"
        )
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, not {seed}")


def _taken(dataset: Dataset, indices: np.ndarray) -> Dataset:
    return Dataset(dataset.images[indices], dataset.labels[indices], dataset.class_names)


def rotate(dataset: Dataset, degrees: float) -> Dataset:
    """Rotates each image by an angle of its own, once and for all, mirrored at its edges.

    degrees: the most to either side, in [0, 180]; angles are uniform, and fixed by an image's place
    in the data set. Bicubic, rounded to uint8. Raises ValueError, for `stored.StoredImages`, too.
    """
    if not 0 <= degrees <= 180:
        raise ValueError(f"degrees must lie in [0, 180], not {degrees}")
    if isinstance(dataset.images, stored.StoredImages):
        raise ValueError("images that stay on disk cannot be rotated")
    count = len(dataset.images)
    shares = np.random.PCG64(count).random_raw(count) / 2.0**63 - 1  # raw, as in `stratified`
    angles = np.radians(degrees * shares).astype(np.float32)
    parts = [slice(start, start + 1000) for start in range(0, count, 1000)]
    rotated = np.concatenate([_rotate(dataset.images[part], angles[part]) for part in parts])
    return Dataset(rotated, dataset.labels, dataset.class_names)


@jax.jit
def _rotate(images: Array, angles: Array) -> Array:
    theta = affine_matrix(rotation=angles, size=images.shape[1:3])
    rotated = warp_affine(images, theta, mode="bicubic", padding_mode="reflection")
    return jnp.clip(jnp.round(rotated), 0, 255).astype(jnp.uint8)


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of images / 255 per channel: two float32 [C].

    images: uint8 [N, H, W, C], an array or `stored.StoredImages`; of more than 100,000, every
    second, third, ... is taken. Exact (from counts of grey levels) and without a float copy; the
    deviation is at least one grey level, 1/255, so that a constant channel can be divided by it.
    Raises ValueError.
    """
    _check_images(images)
    levels, channels = np.arange(256) / 255.0, images.shape[-1]
    counts = np.zeros((channels, 256), np.int64)
    for pixels in _chunks(images[:: -(-len(images) // 100_000)]):
        for channel in range(channels):
            counts[channel] += np.bincount(pixels[..., channel].ravel(), minlength=256)
    means = [each @ levels / each.sum() for each in counts]
    deviations = [
        np.sqrt(each @ (levels - mean) ** 2 / each.sum())
        for each, mean in zip(counts, means, strict=True)
    ]
    return np.array(means, np.float32), np.maximum(deviations, 1 / 255).astype(np.float32)


def _chunks(images: Any, size: int = 256) -> Iterator[np.ndarray]:
    """The images, some at a time."""
    if isinstance(images, stored.StoredImages):
        every = np.arange(len(images))
        yield from stored.batches(images, np.split(every, range(size, len(images), size)))
    else:
        yield from (images[start : start + size] for start in range(0, len(images), size))


def _check_images(images: Any) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"images must be uint8 [N, H, W, C] with no dimension of 0, "
            f"not {images.dtype} {list(images.shape)}"
        )


def stratified(
    labels: np.ndarray, examples: int, seed: int, *, least: int = 0, spared: int = 0
) -> np.ndarray:
    """Sorted indices of a stratified choice; shares are rounded by largest remainder.

    Of equal remainders that of the class goes first whose first image is drawn first.
    labels: [N] integers; examples: in [0, N]; seed: >= 0; least: of each class, if it has so many
    that are not spared, at the cost of the largest; the sum of these is at most `examples`; spared:
    of each class left, at the cost of those with the most left, as long as there are others.
    """
    counts = np.bincount(labels)
    # Raw PCG64 output, unlike Generator's methods, is the same in every release of NumPy.
    order = np.argsort(np.random.PCG64(seed).random_raw(len(labels)), kind="stable")
    classes, first = np.unique(labels[order], return_index=True)
    shares, remainders = np.divmod(counts * examples, len(labels))
    ranked = classes[np.lexsort((first, -remainders[classes]))]
    shares[ranked[: examples - shares.sum()]] += 1
    most = np.maximum(counts - spared, 0)
    wanted = np.clip(shares, np.minimum(least, most), most)
    for _ in range(wanted.sum() - examples):
        wanted[np.argmax(wanted)] -= 1
    for _ in range(examples - wanted.sum()):
        left = most - wanted if (wanted < most).any() else counts - wanted
        wanted[np.argmax(left)] += 1
    chosen = [order[labels[order] == label][:share] for label, share in enumerate(wanted)]
    return np.sort(np.concatenate(chosen))


# Finding


def _resolve_data_dir(data_dir: str | os.PathLike[str] | None) -> Path:
    if not data_dir:
        default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        folder = Path(os.path.expanduser(default))
        if not folder.exists():
            return folder  # made when something is prepared in it
    else:
        folder = Path(os.path.expanduser(data_dir))
        if not folder.exists():
            raise FileNotFoundError(
                f"data_dir {folder} does not exist: create it, or name the folder that holds the "
                "prepared data"
            )
    if not folder.is_dir():
        raise ValueError(f"data_dir {folder} is a file: name the folder that holds prepared data")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise ValueError(f"data_dir {folder} cannot be read: change its permissions")
    return folder


def _find_prepared(folder: Path, name: str, config: str | None, version: str | None) -> Path | None:
    """The folder of the newest prepared version that fits; None if there is none."""
    import tensorflow_datasets as tfds
    from etils import epath
    from tensorflow_datasets.core import dataset_builder

    home = folder / name
    if config is None and not list(home.glob("*.*.*/dataset_info.json")):
        configs = sorted({path.parent.parent.name for path in home.glob("*/*/dataset_info.json")})
        config = dataset_builder.load_default_config_name(epath.Path(home)) if configs else None
        if configs and config not in configs:
            raise ValueError(
                f"{name} has several configurations: name one as {name}/{configs[0]} "
                f"(prepared in {folder}: {', '.join(configs)})"
            )
    found = [path.parent for path in (home / (config or "")).glob("*.*.*/dataset_info.json")]
    fits = {
        tfds.core.Version(path.name): path
        for path in found
        if tfds.core.Version.is_valid(path.name)
        and (version is None or tfds.core.Version(path.name).match(version))
    }
    return fits[max(fits)] if fits else None


def _check_preparable(
    name: str, plain_name: str, config: str | None, version: str | None, folder: Path
) -> None:
    """Raises for all that is not prepared and cannot be prepared here."""
    import tensorflow_datasets as tfds

    from maxent_aug.preparation import VERSIONS

    infos = [*folder.glob("*/*/dataset_info.json"), *folder.glob("*/*/*/dataset_info.json")]
    prepared = sorted({path.relative_to(folder).parts[0] for path in infos})
    there = f"prepared there: {', '.join(prepared)}" if prepared else "nothing is"
    if plain_name in VERSIONS:
        own = VERSIONS[plain_name]
        if config is None and (version is None or tfds.core.Version(own).match(version)):
            return
        raise FileNotFoundError(
            f"{name} is not prepared in {folder} ({there}), and only {plain_name}:{own} can be "
            f"prepared here: ask for {plain_name}"
        )
    if plain_name not in (*tfds.list_builders(with_community_datasets=False), *prepared):
        raise _unknown_name(name)
    raise FileNotFoundError(
        f"{name} is not prepared in {folder} ({there}): where TensorFlow is installed, run "
        f"tfds build {name} --data_dir={folder} --file_format=array_record"
    )


def _unknown_name(name: str) -> ValueError:
    import tensorflow_datasets as tfds

    known = [*tfds.list_builders(with_community_datasets=False), "digits", "folder"]
    near = difflib.get_close_matches(name.lower(), known, cutoff=0.5)
    hint = f"near matches are {', '.join(near)}" if near else "see tfds.list_builders()"
    return ValueError(f"no data set is called {name!r}: {hint}")


# Reading


def _read(name: str, folder: Path, split: str, image_size: int, most_bytes: int | None) -> Dataset:
    import tensorflow_datasets as tfds
    from google.protobuf import json_format, message

    damaged = f"{name} in {folder} is damaged: delete that folder and prepare it again"
    try:
        builder: Any = tfds.builder_from_directory(folder)
        info = builder.info
    except (ValueError, KeyError, OSError, json_format.ParseError) as error:
        raise ValueError(f"{damaged} ({stored.one_line(error)})") from error
    _check_features(name, info.features)
    _check_format(name, folder, info)
    _check_split(name, split, info)
    try:
        source = stored.open_source(folder, split)
        kept = _keep_stored(folder, split, source, info.features, image_size, most_bytes)
        return kept or _decode(source, info.features, image_size)
    except (RuntimeError, IndexError, message.DecodeError) as error:  # what array_record raises
        raise ValueError(f"{damaged} ({stored.one_line(error)})") from error
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{name}, split {split!r}: {error}") from error


def _check_format(name: str, folder: Path, info: Any) -> None:
    formats = sorted(form.value for form in info.available_file_formats())
    if "array_record" not in formats:
        raise ValueError(
            f"{name} in {folder} is stored as {' and '.join(formats)}, which cannot be read "
            "without TensorFlow: where it is installed, run tfds convert_format "
            f"--dataset_version_dir={folder} --out_file_format=array_record"
        )


def _check_split(name: str, split: str, info: Any) -> None:
    try:
        examples = info.splits[split].num_examples
    except (ValueError, KeyError, AssertionError) as error:
        raise ValueError(
            f"{name} has no split {split!r}: allowed are {', '.join(sorted(info.splits))} and "
            "their parts, as train[:90%]"
        ) from error
    if not examples:
        raise ValueError(f"split {split!r} of {name} is empty")


def _check_features(name: str, features: Any) -> None:
    import tensorflow_datasets as tfds

    missing = [key for key in ("image", "label") if key not in features]
    if missing:
        raise ValueError(
            f"{name} has no {' and no '.join(missing)}, only {', '.join(features)}: choose a data "
            "set whose examples have an image and a label"
        )
    image, label = features["image"], features["label"]
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise ValueError(f"{name}: image must be an 8-bit tfds Image, not {image!r}")
    if not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(f"{name}: label must be a tfds ClassLabel, not {label!r}")


def _decode(source: Any, features: Any, image_size: int) -> Dataset:
    """All records of a source of raw bytes, decoded in one thread: two were slower, measured."""
    mode = _PILLOW_MODES[features["image"].shape[-1] or 3]
    labels = np.empty(len(source), np.int32)
    images = pictures.allocate(len(source), (image_size, image_size, len(mode)))
    for index, record in enumerate(_records(source)):
        labels[index], encoded = stored.parse(record)
        size = images.shape[2:0:-1] if images.size and not image_size else None
        pixels = stored.decode(encoded, mode, size, image_size, index)
        if not images.size:
            images = pictures.allocate(len(source), pixels.shape)
        images[index] = pixels
    return Dataset(images, labels, tuple(features["label"].names))


def _keep_stored(
    folder: Path, split: str, source: Any, features: Any, image_size: int, most_bytes: int | None
) -> Dataset | None:
    """The data set with its images left on disk; None if they take no more than most_bytes."""
    if most_bytes is None:
        return None
    mode = _PILLOW_MODES[features["image"].shape[-1] or 3]
    shape = image_size, image_size, len(mode)
    if not image_size:
        _, encoded = stored.parse(source[0])
        shape = stored.decode(encoded, mode, None, 0, 0).shape
    if len(source) * math.prod(shape) <= most_bytes:
        return None
    labels = [stored.parse(record)[0] for record in _records(source)]
    indices = np.arange(len(source))
    images = stored.StoredImages(folder, split, mode, image_size, shape, indices)
    return Dataset(images, np.array(labels, np.int32), tuple(features["label"].names))


def _records(source: Any) -> Iterator[bytes]:
    for start in range(0, len(source), 1000):
        yield from source.__getitems__(list(range(start, min(start + 1000, len(source)))))
