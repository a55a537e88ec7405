"""The images of a run, checked against its configuration, and the run's folder."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import numpy as np

from experiments.cli import STREAM, Settings, UsageError
from maxent_aug import data, pictures, programs, train
from maxent_aug.config import Training
from maxent_aug.metrics import MetricsWriter
from maxent_aug.phases import Phase
from maxent_aug.processes import on_first, open_on_first
from maxent_aug.progress import Progress
from maxent_aug.run_folder import open_run_folder
from maxent_aug.stored import StoredImages


def load_data(
    config: Training, data_dir: str | None, *, may_stream: bool = True
) -> tuple[data.Dataset, data.Dataset]:
    """The training and the test images, checked against the configuration.

    Of several processes the first reads them, and gives them to the others; training images that
    are streamed are read by all, from the same path.

    Raises:
      UsageError: if they cannot be read, or do not go with the configuration or the devices.
    """
    reasons = {
        "this experiment's images": not may_stream,
        "pictures of a folder": config.data.name == "folder",
        "rotated pictures (--config.data.rotated)": config.data.rotated > 0,
    }
    read_at_once = [what for what, holds in reasons.items() if holds]
    if STREAM.value == "always" and read_at_once:
        raise UsageError(
            f"--stream=always: {read_at_once[0]} are always read at once (auto, never)"
        )
    most_bytes = None if read_at_once else _most_bytes()
    return on_first(partial(_load_data, config, data_dir, most_bytes))


def _most_bytes() -> int | None:
    """What training images may take on each device before they are streamed; None for no limit."""
    if STREAM.value != "auto":
        return 0 if STREAM.value == "always" else None
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return (memory or pictures.memory() // jax.local_device_count()) // 2


def _load_data(
    config: Training, data_dir: str | None, most_bytes: int | None
) -> tuple[data.Dataset, data.Dataset]:
    devices = jax.device_count()
    if config.batch_size % devices:
        raise UsageError(
            f"--config.batch_size={config.batch_size} is not a multiple of the {devices} devices"
        )
    try:
        train_set, test_set = (
            data.load(
                config.data.name,
                split,
                data_dir,
                image_size=config.data.image_size,
                test_fraction=config.data.test_fraction,
                split_seed=config.data.split_seed,
                most_bytes=most_bytes if split == "train" else None,
            )
            for split in ("train", "test")
        )
    except (ValueError, OSError) as error:
        raise UsageError(f"--config.data.name={config.data.name}: {error}") from error
    _check_sizes(config, train_set, test_set)
    if config.data.rotated:
        train_set, test_set = (
            data.rotate(each, config.data.rotated) for each in (train_set, test_set)
        )
    return train_set, test_set


def _check_sizes(config: Training, train_set: data.Dataset, test_set: data.Dataset) -> None:
    """Raises UsageError unless the configuration goes with the images."""
    classes, available = len(train_set.class_names), len(train_set.images)
    asked = {"held_out": config.data.held_out, "train_examples": config.data.train_examples}
    for name, examples in asked.items():
        if examples and not classes <= examples <= available - (name == "held_out"):
            raise UsageError(
                f"--config.data.{name}={examples} is not allowed (0, or from the number of "
                f"classes, {classes}, to the number of training images that are left, {available}"
                f"{', less one' if name == 'held_out' else ''})"
            )
        available -= config.data.held_out
    used = chosen_examples(train_set, config)
    if config.batch_size > used:
        raise UsageError(
            f"--config.batch_size={config.batch_size} is more than the {used} training images"
        )
    if used < 2 and hasattr(config, "learned"):
        raise UsageError(
            f"--config.data.name={config.data.name} has {used} training image, 2 are needed: what "
            "learns an augmenter keeps some unseen"
        )
    if classes < 2:
        raise UsageError(f"--config.data.name={config.data.name} has {classes} class, 2 are needed")
    if train_set.images.shape[1:] != test_set.images.shape[1:]:
        raise UsageError(
            f"--config.data.name={config.data.name}: training images are "
            f"{train_set.images.shape[1:]}, test images {test_set.images.shape[1:]}: set "
            "--config.data.image_size"
        )


def chosen_examples(train_set: data.Dataset, config: Training) -> int:
    """How many training images `choose` chooses."""
    return config.data.train_examples or len(train_set.images) - config.data.held_out


def choose(
    train_set: data.Dataset, test_set: data.Dataset, config: Training, seed: int
) -> tuple[data.Dataset, data.Dataset]:
    """A seed's training images, and those that its classifiers are tested on.

    Raises:
      OSError: if images that are held out of a stream cannot be read.
    """
    examples, held_out = config.data.train_examples, config.data.held_out
    if examples:
        train_set = data.subset(train_set, examples + held_out, seed)
    if not held_out:
        return train_set, test_set
    chosen, held = data.hold_out(train_set, held_out, seed)
    if isinstance(held.images, StoredImages):  # those that are tested on are in memory
        held = dataclasses.replace(held, images=held.images.read())
    return chosen, held


@contextmanager
def open_run(
    settings: Settings, train_set: data.Dataset, test_set: data.Dataset, legs: tuple[Phase, ...]
) -> Iterator[Callable[[data.Dataset, data.Dataset], train.Run]]:
    """Claims the run's folder, for a run on these images.

    Yields what makes the `Run` of a seed from its training and test images. Of several processes
    the first has the folder and the writer of metrics.

    Raises:
      UsageError: if a policy does not take the images.
      RunFolderError: if the folder cannot hold the run, or holds one on other images.
    """
    _check_policies(legs, train_set, settings.config.batch_size)
    identity = settings.identity | {"dataset": _fingerprint(train_set, test_set)}
    mesh = programs.make_mesh()
    progress, clock = Progress(), train.Clock(legs, settings.seeds)
    with (
        open_on_first(partial(open_run_folder, settings.workdir, identity)),
        open_on_first(partial(MetricsWriter, settings.workdir)) as writer,
        train.stop_on_signals() as stop,
    ):
        progress.say(f"{settings.experiment}, preset {settings.preset}, in {settings.workdir}")

        def make_run(chosen: data.Dataset, tested: data.Dataset) -> train.Run:
            on_device = programs.put_data(chosen, tested, mesh)
            shared = writer, progress, clock, stop
            return train.Run(settings.config, settings.workdir, on_device, mesh, *shared)

        yield make_run


def _check_policies(legs: tuple[Phase, ...], train_set: data.Dataset, batch_size: int) -> None:
    """Raises UsageError if one does not take the images."""
    classes = len(train_set.class_names)
    inputs = (
        jax.eval_shape(jax.random.key, 0),
        jax.ShapeDtypeStruct((batch_size, *train_set.images.shape[1:]), np.uint8),
        jax.ShapeDtypeStruct((batch_size,), np.int32),
    )

    def classify(images: jax.Array) -> jax.Array:
        return jax.numpy.zeros((len(images), classes))

    for policy, branch in {leg.policy: leg.branch for leg in legs}.items():
        try:
            jax.eval_shape(lambda *args, policy=policy: policy(*args, classify), *inputs)
        except ValueError as error:
            raise UsageError(f"the policy of {branch} does not take the images: {error}") from error


def _fingerprint(train_set: data.Dataset, test_set: data.Dataset) -> dict[str, Any]:
    """By which other images are told, without reading them all."""
    labels = train_set.labels.tobytes() + test_set.labels.tobytes()
    names = json.dumps(train_set.class_names).encode()
    return {
        "image_shape": list(train_set.images.shape[1:]),
        "classes": len(train_set.class_names),
        "training_images": len(train_set.images),
        "test_images": len(test_set.images),
        "labels": hashlib.sha256(labels).hexdigest()[:16],
        "class_names": hashlib.sha256(names).hexdigest()[:16],
    }
