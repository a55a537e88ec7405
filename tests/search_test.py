"""The search for bounds from end to end on 48 digits."""

import dataclasses
import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run

import maxent_aug as ma
from experiments import cli, search
from experiments.named_policies import named_policy
from maxent_aug import metrics, phases, train
from maxent_aug.config import Bounds, Data, Search, SearchEpochs
from maxent_aug.spatial import WIDE_BOUNDS

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = Search(
    data=Data(held_out=16),
    trials=2,
    epochs=SearchEpochs(2),
    batch_size=16,
    eval_batch_size=16,
    evaluate_every=2,
)


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Runs the search in tmp_path: the content of search.json."""
    small_run.make_small(monkeypatch)
    make, known = phases.search, {}

    def legs_once(*arguments):  # whose programs then need not be compiled again
        known.update(known or make(*arguments))
        return dict(known)

    monkeypatch.setattr(phases, "search", legs_once)

    def call(config=CONFIG, seeds=1):
        search.main(cli.Settings("search", "tiny", config, tmp_path, None, seeds))
        return json.loads((tmp_path / "search.json").read_text())

    return call


def test_the_best_trial_comes_first_and_a_stopped_search_goes_on(go, tmp_path, monkeypatch, capsys):
    real, trained = train._train_epoch, []

    def stopping(leg, epoch, at):
        trained.append((leg.seed, leg.phase.branch, epoch))
        if len(trained) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(leg, epoch, at)

    monkeypatch.setattr(train, "_train_epoch", stopping)
    with pytest.raises(train.Interrupted):
        go()
    result = go()
    assert sorted(set(trained)) == [(0, f"trial-0{t}", e) for t in range(2) for e in range(2)]
    assert len(trained) - len(set(trained)) <= 1  # what the stop had begun
    found = {
        r["branch"]: r["test_accuracy"]
        for r in metrics.read(tmp_path / "metrics.jsonl")
        if r["epoch"] == 2
    }
    assert {name: row["mean"] for name, row in result["table"].items()} == found
    assert list(result["table"]) == sorted(found, key=lambda name: -found[name])
    assert result["best"] == next(iter(result["table"]))
    flags = search.as_flags(result["table"][result["best"]]["bounds"])
    assert flags in capsys.readouterr().out
    again = {name: float(value) for name, value in (f[16:].split("=") for f in flags.split())}
    assert again == result["table"][result["best"]]["bounds"]
    more = go(seeds=2)
    assert {row["n"] for row in more["table"].values()} == {2}
    # Of a search that was stopped in a later seed only seeds that all trials have are compared.
    kept = [
        r
        for r in metrics.read(tmp_path / "metrics.jsonl")
        if (r["seed"], r["branch"], r["epoch"]) != (1, "trial-01", 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    assert go()["table"] == result["table"]


def test_trials_fill_the_space_of_bounds():
    most = Bounds()
    drawn = [dataclasses.astuple(search.draw(most, trial)) for trial in range(400)]
    assert drawn == [dataclasses.astuple(search.draw(most, trial)) for trial in range(400)]
    shares = np.array(
        [
            [s / most.shift, r / most.rotation]
            + [math.log(x) / math.log(m) for x, m in ((c, most.scale), (a, most.aspect))]
            + [h / most.shear]
            for s, r, c, a, h in drawn
        ]
    )
    assert shares.min() >= 0 and shares.max() <= 1 + 1e-3
    np.testing.assert_allclose(shares.mean(0), 0.5, atol=0.05)
    np.testing.assert_allclose(shares.std(0), 1 / math.sqrt(12), atol=0.03)
    assert np.abs(np.corrcoef(shares.T) - np.eye(5)).max() < 0.2


def test_half_affine_transforms_half_of_the_images_within_its_bounds():
    grid = np.asarray(ma.affine_grid(np.eye(2, 3), (24, 32)), np.float32)
    images = jnp.asarray(np.broadcast_to(100 + 100 * grid[..., :1], (400, 24, 32, 1)))
    labels = jnp.zeros(400, jnp.int32)
    none = phases.affine_bounds(Bounds(0.0, 0.0, 1.0, 1.0, 0.0))
    for bounds, whole_pixels in ((none, 1.0), (WIDE_BOUNDS, 0.5)):
        policy = named_policy("half_affine", 10, bounds)
        out, same = jax.jit(lambda key, p=policy: p(key, images, labels, None))(jax.random.key(0))
        inside = np.asarray(out)[:, 8:16, 8:24, 0]
        step = np.abs(np.diff(inside, axis=2))  # of an image that is not resampled: a pixel's
        whole = np.isclose(step, 100 * 2 / 32, atol=1e-3).all(axis=(1, 2))
        assert abs(whole.mean() - whole_pixels) <= 4 * math.sqrt(0.25 / 400) * (whole_pixels < 1)
        assert same is labels or bool(jnp.all(same == labels))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"policy": "flip"}, "--config.policy"),
        ({"policy": "half_affine+x"}, "--config.policy"),
        ({"policy": ""}, "--config.policy"),
        ({"data": Data()}, "--config.data.held_out"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything(go, tmp_path, change, named):
    with pytest.raises(cli.UsageError, match=named):
        go(dataclasses.replace(CONFIG, **change))
    assert not list(tmp_path.iterdir())
