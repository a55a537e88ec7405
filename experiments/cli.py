"""The command line that every experiment shares: flags from `maxent_aug.config`, errors in a line.

A flag for each field of the configuration, `--config.classifier.learning_rate=0.1`, laid over the
values of `--preset`.
"""

import argparse
import dataclasses
import datetime
import hashlib
import io
import json
import os
import shlex
import signal
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import app, flags, logging

from maxent_aug import data, pictures, programs, train
from maxent_aug.checkpoint import CheckpointError
from maxent_aug.config import Training
from maxent_aug.metrics import MetricsError, MetricsWriter, Record, read
from maxent_aug.phases import Phase
from maxent_aug.processes import FirstProcessFailed, on_first, open_on_first
from maxent_aug.progress import Progress
from maxent_aug.run_folder import (
    RunFolderError,
    check_run_folder,
    check_writable,
    environment,
    open_run_folder,
    write_atomically,
)
from maxent_aug.stored import StoredImages
from maxent_aug.train import Interrupted, NonFiniteLoss

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "the run's folder; by default runs/<experiment>-<preset>; resumes what is there",
)
DATA_DIR = flags.DEFINE_string(
    "data_dir",
    None,
    "folder of tensorflow-datasets or (data.name=folder) of your pictures; by default "
    "TFDS_DATA_DIR or ~/tensorflow_datasets",
)
SEEDS = flags.DEFINE_integer("seeds", 1, "repetitions, with seeds 0, 1, ...", lower_bound=1)
COMPILATION_CACHE = flags.DEFINE_bool(
    "compilation_cache", True, "keep compiled programs in the user's cache folder for the next run"
)
CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices",
    0,
    "devices that the batch is divided among on a CPU; 0: as many as there are cores, if they "
    "divide the batch and each gets 16 images (1 for digits, and with --distributed)",
    lower_bound=0,
    upper_bound=1024,
)
STREAM = flags.DEFINE_enum(
    "stream",
    "auto",
    ["auto", "always", "never"],
    "read training images from disk batch by batch; auto: if they take more than half of a "
    "device's memory. The result is the same; pictures of a folder, and rotated ones, are never "
    "streamed",
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "one of several processes of a run, each started by the same command; found on a TPU pod and "
    "under SLURM, elsewhere from the next three flags",
)
COORDINATOR = flags.DEFINE_string("coordinator_address", None, "HOST:PORT, of process 0")
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "how many processes the run has", lower_bound=1
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "number of this process, from 0 on", lower_bound=0
)

FLOAT32_MAX = float(np.finfo(np.float32).max)


class UsageError(Exception):
    """Wrong input; the message is one line that names it and what is allowed."""


