"""Why the augmenter collapses: all variants of the paper's phase 2, from one pretrained classifier.

Form of the loss, discriminator or alone, theta free or bounded, one transform for an image or noise
about it. Each variant is trained for phases 2 and 3; what collapsed, and how, is read off the test
images at the end of phase 2. Run it again in the same folder to resume, or to add seeds.

  python -m experiments.ablation --preset=quick              digits, all 32 variants
  python -m experiments.ablation --preset=small --seeds=3    5,000 images of CIFAR-10
  python -m experiments.ablation --config.factors.loss_forms=intended,target
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from experiments import cli, run_inputs, run_outputs
from maxent_aug import metrics, phases, run_folder, train
from maxent_aug.config import ABLATION_PRESETS
from maxent_aug.processes import on_first
from maxent_aug.progress import duration

MEASURES = (
    "distance_from_identity", "spread_of_images", "spread_of_draws", "beyond_bounds",
    "outside_frame", "entropy_before", "entropy_after", "test_augmented_accuracy",
)  # fmt: skip
# A collapse has happened beyond these; ours, and printed below the table.
NO_DISTANCE = 0.05  # ||theta - identity||: a quarter of a pixel at the corners of 32x32
ONE_TRANSFORM = 0.25  # spread of images and draws, of the distance
AT_BOUNDS = 0.5  # share of coordinates
LOST_ACCURACY = 0.3


def main(settings: cli.Settings) -> None:
    """Trains every variant with every seed, and writes what came out to the run's folder."""
    config = settings.config
    train_set, test_set = run_inputs.load_data(config, settings.data_dir)
    shape = train_set.images.shape[1:]
    classifier = phases.make_classifier(config, len(train_set.class_names))
    pretrain, baseline, variants = phases.ablation(config, classifier, shape)
    legs = (pretrain, baseline, *sum(variants.values(), ()))
    with run_inputs.open_run(settings, train_set, test_set, legs) as make_run:
        for seed in range(settings.seeds):
            run = make_run(*run_inputs.choose(train_set, test_set, config, seed))
            begun = train.train_phase(run, pretrain, seed, None)
            train.train_phase(run, baseline, seed, begun)
            for augment, finetune in variants.values():
                learned = train.train_phase(run, augment, seed, begun)
                train.train_phase(run, finetune, seed, learned)
        result = on_first(partial(_write, settings, legs, baseline, variants))
    _print(settings, result)


def _write(
    settings: cli.Settings,
    legs: Sequence[phases.Phase],
    baseline: phases.Phase,
    variants: Mapping[tuple[str, ...], Sequence[phases.Phase]],
) -> dict[str, Any]:
    """Writes ablation.json and the plot: the content of the first."""
    from maxent_aug import figures  # matplotlib writes a cache of fonts when it is imported

    records = run_outputs.complete_records(settings, legs)
    rows = {
        "-".join(variant): _row(records, own, bounded=variant[2] == "bounded")
        for variant, own in variants.items()
    }
    result = run_outputs.result(
        settings,
        records,
        thresholds={
            "identity": NO_DISTANCE,
            "constant": ONE_TRANSFORM,
            "bound": AT_BOUNDS,
            "unrecognisable": LOST_ACCURACY,
        },
        without_augmenter=_accuracy(records, baseline),
        table=rows,
        factors=_marginals(variants, rows),
    )
    run_folder.write_json(settings.workdir / "ablation.json", result)
    figure = figures.collapses(rows, no_distance=NO_DISTANCE, one_transform=ONE_TRANSFORM)
    run_outputs.save_figure(settings.workdir / "figures" / "collapses.png", figure)
    return result


