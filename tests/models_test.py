"""The networks: sizes, shapes, the identity start, independence of images."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxent_aug import ColorBounds, adjust_color, diagnostics, models, steps
from maxent_aug.spatial import WIDE_BOUNDS, AffineBounds, decompose_affine, warp_affine

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = [(32, 32, 3), (8, 8, 1), (28, 20, 1), (4, 4, 2)]


def weights(module):
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(
    ("model", "count"),
    [
        # torchvision's ResNets with the CIFAR stem and 10 classes.
        (models.ResNet18, 11_173_962),
        (models.ResNet34, 21_282_122),
        (models.ResNet50, 23_520_842),
        (models.ResNetSmall, 152_026),
    ],
)
def test_number_of_weights(model, count):
    assert weights(model(10)) == count


TINY = {"stage_sizes": (1, 1), "width": 4}


@pytest.mark.parametrize(
    ("shape", "classes"), [((8, 8, 1), 2), ((28, 20, 1), 1000), ((4, 4, 2), 7)]
)
def test_classifier_takes_any_size(shape, classes):
    module = models.ResNet(classes, **TINY)
    images = jax.random.normal(jax.random.key(0), (3, *shape))
    variables = jax.jit(module.init)(jax.random.key(1), images)
    logits = jax.jit(module.apply)(variables, images)
    chex.assert_shape(logits, (3, classes))
    chex.assert_tree_all_finite(logits)
    # In evaluation mode an image's logits do not depend on its neighbours.
    alone = jax.jit(module.apply)(variables, images[:1])
    np.testing.assert_allclose(alone, logits[:1], rtol=1e-4, atol=1e-5)


def test_each_stage_halves_the_resolution():
    module = models.ResNet18(10)

    def shapes(images):
        _, state = module.init_with_output(
            jax.random.key(0), images, capture_intermediates=True, mutable=True
        )
        return state["intermediates"]

    captured = jax.eval_shape(shapes, jnp.zeros((2, 32, 32, 3)))
    blocks = [captured[f"BasicBlock_{i}"]["__call__"][0].shape for i in range(8)]
    sizes = [(32, 64), (32, 64), (16, 128), (16, 128), (8, 256), (8, 256), (4, 512), (4, 512)]
    assert blocks == [(2, side, side, features) for side, features in sizes]


def test_bfloat16_keeps_weights_statistics_and_logits_in_float32():
    module = models.ResNet(10, dtype=jnp.bfloat16, **TINY)
    images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    variables = jax.jit(module.init)(jax.random.key(1), images)
    chex.assert_trees_all_equal_dtypes(variables, jax.tree.map(jnp.float32, variables))
    forward = jax.jit(partial(module.apply, train=True, mutable=["batch_stats"]))
    logits, updates = forward(variables, images)
    assert logits.dtype == jnp.float32
    chex.assert_trees_all_equal_dtypes(updates, jax.tree.map(jnp.float32, updates))
    exact = jax.jit(models.ResNet(10, **TINY).apply)(variables, images)
    np.testing.assert_allclose(jax.jit(module.apply)(variables, images), exact, atol=0.1)


@pytest.mark.parametrize(
    ("shape", "padding_mode"),
    [*((shape, "zeros") for shape in SHAPES), ((8, 8, 1), "border"), ((8, 8, 1), "reflection")],
)
def test_augmenter_starts_at_the_identity_with_a_gradient(shape, padding_mode):
    module = models.Augmenter(padding_mode=padding_mode)
    images = jax.random.normal(jax.random.key(0), (2, *shape))
    params = jax.jit(module.init)(jax.random.key(1), images)
    augmented, theta = jax.jit(module.apply)(params, images)
    np.testing.assert_allclose(augmented, images, atol=1e-6)
    np.testing.assert_array_equal(theta, np.broadcast_to(np.eye(2, 3), (2, 2, 3)))

    def loss(params):
        augmented, _ = module.apply(params, images)
        return jnp.sum(augmented * jnp.linspace(0, 1, images.size).reshape(images.shape))

    last = jax.jit(jax.grad(loss))(params)["params"]["Localization_0"]["Dense_1"]
    assert np.all(np.abs(last["bias"]) > 1e-4)
    assert np.max(np.abs(last["kernel"])) > 1e-4


UNCERTAINTY = jnp.linspace(0, 1, 200)


def stochastic(seed=None, **options):
    """A stochastic augmenter's module, variables, and images; with a seed, of random weights."""
    module = models.StochasticAugmenter(**options)
    images = jax.random.normal(jax.random.key(0), (200, 8, 8, 1))
    variables = jax.jit(module.init)(jax.random.key(1), images, jax.random.key(2))
    if seed is not None:
        leaves, tree = jax.tree.flatten(variables)
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        noisy = [x + 2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
        variables = jax.tree.unflatten(tree, noisy)
    return module, variables, images


def coordinates(theta):
    """The six coordinates of theta, [N, 6], in the order of AffineBounds."""
    parts = decompose_affine(theta)
    assert not np.any(parts["flip"])
    names = ("rotation", "log_scale", "log_aspect", "shear")
    return np.column_stack([parts["translation"], *(parts[name] for name in names)])


@pytest.mark.parametrize("start", [0.1, 0.5, 0.9])
def test_a_new_stochastic_augmenter_draws_from_its_start_width(start):
    module, variables, images = stochastic(start_width=start)
    half_width, log_volume, edge = module.apply(variables, UNCERTAINTY, method="box")
    np.testing.assert_allclose(half_width, np.full((200, 6), start), rtol=1e-5)
    share = (start - 0.02) / 0.98
    np.testing.assert_allclose(log_volume, np.full(200, 6 * np.log(share)), rtol=1e-4)
    np.testing.assert_allclose(edge, np.full(200, -0.3 * np.log(1 - share)), rtol=1e-4)
    augmented, theta, *_ = jax.jit(partial(module.apply, method="transform"))(
        variables, images, jax.random.key(3)
    )
    drawn = coordinates(theta) / np.array(WIDE_BOUNDS)
    assert np.all(np.abs(drawn) <= start + 1e-4)
    assert np.all(np.abs(drawn).max(0) > 0.9 * start)
    assert np.all(np.abs(drawn.mean(0)) < 5 * start / np.sqrt(3 * 200))
    assert np.abs(np.corrcoef(drawn.T) - np.eye(6)).max() < 0.35
    sampler = {"mode": "bicubic", "padding_mode": "reflection"}
    np.testing.assert_allclose(augmented, warp_affine(images, theta, **sampler), atol=1e-5)


@pytest.mark.parametrize("network", [models.StochasticAugmenter, models.Augmenter])
def test_oblong_images_are_rotated_and_not_distorted(network):
    bounds = AffineBounds(0, 0, np.pi / 4, 0, 0, 0)
    options = {"share": 1.0} if network is models.StochasticAugmenter else {"stochastic": True}
    module, key = network(bounds=bounds, **options), jax.random.key(0)
    images = jax.random.normal(key, (50, 20, 8, 1))
    _, theta = jax.jit(module.init_with_output)(key, images, key)[0]
    seen = diagnostics.picture_transform(theta, (20, 8))
    turned = np.abs(seen["rotation_deg"])
    assert 4 < turned.max() <= 45
    for name, value in {"shear": 0, "aspect": 1, "scale": 1}.items():
        np.testing.assert_allclose(seen[name], value, atol=1e-4)
    draws = diagnostics.draws(theta, theta, (20, 8))
    assert draws["beyond_bounds"] == pytest.approx(np.mean(turned > 28.5) / 6, abs=1e-6)


def test_a_stochastic_augmenter_changes_colours_within_its_boxes():
    module = models.StochasticAugmenter(color=ColorBounds(), start_width=0.5, others_shift=0.25)
    images = jax.random.normal(jax.random.key(0), (200, 8, 8, 3))
    variables = jax.jit(module.init)(jax.random.key(1), images, jax.random.key(2))
    box = module.apply(variables, UNCERTAINTY, method="box")
    np.testing.assert_allclose(box.half_width, np.full((200, 10), 0.5), rtol=1e-5)
    inputs = box.half_width, jax.random.key(3), (8, 8)
    theta, color = module.apply(variables, *inputs, method="draw")
    drawn = np.abs(color) / np.array(ColorBounds())
    assert np.all(drawn <= 0.5 + 1e-6) and np.all(drawn.max(0) > 0.45)
    augmented, theta, same_color, _ = module.apply(
        variables, images, jax.random.key(3), method="transform"
    )
    np.testing.assert_array_equal(same_color, color)
    warped = warp_affine(images, theta, mode="bicubic", padding_mode="reflection")
    np.testing.assert_allclose(augmented, adjust_color(warped, color), atol=1e-4)
    # Whether or not an image gets an affine transform, its colours change.
    chosen, augment = np.arange(200) % 4 == 0, partial(module.apply, method="augment")
    augmented, theta, color = augment(variables, images, jax.random.key(3), chosen=chosen)
    shifted = np.isclose(theta[:, :, :2], np.eye(2), atol=1e-6).all((1, 2))
    np.testing.assert_array_equal(shifted, ~chosen)
    warped = warp_affine(images, theta, mode="bicubic", padding_mode="reflection")
    np.testing.assert_allclose(augmented, adjust_color(warped, color), atol=1e-4)
    assert np.abs(augmented - warped).max((1, 2, 3)).min() > 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_no_weights_lead_a_stochastic_augmenter_past_its_bounds(seed):
    module, variables, images = stochastic(seed, least_width=0.05)
    half_width, log_volume, edge = module.apply(variables, UNCERTAINTY, method="box")
    assert np.all((half_width >= 0.05) & (half_width <= 1 + 1e-6))
    assert np.all(log_volume <= 0) and np.all(edge >= -1e-5)
    chex.assert_tree_all_finite((log_volume, edge))
    assert np.ptp(np.asarray(half_width), axis=0).max() > 0.1  # of each image its own
    drawn = module.apply(variables, images, jax.random.key(3), UNCERTAINTY, method="transform")
    away = np.abs(coordinates(drawn[1]))
    assert np.all(away <= half_width * np.array(WIDE_BOUNDS) + 1e-3)


def test_a_stochastic_augmenter_transforms_its_share_of_the_images():
    module, variables, images = stochastic(share=0.25)
    augmented, theta = module.apply(variables, images, jax.random.key(3))
    same = np.all(np.isclose(theta, np.eye(2, 3), atol=1e-6), axis=(1, 2))
    assert 0.6 < same.mean() < 0.9  # 200 images: 0.75, five deviations of 0.03
    np.testing.assert_allclose(augmented[same], images[same], atol=1e-5)
    again = module.apply(variables, images, jax.random.key(3))[1]
    np.testing.assert_array_equal(theta, again)
    assert np.any(theta != module.apply(variables, images, jax.random.key(4))[1])


def test_a_stochastic_augmenter_shifts_the_others_by_whole_pixels():
    module, variables, images = stochastic(share=0.25, others_shift=0.25)
    augmented, theta = module.apply(variables, images, jax.random.key(3))
    pixels = np.asarray(theta)[:, :, 2] * np.array(images.shape[2:0:-1]) / 2
    whole = np.isclose(pixels, np.round(pixels), atol=1e-5).all(1)
    others = whole & np.isclose(theta[:, :, :2], np.eye(2), atol=1e-6).all((1, 2))
    assert 0.6 < others.mean() < 0.9
    assert set(np.unique(np.round(pixels[others]))) == {-2, -1, 0, 1, 2}
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), "symmetric")
    height, width = images.shape[1:3]
    for i in np.flatnonzero(others):
        x, y = np.round(pixels[i]).astype(int) + 2
        shifted = padded[i, y : y + height, x : x + width]
        np.testing.assert_allclose(augmented[i], shifted, atol=1e-5)


