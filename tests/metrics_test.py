import json
import shutil
import struct

import numpy as np
import pytest

from maxent_aug import metrics
from maxent_aug.metrics import MetricsWriter


def record(epoch, phase="augment", branch="printed", seed=0, **values):
    return {"seed": seed, "branch": branch, "phase": phase, "epoch": epoch, **values}


def events(workdir):
    """(run, tag, step, value) of all TensorBoard events, read without TensorBoard."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / "tensorboard").rglob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length  # length and its checksum before, the data's checksum after
            found += [
                (path.parent.name, value.tag, event.step, value.simple_value)
                for value in event.summary.value
            ]
    return found


def test_lines_and_events(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(record(1, train_loss=0.5, test_accuracy=0.25))
        # On the disk at once, whatever happens next.
        assert metrics.read(tmp_path / "metrics.jsonl") == [
            record(1, train_loss=0.5, test_accuracy=0.25)
        ]
        writer.write(record(1, phase="finetune", train_loss=0.25))
    assert events(tmp_path) == [
        ("seed0-printed-augment", "train_loss", 1, 0.5),
        ("seed0-printed-augment", "test_accuracy", 1, 0.25),
        ("seed0-printed-finetune", "train_loss", 1, 0.25),
    ]


def test_not_finite_is_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(record(1, a=float("nan"), b=float("inf"), c=-float("inf"), d=1))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == record(1, a=None, b=None, c=None, d=1)
    assert [tag for _, tag, _, _ in events(tmp_path)] == ["d"]


def test_a_record_needs_its_keys(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="phase is None"):
            writer.write({"seed": 0, "branch": "printed", "epoch": 1})
        for metric in ("0.5", [0.5], {"a": 0.5}, np.float32(0.5)):
            with pytest.raises(ValueError, match=r"loss is .*allowed: a plain number"):
                writer.write(record(1, loss=metric))
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "tail",
    ['{"seed": 0, "bra', "\0\0\0", '{"seed": 0, "name": "\xc3', "\n", '{"seed": 0}\n', "{\n"],
)
def test_a_broken_last_line_is_ignored_and_removed(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    good = record(1, loss=0.5)
    path.write_bytes((json.dumps(good) + "\n" + tail).encode("latin-1"))
    assert metrics.read(path) == [good]
    with MetricsWriter(tmp_path) as writer:
        writer.write(record(2, loss=0.25))
    assert metrics.read(path) == [good, record(2, loss=0.25)]
    assert path.read_text().count("\n") == 2


@pytest.mark.parametrize("broken", ['{"a"', "{}", "3", "null", '"seed"', "[]", "\0\0"])
def test_a_broken_earlier_line_is_named(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(record(1, loss=0.5))
    path.write_text(f"{good}\n{broken}\n{good}\n")
    with pytest.raises(metrics.MetricsError, match="line 2"):
        metrics.read(path)


def test_rewind_drops_later_epochs_of_that_phase_only(tmp_path):
    kept = [
        record(3, phase="pretrain", branch="shared", loss=1.0),
        record(3, branch="intended", loss=1.0),
        record(3, seed=1, loss=1.0),
    ]
    with MetricsWriter(tmp_path) as writer:
        for r in [*kept, *(record(e, loss=float(e)) for e in (1, 2, 3))]:
            writer.write(r)
        writer.rewind(0, "printed", "augment", 1)
        assert metrics.read(writer.path) == [*kept, record(1, loss=1.0)]
        writer.rewind(0, "printed", "augment", 0)
        assert metrics.read(writer.path) == kept
    assert list(tmp_path.glob("*.tmp")) == []


@pytest.mark.parametrize("checkpoint", [0, 1, 2, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, checkpoint):
    def run(workdir, start, stop):
        with MetricsWriter(workdir) as writer:
            writer.rewind(0, "printed", "augment", start)
            for epoch in range(start + 1, stop + 1):
                writer.write(record(epoch, loss=1 / epoch))

    run(tmp_path / "whole", 0, 6)
    run(tmp_path / "killed", 0, 4)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"seed": 0, "branch": "pri')
    run(tmp_path / "killed", checkpoint, 6)
    whole, killed = ((tmp_path / n / "metrics.jsonl").read_bytes() for n in ("whole", "killed"))
    assert killed == whole
    assert events(tmp_path / "killed") == events(tmp_path / "whole")


def test_rewind_before_anything_is_written(tmp_path):
    with MetricsWriter(tmp_path / "new") as writer:
        writer.rewind(0, "printed", "augment", 0)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("metric", ["", ', "test_accuracy": null'])
def test_a_metric_that_is_missing_is_named(tmp_path, metric):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"seed": 0, "branch": "a", "phase": "b", "epoch": 1{metric}}}\n')
    (record,) = metrics.read(path)
    with pytest.raises(metrics.MetricsError, match=r"jsonl, line 1 has no test_accuracy; put"):
        record["test_accuracy"]
    assert record.get("test_accuracy") is None


def test_events_that_are_not_there_are_made_again(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for seed in (0, 1):
            writer.write(record(1, seed=seed, loss=0.5))
    before = events(tmp_path)
    shutil.rmtree(tmp_path / "tensorboard" / "seed1-printed-augment")
    MetricsWriter(tmp_path).close()
    assert events(tmp_path) == before != []
