"""Learns an augmenter for a data set, together with a classifier, and leaves it in a file.

The augmenter draws an affine transform for each image from a box that follows from how certain the
classifier is of it, and learns the largest boxes in which images that the classifier has never seen
lose hardly any certainty. In the last tenth of its training the classifier learns from all images,
the augmenter frozen. Any tensorflow-datasets name or a folder of pictures will do. Leaves
augmenter.npz, report.html and result.json. Run it again in the same folder to resume.

  python -m experiments.learn --preset=quick    digits, about a minute on 2 cores
  python -m experiments.learn --config.data.name=folder --data_dir=PATH --config.data.image_size=64
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from experiments import cli, run_inputs, run_outputs
from experiments.named_policies import KNOWN, is_policy, named_policy
from maxent_aug import (
    diagnostics,
    load_augmenter,
    losses,
    metrics,
    phases,
    programs,
    report,
    run_folder,
    save_augmenter,
    steps,
    train,
)
from maxent_aug.config import LEARNING_PRESETS
from maxent_aug.processes import on_first
from maxent_aug.progress import duration

PICTURES, DRAWS = 8, 8


def main(settings: cli.Settings) -> None:
    """Trains for all seeds; writes each augmenter, and what came out, to the run's folder."""
    config = settings.config
    _check(config.policy)
    train_set, test_set = run_inputs.load_data(config, settings.data_dir)
    classes, shape = len(train_set.class_names), train_set.images.shape[1:]
    examples = run_inputs.chosen_examples(train_set, config)
    steps_per_epoch = examples // config.batch_size
    policy, *others = (
        named_policy(part, classes, phases.affine_bounds(config.bounds))
        for part in config.policy.split(":")
    )
    classifier = phases.make_classifier(config, classes)
    legs = phases.learning(config, classifier, policy, shape, steps_per_epoch, *others)
    with run_inputs.open_run(settings, train_set, test_set, legs) as make_run:
        pictured: Any = None
        for seed in range(settings.seeds):
            run = make_run(*run_inputs.choose(train_set, test_set, config, seed))
            state: Any = None
            for leg in legs:
                state = train.train_phase(run, leg, seed, state)
            on_first(partial(_save, settings, seed, state.augmenter, run.data))
            if seed == 0:
                pictured = jax.device_get(jax.jit(_pictured)(state.classifier, run.data))
        result = on_first(partial(_write, settings, legs, *pictured))
    _print(settings.workdir, result)


def _check(policy: str) -> None:
    """Raises UsageError."""
    if not is_policy(policy):
        raise cli.UsageError(f"--config.policy={policy} is not allowed ({KNOWN})")


def _pictured(classifier: steps.ModelState, on_device: programs.Data) -> tuple[Array, Array]:
    """The first test images, and the classifier's uncertainty of each."""
    images = on_device.test_images[:PICTURES]
    normalized = steps.normalize(images, on_device.mean, on_device.sd)
    return images, losses.uncertainty(classifier(normalized))


def _file(workdir: Path, seed: int) -> Path:
    return workdir / ("augmenter.npz" if seed == 0 else f"augmenter-seed{seed}.npz")


def _save(
    settings: cli.Settings, seed: int, augmenter: steps.ModelState, on_device: programs.Data
) -> None:
    mean, sd, running = jax.device_get((on_device.mean, on_device.sd, augmenter.batch_stats))
    shape = on_device.test_images.shape[1:]
    alone = ":" in settings.config.policy
    module = phases.make_augmenter(settings.config, shape[-1], others_alone=alone)
    save_augmenter(
        _file(settings.workdir, seed),
        module.clone(uncertainty=float(running["unseen"])),
        augmenter.params,
        mean=mean,
        sd=sd,
        image_shape=shape,
    )


def _write(
    settings: cli.Settings,
    legs: Sequence[phases.Phase],
    images: np.ndarray,
    uncertainty: np.ndarray,
) -> dict[str, Any]:
    """Writes figures, report.html and result.json: the content of the last."""
    workdir = settings.workdir
    records = run_outputs.complete_records(settings, legs)
    result = _result(settings, legs[-1], records)
    report.write_report(
        workdir / "report.html",
        title="A learned augmentation",
        result=result,
        records=records,
        figures=_figures(workdir, result["tested_on"], records, images, uncertainty),
    )
    run_folder.write_json(workdir / "result.json", result)
    return result


