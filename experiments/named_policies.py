"""The policies of `maxent_aug.policies` by name, joined by + to apply one after the other."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
from jax import Array

from maxent_aug import policies, programs

IMAGE_POLICIES = {
    "identity": policies.identity,
    "flip": policies.flip,
    "flip_crop": policies.flip_crop,
    "random_affine": policies.random_affine,
    "cutout": policies.cutout,
    "rand_augment": policies.rand_augment,
    "trivial_augment": policies.trivial_augment,
    "auto_augment": policies.auto_augment,
}
MIXING_POLICIES = {"mixup": policies.mixup, "cutmix": policies.cutmix}
NAMES = (*IMAGE_POLICIES, *MIXING_POLICIES, "entropy_magnitude")


def named_policy(names: Sequence[str], num_classes: int) -> programs.Policy:
    """One policy after the other, each with a key of its own.

    Args:
      names: of NAMES; none leaves the images as they are.
      num_classes: of the probabilities that mixing policies return.
    """
    return partial(_apply, [_policy(name, num_classes) for name in names])


def _policy(name: str, num_classes: int) -> programs.Policy:
    if name == "entropy_magnitude":
        return _entropy_magnitude
    if name in MIXING_POLICIES:
        mix = partial(MIXING_POLICIES[name], num_classes=num_classes)
        return lambda key, images, labels, classify: mix(key, images, labels)
    return lambda key, images, labels, classify: (IMAGE_POLICIES[name](key, images), labels)


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
