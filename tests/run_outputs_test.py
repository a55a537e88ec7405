"""Records come by seed, phase and epoch, in whatever order they were written."""

import json

import pytest

from experiments import cli, run_outputs
from maxent_aug import phases, steps

CLASSIFIER_STEPS = steps.classifier_step, steps.eval_step
JOINT = phases.Phase("learned", "joint", 2, lambda *_: None, *CLASSIFIER_STEPS)
REST = phases.Phase("learned", "finetune", 1, lambda *_: None, *CLASSIFIER_STEPS, follows=JOINT)


@pytest.fixture
def written(tmp_path):
    """Writes lines (seed, phase, epoch): the settings of their run."""

    def write(*lines):
        records = [
            {
                "seed": seed,
                "branch": "learned",
                "phase": phase,
                "epoch": epoch,
                "test_accuracy": 0.5,
            }
            for seed, phase, epoch in lines
        ]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        return cli.Settings("learn", "quick", None, tmp_path, None, 1)

    return write


def places(records):
    return [(r["seed"], r["phase"], r["epoch"]) for r in records]


def test_a_phase_that_was_trained_again_is_in_its_place(written):
    whole = [(s, *rest) for s in (0, 1) for rest in (("joint", 1), ("joint", 2), ("finetune", 1))]
    again = whole[2:] + whole[:2]
    assert places(run_outputs.records(written(*again), (JOINT, REST))) == whole
    assert places(run_outputs.records(written(*again), (REST,))) == [whole[2], whole[5]]


def test_a_seed_that_was_stopped_is_no_complete_one(written):
    whole = [(0, "joint", 1), (0, "joint", 2), (0, "finetune", 1)]
    begun = [(1, "joint", 1), (1, "joint", 2), (2, "joint", 1)]
    settings = written(*whole, *begun)
    assert places(run_outputs.complete_records(settings, (JOINT, REST))) == whole
    assert places(run_outputs.records(settings, (JOINT, REST))) == whole + begun
