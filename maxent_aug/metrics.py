"""Metrics on disk: a JSON object a line, and TensorBoard. Takes plain numbers, never arrays."""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from maxent_aug.run_folder import file_name, write_atomically

Record = Mapping[str, Any]

# What a record is filed under; everything else in it is a metric.
KEYS = {"seed": int, "branch": str, "phase": str, "epoch": int}

_REMEDY = "put the file back, or choose another workdir"


class MetricsError(ValueError):
    """A metrics.jsonl is damaged; the message names the line."""


class MetricsWriter:
    """Appends records to `workdir/metrics.jsonl` and their numbers to `workdir/tensorboard`.

    A record is flat: seed, branch, phase and epoch, and its metrics by name. A line is on the disk
    when `write` returns. The TensorBoard events are a copy, one folder for each seed, branch and
    phase: made again from the lines where there is none, and after a `rewind`, so that no curve has
    a point twice.

    Raises MetricsError for a file that is damaged.
    """

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        self.workdir = Path(workdir)
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.path = self.workdir / "metrics.jsonl"
        self._events: Any = None
        self._run: tuple[Any, ...] | None = None
        if self.path.exists():  # damage is found before anything is written
            records = read(self.path)
            if self.path.read_bytes() != _lines(records):
                _replace(self.path, records)  # cut off by a kill: nothing must be glued to it
            for run in dict.fromkeys(map(_run, records)):
                if not self._folder(run).exists():
                    self._copy(run, records)

    def write(self, record: Record) -> None:
        """Adds one record. Numbers that are not finite become null.

        Raises:
          ValueError: if seed, branch, phase or epoch is missing, or a metric is not a plain number,
            a bool or None.
        """
        line = _line(_checked(record))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._add_scalars(record)

    def rewind(self, seed: int, branch: str, phase: str, epoch: int) -> None:
        """Forgets what this phase wrote after `epoch`; call it when a phase starts or resumes.

        The file is replaced whole or not at all. Epochs count from 1, so epoch 0 forgets the phase.
        """
        run = (seed, branch, phase)
        records = read(self.path) if self.path.exists() else []
        kept = [r for r in records if _run(r) != run or r["epoch"] <= epoch]
        if len(kept) < len(records):
            _replace(self.path, kept)
        self.close()
        shutil.rmtree(self._folder(run), ignore_errors=True)
        self._copy(run, kept)

    def close(self) -> None:
        """Closes the TensorBoard file; a later `write` opens another."""
        if self._events is not None:
            self._events.close()
        self._events, self._run = None, None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _folder(self, run: tuple[Any, ...]) -> Path:
        seed, branch, phase = run
        name = branch if branch == phase else f"{branch}-{phase}"
        return self.workdir / "tensorboard" / file_name(f"seed{seed}-{name}")

    def _copy(self, run: tuple[Any, ...], records: Iterable[Record]) -> None:
        """Makes the events of a run again."""
        for record in records:
            if _run(record) == run:
                self._add_scalars(record)

    def _add_scalars(self, record: Record) -> None:
        from tensorboardX import SummaryWriter

        if self._run != _run(record):
            self.close()
            self._run = _run(record)
            self._events = SummaryWriter(str(self._folder(self._run)))
        for name, value in record.items():
            if name not in KEYS and isinstance(value, int | float) and math.isfinite(value):
                self._events.add_scalar(name, value, record["epoch"])
        self._events.flush()


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, in order; a last line cut off by a kill is ignored.

    Raises:
      MetricsError: if an earlier line is broken, with its number.
    """
    lines = Path(path).read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            records.append(_Record(where, _checked(json.loads(line))))
        except (ValueError, RecursionError) as error:
            if number < len(lines):
                raise MetricsError(f"{where}: not a record of metrics; {_REMEDY}") from error
    return records


def accuracies(records: Iterable[Record], branch: str, phase: str, epoch: int) -> dict[int, float]:
    """Test accuracy after an epoch of a phase, by seed."""
    return {
        r["seed"]: r["test_accuracy"]
        for r in records
        if (r["branch"], r["phase"], r["epoch"]) == (branch, phase, epoch)
    }


def mean_and_sd(values: Iterable[float]) -> dict[str, Any]:
    """mean, sd (of a sample; None of a single value) and n of at least one value."""
    values = list(values)
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd, "n": len(values)}


class _Record(dict[str, Any]):
    """A line; one that was changed by hand is named when a metric is missing, or null."""

    def __init__(self, where: str, metrics: Record) -> None:
        super().__init__(metrics)
        self._where = where

    def __getitem__(self, name: str) -> Any:
        if (value := self.get(name)) is None:
            raise MetricsError(f"{self._where} has no {name}; {_REMEDY}")
        return value


def _checked(record: Any) -> Record:
    """Raises ValueError unless it is a record."""
    if not isinstance(record, Mapping):
        raise ValueError("a record is a dict")
    for name, kind in KEYS.items():
        if not isinstance(record.get(name), kind):
            raise ValueError(f"a record needs {', '.join(KEYS)}; {name} is {record.get(name)!r}")
    for name, value in record.items():
        if name not in KEYS and not isinstance(value, int | float | None):
            raise ValueError(f"{name} is {value!r}; allowed: a plain number, a bool or None")
    return record


def _run(record: Record) -> tuple[Any, ...]:
    return record["seed"], record["branch"], record["phase"]


def _line(record: Record) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


def _replace(path: Path, records: Iterable[Record]) -> None:
    write_atomically(path, _lines(records))


def _lines(records: Iterable[Record]) -> bytes:
    return "".join(map(_line, records)).encode()
