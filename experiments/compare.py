"""Every augmentation under one trainer: the same seeds, learning rates and number of updates.

Policies are those of maxent_aug.policies, joined by + to apply one after the other; the last may be
one that learns: printed, intended, gap and target, the paper's augmenter by the form of its loss;
learned, the augmenter of experiments.learn, trained together with its classifier; and replayed, a
new classifier on what that augmenter did, from its first epoch on. A:B has policy A for half of the
images and B for the others; flip+learned:B has B for those without an affine transform.
Run it again in the same folder to resume, or to add policies and seeds: the table has all rows
that are done there.

  python -m experiments.compare --preset=small --seeds=3    5,000 images of CIFAR-10, a small ResNet
  python -m experiments.compare --policies=flip_crop,flip_crop+cutout --seeds=2    all of CIFAR-10
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median_low
from typing import Any

import jax
import numpy as np
from absl import flags
from jax import Array
from scipy import stats

from experiments import cli, run_inputs, run_outputs
from experiments.named_policies import NAMES, is_policy, named_policy
from maxent_aug import diagnostics, losses, metrics, phases, programs, run_folder, steps, train
from maxent_aug.config import COMPARISON_PRESETS
from maxent_aug.processes import on_first
from maxent_aug.progress import duration
from maxent_aug.spatial import WIDE_BOUNDS, AffineBounds

TRAINED = (*losses.LOSS_FORMS, *phases.MATCHING)
ALLOWED = ", ".join((*NAMES, *TRAINED))
CONTROLS = ("identity", "random_affine")  # what every row is compared with
PICTURES = 8
LONGEST_NAME = 200  # of a row, which files are named by

POLICIES = flags.DEFINE_list(
    "policies",
    [*NAMES, "printed", "intended", *phases.MATCHING, "flip_crop+cutout", "flip+learned"],
    "rows of the table; A+B: A, then B; A:B: A for half of the images (learned: those with an "
    f"affine transform), B for the others; of {ALLOWED}; of {TRAINED[0]} to {TRAINED[-1]} at most "
    "one, as the last of those joined by +",
)


def main(settings: cli.Settings) -> None:
    """Trains every policy with every seed, and writes what came out to the run's folder."""
    names = _check(POLICIES.value)
    others = on_first(partial(_others_begun, settings, names))
    config = settings.config
    train_set, test_set = run_inputs.load_data(config, settings.data_dir)
    examples = run_inputs.chosen_examples(train_set, config)
    classes, bounds = len(train_set.class_names), phases.affine_bounds(config.bounds)
    policies = {name: _row(name, classes, bounds) for name in (*names, *others)}
    rows = phases.comparison(
        config,
        phases.make_classifier(config, classes),
        policies,
        train_set.images.shape[1:],
        examples // config.batch_size,
    )
    legs = sum((rows[name] for name in names), ())
    with run_inputs.open_run(settings, train_set, test_set, legs) as make_run:
        for seed in range(settings.seeds):
            run = make_run(*run_inputs.choose(train_set, test_set, config, seed))
            for name in names:
                _train(settings, run, name, policies[name], rows[name], seed)
                on_first(partial(_write, settings, rows))
        result = on_first(partial(_write, settings, rows))
        on_first(partial(_draw_table, settings.workdir, result))
    _print(settings, result)


def _check(names: Sequence[str]) -> tuple[str, ...]:
    """Raises UsageError unless each name is of a policy, or of several joined by + and :."""
    for name in names:
        if len(name) > LONGEST_NAME:
            raise cli.UsageError(f"--policies: {name!r} has more than {LONGEST_NAME} characters")
        if not _is_row(name):
            raise cli.UsageError(
                f"--policies: {name!r} is not allowed (of {ALLOWED}; + joins several, "
                f"one of {', '.join(TRAINED)} as the last at most; : two that do not mix images, "
                f"{' or '.join(phases.MATCHING)} before it)"
            )
    if not names or len(set(names)) < len(names):
        raise cli.UsageError(
            f"--policies={','.join(names)} is not allowed (one or more, once each)"
        )
    return tuple(names)


def _is_row(name: str) -> bool:
    first, colon, others = name.partition(":")
    parts = first.split("+")
    trained = [part for part in parts if part in TRAINED]
    if not is_policy(name, TRAINED) or trained not in ([], parts[-1:]):
        return False
    return not colon or (is_policy(others) and set(trained) <= set(phases.MATCHING))


