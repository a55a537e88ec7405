"""Where JAX is told to refuse arrays of unequal ranks, this package works as it always does."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import maxent_aug as ma
from experiments.compare import _row
from experiments.named_policies import NAMES
from maxent_aug import config, diagnostics, losses, phases, spatial

BATCH, SHAPE = 8, (16, 12, 3)


def like(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


IMAGES, LABELS = like(BATCH, *SHAPE), like(BATCH, dtype=jnp.int32)
THETA, LOGITS = like(BATCH, 2, 3), like(BATCH, 10)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"):
        yield


def classify(images):
    return images.reshape(len(images), -1)[:, :10].astype(jnp.float32)


def trace(function, *inputs):
    """Raises what a call would, without compiling it."""
    jax.eval_shape(function, *inputs)


def test_what_is_refused():
    with pytest.raises(ValueError, match="rank_promotion"):
        trace(lambda images: images + jnp.zeros(3), IMAGES)


@pytest.mark.parametrize("method", ["gather", "matmul"])
@pytest.mark.parametrize("padding_mode", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_warps_and_their_gradients(mode, padding_mode, method):
    warp = partial(ma.warp_affine, mode=mode, padding_mode=padding_mode, method=method)
    trace(jax.grad(lambda *inputs: warp(*inputs).sum(), (0, 1)), IMAGES, THETA)


@pytest.mark.parametrize("method", ["gather", "matmul"])
def test_leading_dimensions_broadcast(method):
    warp = partial(ma.warp_affine, method=method)
    for images, theta in (IMAGES, like(2, 3)), (like(*SHAPE), THETA):
        trace(jax.grad(jax.jit(lambda *inputs: warp(*inputs).sum()), (0, 1)), images, theta)
    trace(ma.grid_sample, like(*SHAPE), like(BATCH, 5, 6, 2))
    for images, color in (IMAGES, like(4)), (like(*SHAPE), like(BATCH, 4)):
        trace(ma.adjust_color, images, color)
    trace(
        lambda angle, scale: ma.affine_matrix(rotation=angle, log_scale=scale), like(3, 4), like(4)
    )


def test_what_was_done():
    size = SHAPE[:2]
    trace(partial(ma.picture_transform, size=size), THETA)
    trace(lambda *inputs: ma.collapse(inputs[0], size, *inputs[1:]), THETA, LOGITS, LOGITS)
    trace(diagnostics.draws, THETA, THETA)
    trace(ma.boxes, like(BATCH, 10))
    assert ma.describe(jnp.zeros((2, 2, 3)), size)


def test_an_augmenter_from_a_file(tmp_path):
    network, key = ma.StochasticAugmenter(hidden=4), jax.random.key(0)
    params = network.init(key, jnp.zeros((1, 4, 4, 3)), key)["params"]
    about = {"mean": [0.5] * 3, "sd": [0.25], "image_shape": (4, 4, 3)}
    ma.save_augmenter(tmp_path / "augmenter.npz", network, params, **about)
    augment = ma.load_augmenter(tmp_path / "augmenter.npz")
    for dtype in (np.uint8, np.float32):
        assert augment(key, np.full((2, 4, 4, 3), 128, dtype))[0].dtype == dtype
    ma.export_augmenter(tmp_path / "augmenter.npz", tmp_path / "augmenter.stablehlo")


def test_maps_and_colours():
    size = SHAPE[:2]
    for given in (None, size):
        trace(partial(ma.decompose_affine, size=given), THETA)
        trace(partial(ma.bounded_affine, bounds=spatial.WIDE_BOUNDS, size=given), like(BATCH, 6))
    trace(ma.invert_affine, THETA)
    trace(partial(ma.affine_grid, size=size), THETA)
    trace(ma.adjust_color, IMAGES, like(BATCH, 4))
    trace(lambda images, sd: ma.normalize(images, sd, sd), IMAGES, like(3))
    trace(lambda images, sd: ma.denormalize(images, sd, sd), IMAGES, like(3))


def test_losses():
    for loss in (losses.entropy, losses.uncertainty):
        trace(loss, LOGITS)
    for labels in (LABELS, LOGITS):
        trace(losses.cross_entropy, LOGITS, labels)
    for form in losses.LOSS_FORMS:
        trace(partial(losses.max_entropy_loss, form=form), LOGITS)
    trace(losses.discriminator_loss, like(BATCH), like(BATCH))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32])
@pytest.mark.parametrize("name", NAMES)
def test_policies(name, dtype):
    policy = _row(name, 10).policy
    images = like(*IMAGES.shape, dtype=dtype)
    trace(lambda *batch: policy(jax.random.key(0), *batch, classify), images, LABELS)


@pytest.mark.parametrize("name", ["printed", "flip+learned", "replayed", "learned:flip_crop"])
def test_steps(name):
    settings = config.COMPARISON_PRESETS["small"]
    classifier = phases.make_classifier(settings, 10)
    legs = phases.comparison(settings, classifier, {name: _row(name, 10)}, SHAPE, 10)[name]
    key, state = jax.random.key(0), None
    for leg in legs:
        state = jax.eval_shape(lambda state, begin=leg.begin: begin(state, key), state)
        unseen = [IMAGES] if leg.unseen.batch_size else []
        trace(leg.step, state, IMAGES, LABELS, key, *unseen)
        trace(leg.eval_step, state, IMAGES, LABELS, key)


def test_an_optimiser_beside():
    network = ma.StochasticAugmenter()
    key = jax.random.key(0)
    made = jax.eval_shape(lambda: ma.create_model_state(network, key, SHAPE, optax.adam(1e-3), key))
    trace(lambda state, images: ma.matching_step(state, images, classify, key), made, IMAGES)
