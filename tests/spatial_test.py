"""Laws of the affine maps and of the sampler, and PyTorch's values."""

import itertools
import pathlib
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxent_aug.spatial import (
    AffineBounds,
    affine_grid,
    affine_matrix,
    bounded_affine,
    decompose_affine,
    grid_sample,
    invert_affine,
    warp_affine,
)

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "grid_sample.npz")
MODES = ("bilinear", "bicubic", "nearest")
PADDING_MODES = ("zeros", "border", "reflection")
IDENTITY = np.eye(2, 3, dtype=np.float32)
SHAPE = (9, 12, 3)  # of one image; the same in most tests, so that each compiles once

jit_matrix, jit_decompose = jax.jit(affine_matrix), jax.jit(decompose_affine)

few = settings(max_examples=25, deadline=None)


def floats(low, high, *shape):
    """float32 arrays, or a float when no shape is given."""
    values = st.floats(float(np.float32(low)), float(np.float32(high)), width=32)
    if not shape:
        return values
    size = int(np.prod(shape))
    return st.lists(values, min_size=size, max_size=size).map(
        lambda x: np.array(x, np.float32).reshape(shape)
    )


transforms = st.fixed_dictionaries(
    {
        "rotation": floats(-3.125, 3.125),
        "log_scale": floats(-1, 1),
        "log_aspect": floats(-0.5, 0.5),
        "shear": floats(-1, 1),
        "translation": floats(-0.5, 0.5, 2),
        "flip": st.booleans(),
    }
)
thetas = transforms.map(lambda parts: np.array(jit_matrix(**parts)))
seeds = st.integers(0, 2**31 - 1)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def smooth_image():
    """[64, 64, 2], slowly varying, so that resampling it twice costs little."""
    y, x = np.meshgrid(np.linspace(-1, 1, 64), np.linspace(-1, 1, 64), indexing="ij")
    return np.stack([np.sin(2 * x + y), np.cos(x - 2 * y)], -1).astype(np.float32)


OPTIONS = ("size", "mode", "padding_mode", "align_corners", "method")
jit_warp = jax.jit(warp_affine, static_argnames=OPTIONS)
jit_sample = jax.jit(grid_sample, static_argnames=OPTIONS[1:])
jit_grid = jax.jit(affine_grid, static_argnames=("size", "align_corners"))
quick = pytest.mark.usefixtures("quick_compilation")
warp_cases = list(itertools.product(PADDING_MODES, (False, True), ("gather", "matmul")))


# affine maps


@few
@given(transforms)
def test_affine_matrix_is_the_product_of_its_parts(parts):
    cos, sin = np.cos(parts["rotation"]), np.sin(parts["rotation"])
    scale = np.exp(parts["log_scale"] + np.array([0.5, -0.5]) * parts["log_aspect"])
    flip = np.diag([-1 if parts["flip"] else 1, 1])
    linear = np.array([[cos, -sin], [sin, cos]]) @ [[1, parts["shear"]], [0, 1]]
    expected = np.column_stack([linear @ np.diag(scale) @ flip, parts["translation"]])
    chex.assert_trees_all_close(affine_matrix(**parts), expected.astype(np.float32), atol=1e-5)


@few
@given(transforms)
def test_decompose_inverts_affine_matrix(parts):
    found = jit_decompose(jit_matrix(**parts))
    assert found.keys() == parts.keys()
    for name, value in parts.items():
        chex.assert_trees_all_close(found[name], jnp.asarray(value, found[name].dtype), atol=1e-5)


@few
@given(floats(-2, 2, 2, 3))
def test_decompose_is_finite_and_reversible_for_every_theta(theta):
    parts = jit_decompose(theta)
    chex.assert_tree_all_finite(parts)
    assert -np.pi < parts["rotation"] <= np.float32(np.pi)
    chex.assert_trees_all_close(jit_matrix(**parts), theta, atol=1e-4)


