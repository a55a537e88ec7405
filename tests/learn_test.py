"""Learning an augmenter from end to end on 48 digits."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest
import small_run

from experiments import cli, learn, run_inputs
from maxent_aug import ColorBounds, load_augmenter, metrics, phases, programs, train
from maxent_aug.config import Bounds, ColorLimits, Learning, LearningEpochs, MatchingAugmenter
from maxent_aug.spatial import WIDE_BOUNDS, decompose_affine

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = Learning(
    policy="flip_crop+cutout",
    epochs=LearningEpochs(2),
    batch_size=16,
    eval_batch_size=16,
    learned=MatchingAugmenter(unseen=0.25, every=4, share=1.0),
)


@pytest.fixture
def go(monkeypatch):
    """Runs it in a folder: the content of result.json."""
    small_run.make_small(monkeypatch)

    def call(workdir, seeds=1, config=CONFIG):
        learn.main(cli.Settings("learn", "tiny", config, workdir, None, seeds))
        return json.loads((workdir / "result.json").read_text())

    return call


def test_a_run_leaves_what_it_promises_and_a_stopped_one_the_same(
    go, tmp_path, monkeypatch, capsys
):
    classifier = phases.make_classifier(CONFIG, 10)
    legs = phases.learning(CONFIG, classifier, programs.unchanged, (8, 8, 1), 3)
    monkeypatch.setattr(phases, "learning", lambda *_: legs)  # compiled once
    whole = go(tmp_path / "whole", seeds=2)
    shown = capsys.readouterr().out
    assert "load_augmenter" in shown
    assert ("as they began" in shown) == learn._unlearned(whole)
    for name in ("versions", "half_widths", "accuracy"):
        assert (tmp_path / "whole" / "figures" / f"{name}.png").stat().st_size > 10_000
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "half-width of the box" in page and "paper" not in page
    assert "10 classes, 8x8x1: 48 trained on, 25 tested on" in page
    assert len(whole["accuracy"]["learned"]["per_seed"]) == 2

    real, stops = train._train_epoch, ["joint", "finetune"]

    def stopping(leg, epoch, at):
        if leg.phase.kind in stops:
            stops.remove(leg.phase.kind)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(leg, epoch, at)

    monkeypatch.setattr(train, "_train_epoch", stopping)
    for _ in range(2):
        with pytest.raises(train.Interrupted):
            go(tmp_path / "stopped")
    resumed = go(tmp_path / "stopped", seeds=2)
    assert resumed["accuracy"] == whole["accuracy"]
    assert resumed["collapse"] == whole["collapse"]
    assert go(tmp_path / "stopped")["accuracy"] == whole["accuracy"]  # what is there stays
    for name in ("augmenter.npz", "augmenter-seed1.npz"):
        files = [np.load(tmp_path / run / name) for run in ("whole", "stopped")]
        assert files[0].files == files[1].files
        for key in files[0].files:
            np.testing.assert_array_equal(files[0][key], files[1][key])
            assert key == "about" or np.isfinite(files[0][key]).all()
        for file in files:
            file.close()
    images = small_run.digits(100, 140).images
    augmented, theta = load_augmenter(tmp_path / "whole" / "augmenter.npz")(
        jax.random.key(1), images
    )
    assert augmented.shape == images.shape and augmented.dtype == np.uint8
    assert np.all(np.abs(theta - np.eye(2, 3)).max((1, 2)) > 1e-4)  # share is 1


def test_boxes_that_are_as_they_began_are_no_result():
    began = {
        "collapse": {"learned": {"half_width_tx": 0.5, "half_width_ty": 0.505, "scale": 2.0}},
        "config": {"learned": {"start_width": 0.5}},
    }
    assert learn._unlearned(began)
    began["collapse"]["learned"]["half_width_ty"] = 0.52
    assert not learn._unlearned(began)


def test_unasked_bounds_are_those_of_the_library():
    unasked = phases.make_augmenter(Learning(), 3)
    assert unasked.bounds == pytest.approx(WIDE_BOUNDS)
    assert unasked.color == pytest.approx(ColorBounds())


def test_the_file_is_the_augmenter_of_the_run_with_the_bounds_asked_for(
    go, tmp_path, monkeypatch, capsys
):
    """Of digits in three channels, of which colours are learned, too, and kept in the file.

    It leaves half of them alone, which have a policy of their own.
    """
    sets = [
        dataclasses.replace(each, images=np.repeat(each.images, 3, axis=-1))
        for each in run_inputs.load_data()
    ]
    monkeypatch.setattr(run_inputs, "load_data", lambda *_: sets)
    bounds = Bounds(shift=0.0, rotation=180.0, scale=1.0, aspect=1.0, shear=0.0)
    limits = ColorLimits(contrast=10.0, hue=180.0)
    config = dataclasses.replace(
        CONFIG,
        policy="flip_crop:cutout",
        learned=dataclasses.replace(CONFIG.learned, share=0.5),
        bounds=bounds,
        color_bounds=limits,
    )
    result = go(tmp_path, config=config)
    printed, last = capsys.readouterr().out, metrics.read(tmp_path / "metrics.jsonl")[-1]
    assert 0.02 < last["half_width_shear"] < 1
    for name in ColorBounds._fields:
        assert result["collapse"]["learned"][f"half_width_{name}"] == last[f"half_width_{name}"]
        assert name in printed
    assert "half-width of the box, saturation" in (tmp_path / "report.html").read_text()
    images = sets[1].images
    augment = load_augmenter(tmp_path / "augmenter.npz", with_color=True)
    augmented, theta, color = augment(jax.random.key(1), images)
    alone = (theta == np.eye(2, 3)).all((1, 2))
    assert 0 < alone.sum() < len(images) and not color[alone].any()
    np.testing.assert_array_equal(augmented[alone], images[alone])
    augment = load_augmenter(tmp_path / "augmenter.npz", share=1.0, with_color=True)
    augmented, theta, color = augment(jax.random.key(1), images)
    assert augmented.shape == images.shape and augmented.dtype == np.uint8
    assert np.all(np.abs(theta - np.eye(2, 3)).max((1, 2)) > 1e-4)
    parts = decompose_affine(theta)
    assert np.abs(parts["rotation"]).max() > np.radians(45)
    for name in ("translation", "log_scale", "log_aspect", "shear"):
        np.testing.assert_allclose(parts[name], np.zeros_like(parts[name]), atol=1e-5)
    assert np.all(np.ptp(color, axis=0) > 0.1)
    most = ColorBounds(*np.abs(color).max(axis=0))
    assert ColorBounds().log_contrast < most.log_contrast <= np.log(10)
    assert ColorBounds().hue < most.hue <= np.pi
    assert most.log_saturation <= ColorBounds().log_saturation
    middles = [x.astype(np.float32).mean((1, 2, 3)) for x in (images, np.asarray(augmented))]
    assert np.ptp(middles[1] - middles[0]) > 10  # brighter and darker, grey as they are


def test_an_unknown_policy_is_named():
    with pytest.raises(
        cli.UsageError, match=r"--config.policy=flip\+warp is not allowed \(of ident"
    ):
        learn._check("flip+warp")