class Parser(argparse.ArgumentParser):
    """Of a command that is no training run; errors in one line.

    Not absl's flags: those of a process hold all that are defined here.
    """

    def __init__(self, name: str, description: str | None) -> None:
        super().__init__(
            name,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        fail(UsageError(message), 2)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line said."""

    experiment: str
    preset: str
    config: Any  # of one of the presets' dataclasses
    workdir: Path
    data_dir: str | None
    seeds: int

    @property
    def identity(self) -> dict[str, Any]:
        """What a run's folder is bound to, beside its images."""
        return {"experiment": self.experiment, "config": dataclasses.asdict(self.config)}


def _fields(config: Any, prefix: str = "config.") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(flag name, field, default) of each leaf of nested dataclasses."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, value


def _define(name: str, field: dataclasses.Field, default: Any) -> None:
    """A flag for a field; None stands for the preset's value."""
    text = f"{field.metadata['help']}{_allowed(field.metadata)}"
    if isinstance(default, bool):
        flags.DEFINE_bool(name, None, text)
    elif isinstance(default, int):
        flags.DEFINE_integer(name, None, text)
    elif isinstance(default, float):
        flags.DEFINE_float(name, None, text)
    elif isinstance(default, tuple):
        flags.DEFINE_list(name, None, text)
    else:
        flags.DEFINE_string(name, None, text)


def _allowed(limits: Mapping[str, Any]) -> str:
    """What a field may be, in words, "" for anything."""
    if limits["choices"]:
        return f" ({', '.join(limits['choices'])})"
    words = [
        f"{word} {limits[name]}"
        for name, word in (("low", "at least"), ("above", "above"), ("high", "at most"))
        if limits[name] is not None
    ]
    return f" ({', '.join(words)})" if words else ""


def _define_all(presets: Mapping[str, Training]) -> None:
    """Flags for the presets and their fields, the first preset being the default."""
    default, *_ = presets
    known = [name for name in flags.FLAGS if name == "preset" or name.startswith("config.")]
    for name in known:
        delattr(flags.FLAGS, name)  # of another experiment in this process
    text = f"a named configuration, by default {default}"
    flags.DEFINE_enum("preset", default, list(presets), text)
    for name, field, value in _fields(presets[default]):
        _define(name, field, value)
    for flag in flags.FLAGS.get_flags_for_module(__name__):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _check(name: str, field: dataclasses.Field, value: Any) -> None:
    """Raises UsageError for a value that the field does not allow."""
    limits = field.metadata
    if limits["choices"]:
        values = value if isinstance(value, tuple) else (value,)
        fits = (
            bool(values)
            and len(set(values)) == len(values)
            and set(values) <= set(limits["choices"])
        )
    elif isinstance(value, str):
        fits = bool(value)
    else:
        fits = (
            abs(value) <= FLOAT32_MAX  # false for NaN
            and (limits["low"] is None or value >= limits["low"])
            and (limits["above"] is None or value > limits["above"])
            and (limits["high"] is None or value <= limits["high"])
        )
    if not fits:
        allowed = _allowed(limits) or (" (a name)" if value == "" else " (a finite number)")
        raise UsageError(f"--{name}={_shown(value)} is not allowed{allowed}")


def _configure(preset: Training) -> Training:
    """The preset with the flags given on the command line laid over it."""

    def overlay(config: Any, prefix: str) -> Any:
        values = {}
        for field in dataclasses.fields(config):
            name, value = prefix + field.name, getattr(config, field.name)
            if dataclasses.is_dataclass(value):
                values[field.name] = overlay(value, name + ".")
            elif (given := flags.FLAGS[name].value) is not None:
                values[field.name] = tuple(given) if isinstance(value, tuple) else given
        return dataclasses.replace(config, **values)

    config = overlay(preset, "config.")
    for name, field, value in _fields(config):
        _check(name, field, value)
    return config


def _help(presets: Mapping[str, Training]) -> str:
    """What --help prints, on a screen: the experiment, its flags, and what the presets set."""
    own = {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])}
    names = ["preset", *(n for n in own if n != "preset" and not n.startswith("config."))]
    lines = [sys.modules["__main__"].__doc__ or ""]
    for name in names:
        line = textwrap.shorten(str(own[name].help), 75, placeholder=" ...")
        lines.append(f"  --{name:<20} {line}")
    lines += [
        "",
        "Values of the presets; change any with --config.NAME=VALUE:",
        *_table(presets),
        "",
    ]
    return "\n".join([*lines, "--helpfull explains each, and says what is allowed."])


def _table(presets: Mapping[str, Training]) -> Iterator[str]:
    """Lines of a table of all fields; those that are the same in all presets come last."""
    same, line = [], "  {:<34}" + "{:<16}" * len(presets)
    yield line.format("", *presets).rstrip()
    for leaves in zip(*map(_fields, presets.values()), strict=True):
        name = leaves[0][0].removeprefix("config.")
        values = [_shown(value) for _, _, value in leaves]
        if len(set(values)) > 1:
            yield line.format(name, *values).rstrip()
        else:
            same.append(f"{name}={values[0]}")
    text = f"the same in all: {', '.join(same)}"
    yield textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="  ")


def _shown(value: Any) -> str:
    """A value as the command line takes it."""
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _parse(presets: Mapping[str, Training], argv: list[str]) -> list[str]:
    """absl's parser, except that --help fits a screen and that an error takes one line."""
    if "--help" in argv:
        try:
            print(_help(presets), flush=True)
        except BrokenPipeError:
            _drop_output()
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
    except SystemExit:
        sys.exit(0)
    except flags.Error as error:
        fail(error, 2)
    if len(rest) > 1:
        fail(UsageError(f"argument {rest[1]!r} is not a flag; flags are --name=value"), 2)
    return rest


def all_records(settings: Settings) -> list[Record]:
    """What the run's folder has, none if it has not begun."""
    path = settings.workdir / "metrics.jsonl"
    return list(read(path)) if path.exists() else []


