"""Labelled images by tfds name, as numpy arrays: builder -> array_record -> data source -> arrays.

No TensorFlow: prepared data are read by `tfds.data_source`; `cifar10` and `digits` prepare
themselves, every other name must have been prepared as array_record. `folder` is a user's own
pictures, read by `maxent_aug.pictures`.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import io
import math
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from maxent_aug import pictures, stored
from maxent_aug.spatial import affine_matrix, warp_affine

_CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
_CIFAR10_RECORD = 1 + 3 * 32 * 32  # the label, then the red, the green and the blue plane
_OWN_VERSIONS = {"cifar10": "3.0.2", "digits": "1.0.0"}  # what can be prepared here
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
            prepared = _prepare(dataset_name.name, folder)
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

    The part is in proportion, but has an image or more of each class that has two or more.
    examples: in [number of classes, N - 1]; seed: >= 0. Raises ValueError.
    """
    if examples >= len(dataset.images):
        raise ValueError(f"examples must be less than the {len(dataset.images)} images")
    _check_part(dataset, examples, seed)
    several = np.bincount(dataset.labels) > 1
    held = stratified(dataset.labels, examples, seed, least=several)
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
    labels: np.ndarray, examples: int, seed: int, least: int | np.ndarray = 0
) -> np.ndarray:
    """Sorted indices of a stratified choice; shares are rounded by largest remainder.

    Of equal remainders that of the class goes first whose first image is drawn first.
    labels: [N] integers; examples: in [0, N]; seed: >= 0; least: of a class, or [m] of each, if it
    has so many, at the cost of the largest; the sum of these is at most `examples`.
    """
    counts = np.bincount(labels)
    # Raw PCG64 output, unlike Generator's methods, is the same in every release of NumPy.
    order = np.argsort(np.random.PCG64(seed).random_raw(len(labels)), kind="stable")
    classes, first = np.unique(labels[order], return_index=True)
    shares, remainders = np.divmod(counts * examples, len(labels))
    ranked = classes[np.lexsort((first, -remainders[classes]))]
    shares[ranked[: examples - shares.sum()]] += 1
    wanted = np.maximum(shares, np.minimum(least, counts))
    for _ in range(wanted.sum() - examples):
        wanted[np.argmax(wanted)] -= 1
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

    infos = [*folder.glob("*/*/dataset_info.json"), *folder.glob("*/*/*/dataset_info.json")]
    prepared = sorted({path.relative_to(folder).parts[0] for path in infos})
    there = f"prepared there: {', '.join(prepared)}" if prepared else "nothing is"
    if plain_name in _OWN_VERSIONS:
        own = _OWN_VERSIONS[plain_name]
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


# Preparing


def _prepare(name: str, folder: Path) -> Path:
    """Prepares a data set in `folder`, all of it or nothing, and returns its folder.

    A process that is killed leaves an `incomplete.*` folder, which the next one removes; of two
    processes at once the second waits and finds the work done.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    if not os.access(created[-1].parent if created else folder, os.W_OK):
        raise ValueError(
            f"{name} is not prepared in {folder}, which cannot be written: name another data_dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder) as locked:
            target = folder / name / _OWN_VERSIONS[name]
            if (target / "dataset_info.json").exists():  # another process was faster
                return target
            if target.exists():
                raise ValueError(f"{target} has no dataset_info.json: delete that folder")
            for stale in folder.glob("incomplete.maxent_aug.*") if locked else ():
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix="incomplete.maxent_aug.", dir=folder) as temp:
                _prepare_in(Path(temp), name, folder)
            return target
    except FileNotFoundError:  # no network: it says so
        raise
    except OSError as error:
        why = stored.one_line(error)
        raise OSError(f"{name} cannot be prepared in {folder} ({why})") from error
    finally:
        with contextlib.suppress(OSError):  # not empty, so in use
            for path in created:
                path.rmdir()


def _prepare_in(staging: Path, name: str, folder: Path) -> None:
    """Prepares in `staging`, then moves the result into `folder` by one rename."""
    builder = _cifar10_builder(staging, folder) if name == "cifar10" else _digits_builder(staging)
    # tfds prints to stdout, and draws progress bars on stderr.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        builder.download_and_prepare(file_format="array_record")
    target = folder / name / _OWN_VERSIONS[name]
    target.parent.mkdir(exist_ok=True)
    try:
        Path(builder.data_dir).rename(target)
    except OSError:  # where there is no lock, another process may have come first
        if not (target / "dataset_info.json").exists():
            raise


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Holds the folder's advisory lock; False where the file system has none."""
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            print(f"waiting for another process that prepares data in {folder}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
            locked = True
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(handle)  # and the lock with it


def _digits_builder(data_dir: Path) -> Any:
    """scikit-learn's handwritten digits, 8x8 grey: 1,437 for training, 360 for testing."""
    import tensorflow_datasets as tfds
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    in_test = np.zeros(len(images), bool)
    in_test[stratified(bunch.target, 360, seed=0)] = True

    class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        code_path = None  # tfds 4.9.10 looks for it with a package that it does not require
        VERSION = tfds.core.Version(_OWN_VERSIONS["digits"])

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(
                builder=self,
                description="scikit-learn's handwritten digits, 0..16 scaled to 0..255.",
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(8, 8, 1)),
                        "label": tfds.features.ClassLabel(num_classes=10),
                    }
                ),
                supervised_keys=("image", "label"),
                homepage="https://archive.ics.uci.edu/dataset/80",
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {
                "train": self._generate_examples(np.flatnonzero(~in_test)),
                "test": self._generate_examples(np.flatnonzero(in_test)),
            }

        def _generate_examples(
            self, indices: np.ndarray
        ) -> Generator[tuple[int, dict[str, Any]], Any, None]:
            for index in indices.tolist():
                yield index, {"image": _picture(images[index]), "label": int(bunch.target[index])}

    return Digits(data_dir=data_dir)