@pytest.mark.parametrize("theta", [IDENTITY, 0 * IDENTITY, np.ones((2, 3)), -IDENTITY])
def test_decompose_has_finite_gradients(theta):
    def total(theta):
        return sum(v.sum() for k, v in decompose_affine(theta).items() if k != "flip")

    chex.assert_tree_all_finite(jax.grad(total)(jnp.asarray(theta, jnp.float32)))


def test_bounded_affine_is_affine_matrix_of_shares_of_the_bounds():
    shares = np.random.default_rng(0).uniform(-1, 1, (5, 2, 6)).astype(np.float32)
    bounds = AffineBounds(shear=0.7)
    tx, ty, rotation, log_scale, log_aspect, shear = np.moveaxis(shares * np.array(bounds), -1, 0)
    expected = affine_matrix(
        rotation=rotation,
        log_scale=log_scale,
        log_aspect=log_aspect,
        shear=shear,
        translation=np.stack([tx, ty], -1),
    )
    np.testing.assert_allclose(bounded_affine(shares, bounds), expected, atol=1e-6)
    np.testing.assert_array_equal(bounded_affine(np.zeros(6)), IDENTITY)
    for wrong in (np.zeros(5), np.zeros(())):
        with pytest.raises(ValueError, match="shares"):
            bounded_affine(wrong)
    for wrong in ((1, 1), (1, 1, 1, 1, 1, -1)):
        with pytest.raises(ValueError, match="bounds"):
            bounded_affine(shares, wrong)


@few
@given(
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    floats(-1, 1, 6),
)
def test_the_parts_of_oblong_images_are_of_square_pixels(size, shares):
    theta = bounded_affine(shares, size=size)
    height, width = size
    half = np.diag([width / 2, height / 2])
    in_pixels = half @ np.asarray(theta[:, :2], np.float64) @ np.linalg.inv(half)
    square = np.asarray(bounded_affine(shares))
    np.testing.assert_allclose(in_pixels, square[:, :2], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(theta[:, 2], square[:, 2])
    parts = decompose_affine(theta, size=size)
    for name, part in decompose_affine(square).items():
        np.testing.assert_allclose(np.float32(parts[name]), np.float32(part), atol=1e-4)
    np.testing.assert_allclose(affine_matrix(**parts, size=size), theta, rtol=1e-4, atol=1e-4)


def test_rotation_range_is_half_open():
    theta = np.array([[-1, 0, 0], [-0.0, -1, 0]], np.float32)
    assert decompose_affine(theta)["rotation"] == np.float32(np.pi)


@few
@given(thetas)
def test_invert_is_the_inverse_of_the_homogeneous_matrix(theta):
    square = np.vstack([theta, [0, 0, 1]])
    chex.assert_trees_all_close(
        invert_affine(theta), np.linalg.inv(square)[:2].astype(np.float32), atol=1e-3, rtol=1e-4
    )
    chex.assert_trees_all_close(invert_affine(invert_affine(theta)), theta, atol=1e-4, rtol=1e-4)


def test_arguments_broadcast():
    theta = affine_matrix(
        rotation=np.zeros(4), shear=np.zeros((5, 1)), translation=np.zeros((3, 1, 1, 2))
    )
    assert theta.shape == (3, 5, 4, 2, 3)
    assert theta.dtype == jnp.float32
    parts = decompose_affine(theta)
    assert parts["flip"].shape == (3, 5, 4)
    assert parts["translation"].shape == (3, 5, 4, 2)
    assert affine_grid(theta, (6, 7)).shape == (3, 5, 4, 6, 7, 2)


def test_positive_rotation_of_the_picture_is_clockwise():
    image = np.zeros((5, 5, 1), np.float32)
    image[0, 2] = 1  # at the top
    turned = jit_warp(image, invert_affine(affine_matrix(rotation=np.pi / 2)))
    chex.assert_trees_all_close(turned[2, 4], jnp.ones(1), atol=1e-5)  # at the right


# against PyTorch


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("shape", ["rgb", "grey"])
def test_affine_grid_equals_torch(shape, align_corners):
    expected = GOLDEN[f"{shape}/grid/{align_corners}"]
    grid = affine_grid(GOLDEN[f"{shape}/theta"], expected.shape[1:3], align_corners=align_corners)
    chex.assert_trees_all_close(grid, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "mode", "padding_mode", "align_corners", "method"),
    [
        ("rgb", *case, "gather")
        for case in itertools.product(("bilinear", "nearest"), PADDING_MODES, (False, True))
    ]
    + [
        ("rgb", "bicubic", *case, "gather")
        for case in zip(PADDING_MODES, (False, True, False), strict=True)
    ]
    + [
        ("grey", mode, *case, "matmul")
        for mode in ("bilinear", "bicubic")
        for case in zip(PADDING_MODES, (True, False, True), strict=True)
    ]
    + [("grey", mode, "zeros", False, "gather") for mode in MODES],
)
def test_sampling_equals_torch(shape, mode, padding_mode, align_corners, method, request):
    if shape == "grey":  # the others are compiled as a user's
        request.getfixturevalue("quick_compilation")
    case = f"{shape}/{mode}/{padding_mode}/{align_corners}"
    image, theta, cotangent = (GOLDEN[f"{shape}/{k}"] for k in ("image", "theta", "cotangent"))
    options = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
    options["method"] = method

    @jax.jit
    def run(image, grid, theta):
        out, vjp = jax.vjp(lambda *x: grid_sample(*x, **options), image, grid)
        d_image, d_grid = vjp(cotangent)
        found = {"out": out, "d_image": d_image, "d_grid": d_grid}
        if mode == "nearest":
            return found, {}
        size = cotangent.shape[1:3]
        out, vjp = jax.vjp(lambda *x: warp_affine(*x, size=size, **options), image, theta)
        d_image, d_theta = vjp(cotangent)
        return found, {"out": out, "d_image": d_image, "d_theta": d_theta}

    for found in run(image, GOLDEN[f"{shape}/grid/{align_corners}"], theta):
        for name, value in found.items():
            expected = GOLDEN[f"{case}/{name}"]
            # A cubic's sixteen weights are rounded sixteen times.
            scale = np.abs(expected).max() if mode == "bicubic" else 1.0
            chex.assert_trees_all_close(value, expected, atol=1e-5 * scale, rtol=1e-5)