def _row(
    records: Sequence[metrics.Record], legs: Sequence[phases.Phase], *, bounded: bool
) -> dict[str, Any]:
    """Of a variant: means and deviations over seeds, each epoch of phase 2, and its collapses."""
    augment, finetune = legs
    own = [r for r in records if (r["branch"], r["phase"]) == (augment.branch, "augment")]
    last = [r for r in own if r["epoch"] == augment.epochs]
    means = {name: float(np.mean([r[name] for r in last])) for name in MEASURES}
    # Phase 2 leaves the classifier alone: its accuracy is that of the pretrained one.
    before = float(np.mean([r["test_accuracy"] for r in last]))
    return {
        "accuracy": _accuracy(records, finetune),
        "accuracy_pretrained": before,
        **means,
        "sd": {name: metrics.mean_and_sd(r[name] for r in last)["sd"] for name in MEASURES},
        "collapses": _collapses(means, before, bounded=bounded),
        "epochs": [
            {name: float(np.mean([r[name] for r in own if r["epoch"] == e])) for name in MEASURES}
            for e in sorted({r["epoch"] for r in own if "beyond_bounds" in r})
        ],
    }


def _accuracy(records: Sequence[metrics.Record], finetune: phases.Phase) -> dict[str, Any]:
    """At the end of phase 3: mean, sd and n."""
    found = metrics.accuracies(records, finetune.branch, finetune.kind, finetune.epochs)
    return metrics.mean_and_sd(found.values())


def _collapses(means: Mapping[str, float], accuracy: float, *, bounded: bool) -> list[str]:
    """To what a variant has collapsed: any of identity, constant, bound, unrecognisable."""
    distance = means["distance_from_identity"]
    spread = float(np.hypot(means["spread_of_images"], means["spread_of_draws"]))
    found = {
        "identity": distance < NO_DISTANCE,
        "constant": distance >= NO_DISTANCE and spread < ONE_TRANSFORM * distance,
        "bound": bounded and means["beyond_bounds"] > AT_BOUNDS,
        "unrecognisable": accuracy - means["test_augmented_accuracy"] > LOST_ACCURACY,
    }
    return [name for name, is_so in found.items() if is_so]


def _marginals(
    variants: Mapping[tuple[str, ...], Any], rows: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """For each level of each factor, means over all variants with it."""
    found = {}
    for factor, level in dict.fromkeys(chain(*map(enumerate, variants))):
        own = [rows["-".join(variant)] for variant in variants if variant[factor] == level]
        shares = {
            name: float(np.mean([name in row["collapses"] for row in own]))
            for name in ("identity", "constant", "bound", "unrecognisable")
        }
        means = {name: float(np.mean([row[name] for row in own])) for name in MEASURES}
        accuracy = float(np.mean([row["accuracy"]["mean"] for row in own]))
        found[level] = {"accuracy": accuracy, "collapsed": shares, **means}
    return found


def _print(settings: cli.Settings, result: Mapping[str, Any]) -> None:
    heads = "accuracy   from I   images    draws   bounds  outside     bits   on augmented"
    print(f"\n{'on ' + result['tested_on']:<46}{heads}   collapse to")
    for name, row in result["table"].items():
        values = "".join(f"{row[measure]:>9.3f}" for measure in MEASURES[:5])
        print(
            f"  {name:<44}{row['accuracy']['mean']:>8.4f}{values}{row['entropy_after']:>9.2f}"
            f"{row['test_augmented_accuracy']:>15.3f}   {', '.join(row['collapses']) or '-'}"
        )
    print(f"  {'no augmenter in phase 3':<44}{result['without_augmenter']['mean']:>8.4f}")
    print(
        f"(identity: from I below {NO_DISTANCE}; constant: images and draws below {ONE_TRANSFORM} "
        f"of from I;\n bound: bounds above {AT_BOUNDS}; unrecognisable: {LOST_ACCURACY} lost on "
        "augmented images)"
    )
    print("\nMeans over the variants with each:")
    for level, row in result["factors"].items():
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["collapsed"].items())
        print(f"  {level:<20}accuracy {row['accuracy']:.4f}   {shares}")
    print(f"\n{duration(result['seconds'])} on {result['device']}")
    print(f"ablation.json and figures/collapses.png in {settings.workdir}")
    print(f"to go on: {cli.with_more_seeds(settings)}")


if __name__ == "__main__":
    cli.run("ablation", ABLATION_PRESETS, main)