def records(settings: Settings, legs: Iterable[Phase]) -> list[Record]:
    """What the run's folder has of these phases, of all seeds."""
    wanted = {(leg.branch, leg.kind) for leg in legs}
    return [r for r in all_records(settings) if (r["branch"], r["phase"]) in wanted]


def result(settings: Settings, records: Iterable[Record], **content: Any) -> dict[str, Any]:
    """What came out, for JSON: how it was made, its content, what that took and on what machine."""
    command = ["python", "-m", f"experiments.{settings.experiment}", *sys.argv[1:]]
    return {
        "experiment": settings.experiment,
        "preset": settings.preset,
        "command": shlex.join(command),
        "date": datetime.date.today().isoformat(),
        "data": _data(settings),
        "tested_on": "held-out training images" if settings.config.data.held_out else "test images",
        **content,
        "seconds": sum(record["seconds"] for record in records),
        "config": settings.identity["config"],
        **environment(),
    }


def _data(settings: Settings) -> dict[str, Any]:
    """Which images, and how many, a seed's classifiers were trained and tested on."""
    kept = json.loads((settings.workdir / "config.json").read_text(encoding="utf-8"))["dataset"]
    config = settings.config.data
    return {
        "name": config.name,
        "classes": kept["classes"],
        "image_shape": kept["image_shape"],
        "trained_on": config.train_examples or kept["training_images"] - config.held_out,
        "tested_on": config.held_out or kept["test_images"],
    }


def save_figures(
    workdir: Path, drawn: Mapping[str, tuple[Any, str, str]]
) -> list[tuple[Path, str, str]]:
    """Writes figures/NAME.png of each (figure, title, caption): the pictures of the report."""
    pictures = []
    for name, (figure, title, caption) in drawn.items():
        path = workdir / "figures" / f"{name}.png"
        save_figure(path, figure)
        pictures.append((path, title, caption))
    return pictures


def save_figure(path: Path, figure: Any) -> None:
    """Writes a PNG, whole or not at all, in a folder that is made if need be."""
    path.parent.mkdir(exist_ok=True)
    content = io.BytesIO()
    figure.savefig(content)
    write_atomically(path, content.getvalue())


def with_more_seeds(settings: Settings) -> str:
    """The command again with three more seeds, which adds to what is in the folder."""
    given = [flag for flag in sys.argv[1:] if not flag.startswith("--seeds=")]
    seeds = f"--seeds={settings.seeds + 3}"
    return shlex.join(["python", "-m", f"experiments.{settings.experiment}", *given, seeds])


def given_flags(wanted: Callable[[str], bool]) -> str:
    """The flags of this command, as it takes them, whose names are wanted."""
    own = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    return shlex.join(flag.serialize() for flag in own if flag.present and wanted(flag.name))


def fail(error: BaseException, code: int) -> NoReturn:
    """Ends the process with the error in one line, which of several processes the first prints."""
    _tell(f"error: {' '.join(str(error).split())}")
    sys.exit(code)


def _tell(line: str) -> None:
    if not jax.distributed.is_initialized() or jax.process_index() == 0:
        print(line, file=sys.stderr)


def catch_interrupts() -> None:
    """From here on Ctrl-C is a KeyboardInterrupt again, unless it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _drop_output() -> None:
    """What is left of the output goes nowhere: its reader has gone, and Python tries at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _join_processes() -> None:
    """Does what --distributed says; of the processes, the first alone prints from then on.

    Raises:
      UsageError: if it cannot be known which processes there are.
    """
    by_hand = COORDINATOR, NUM_PROCESSES, PROCESS_ID
    if not DISTRIBUTED.value:
        for flag in by_hand:
            if flag.value is not None:
                raise UsageError(f"--{flag.name} needs --distributed")
        return
    address = COORDINATOR.value
    port = (address or ":1").rpartition(":")[2]
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--{COORDINATOR.name}={address} is not allowed (HOST:PORT)")
    # It would swallow SIGTERM; train.stop_on_signals and train_phase do its work.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address, NUM_PROCESSES.value, PROCESS_ID.value, shutdown_timeout_seconds=30
        )
    except (ValueError, RuntimeError) as error:
        names = ", ".join(f"--{flag.name}" for flag in by_hand)
        raise UsageError(
            f"--distributed: {error} Outside a TPU pod or SLURM, give {names}"
        ) from error


