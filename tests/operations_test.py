"""The operations against Pillow, one by one and mixed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.peers import pillow_operation, pillow_policy
from maxent_aug import OPERATIONS, apply_operations, operations

BATCH = 24
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
ENHANCING = ("brightness", "color", "contrast", "sharpness")
SHAPES = [(32, 32, 3), (20, 37, 3), (40, 8, 1)]


def images_of(shape, seed=0):
    """Noise of all levels, of few, of one or two, and smooth; by turns."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, shape)
    images[1::4] = images[1::4] // 8 + random.integers(0, 200, (len(images[1::4]), 1, 1, 1))
    images[2::4] = images[2::4] // 128 * random.integers(0, 2, (len(images[2::4]), 1, 1, 1)) + 7
    images[3::4] = images[3::4] // 16 + 3 * np.arange(shape[1])[:, None, None] + shape[2]
    return np.clip(images, 0, 255).astype(np.uint8)


def magnitudes_of(name, count, seed=0):
    """As wide as TrivialAugment's."""
    random = np.random.default_rng(seed)
    limit = dict.fromkeys(ENHANCING, 0.99) | dict.fromkeys(GEOMETRIC[:2], 0.99)
    limit |= {"translate_x": 32, "translate_y": 32, "rotate": 135}
    if name == "posterize":
        return random.integers(1, 9, count).astype(np.float32)
    if name == "solarize":
        return random.uniform(0, 256, count).astype(np.float32)
    return (limit.get(name, 0) * random.uniform(-1, 1, count)).astype(np.float32)


def pillow(images, operation, magnitude):
    (out,) = pillow_policy(images, np.atleast_2d(operation), np.atleast_2d(magnitude))()
    return out.astype(int)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_like_pillow(name, shape):
    images, magnitude = images_of((BATCH, *shape)), magnitudes_of(name, BATCH)
    operation = np.full(BATCH, OPERATIONS.index(name))
    ours = apply_operations(images, operation, magnitude)
    assert ours.dtype == np.uint8
    difference = np.abs(np.asarray(ours) - pillow(images, operation, magnitude))
    # Pillow takes the nearest pixel in the same fixed point, and cuts at the same rounding.
    assert np.mean(difference > 0) < 0.01
    assert name in GEOMETRIC or difference.max() <= 1
    unchanged = name == "identity" or (name == "color" and shape[-1] == 1)
    assert np.array_equal(ours, images) == unchanged


def test_named_magnitudes():
    """Of one bright pixel: which way things move, so that no sign hides in the reference."""
    image = np.zeros((9, 9, 1), np.uint8)
    image[2, 6] = 100

    def moved(name, magnitude):
        index = np.array([OPERATIONS.index(name)])
        out = np.asarray(apply_operations(image[None], index, np.array([magnitude])))
        return [tuple(map(int, place)) for place in np.argwhere(out[0, ..., 0] > 50)]

    assert moved("translate_x", 2.9) == [(2, 8)] and moved("translate_x", -2.9) == [(2, 4)]
    assert moved("translate_y", 3.0) == [(5, 6)]
    assert moved("rotate", 90.0) == [(2, 2)]  # counter-clockwise
    assert moved("shear_x", 1.0) == [(2, 3)]  # further down, read from further right
    assert moved("shear_y", -0.5) == [(5, 6)]


def test_a_mixed_batch_is_its_images_one_by_one():
    shape = (64, 20, 37, 3)
    random, images = np.random.default_rng(1), images_of(shape, 1)
    operation = random.integers(0, len(OPERATIONS), 64)
    magnitude = np.array([magnitudes_of(OPERATIONS[o], 64, i)[i] for i, o in enumerate(operation)])
    mixed = np.asarray(apply_operations(images, operation, magnitude))
    for name in OPERATIONS:
        mine = operation == OPERATIONS.index(name)
        alone = apply_operations(images, np.full(64, OPERATIONS.index(name)), magnitude)
        np.testing.assert_array_equal(mixed[mine], np.asarray(alone)[mine])


@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("name", ["equalize", "sharpness"])
def test_all_and_few_images_draw_a_slow_operation(name, batch):
    images, magnitude = images_of((batch, 6, 5, 3), 2), np.full(batch, 0.5, np.float32)
    for operation in (np.full(batch, OPERATIONS.index(name)), np.zeros(batch, int)):
        operation[-1] = OPERATIONS.index(name)
        ours = apply_operations(images, operation, magnitude)
        np.testing.assert_array_equal(ours, pillow(images, operation, magnitude))


