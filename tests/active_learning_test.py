"""Active learning from end to end on digits: who is asked for, and that a stop changes nothing."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from absl import flags

from experiments import active_learning, cli
from maxent_aug import models, run_folder, train
from maxent_aug.config import ActiveLearning, Labels, RoundEpochs

pytestmark = pytest.mark.usefixtures("quick_compilation")
CONFIG = ActiveLearning(
    labels=Labels(first=16, query=8, rounds=2, candidates=20),
    epochs=RoundEpochs(first=2, later=1),
    batch_size=8,
    eval_batch_size=25,
)
known_legs = {}


def legs_once(config, train_set, sizes, strategy, make=active_learning._legs):
    """The same phases in each run, whose programs then need not be compiled again."""
    if strategy not in known_legs:
        known_legs[strategy] = make(config, train_set, sizes, strategy)
    return known_legs[strategy]


@pytest.fixture
def go(monkeypatch):
    """Runs it in a folder: the content of active_learning.json."""
    small_run.make_small(monkeypatch)
    monkeypatch.setattr(active_learning, "_legs", legs_once)

    def call(workdir, strategies=("random", "entropy", "learning_loss"), config=CONFIG):
        monkeypatch.setattr(flags.FLAGS["strategies"], "value", list(strategies))
        active_learning.main(
            cli.Settings("active_learning", "tiny", config, workdir, None, seeds=1)
        )
        return json.loads((workdir / "active_learning.json").read_text())

    return call


def test_rounds_and_a_run_that_was_stopped(go, tmp_path, monkeypatch, capsys):
    whole = go(tmp_path / "whole")
    assert whole["labelled"] == [16, 24, 32]
    assert whole["data"]["pool"] == 48 and "trained_on" not in whole["data"]
    assert "learning_loss" in capsys.readouterr().out
    assert (tmp_path / "whole" / "figures" / "active_learning.png").exists()
    queries = {}
    for strategy, curve in whole["curves"].items():
        path = tmp_path / "whole" / "labels" / f"seed0-{strategy}.json"
        queries[strategy] = json.loads(path.read_text())
        first = active_learning._draw(np.arange(48), 16, 0, 0).tolist()
        asked = first + [image for query in queries[strategy] for image in query]
        assert len(set(asked)) == len(asked) == 32  # no image is labelled twice
        assert np.shape(curve["per_seed"]) == (1, 3)
    assert queries["random"] != queries["entropy"]
    # The first round is the same for all that train the same network.
    assert len({whole["curves"][s]["mean"][0] for s in ("random", "entropy")}) == 1

    real, count = train._train_epoch, [0]

    def stopping(*arguments):
        count[0] += 1
        if count[0] in (3, 7, 8):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(train, "_train_epoch", stopping)
    for _ in range(3):
        with pytest.raises(train.Interrupted):
            go(tmp_path / "stopped")
    assert go(tmp_path / "stopped")["curves"] == whole["curves"]
    assert go(tmp_path / "stopped", strategies=["entropy"])["curves"] == whole["curves"]


def test_scores():
    logits = jnp.log(jnp.array([[0.98, 0.01, 0.01], [0.4, 0.3, 0.3], [0.5, 0.5, 1e-6]]))

    class Known:
        classifier = staticmethod(lambda images: logits)

    def ask(name):
        scores = active_learning.SCORES[name](Known, None, None, None)["score"]
        return np.argsort(-np.asarray(scores)).tolist()

    assert ask("entropy") == [1, 2, 0]
    assert ask("margin") == [2, 1, 0]


def test_the_predicted_loss_is_the_score_of_learning_loss():
    module = models.LossPredictor(models.ResNet(3, stage_sizes=(1,), width=4), hidden=4)
    images = jax.random.normal(jax.random.key(0), (5, 8, 8, 1))
    variables = jax.jit(module.init)(jax.random.key(1), images)
    classifier = train.steps.ModelState.create(
        apply_fn=module.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=active_learning.phases.scheduled_sgd(CONFIG.classifier, 1),
    )
    state = train.steps.State(classifier)
    scores = active_learning.SCORES["learning_loss"](state, images, None, None)["score"]
    np.testing.assert_array_equal(scores, module.apply(variables, images, method="with_loss")[1])


@pytest.mark.parametrize(
    ("strategies", "labels", "word"),
    [
        (["entropy", "entropy"], Labels(), "--strategies"),
        (["certainty"], Labels(), "--strategies"),
        ([], Labels(), "--strategies"),
        (["random"], Labels(first=16, query=8, rounds=5), "56 labels"),
        (["random"], Labels(first=4, query=8, rounds=1), "config.labels.first=4"),
        (["random"], Labels(first=16, query=8, rounds=1, candidates=7), "labels.candidates=7"),
    ],
)
def test_wrong_input_is_refused_before_anything(go, tmp_path, strategies, labels, word):
    config = ActiveLearning(labels=labels, batch_size=8)
    with pytest.raises(cli.UsageError, match=word):
        go(tmp_path / "run", strategies, config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        *(
            "",
            "\0\0",
            "{}",
            "[]",
            "3",
            "[" * 10**5,
            "[[0], [1, 2]]",
            '[["a", "b"]]',
            "[[0.0, 1.0]]",
        ),
        *("[[0, 48]]", "[[-1, 0]]", "[[3, 3]]", "[[0, 1], [1, 2]]", "[[0, 1, 2]]", "[[0, 1e30]]"),
    ],
)
def test_damaged_queries_are_named(tmp_path, content):
    path = tmp_path / "seed3-margin.json"
    path.write_text(content)
    with pytest.raises(run_folder.RunFolderError, match=r"seed3-margin\.json is damaged; put"):
        active_learning._Queries(tmp_path, "margin", 3, query=2, pool=48)
    path.write_text("[[0, 47], [5, 1]]")
    queries = active_learning._Queries(tmp_path, "margin", 3, query=2, pool=48)
    assert queries.get(1, pytest.fail).tolist() == [5, 1]
