"""Images that stay on disk: decoded when they are needed, ahead of it, by grain's threads."""

import dataclasses
import io
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from maxent_aug import pictures


@dataclasses.dataclass(frozen=True, eq=False)
class StoredImages:
    """Images of a prepared tfds data set, like a uint8 array [N, H, W, C] of which none is read.

    images[3] is decoded, uint8 [H, W, C]; images[slice or array of indices] is a part, not
    decoded. Other processes need the same folder.

    Attributes:
      folder: of the prepared version.
      split: as in tfds.
      mode: Pillow's: L, RGB or RGBA.
      image_size: as of `data.load`.
      image_shape: (H, W, C).
      indices: [N] of the split's images.
    """

    folder: Path
    split: str
    mode: str
    image_size: int
    image_shape: tuple[int, ...]
    indices: np.ndarray

    dtype = np.dtype(np.uint8)
    ndim = 4

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.indices), *self.image_shape

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Any) -> Any:
        """Raises OSError for an image that cannot be read, is damaged, or of another size."""
        if not isinstance(key, int | np.integer):
            return dataclasses.replace(self, indices=self.indices[key])
        index = int(self.indices[key])
        height, width, _ = self.image_shape
        size = None if self.image_size else (width, height)
        try:
            _, encoded = parse(self._source[index])
            return decode(encoded, self.mode, size, self.image_size, index)
        except (ValueError, RuntimeError, IndexError, DecodeError) as error:
            raise OSError(f"{self.folder}, split {self.split}: {one_line(error)}") from error

    def read(self) -> np.ndarray:
        """All of them, decoded. Raises OSError as for one."""
        return np.stack([self[index] for index in range(len(self))])

    @cached_property
    def _source(self) -> Any:
        return open_source(self.folder, self.split)

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes: without the open files."""
        return StoredImages, tuple(getattr(self, f.name) for f in dataclasses.fields(self))


def batches(images: StoredImages, order: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Reads images in a given order, in as many threads as there are cores, ahead of their use.

    Args:
      images: N of them.
      order: of each step [B] of [0, N); B may differ.

    Yields:
      uint8 [B, H, W, C] of each step.

    Raises:
      OSError: as `StoredImages`.
    """
    import grain  # takes seconds

    threads = os.cpu_count() or 1
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    read = grain.MapDataset.source(order).map(lambda row: np.stack([images[i] for i in row]))
    yield from read.to_iter_dataset(ahead)


def open_source(folder: Path, split: str) -> Any:
    """The raw records of a split of a prepared tfds data set, by index."""
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(folder)
    return builder.as_data_source(
        split,
        deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        file_format="array_record",
    )


def parse(record: bytes) -> tuple[int, bytes]:
    """Label and encoded image of a record. Raises protobuf's DecodeError for a damaged one."""
    from tensorflow_datasets.proto import tf_example_pb2 as proto

    example: Any = proto.Example.FromString(record)  # pyright: ignore
    values = example.features.feature
    return values["label"].int64_list.value[0], values["image"].bytes_list.value[0]


def decode(
    encoded: bytes, mode: str, size: tuple[int, ...] | None, image_size: int, index: int
) -> np.ndarray:
    """Pixels [H, W, C] by Pillow, never OpenCV, so that they are the same on every machine.

    Args:
      encoded: a file's content.
      mode: Pillow's, for the result.
      size: wanted (width, height) as stored; None for any.
      image_size: see `pictures.crop_square`.
      index: of the image, for the error.

    Raises:
      ValueError: for another size, or what is no picture of 8 bits.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded)) as picture:
            if size is not None and picture.size != size:  # known before anything is decoded
                raise ValueError(
                    f"images differ in size ({size[0]}x{size[1]} pixels, but image {index} has "
                    f"{picture.size[0]}x{picture.size[1]}): set image_size, as 64, to crop and "
                    "scale them"
                )
            if picture.mode.startswith(("I", "F")):
                raise ValueError(f"image {index} has more than 8 bits (mode {picture.mode})")
            flat = picture if picture.mode == mode else picture.convert(mode)
            pixels = np.asarray(pictures.crop_square(flat, image_size))
            return pixels.reshape(*pixels.shape[:2], len(mode))
    except UnidentifiedImageError as error:
        raise ValueError(f"image {index} is in no format that Pillow reads") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {index} cannot be decoded ({one_line(error)})") from error


def one_line(error: BaseException) -> str:
    """An error's message, short."""
    return " ".join(str(error).split())[:200]
