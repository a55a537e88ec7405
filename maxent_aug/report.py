"""One HTML file that holds a run: tables, figures, settings, and the command to do it again."""

import base64
import cmath
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, median
from typing import Any

from maxent_aug.diagnostics import COORDINATES
from maxent_aug.metrics import Record
from maxent_aug.progress import duration
from maxent_aug.run_folder import flat, write_atomically

Picture = tuple[bytes | str | os.PathLike[str], str, str]

# What a collapse looks like: name in metrics.jsonl, that of its deviation, label, unit. What is not
# here is neither in report.html nor, of the collapse, in result.json.
COLLAPSE_ROWS = (
    ("distance_from_identity", None, "distance from identity ‖θ &minus; I‖", ""),
    ("spread", None, "spread between images ‖θ &minus; mean θ‖", ""),
    ("rotation_deg", "rotation_deg_sd", "rotation, left is positive", "°"),
    ("scale", "scale_sd", "scale", "&times;"),
    ("shear", "shear_sd", "shear", ""),
    ("shift_px", "shift_px_sd", "length of the shift", "px"),
    ("entropy_before", None, "entropy of the prediction, before", "bits"),
    ("entropy_after", None, "entropy of the prediction, after", "bits"),
    ("outside_frame", None, "share of the grid outside the frame", ""),
    ("test_augmented_accuracy", None, "accuracy on augmented images", ""),
    (
        "test_same_box_accuracy",
        None,
        "accuracy on augmented images, with one box for a batch of images, as large",
        "",
    ),
    (
        "test_same_box_entropy",
        None,
        "entropy of the prediction, with one box for a batch of images, as large",
        "bits",
    ),
    ("spread_between", None, "spread of the boxes between images", "of the bounds"),
    *(
        (f"half_width_{name}", None, f"half-width of the box, {label}", "of the bound")
        for name, label in COORDINATES
    ),
)

NAMES = {
    "proposed_printed": "proposed, as printed",
    "proposed_intended": "proposed, as intended",
    "printed": "as printed",
    "intended": "as intended",
}


def collapse_of_seeds(records: Sequence[Record]) -> dict[str, Any]:
    """What `COLLAPSE_ROWS` shows: means over records, one of each seed, and `per_seed`.

    Figures that not all records have, such as new ones in an older folder, are left out.
    """
    names = [name for key, deviation, *_ in COLLAPSE_ROWS for name in (key, deviation) if name]
    names = [name for name in names if all(record.get(name) is not None for record in records)]
    per_seed = [{name: record[name] for name in names} for record in records]
    means = {name: fmean(values[name] for values in per_seed) for name in names}
    if "rotation_deg" in means:  # of angles: that of 175° and -175° is 180°
        turns = [cmath.rect(1.0, math.radians(values["rotation_deg"])) for values in per_seed]
        means["rotation_deg"] = math.degrees(cmath.phase(sum(turns)))
    return means | {"per_seed": per_seed}


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    result: Mapping[str, Any],
    records: Iterable[Record],
    figures: Sequence[Picture],
) -> None:
    """Writes a self-contained page; nothing in it is loaded from elsewhere.

    Args:
      path: of the HTML file; replaced whole.
      title: heading of the page.
      result: the content of result.json: experiment, preset, command, date, data, tested_on,
        accuracy, collapse, seconds, config, versions, device. A part that is missing or empty is
        left out.
      records: of metrics.jsonl, for the table of phases.
      figures: (PNG as bytes or its path, title, caption) in the order of the page.
    """
    tested_on = result.get("tested_on") or "test images"
    sections = [
        _accuracy(result.get("accuracy") or {}, tested_on),
        _collapse(result.get("collapse") or {}, tested_on),
        _figures(figures),
        _phases(list(records)),
        _settings("Settings", flat(result.get("config") or {})),
        _settings("Versions", result.get("versions") or {}),
    ]
    page = PAGE.format(
        title=escape(title), style=STYLE, lead=_lead(result), body="\n".join(filter(None, sections))
    )
    write_atomically(Path(path), page.encode())


def _lead(result: Mapping[str, Any]) -> str:
    facts = [
        ("Experiment", result.get("experiment")),
        ("Preset", result.get("preset")),
        ("Date", result.get("date")),
        ("Images", _images(result["data"]) if result.get("data") else None),
        ("Took", duration(result["seconds"]) if result.get("seconds") is not None else None),
        ("Hardware", result.get("device")),
    ]
    items = "".join(
        f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts if value
    )
    command = result.get("command")
    # In spans, so that a narrow page breaks between arguments and not after their hyphens.
    words = " ".join(f"<span>{escape(word)}</span>" for word in str(command).split(" "))
    again = f"<p>To run it again:</p><pre><code>{words}</code></pre>" if command else ""
    return f'<dl class="facts">{items}</dl>{again}'


