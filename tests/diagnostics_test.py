import math

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from maxent_aug import diagnostics
from maxent_aug.spatial import affine_matrix, decompose_affine, invert_affine, warp_affine

SIZE = (32, 32)
IDENTITY = jnp.eye(2, 3)


def test_boxes_tell_width_and_spread():
    random = np.random.default_rng(0)
    half_width = random.uniform(0.1, 0.9, (50, 6))
    found = diagnostics.boxes(half_width)
    assert float(found["half_width_rotation"]) == pytest.approx(half_width[:, 2].mean(), abs=1e-5)
    expected = np.sqrt(np.mean((half_width - half_width.mean(0)) ** 2))
    assert float(found["spread_between"]) == pytest.approx(expected, rel=1e-4)
    same = diagnostics.boxes(np.tile(half_width[:1], (9, 1)))
    assert float(same["spread_between"]) == pytest.approx(0, abs=1e-6)


def test_draws_part_noise_from_image():
    random = np.random.default_rng(0)
    image = random.normal(0, 0.3, (4000, 2, 3)).astype(np.float32)
    noise = random.normal(0, 0.1, (2, 4000, 2, 3)).astype(np.float32)
    found = diagnostics.draws(*(np.eye(2, 3, dtype=np.float32) + image + noise))
    assert float(found["spread_of_draws"]) == pytest.approx(0.1 * 6**0.5, rel=0.05)
    assert float(found["spread_of_images"]) == pytest.approx(0.3 * 6**0.5, rel=0.05)
    still = np.tile(IDENTITY, (5, 1, 1))
    assert all(float(value) < 1e-3 for value in diagnostics.draws(still, still).values())
    shifted = affine_matrix(translation=np.array([0.3, 0.3]), shear=0.31)[None]
    assert float(diagnostics.draws(shifted, shifted)["beyond_bounds"]) == pytest.approx(0.5)


seen_by_jit = jax.jit(diagnostics.picture_transform, static_argnums=1)
collapse_by_jit = jax.jit(diagnostics.collapse, static_argnums=1)

warp = jax.jit(warp_affine)


@jax.jit
def picture(**parts):
    """The theta under which the picture undergoes `parts`."""
    return invert_affine(affine_matrix(**parts))


def centre_of_mass(image):
    """(x, y) in pixels from the middle."""
    image = np.asarray(image)[..., 0]
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    middle = (np.array(image.shape[::-1]) - 1) / 2
    return np.array([(image * x).sum(), (image * y).sum()]) / image.sum() - middle


