import io
import re

import pytest

from maxent_aug.progress import Progress, duration

RUN = {"seed": 0, "branch": "printed", "phase": "augment", "epochs": 50}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def screen(text):
    """What a terminal shows of it."""
    lines = []
    for line in text.split("\n"):
        lines.append(re.split(r"\r\x1b\[K", line)[-1])
    return lines


def test_plain_lines_one_an_epoch():
    out = io.StringIO()
    progress = Progress(out)
    for epoch in (1, 2):
        progress.update(**RUN, epoch=epoch)
        progress.update(
            **RUN,
            epoch=epoch,
            epoch_done=True,
            images_per_second=1234.5,
            seconds_left=200.0,
            numbers={"accuracy": 0.87361, "loss": 1.5},
        )
    tail = "3 min 20 s left  accuracy 0.8736  loss 1.5000  1,234 images/s"
    assert out.getvalue() == (
        f"seed 0  printed  augment  epoch  1/50  {tail}\n"
        f"seed 0  printed  augment  epoch  2/50  {tail}\n"
    )


def test_a_terminal_keeps_one_line_a_phase(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    out = Terminal()
    progress = Progress(out)
    for epoch in range(1, 51):
        for done in (False, True):
            numbers = {"accuracy": epoch / 100, "loss": 2.5, "entropy": 1.5, "spread": 0.123}
            progress.update(**RUN, epoch=epoch, epoch_done=done, numbers=numbers)
    progress.say("Table 1")
    shown = screen(out.getvalue())
    # What does not fit into 60 columns is left out, whole.
    assert shown[0] == "seed 0  printed  augment  epoch 50/50  accuracy 0.5000"
    assert shown[1:] == ["Table 1", ""]


def test_a_message_does_not_spoil_the_line():
    out = Terminal()
    progress = Progress(out)
    progress.update(**RUN, epoch=3, epoch_done=True)
    progress.say("checkpoint 3 is damaged")
    progress.update(**RUN, epoch=4, epoch_done=True)
    progress.end_line()
    assert screen(out.getvalue()) == [
        "checkpoint 3 is damaged",
        "seed 0  printed  augment  epoch  4/50",
        "",
    ]


def test_a_phase_named_like_its_branch_is_named_once():
    out = io.StringIO()
    run = RUN | {"branch": "pretrain", "phase": "pretrain"}
    Progress(out).update(**run, epoch=7, epoch_done=True, numbers={"loss": 1.23e-5})
    assert out.getvalue() == "seed 0  pretrain  epoch  7/50  loss 1.23e-05\n"


def test_updates_are_not_faster_than_the_eye():
    out = Terminal()
    progress = Progress(out)
    for _ in range(1000):
        progress.update(**RUN, epoch=1)
    assert out.getvalue().count("\r") < 100


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (-1, "0 s")],
)
def test_duration(seconds, words):
    assert duration(seconds) == words
    assert duration(float("nan")) == duration(float("inf")) == "?"