def test_an_accelerator_does_the_same(monkeypatch):
    """All images that an accelerator computes, and those alone that a CPU does, give the same."""
    images = images_of((BATCH, 20, 37, 3), 7)
    operation = np.arange(BATCH) % len(OPERATIONS)
    rows = jnp.asarray(images), operation, np.full(BATCH, 0.4, np.float32), jnp.uint8(0)
    on_cpu = jax.jit(lambda *rows: operations._apply(*rows))(*rows)
    monkeypatch.setattr(operations, "_of_drawn_rows", operations._of_all_rows)
    of_all = jax.jit(lambda *rows: operations._apply(*rows))(*rows)
    np.testing.assert_array_equal(of_all, on_cpu)


@pytest.mark.parametrize(("bits", "kept"), [(9, 8), (0, 1), (-3, 1)])
def test_bits_are_cut_to_those_there_are(bits, kept):
    images = images_of((4, 6, 5, 3), 2)
    operation = np.full(4, OPERATIONS.index("posterize"))
    cut, expected = (apply_operations(images, operation, np.full(4, n)) for n in (bits, kept))
    np.testing.assert_array_equal(cut, expected)


def test_in_turn():
    images = images_of((BATCH, 20, 37, 3), 3)
    operation = np.array([OPERATIONS.index(n) for n in ("rotate", "equalize", "color")])
    operation = np.repeat(operation[:, None], BATCH, 1)
    magnitude = np.stack([magnitudes_of(n, BATCH, 3) for n in ("rotate", "equalize", "color")])
    step = images
    for each in zip(operation, magnitude, strict=True):
        step = apply_operations(step, *each)
    np.testing.assert_array_equal(apply_operations(images, operation, magnitude), step)
    none = apply_operations(images, operation[:0], magnitude[:0])
    np.testing.assert_array_equal(none, images)


def test_dtypes_jit_and_devices_agree():
    images = images_of((BATCH, 20, 37, 3), 4)
    operation = np.arange(BATCH) % len(OPERATIONS)
    magnitude = np.full(BATCH, 0.4, np.float32)
    expected = np.asarray(apply_operations(images, operation, magnitude))
    between = images + np.random.default_rng(4).uniform(-0.4, 0.4, images.shape)
    floats = apply_operations(between.astype(np.float32), operation, magnitude)
    assert floats.dtype == jnp.float32
    np.testing.assert_array_equal(floats, expected)
    np.testing.assert_array_equal(jax.jit(apply_operations)(images, operation, magnitude), expected)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    divided = jax.device_put((images, operation, magnitude), rows)
    np.testing.assert_array_equal(apply_operations(*divided), expected)


@pytest.mark.parametrize("fill", [0, 77, (10, 20, 30)])
def test_fill(fill):
    images = images_of((BATCH, 32, 32, 3), 5)
    index, angle = OPERATIONS.index("rotate"), magnitudes_of("rotate", BATCH, 5)
    ours = apply_operations(images, np.full(BATCH, index), angle, fill=np.array(fill))
    outside = fill if isinstance(fill, tuple) else (fill,) * 3
    for image, degrees, out in zip(images, angle, ours, strict=True):
        turned = Image.fromarray(image).rotate(float(degrees), fillcolor=outside)
        assert np.mean(np.asarray(turned) != np.asarray(out)) < 0.01


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (3, 3), (1, 40)])
def test_tiny_images(size):
    images = images_of((len(OPERATIONS), *size, 3), 6)
    operation, magnitude = np.arange(len(OPERATIONS)), np.full(len(OPERATIONS), 1.0, np.float32)
    ours = np.asarray(apply_operations(images, operation, magnitude))
    assert np.abs(ours - pillow(images, operation, magnitude)).max() <= 1


def test_pillow_knows_every_operation():
    with pytest.raises(ValueError, match="blur is none of"):
        pillow_operation(Image.new("L", (2, 2)), "blur", 0.0)


@pytest.mark.parametrize(
    ("shape", "dtype", "operation", "fill", "named"),
    [
        ((2, 4, 4), np.uint8, (2,), 0, r"images must be \[B, H, W, C\]"),
        ((2, 4, 4, 3), np.int32, (2,), 0, "uint8 or float32, got int32"),
        ((2, 4, 4, 2), np.uint8, (2,), 0, "1 or 3 channels, got 2"),
        ((2, 4, 4, 3), np.uint8, (3,), 0, r"with B = 2, got \(3,\)"),
        ((2, 4, 4, 3), np.uint8, (), 0, r"got \(\)"),
        ((2, 4, 4, 3), np.uint8, (1, 2, 2), 0, r"\[n, B\]"),
        ((2, 4, 4, 3), np.uint8, (2,), (1, 2), r"fill must be a number or \[3\]"),
    ],
)
def test_wrong_shapes(shape, dtype, operation, fill, named):
    with pytest.raises(ValueError, match=named) as error:
        apply_operations(
            np.zeros(shape, dtype), np.zeros(operation, int), np.zeros(operation), fill=fill
        )
    assert "\n" not in str(error.value)
