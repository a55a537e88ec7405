"""Do images of high entropy teach more? Which images to label, by four ways of asking.

A small set is labelled; after each round of training the classifier asks for the labels of more
images: those of maximum entropy, those of the smallest margin between its two likeliest classes,
those of the largest predicted loss (Yoo and Kweon 2019), or random ones. Run it again in the same
folder to resume, or to add strategies and seeds.

  python -m experiments.active_learning --preset=small --seeds=3
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array

from experiments import cli, run_inputs, run_outputs
from maxent_aug import losses, metrics, models, phases, programs, run_folder, steps, train
from maxent_aug.config import ACTIVE_LEARNING_PRESETS, ActiveLearning, Labels
from maxent_aug.data import Dataset
from maxent_aug.processes import on_first
from maxent_aug.progress import duration

STRATEGIES = ("random", "entropy", "margin", "learning_loss")
# Of the first round's updates: in the paper 120 of 200 epochs.
BACKBONE_SHARE = 0.6

ASKED = flags.DEFINE_list(
    "strategies", list(STRATEGIES), f"what to compare, of {', '.join(STRATEGIES)}"
)


def main(settings: cli.Settings) -> None:
    """Runs all rounds of all strategies for all seeds, and writes what came out."""
    config, strategies = settings.config, _check(ASKED.value, settings.config.batch_size)
    train_set, test_set = run_inputs.load_data(config, settings.data_dir, may_stream=False)
    sizes = _sizes(config, run_inputs.chosen_examples(train_set, config))
    make_legs = cache(partial(_legs, config, train_set, sizes))
    every_leg = tuple(leg for strategy in strategies for leg in make_legs(strategy))
    with run_inputs.open_run(settings, train_set, test_set, every_leg) as make_run:
        for seed in range(settings.seeds):
            pool, tested = run_inputs.choose(train_set, test_set, config, seed)
            for strategy in strategies:
                queries = _Queries(
                    settings.workdir / "labels",
                    strategy,
                    seed,
                    config.labels.query,
                    len(pool.images),
                )
                state, labelled = None, _draw(np.arange(len(pool.images)), sizes[0], seed, 0)
                for number, leg in enumerate(make_legs(strategy)):
                    chosen = Dataset(pool.images[labelled], pool.labels[labelled], pool.class_names)
                    run = make_run(chosen, tested)
                    state = train.train_phase(run, leg, seed, state)
                    if number < config.labels.rounds:
                        ask = partial(
                            _ask, config.labels, run, pool, labelled, state, strategy, seed, number
                        )
                        labelled = np.concatenate([labelled, queries.get(number, ask)])
        tabulated = {strategy: make_legs(strategy) for strategy in STRATEGIES}
        result = on_first(partial(_write, settings, tabulated, sizes))
    _print(settings, result)


def _check(strategies: Sequence[str], batch_size: int) -> tuple[str, ...]:
    """Raises UsageError unless each is a known one, that batches of so many will do for."""
    wrong = [name for name in strategies if name not in STRATEGIES]
    if wrong or not strategies or len(set(strategies)) < len(strategies):
        raise cli.UsageError(
            f"--strategies={','.join(strategies)} is not allowed (one or more, once each, of "
            f"{', '.join(STRATEGIES)})"
        )
    if "learning_loss" in strategies and batch_size < 2:
        raise cli.UsageError(
            f"--config.batch_size={batch_size} is not allowed: learning_loss compares pairs "
            "(2 or more)"
        )
    return tuple(strategies)


def _sizes(config: ActiveLearning, pool: int) -> tuple[int, ...]:
    """Labelled images in each round, of so many; UsageError if these or batches cannot be."""
    labels = config.labels
    last = labels.first + labels.rounds * labels.query
    if last > pool:
        raise cli.UsageError(
            f"--config.labels: {labels.first} first and {labels.rounds} queries of {labels.query} "
            f"are {last} labels, there are {pool} training images"
        )
    if labels.first < config.batch_size:
        raise cli.UsageError(
            f"--config.labels.first={labels.first} is less than "
            f"--config.batch_size={config.batch_size}"
        )
    if 0 < labels.candidates < labels.query:
        raise cli.UsageError(
            f"--config.labels.candidates={labels.candidates} is less than "
            f"--config.labels.query={labels.query} (0 for all unlabelled images)"
        )
    return tuple(labels.first + number * labels.query for number in range(labels.rounds + 1))


def _legs(
    config: ActiveLearning, train_set: Dataset, sizes: Sequence[int], strategy: str
) -> tuple[phases.Phase, ...]:
    """A phase for each round; the weights are those of the round before, the optimiser is new."""
    classifier = phases.make_classifier(config, len(train_set.class_names))
    step: Callable = steps.classifier_step
    if strategy == "learning_loss":
        classifier = models.LossPredictor(classifier)
        updates = config.epochs.first * (sizes[0] // config.batch_size)
        backbone_updates = min(round(BACKBONE_SHARE * updates), phases.LAST_UPDATE)
        step = partial(steps.loss_prediction_step, backbone_updates=backbone_updates)
    legs: list[phases.Phase] = []
    for size in sizes:
        epochs = config.epochs.later if legs else config.epochs.first
        tx = phases.scheduled_sgd(config.classifier, epochs * (size // config.batch_size))
        begin = partial(phases.fresh_optimizer, tx)
        if not legs:
            shape = train_set.images.shape[1:]
            begin = partial(phases.begin_classifier, classifier, shape, tx)
        follows = legs[-1] if legs else None
        branch = f"{strategy}-{size}"
        legs.append(phases.Phase(branch, "train", epochs, begin, step, steps.eval_step, follows))
    return tuple(legs)


def _draw(pool: np.ndarray, count: int, seed: int, number: int) -> np.ndarray:
    """So many of the pool at random, the same for all strategies."""
    return np.random.default_rng([seed, number]).permutation(pool)[:count]


def _ask(
    labels: Labels,
    run: train.Run,
    pool: Dataset,
    labelled: np.ndarray,
    state: steps.State,
    strategy: str,
    seed: int,
    number: int,
) -> np.ndarray:
    """The images that are to be labelled next, as indices of the pool."""
    unlabelled = np.setdiff1d(np.arange(len(pool.images)), labelled)
    candidates = _draw(unlabelled, labels.candidates or len(unlabelled), seed, number + 1)
    if strategy == "random":
        return candidates[: labels.query]
    images, none = programs.put(run.mesh, pool.images[candidates], pool.labels[candidates])
    asked = run.data.replace(test_images=images, test_labels=none)
    scores = programs.evaluate(
        SCORES[strategy], state, asked, run.mesh, run.config.eval_batch_size
    )["score"]
    return candidates[np.argsort(-scores, kind="stable")[: labels.query]]


def _entropy_score(
    state: steps.State, images: Array, labels: Array, key: Array
) -> dict[str, Array]:
    del labels, key
    return {"score": losses.entropy(state.classifier(images))}


def _margin_score(state: steps.State, images: Array, labels: Array, key: Array) -> dict[str, Array]:
    del labels, key
    first, second = jnp.moveaxis(
        jax.lax.top_k(jax.nn.softmax(state.classifier(images)), 2)[0], -1, 0
    )
    return {"score": second - first}


def _loss_score(state: steps.State, images: Array, labels: Array, key: Array) -> dict[str, Array]:
    del labels, key
    return {"score": state.classifier(images, method="with_loss")[1]}


SCORES = {"entropy": _entropy_score, "margin": _margin_score, "learning_loss": _loss_score}


class _Queries:
    """The queries of a strategy and a seed that have been made, kept in a file.

    Raises RunFolderError for one that does not hold queries of so many of the pool's images.
    """

    def __init__(self, folder: Path, strategy: str, seed: int, query: int, pool: int) -> None:
        self._path = folder / f"seed{seed}-{strategy}.json"
        self._made = on_first(partial(self._read, query, pool))

    def _read(self, query: int, pool: int) -> list[list[int]]:
        if not self._path.exists():
            return []
        try:
            made = np.array(json.loads(self._path.read_bytes()))
        except (ValueError, RecursionError):
            made = np.array(None)
        fits = made.dtype.kind == "i" and made.ndim == 2 and made.shape[1] == query
        if not fits or len(set(made.flat) & set(range(pool))) < made.size:
            raise run_folder.RunFolderError(
                f"{self._path} is damaged; put it back, or delete it and it is made again"
            )
        return made.tolist()

    def get(self, number: int, ask: Callable[[], np.ndarray]) -> np.ndarray:
        """The query of a round; asked for and written if it is the first time."""
        if number == len(self._made):
            self._made.append(ask().tolist())
            on_first(self._write)
        return np.array(self._made[number])

    def _write(self) -> None:
        self._path.parent.mkdir(exist_ok=True)
        run_folder.write_json(self._path, self._made)


def _write(
    settings: cli.Settings, legs: Mapping[str, Sequence[phases.Phase]], sizes: Sequence[int]
) -> dict[str, Any]:
    """Writes what came out to the run's folder: the content of active_learning.json."""
    result = _result(settings, legs, sizes)
    run_folder.write_json(settings.workdir / "active_learning.json", result)
    _draw_curves(settings.workdir, result)
    return result


