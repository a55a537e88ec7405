"""The comparison from end to end on 48 digits, and its statistics."""

import dataclasses
import json
import os
import signal
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from absl import flags
from scipy import stats

from experiments import cli, compare
from maxent_aug import metrics, phases, policies, run_folder, steps, train
from maxent_aug.config import COMPARISON_PRESETS, ComparedEpochs, Comparison

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = Comparison(
    epochs=ComparedEpochs(train=2, augment=1), batch_size=16, eval_batch_size=16, evaluate_every=2
)
ROWS = ("flip+cutmix", "flip+intended", "flip+learned:cutout", "flip+replayed:cutout")
known_legs = {}


def legs_once(config, classifier, rows, *arguments, make=phases.comparison):
    """The same phases in each run, whose programs then need not be compiled again."""
    new = {name: row for name, row in rows.items() if name not in known_legs}
    known_legs.update(make(config, classifier, new, *arguments))
    return {name: known_legs[name] for name in rows}


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Runs the comparison in tmp_path: the content of compare.json."""
    small_run.make_small(monkeypatch)
    monkeypatch.setattr(phases, "comparison", legs_once)
    monkeypatch.setattr(compare, "PICTURES", 2)

    def call(names=ROWS, seeds=1, workdir=tmp_path):
        monkeypatch.setattr(flags.FLAGS["policies"], "value", list(names))
        compare.main(cli.Settings("compare", "tiny", CONFIG, workdir, None, seeds))
        return json.loads((workdir / "compare.json").read_text())

    return call


def test_every_row_trains_and_a_stopped_run_ends_the_same(go, tmp_path, monkeypatch, capsys):
    whole = go(seeds=2, workdir=tmp_path / "whole")
    assert set(whole["table"]) == set(ROWS)
    shown = capsys.readouterr().out
    for name in ROWS:
        assert name in shown
        picture = tmp_path / "whole" / "figures" / f"{run_folder.file_name(name)}.png"
        assert picture.stat().st_size > 10_000
        assert whole["table"][name]["n"] == 2
    assert (tmp_path / "whole" / "figures" / "comparison.png").exists()
    assert any(":" in name for name in ROWS)
    assert not [path for path in (tmp_path / "whole").rglob("*") if ":" in path.name]

    real, trained = train._train_epoch, []

    def stopping(leg, epoch, at):
        trained.append((leg.seed, leg.phase.branch, leg.phase.kind, epoch))
        if len(trained) in (3, 9):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(leg, epoch, at)

    monkeypatch.setattr(train, "_train_epoch", stopping)
    stopped = tmp_path / "stopped"
    for _ in range(2):
        with pytest.raises(train.Interrupted):
            go(workdir=stopped)
    go(workdir=stopped)
    resumed = go(seeds=2, workdir=stopped)  # and more seeds, later
    for name in ROWS:
        assert resumed["table"][name]["per_seed"] == whole["table"][name]["per_seed"]
    assert len(trained) - len(set(trained)) <= 2  # what a stop had begun


def test_rows_can_be_added_and_done_ones_are_not_trained_again(go, tmp_path, monkeypatch):
    go(names=("identity", "flip"))
    before = metrics.read(tmp_path / "metrics.jsonl")
    result = go(names=("flip", "cutout"))
    after = metrics.read(tmp_path / "metrics.jsonl")
    assert after[: len(before)] == before
    assert set(result["table"]) == {"identity", "flip", "cutout"}
    assert all("to_identity" in result["table"][name] for name in ("flip", "cutout"))
    assert result["seconds"] == pytest.approx(sum(r["seconds"] for r in after))
    assert result["tested_on"] == "test images"
    monkeypatch.setattr(train, "train_phase", lambda *_: pytest.fail("trained again"))
    assert go(names=("cutout",))["table"] == result["table"]


def test_the_table_leaves_out_rows_that_are_not_done_and_branches_that_are_no_rows(go, tmp_path):
    go(names=("flip",))
    flip = metrics.read(tmp_path / "metrics.jsonl")
    begun = [r | {"branch": "cutout"} for r in flip if r["epoch"] == 1]
    older = [r | {"branch": "flop"} for r in flip]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in (*flip, *begun, *older))
    )
    assert set(go(names=("flip",))["table"]) == {"flip"}
    # Of a replayed one the phase before may be in training again.
    ended = [
        r | {"branch": "flip+learned", "phase": "finetune", "epoch": e}
        for r in flip
        for e in (1, 2)
    ]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(r) + "\n" for r in ended)
    assert set(go(names=("flip",))["table"]) == {"flip"}


def test_all_rows_begin_with_the_same_weights_and_updates():
    small = COMPARISON_PRESETS["small"]
    rows = phases.comparison(
        small,
        phases.make_classifier(small, 10),
        {name: compare._row(name, 10) for name in ("identity", "mixup", "printed")},
        (8, 8, 1),
        steps_per_epoch=3,
    )
    assert len({legs[0].begin for legs in rows.values()}) == 1
    kinds = [sum(leg.epochs for leg in legs if leg.kind != "augment") for legs in rows.values()]
    assert kinds == [small.epochs.train] * 3
    assert len({phases.KINDS[legs[0].kind] for legs in rows.values()}) == 1


def test_a_row_applies_its_policies_in_order_with_keys_of_their_own():
    key = jax.random.key(3)
    images = jax.random.randint(jax.random.key(0), (16, 8, 8, 1), 0, 256).astype(jnp.uint8)
    labels = jnp.arange(16) % 10
    policy, form, _ = compare._row("flip+flip_crop+mixup+printed", 10)
    assert form == "printed"
    got = jax.jit(lambda key: policy(key, images, labels, None))(key)
    first, second, third = (jax.random.fold_in(key, i) for i in range(3))
    moved = policies.flip_crop(second, policies.flip(first, images))
    mix = jax.jit(partial(policies.mixup, num_classes=10))
    chex.assert_trees_all_equal(got, mix(third, moved, labels))


def test_a_replay_of_few_updates_has_learned_boxes():
    """Three updates make three snapshots: none is left as it was before them, at 0."""
    config = COMPARISON_PRESETS["small"]
    rows = {"replayed": compare._row("replayed", 10)}
    classifier = phases.make_classifier(config, 10)
    joint, replay = phases.comparison(config, classifier, rows, (8, 8, 1), 1)["replayed"]
    few = phases._recorded(dataclasses.replace(joint, epochs=3), 1)
    state = few.begin(None, jax.random.key(0))
    assert {len(leaf) for leaf in jax.tree.leaves(state.snapshots)} == {3}
    many = jax.eval_shape(joint.begin, None, jax.random.key(0))
    assert {len(leaf) for leaf in jax.tree.leaves(many.snapshots)} == {min(20, joint.epochs)}
    assert replay.epochs == config.epochs.train


def test_a_colon_divides_the_images():
    """Halves anew for every batch; where one learns, those that it transforms and the others."""
    images = jax.random.randint(jax.random.key(0), (64, 8, 8, 3), 0, 256).astype(jnp.uint8)
    labels = jnp.arange(64) % 10
    row = compare._row("identity:cutout", 10)
    assert row.augmenter is row.others is None
    chosen = []
    for seed in range(2):
        changed, kept = jax.jit(lambda key: row.policy(key, images, labels, None))(
            jax.random.key(seed)
        )
        np.testing.assert_array_equal(kept, labels)
        chosen.append(np.any(changed != images, axis=(1, 2, 3)))
        assert 16 < chosen[-1].sum() < 48
    assert (chosen[0] != chosen[1]).any()

    row = compare._row("learned:cutout", 10)
    assert row.augmenter == "learned" and row.others is not None
    config = COMPARISON_PRESETS["small"]
    classifier = phases.make_classifier(config, 10)
    (joint, rest), *_ = phases.comparison(config, classifier, {"": row}, (8, 8, 3), 3).values()
    mixed, _ = jax.jit(lambda key: joint.policy(key, images, labels, None))(jax.random.key(1))
    augmenter = phases.make_augmenter(config, 3, others_alone=True)
    chosen = np.array(steps.first_of_groups(64, *augmenter.partition(64)))
    assert chosen.sum() == 32 and rest.policy is joint.policy
    np.testing.assert_array_equal(np.any(mixed != images, axis=(1, 2, 3)), ~chosen)


def test_entropy_magnitude_asks_the_classifier():
    images = jax.random.randint(jax.random.key(0), (64, 8, 8, 1), 0, 256).astype(jnp.uint8)
    policy = compare._row("entropy_magnitude", 10).policy
    labels = jnp.zeros(64, jnp.int32)
    outcomes = []
    run = jax.jit(
        lambda key, logits: policy(key, images, labels, lambda _: logits)[0],
    )
    for scale in (0.0, 100.0):  # uncertain and certain of everything
        logits = scale * jax.nn.one_hot(labels, 10)
        changed = run(jax.random.key(1), logits)
        outcomes.append(float(jnp.mean(jnp.any(changed != images, axis=(1, 2, 3)))))
    assert outcomes[0] < outcomes[1] - 0.2


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["flip", "flip"],
        ["flop"],
        ["flip+"],
        ["printed+intended"],
        ["flip,crop"],
        ["flip:"],
        [":flip"],
        ["flip:cutout:identity"],
        ["flip:mixup"],
        ["printed:flip"],
        ["flip:learned"],
    ],
)
def test_wrong_policies_are_refused_before_anything(go, names, tmp_path):
    with pytest.raises(cli.UsageError, match="--policies"):
        go(names=names, workdir=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_paired_differences_are_students():
    random = np.random.default_rng(0)
    ours, control = random.normal(size=(2, 6)) * [[0.1], [0.2]]
    found = compare._paired_difference(dict(enumerate(ours)), dict(enumerate(control)))
    interval = stats.ttest_rel(ours, control).confidence_interval(0.95)
    np.testing.assert_allclose((found["low"], found["high"]), interval, rtol=1e-9)
    assert found["n"] == 6
    alone = compare._paired_difference({3: 0.5}, {3: 0.25, 4: 0.9})
    assert (alone["mean"], alone["low"], alone["n"]) == (0.25, None, 1)
    assert compare._paired_difference({1: 0.5}, {2: 0.5}) is None
