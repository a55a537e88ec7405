"""Records and arrays -> matplotlib figures. Nothing is shown or saved here, no global state.

`figure.savefig(path)` writes 1800 pixels across, sharp at the 900 of a README on a dense screen.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from maxent_aug.diagnostics import COORDINATES
from maxent_aug.metrics import Record

WIDTH_INCHES = 9.0
DPI = 200

# Okabe and Ito's palette, told apart with every kind of colour vision.
BLUE = "#0072B2"
COLOURS = {"baseline": "#000000", "printed": "#D55E00", "intended": BLUE}
OTHER_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#666666"

COLUMNS = 8
MOST_CHARACTERS = 18  # of small text that fit under an image

# What is plotted of a theta: key of diagnostics.picture_transform, label, identity, least range.
TRANSFORMS = (
    ("rotation_deg", "rotation, degrees (left is positive)", 0.0, 2.0),
    ("scale", "scale (above 1: enlarged)", 1.0, 0.05),
    ("aspect", "aspect (above 1: wider)", 1.0, 0.05),
    ("shear", "shear", 0.0, 0.05),
    ("shift_x_px", "shift to the right, pixels", 0.0, 0.5),
    ("shift_y_px", "shift down, pixels", 0.0, 0.5),
)


def adversarial_losses(records: Iterable[Record]) -> Figure:
    """The paper's Figure 2: adversarial losses of discriminator and generator in phase 2.

    Args:
      records: of metrics.jsonl; those with the phase "augment" are used, and of these branch,
        epoch and {train,test}_{discriminator,generator}_loss, in nats and without lambda L_ME.

    Returns:
      Two panels; a line is the mean over seeds, the band one standard deviation of the training
      losses to each side.
    """
    records = [r for r in records if r["phase"] == "augment"]
    branches = _branches(records)
    colours = _colours(branches)
    figure = _figure(4.0)
    figure.suptitle("Adversarial losses while the augmenter trains", fontsize=12)
    for axes, network in zip(figure.subplots(1, 2), ("discriminator", "generator"), strict=True):
        for branch in branches:
            own = [r for r in records if r["branch"] == branch]
            for split, style in (("train", "-"), ("test", (0, (4, 2)))):
                points = [(r["epoch"], r.get(f"{split}_{network}_loss")) for r in own]
                band = split == "train"  # four bands on each other hide the lines
                _draw_curve(axes, points, color=colours[branch], band=band, linestyle=style)
        _tidy(axes, "epoch of phase 2", f"{network} loss (nats)")
        axes.set_title(network.capitalize(), fontsize=11)
        _mark_guessing(axes, network)
    handles = [Line2D([], [], color=colours[b], label=b) for b in branches]
    handles += [
        Line2D([], [], color=GREY, label="train"),
        Line2D([], [], color=GREY, linestyle=(0, (4, 2)), label="test"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def accuracy(records: Iterable[Record]) -> Figure:
    """Test accuracy of the classifier, epoch by epoch, the branches after the shared pretraining.

    Args:
      records: of metrics.jsonl; seed, branch, phase, epoch and test_accuracy (a share) are used.
        Phase "pretrain" is drawn once; phase "augment" leaves the classifier alone and takes no
        epochs here; a branch's other phases follow each other.

    Returns:
      One panel; a line is the mean over seeds, its band one standard deviation to each side.
    """
    records = [r for r in records if r["phase"] != "augment" and r.get("test_accuracy") is not None]
    pretrain = [r for r in records if r["phase"] == "pretrain"]
    shared = max((r["epoch"] for r in pretrain), default=0)
    last = [(shared, r["test_accuracy"]) for r in pretrain if r["epoch"] == shared]
    figure = _figure(4.2)
    axes = figure.subplots()
    points = [(r["epoch"], r["test_accuracy"]) for r in pretrain]
    _draw_curve(axes, points, color=GREY, label="pretraining, shared")
    rest = [r for r in records if r["phase"] != "pretrain"]
    branches = _branches(rest)
    colours = _colours(branches)
    for branch in branches:
        points, start = list(last), shared
        own = [r for r in rest if r["branch"] == branch]
        for phase in dict.fromkeys(r["phase"] for r in own):
            points += [(start + r["epoch"], r["test_accuracy"]) for r in own if r["phase"] == phase]
            start = max(epoch for epoch, _ in points)
        final = np.array([value for epoch, value in points if epoch == start])
        style: dict[str, Any] = {"label": f"{branch}: {_mean_sd(final)}"}
        if branch == "baseline":  # dashes above the others: a branch may lie exactly on it
            style |= {"linestyle": (0, (4, 2)), "zorder": 3}
        _draw_curve(axes, points, color=colours[branch], **style)
    if pretrain and rest:
        axes.axvline(shared, color=GREY, linewidth=0.8, linestyle=":")
    _tidy(axes, "epoch of the classifier", "accuracy")
    then = ": one pretrained classifier, then the branches" if pretrain else ""
    axes.set_title(f"Accuracy on images not trained on{then}", fontsize=12)
    if axes.lines:
        figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure


def transforms(parameters_by_branch: Mapping[str, Mapping[str, Any]]) -> Figure:
    """How the transforms of images are distributed in each branch.

    Args:
      parameters_by_branch: for each branch the dict of `diagnostics.per_image` (or of
        `picture_transform`), arrays [N]. Values that are not finite are left out.

    Returns:
      Six panels, one a parameter, with a histogram a branch, each as high as its highest bin.
      The outermost 0.5 % are counted in the first and last bin, so that outliers flatten nothing.
    """
    branches = list(parameters_by_branch)
    colours = _colours(branches)
    figure = _figure(2.0 + 1.3 * max(1, len(branches)))
    figure.suptitle("Transforms: median (and where 90 % of the images lie)", fontsize=12)
    panels = figure.subplots(2, 3).flat
    for axes, (key, label, identity, least) in zip(panels, TRANSFORMS, strict=True):
        values = {b: _finite(parameters_by_branch[b][key]) for b in branches}
        low, high = _range(list(values.values()), identity, least)
        for row, branch in enumerate(reversed(branches)):
            _draw_ridge(axes, values[branch], row, branch, colours[branch], identity, low, high)
        axes.axvline(identity, color=GREY, linewidth=0.8, linestyle=":", zorder=0)
        axes.set(xlim=(low, high), ylim=(-0.02, max(1, len(branches)) * 1.45), yticks=[])
        axes.set_xlabel(label, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def augmented(
    images: Any,
    warped: Any,
    words: Sequence[str],
    entropy_before: Any,
    entropy_after: Any,
    *,
    columns: int = COLUMNS,
    row_names: Sequence[str] = (),
) -> Figure:
    """The paper's Figure 3: inputs above outputs, and what was done to each in words.

    Args:
      images, warped: [N, H, W, C] uint8, C = 1 or 3.
      words: N descriptions (`diagnostics.describe`); commas part lines.
      entropy_before, entropy_after: [N] bits.
      columns: pairs a row, 1 to 8.
      row_names: a heading for each row, e.g. the branch.

    Raises:
      ValueError: if the shapes or lengths do not agree, or for none at all.
    """
    images, warped = np.asarray(images), np.asarray(warped)
    count = len(images)
    lengths = {len(warped), len(words), len(entropy_before), len(entropy_after)}
    if images.ndim != 4 or images.shape != warped.shape or lengths != {count} or not count:
        raise ValueError(
            f"images {images.shape}, warped {warped.shape}, {len(words)} words and entropies "
            f"{len(entropy_before)} and {len(entropy_after)}: expected N > 0 of each, [N, H, W, C]"
        )
    margin, gap, line, top = 110, 14, 26, 70  # all in pixels of the saved figure
    cell = (int(WIDTH_INCHES * DPI) - margin) // COLUMNS
    shown = _crisp(images.shape[1:3], cell - gap)
    texts = [_lines(text) for text in words]
    starts = range(0, count, columns)
    heading = 44 if row_names else 0
    blocks = [
        heading + 2 * shown[0] + gap + line * (2 + max(map(len, texts[i : i + columns])))
        for i in starts
    ]
    figure = Figure(figsize=(WIDTH_INCHES, (top + sum(blocks)) / DPI), dpi=DPI)
    _put_text(
        figure, margin, 16, "Above: the input. Below: what the augmenter made of it", fontsize=11
    )
    for row, (start, block) in enumerate(zip(starts, blocks, strict=True)):
        if row < len(row_names):
            _put_text(figure, margin, top, row_names[row], fontsize=9, weight="bold")
        y = top + heading
        y_output = y + shown[0] + gap
        below = y_output + shown[0] + 10
        for name, y_name in (("input", y), ("output", y_output)):
            style = {"fontsize": 8, "ha": "right", "va": "center", "color": GREY}
            _put_text(figure, margin - 14, y_name + shown[0] / 2, name, **style)
        for i in range(start, min(start + columns, count)):
            x = margin + (i - start) * cell
            _put_image(figure, images[i], x, y, shown)
            _put_image(figure, warped[i], x, y_output, shown)
            bits = f"{entropy_before[i]:.2f} → {entropy_after[i]:.2f} bits"
            _put_text(figure, x, below, bits, fontsize=7, weight="bold")
            _put_lines(figure, x, below + line, texts[i], line, fontsize=7)
        top += block
    return figure


def _crisp(size: tuple[int, ...], most: int) -> tuple[int, int]:
    """(height, width) in which an image of `size` is shown, in pixels of the saved figure."""
    height, width = size
    # A whole number of these for each of the image's keeps them crisp squares.
    enlarge = most / width
    enlarge = int(enlarge) if enlarge >= 1 else enlarge
    return round(height * enlarge), round(width * enlarge)


def versions(
    images: Any, augmented: Any, *, title: str, words: Sequence[Sequence[str]] | None = None
) -> Figure:
    """A row for each image: the image, a gap, and how it was augmented.

    Args:
      images: [N, H, W, C] uint8, C = 1 or 3.
      augmented: [N, K, H, W, C] uint8.
      title: of the figure.
      words: N times K descriptions (`diagnostics.describe`), to stand below; commas part lines.

    Raises:
      ValueError: if the shapes do not agree.
    """
    images, augmented = np.asarray(images), np.asarray(augmented)
    if augmented.ndim != 5 or images.shape != augmented.shape[:1] + augmented.shape[2:]:
        raise ValueError(
            f"images {images.shape} and augmented {augmented.shape}: expected [N, H, W, C] and "
            "[N, K, H, W, C]"
        )
    gap, top, line = 12, 70, 22  # in pixels of the saved figure
    count, repeats, height, width = augmented.shape[:4]
    texts = [[_lines(text) for text in row] for row in words] if words else [[[]]] * count
    if [len(row) for row in texts] != [repeats if words else 1] * count:
        raise ValueError(f"words are not {count} times {repeats} descriptions")
    below = line * max((len(text) for row in texts for text in row), default=0)
    cell = int(WIDTH_INCHES * DPI - 4 * gap) // (repeats + 1) - gap
    shown = round(cell * height / width), cell
    block = shown[0] + below + gap
    figure = Figure(figsize=(WIDTH_INCHES, (top + count * block + gap) / DPI), dpi=DPI)
    _put_text(figure, gap, 16, title, fontsize=11)
    for row in range(count):
        y = top + row * block
        _put_image(figure, images[row], gap, y, shown)
        for column in range(repeats):
            x = 4 * gap + (column + 1) * (cell + gap)
            _put_image(figure, augmented[row, column], x, y, shown)
            if words:
                _put_lines(figure, x, y + shown[0] + 6, texts[row][column], line, fontsize=6)
    return figure


def half_widths(records: Iterable[Record]) -> Figure:
    """How wide the boxes of a stochastic augmenter are, epoch by epoch.

    Args:
      records: of metrics.jsonl; epoch and half_width_NAME (`diagnostics.boxes`) of phase "joint",
        in which they are learned, are used.

    Returns:
      One panel, a line a coordinate: the mean over seeds, its band one standard deviation.
    """
    records = [r for r in records if "half_width_tx" in r and r["phase"] == "joint"]
    figure = _figure(4.2)
    axes = figure.subplots()
    colours = (*COLOURS.values(), *OTHER_COLOURS, "#8C564B", "#999999", "#5E3C99")
    for (name, label), colour in zip(COORDINATES, colours, strict=True):
        key = f"half_width_{name}"
        if points := [(r["epoch"], r[key]) for r in records if key in r]:
            _draw_curve(axes, points, color=colour, label=label)
    _tidy(axes, "epoch", "half-width, share of the bound")
    axes.set_ylim(0, 1)
    axes.set_title("Half-widths of the boxes that transforms are drawn from", fontsize=12)
    figure.legend(loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def collapses(
    table: Mapping[str, Mapping[str, Any]], *, no_distance: float, one_transform: float
) -> Figure:
    """Where variants of the augmenter end: distance from the identity, spread between images.

    Args:
      table: for each variant, named FORM-JUDGE-THETA-DRAWS, distance_from_identity and
        spread_of_images.
      no_distance: below it is the identity.
      one_transform: spread, as a share of the distance, below which all images are changed alike.

    Returns:
      One panel: colour is the form of the loss, a filled mark has a discriminator, its shape says
      whether theta is bounded and whether noise is drawn. Beyond a dotted line is a collapse.
    """
    figure = _figure(5.4)
    axes = figure.subplots()
    forms = list(dict.fromkeys(name.rsplit("-", 3)[0] for name in table))
    colours = _colours(forms)
    shapes = {
        ("free", "deterministic"): "o",
        ("free", "stochastic"): "^",
        ("bounded", "deterministic"): "s",
        ("bounded", "stochastic"): "D",
    }
    for name, row in table.items():
        form, judge, theta, draws = name.rsplit("-", 3)
        colour = colours[form]
        axes.scatter(
            max(row["distance_from_identity"], 1e-4),
            max(row["spread_of_images"], 1e-4),
            marker=shapes[theta, draws],
            s=70,
            facecolors=colour if judge == "discriminator" else "none",
            edgecolors=colour,
            linewidths=1.5,
            alpha=0.85,
        )
    axes.set(xscale="log", yscale="log")
    (low, high), of_points = axes.get_xlim(), axes.get_ylim()
    low = min(low, 0.6 * no_distance)  # so that the border of the identity is always in sight
    dotted = {"color": GREY, "linewidth": 0.8, "linestyle": ":"}
    axes.axvline(no_distance, **dotted)
    axes.plot([low, high], [one_transform * low, one_transform * high], **dotted)
    axes.set(xlim=(low, high), ylim=of_points)
    _tidy(axes, "distance from the identity, mean ‖θ − I‖", "spread between images")
    axes.xaxis.set_major_locator(LogLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.set_title(
        "Left of the upright line: the identity. Below the slanting one: the same for all images",
        fontsize=12,
    )
    handles = [
        Line2D([], [], marker="o", linestyle="", color=colours[form], label=form) for form in forms
    ]
    grey = partial(Line2D, [], [], linestyle="", color=GREY)
    handles += [grey(marker=shape, label=", ".join(words)) for words, shape in shapes.items()]
    handles.append(grey(marker="o", markerfacecolor="none", label="without discriminator"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def label_curves(
    labelled: Sequence[int], accuracy: Mapping[str, Sequence[Sequence[float]]]
) -> Figure:
    """Test accuracy by the number of labelled images.

    Args:
      labelled: N numbers of images.
      accuracy: for each strategy a list [seeds, N].

    Returns:
      One panel; a line is the mean over seeds, its band one standard deviation to each side.
    """
    figure = _figure(4.2)
    axes = figure.subplots()
    colours = _colours(list(accuracy))
    for name, per_seed in accuracy.items():
        points = [pair for row in per_seed for pair in zip(labelled, row, strict=True)]
        _draw_curve(axes, points, color=colours[name], label=name)
    _tidy(axes, "labelled images", "accuracy")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    return figure


def comparison(table: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Accuracy of each row of a comparison, the first on top.

    Args:
      table: by name: mean, sd (None for one seed) and per_seed, a mapping from seed to accuracy.

    Returns:
      One panel: a small dot for each seed, a large one for their mean, a bar of one standard
      deviation to each side.
    """
    figure = _figure(1.2 + 0.28 * max(1, len(table)))
    axes = figure.subplots()
    for y, row in enumerate(table.values()):
        seeds = list(row["per_seed"].values())
        axes.plot(seeds, [y] * len(seeds), "o", color=GREY, markersize=3, zorder=3)
        axes.errorbar(row["mean"], y, xerr=row["sd"], fmt="o", color=BLUE)
    axes.set_yticks(range(len(table)), table)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy after the last epoch")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure


