"""The networks: sizes, shapes, the identity start, independence of images."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxent_aug import models

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