def _cpu_devices(config: Training) -> int | None:
    """How many devices to make of the CPU's cores, None for what the user told JAX.

    XLA runs a part of a step's operations on one core only, whatever their size.
    """
    if CPU_DEVICES.value:
        return CPU_DEVICES.value
    flag = "xla_force_host_platform_device_count"
    if "JAX_NUM_CPU_DEVICES" in os.environ or flag in os.environ.get("XLA_FLAGS", ""):
        return None
    too_small = data.base_name(config.data.name) == "digits"  # 8x8 pixels
    if DISTRIBUTED.value or too_small:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    counts, batch_size = range(2, (cores or 1) + 1), config.batch_size
    return max([1, *(n for n in counts if batch_size % n == 0 and batch_size // n >= 16)])


def start_devices() -> None:
    """Raises UsageError if there are none of the kind that the user told JAX to use."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second without words, for cuda
        asked = os.environ.get("JAX_PLATFORMS", "")
        raise UsageError(f"JAX_PLATFORMS={asked}: {str(error) or 'no such device here'}") from error


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


@contextmanager
def _saying_how_it_ended(again: str) -> Iterator[None]:
    """Ends the process, if what is run in it fails or is stopped, with a line and its exit code."""
    try:
        yield
    except (UsageError, RunFolderError, MetricsError, CheckpointError) as error:
        fail(error, 2)
    except (IsADirectoryError, NotADirectoryError, FileExistsError, PermissionError) as error:
        there = f"{error.filename2 or error.filename}: {error.strerror}"
        fail(UsageError(f"{there}; put right what is there, or choose another workdir"), 2)
    except NonFiniteLoss as error:
        fail(error, 1)
    except BrokenPipeError:
        _drop_output()
        fail(UsageError(f"what reads the output has gone; {again}"), 1)
    except OSError as error:
        fail(UsageError(f"{error}; {again}"), 1)
    except FirstProcessFailed:
        sys.exit(1)
    except Interrupted as error:
        _tell(f"{error}; {again}")
        sys.exit(128 + error.signal_number)
    except KeyboardInterrupt:  # before training, or a second one
        _tell(f"stopped at once; {again}")
        sys.exit(128 + signal.SIGINT)


def _settings(experiment: str, config: Training, workdir: Path) -> Settings:
    """Of a run by the flags, with JAX started; UsageError or RunFolderError if it cannot begin."""
    if (count := _cpu_devices(config)) is not None:
        jax.config.update("jax_num_cpu_devices", count)
    if COMPILATION_CACHE.value:
        _keep_compiled_programs()
    if DISTRIBUTED.value and jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    start_devices()
    preset = flags.FLAGS.preset
    settings = Settings(experiment, preset, config, workdir, DATA_DIR.value, SEEDS.value)
    on_first(partial(check_run_folder, workdir, settings.identity))
    return settings


def _keep_compiled_programs() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maxent_aug" / "jax"
    try:
        check_writable(cache)
    except OSError as error:
        _tell(f"compiled programs are not kept for the next run ({error}; or set XDG_CACHE_HOME)")
        os.environ.setdefault("MPLCONFIGDIR", str(Path(tempfile.gettempdir()) / "matplotlib"))
    else:
        jax.config.update("jax_compilation_cache_dir", str(cache))


def run(
    experiment: str, presets: Mapping[str, Training], main: Callable[[Settings], None]
) -> NoReturn:
    """Parses the flags and calls main; ends the process.

    Exit codes: 0; 1 for a run that failed; 2 for wrong input, before any file is touched; 128 and
    the signal's number for a run that was stopped and can be resumed.
    """

    def call(_: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        logging.get_absl_handler().setFormatter(None)  # the message alone
        preset = flags.FLAGS.preset
        workdir = Path(os.path.expanduser(WORKDIR.value or f"runs/{experiment}-{preset}"))
        programs.keep_freed_memory()
        with _saying_how_it_ended(f"run the same command to resume, in {workdir}"):
            for flag in (WORKDIR, DATA_DIR):
                if flag.value == "":
                    raise UsageError(f"--{flag.name}= is not allowed (a folder)")
                if flag.value and os.path.expanduser(flag.value).startswith("~"):
                    raise UsageError(f"--{flag.name}={flag.value} is not allowed (no such user)")
            _join_processes()
            main(_settings(experiment, _configure(presets[preset]), workdir))

    catch_interrupts()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by what started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    _define_all(presets)
    app.run(call, flags_parser=partial(_parse, presets))