def _result(
    settings: cli.Settings, legs: Mapping[str, Sequence[phases.Phase]], sizes: Sequence[int]
) -> dict[str, Any]:
    """The content of active_learning.json: the strategies and seeds that are done."""
    records = run_outputs.records(settings, chain(*legs.values()))
    curves = {}
    for strategy, own in legs.items():
        rounds = [metrics.accuracies(records, leg.branch, leg.kind, leg.epochs) for leg in own]
        done = sorted(set.intersection(*map(set, rounds)))
        if not done:
            continue
        per_seed = [[accuracy[seed] for accuracy in rounds] for seed in done]
        sd = np.std(per_seed, axis=0, ddof=1).tolist() if len(per_seed) > 1 else None
        curves[strategy] = {
            "mean": np.mean(per_seed, axis=0).tolist(),
            "sd": sd,
            "mean_over_rounds": np.mean(per_seed, axis=1).tolist(),
            "per_seed": per_seed,
        }
    result = run_outputs.result(settings, records, labelled=list(sizes), curves=curves)
    result["data"]["pool"] = result["data"].pop("trained_on")  # of which some are labelled
    return result


def _draw_curves(workdir: Path, result: Mapping[str, Any]) -> None:
    from maxent_aug import figures  # matplotlib writes a cache of fonts when it is imported

    per_seed = {name: curve["per_seed"] for name, curve in result["curves"].items()}
    figure = figures.label_curves(result["labelled"], per_seed)
    run_outputs.save_figure(workdir / "figures" / "active_learning.png", figure)


def _print(settings: cli.Settings, result: Mapping[str, Any]) -> None:
    print(f"\naccuracy on {result['tested_on']}")
    print(f"{'labelled':<24}" + "".join(f"{n:>9}" for n in result["labelled"]))
    for name, curve in result["curves"].items():
        print(f"  {name:<22}" + "".join(f"{value:>9.4f}" for value in curve["mean"]))
        if curve["sd"] is not None:
            print(f"  {'  sd':<22}" + "".join(f"{value:>9.4f}" for value in curve["sd"]))
    print(f"\n{duration(result['seconds'])} on {result['device']}")
    print(f"active_learning.json and figures/active_learning.png in {settings.workdir}")
    print(f"to go on: {cli.with_more_seeds(settings)}")


if __name__ == "__main__":
    cli.run("active_learning", ACTIVE_LEARNING_PRESETS, main)
