"""What a run leaves: its records, its result as JSON, its figures."""

import datetime
import io
import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.cli import Settings
from maxent_aug import metrics
from maxent_aug.metrics import Record
from maxent_aug.phases import Phase
from maxent_aug.run_folder import environment, write_atomically


def all_records(settings: Settings) -> list[Record]:
    """What the run's folder has, none if it has not begun."""
    path = settings.workdir / "metrics.jsonl"
    return list(metrics.read(path)) if path.exists() else []


def records(settings: Settings, legs: Iterable[Phase]) -> list[Record]:
    """What the run's folder has of these phases: by seed, in the phases' order, by epoch.

    There they are in the order of training, in which a phase that was trained again comes last.
    """
    order = {name: place for place, name in enumerate((leg.branch, leg.kind) for leg in legs)}
    found = [r for r in all_records(settings) if (r["branch"], r["phase"]) in order]
    return sorted(found, key=lambda r: (r["seed"], order[r["branch"], r["phase"]], r["epoch"]))


def complete_records(settings: Settings, legs: Iterable[Phase]) -> list[Record]:
    """`records` of the seeds for which all of these phases have ended, so that all rows share them.

    One that is not has been stopped, and not been asked for again.
    """
    legs = tuple(legs)
    found = records(settings, legs)
    ended = [metrics.accuracies(found, leg.branch, leg.kind, leg.epochs).keys() for leg in legs]
    seeds = set.intersection(*map(set, ended))
    return [r for r in found if r["seed"] in seeds]


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
