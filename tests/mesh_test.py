"""Images divided among eight devices, on meshes of either kind of axes: the same, and in place."""

import re
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import maxent_aug as ma
from maxent_aug import policies

KEY = jax.random.key(0)
SHAPE = (16, 8, 8, 3)
IMAGES = jax.random.uniform(KEY, SHAPE)
LEVELS = jnp.round(255 * IMAGES).astype(jnp.uint8)
THETA = ma.bounded_affine(jax.random.uniform(KEY, (16, 6), minval=-1))
LABELS = jnp.arange(16) % 4


def grid_sample(images, theta):
    return ma.grid_sample(images, ma.affine_grid(theta, SHAPE[1:3]))


def assert_close(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (one, other)), atol=1e-4)


def both_gradients(images, theta):
    return jax.grad(lambda *x: (ma.warp_affine(*x) ** 2).sum(), (0, 1))(images, theta)


def theta_gradient(images, theta):
    return jax.grad(lambda x: (ma.warp_affine(images, x) ** 2).sum())(theta)


def augmenter(**options):
    module = ma.StochasticAugmenter(**options)
    return ma.create_model_state(module, KEY, SHAPE[1:], optax.sgd(0.1), KEY)


IN_PLACE = {
    "bilinear": (ma.warp_affine, IMAGES, THETA),
    "bicubic": (
        partial(ma.warp_affine, mode="bicubic", padding_mode="reflection"), IMAGES, THETA
    ),
    "nearest": (partial(ma.warp_affine, mode="nearest"), IMAGES, THETA),
    "matmul": (partial(ma.warp_affine, method="matmul"), IMAGES, THETA),
    "grid_sample": (grid_sample, IMAGES, THETA),
    "one theta for all": (lambda images: ma.warp_affine(images, THETA[0]), IMAGES),
    "theta on every device": (lambda images: ma.warp_affine(images, THETA), IMAGES),
    "images on every device": (lambda theta: ma.warp_affine(IMAGES, theta), THETA),
    "theta's gradient": (theta_gradient, IMAGES, THETA),
    "adjust_color": (ma.adjust_color, IMAGES, 0.1 * THETA.reshape(16, 6)[:, :4]),
    "flip": (partial(policies.flip, KEY), LEVELS),
    "flip_crop": (partial(policies.flip_crop, KEY), LEVELS),
    "cutout": (partial(policies.cutout, KEY, size=3), LEVELS),
    "random_affine": (partial(policies.random_affine, KEY), LEVELS),
    "augmenter": (lambda images: augmenter()(images, KEY), IMAGES),
    "colours, some left": (
        lambda images: augmenter(color=ma.ColorBounds(), others_shift=None)(images, KEY), IMAGES
    ),
}  # fmt: skip
# On a CPU images are sorted by what they drew, pixels' gradients are added up in groups of images.
FROM_OTHERS = {
    "both gradients": (both_gradients, IMAGES, THETA),
    "rand_augment": (partial(policies.rand_augment, KEY), LEVELS),
    "apply_operations": (ma.apply_operations, LEVELS, LABELS, jnp.full(16, 3.0)),
    "entropy_magnitude": (
        partial(policies.entropy_magnitude, KEY), LEVELS, jnp.linspace(0.0, 1.0, 16)
    ),
    "either": (partial(policies.either(policies.flip, policies.trivial_augment), KEY), LEVELS),
    "mixup": (partial(policies.mixup, KEY, num_classes=4), LEVELS, LABELS),
    "cutmix": (
        partial(policies.compose(policies.with_labels(policies.flip), policies.cutmix), KEY),
        LEVELS, jax.nn.one_hot(LABELS, 4),
    ),
}  # fmt: skip
DRAWING = ("flip_crop", "random_affine", "rand_augment", "entropy_magnitude", "either")


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    ("name", "axes"),
    [*product(IN_PLACE, ("Auto", "Explicit")), *product(FROM_OTHERS, ("Explicit",))],
)
def test_divided_images_give_the_same_and_stay_divided(name, axes):
    function, *arguments = (IN_PLACE | FROM_OTHERS)[name]
    expected = jax.jit(function)(*arguments)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType[axes],))
    arguments = jax.device_put(arguments, jax.NamedSharding(mesh, jax.P("data")))
    with jax.set_mesh(mesh):
        program = jax.jit(function).lower(*arguments).compile()
        found = program(*arguments)
    assert_close(found, expected)
    assert jax.tree.leaves(found)[0].sharding.spec[0] == "data"
    messages = re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", program.as_text())
    assert bool(messages) == (name in FROM_OTHERS)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
@pytest.mark.parametrize(
    "name", ["bicubic", "matmul", "both gradients", "augmenter", "mixup", *DRAWING]
)
def test_each_device_by_itself(name, axes):
    """In `jax.shard_map` each has a part of the images, and the key of all."""
    function, *arguments = (IN_PLACE | FROM_OTHERS)[name]
    parts = zip(*(jnp.split(x, 8) for x in arguments), strict=True)
    expected = [jax.jit(function)(*part) for part in parts]
    expected = jax.tree.map(lambda *x: jnp.concatenate(x), *expected)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType[axes],))
    rows = jax.P("data")
    apart = jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows)
    assert_close(
        jax.jit(apart)(*jax.device_put(arguments, jax.NamedSharding(mesh, rows))), expected
    )


def test_a_training_step_on_explicit_axes():
    """As the README says it: JAX has no rule there for the gradient of a convolution."""
    parts = ma.Augmenter(), ma.Discriminator()
    states = [ma.create_model_state(x, KEY, SHAPE[1:], optax.sgd(0.1)) for x in parts]

    def step(images):
        return ma.adversarial_step(*states, images, lambda x: x.mean((1, 2)), form="target")

    expected = jax.jit(step)(IMAGES)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    images = jax.device_put(IMAGES, jax.NamedSharding(mesh, jax.P("data")))
    with jax.set_mesh(mesh):
        found = jax.jit(jax.sharding.auto_axes(step, out_sharding=jax.P()))(images)
    assert_close(found, expected)