def test_a_stochastic_augmenter_leaves_the_others_alone():
    """With colours, too, to the last bit; the chosen ones have what they have in any case."""
    options = {"share": 0.25, "color": ColorBounds(), "start_width": 0.5}
    images = jax.random.normal(jax.random.key(0), (40, 8, 8, 3))
    found = []
    for shift in (None, 0.25):
        module = models.StochasticAugmenter(others_shift=shift, **options)
        variables = module.init(jax.random.key(1), images[:1], jax.random.key(2))
        chosen = steps.first_of_groups(40, *module.partition(40))
        arguments = images, jax.random.key(3), None, chosen
        found.append(jax.jit(partial(module.apply, method="augment"))(variables, *arguments))
    (augmented, theta, color), shifted = found
    np.testing.assert_array_equal(augmented[~chosen], images[~chosen])
    assert not color[~chosen].any() and (theta[~chosen] == np.eye(2, 3)).all()
    for alone, beside in zip((augmented, theta, color), shifted, strict=True):
        np.testing.assert_array_equal(alone[chosen], beside[chosen])
    assert np.all(np.any(augmented[chosen] != images[chosen], axis=(1, 2, 3)))


def test_a_stochastic_augmenter_has_a_gradient_in_every_width():
    module, variables, images = stochastic()

    def loss(variables):
        augmented, *_ = module.apply(variables, images, jax.random.key(3), method="transform")
        return jnp.sum(augmented * jnp.linspace(0, 1, images.size).reshape(images.shape))

    last = jax.jit(jax.grad(loss))(variables)["params"]["output_layer"]
    assert np.all(np.abs(last["bias"]) > 1e-4)
    assert np.max(np.abs(last["kernel"])) > 1e-4