def _put_text(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Text with its left upper corner at (x, y) in pixels from the left upper corner."""
    width, height = figure.bbox.size
    figure.text(x / width, 1 - y / height, text, **{"va": "top", **style})


def _put_lines(
    figure: Figure, x: float, y: float, lines: Sequence[str], apart: float, *, fontsize: float
) -> None:
    """Text below text, so many pixels apart."""
    for number, text in enumerate(lines):
        _put_text(figure, x, y + number * apart, text, fontsize=fontsize, color="#333333")


def _put_image(figure: Figure, image: np.ndarray, x: int, y: int, shown: tuple[int, int]) -> None:
    """A uint8 image `shown` (height, width) pixels large, its left upper corner at (x, y)."""
    width, height = figure.bbox.size
    place = (x / width, 1 - (y + shown[0]) / height, shown[1] / width, shown[0] / height)
    axes = figure.add_axes(place)
    axes.set_axis_off()
    # Grey as three equal channels: a colour map would round some levels.
    axes.imshow(
        image if image.shape[2] > 1 else np.broadcast_to(image, (*image.shape[:2], 3)),
        aspect="auto",
        interpolation="nearest" if shown[1] >= image.shape[1] else "antialiased",
    )


def _figure(height_inches: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)
    return Figure(figsize=(WIDTH_INCHES, height_inches), dpi=DPI, layout=layout)


def _branches(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(r["branch"] for r in records))


def _colours(branches: Sequence[str]) -> dict[str, str]:
    others = [b for b in branches if b not in COLOURS]
    spare = {b: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, b in enumerate(others)}
    return {b: COLOURS.get(b) or spare[b] for b in branches}


def _draw_curve(
    axes: Axes,
    points: Iterable[tuple[int, float | None]],
    *,
    color: str,
    band: bool = True,
    **style: Any,
) -> None:
    """Mean of the values at each epoch, with a band of one standard deviation over them."""
    by_epoch: dict[int, list[float]] = {}
    for epoch, value in points:
        if value is not None and np.isfinite(value):
            by_epoch.setdefault(epoch, []).append(value)
    if not by_epoch:
        return
    epochs = sorted(by_epoch)
    mean = np.array([np.mean(by_epoch[e]) for e in epochs])
    sd = np.array([np.std(by_epoch[e], ddof=1) if len(by_epoch[e]) > 1 else 0 for e in epochs])
    marker = "o" if len(epochs) == 1 else None
    axes.plot(epochs, mean, color=color, linewidth=1.6, marker=marker, **style)
    if band and sd.any():
        axes.fill_between(epochs, mean - sd, mean + sd, color=color, alpha=0.15, linewidth=0)


def _tidy(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def _mark_guessing(axes: Axes, network: str) -> None:
    """A line where the discriminator says 1/2 to all: 2 ln 2 for D, -ln 2 or ln 2 for G."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [[0.0]])
    # log(1 - D) is below 0, the non-saturating -log D above.
    level = 2 * np.log(2) if network == "discriminator" else np.copysign(np.log(2), values.mean())
    axes.axhline(level, color=GREY, linewidth=1, linestyle=":", zorder=1)
    axes.annotate(
        "D guesses",
        (1, level),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=GREY,
    )


def _mean_sd(values: np.ndarray) -> str:
    if len(values) < 2:
        return f"{values.mean():.4f}"
    return f"{values.mean():.4f} ± {values.std(ddof=1):.4f} (sd, {len(values)} seeds)"


def _finite(values: Any) -> np.ndarray:
    values = np.asarray(values, float).ravel()
    return values[np.isfinite(values)]


def _range(values: Sequence[np.ndarray], identity: float, least: float) -> tuple[float, float]:
    """Limits that hold the identity and all but the outermost values of each branch."""
    inner = [np.quantile(v, (0.005, 0.995)) for v in values if len(v)]
    low = min([identity - least, *(q[0] for q in inner)])
    high = max([identity + least, *(q[1] for q in inner)])
    room = 0.06 * (high - low)
    return low - room, high + room


def _draw_ridge(
    axes: Axes,
    values: np.ndarray,
    row: int,
    branch: str,
    colour: str,
    identity: float,
    low: float,
    high: float,
) -> None:
    """A histogram as high as its highest bin, on a base line of its own."""
    base = 1.45 * row
    step = (high - low) / 60
    # Bins are centred on the identity, so that images left alone make one needle.
    edges = identity + step * (np.arange(-62, 62) + 0.5)
    edges = edges[(edges > low - step) & (edges < high + step)]
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)
    top = base + counts / max(1, counts.max())
    axes.stairs(top, edges, baseline=base, fill=True, color=colour, alpha=0.35)
    axes.stairs(top, edges, baseline=base, color=colour, linewidth=0.9)
    spread = "no values"
    if len(values):
        low_90, middle, high_90 = (_short(q) for q in np.quantile(values, (0.05, 0.5, 0.95)))
        spread = f"{middle} ({low_90} to {high_90})"
    axes.annotate(
        f"{branch}: {spread}",
        (0.0, base + 1.06),
        xycoords=("axes fraction", "data"),
        fontsize=8,
        color=colour,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )


def _short(value: float) -> str:
    """Two decimals, fewer for large numbers, and no -0.00."""
    text = f"{value:.2f}" if abs(value) < 100 else f"{value:.4g}"
    return text.removeprefix("-") if not float(text) else text


def _lines(words: str) -> list[str]:
    """One line a part of the description; a shift in x and y takes two where it is long."""
    lines = []
    for part in words.split(", "):
        head, px, tail = part.partition(" px ")
        if px and len(part) > MOST_CHARACTERS and " " in tail:
            direction, rest = tail.split(" ", 1)
            lines += [f"{head} px {direction}", rest]
        else:
            lines.append(part)
    return lines