def _images(data: Mapping[str, Any]) -> str:
    shape = "x".join(map(str, data["image_shape"]))
    return (
        f"{data['name']}, {data['classes']} classes, {shape}: {data['trained_on']:,} trained on, "
        f"{data['tested_on']:,} tested on"
    )


def _accuracy(table: Mapping[str, Mapping[str, Any]], tested_on: str) -> str:
    if not table:
        return ""
    of_paper = any("paper" in row for row in table.values())
    known = any(row.get("paper") is not None for row in table.values())
    rows = []
    for name, row in table.items():
        seeds = row.get("per_seed") or []
        cells = [
            _name(name),
            f"<b>{_number(row.get('mean'), 4)}</b>",
            _number(row.get("sd") if len(seeds) != 1 else None, 4),
            str(len(seeds)) if seeds else "&ndash;",
        ]
        rows.append(cells + [_number(row.get("paper"), 4)] * known)
    heads = ["", "mean", "sd", "seeds"] + ["paper"] * known
    return _section(
        f"{'Table 1: a' if of_paper else 'A'}ccuracy on {tested_on}",
        _table(heads, rows) + _seeds_plot(table),
        f"The share of {tested_on} that the classifier gets right after its last epoch, over seeds"
        f"{', and the figure that the paper prints' * known}. A difference below the sd is no "
        "evidence.",
    )


def _seeds_plot(table: Mapping[str, Mapping[str, Any]]) -> str:
    """A dot for each seed, a row of dots for each row of the table, on one scale."""
    seeds = {n: [v for v in row.get("per_seed") or [] if _is_number(v)] for n, row in table.items()}
    values = [v for own in seeds.values() for v in own]
    if len(values) <= len(seeds):
        return ""
    low, high = min(values), max(values)
    span = high - low or 1.0
    strips = []
    for name, own in seeds.items():
        dots = "".join(
            f'<i style="left:{100 * (v - low) / span:.1f}%" title="{v:.4f}"></i>' for v in own
        )
        strips.append(f'<span>{_name(name)}</span><div class="track">{dots}</div>')
    scale = f'<span>each seed</span><div class="scale"><b>{low:.4f}</b><b>{high:.4f}</b></div>'
    return f'<div class="strips">{"".join(strips)}{scale}</div>'


def _collapse(collapse: Mapping[str, Mapping[str, Any]], tested_on: str) -> str:
    if not collapse:
        return ""
    rows = []
    for key, sd_key, label, unit in COLLAPSE_ROWS:
        if not any(key in values for values in collapse.values()):
            continue
        cells = [f"{label}" + (f" <small>({unit})</small>" if unit else "")]
        for values in collapse.values():
            text = _number(values.get(key))
            if sd_key and _is_number(values.get(sd_key)):
                text += f" ± {_number(values[sd_key])}"
            each = [_number(s.get(key)) for s in values.get("per_seed") or []]
            if len(each) > 1:
                text += f"<br><small>{' · '.join(each)}</small>"
            cells.append(text)
        rows.append(cells)
    return _section(
        "Has the augmenter collapsed?",
        _table(["", *map(_name, collapse)], rows),
        f"Measured on the {tested_on}, in the last evaluation with the augmenter. What follows ± "
        "is the deviation between images; the small figures are the seeds one by one. A distance "
        "near 0 is a collapse to the identity: nothing is augmented. A spread much smaller than "
        "the distance is a collapse to one transform, the same for every image.",
    )


def _figures(figures: Sequence[Picture]) -> str:
    parts = []
    for picture, title, caption in figures:
        data = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
        source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        parts.append(
            f'<figure><h2>{escape(title)}</h2><div class="picture"><img src="{source}" '
            f'alt="{escape(title)}"></div><figcaption>{escape(caption)}</figcaption></figure>'
        )
    return "\n".join(parts)


def _phases(records: Sequence[Record]) -> str:
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["branch"], record["phase"]), []).append(record)
    rows = []
    for (branch, phase), own in groups.items():
        epochs = max(r["epoch"] for r in own)
        last = [r for r in own if r["epoch"] == epochs]
        speed = [r["images_per_second"] for r in own if _is_number(r.get("images_per_second"))]
        rows.append(
            [
                escape(phase) + ("" if branch == phase else f", {_name(branch)}"),
                str(epochs),
                _last(last, "train_loss", 3),
                _last(last, "test_accuracy", 4),
                f"{median(speed):,.0f}" if speed else "&ndash;",
            ]
        )
    if not rows:
        return ""
    heads = ["", "epochs", "train loss", "accuracy", "images/s"]
    return _section(
        "Phases",
        _table(heads, rows),
        "Loss and accuracy of the last epoch are means over seeds, images/s the median of epochs.",
    )


