import re
from html.parser import HTMLParser

import numpy as np
import pytest

from maxent_aug import figures
from maxent_aug.report import collapse_of_seeds, write_report

EVIL = "<script>alert('&')</script>"
COLLAPSE = {"distance_from_identity": 0.75, "rotation_deg": -18.02, "rotation_deg_sd": 8.1}
RESULT = {
    "experiment": "paper",
    "preset": "quick",
    "command": "python -m experiments.paper --preset=quick",
    "accuracy": {
        "baseline": {"mean": 0.9, "sd": 0.01, "per_seed": [0.89, 0.91], "paper": 0.8736},
        "proposed_intended": {"mean": 0.95, "sd": 0.0, "per_seed": [0.95, 0.95], "paper": None},
    },
    "collapse": {
        "printed": {"distance_from_identity": 0.0, "per_seed": []},
        "intended": {**COLLAPSE, "per_seed": [COLLAPSE, COLLAPSE]},
    },
    "seconds": 172.4,
    "config": {"data": {"name": "digits"}, "epochs": {"pretrain": 5}, "forms": ["a", "b"]},
    "versions": {"jax": "0.10.2"},
    "device": "cpu",
    "date": "2026-01-31",
}
RECORDS = [
    {"seed": s, "branch": "baseline", "phase": "finetune", "epoch": e, "test_accuracy": 0.5 + s / 8}
    for s in (0, 1)
    for e in (1, 2)
]
PNG = b"\x89PNG\r\n\x1a\n"
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Elements, texts and the addresses that a browser would load; checks the nesting."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.loads, self.texts = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture
def write(tmp_path):
    def write(
        result=RESULT, records=RECORDS, pictures=((PNG, "Figure 2", "See this."),), **options
    ):
        path = tmp_path / "report.html"
        write_report(
            path, **{"title": "A run"} | options, result=result, records=records, figures=pictures
        )
        assert list(tmp_path.glob("*.tmp")) == []
        return path.read_text(encoding="utf-8")

    return write


def test_says_what_the_result_holds(write):
    text = Page(write()).text
    for word in (
        "A run",
        "--preset=quick",
        "2 min 52 s",
        "baseline 0.9000 0.0100 2 0.8736",
        "proposed, as intended 0.9500 0.0000 2 –",
        "−18.0 ± 8.1",
        "epochs.pretrain 5",
        "forms a, b",
        "jax 0.10.2",
        "Figure 2",
        "See this.",
        "finetune, baseline 2 – 0.5625 –",
    ):
        assert word in text


def test_loads_nothing_from_elsewhere(write):
    html = write()
    page = Page(html)
    assert page.loads
    assert all(address.startswith("data:") for address in page.loads)
    assert "script" not in page.tags
    assert "url(" not in html
    assert "@import" not in html


def test_everything_is_escaped(write):
    result = {
        "experiment": EVIL,
        "preset": EVIL,
        "command": EVIL,
        "accuracy": {EVIL: {"mean": 0.5, "sd": 0.1, "per_seed": [0.4, 0.6], "paper": None}},
        "collapse": {EVIL: COLLAPSE},
        "config": {EVIL: {EVIL: [EVIL]}},
        "versions": {EVIL: EVIL},
        "device": EVIL,
        "date": EVIL,
    }
    records = [{"seed": 0, "branch": EVIL, "phase": EVIL, "epoch": 1}]
    page = Page(write(result, records, [(PNG, EVIL, f'{EVIL}"')], title=EVIL))
    assert "script" not in page.tags
    assert page.text.count(EVIL) >= 12


@pytest.mark.parametrize(
    "result",
    [
        {},
        {"accuracy": {"baseline": {"mean": None, "sd": None, "per_seed": [], "paper": None}}},
        {"accuracy": {"baseline": {"mean": 0.5, "sd": None, "per_seed": [0.5], "paper": 0.8736}}},
        {"accuracy": {"a": {"mean": 0.5, "sd": 0.0, "per_seed": [0.5] * 3, "paper": None}}},
        {"collapse": {"printed": {"scale": float("nan"), "scale_sd": None}}},
    ],
    ids=["nothing", "no seeds", "one seed", "equal seeds", "nan"],
)
def test_what_is_missing_is_left_out(write, result):
    page = Page(write(result, [], []))
    assert "nan" not in page.text
    assert "None" not in page.text
    assert ("Settings" in page.text) == ("config" in result)


@pytest.mark.parametrize("figure", [None, 0.8736])
def test_the_papers_column_is_there_if_it_prints_a_figure(write, figure):
    row = {"mean": 0.5, "sd": None, "per_seed": [0.5], "paper": figure}
    text = Page(write({"accuracy": {"baseline": row}}, [], [])).text
    assert "Table 1" in text
    assert ("paper" in text) == (figure is not None)


def test_a_real_report_is_below_3_mb(write, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)  # noise compresses worst
    path = tmp_path / "augmented.png"
    words = ["turned 12° left, 1.20x"] * 16
    figures.augmented(images, images, words, np.ones(16), np.ones(16)).savefig(path)
    assert len(write(pictures=[(path, "Figure 3", "Pairs.")] * 4)) < 3e6


def test_seeds_are_means_and_of_angles_on_the_circle():
    records = [{"rotation_deg": a, "shear_sd": s} for a, s in ((175.0, 1.0), (-165.0, 2.0))]
    found = collapse_of_seeds(records)
    assert found == {"rotation_deg": pytest.approx(-175.0), "shear_sd": 1.5, "per_seed": records}


def test_a_figure_that_an_older_seed_lacks_is_left_out():
    records = [{"scale": 1.0}, {"scale": 2.0, "spread": 1.0}]
    per_seed = [{"scale": 1.0}, {"scale": 2.0}]
    assert collapse_of_seeds(records) == {"scale": 1.5, "per_seed": per_seed}


def test_what_was_tested_on_is_said(write):
    for tested_on in ("test images", "held-out training images"):
        text = Page(write(RESULT | {"tested_on": tested_on})).text
        assert text.count(tested_on) == 3
    assert "test images" in Page(write()).text
