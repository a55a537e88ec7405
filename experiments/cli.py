"""The command line that every experiment shares: flags from `maxent_aug.config`, errors in a line.

A flag for each field of the configuration, `--config.classifier.learning_rate=0.1`, laid over the
values of `--preset`.
"""

import argparse
import dataclasses
import os
import shlex
import signal
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import app, flags, logging

from maxent_aug import data, programs
from maxent_aug.checkpoint import CheckpointError
from maxent_aug.config import Training
from maxent_aug.metrics import MetricsError
from maxent_aug.processes import FirstProcessFailed, on_first
from maxent_aug.run_folder import (
    RunFolderError,
    check_run_folder,
    check_writable,
)
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
    host, _, port = ("found:1" if address is None else address).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
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