def _last(records: Sequence[Record], key: str, digits: int) -> str:
    values = [r[key] for r in records if _is_number(r.get(key))]
    return _number(fmean(values), digits) if values else "&ndash;"


def _settings(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(_words(value))}</dd></div>"
        for name, value in values.items()
    )
    return _section(title, f'<dl class="settings">{items}</dl>')


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _section(title: str, content: str, note: str = "") -> str:
    after = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{content}{after}</section>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; the first column holds words, the others numbers."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = ["word", *["number"] * (len(cells) - 1)]
        inner = (f'<{tag} class="{k}">{c}</{tag}>' for c, k in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    head, body = line(heads, "th"), "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _name(key: str) -> str:
    return escape(NAMES.get(key, key.replace("_", " ")))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: Any, digits: int | None = None) -> str:
    """`digits` decimals, by default 3 or 1; a true minus sign; a dash for nothing."""
    if not _is_number(value):
        return "&ndash;"
    if digits is None:
        digits = 3 if abs(value) < 10 else 1
    text = f"{value:,.{digits}f}"
    is_zero = not float(text.replace(",", ""))
    return text.removeprefix("-") if is_zero else text.replace("-", "&minus;")


STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5b6470; --page: #fdfdfc;
  --line: #dfe2e6; --shade: #f2f3f4; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e9; --soft: #a0a8b2; --page: #16181b;
  --line: #33383f; --shade: #202328; --accent: #6cb8e6; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 60rem; background: var(--page);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { margin: 0 0 1.5rem; font-size: 1.75rem; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 0 0 .75rem; font-size: 1.15rem; line-height: 1.3; }
section, figure { margin: 2.75rem 0 0; }
p { margin: .75rem 0; }
dl, dd { margin: 0; }
dt { color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: .75rem 2.5rem; }
.facts dt { font-size: .8rem; }
pre { margin: .5rem 0 0; padding: .75rem 1rem; border-radius: 6px; background: var(--shade);
  white-space: pre-wrap; font: .875rem/1.5 ui-monospace, Menlo, Consolas, monospace; }
code { font-family: inherit; }
code span { display: inline-block; max-width: 100%; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: min(100%, 34rem); font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { padding: .4rem 0 .4rem 1.5rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-size: .85rem; font-weight: 500; vertical-align: bottom; }
th:first-child, td:first-child { padding-left: 0; }
.word { text-align: left; }
.number { text-align: right; white-space: nowrap; }
th.number, .number small { white-space: normal; }
small { color: var(--soft); font-size: .8em; }
.note, figcaption { max-width: 44rem; color: var(--soft); font-size: .9rem; }
figcaption { margin-top: .6rem; }
.picture { padding: .5rem; border: 1px solid var(--line); border-radius: 6px; background: #fff;
  overflow-x: auto; }
img { display: block; width: 100%; height: auto; }
.strips { display: grid; grid-template-columns: auto 1fr; gap: .35rem 1.5rem; max-width: 34rem;
  margin-top: 1.25rem; align-items: center; color: var(--soft); font-size: .85rem; }
.track { position: relative; height: 1px; margin: 0 6px; background: var(--line); }
.track i { position: absolute; width: 10px; height: 10px; margin: -5px 0 0 -5px; border-radius: 50%;
  background: var(--accent); opacity: .75; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.scale { display: flex; justify-content: space-between; }
.scale b { font-weight: 400; }
.settings { columns: 20rem; column-gap: 2.5rem; font-size: .875rem; }
.settings div { display: flex; justify-content: space-between; gap: 1rem; padding: .15rem 0;
  border-bottom: 1px solid var(--line); break-inside: avoid; }
.settings dd { text-align: right; }
@media (max-width: 36rem) {
  body { padding: 1.5rem .9rem 3rem; }
  th, td { padding-left: .8rem; font-size: .875rem; }
}
@media screen and (max-width: 36rem) { img { width: 44rem; } }
@media screen and (prefers-color-scheme: dark) { .picture { filter: brightness(.88); } }
@media print {
  :root { --ink: #000; --soft: #444; --page: #fff; --line: #ccc; --shade: #f4f4f4;
    --accent: #0072b2; color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  section, figure { margin-top: 1.5rem; }
  section, figure, tr, pre { break-inside: avoid; }
  img { max-height: 22cm; object-fit: contain; }
  h2 { break-after: avoid; }
}
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>
{lead}</header>
<main>
{body}
</main>
</body>
</html>
"""
