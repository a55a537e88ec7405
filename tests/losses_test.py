"""Entropy and the losses: values, bounds, gradients, extremes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from maxent_aug import losses

FORMS = losses.LOSS_FORMS
logits_of_ten = hnp.arrays(np.float32, (4, 10), elements=st.floats(-30, 30, width=32))
EXTREMES = {
    "one_hot": [1e4, -1e4, 0.0],
    "all_high": [1e4, 1e4, 1e4],
    "all_low": [-1e4, -1e4, -1e4],
    "largest_float32": [3e38, -3e38, 0.0],
    "uniform": [0.0, 0.0, 0.0],
    "nearly_uniform": [1e-4, 0.0, -1e-4],
}


def numpy_entropy(logits):
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -np.sum(np.where(p > 0, p * np.log2(np.maximum(p, 1e-300)), 0), -1)


class EntropyTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_known_values(self):
        entropy = self.variant(losses.entropy)
        for m in (2, 3, 10, 1000):
            np.testing.assert_allclose(entropy(jnp.zeros(m)), np.log2(m), rtol=1e-6)
        np.testing.assert_allclose(entropy(jnp.log(jnp.array([0.5, 0.25, 0.25]))), 1.5, rtol=1e-6)
        np.testing.assert_allclose(entropy(jnp.array([100.0, 0, 0])), 0, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(logits_of_ten, st.floats(-1000, 1000, width=32))
def test_entropy_agrees_with_numpy_and_keeps_its_bounds(logits, shift):
    bits = np.asarray(losses.entropy(logits))
    np.testing.assert_allclose(bits, numpy_entropy(logits), atol=2e-5)
    assert np.all(bits >= 0)
    assert np.all(bits <= np.float32(np.log2(10)))
    share = np.asarray(losses.uncertainty(logits))
    np.testing.assert_allclose(share, bits / np.log2(10), rtol=1e-6)
    assert np.all((share >= 0) & (share <= 1))
    np.testing.assert_allclose(losses.entropy(logits + shift), bits, atol=2e-3)


@settings(max_examples=20, deadline=None)
@given(hnp.arrays(np.float32, (3, 5), elements=st.floats(-5, 5, width=32)))
def test_gradients_equal_those_in_float64(logits):
    for form in FORMS:
        # The slope of the logarithmic forms has no bound at the uniform distribution.
        if form in ("printed", "intended") and np.any(np.ptp(logits, axis=-1) < 0.5):
            continue

        def loss(x, form=form):
            return losses.max_entropy_loss(x, form=form).sum()

        analytic = np.asarray(jax.grad(loss)(jnp.asarray(logits)))
        with jax.enable_x64(True):
            exact = jax.grad(_reference)(logits.astype(np.float64), form)
        np.testing.assert_allclose(analytic, exact, atol=2e-3, rtol=2e-3)


def test_gradients_equal_numerical_ones():
    logits = 2 * jax.random.normal(jax.random.key(0), (3, 5))
    for form in FORMS:
        chex.assert_numerical_grads(
            lambda x, form=form: losses.max_entropy_loss(x, form=form),
            (logits,),
            order=1,
            atol=0.02,
        )


def _reference(logits, form):
    p = jax.nn.softmax(logits)
    h = -jnp.sum(p * jnp.log2(p), -1)
    most = jnp.log2(logits.shape[-1])
    values = {
        "printed": -jnp.log(most - h),
        "intended": jnp.log(most - h),
        "gap": most - h,
        "target": (h / most - 0.3) ** 2,
    }
    return values[form].sum()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_logits_have_finite_values_and_gradients(form, name, dtype):
    logits = jnp.asarray(EXTREMES[name], dtype)
    value, grad = jax.value_and_grad(lambda x: losses.max_entropy_loss(x, form=form))(logits)
    chex.assert_tree_all_finite((value, grad))
    assert value.dtype == jnp.float32
    chex.assert_tree_all_finite(jax.grad(lambda x: losses.entropy(x))(logits))


def test_printed_loss_has_the_values_of_the_analysis():
    # For m = 10 the printed loss grows with H: -1.20 at 0.01 bit, -0.84 at 1, +1.13 at 3.
    for bits, printed in ((0.01, -1.20), (1.0, -0.84), (3.0, 1.13)):
        logits = _logits_with_entropy(bits, 10)
        np.testing.assert_allclose(losses.entropy(logits), bits, atol=1e-3)
        value = losses.max_entropy_loss(logits, form="printed")
        np.testing.assert_allclose(value, printed, atol=6e-3)
        np.testing.assert_allclose(losses.max_entropy_loss(logits, form="intended"), -value)


def _logits_with_entropy(bits, m):
    low, high = 0.0, 30.0
    for _ in range(60):
        middle = (low + high) / 2
        logits = np.array([middle] + [0.0] * (m - 1), np.float32)
        low, high = (middle, high) if numpy_entropy(logits) > bits else (low, middle)
    return jnp.asarray(logits)


def test_only_the_printed_form_rewards_certainty():
    certain, uncertain = jnp.array([4.0, 0, 0, 0]), jnp.array([1.0, 0, 0, 0])
    for form in FORMS:
        step = [losses.max_entropy_loss(x, form=form, target=1.0) for x in (certain, uncertain)]
        assert (step[0] < step[1]) == (form == "printed")


def test_target_is_met_where_it_says():
    logits = _logits_with_entropy(0.3 * np.log2(10), 10)
    np.testing.assert_allclose(losses.max_entropy_loss(logits, form="target"), 0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(np.float32, (6,), elements=st.floats(-50, 50, width=32)),
    hnp.arrays(np.float32, (6,), elements=st.floats(-50, 50, width=32)),
)
def test_adversarial_losses(real, fake):
    def log_sigmoid(x):
        return -np.logaddexp(0, -x.astype(np.float64))

    loss = losses.discriminator_loss(real, fake)
    np.testing.assert_allclose(loss, -(log_sigmoid(real) + log_sigmoid(-fake)), rtol=1e-5)
    assert np.all(loss >= 0)
    saturating = losses.generator_loss(fake)
    np.testing.assert_allclose(saturating, log_sigmoid(-fake), rtol=1e-5)
    heuristic = losses.generator_loss(fake, saturating=False)
    np.testing.assert_allclose(heuristic, -log_sigmoid(fake), rtol=1e-5)


def test_generator_forms_differ_in_slope_against_a_winning_discriminator():
    slope = jax.grad(lambda x, saturating: losses.generator_loss(x, saturating=saturating))
    assert abs(slope(-10.0, True)) < 1e-4
    np.testing.assert_allclose(slope(-10.0, False), -1.0, atol=1e-4)
    assert slope(-1.0, True) < 0
    assert slope(-1.0, False) < 0


def test_a_guessing_discriminator_loses_two_log_two():
    np.testing.assert_allclose(losses.discriminator_loss(jnp.zeros(3), jnp.zeros(3)), 2 * np.log(2))


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"form is 'up'; allowed: printed, intended, gap, target"):
        losses.max_entropy_loss(jnp.zeros(3), form="up")
    with pytest.raises(ValueError, match=r"target must be a number from 0 to 1, got 1.5"):
        losses.max_entropy_loss(jnp.zeros(3), form="target", target=1.5)
    for shape in ((), (1,), (4, 1)):
        with pytest.raises(ValueError, match="2 classes"):
            losses.entropy(jnp.zeros(shape))


def test_probabilities_as_labels():
    logits = jax.random.normal(jax.random.key(0), (5, 4))
    labels = jnp.arange(5) % 4
    sharp, other = jax.nn.one_hot(labels, 4), jax.nn.one_hot((labels + 1) % 4, 4)
    by_label = losses.cross_entropy(logits, labels)
    np.testing.assert_allclose(losses.cross_entropy(logits, sharp), by_label, rtol=1e-5)
    mixed = losses.cross_entropy(logits, 0.7 * sharp + 0.3 * other)
    by_other = losses.cross_entropy(logits, (labels + 1) % 4)
    np.testing.assert_allclose(mixed, 0.7 * by_label + 0.3 * by_other, rtol=1e-5)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_loss_ranking_is_a_loop_over_pairs(count):
    random = np.random.default_rng(count)
    predicted, true = random.normal(size=(2, count)).astype(np.float32)
    expected = []
    for i in range(count // 2):
        j = i + count // 2
        ordered = predicted[i] - predicted[j] if true[i] > true[j] else predicted[j] - predicted[i]
        expected.append(max(0.0, 0.5 - ordered))
    got = losses.loss_ranking_loss(predicted, true, margin=0.5)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda true: losses.loss_ranking_loss(predicted, true).sum())(true)
    np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("shape", [(4, 1), (4, 5), (3,), ()])
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32])
def test_labels_of_another_shape_are_named(shape, dtype):
    with pytest.raises(
        ValueError, match=r"labels must be integers \(4,\) or probabilities \(4, 3\)"
    ):
        losses.cross_entropy(jnp.zeros((4, 3)), jnp.zeros(shape, dtype))


def test_lists_are_arrays():
    logits = [[1.0, 2.0], [0.0, 0.0]]
    np.testing.assert_allclose(losses.uncertainty(logits)[1], 1.0, rtol=1e-6)
    np.testing.assert_allclose(losses.cross_entropy(logits, [0, 1])[1], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(losses.max_entropy_loss(logits, form="gap")[1], losses.MIN_GAP)
    assert losses.discriminator_loss([1.0], [2.0]).shape == (1,)


def test_labels_that_are_no_integers_are_named():
    with pytest.raises(ValueError, match=r"got float32 \(4,\)"):
        losses.cross_entropy(jnp.zeros((4, 3)), jnp.zeros(4))


def test_logits_of_two_shapes_are_named():
    with pytest.raises(ValueError, match="one shape"):
        losses.discriminator_loss(jnp.zeros((4, 1)), jnp.zeros(4))


def test_cross_entropy_of_certain_probabilities_is_that_of_the_label():
    logits, labels = jnp.array([[-jnp.inf, 0, 0, 1, 2], [3e38, -3e38, 0, 0, 0]]), jnp.array([4, 0])
    certain = jax.nn.one_hot(labels, 5)
    value, grad = jax.value_and_grad(lambda p: losses.cross_entropy(logits, p).sum())(certain)
    np.testing.assert_allclose(value, losses.cross_entropy(logits, labels).sum(), rtol=1e-6)
    chex.assert_tree_all_finite(grad)
    likely, wanted = (
        jax.grad(lambda x, each=each: losses.cross_entropy(x, each).sum())(logits)
        for each in (certain, labels)
    )
    np.testing.assert_allclose(likely, wanted, atol=1e-6)
