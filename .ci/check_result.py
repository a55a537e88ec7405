"""Checks what a run of `experiments.paper` left in its folder: `check_result.py FOLDER`."""

import json
import math
import sys
from pathlib import Path

COLLAPSE = "distance_from_identity rotation_deg scale shear shift_px entropy_before entropy_after"
FIGURES = "adversarial_losses augmented transforms accuracy"


def check(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    for row in ("baseline", "proposed_printed", "proposed_intended"):
        cells = result["accuracy"][row]
        assert cells["per_seed"], row
        assert 0.1 < cells["mean"] <= 1, (row, cells)
    # The classifier has learned to read digits, and the two signs differ as they should.
    assert result["accuracy"]["baseline"]["mean"] > 0.9, result["accuracy"]
    for form in ("printed", "intended"):
        for name in COLLAPSE.split():
            assert math.isfinite(result["collapse"][form][name]), (form, name)
    rise = {f: c["entropy_after"] - c["entropy_before"] for f, c in result["collapse"].items()}
    assert rise["intended"] > rise["printed"] + 0.1, rise
    assert {"seconds", "config", "versions", "device"} <= set(result), result.keys()
    for name in FIGURES.split():
        png = (folder / "figures" / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG"), name
        assert len(png) > 10_000, name
    report = (folder / "report.html").read_text()
    assert "<table" in report
    assert len(report) < 3_000_000
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    epochs = result["config"]["epochs"]
    expected = epochs["pretrain"] + 2 * epochs["augment"] + 3 * epochs["finetune"]
    assert len(lines) == expected, (len(lines), expected)
    assert list((folder / "tensorboard").rglob("events.*"))


check(Path(sys.argv[1]))
print("result.json, figures, report.html, metrics.jsonl: as they should be")