# laws of the warp


@pytest.mark.parametrize(("padding_mode", "align_corners", "method"), warp_cases)
def test_identity(padding_mode, align_corners, method):
    image = normal(0, *SHAPE)
    out = jit_warp(
        image, IDENTITY, padding_mode=padding_mode, align_corners=align_corners, method=method
    )
    chex.assert_trees_all_close(out, image, atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(
    floats(-0.3, 0.3),
    floats(-0.3, 0.3),
    floats(-0.2, 0.2, 2),
    floats(-0.2, 0.2, 2),
)
def test_composition(angle, log_scale, shift, other_shift):
    # Warping by theta and then by other reads the image at theta(other(position)).
    theta = affine_matrix(rotation=angle, translation=shift)
    other = affine_matrix(log_scale=log_scale, translation=other_shift)
    square = [np.vstack([np.array(t), [0, 0, 1]]) for t in (theta, other)]
    both = (square[0] @ square[1])[:2].astype(np.float32)
    twice = jit_warp(jit_warp(smooth_image(), theta, padding_mode="border"), other)
    once = jit_warp(smooth_image(), both)
    chex.assert_trees_all_close(twice[24:40, 24:40], once[24:40, 24:40], atol=0.01)


@settings(max_examples=10, deadline=None)
@given(floats(-0.5, 0.5), floats(-0.2, 0.2), floats(-0.3, 0.3), floats(-0.1, 0.1, 2))
def test_inverse_undoes(angle, log_scale, shear, shift):
    theta = affine_matrix(rotation=angle, log_scale=log_scale, shear=shear, translation=shift)
    back = jit_warp(jit_warp(smooth_image(), theta), invert_affine(theta))
    chex.assert_trees_all_close(back[28:36, 28:36], smooth_image()[28:36, 28:36], atol=0.01)


@few
@given(thetas, seeds, floats(-2, 2))
def test_linear_in_the_image(theta, seed, factor):
    a, b = normal(seed, 2, *SHAPE)
    chex.assert_trees_all_close(
        jit_warp(a + factor * b, theta),
        jit_warp(a, theta) + factor * jit_warp(b, theta),
        atol=1e-5,
    )


@few
@given(st.integers(-3, 3), st.integers(-3, 3))
def test_integer_shift_is_a_roll_inside_the_border(rows, columns):
    height, width, _ = SHAPE
    image = normal(0, *SHAPE)
    theta = affine_matrix(translation=np.array([2 * columns / width, 2 * rows / height]))
    rolled = np.roll(image, (-rows, -columns), (0, 1))
    chex.assert_trees_all_close(jit_warp(image, theta)[3:-3, 3:-3], rolled[3:-3, 3:-3], atol=1e-5)


@pytest.mark.parametrize("method", ["gather", "matmul"])
def test_flip_mirrors(method):
    image = normal(0, *SHAPE)
    out = jit_warp(image, affine_matrix(flip=True), method=method)
    chex.assert_trees_all_close(out, image[:, ::-1], atol=1e-6)


@few
@given(thetas, seeds, st.sampled_from(PADDING_MODES), st.booleans())
def test_methods_and_the_two_calls_agree(theta, seed, padding_mode, align_corners):
    image = normal(seed, *SHAPE)
    options = {"padding_mode": padding_mode, "align_corners": align_corners}
    out = jit_warp(image, theta, **options)
    chex.assert_trees_all_close(jit_warp(image, theta, method="matmul", **options), out, atol=2e-5)
    grid = jit_grid(theta, SHAPE[:2], align_corners=align_corners)
    chex.assert_trees_all_close(jit_sample(image, grid, **options), out, atol=2e-5)


@quick
@pytest.mark.parametrize("method", ["gather", "matmul"])
def test_jit_vmap_and_a_loop_agree(method):
    images = normal(0, 4, *SHAPE)
    theta = affine_matrix(rotation=np.linspace(-1, 1, 4), log_scale=0.2)

    def warp(image, theta):
        return warp_affine(image, theta, method=method)

    def gradient(image, theta):
        return jax.grad(lambda *x: (warp(*x) ** 2).sum(), (0, 1))(image, theta)

    for f in (warp, gradient):
        one = jax.jit(f)
        loop = [one(image, t) for image, t in zip(images, theta, strict=True)]
        loop = jax.tree.map(lambda *x: jnp.stack(x), *loop)
        for batched in (jax.jit(f), jax.jit(jax.vmap(f))):
            chex.assert_trees_all_close(batched(images, theta), loop, atol=1e-4, rtol=1e-5)
    chex.assert_trees_all_close(warp(images, theta), jax.jit(warp)(images, theta), atol=1e-5)


@quick
@pytest.mark.parametrize("method", ["gather", "matmul"])
@pytest.mark.parametrize(("images", "thetas"), [((), (4,)), ((4,), ()), ((2, 1), (3,))])
def test_leading_dimensions_broadcast(images, thetas, method):
    image, theta = normal(0, *images, *SHAPE), IDENTITY + 0.2 * normal(1, *thetas, 2, 3)
    lead = np.broadcast_shapes(images, thetas)

    def loss(image, theta):
        out = warp_affine(image, theta, method=method)
        assert out.shape == (*lead, *SHAPE)
        return (out**2).sum()

    copied = jnp.broadcast_to(image, (*lead, *SHAPE)), jnp.broadcast_to(theta, (*lead, 2, 3))
    value_and_grad = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, (d_image, d_theta) = value_and_grad(image, theta)
    copied_value, copied_gradients = value_and_grad(*copied)
    chex.assert_trees_all_close(value, copied_value, rtol=1e-5)
    for found, expected in zip((d_image, d_theta), copied_gradients, strict=True):
        total = np.array(expected)
        total = total.sum(tuple(range(total.ndim - found.ndim)))
        for axis, (n, m) in enumerate(zip(found.shape, total.shape, strict=True)):
            total = total.sum(axis, keepdims=True) if n < m else total
        chex.assert_trees_all_close(found, total, atol=1e-4, rtol=1e-4)


@quick
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 2), (5, 1, 2)])
@pytest.mark.parametrize("align_corners", [False, True])
def test_thin_images(shape, mode, align_corners):
    for padding_mode in ("zeros", "reflection"):
        options = {"mode": mode, "padding_mode": padding_mode, "align_corners": align_corners}
        grid = np.random.default_rng(0).uniform(-2, 2, (2, 4, 3, 2)).astype(np.float32)
        out = jit_sample(normal(0, *shape), grid, **options, method="gather")
        chex.assert_shape(out, (2, 4, 3, shape[-1]))
        chex.assert_tree_all_finite(out)
        chex.assert_trees_all_close(
            jit_sample(normal(0, *shape), grid, **options, method="matmul"), out, atol=1e-5
        )


