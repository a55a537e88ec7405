"""The best bounds of random affine transforms, by a search: what learning them has to beat.

Draws bounds at random, trains a classifier under each, as experiments.compare does, and tests it on
training images that were held out. half_affine flips every other image, shifts a half of them by
whole pixels as flip_crop does, and transforms the other half, as a learned augmenter does. Run it
again in the same folder to resume, or to add seeds.

  python -m experiments.search --preset=small               20 trials on 5,000 images of CIFAR-10
  python -m experiments.search --config.policy=random_affine
"""

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from experiments import cli, run_inputs, run_outputs
from experiments.named_policies import AFFINE, KNOWN, is_policy, named_policy
from maxent_aug import metrics, phases, run_folder, train
from maxent_aug.config import SEARCH_PRESETS, Bounds, Search
from maxent_aug.processes import on_first
from maxent_aug.progress import duration


def main(settings: cli.Settings) -> None:
    """Trains every trial with every seed, and writes what came out to the run's folder."""
    config = settings.config
    _check(config)
    train_set, test_set = run_inputs.load_data(config, settings.data_dir)
    classes, shape = len(train_set.class_names), train_set.images.shape[1:]
    examples = run_inputs.chosen_examples(train_set, config)
    trials = {f"trial-{i:02}": draw(config.bounds, i) for i in range(config.trials)}
    policies = {
        name: named_policy(config.policy, classes, phases.affine_bounds(bounds))
        for name, bounds in trials.items()
    }
    classifier = phases.make_classifier(config, classes)
    legs = phases.search(config, classifier, policies, shape, examples // config.batch_size)
    with run_inputs.open_run(settings, train_set, test_set, tuple(legs.values())) as make_run:
        for seed in range(settings.seeds):
            run = make_run(*run_inputs.choose(train_set, test_set, config, seed))
            for leg in legs.values():
                train.train_phase(run, leg, seed, None)
        result = on_first(partial(_write, settings, trials, legs))
    _print(settings, result)


def _check(config: Search) -> None:
    """Raises UsageError unless there is a policy with bounds, and images to choose by."""
    if not is_policy(config.policy) or not any(name in config.policy for name in AFFINE):
        raise cli.UsageError(
            f"--config.policy={config.policy} is not allowed ({KNOWN}; one of {', '.join(AFFINE)} "
            "among them)"
        )
    if not config.data.held_out:
        raise cli.UsageError(
            "--config.data.held_out=0 is not allowed: a search needs training images to choose by"
        )


def draw(most: Bounds, trial: int) -> Bounds:
    """A trial's bounds: each uniform from none to the most, those of a ratio in its logarithm."""
    shares = np.random.default_rng(trial).uniform(size=5)
    scaled = (
        most.shift * shares[0],
        most.rotation * shares[1],
        math.exp(math.log(most.scale) * shares[2]),
        math.exp(math.log(most.aspect) * shares[3]),
        most.shear * shares[4],
    )
    # Few digits, so that the flags that are printed are the bounds themselves.
    return Bounds(*(float(f"{value:.4g}") for value in scaled))


def as_flags(bounds: Mapping[str, float]) -> str:
    """Bounds as the command line takes them."""
    return " ".join(f"--config.bounds.{name}={value}" for name, value in bounds.items())


def _write(
    settings: cli.Settings, trials: Mapping[str, Bounds], legs: Mapping[str, phases.Phase]
) -> dict[str, Any]:
    """Writes search.json, the best trial first: its content."""
    records = run_outputs.complete_records(settings, legs.values())
    found = {
        name: metrics.accuracies(records, leg.branch, leg.kind, leg.epochs)
        for name, leg in legs.items()
    }
    table = {
        name: {
            "bounds": asdict(trials[name]),
            **metrics.mean_and_sd(found[name].values()),
            "per_seed": {str(seed): value for seed, value in found[name].items()},
        }
        for name in sorted(found, key=lambda name: -np.mean(list(found[name].values())))
    }
    result = run_outputs.result(
        settings,
        records,
        note="accuracy of the last epoch on held-out training images",
        best=next(iter(table)),
        table=table,
    )
    run_folder.write_json(settings.workdir / "search.json", result)
    return result


def _print(settings: cli.Settings, result: Mapping[str, Any]) -> None:
    names = list(asdict(Bounds()))
    print(f"\n{'':<12}accuracy      sd   n" + "".join(f"{name:>10}" for name in names))
    for trial, row in result["table"].items():
        sd = "     -" if row["sd"] is None else f"{row['sd']:.4f}"
        values = "".join(f"{row['bounds'][name]:>10.4g}" for name in names)
        print(f"  {trial:<10}  {row['mean']:.4f}  {sd}  {row['n']:>2}{values}")
    policy, best = settings.config.policy, result["table"][result["best"]]["bounds"]
    print(f"\n{result['note']}")
    print(f"{duration(result['seconds'])} on {result['device']}; search.json in {settings.workdir}")
    without = "config.policy", "config.trials", "config.bounds", "config.data.held_out", "workdir"
    print("the best, on test images:")
    workdir = shlex.quote(f"{settings.workdir}-best")
    print(f"  python -m experiments.compare --workdir={workdir}", end=" ")
    print(f"--policies={policy} {as_flags(best)}", end=" ")
    print(cli.given_flags(lambda name: not name.startswith(without)))


if __name__ == "__main__":
    cli.run("search", SEARCH_PRESETS, main)