def _others_begun(settings: cli.Settings, names: Sequence[str]) -> tuple[str, ...]:
    """Rows that the run's folder has beside these; the table keeps those that are done."""
    found = dict.fromkeys(record["branch"] for record in run_outputs.all_records(settings))
    return tuple(name for name in found if name not in names and _is_row(name))


def _row(name: str, num_classes: int, bounds: AffineBounds = WIDE_BOUNDS) -> phases.Row:
    first, _, others = name.partition(":")
    *fixed, last = first.split("+")
    if last not in TRAINED:
        return phases.Row(named_policy(name, num_classes, bounds))
    rest = named_policy(others, num_classes, bounds) if others else None
    return phases.Row(named_policy("+".join(fixed), num_classes, bounds), last, rest)


def _train(
    settings: cli.Settings,
    run: train.Run,
    name: str,
    row: phases.Row,
    legs: Sequence[phases.Phase],
    seed: int,
) -> None:
    """Trains a row with a seed, unless it is done; with the first seed draws what it does."""
    picture = run.workdir / "figures" / f"{run_folder.file_name(name)}.png"

    def done() -> bool:
        there = seed in _accuracies(run_outputs.records(settings, legs), legs[-1])
        return there and (seed > 0 or picture.exists())

    if on_first(done):
        for leg in legs:
            run.clock.skip(leg, leg.epochs)
        return
    state = None
    for leg in legs:
        state = train.train_phase(run, leg, seed, state)
    if seed == 0:
        from_boxes = row.augmenter in phases.MATCHING
        versions = _versions_program(row.policy, from_boxes)(state, run.data)
        on_first(partial(_draw_versions, picture, name, *jax.device_get(versions)))


def _draw_versions(
    path: Path,
    name: str,
    images: np.ndarray,
    versions: np.ndarray,
    theta: np.ndarray | None,
    color: np.ndarray | None,
) -> None:
    from maxent_aug import figures  # matplotlib writes a cache of fonts when it is imported

    title, words = f"{name}: inputs, eight times augmented", None
    if theta is not None:
        title += "; below, what the augmenter did"
        size, colors = images.shape[1:3], [None] * len(theta) if color is None else color
        words = [diagnostics.describe(t, size, c) for t, c in zip(theta, colors, strict=True)]
    run_outputs.save_figure(path, figures.versions(images, versions, title=title, words=words))


@programs.keep_programs
def _versions_program(policy: programs.Policy, from_boxes: bool) -> Callable:
    """Compiles `_versions` of a row."""
    return jax.jit(partial(_versions, policy, from_boxes))


def _versions(
    policy: programs.Policy, from_boxes: bool, state: steps.State, on_device: programs.Data
) -> tuple[Array, Array, Array | None, Array | None]:
    """The first images of the test set [N, H, W, C] and as they are trained on [N, 8, H, W, C].

    And, if there is an augmenter, its theta [N, 8, 2, 3], and color [N, 8, 4] if it changes that;
    one that transforms a share of the images transforms all of these.
    """
    images, labels = on_device.test_images[:PICTURES], on_device.test_labels[:PICTURES]
    mean, sd = on_device.mean, on_device.sd

    def version(key: Array) -> tuple[Array, Array | None, Array | None]:
        changed, _ = policy(
            key, images, labels, lambda x: state.classifier(steps.normalize(x, mean, sd))
        )
        changed, theta, color = steps.normalize(changed, mean, sd), None, None
        if (augmenter := state.augmenter) is not None:
            if from_boxes:
                uncertainty = losses.uncertainty(state.classifier(changed))
                changed, theta, color, _ = augmenter(changed, key, uncertainty, method="transform")
            else:
                changed, theta = augmenter(changed, key)
        return steps.denormalize(changed, mean, sd), theta, color

    drawn = jax.lax.map(version, jax.random.split(jax.random.key(0), PICTURES))
    return images, *jax.tree.map(lambda each: jax.numpy.moveaxis(each, 0, 1), drawn)


def _accuracies(records: Sequence[metrics.Record], last: phases.Phase) -> dict[int, float]:
    """Test accuracy at the end of a row, by seed."""
    return metrics.accuracies(records, last.branch, last.kind, last.epochs)


def _write(settings: cli.Settings, rows: Mapping[str, Sequence[phases.Phase]]) -> dict[str, Any]:
    """Writes compare.json: its content."""
    result = _result(settings, rows)
    run_folder.write_json(settings.workdir / "compare.json", result)
    return result