@quick
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("padding_mode", ["border", "reflection"])
def test_padding_is_that_of_a_padded_image(padding_mode, align_corners):
    """A cubic of positions far outside, and its slopes, as in an image that numpy has padded."""
    image, more = normal(0, 3, 4, 2), 12
    name = {"border": "edge", "reflection": "reflect" if align_corners else "symmetric"}
    padded = np.pad(image, ((more, more), (more, more), (0, 0)), name[padding_mode])
    pixels = np.random.default_rng(1).uniform(-9, 12, (5, 6, 2)).astype(np.float32)
    weight = normal(2, 5, 6, 2)

    def sample(pixels, image, first):
        size = np.array(image.shape[1::-1], np.float32)
        at = pixels + first
        grid = 2 * at / (size - 1) - 1 if align_corners else (2 * at + 1) / size - 1
        options = {"mode": "bicubic", "padding_mode": padding_mode, "align_corners": align_corners}
        return (weight * grid_sample(image, grid, **options)).sum(-1)

    slopes = jax.jit(jax.grad(lambda *x: sample(*x).sum()))
    for function in (jax.jit(sample), slopes):
        expected = function(pixels, padded, float(more))
        chex.assert_trees_all_close(function(pixels, image, 0.0), expected, atol=1e-4)


def test_size():
    image = normal(0, *SHAPE)
    assert warp_affine(image, IDENTITY, size=(4, 20)).shape == (4, 20, 3)
    # Twice the size reads at quarters of a pixel, half the size averages four pixels.
    half = warp_affine(image[:8], IDENTITY, size=(4, 6))
    chex.assert_trees_all_close(half, image[:8].reshape(4, 2, 6, 2, 3).mean((1, 3)), atol=1e-5)


