import io

import matplotlib
import numpy as np
import pytest
from matplotlib import image as png
from matplotlib.transforms import Bbox

from maxent_aug import figures


def records(seeds=3, pretrain=4, augment=3, finetune=5, branches=("printed", "intended")):
    rng = np.random.default_rng(0)
    out = []

    def add(seed, branch, phase, epochs, **values):
        for epoch in range(1, epochs + 1):
            noise = {name: value + rng.normal(0, 0.01) for name, value in values.items()}
            out.append({"seed": seed, "branch": branch, "phase": phase, "epoch": epoch, **noise})

    losses = {
        "train_discriminator_loss": 1.3,
        "test_discriminator_loss": 1.4,
        "train_generator_loss": -0.7,
        "test_generator_loss": -0.6,
    }
    for seed in range(seeds):
        add(seed, "pretrain", "pretrain", pretrain, test_accuracy=0.5)
        add(seed, "baseline", "finetune", finetune, test_accuracy=0.6)
        for branch in branches:
            add(seed, branch, "augment", augment, test_accuracy=0.1, **losses)
            add(seed, branch, "finetune", finetune, test_accuracy=0.7)
    return out


def parameters(count, identity=False):
    rng = np.random.default_rng(0)
    spread = 0.0 if identity else 1.0
    return {
        key: middle + spread * least * rng.standard_normal(count)
        for key, _, middle, least in figures.TRANSFORMS
    }


def pairs(count, shape=(8, 8, 1)):
    rng = np.random.default_rng(0)
    images, warped = rng.integers(0, 256, (2, count, *shape), dtype=np.uint8)
    words = ["turned 12° right, 1.20x, 1.05x taller, shear -0.05, 13 px right 0.4 px up"] * count
    return images, warped, words, rng.random(count), rng.random(count) + 10


def draw(figure, dpi=60):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    "case",
    [
        records(),
        records(seeds=1),
        records(seeds=1, pretrain=1, augment=1, finetune=1),
        records(branches=("gap", "target", "a_third", "a_fourth", "a_fifth")),
        records()[:1],
        [],
        [r | {"test_accuracy": None, "train_generator_loss": None} for r in records()],
    ],
    ids=["usual", "one seed", "one epoch", "other branches", "just begun", "nothing", "nulls"],
)
def test_curves_draw(case):
    for figure in (figures.accuracy(case), figures.adversarial_losses(case)):
        assert draw(figure).getbuffer().nbytes > 1000


def test_a_plot_of_collapses_has_a_mark_for_each_variant_however_many_forms():
    forms = ("printed", "intended", "gap", "target", "a_fifth", "a_sixth", "a_seventh")
    spreads = {"distance_from_identity": 0.3, "spread_of_images": 0.2}
    table = {f"{form}-alone-bounded-stochastic": spreads for form in forms}
    figure = figures.collapses(table, no_distance=0.05, one_transform=0.1)
    assert len(figure.axes[0].collections) == len(forms)
    assert draw(figure).getbuffer().nbytes > 1000


def test_accuracy_is_one_axis_without_the_epochs_of_phase_2():
    case = records()
    axes = figures.accuracy(case).axes[0]
    lines = {line.get_label().split(":")[0]: line.get_xydata() for line in axes.lines}
    assert list(lines["pretraining, shared"][:, 0]) == [1, 2, 3, 4]
    for branch in ("baseline", "printed", "intended"):
        # From the last point that all share.
        assert list(lines[branch][:, 0]) == [4, 5, 6, 7, 8, 9]
        np.testing.assert_array_equal(lines[branch][0], lines["pretraining, shared"][-1])
        final = [
            r["test_accuracy"]
            for r in case
            if (r["branch"], r["phase"], r["epoch"]) == (branch, "finetune", 5)
        ]
        assert lines[branch][-1, 1] == pytest.approx(np.mean(final))
        label = next(x for x in axes.get_legend_handles_labels()[1] if x.startswith(branch))
        assert f"{np.mean(final):.4f} ± {np.std(final, ddof=1):.4f}" in label


def test_losses_are_means_over_seeds_with_the_level_of_guessing():
    case = records()
    figure = figures.adversarial_losses(case)
    train, test = figure.axes[0].lines[:2]
    assert train.get_linestyle() != test.get_linestyle()
    first = [
        r["train_discriminator_loss"]
        for r in case
        if (r["branch"], r["phase"], r["epoch"]) == ("printed", "augment", 1)
    ]
    assert train.get_ydata()[0] == pytest.approx(np.mean(first))
    guessing = [axes.lines[-1].get_ydata()[0] for axes in figure.axes]
    assert guessing == pytest.approx([2 * np.log(2), -np.log(2)])


def test_branches_keep_their_colour_whatever_is_beside_them():
    def colours(branches):
        lines = figures.adversarial_losses(records(branches=branches)).axes[0].lines
        return {b: lines[2 * i].get_color() for i, b in enumerate(branches)}

    assert colours(("printed", "gap"))["printed"] == colours(("gap", "printed"))["printed"]
    assert len(set(colours(("printed", "intended", "gap", "target")).values())) == 4