def _result(
    settings: cli.Settings, last: phases.Phase, records: Sequence[metrics.Record]
) -> dict[str, Any]:
    """The content of result.json."""
    end = [r for r in records if (r["phase"], r["epoch"]) == (last.kind, last.epochs)]
    accuracies = [r["test_accuracy"] for r in end]
    row = {**metrics.mean_and_sd(accuracies), "per_seed": accuracies}
    accuracy, collapse = {"learned": row}, {"learned": report.collapse_of_seeds(end)}
    return run_outputs.result(settings, records, accuracy=accuracy, collapse=collapse)


def _figures(
    workdir: Path,
    tested_on: str,
    records: Sequence[metrics.Record],
    images: np.ndarray,
    uncertainty: np.ndarray,
) -> list[tuple[Path, str, str]]:
    """Draws the figures: (path, title, caption) for the report."""
    from maxent_aug import figures  # matplotlib writes a cache of fonts when it is imported

    augment = load_augmenter(_file(workdir, 0), share=1.0, with_color=True)
    keys = jax.random.split(jax.random.key(0), DRAWS)
    drawn = [jax.device_get(augment(key, images, uncertainty)) for key in keys]
    versions = np.stack([pictures for pictures, *_ in drawn], axis=1)
    words = [diagnostics.describe(theta, images.shape[1:3], color) for _, theta, color in drawn]
    found = {
        "versions": (
            figures.versions(
                images,
                versions,
                title=f"{tested_on.capitalize()}, {DRAWS} times transformed",
                words=list(zip(*words, strict=True)),
            ),
            "What is done to each image",
            f"{tested_on.capitalize()} on the left, draws of the augmenter beside them, and the "
            "transform of each in words. The box that they are drawn from follows from how "
            "certain the classifier is of the image. Wanted are draws that differ and can still "
            "be recognised. While it trains, the share learned.share of the images gets such an "
            "affine transform, the others are shifted by whole pixels, and of colour images the "
            "colours change in all; if they have a policy of their own, after a colon, the "
            "others have that alone.",
        ),
        "half_widths": (
            figures.half_widths(records),
            "How wide the augmentation is",
            "Of each coordinate, how far from the identity a transform is drawn; 0 would be a "
            "constant transform, 1 the bound, and a line that settles between has collapsed to "
            f"neither. A mean over the {tested_on}.",
        ),
        "accuracy": (
            figures.accuracy(records),
            f"Accuracy on {tested_on}, epoch by epoch",
            "Of the classifier that was trained on the augmented images, on images left alone. In "
            "the last epochs the augmenter is frozen and all training images are seen.",
        ),
    }
    return run_outputs.save_figures(workdir, found)


def _print(workdir: Path, result: Mapping[str, Any]) -> None:
    row, learned = result["accuracy"]["learned"], result["collapse"]["learned"]
    sd = "" if row["sd"] is None else f" ± {row['sd']:.4f}"
    print(f"\naccuracy on {result['tested_on']} {row['mean']:.4f}{sd}, n = {len(row['per_seed'])}")
    print(f"accuracy on the same images, augmented, {learned['test_augmented_accuracy']:.4f}")
    print("mean half-widths (0: no change, 1: up to the bound):")
    for name, _ in diagnostics.COORDINATES:
        if f"half_width_{name}" in learned:
            print(f"  {name:<16}{learned[f'half_width_{name}']:.2f}")
    if _unlearned(result):
        print("all are as they began: train for more epochs, or on more images")
    print(f"\n{duration(result['seconds'])} on {result['device']}")
    print(f"open {workdir / 'report.html'}; apply the augmenter in your own training loop:")
    print(f'  augment = maxent_aug.load_augmenter("{workdir / "augmenter.npz"}")')
    print("  images, theta = augment(key, images, maxent_aug.uncertainty(logits))")


def _unlearned(result: Mapping[str, Any]) -> bool:
    """Whether no half-width is further than a hundredth from its start."""
    learned, start = result["collapse"]["learned"], result["config"]["learned"]["start_width"]
    widths = [value for name, value in learned.items() if name.startswith("half_width_")]
    return all(abs(width - start) < 0.01 for width in widths)


if __name__ == "__main__":
    cli.run("learn", LEARNING_PRESETS, main)