@pytest.mark.parametrize("far", [20.0, -20.0])
def test_edge_and_volume_lead_back_from_where_all_else_has_no_gradient(far):
    module, variables, _ = stochastic()
    variables["params"]["output_layer"]["bias"] = jnp.full(6, far)

    def cost(variables):
        box = module.apply(variables, UNCERTAINTY, method="box")
        return (box.edge - box.log_volume).mean()

    slope = jax.grad(cost)(variables)["params"]["output_layer"]["bias"]
    np.testing.assert_allclose(slope, np.full(6, -1.0 if far < 0 else 0.05), rtol=1e-4)


def test_discriminator_judges_each_image_by_itself():
    module = models.Discriminator()
    images = jax.random.normal(jax.random.key(0), (3, 16, 16, 3))
    params = module.init(jax.random.key(1), images)
    logits = module.apply(params, images)
    chex.assert_shape(logits, (3,))
    np.testing.assert_allclose(module.apply(params, images[1:2]), logits[1:2], rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def predictor():
    module = models.LossPredictor(models.ResNet(3, **TINY), hidden=8)
    images = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
    return module, jax.jit(module.init)(jax.random.key(1), images), images


def test_a_loss_predictors_logits_are_its_classifiers(predictor):
    module, variables, images = predictor
    logits, predicted = module.apply(variables, images, method="with_loss")
    chex.assert_shape(predicted, (6,))
    inner = {name: tree["classifier"] for name, tree in variables.items()}
    alone, stages = module.classifier.apply(inner, images, with_stages=True)
    np.testing.assert_allclose(logits, alone, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(module.apply(variables, images), alone, rtol=1e-5, atol=1e-6)
    assert [stage.shape for stage in stages] == [(6, 4), (6, 8)]


@pytest.mark.parametrize("learns", [True, False])
def test_predicted_losses_may_leave_the_classifier_alone(predictor, learns):
    module, variables, images = predictor

    def total(params):
        _, predicted = module.apply(
            variables | {"params": params}, images, backbone_learns=learns, method="with_loss"
        )
        return predicted.sum()

    slopes = jax.grad(total)(variables["params"])
    assert any(np.any(leaf) for leaf in jax.tree.leaves(slopes["classifier"])) == learns
    assert np.any(slopes["head"]["kernel"])


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 1.0])
def test_about_its_share_is_chosen_in_groups_that_devices_can_divide(share):
    module = models.StochasticAugmenter(share=share)
    for count in (1, 7, 50, 64, 100, 128):
        groups, number = module.apply({}, count, method="partition")
        assert count % groups == 0 and 1 <= number <= count // groups
        assert abs(groups * number - share * count) <= max(1, groups / 2)
        if share == 1:
            assert groups * number == count
        for devices in (2, 8):
            if count % devices == 0 and share * count >= 8:
                assert groups % devices == 0


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"share": 0.0}, "share must be above 0"),
        ({"share": np.nan}, "share must be above 0"),
        ({"others_shift": 1.5}, "others_shift must be None or in"),
        ({"uncertainty": 9.0}, "uncertainty must be in"),
    ],
)
def test_an_option_outside_of_its_range_is_named(option, named):
    with pytest.raises(ValueError, match=named):
        stochastic(**option)