@pytest.mark.parametrize(
    "case",
    [
        {"printed": parameters(100, identity=True), "intended": parameters(100)},
        {"printed": parameters(50, identity=True)},
        {"intended": parameters(1)},
        {
            "intended": {
                k: np.append(v, [1e9, -1e9, np.nan, np.inf]) for k, v in parameters(1000).items()
            }
        },
        {"intended": {k: np.full(3, np.nan) for k in parameters(1)}},
        {f"branch {i}": parameters(20) for i in range(5)},
        {},
    ],
    ids=["usual", "identity", "one image", "outliers", "nan", "many branches", "nothing"],
)
def test_transforms_draw(case):
    figure = figures.transforms(case)
    assert draw(figure).getbuffer().nbytes > 1000
    for axes, (_, _, identity, least) in zip(figure.axes, figures.TRANSFORMS, strict=True):
        low, high = axes.get_xlim()
        assert low < identity < high
        assert high - low < 100 * least  # whatever the outliers


def test_the_identity_is_a_needle_on_the_line():
    figure = figures.transforms({"printed": parameters(50, identity=True)})
    for axes, (_, _, identity, _) in zip(figure.axes, figures.TRANSFORMS, strict=True):
        heights, edges, _ = axes.patches[0].get_data()
        (highest,) = np.flatnonzero(heights)
        assert heights[highest] == 1
        assert (edges[highest] + edges[highest + 1]) / 2 == pytest.approx(identity, abs=1e-9)


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (20, 30, 3)])
def test_pixels_are_crisp_squares(shape):
    images, warped, *texts = pairs(9, shape)
    figure = figures.augmented(images, warped, *texts)
    sheet = np.rint(png.imread(draw(figure, dpi="figure"))[..., :3] * 255).astype(np.uint8)
    shown = [image for pair in zip(images, warped, strict=True) for image in pair]
    assert len(figure.axes) == len(shown)
    for axes, image in zip(figure.axes, shown, strict=True):
        left, bottom, right, top = np.rint(axes.bbox.extents).astype(int)
        times = (right - left) // shape[1]
        assert times > 1
        expected = image.repeat(times, 0).repeat(times, 1)
        place = sheet[len(sheet) - top : len(sheet) - bottom, left:right]
        np.testing.assert_array_equal(place, np.broadcast_to(expected, place.shape))


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (10, 40, 1), (224, 224, 3)])
def test_texts_and_images_do_not_overlap(shape):
    figure = figures.augmented(*pairs(10, shape), row_names=("as printed", "as intended"))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    boxes += [axes.bbox for axes in figure.axes]
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1
        for other in boxes[:i]:
            common = Bbox.intersection(box, other)
            assert common is None or min(common.size) < 0.5


def test_augmented_says_what_does_not_fit():
    images, warped, words, before, after = pairs(3)
    with pytest.raises(ValueError, match="2 words"):
        figures.augmented(images, warped, words[:2], before, after)
    with pytest.raises(ValueError, match=r"\(0, 8, 8, 1\)"):
        figures.augmented(images[:0], warped[:0], [], [], [])


@pytest.mark.parametrize("shape", [(8, 8, 1), (32, 32, 3), (10, 40, 1), (12, 20, 4)])
def test_versions_have_their_words_below_them(shape):
    images, warped, words, *_ = pairs(3 * 4, shape)
    rows = [words[4 * i : 4 * i + 4] for i in range(3)]
    figure = figures.versions(images[:3], warped.reshape(3, 4, *shape), title="t", words=rows)
    figure.draw_without_rendering()
    assert len(figure.axes) == 3 + 12
    shown = [axes.bbox for axes in figure.axes]
    texts = {text.get_text(): text.get_window_extent() for text in figure.texts}
    for row in rows:
        for text in row:
            assert text.split(", ")[0] in texts
    for box in texts.values():
        assert figure.bbox.y0 <= box.y0
        for other in shown:
            common = Bbox.intersection(box, other)
            assert common is None or min(common.size) < 0.5
    with pytest.raises(ValueError, match="3 times 4"):
        figures.versions(images[:3], warped.reshape(3, 4, *shape), title="t", words=rows[:2])


def test_half_widths_are_drawn_by_coordinate():
    names = [f"half_width_{name}" for name, _ in figures.COORDINATES]
    records = [
        {"epoch": epoch, "phase": "joint"}
        | {name: 0.1 * i + 0.01 * epoch for i, name in enumerate(names)}
        for epoch in (1, 2, 3)
    ]
    axes = figures.half_widths([{"epoch": 0}, *records, records[0] | {"phase": "finetune"}]).axes[0]
    assert len(axes.lines) == len(names)
    for index, line in enumerate(axes.lines):
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
        np.testing.assert_allclose(line.get_ydata(), 0.1 * index + np.array([0.01, 0.02, 0.03]))


def test_no_global_state_is_touched():
    before = dict(matplotlib.rcParams)
    draw(figures.accuracy(records()))
    draw(figures.augmented(*pairs(2)))
    assert dict(matplotlib.rcParams) == before
