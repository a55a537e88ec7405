"""The ablation from end to end on 48 digits, and how it reads its figures."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import small_run

from experiments import ablation, cli
from maxent_aug import metrics, models, phases, train
from maxent_aug.config import ABLATION_PRESETS, Epochs, Factors

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = dataclasses.replace(
    ABLATION_PRESETS["quick"],
    factors=Factors(loss_forms=("target",), thetas=("bounded",)),
    epochs=Epochs(1, 2, 1),
    batch_size=16,
    eval_batch_size=16,
)


@pytest.fixture
def go(monkeypatch):
    """Runs it in a folder: the content of ablation.json."""
    small_run.make_small(monkeypatch)

    def call(workdir, seeds=1):
        ablation.main(cli.Settings("ablation", "tiny", CONFIG, workdir, None, seeds))
        return json.loads((workdir / "ablation.json").read_text())

    return call


def test_every_variant_is_trained_once_and_has_its_row(go, tmp_path, monkeypatch, capsys):
    result = go(tmp_path)
    names = {
        f"target-{judge}-bounded-{draws}"
        for judge in ("discriminator", "alone")
        for draws in ("deterministic", "stochastic")
    }
    assert set(result["table"]) == names
    shown = capsys.readouterr().out
    ends = [r for r in metrics.read(tmp_path / "metrics.jsonl") if r["branch"] == "baseline"]
    assert result["without_augmenter"]["mean"] == ends[-1]["test_accuracy"]
    for name, row in result["table"].items():
        assert name in shown
        assert (row["spread_of_draws"] > 1e-3) == name.endswith("stochastic")
        assert len(row["epochs"]) == 2 and row["accuracy"]["n"] == 1
    assert set(result["factors"]) == {
        "target", "discriminator", "alone", "bounded", "deterministic", "stochastic"
    }  # fmt: skip
    assert (tmp_path / "figures" / "collapses.png").stat().st_size > 10_000
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert len(records) == 1 + 1 + 4 * (2 + 1)
    with_judge = [r["branch"] for r in records if "test_discriminator_loss" in r]
    assert with_judge and all("-discriminator-" in branch for branch in with_judge)
    monkeypatch.setattr(train, "_train_epoch", lambda *_: pytest.fail("trained again"))
    assert go(tmp_path)["table"] == result["table"]


def test_the_full_factorial_has_one_pretrained_classifier():
    config = ABLATION_PRESETS["small"]
    classifier = phases.make_classifier(config, 10)
    pretrain, baseline, variants = phases.ablation(config, classifier, (8, 8, 1))
    assert len(variants) == 32
    begun = {augment.follows for augment, _ in variants.values()}
    assert begun == {pretrain} == {baseline.follows}
    names = [leg.name for legs in variants.values() for leg in legs]
    assert len({*names, pretrain.name, baseline.name}) == 66


@pytest.mark.parametrize(
    ("changes", "bounded", "expected"),
    [
        ({}, True, []),
        ({"distance_from_identity": 0.01}, True, ["identity"]),
        ({"spread_of_images": 0.01, "spread_of_draws": 0.02}, False, ["constant"]),
        ({"spread_of_images": 0.01, "spread_of_draws": 0.4}, False, []),
        ({"beyond_bounds": 0.6}, True, ["bound"]),
        ({"beyond_bounds": 0.6}, False, []),
        ({"test_augmented_accuracy": 0.1}, False, ["unrecognisable"]),
    ],
)
def test_what_a_collapse_is(changes, bounded, expected):
    means = {
        "distance_from_identity": 0.5,
        "spread_of_images": 0.3,
        "spread_of_draws": 0.0,
        "beyond_bounds": 0.1,
        "test_augmented_accuracy": 0.5,
    }
    assert ablation._collapses(means | changes, 0.6, bounded=bounded) == expected


def test_a_level_is_that_of_its_factor_alone():
    row = dict.fromkeys(ablation.MEASURES, 0.5) | {"accuracy": {"mean": 0.5}, "collapses": []}
    variants = [("a", "alone"), ("b", "judge")]
    rows = {
        "a-alone": row,
        "b-judge": row | {"accuracy": {"mean": 0.7}, "collapses": ["bound"]},
    }
    found = ablation._marginals(dict.fromkeys(variants), rows)
    assert {level: found[level]["accuracy"] for level in found} == {
        "a": 0.5, "b": 0.7, "alone": 0.5, "judge": 0.7,
    }  # fmt: skip
    assert found["judge"]["collapsed"]["bound"] == 1


@pytest.mark.parametrize("bounds", [None, models.AffineBounds()])
@pytest.mark.parametrize("stochastic", [False, True])
def test_variants_of_the_augmenter_start_about_the_identity(bounds, stochastic):
    module = models.Augmenter(bounds=bounds, stochastic=stochastic)
    images, key = jax.random.normal(jax.random.key(0), (100, 8, 8, 1)), jax.random.key(1)
    variables = module.init(key, images, key)
    _, theta = module.apply(variables, images, key)
    away = np.abs(theta - np.eye(2, 3))
    if stochastic:
        assert 0.02 < away.max() < 0.25
        assert np.abs(np.mean(theta, 0) - np.eye(2, 3)).max() < 0.05
        with pytest.raises(ValueError, match="needs a key"):
            module.apply(variables, images)
    else:
        assert away.max() < 1e-6