# gradients


@quick
@pytest.mark.parametrize(
    ("padding_mode", "method", "order", "modes"),
    [
        ("zeros", "gather", 2, ("rev",)),
        ("border", "gather", 1, ("fwd", "rev")),
        ("reflection", "gather", 1, ("fwd", "rev")),
        ("zeros", "matmul", 1, ("fwd", "rev")),
    ],
)
def test_gradients_against_finite_differences(padding_mode, method, order, modes):
    with jax.enable_x64(True):
        image, weight = (normal(seed, *SHAPE).astype(np.float64) for seed in (0, 1))
        theta = np.array([[0.83, 0.21, 0.113], [-0.17, 1.09, -0.071]])  # away from the lattice

        def loss(image, theta):
            out = warp_affine(image, theta, padding_mode=padding_mode, method=method)
            return (weight * jnp.sin(out)).sum()

        jax.test_util.check_grads(
            jax.jit(loss), (image, theta), order, modes, eps=1e-6, atol=1e-4, rtol=1e-4
        )


@quick
def test_custom_derivative_equals_autodiff_of_the_plain_formula():
    image, grid = normal(0, 2, *SHAPE), np.random.default_rng(1).uniform(-1.2, 1.2, (2, 5, 6, 2))

    def plain(image, grid):
        height, width, _ = SHAPE
        x = ((grid[..., 0] + 1) * width - 1) / 2
        y = ((grid[..., 1] + 1) * height - 1) / 2
        weight_x = jnp.maximum(0, 1 - jnp.abs(x[..., None] - jnp.arange(width)))
        weight_y = jnp.maximum(0, 1 - jnp.abs(y[..., None] - jnp.arange(height)))
        return jnp.einsum("nijh,nijw,nhwc->nijc", weight_y, weight_x, image)

    def loss(f):
        return jax.jit(jax.value_and_grad(lambda *x: (f(*x) ** 3).sum(), (0, 1)))

    grid = grid.astype(np.float32)
    chex.assert_trees_all_close(
        loss(grid_sample)(image, grid), loss(plain)(image, grid), atol=1e-4, rtol=1e-5
    )


