"""All phases of the paper on 48 digits, in seconds.

`python tests/small_run.py --preset=quick --workdir=...` is the same behind the command line; with
--stream=always the first phase alone, of images that stay on disk.
"""

import dataclasses
import hashlib
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
from sklearn.datasets import load_digits

from experiments import cli, run_inputs
from maxent_aug import data as datasets
from maxent_aug import metrics, models, processes, programs, run_folder, train
from maxent_aug.config import PRESETS, Config, Epochs, PaperAugmenter
from maxent_aug.data import Dataset
from maxent_aug.phases import schedule

CONFIG = dataclasses.replace(
    PRESETS["quick"],
    epochs=Epochs(2, 2, 2),
    augmenter=PaperAugmenter(learning_rate=1e-3, loss_forms=("intended",)),
    batch_size=16,
    eval_batch_size=16,
)
TIMING = ("seconds", "images_per_second")


class Silent:
    """Progress that calls a function instead of printing."""

    def __init__(self, update=lambda **_: None):
        self.update = update

    def end_line(self):
        pass


def digits(first, last):
    pictures = load_digits()
    images = (pictures.images[first:last, ..., None] * 15).astype(np.uint8)
    return Dataset(images, pictures.target[first:last].astype(np.int32), tuple("0123456789"))


def make_small(monkeypatch) -> None:
    """Makes every experiment one of 48 digits and a classifier of few layers."""
    tiny = partial(models.ResNet, stage_sizes=(1,), width=4)
    for name in ("ResNet18", "ResNetSmall"):
        monkeypatch.setattr(models, name, tiny)
    sets, devices = (digits(0, 48), digits(100, 125)), mesh()
    monkeypatch.setattr(run_inputs, "load_data", lambda *_, **__: sets)
    monkeypatch.setattr(programs, "make_mesh", lambda: devices)


def short(*epochs: int) -> Config:
    """The same with other epochs, of each phase."""
    return dataclasses.replace(CONFIG, epochs=Epochs(*epochs))


@cache
def phases(config: Config = CONFIG):
    return schedule(config, models.ResNet(10, stage_sizes=(1,), width=4), (8, 8, 1))


@cache
def mesh(devices: int = 1):
    return programs.make_mesh(jax.devices()[:devices])


@cache
def data(devices: int = 1):
    return programs.put_data(digits(0, 48), digits(100, 125), mesh(devices))


def prepared(folder, most_bytes):
    """Other digits, of tfds: training images on disk if they take more than most_bytes."""
    load = partial(datasets.load, "digits", data_dir=folder)
    return load(split="train[:48]", most_bytes=most_bytes), load(split="test[:25]")


def go(
    workdir,
    *,
    config=CONFIG,
    update=lambda **_: None,
    devices=1,
    seeds=1,
    legs=None,
    sets=None,
):
    """Runs, or goes on with, all phases: their final states by (seed, name of the phase)."""
    legs = legs or phases(config)
    with (
        processes.open_on_first(partial(metrics.MetricsWriter, workdir)) as writer,
        train.stop_on_signals() as stop,
    ):
        clock = train.Clock(legs, seeds)
        run = train.Run(
            config,
            Path(workdir),
            programs.put_data(*sets, mesh(devices)) if sets else data(devices),
            mesh(devices),
            writer,
            Silent(update),
            clock,
            stop,
        )
        final = {}
        for seed in range(seeds):
            states = {None: None}
            for phase in legs:
                states[phase] = train.train_phase(run, phase, seed, states[phase.follows])
                final[seed, phase.name] = states[phase]
    return final


def digest(tree):
    """SHA-256 of the bytes of a pytree's arrays."""
    sha = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(tree)):
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()


def outcome(workdir, final):
    """What must not depend on interruptions: digests of all final states, and the metrics."""
    lines = metrics.read(Path(workdir) / "metrics.jsonl")
    kept = [{k: v for k, v in line.items() if k not in TIMING} for line in lines]
    return {name: digest(state) for name, state in final.items()}, kept


def main(settings):
    config = dataclasses.replace(CONFIG, epochs=settings.config.epochs)
    devices, say = jax.process_count(), lambda **_: print("step", flush=True)
    open_folder = partial(run_folder.open_run_folder, settings.workdir, settings.identity)
    options = {}
    if cli.STREAM.value == "always":
        options["sets"] = processes.on_first(partial(prepared, settings.data_dir, 0))
        options["legs"] = phases(config)[:1]
    with processes.open_on_first(open_folder):
        go(settings.workdir, config=config, update=say, devices=devices, **options)
    print("done")


if __name__ == "__main__":
    cli.run("small_run", PRESETS, main)