def blob(x, y, size=SIZE, radius=2.0):
    """A soft spot at (x, y) pixels from the middle."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    columns, rows = columns - (size[1] - 1) / 2, rows - (size[0] - 1) / 2
    squares = (columns - x) ** 2 + (rows - y) ** 2
    return np.exp(-squares / (2 * radius**2))[..., None].astype(np.float32)


@pytest.mark.parametrize("rotation", [math.pi, -math.pi])
def test_half_a_turn_has_one_angle(rotation):
    theta = affine_matrix(rotation=rotation)
    assert float(diagnostics.picture_transform(theta, SIZE)["rotation_deg"]) == 180
    assert diagnostics.describe(theta[None], SIZE) == ["turned 180° left"]
    upside_down = diagnostics.picture_transform(-np.eye(2, 3, dtype=np.float32), SIZE)
    assert float(upside_down["rotation_deg"]) == 180


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_picture_transform_is_what_happens_to_the_pixels(size):
    rng = np.random.default_rng(0)
    for _ in range(5):
        rotation, shear = rng.uniform(-0.6, 0.6), rng.uniform(-0.3, 0.3)
        theta = affine_matrix(
            rotation=rotation,
            log_scale=rng.uniform(-0.2, 0.2),
            log_aspect=rng.uniform(-0.2, 0.2),
            shear=shear,
            translation=rng.uniform(-0.1, 0.1, 2),
            flip=rng.random() < 0.5,
        )
        seen = jax.device_get(seen_by_jit(theta, size))
        spot = rng.uniform(-4, 4, 2)
        # The parts in the order that the docstring gives, on the position of a spot.
        x, y = spot * [-1 if seen["flip"] else 1, 1]
        x, y = x * seen["scale"] * seen["aspect"] ** 0.5, y * seen["scale"] / seen["aspect"] ** 0.5
        x = x + seen["shear"] * y
        angle = np.deg2rad(seen["rotation_deg"])
        x, y = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        expected = [x + seen["shift_x_px"], y + seen["shift_y_px"]]
        moved = centre_of_mass(warp(blob(*spot, size, radius=1.5), theta))
        np.testing.assert_allclose(moved, expected, atol=0.1)


def test_signs_are_those_of_a_person():
    right = picture(translation=jnp.array([0.25, 0.0]))
    assert seen_by_jit(right, SIZE)["shift_x_px"] == pytest.approx(4)
    assert centre_of_mass(warp(blob(0, 0), right))[0] == pytest.approx(4, abs=0.01)
    down = picture(translation=jnp.array([0.0, 0.25]))
    assert seen_by_jit(down, SIZE)["shift_y_px"] == pytest.approx(4)
    assert centre_of_mass(warp(blob(0, 0), down))[1] == pytest.approx(4, abs=0.01)
    # A spot on the right goes up when the picture turns to the left.
    left = picture(rotation=-math.pi / 6)
    assert seen_by_jit(left, SIZE)["rotation_deg"] == pytest.approx(30, abs=1e-3)
    assert centre_of_mass(warp(blob(8, 0), left))[1] == pytest.approx(-4, abs=0.05)
    larger = picture(log_scale=math.log(1.5))
    assert seen_by_jit(larger, SIZE)["scale"] == pytest.approx(1.5)
    assert centre_of_mass(warp(blob(4, 0), larger))[0] == pytest.approx(6, abs=0.05)


def test_square_images_need_no_correction():
    theta = affine_matrix(rotation=0.3, log_scale=0.1, log_aspect=0.2, shear=0.1, translation=0.05)
    seen = seen_by_jit(theta, SIZE)
    parts = decompose_affine(invert_affine(theta))
    np.testing.assert_allclose(seen["rotation_deg"], -np.rad2deg(parts["rotation"]), rtol=1e-5)
    np.testing.assert_allclose(seen["aspect"], np.exp(parts["log_aspect"]), rtol=1e-5)
    np.testing.assert_allclose(seen["shear"], parts["shear"], rtol=1e-4)


ENTRY = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, -1e30, 1e-4]),
    st.floats(-1e6, 1e6, width=32),
)


@settings(deadline=None, max_examples=100)
@given(st.lists(ENTRY, min_size=6, max_size=6))
def test_finite_for_every_theta(entries):
    theta = jnp.array(entries, jnp.float32).reshape(2, 3)
    assert all(np.isfinite(v) for v in seen_by_jit(theta, SIZE).values())


@pytest.mark.parametrize(
    "linear", [[[0, 0], [0, 0]], [[1, 1], [1, 1]], [[1, 0], [0, 0]], [[0, 0], [0, 1e-9]]]
)
def test_degenerate_theta_is_an_extreme_enlargement(linear):
    theta = jnp.concatenate([jnp.array(linear, jnp.float32), jnp.full((2, 1), 0.5)], axis=-1)
    chex.assert_tree_all_finite(seen_by_jit(theta, SIZE))
    assert seen_by_jit(theta, SIZE)["scale"] == pytest.approx(1000, rel=1e-3)
    assert "1000x" in diagnostics.describe(theta[None], SIZE)[0]


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("entry", [(0, 0), (1, 2)])
def test_a_diverged_transform_is_not_hidden(broken, entry):
    theta = IDENTITY.at[entry].set(broken)
    seen = seen_by_jit(theta, SIZE)
    assert np.isnan(seen["rotation_deg"]) or np.isnan(seen["shift_y_px"])
    assert diagnostics.describe(theta[None], SIZE) == ["not finite"]


def test_displacement_is_that_of_the_corner_that_moves_most():
    theta = picture(rotation=0.1, log_scale=0.1, translation=jnp.array([0.1, -0.2]))
    ours = diagnostics.displacement_px(theta, (20, 30))
    to_output = np.asarray(invert_affine(theta))
    y, x = np.meshgrid(np.linspace(-1, 1, 41), np.linspace(-1, 1, 41))
    where = np.stack([x, y, np.ones_like(x)])
    moved = (np.tensordot(to_output, where, 1) - where[:2]) * np.array([15, 10])[:, None, None]
    assert ours == pytest.approx(np.hypot(*moved).max(), rel=1e-4)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "unchanged"),
        ({"rotation": 1e-4}, "unchanged"),
        ({"log_scale": 0.0035}, "moved 0.08 px"),
        ({"rotation": -math.radians(12)}, "turned 12° left"),
        ({"rotation": math.radians(3.14)}, "turned 3.1° right"),
        ({"log_scale": math.log(1.2)}, "1.20x"),
        ({"log_aspect": math.log(1.1)}, "1.10x wider"),
        ({"log_aspect": -math.log(1.1)}, "1.10x taller"),
        ({"shear": 0.05}, "shear 0.05"),
        ({"flip": True}, "mirrored"),
        ({"translation": jnp.array([3.1 / 16, -0.4 / 16])}, "3.1 px right 0.4 px up"),
        ({"translation": jnp.array([-0.25, 0.25])}, "4.0 px left 4.0 px down"),
        (
            {"rotation": -math.radians(12), "log_scale": math.log(1.2), "shear": 0.05},
            "turned 12° left, 1.20x, shear 0.05",
        ),
    ],
)
def test_describe(parts, words):
    assert diagnostics.describe(picture(**parts)[None], SIZE) == [words]


@pytest.mark.parametrize(
    ("color", "words"),
    [
        ((0, 0, 0, 0), "turned 12° left"),
        ((0.04, 0.004, -0.004, 0.008), "turned 12° left"),
        ((0.26, 0, 0, 0), "turned 12° left, 0.3 sd brighter"),
        ((-0.3, math.log(1.2), 0, 0), "turned 12° left, 0.3 sd darker, 1.20x contrast"),
        ((0, 0, math.log(0.85), math.radians(12)), "turned 12° left, 0.85x saturation, hue +12°"),
        ((0, 0, 0, -math.radians(12)), "turned 12° left, hue −12°"),
    ],
)
def test_describe_says_what_was_done_to_colours(color, words):
    theta = picture(rotation=-math.radians(12))
    assert diagnostics.describe(theta[None], SIZE, np.array([color])) == [words]
    alone = words.removeprefix("turned 12° left").removeprefix(", ") or "unchanged"
    assert diagnostics.describe(IDENTITY[None], SIZE, np.array([color])) == [alone]
    broken = diagnostics.describe(IDENTITY[None], SIZE, np.full((1, 4), np.nan))
    assert broken == ["colours not finite"]
    with pytest.raises(ValueError, match=r"must be \[1, 4\]"):
        diagnostics.describe(theta[None], SIZE, np.array(color))


def test_describe_needs_a_batch():
    with pytest.raises(ValueError, match=r"\(2, 3\).*\[N, 2, 3\]"):
        diagnostics.describe(IDENTITY, SIZE)
    with pytest.raises(ValueError, match=r"\(3, 3\)"):
        diagnostics.picture_transform(jnp.eye(3), SIZE)
    with pytest.raises(ValueError, match=r"\(0, 32\)"):
        diagnostics.picture_transform(IDENTITY, (0, 32))


def batch(count, seed=0):
    rng = np.random.default_rng(seed)
    theta = affine_matrix(
        rotation=rng.normal(0.2, 0.3, count),
        log_scale=rng.normal(-0.1, 0.1, count),
        shear=rng.normal(0, 0.1, count),
        translation=rng.normal(0, 0.2, (count, 2)),
    )
    before, after = rng.normal(0, 3, (2, count, 10)).astype(np.float32)
    return theta, jnp.array(before), jnp.array(after)


def test_summary_against_numpy():
    theta, before, after = batch(12)
    images = jax.device_get(diagnostics.per_image(theta, SIZE, before, after))
    summary = jax.device_get(collapse_by_jit(theta, SIZE, before, after))
    t = np.asarray(theta, np.float64)
    distance = np.sqrt(((t - np.eye(2, 3)) ** 2).sum((1, 2)))
    spread = np.sqrt(((t - t.mean(0)) ** 2).sum((1, 2)).mean())
    p = np.exp(before) / np.exp(before).sum(-1, keepdims=True)
    shift = np.hypot(images["shift_x_px"], images["shift_y_px"])
    expected = {
        "distance_from_identity": distance.mean(),
        "spread": spread,
        "entropy_before": -(p * np.log2(p)).sum(-1).mean(),
        "scale": images["scale"].mean(),
        "scale_sd": images["scale"].std(),
        "shear_sd": images["shear"].std(),
        "shift_px": shift.mean(),
        "shift_px_sd": shift.std(),
    }
    for name, value in expected.items():
        assert summary[name] == pytest.approx(value, rel=1e-4), name
    # Angles far from the seam: close to the plain deviation.
    assert summary["rotation_deg_sd"] == pytest.approx(images["rotation_deg"].std(), rel=0.02)
    assert all(np.shape(value) == () for value in summary.values())


def test_rotation_is_averaged_on_the_circle():
    theta = picture(rotation=jnp.deg2rad(jnp.array([178.0, -178.0])))
    logits = jnp.zeros((2, 3))
    summary = collapse_by_jit(theta, SIZE, logits, logits)
    assert abs(summary["rotation_deg"]) == pytest.approx(180, abs=0.01)
    assert summary["rotation_deg_sd"] == pytest.approx(2, abs=0.01)


def test_the_two_collapses_have_their_numbers():
    logits = jnp.zeros((4, 3))
    still = collapse_by_jit(jnp.tile(IDENTITY, (4, 1, 1)), SIZE, logits, logits)
    assert still["distance_from_identity"] == still["spread"] == still["outside_frame"] == 0
    assert still["scale"] == 1
    constant = jnp.tile(picture(log_scale=-math.log(2)), (4, 1, 1))
    same = collapse_by_jit(constant, SIZE, logits, logits)
    assert same["distance_from_identity"] == pytest.approx(math.sqrt(2))
    assert same["spread"] == 0
    # Half as large: three quarters of the frame show what lies outside.
    assert same["outside_frame"] == pytest.approx(0.75)


def test_many_large_images_take_little_memory():
    program = diagnostics.per_image.lower(
        jax.ShapeDtypeStruct((10_000, 2, 3), jnp.float32), (224, 224), *[jnp.zeros((10_000, 2))] * 2
    ).compile()
    assert program.memory_analysis().temp_size_in_bytes < 300e6


def test_batches_on_the_host_equal_one_batch_and_jit_equals_eager():
    theta, before, after = batch(300)  # more than there are grids at a time
    parts = [
        jax.device_get(
            diagnostics.per_image(theta[i : i + 75], SIZE, before[i : i + 75], after[i : i + 75])
        )
        for i in range(0, 300, 75)
    ]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    whole = diagnostics.collapse(theta, SIZE, before, after)
    chex.assert_trees_all_close(diagnostics.summarise(joined), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [(4.5, 4), (float("nan"), 4), 4, (0, 4), (4,)])
def test_a_size_that_is_none_is_named(size):
    with pytest.raises(ValueError, match=r"size must be \(height, width\), two positive integers"):
        diagnostics.picture_transform(np.eye(2, 3), size)
    with pytest.raises(ValueError, match=r"size must be \(height, width\)"):
        diagnostics.describe(np.eye(2, 3)[None], size)
    with pytest.raises(ValueError, match=r"size must be \(height, width\)"):
        diagnostics.collapse(np.eye(2, 3)[None], size, np.zeros((1, 2)), np.zeros((1, 2)))


def test_logits_of_other_images_are_refused():
    theta, logits = [np.eye(2, 3).tolist()] * 4, np.zeros((4, 3))
    with pytest.raises(ValueError, match=r"the same images, got \[4, 4, 2\] of them"):
        diagnostics.collapse(theta, SIZE, logits, logits[:2])