@quick
@pytest.mark.parametrize("channels", [1, 3])
def test_image_gradient_of_many_pixels_is_that_of_each_image(channels):
    images = normal(0, 6, 160, 140, channels)  # more than are added up at a time
    theta = affine_matrix(rotation=np.linspace(-1, 1, 6), log_scale=0.2)

    def gradient(images, theta):
        return jax.grad(lambda images: (warp_affine(images, theta) ** 2).sum())(images)

    each = jax.jit(jax.vmap(gradient))(images, theta)
    chex.assert_trees_all_close(jax.jit(gradient)(images, theta), each, atol=5e-4, rtol=1e-5)


@pytest.mark.parametrize("method", ["gather", "matmul"])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_theta_gradient_at_the_identity_is_the_forward_difference(padding_mode, method):
    image, weight = normal(0, *SHAPE), normal(1, *SHAPE)
    weight[-1], weight[:, -1], weight[0], weight[:, 0] = 0, 0, 0, 0

    def loss(theta):
        out = warp_affine(image, theta, padding_mode=padding_mode, method=method)
        return (weight * out).sum()

    gradient = jax.jit(jax.grad(loss))(jnp.asarray(IDENTITY))
    height, width, _ = SHAPE
    dx = (weight[:, :-1] * np.diff(image, axis=1)).sum((0, 2)) * width / 2
    dy = (weight[:-1] * np.diff(image, axis=0)).sum((1, 2)) * height / 2
    x = (2 * np.arange(width - 1) + 1) / width - 1
    y = (2 * np.arange(height - 1) + 1) / height - 1
    assert np.all(np.abs(gradient) > 0.1)
    chex.assert_trees_all_close(gradient[0, 2], jnp.asarray(dx.sum()), rtol=1e-4)
    chex.assert_trees_all_close(gradient[1, 2], jnp.asarray(dy.sum()), rtol=1e-4)
    chex.assert_trees_all_close(gradient[0, 0], jnp.asarray((dx * x).sum()), rtol=1e-4)
    chex.assert_trees_all_close(gradient[1, 1], jnp.asarray((dy * y).sum()), rtol=1e-4)


def test_image_needs_no_work_when_only_theta_is_differentiated():
    image, theta = normal(0, 2, *SHAPE), np.tile(IDENTITY, (2, 1, 1))

    def loss(theta, image):
        return (warp_affine(image, theta) ** 2).sum()

    def compiled(argument):
        return jax.jit(jax.grad(loss, argument)).lower(theta, image).compile().as_text()

    assert "scatter" not in compiled(0)
    assert "scatter" in compiled(1)  # the word searched for is the right one
    assert "gather" in compiled(0)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the form for CPUs")
def test_scatters_of_the_image_gradient_add_to_each_other():
    image, theta = normal(0, 2, *SHAPE), np.tile(IDENTITY, (2, 1, 1))
    gradient = jax.jit(jax.grad(lambda image: (warp_affine(image, theta) ** 2).sum()))
    # Fused as for users; other tests compile with fewer fusions (conftest.py).
    compiled = gradient.lower(image).compile({"xla_cpu_use_fusion_emitters": True})
    operands = re.findall(r"fusion\((.*?)\)", compiled.as_text())
    assert any("scatter" in names for names in operands)  # the word searched for is the right one
    assert not any(names.count("scatter") > 1 for names in operands)