def _cifar10_builder(data_dir: Path, folder: Path) -> Any:
    """tfds' own builder, except that neither unpacking nor PNG encoding needs TensorFlow."""
    from tensorflow_datasets.image_classification import cifar

    archive = _cifar10_archive(data_dir, folder)

    class Cifar10(cifar.Cifar10, skip_registration=True):
        code_path = None

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            info = self._cifar_info
            contents = _read_members(
                archive, [*info.train_files, *info.test_files, "batches.meta.txt"]
            )
            features: Any = self.info.features
            features["label"].names = contents["batches.meta.txt"].decode().split()
            return {
                "train": self._generate_examples("train_", [contents[f] for f in info.train_files]),
                "test": self._generate_examples("test_", [contents[f] for f in info.test_files]),
            }

        def _generate_examples(
            self, split_prefix: str, filepaths: list[bytes]
        ) -> Generator[tuple[int, dict[str, Any]], Any, None]:
            records = np.frombuffer(b"".join(filepaths), np.uint8).reshape(-1, _CIFAR10_RECORD)
            for index, record in enumerate(records):
                image = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
                yield (
                    index,
                    {
                        "id": f"{split_prefix}{index:05d}",
                        "image": _picture(image),
                        "label": int(record[0]),
                    },
                )

    return Cifar10(data_dir=data_dir)


def _picture(image: np.ndarray) -> Any:
    """A PIL image of uint8 [H, W] or [H, W, 3]: tfds encodes arrays with TensorFlow only."""
    from PIL import Image

    return Image.fromarray(np.ascontiguousarray(image))


def _cifar10_archive(staging: Path, folder: Path) -> Path:
    """The official archive, verified: one fetched by hand, or downloaded into `staging`."""
    import requests

    by_hand = folder / "downloads" / "manual" / Path(_CIFAR10_URL).name  # tfds' place for it
    if by_hand.exists():
        with by_hand.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != _CIFAR10_SHA256:
                raise ValueError(f"{by_hand} has the wrong checksum: delete it, and fetch it again")
        print(f"preparing CIFAR-10 in {folder} from {by_hand}", file=sys.stderr)
        return by_hand
    print(f"downloading CIFAR-10 (170 MB) and preparing it in {folder}", file=sys.stderr)
    archive, digest = staging / by_hand.name, hashlib.sha256()
    try:
        with (
            requests.get(_CIFAR10_URL, stream=True, timeout=30) as reply,
            archive.open("wb") as file,
        ):
            reply.raise_for_status()
            for block in reply.iter_content(1 << 20):
                digest.update(block)
                file.write(block)
    except requests.RequestException as error:
        raise FileNotFoundError(
            f"cifar10 is not prepared in {folder}, and {_CIFAR10_URL} cannot be fetched "
            f"({type(error).__name__}): connect, or put that file at {by_hand}"
        ) from error
    if digest.hexdigest() != _CIFAR10_SHA256:
        raise ValueError(f"{_CIFAR10_URL} was fetched with the wrong checksum: try again")
    return archive


def _read_members(archive: Path, names: list[str]) -> dict[str, bytes]:
    """Files of CIFAR-10's archive, in memory: nothing is unpacked, so no path leaves its folder."""
    contents = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            if folder == "cifar-10-batches-bin" and name in names and member.isfile():
                file = tar.extractfile(member)
                contents[name] = file.read() if file else b""
    missing = [name for name in names if name not in contents]
    if missing:
        raise ValueError(f"{archive.name} lacks {', '.join(missing)}")
    return contents
