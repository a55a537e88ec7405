"""Policies: what they do to an image, what they draw, and that images are independent."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import maxent_aug as ma
from maxent_aug import OPERATIONS, policies

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(7)
SHAPE = (24, 12, 9, 3)
MANY = 20000
IMAGE_POLICIES = {
    "identity": ma.identity,
    "flip": ma.flip,
    "flip_crop": ma.flip_crop,
    "flip_crop, reflect": partial(ma.flip_crop, pad=3, padding_mode="reflect"),
    "random_affine": ma.random_affine,
    "either": ma.either(ma.flip, ma.random_affine),
    "cutout": partial(ma.cutout, size=5, fill=9),
    "color_jitter": ma.color_jitter,
    "rand_augment": ma.rand_augment,
    "trivial_augment": ma.trivial_augment,
    "auto_augment": ma.auto_augment,
    "entropy_magnitude": lambda key, images: ma.entropy_magnitude(
        key, images, np.linspace(0, 1, len(images), dtype=np.float32)
    ),
}
MIXING_POLICIES = {
    "mixup": partial(ma.mixup, num_classes=10),
    "cutmix": partial(ma.cutmix, num_classes=10),
}
STANDARD = {  # torchvision's ranges of RandAugment for 32 x 64 pixels
    "identity": (0, 0), "shear_x": (0, 0.3), "shear_y": (0, 0.3),
    "translate_x": (0, 150 / 331 * 64), "translate_y": (0, 150 / 331 * 32), "rotate": (0, 30),
    "brightness": (0, 0.9), "color": (0, 0.9), "contrast": (0, 0.9), "sharpness": (0, 0.9),
    "posterize": (8, 4), "solarize": (255, 0), "autocontrast": (0, 0), "equalize": (0, 0),
    "invert": (0, 0),
}  # fmt: skip
WIDE = STANDARD | {
    "shear_x": (0, 0.99), "shear_y": (0, 0.99), "translate_x": (0, 32), "translate_y": (0, 32),
    "rotate": (0, 135), "brightness": (0, 0.99), "color": (0, 0.99), "contrast": (0, 0.99),
    "sharpness": (0, 0.99), "posterize": (8, 2),
}  # fmt: skip
UNSIGNED = ("identity", "posterize", "solarize", "autocontrast", "equalize", "invert")


def images_of(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def assert_counts(counts, shares):
    """Each within five standard deviations of a binomial."""
    total, shares = np.sum(counts), np.asarray(shares)
    sd = np.sqrt(total * shares * (1 - shares)) + 1e-9
    assert np.all(np.abs(counts - total * shares) < 5 * sd), (counts, total * shares)


def assert_close(found, expected, blended):
    """Equal; what lies between two pixels may, rarely, be rounded to either of two levels."""
    off = np.abs(np.asarray(found, int) - np.asarray(expected, int))
    assert off.max() <= blended and np.mean(off) < 1e-3


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", IMAGE_POLICIES)
def test_image_policies(name, channels):
    policy, images = IMAGE_POLICIES[name], images_of((*SHAPE[:3], channels))
    out = policy(KEY, images)
    assert out.dtype == np.uint8 and out.shape == images.shape
    floats = policy(KEY, images.astype(np.float32))
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats, out, atol=0.501)
    if channels == 3:
        compiled = jax.jit(policy)
        assert_close(compiled(KEY, images), out, blended=name == "random_affine")
        if name != "identity":
            assert not np.array_equal(out, images)
            assert not np.array_equal(compiled(jax.random.key(8), images), out)


@pytest.mark.parametrize("name", MIXING_POLICIES)
def test_mixing_policies(name):
    policy, images, labels = MIXING_POLICIES[name], images_of(), np.arange(SHAPE[0]) % 10
    compiled, (out, mixed) = jax.jit(policy), policy(KEY, images, labels)
    assert out.dtype == np.uint8 and mixed.dtype == np.float32 and mixed.shape == (len(images), 10)
    found, weights = compiled(KEY, images, labels)
    assert_close(found, out, blended=name == "mixup")
    np.testing.assert_allclose(weights, mixed, atol=1e-6)
    assert not np.array_equal(compiled(jax.random.key(8), images, labels)[0], out)
    floats, same = policy(KEY, images.astype(np.float32), np.eye(10)[labels])
    assert floats.dtype == np.float32
    np.testing.assert_allclose(floats, out, atol=0.501)
    np.testing.assert_allclose(same, mixed)


@pytest.mark.parametrize("name", sorted(set(IMAGE_POLICIES) - {"identity", "entropy_magnitude"}))
def test_images_are_independent(name):
    same = np.broadcast_to(images_of((1, *SHAPE[1:])), SHAPE)
    out = np.asarray(IMAGE_POLICIES[name](KEY, same)).reshape(len(same), -1)
    different = len(np.unique(out, axis=0))
    assert different >= (2 if name == "flip" else 6)


def test_flip_mirrors_half_of_the_images():
    images = images_of((2000, 2, 3, 1))
    out = np.asarray(ma.flip(KEY, images))
    mirrored = (out == images[:, :, ::-1]).all((1, 2, 3))
    assert ((out == images).all((1, 2, 3)) | mirrored).all()
    assert_counts([np.sum(mirrored), np.sum(~mirrored)], [0.5, 0.5])


@pytest.mark.parametrize(("mode", "numpy_mode"), [("zeros", "constant"), ("reflect", "reflect")])
def test_flip_crop_cuts_every_window_as_often(mode, numpy_mode):
    image = 1.0 + np.arange(5 * 7, dtype=np.float32).reshape(5, 7, 1)
    out = ma.flip_crop(KEY, np.broadcast_to(image, (6000, 5, 7, 1)), pad=2, padding_mode=mode)
    padded = np.pad(image, [(2, 2), (2, 2), (0, 0)], mode=numpy_mode)
    windows = [padded[y : y + 5, x : x + 7] for y in range(5) for x in range(5)]
    windows = np.array(windows + [window[:, ::-1] for window in windows])
    found = (np.asarray(out)[:, None] == windows).all((2, 3, 4))
    assert (found.sum(1) == 1).all()
    assert_counts(found.sum(0), np.full(50, 1 / 50))


def test_color_jitter_draws_each_factor_once_in_any_order():
    most = (0.1, 0.4, 0.9)
    operation, magnitude = map(np.asarray, policies.draw_color_jitter(KEY, MANY, most))
    found, counts = np.unique(operation, axis=1, return_counts=True)
    names = [ma.OPERATIONS.index(name) for name in ("brightness", "contrast", "color")]
    assert found.shape == (3, 6) and np.all(sorted(names) == np.sort(found, axis=0).T)
    assert_counts(counts, [1 / 6] * 6)
    for name, limit in zip(names, most, strict=True):
        drawn = magnitude[operation == name] / limit
        assert np.all(np.abs(drawn) <= 1) and np.ptp(drawn) > 1.99
        assert abs(drawn.mean()) < 5 / np.sqrt(3 * MANY)
    unchanged = ma.color_jitter(KEY, images_of(), brightness=0, contrast=0, saturation=0)
    np.testing.assert_array_equal(unchanged, images_of())


def test_cutout_squares():
    images = np.full((4000, 11, 14, 3), 200, np.uint8)
    cut = np.asarray(ma.cutout(KEY, images, size=6, fill=(1, 2, 3)))
    where = (cut != 200).all(-1)
    np.testing.assert_array_equal(cut[where], np.broadcast_to([1, 2, 3], (where.sum(), 3)))
    rows, columns = where.any(2), where.any(1)
    np.testing.assert_array_equal(where, rows[:, :, None] & columns[:, None])  # one box each
    for sides, pixels in ((rows.sum(1), 11), (columns.sum(1), 14)):
        expected = [min(c + 3, pixels) - max(c - 3, 0) for c in range(pixels)]
        shares = np.bincount(expected, minlength=7) / pixels
        assert_counts(np.bincount(sides, minlength=7), shares)
    assert abs(np.corrcoef(rows.sum(1), columns.sum(1))[0, 1]) < 0.1


@pytest.mark.parametrize("mix", [ma.mixup, ma.cutmix])
@pytest.mark.parametrize("alpha", [1.0, 0.2])
def test_label_weights_are_those_of_the_pixels(mix, alpha):
    batch, size = 500, (16, 24)
    values = np.random.default_rng(0).permutation(batch).astype(np.float32)
    images = np.broadcast_to(values[:, None, None, None], (batch, *size, 1))
    out, labels = mix(KEY, images, np.arange(batch), alpha=alpha, num_classes=batch)
    labels = np.asarray(labels)
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-5)
    assert (np.sum(labels > 0, 1) <= 2).all()
    np.testing.assert_allclose(np.mean(out, (1, 2, 3)), labels @ values, rtol=1e-4, atol=1e-2)
    if mix is ma.mixup:
        np.testing.assert_allclose(np.std(out, (1, 2, 3)), 0, atol=1e-3)
    own = np.diag(labels)
    # Of Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)); a box of cutmix may be out of the frame.
    if mix is ma.mixup:
        assert abs(own.mean() - 0.5) < 5 * 0.5 / np.sqrt(batch)
        assert abs(own.var() * 4 * (2 * alpha + 1) - 1) < 0.25
    else:
        np.testing.assert_allclose(own * 384, np.round(own * 384), atol=1e-3)
        assert 0.5 < own.mean() < 0.8


def recovered_theta(images):
    """Of warped images of (100 x + 100, 100 y + 100, 1) at the positions of the identity.

    From what is inside: values between two outermost pixels' centres are exact in a bilinear warp.
    """
    identity = np.asarray(ma.affine_grid(np.eye(2, 3), images.shape[1:3])).reshape(-1, 2)
    for image in np.asarray(images, np.float64).reshape(len(images), -1, 3):
        inside = image[:, 2] > 0.9999
        inputs = np.column_stack([identity, np.ones(len(identity))])[inside]
        yield np.linalg.lstsq(inputs, image[inside, :2] / 100 - 1, rcond=None)[0].T


@pytest.mark.parametrize("only", [*range(6), None])
def test_random_affine_is_within_its_bounds(only):
    bounds = np.array(policies.DEFAULT_BOUNDS)
    if only is not None:
        bounds *= np.arange(6) == only
    batch, size = 200, (24, 32)
    grid = np.asarray(ma.affine_grid(np.eye(2, 3), size), np.float32)
    image = np.concatenate([100 + 100 * grid, np.ones_like(grid[..., :1])], -1)
    images = np.broadcast_to(image, (batch, *image.shape))
    sampler = {"interpolation": "bilinear", "padding_mode": "zeros"}
    out = ma.random_affine(KEY, images, bounds=tuple(bounds), **sampler)
    parts = ma.decompose_affine(np.array([*recovered_theta(out)], np.float32), size=size)
    assert not np.any(parts["flip"])
    names = ("rotation", "log_scale", "log_aspect", "shear")
    found = np.column_stack([parts["translation"], *(parts[name] for name in names)])
    assert (np.abs(found) <= bounds + 2e-3).all()
    assert (np.abs(found).max(0) >= 0.95 * bounds - 2e-3).all()
    if only is None:
        assert (np.abs(np.mean(found, 0)) < 5 * bounds / np.sqrt(3 * batch)).all()
        assert np.abs(np.corrcoef(found.T) - np.eye(6)).max() < 0.35


def test_either_takes_each_image_from_one_of_two_policies():
    images = images_of((400, 4, 4, 1))

    def shifted(key, images):
        return jnp.roll(images, 1, axis=1)

    for share in (0.0, 0.25, 1.0):
        out = jax.jit(ma.either(ma.identity, shifted, share))(KEY, images)
        kept = jnp.all(out == images, axis=(1, 2, 3))
        moved = jnp.all(out == shifted(None, images), axis=(1, 2, 3))
        assert bool(jnp.all(kept | moved)) and out.dtype == images.dtype
        assert abs(float(jnp.mean(moved)) - share) <= 4 * np.sqrt(share * (1 - share) / 400)
    with pytest.raises(ValueError, match=r"share must be a number from 0 to 1, got 1\.5"):
        ma.either(ma.identity, shifted, 1.5)


def test_default_bounds():
    expected = (0.25, 0.25, np.deg2rad(30), np.log(1.3), np.log(1.2), 0.3)
    np.testing.assert_allclose(policies.DEFAULT_BOUNDS, expected)
    # 2 is the full width: 1/4 of a normalised unit is an eighth of the image.
    image = np.zeros((1, 16, 16, 1), np.float32)
    image[0, 8, 8] = 1
    shifted = ma.warp_affine(image, ma.affine_matrix(translation=np.array([0.25, 0.0])))
    assert np.argwhere(np.asarray(shifted)[0, ..., 0] > 0.5).tolist() == [[8, 6]]


def assert_drawn_uniformly(operation, magnitude, ranges, level):
    """Each of 14 as often, each sign as often, magnitudes those at `level`."""
    operation, magnitude, level = (np.ravel(x) for x in (operation, magnitude, level))
    assert_counts(np.bincount(operation, minlength=15), [*14 * [1 / 14], 0])
    for index, name in enumerate(OPERATIONS[:14]):
        mine, (start, end) = operation == index, ranges[name]
        expected = start + level[mine] * (end - start)
        if name == "posterize":
            expected = np.round(expected)
        if name in UNSIGNED:
            np.testing.assert_allclose(magnitude[mine], expected, atol=1e-4)
        else:
            np.testing.assert_allclose(np.abs(magnitude[mine]), expected, rtol=1e-5, atol=1e-6)
            moving = magnitude[mine][expected > 0]
            assert_counts([np.sum(moving < 0), np.sum(moving > 0)], [0.5, 0.5])
    together = operation[:-1] * 15 + operation[1:]
    shares = np.outer([*14 * [1 / 14], 0], [*14 * [1 / 14], 0]).ravel()
    assert_counts(np.bincount(together, minlength=225), shares)  # neighbours are independent


@pytest.mark.parametrize(("n", "m"), [(2, 9), (3, 30), (1, 0)])
def test_rand_augment_draws(n, m):
    operation, magnitude = policies.draw_rand_augment(KEY, (MANY, 32, 64, 3), n=n, m=m)
    assert operation.shape == magnitude.shape == (n, MANY)
    assert_drawn_uniformly(operation, magnitude, STANDARD, np.full((n, MANY), m / 30))
    for other in operation[1:]:
        shared = np.sum(operation[0] == other)
        assert_counts([shared, MANY - shared], [1 / 14, 13 / 14])


def test_trivial_augment_draws():
    operation, magnitude = policies.draw_trivial_augment(KEY, (MANY, 32, 64, 3))
    rotated = np.abs(magnitude[operation == OPERATIONS.index("rotate")])
    assert_counts(
        np.bincount(np.round(rotated / 4.5).astype(int), minlength=31), np.full(31, 1 / 31)
    )
    level_key, _ = jax.random.split(KEY)
    level = jax.random.randint(level_key, (1, MANY), 0, 31) / 30
    assert_drawn_uniformly(operation, magnitude, WIDE, level)


# The policy for CIFAR-10 once more, from the authors' paper: name, tenths, magnitude; twice.
AUTO_AUGMENT = """
invert 1 7 contrast 2 6          rotate 7 2 translate_x 3 9      sharpness 8 1 sharpness 9 3
shear_y 5 8 translate_y 7 9      autocontrast 5 8 equalize 9 2   shear_y 2 7 posterize 3 7
color 4 3 brightness 6 7         sharpness 3 9 brightness 7 9    equalize 6 5 equalize 5 1
contrast 6 7 sharpness 6 5       color 7 7 translate_x 5 8       equalize 3 7 autocontrast 4 8
translate_y 4 3 sharpness 2 6    brightness 9 6 color 2 8        solarize 5 2 invert 0 3
equalize 2 0 autocontrast 6 0    equalize 2 8 equalize 6 4       color 9 9 equalize 6 6
autocontrast 8 4 solarize 2 8    brightness 1 3 color 7 0        solarize 4 5 autocontrast 9 3
translate_y 9 9 translate_y 7 9  autocontrast 9 2 solarize 8 3   equalize 8 8 invert 1 3
translate_y 7 9 autocontrast 9 1
"""


def test_auto_augment_draws():
    """Pairs as often as the 25 sub-policies have them, at magnitudes of theirs."""
    operation, magnitude = map(np.asarray, policies.draw_auto_augment(KEY, (MANY, 32, 64, 3)))
    entries = np.array(AUTO_AUGMENT.split()).reshape(25, 2, 3)
    shares, allowed = np.zeros((15, 15)), {("identity", 0.0)}
    for pair in entries:
        likely = np.zeros((2, 15))
        for step, (name, tenths, level) in enumerate(pair):
            likely[step, OPERATIONS.index(name)] = int(tenths) / 10
            likely[step, 0] = 1 - int(tenths) / 10
            start, end = STANDARD[name]
            value = start + int(level) / 9 * (end - start)
            if tenths != "0":
                allowed.add((name, round(float(round(value) if name == "posterize" else value), 2)))
        shares += np.outer(*likely) / 25
    counts = np.bincount(operation[0] * 15 + operation[1], minlength=225)
    assert_counts(counts, shares.ravel())
    drawn = zip(operation.ravel(), magnitude.ravel(), strict=True)
    assert {(OPERATIONS[o], round(abs(float(v)), 2)) for o, v in drawn} == allowed
    rotated = magnitude[operation == OPERATIONS.index("rotate")]
    assert_counts([np.sum(rotated < 0), np.sum(rotated > 0)], [0.5, 0.5])


def test_entropy_magnitude_grows_with_the_strength(monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        policies, "apply_drawn",
        lambda images, operation, magnitude, fill: drawn.update(o=operation, m=magnitude) or images,
    )  # fmt: skip
    strength = np.random.default_rng(0).uniform(0, 1, MANY).astype(np.float32)
    ma.entropy_magnitude(KEY, np.zeros((MANY, 32, 64, 1), np.uint8), strength)
    assert_drawn_uniformly(drawn["o"], drawn["m"], STANDARD, strength)


def test_entropy_strength():
    logits = np.array([[0, 0, 0, 0], [50, 0, 0, 0], [3, 3, -50, -50]], np.float32)
    np.testing.assert_allclose(ma.entropy_strength(logits), [0, 1, 0.5], atol=1e-5)
    assert not np.any(jax.grad(lambda x: ma.entropy_strength(x).sum())(logits))


def test_compose_gives_each_policy_its_own_key():
    images = images_of()
    both = ma.compose(ma.flip_crop, ma.cutout, ma.flip_crop)(KEY, images)
    step = images
    for index, policy in enumerate((ma.flip_crop, ma.cutout, ma.flip_crop)):
        step = policy(jax.random.fold_in(KEY, index), step)
    np.testing.assert_array_equal(both, step)
    np.testing.assert_array_equal(ma.compose()(KEY, images), images)


def test_compose_mixing_policies():
    images, labels = images_of(), np.arange(len(images_of())) % 10
    mix = partial(ma.mixup, num_classes=10)
    unchanged = lambda key, images, labels=None: (images, labels)  # noqa: E731
    composed = ma.compose(ma.with_labels(ma.flip_crop), mix, ma.cutmix, unchanged)
    out, mixed = composed(KEY, images, labels)
    flipped = ma.flip_crop(jax.random.fold_in(KEY, 0), images)
    step = mix(jax.random.fold_in(KEY, 1), flipped, labels)
    expected, probabilities = ma.cutmix(jax.random.fold_in(KEY, 2), *step)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_allclose(mixed, probabilities, atol=1e-6)


def test_compose_with_the_learned_augmenter():
    images = images_of((4, 8, 8, 3)).astype(np.float32)
    state = ma.create_model_state(ma.Augmenter(), KEY, images.shape[1:], optax.sgd(1))
    learned = lambda key, images: state(images / 255)[0] * 255  # noqa: E731
    out = jax.jit(ma.compose(ma.flip_crop, learned))(KEY, images)
    # A new augmenter is the identity.
    expected = ma.flip_crop(jax.random.fold_in(KEY, 0), images)
    np.testing.assert_allclose(out, expected, atol=1e-3)


def with_nan(images):
    images = np.float32(images)
    images[0, 1, 2, 0] = np.nan
    return images


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: ma.flip(KEY, x[0]), r"images must be \[B, H, W, C\]"),
        (lambda x: ma.identity(KEY, x.astype(int)), "uint8 or float32, got int"),
        (lambda x: ma.rand_augment(KEY, x[..., :2]), "1 or 3 channels, got 2"),
        (lambda x: ma.trivial_augment(KEY, x[..., :2]), "1 or 3 channels, got 2"),
        (lambda x: ma.auto_augment(KEY, x[..., :2]), "1 or 3 channels, got 2"),
        (lambda x: ma.entropy_magnitude(KEY, x[..., :2], np.zeros(24)), "channels, got 2"),
        (
            lambda x: ma.entropy_magnitude(KEY, x, np.zeros(3)),
            r"strength must be \[B\] with B = 24",
        ),
        (lambda x: ma.flip_crop(KEY, x, padding_mode="wrap"), "padding_mode .* got 'wrap'"),
        (lambda x: ma.flip_crop(KEY, x, pad=-1), "pad must be a whole number, at least 0.* got -1"),
        (lambda x: ma.flip_crop(KEY, x, pad=1.5), "pad must be a whole number.* got 1.5"),
        (lambda x: ma.flip_crop(KEY, x, pad=9, padding_mode="reflect"), "less than H and W, got 9"),
        (lambda x: ma.random_affine(KEY, x, bounds=(1, 2)), r"six finite numbers.* got \(1, 2\)"),
        (lambda x: ma.random_affine(KEY, x, bounds=(0, 0, 0, 0, 0, -1)), "at least 0"),
        (lambda x: ma.random_affine(KEY, x, padding_mode="wrap"), "padding_mode"),
        (lambda x: ma.random_affine(KEY, x, interpolation="cubic"), "bicubic.* got 'cubic'"),
        (lambda x: ma.cutout(KEY, x, size=2**40), "size must be a whole number.* got 10995"),
        (lambda x: ma.flip_crop(KEY, x, pad=2**31), "pad must be a whole number.* got 21474"),
        (
            lambda x: ma.cutmix(KEY, x, np.zeros((24, 4)), alpha=1e-46),
            "to 1e.30, got 1e-46",
        ),
        (
            lambda x: ma.mixup(KEY, x, np.zeros((24, 4)), alpha=1e39),
            "to 1e.30, got 1e.39",
        ),
        (lambda x: ma.trivial_augment(KEY, np.zeros((1, 1, 2**15, 1), np.uint8)), "at most 32767"),
        (lambda x: ma.cutout(KEY, x, size=0), "size must be a whole number, at least 1, got 0"),
        (lambda x: ma.cutout(KEY, x, size=2.5), "size must be a whole number.* got 2.5"),
        (lambda x: ma.cutout(KEY, x, fill=(1, 2)), r"fill must be a number or \[3\]"),
        (lambda x: ma.color_jitter(KEY, x, contrast=1.1), "contrast must .* 0 to 1, got 1.1"),
        (lambda x: ma.rand_augment(KEY, x, m=31), r"m must .* 0 to 30, got 31"),
        (lambda x: ma.rand_augment(KEY, x, n=-1), "n must be a whole number, at least 0"),
        (lambda x: ma.mixup(KEY, x, np.zeros(24, int)), "num_classes is needed"),
        (lambda x: ma.rand_augment(KEY, x, n=2.0), "n must be a whole number.* got 2.0"),
        (lambda x: ma.random_affine(KEY, x, bounds=0.3), "six finite numbers.* got 0.3"),
        (lambda x: ma.mixup(KEY, x, np.zeros(3, int), num_classes=5), "B = 24 and m = 5, got int"),
        (lambda x: ma.mixup(KEY, x, np.zeros(24, int), num_classes=1), "at least 2, got 1"),
        (lambda x: ma.mixup(KEY, x, np.zeros(24, int), num_classes=5.0), "whole number.* got 5.0"),
        (lambda x: ma.cutmix(KEY, x, np.zeros((24, 1))), "m = 2 or more, got float"),
        (lambda x: ma.cutmix(KEY, x, np.zeros((24, 4)), num_classes=5), "m = 5, got float"),
        (lambda x: ma.cutmix(KEY, x, np.zeros(24)), r"labels must be \[B\] integers"),
        (
            lambda x: ma.mixup(KEY, x, np.zeros((24, 4)), alpha=0),
            "alpha must be .* from 1e-30 .* got 0",
        ),
        (lambda x: ma.cutmix(KEY, x, np.zeros((24, 4)), alpha=np.nan), "alpha .* got nan"),
        (lambda x: ma.random_affine(KEY, x, bounds=(np.nan,) * 6), "six finite numbers"),
        (lambda x: ma.rand_augment(KEY, np.float32(x / 255)), "of 0..255, got 0 to 1$"),
        (lambda x: ma.random_affine(KEY, np.float32(x / 60 - 2)), "of 0..255, got -2 to 2.25"),
        (lambda x: ma.trivial_augment(KEY, np.float32(x / 60 - 2)), "of 0..255, got -2 to 2.25"),
        (lambda x: ma.color_jitter(KEY, np.float32(x / 255)), "of 0..255"),
        (
            lambda x: ma.compose(ma.flip, ma.mixup)(KEY, x, np.zeros(24, int)),
            r"flip takes no labels: .* with_labels\(flip\)",
        ),
        (lambda x: ma.compose(ma.flip, partial(ma.cutmix, alpha=1))(KEY, x), "cutmix needs labels"),
        (
            lambda x: ma.compose(lambda key, images, uncertainty=None: (images, images))(
                KEY, x, np.zeros(24, int)
            ),
            "takes no labels",
        ),
        (lambda x: ma.apply_operations(x, np.ones(24), np.ones(24)), "must be integers, got float"),
        (lambda x: ma.apply_operations(x, np.full(24, 15), np.ones(24)), "in 0..14, got 15"),
        (lambda x: ma.apply_operations(x, np.full(24, -1), np.ones(24)), "in 0..14, got -1"),
        (lambda x: ma.apply_operations(x, np.ones(24, int), np.full(24, np.nan)), "be finite"),
        (lambda x: ma.rand_augment(KEY, x, m="9"), "m must be a number from 0 to 30, got '9'"),
        (lambda x: ma.color_jitter(KEY, x, contrast=(0.5, 1)), r"contrast .* got \(0.5, 1\)"),
        (lambda x: ma.either(ma.flip, ma.flip, None), "share .* got None"),
        (lambda x: ma.mixup(KEY, x, np.eye(24), alpha=np.ones((9, 30))), "alpha must .* got array"),
        (lambda x: ma.rand_augment(KEY, with_nan(x / 60 - 2)), "of 0..255, got -2 to 2.25"),
        (lambda x: ma.color_jitter(KEY, with_nan(x / 255)), "of 0..255, got 0 to 1$"),
    ],
)
def test_wrong_input(call, named):
    with pytest.raises(ValueError, match=named) as error:
        call(images_of())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("policy", "option"),
    [(ma.mixup, {"alpha": 0.4}), (ma.rand_augment, {"m": 7}), (ma.color_jitter, {"contrast": 0.3})],
)
def test_options_may_be_traced(policy, option):
    labels = [np.eye(4, dtype=np.float32)[np.arange(24) % 4]] if policy is ma.mixup else []
    batch = images_of(), *labels
    traced = jax.jit(lambda option: policy(KEY, *batch, **option))(option)
    static = jax.jit(lambda: policy(KEY, *batch, **option))()
    for one, other in zip(jax.tree.leaves(traced), jax.tree.leaves(static), strict=True):
        difference = np.abs(np.float32(one) - np.float32(other))
        assert difference.max() <= 1 and np.mean(difference > 1e-6) < 0.01  # of rounding


def test_other_channels_where_no_colour_is_needed():
    images = images_of((4, 6, 5, 2))
    chain = ma.compose(ma.identity, ma.flip, ma.flip_crop, ma.random_affine, ma.cutout)
    mixing = ma.compose(ma.with_labels(chain), ma.mixup, ma.cutmix)
    out, _ = jax.eval_shape(mixing, KEY, images, jnp.eye(4))
    assert out.shape == images.shape and out.dtype == np.uint8


def test_what_an_image_policy_returns_beside_the_images_is_left_out():
    """A loaded augmenter returns theta, too."""
    images = jax.random.randint(KEY, (6, 8, 8, 3), 0, 256).astype(jnp.uint8)
    augment = lambda key, images: (ma.flip(key, images), jnp.zeros((6, 2, 3)))  # noqa: E731
    labels = jnp.arange(6)
    for new, old in (
        (ma.compose(augment, ma.cutout), ma.compose(ma.flip, ma.cutout)),
        (ma.either(ma.cutout, augment), ma.either(ma.cutout, ma.flip)),
    ):
        np.testing.assert_array_equal(new(KEY, images), old(KEY, images))
    for got, expected in zip(
        ma.with_labels(augment)(KEY, images, labels), (ma.flip(KEY, images), labels), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("fill", "level"), [(300, 255), (-1, 0), (125.7, 126)])
def test_a_fill_is_rounded_and_clipped(fill, level):
    images = jnp.full((2, 4, 4, 1), 7, jnp.uint8)
    assert set(np.unique(ma.cutout(KEY, images, size=64, fill=fill))) == {level}


@pytest.mark.parametrize("mix", [ma.mixup, ma.cutmix])
def test_a_column_of_labels_is_no_probabilities(mix):
    with pytest.raises(ValueError, match=r"labels must be"):
        mix(KEY, jnp.zeros((4, 4, 4, 3)), jnp.zeros((4, 1), jnp.int32))


@pytest.mark.parametrize("name", ["flip_crop", "random_affine", "cutout", "rand_augment"])
def test_exported_for_any_number_of_images_a_policy_does_the_same(name):
    (batch,) = jax.export.symbolic_shape("batch")
    images = images_of()
    shape = jax.ShapeDtypeStruct((batch, *images.shape[1:]), images.dtype)
    policy = jax.jit(IMAGE_POLICIES[name])
    program = jax.export.export(policy)(jax.eval_shape(lambda: KEY), shape)
    np.testing.assert_array_equal(program.call(KEY, images), policy(KEY, images))


@pytest.mark.parametrize("name", ["random_affine", "cutout", "rand_augment", "cutmix"])
def test_no_dtype_is_promoted_in_silence(name):
    inputs = KEY, images_of()
    if name in MIXING_POLICIES:
        inputs += (np.arange(SHAPE[0]) % 10,)
    policy = (IMAGE_POLICIES | MIXING_POLICIES)[name]
    with jax.numpy_dtype_promotion("strict"):
        strict = jax.jit(policy)(*inputs)
    chex.assert_trees_all_equal(strict, jax.jit(lambda *inputs: policy(*inputs))(*inputs))
