"""Changes of colour: identities, inverses, and what each coordinate leaves alone."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from maxent_aug import ColorBounds, adjust_color

IMAGES = np.random.default_rng(0).normal(0.3, 1, (5, 6, 7, 3)).astype(np.float32)
COLOR = np.random.default_rng(1).uniform(-1, 1, (5, 4)).astype(np.float32)
NAMES = ColorBounds._fields
adjust = jax.jit(adjust_color)
few = settings(max_examples=25, deadline=None)


def only(**coordinates):
    return np.float32([coordinates.get(name, 0) for name in NAMES])


def grey(images):
    return images.mean(-1, keepdims=True)


def test_zero_changes_nothing():
    np.testing.assert_allclose(adjust(IMAGES, only()), IMAGES, atol=1e-6)


@few
@given(st.sampled_from(NAMES), st.floats(-2, 2))
def test_the_opposite_undoes(name, value):
    there = adjust(IMAGES, only(**{name: value}))
    np.testing.assert_allclose(adjust(there, only(**{name: -value})), IMAGES, atol=1e-4)


@few
@given(st.floats(-2, 2))
def test_brightness_is_added(value):
    np.testing.assert_allclose(adjust(IMAGES, only(brightness=value)), IMAGES + value, atol=1e-5)


@few
@given(st.floats(-2, 2))
def test_contrast_scales_the_grey_about_its_mean_and_leaves_the_colour(value):
    changed = adjust(IMAGES, only(log_contrast=value))
    middle = grey(IMAGES).mean((1, 2), keepdims=True)
    expected = middle + np.exp(value) * (grey(IMAGES) - middle)
    np.testing.assert_allclose(grey(changed), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(changed - grey(changed), IMAGES - grey(IMAGES), atol=1e-4)


@few
@given(st.floats(-2, 2))
def test_saturation_scales_the_colour_and_leaves_the_grey(value):
    changed = adjust(IMAGES, only(log_saturation=value))
    np.testing.assert_allclose(grey(changed), grey(IMAGES), atol=1e-4)
    colour = np.exp(value) * (IMAGES - grey(IMAGES))
    np.testing.assert_allclose(changed - grey(changed), colour, rtol=1e-4, atol=1e-4)


def test_a_third_of_a_turn_of_the_hue_moves_the_channels_on():
    third = adjust(IMAGES, only(hue=2 * np.pi / 3))
    red = adjust(np.float32([1, 0, 0]).reshape(1, 1, 3), only(hue=2 * np.pi / 3))
    np.testing.assert_allclose(red.ravel(), [0, 0, 1], atol=1e-5)
    np.testing.assert_allclose(third, np.roll(IMAGES, -1, axis=-1), atol=1e-5)


@few
@given(st.floats(-np.pi, np.pi), st.floats(-np.pi, np.pi))
def test_hues_add_up_and_keep_grey_and_saturation(first, second):
    changed = adjust(adjust(IMAGES, only(hue=first)), only(hue=second))
    np.testing.assert_allclose(changed, adjust(IMAGES, only(hue=first + second)), atol=1e-4)
    sizes = [np.linalg.norm(x - grey(x), axis=-1) for x in (np.asarray(changed), IMAGES)]
    np.testing.assert_allclose(*sizes, atol=1e-4)
    np.testing.assert_allclose(grey(changed), grey(IMAGES), atol=1e-5)


def test_grey_images_stay_grey():
    grey_images = np.repeat(IMAGES[..., :1], 3, -1)
    changed = np.asarray(adjust(grey_images, COLOR))
    np.testing.assert_allclose(np.ptp(changed, axis=-1), np.zeros((5, 6, 7)), atol=1e-5)


def test_jit_vmap_a_loop_and_broadcasting_agree():
    expected = np.stack([adjust_color(x, c) for x, c in zip(IMAGES, COLOR, strict=True)])
    for found in (adjust(IMAGES, COLOR), jax.vmap(adjust_color)(IMAGES, COLOR)):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    chex.assert_shape(adjust(IMAGES, COLOR[:2, None]), (2, 5, 6, 7, 3))
    np.testing.assert_allclose(adjust(IMAGES, COLOR[0])[3], adjust(IMAGES[3], COLOR[0]), atol=1e-5)


def test_gradients_against_finite_differences():
    with jax.enable_x64():
        images, color = jnp.asarray(IMAGES[:2], jnp.float64), jnp.asarray(COLOR[:2], jnp.float64)
        check_grads(adjust_color, (images, color), order=2)


def test_dtypes():
    assert adjust(IMAGES.astype(jnp.bfloat16), COLOR).dtype == jnp.float32
    with jax.enable_x64():
        assert adjust_color(IMAGES.astype(np.float64), COLOR).dtype == jnp.float64
        assert adjust_color(IMAGES, COLOR).dtype == jnp.float32


@pytest.mark.parametrize(
    ("images", "color", "words"),
    [
        (IMAGES[..., :1], COLOR, "floating point"),
        (IMAGES.astype(np.uint8), COLOR, "floating point"),
        (IMAGES[0, 0], COLOR[0], "floating point"),
        (IMAGES, COLOR[:, :3], r"color must be \[..., 4\]"),
        (IMAGES, COLOR * 1j, "color must be real"),
    ],
)
def test_wrong_input_is_named(images, color, words):
    with pytest.raises(ValueError, match=words):
        adjust_color(images, color)


def test_what_does_not_broadcast_is_named():
    with pytest.raises(ValueError, match=r"images \(2, 4, 4, 3\) and color \(3, 4\)"):
        adjust_color(jnp.zeros((2, 4, 4, 3)), jnp.zeros((3, 4)))
