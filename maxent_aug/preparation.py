"""What prepares itself at first use, without TensorFlow: CIFAR-10 and scikit-learn's digits."""

import contextlib
import hashlib
import io
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from maxent_aug import stored
from maxent_aug.data import stratified

_CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR10_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
_CIFAR10_RECORD = 1 + 3 * 32 * 32  # the label, then the red, the green and the blue plane
VERSIONS = {"cifar10": "3.0.2", "digits": "1.0.0"}  # of what can be prepared here


def prepare(name: str, folder: Path) -> Path:
    """Prepares a data set in `folder`, all of it or nothing, and returns its folder.

    A process that is killed leaves an `incomplete.*` folder, which the next one removes; of two
    processes at once the second waits and finds the work done. Raises ValueError or OSError: one
    line that names the thing and the remedy.

    name: of VERSIONS; folder: of tensorflow-datasets, made if need be.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    if not os.access(created[-1].parent if created else folder, os.W_OK):
        raise ValueError(
            f"{name} is not prepared in {folder}, which cannot be written: name another data_dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder) as locked:
            target = folder / name / VERSIONS[name]
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
    target = folder / name / VERSIONS[name]
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
        VERSION = tfds.core.Version(VERSIONS["digits"])

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
