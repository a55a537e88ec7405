"""What differs on a TPU, without one: every program lowers for it, and none needs what is slow."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_run
from jax import export

import maxent_aug as ma
from maxent_aug import models, phases, programs, steps
from maxent_aug.config import ActiveLearning, ComparedEpochs, Comparison, MatchingAugmenter

IMAGES = jax.ShapeDtypeStruct((16, 8, 8, 3), jnp.float32)
THETA = jax.ShapeDtypeStruct((16, 2, 3), jnp.float32)
KEY = jax.eval_shape(jax.random.key, 0)


def lowered(function, *inputs, platform="tpu"):
    """The StableHLO of a function, for a platform that need not be here."""
    if not hasattr(function, "lower"):
        function = jax.jit(function)
    return export.export(function, platforms=[platform])(*inputs).mlir_module()


def warp_and_gradients(theta, images):
    return jax.value_and_grad(lambda *x: (ma.warp_affine(*x[::-1]) ** 2).sum(), (0, 1))(
        theta, images
    )


def augment(module, key, images):
    variables = jax.eval_shape(module.init, key, images, key)
    return lowered(lambda v, key, images: module.apply(v, images, key), variables, key, images)


@pytest.mark.parametrize(
    "function",
    [
        ma.warp_affine,
        lambda images, theta: warp_and_gradients(theta, images),
        lambda images, theta: ma.grid_sample(
            images, ma.affine_grid(theta, (8, 8)), mode="nearest", padding_mode="border"
        ),
    ],
)
def test_the_warp_is_made_of_matrix_products_on_a_tpu_and_of_gathers_elsewhere(function):
    on_tpu, on_cpu = (lowered(function, IMAGES, THETA, platform=p) for p in ("tpu", "cpu"))
    assert not re.search(r"stablehlo\.(dynamic_)?(gather|scatter)", on_tpu)
    assert "stablehlo.dot_general" in on_tpu
    assert "stablehlo.gather" in on_cpu
    assert "stablehlo.dot_general" not in on_cpu


@pytest.mark.parametrize("module", [ma.Augmenter(), ma.StochasticAugmenter()])
def test_an_augmenter_needs_no_gather(module):
    assert "stablehlo.gather" not in augment(module, KEY, IMAGES)


def test_products_that_make_values_are_exact():
    """A TPU rounds the inputs of a matrix product to bfloat16 unless it is told not to."""

    def everything(theta, images, logits):
        value, gradients = warp_and_gradients(ma.invert_affine(theta), images)
        parts = ma.affine_matrix(**ma.decompose_affine(theta))
        bounded = ma.bounded_affine(theta.reshape(-1, 6))
        return value, gradients, parts, bounded, ma.entropy(logits), ma.max_entropy_loss(logits)

    logits = jax.ShapeDtypeStruct((16, 10), jnp.float32)
    products = re.findall(
        r"stablehlo\.(?:dot_general|dot|convolution).*", lowered(everything, THETA, IMAGES, logits)
    )
    assert products
    assert all("HIGHEST" in product for product in products)


# what an epoch runs


def paper():
    return {phase.name: phase for phase in small_run.phases()}


def compared(interval=1):
    """A learned row, which has unseen images."""
    learned = MatchingAugmenter(interval=interval)
    config = Comparison(epochs=ComparedEpochs(train=2), batch_size=16, learned=learned)
    tiny = models.ResNet(10, stage_sizes=(1,), width=4)
    rows = {"learned": phases.Row(programs.unchanged, "learned")}
    legs = phases.comparison(config, tiny, rows, (8, 8, 1), 3)["learned"]
    return {leg.name: leg for leg in legs}


def loss_prediction():
    """Of active learning."""
    classifier = models.LossPredictor(models.ResNet(10, stage_sizes=(1,), width=4))
    tx = phases.scheduled_sgd(ActiveLearning().classifier, 3)
    begin = partial(phases.begin_classifier, classifier, (8, 8, 1), tx)
    step = partial(steps.loss_prediction_step, backbone_updates=2)
    return phases.Phase("learning_loss", "train", 1, begin, step, steps.eval_step)


@pytest.mark.parametrize(
    "make", [paper, compared, partial(compared, 4), lambda: {"train": loss_prediction()}]
)
def test_every_phase_lowers_for_a_tpu(make):
    """A loop of steps, and the evaluation: no call back to the host, no shape left open."""
    mesh, data, number = small_run.mesh(8), small_run.data(8), np.int32(0)
    states = {None: None}
    for phase in make().values():
        begin = partial(phase.begin, states[phase.follows])
        state = states[phase] = jax.eval_shape(begin, KEY)
        unseen = phase.unseen
        sizes = 16, unseen.batch_size
        names = programs.metric_names(phase.step, mesh, state, (8, 8, 1), *sizes)
        sums = programs.zero_sums(names, mesh)
        plan = programs.Plan(np.arange(48, dtype=np.int32), KEY, np.arange(9, dtype=np.int32))
        program = programs.train_program(phase.step, mesh, 16, False, phase.policy, unseen)
        loop = lowered(program, state, sums, data, plan, number, number)
        assert "stablehlo.while" in loop
        program = programs.eval_program(phase.eval_step, mesh, 16)
        inputs = data.test_images, data.test_labels, data.mean, data.sd, number
        for text in (loop, lowered(program, state, *inputs)):
            assert "callback" not in text
            assert "tensor<?" not in text


@pytest.mark.parametrize(
    "policy",
    [
        ma.flip_crop,
        ma.random_affine,
        ma.cutout,
        ma.color_jitter,
        ma.rand_augment,
        ma.trivial_augment,
        ma.auto_augment,
    ],
)
def test_policies_lower_for_a_tpu(policy):
    assert "callback" not in lowered(policy, KEY, jax.ShapeDtypeStruct((16, 8, 8, 3), jnp.uint8))


def test_operations_loop_over_images_on_a_cpu_alone():
    """Elsewhere over the operations in turn alone, whose number is known."""
    images = jax.ShapeDtypeStruct((16, 8, 8, 3), jnp.uint8)
    drawn = jax.ShapeDtypeStruct((2, 16), jnp.int32), jax.ShapeDtypeStruct((2, 16), jnp.float32)
    loops = {
        platform: lowered(ma.apply_operations, images, *drawn, platform=platform).count(
            "stablehlo.while"
        )
        for platform in ("cpu", "cuda", "tpu")
    }
    assert loops == {"cpu": 3, "cuda": 1, "tpu": 1}