def test_matmul_has_neither_gather_nor_scatter():
    image, theta = normal(0, 2, *SHAPE), np.tile(IDENTITY, (2, 1, 1))

    def program(method):
        def loss(image, theta):
            return (warp_affine(image, theta, method=method) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(image, theta).as_text()

    assert "gather" not in program("matmul")
    assert "scatter" not in program("matmul")
    assert "gather" in program("gather")
    assert "scatter" in program("gather")


# numbers


@pytest.mark.parametrize("method", ["gather", "matmul"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.uint8])
def test_other_dtypes(dtype, method):
    image = jnp.asarray(50 + 20 * normal(0, *SHAPE)).astype(dtype)
    theta = affine_matrix(rotation=0.3)
    out = jit_warp(image, theta, method=method)
    expected = jit_warp(image.astype(jnp.float32), theta, method=method)
    assert out.dtype == (jnp.float32 if dtype == jnp.uint8 else dtype)
    chex.assert_trees_all_equal(out, expected.astype(out.dtype))
    if dtype != jnp.uint8:
        gradient = jax.jit(jax.grad(lambda x: warp_affine(x, theta, method=method).sum()))(image)
        assert gradient.dtype == dtype
    low = affine_matrix(rotation=jnp.asarray(0.3, dtype)) if dtype != jnp.uint8 else theta
    assert low.dtype == affine_grid(theta.astype(jnp.bfloat16), (3, 3)).dtype == jnp.float32


@quick
@pytest.mark.parametrize("method", ["gather", "matmul"])
def test_matmul_precision_setting_does_not_matter(method):
    image, theta = normal(0, *SHAPE), affine_matrix(rotation=0.3, shear=0.1)

    def run():
        f = jax.value_and_grad(lambda *x: (warp_affine(*x, method=method) ** 2).mean(), (0, 1))
        return jax.jit(f)(image, theta), affine_grid(theta, (5, 6)), invert_affine(theta)

    expected = run()
    with jax.default_matmul_precision("bfloat16"):
        chex.assert_trees_all_close(run(), expected, atol=1e-5, rtol=1e-5)


@quick
@pytest.mark.parametrize("method", ["gather", "matmul"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_positions_that_are_not_finite(padding_mode, mode, method):
    image = normal(0, *SHAPE)
    options = {"mode": mode, "padding_mode": padding_mode, "method": method}
    far = np.array([[[np.inf, 0.0], [-np.inf, 0.0], [1e30, -1e30], [np.nan, 0.0]]], np.float32)
    out = jax.jit(lambda *x: grid_sample(*x, **options))(image, far)[0]
    assert np.all(np.isnan(out[3]))
    far_away = np.array([[1, 0], [1, 0], [1, 1]])
    known = 3 if padding_mode != "reflection" else 0  # an infinite position has no reflection
    slope = jax.jit(jax.grad(lambda x: (grid_sample(image, x, **options)[0, :known] ** 2).sum()))
    chex.assert_trees_all_equal(slope(far)[0, :known] * far_away[:known], jnp.zeros((known, 2)))
    if padding_mode == "zeros":
        chex.assert_trees_all_equal(out[:3], jnp.zeros((3, SHAPE[-1])))
    elif padding_mode == "border":
        chex.assert_trees_all_close(out[0], image[4, -1], atol=1e-6)
        chex.assert_trees_all_close(out[1], image[4, 0], atol=1e-6)
        chex.assert_trees_all_close(out[2], image[0, -1], atol=1e-6)


def test_theta_that_is_not_finite():
    everything = jit_warp(normal(0, *SHAPE), np.full((2, 3), np.nan, np.float32))
    assert np.all(np.isnan(everything))


def test_one_bad_theta_leaves_the_others_alone():
    images = normal(0, 2, *SHAPE)
    theta = np.stack([IDENTITY, np.full((2, 3), np.nan, np.float32)])
    gradient = jax.jit(jax.grad(lambda t: (warp_affine(images, t)[0] ** 2).sum()))(theta)
    chex.assert_tree_all_finite(gradient[0])
    chex.assert_trees_all_close(jit_warp(images, theta)[0], images[0], atol=1e-6)


def test_calls_without_jit_compile_once(caplog):
    images, theta = normal(0, 2, *SHAPE), np.stack([IDENTITY, IDENTITY])
    gradient = jax.grad(lambda image, t: (warp_affine(image, t) ** 2).sum(), (0, 1))

    def compiled():
        caplog.clear()
        with jax.log_compiles():
            gradient(images, theta), warp_affine(images, theta)
        return [record for record in caplog.records if "XLA compilation" in record.getMessage()]

    assert compiled()
    assert not compiled()


# errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda image: warp_affine(image, np.eye(3)), r"theta .*\[\.\.\., 2, 3\].*\(3, 3\)"),
        (lambda image: warp_affine(image[0], IDENTITY), r"image .*\(12, 3\)"),
        (lambda image: warp_affine(image, IDENTITY, size=(3,)), r"size .*\(3,\)"),
        (lambda image: warp_affine(image, IDENTITY, size=(0, 3)), r"size .*\(0, 3\)"),
        (lambda image: warp_affine(image, IDENTITY, size=(2.5, 3)), r"size .*\(2\.5, 3\)"),
        (lambda image: warp_affine(image, IDENTITY, padding_mode="wrap"), "zeros.*'wrap'"),
        (lambda image: warp_affine(image, IDENTITY, method="fast"), "gather.*'fast'"),
        (
            lambda image: warp_affine(jnp.stack([image] * 2), np.stack([IDENTITY] * 3)),
            r"broadcast.*\(2, 9, 12, 3\).*\(3, 2, 3\)",
        ),
        (lambda image: grid_sample(image, np.zeros((4, 4, 3))), r"grid .*\(4, 4, 3\)"),
        (lambda image: grid_sample(image, np.zeros((4, 4, 2), complex)), "grid must be real"),
        (lambda image: grid_sample(image, np.zeros((4, 4, 2)), mode="cubic"), "nearest.*'cubic'"),
        (lambda image: grid_sample(image[:0], np.zeros((4, 4, 2))), r"image .*\(0, 12, 3\)"),
        (lambda image: affine_grid(IDENTITY, (3, 3, 3)), r"size .*\(3, 3, 3\)"),
        (lambda image: affine_grid(image, (3, 3)), r"theta .*\(9, 12, 3\)"),
        (lambda image: decompose_affine(image), r"theta .*\(9, 12, 3\)"),
        (lambda image: invert_affine(image), r"theta .*\(9, 12, 3\)"),
        (lambda image: affine_matrix(translation=image), r"translation .*\(9, 12, 3\)"),
        (lambda image: affine_matrix(rotation=image[0, 0, 0] * 1j), "must be real"),
        (lambda image: bounded_affine(np.zeros(6) * 1j), "shares must be real, got complex"),
        (lambda image: warp_affine(image, IDENTITY, align_corners="no"), "align_corners .*'no'"),
        (lambda image: affine_grid(IDENTITY, (3, 3), align_corners=None), "align_corners .*None"),
    ],
)
def test_wrong_input_is_named(call, message):
    for f in (call, jax.jit(call)):
        with pytest.raises(ValueError, match=message):
            f(jnp.zeros(SHAPE))


@pytest.mark.parametrize("wrt", [0, 1])
def test_gradients_are_exported_for_any_number_of_images(wrt):
    (batch,) = jax.export.symbolic_shape("batch")
    images = np.random.default_rng(0).normal(size=(5, 6, 7, 3)).astype(np.float32)
    theta = np.eye(2, 3, dtype=np.float32) + 0.1 * images[:, 0, :6, 0].reshape(5, 2, 3)
    slope = jax.jit(jax.grad(lambda *inputs: jnp.square(warp_affine(*inputs)).sum(), wrt))
    shapes = (jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in (images, theta))
    found = jax.export.export(slope)(*shapes).call(images, theta)
    np.testing.assert_allclose(found, slope(images, theta), rtol=1e-4, atol=1e-4)