@pytest.mark.parametrize("shape", [(), (1,), (200, 1)])
def test_uncertainty_of_another_shape_is_named(shape):
    module, variables, images = stochastic()
    with pytest.raises(ValueError, match=r"uncertainty must be \[B\] with B = "):
        module.apply(variables, images, jax.random.key(1), jnp.zeros(shape))


@pytest.mark.parametrize(("least", "start"), [(0.02, 0.01), (0.02, 1.0), (0.0, 0.5), (0.5, 0.5)])
def test_a_start_outside_of_its_range_is_named(least, start):
    with pytest.raises(ValueError, match="start_width must be between"):
        stochastic(least_width=least, start_width=start)


def test_stages_may_be_a_list():
    assert hash(models.ResNet(10, stage_sizes=[1, 1])) == hash(models.ResNet(10, (1, 1)))


@pytest.mark.parametrize(
    "network",
    [
        models.ResNetSmall(10),
        models.Augmenter(),
        models.StochasticAugmenter(),
        models.Discriminator(),
        models.LossPredictor(models.ResNetSmall(10)),
    ],
    ids=lambda network: type(network).__name__,
)
@pytest.mark.parametrize(
    "images",
    [jnp.zeros((8, 8, 3)), jnp.zeros((1, 1, 8, 8, 3)), jnp.zeros((1, 8, 8, 3), jnp.uint8)],
)
def test_other_images_are_refused(network, images):
    """Without a batch, or of integers, which are not normalised and have no gradient."""
    keys = jax.random.split(jax.random.key(0))
    rest = keys[1:] if isinstance(network, models.StochasticAugmenter) else ()
    with pytest.raises(ValueError, match=r"images must be floating point \[B, H, W, C\], got"):
        network.init(keys[0], images, *rest)


def test_colours_need_three_channels():
    network, key = models.StochasticAugmenter(color=ColorBounds()), jax.random.key(0)
    with pytest.raises(ValueError, match="color must be None for images of 1 channels"):
        network.init(key, jnp.zeros((2, 8, 8, 1)), key)


@pytest.mark.parametrize("color", [None, ColorBounds()])
@pytest.mark.parametrize("others_shift", [None, 0.1])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_images_keep_their_dtype_and_theta_is_float32(dtype, others_shift, color):
    with jax.enable_x64():
        network = models.StochasticAugmenter(others_shift=others_shift, color=color)
        images, key = jnp.zeros((2, 8, 8, 3), dtype), jax.random.key(0)
        weights = network.init(key, images, key)
        for method in ("augment", "transform"):
            augmented, theta, *_ = network.apply(weights, images, key, method=method)
            assert augmented.dtype == dtype and theta.dtype == jnp.float32