def _result(settings: cli.Settings, rows: Mapping[str, Sequence[phases.Phase]]) -> dict[str, Any]:
    """The content of compare.json, with the rows that are done, the best first."""
    records = run_outputs.records(settings, chain(*rows.values()))
    # Of one that is replayed the phase before may be in training again.
    trained = {(r["branch"], r["phase"]) for r in records}
    found = {
        name: _accuracies(records, legs[-1])
        for name, legs in rows.items()
        if trained.issuperset((leg.branch, leg.kind) for leg in legs)
    }
    found = {name: accuracies for name, accuracies in found.items() if accuracies}
    seconds = {name: _seconds_per_run(records, rows[name]) for name in found}
    table = {}
    for name in sorted(found, key=lambda name: -np.mean(list(found[name].values()))):
        accuracies = found[name]
        differences = {
            f"to_{control}": _paired_difference(accuracies, found[control])
            for control in CONTROLS
            if control in found and control != name
        }
        table[name] = {
            **metrics.mean_and_sd(accuracies.values()),
            **differences,
            "seconds": seconds[name],
            "seconds_to_identity": seconds[name] / seconds["identity"]
            if "identity" in seconds
            else None,
            "per_seed": {str(seed): value for seed, value in accuracies.items()},
        }
    note = (
        "accuracy of the last epoch; one recipe of training for all; fixed policies have the "
        "settings of their papers, the learned one's were chosen on held-out training images"
    )
    return run_outputs.result(settings, records, note=note, table=table)


def _seconds_per_run(records: Sequence[metrics.Record], legs: Sequence[phases.Phase]) -> float:
    """Of a row: the median epoch of each phase times its epochs, whatever paused the machine.

    The lower of two: the first epoch compiles.
    """
    total = 0.0
    for leg in legs:
        own = [r for r in records if (r["branch"], r["phase"]) == (leg.branch, leg.kind)]
        total += leg.epochs * median_low(r["seconds"] for r in own)
    return total


def _paired_difference(
    accuracies: Mapping[int, float], control: Mapping[int, float]
) -> dict[str, Any] | None:
    """Mean difference over the seeds of both, and its 95 % interval by Student's t."""
    pairs = [accuracies[seed] - control[seed] for seed in accuracies.keys() & control.keys()]
    if not pairs:
        return None
    found = metrics.mean_and_sd(pairs)
    low = high = None
    if found["sd"] is not None:
        margin = float(stats.t.ppf(0.975, len(pairs) - 1)) * found["sd"] / len(pairs) ** 0.5
        low, high = found["mean"] - margin, found["mean"] + margin
    return found | {"low": low, "high": high}


def _draw_table(workdir: Path, result: Mapping[str, Any]) -> None:
    from maxent_aug import figures

    figure = figures.comparison(result["table"])
    run_outputs.save_figure(workdir / "figures" / "comparison.png", figure)


def _print(settings: cli.Settings, result: Mapping[str, Any]) -> None:
    heads = [f"minus {control} (95 %)" for control in CONTROLS]
    wide = max(map(len, (*result["table"], "entropy_magnitude")))
    print(f"\non {result['tested_on']}:")
    print(f"{'':<{wide + 4}}accuracy      sd   n{heads[0]:>28}{heads[1]:>28}  time / identity")
    for name, row in result["table"].items():
        sd = "     -" if row["sd"] is None else f"{row['sd']:.4f}"
        against = "".join(f"{_interval(row.get(f'to_{control}')):>28}" for control in CONTROLS)
        ratio = row["seconds_to_identity"]
        time = "-" if ratio is None else f"{ratio:.2f}"
        print(f"  {name:<{wide}}  {row['mean']:.4f}  {sd}  {row['n']:>2}{against}{time:>17}")
    print(f"\n{result['note']}")
    print(f"{duration(result['seconds'])} on {result['device']}")
    print(f"compare.json, figures/comparison.png and a picture of each row: {settings.workdir}")
    print(f"to go on: {cli.with_more_seeds(settings)}")


def _interval(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return "-"
    if difference["low"] is None:
        return f"{difference['mean']:+.4f}"
    return f"{difference['mean']:+.4f} ({difference['low']:+.4f}, {difference['high']:+.4f})"


if __name__ == "__main__":
    cli.run("compare", COMPARISON_PRESETS, main)
