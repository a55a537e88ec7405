"""The policies of `maxent_aug.policies` by name, joined by + and :, as flags take them."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
from jax import Array

from maxent_aug import policies, programs
from maxent_aug.spatial import WIDE_BOUNDS, AffineBounds

IMAGE_POLICIES = {
    "identity": policies.identity,
    "flip": policies.flip,
    "flip_crop": policies.flip_crop,
    "flip_crop_reflect": partial(policies.flip_crop, padding_mode="reflect"),
    "cutout": policies.cutout,
    "color_jitter": policies.color_jitter,
    "rand_augment": policies.rand_augment,
    "trivial_augment": policies.trivial_augment,
    "auto_augment": policies.auto_augment,
}
MIXING_POLICIES = {"mixup": policies.mixup, "cutmix": policies.cutmix}
AFFINE = ("random_affine", "half_affine")  # within bounds
NAMES = (*IMAGE_POLICIES, *AFFINE, *MIXING_POLICIES, "entropy_magnitude")
KNOWN = f"of {', '.join(NAMES)}; + joins several, : two of these that do not mix images"


def is_policy(text: str, more: Sequence[str] = ()) -> bool:
    """Whether `text` is what `named_policy` takes, with more names than its own."""
    halves = [half.split("+") for half in text.split(":")]
    forbidden = MIXING_POLICIES if len(halves) == 2 else ()
    return len(halves) <= 2 and all(
        name in (*NAMES, *more) and name not in forbidden for half in halves for name in half
    )


def named_policy(
    text: str, num_classes: int, bounds: AffineBounds = WIDE_BOUNDS
) -> programs.Policy:
    """One policy after the other, each with a key of its own.

    Args:
      text: names of NAMES joined by +; two such, joined by :, are each for one half of the images,
        drawn anew for every batch; empty leaves the images as they are.
      num_classes: of the probabilities that mixing policies return.
      bounds: of random affine transforms.

    Raises:
      KeyError: on a name that is none; ask `is_policy` first.
    """
    if ":" in text:
        first, others = (named_policy(half, num_classes, bounds) for half in text.split(":"))
        return programs.divide(first, others, lambda key, n: jax.random.bernoulli(key, 0.5, (n,)))
    names = text.split("+") if text else []
    return partial(_apply, [_policy(name, num_classes, bounds) for name in names])


def _policy(name: str, num_classes: int, bounds: AffineBounds) -> programs.Policy:
    if name == "entropy_magnitude":
        return _entropy_magnitude
    if name in MIXING_POLICIES:
        mix = partial(MIXING_POLICIES[name], num_classes=num_classes)
        return lambda key, images, labels, classify: mix(key, images, labels)
    change = _affine(name, bounds) if name in AFFINE else IMAGE_POLICIES[name]
    return lambda key, images, labels, classify: (change(key, images), labels)


def _affine(name: str, bounds: AffineBounds) -> policies.ImagePolicy:
    """random_affine; or half_affine: flipped, and half of the images shifted by up to 4 pixels, the
    others transformed: the nearest to a learned augmenter without learning."""
    change = partial(policies.random_affine, bounds=bounds)
    if name == "random_affine":
        return change
    shift = IMAGE_POLICIES["flip_crop_reflect"]
    return policies.either(shift, policies.compose(policies.flip, change))


def _entropy_magnitude(
    key: Array, images: Array, labels: Array, classify: Callable[[Array], Array]
) -> tuple[Array, Array]:
    strength = policies.entropy_strength(classify(images))
    return policies.entropy_magnitude(key, images, strength), labels


def _apply(
    chain: Sequence[programs.Policy],
    key: Array,
    images: Array,
    labels: Array,
    classify: Callable[[Array], Array],
) -> tuple[Array, Array]:
    for number, policy in enumerate(chain):
        images, labels = policy(jax.random.fold_in(key, number), images, labels, classify)
    return images, labels
