"""Augmentations that are not learned, with independent random parameters for every image.

An image policy is a function `policy(key, images, **options) -> images`, a mixing policy
`policy(key, images, labels, **options) -> (images, labels)`. key is a `jax.random.key` for the
whole batch; images are [B, H, W, C], uint8 or float32 in 0..255, and keep their dtype; options are
set with `functools.partial`. Where values are rounded or clipped, images that this plainly spoils,
of 0..1 or normalised, raise ValueError, if they are known and not traced. All run under `jit`, and
under `jax.shard_map`, where each device has its own part of a batch, and a key alike means draws
alike. `jax.export` takes a symbolic B, but of color_jitter, mixup and cutmix, since JAX shuffles no
unknown number.
"""

import inspect
from collections.abc import Callable
from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from maxent_aug.checks import check_number
from maxent_aug.losses import uncertainty
from maxent_aug.operations import (
    OPERATIONS,
    apply_drawn,
    check_fill,
    check_images,
    check_range,
    in_dtype,
    pixels_at,
)
from maxent_aug.spatial import (
    DEFAULT_BOUNDS,
    AffineBounds,
    bounded_affine,
    divided_like,
    warp_affine,
)

# What RandAugment and TrivialAugment draw from: all but invert, which only AutoAugment has.
_DRAWN = len(OPERATIONS) - 1
_SIGNED = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color",
           "contrast", "sharpness")  # fmt: skip
_MOST_PIXELS = 2**30  # of a size, which int32 counts
_BINS = 31  # torchvision's num_magnitude_bins
# AutoAugment's policy for CIFAR-10: (operation, probability, magnitude of 0..9), twice.
_CIFAR10_POLICY = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

ImagePolicy = Callable[..., Array]
MixingPolicy = Callable[..., tuple[Array, Array]]


def compose(*policies: Callable[..., Any]) -> Callable[..., Any]:
    """One policy after the other, each with its own key.

    Args:
      policies: all image policies or all mixing policies; any callable of that signature. What an
        image policy returns beside the images, as a loaded augmenter does, is left out.

    Returns:
      A policy of the same kind.

    Raises:
      ValueError: where it is called with labels and one takes none, or the reverse.
    """

    def composed(key: Array, images: ArrayLike, *labels: ArrayLike) -> Any:
        batch = images, *labels
        for index, policy in enumerate(policies):
            _check_kind(policy, mixes=bool(labels))
            result = policy(jax.random.fold_in(key, index), *batch)
            batch = result if labels else (_images(result),)
        return batch if labels else batch[0]

    return composed


def _check_kind(policy: Callable[..., Any], *, mixes: bool) -> None:
    """Raises ValueError unless a policy's positional parameters are those of its kind."""
    parameters = inspect.signature(policy).parameters
    if any(each.kind is each.VAR_POSITIONAL for each in parameters.values()):
        return
    needed = [
        name
        for name, each in parameters.items()
        if each.kind in _POSITIONAL and (each.default is each.empty or name == "labels")
    ]
    name = getattr(getattr(policy, "func", policy), "__name__", repr(policy))
    if mixes and len(needed) < 3:
        raise ValueError(f"{name} takes no labels: beside policies that do, with_labels({name})")
    if not mixes and len(needed) > 2:
        raise ValueError(f"{name} needs labels: call what is composed with (key, images, labels)")


def with_labels(policy: ImagePolicy) -> MixingPolicy:
    """The mixing policy that changes the images as `policy` does, and no label."""
    return lambda key, images, labels: (_images(policy(key, images)), labels)


def _images(result: Any) -> Array:
    """Of what an image policy returns."""
    return result[0] if isinstance(result, tuple) else result


def either(first: ImagePolicy, second: ImagePolicy, share: float = 0.5) -> ImagePolicy:
    """Each image by one of two policies, drawn independently.

    Args:
      first, second: image policies of the same result; both are computed for all images.
      share: probability of the second, in [0, 1].

    Returns:
      An image policy.

    Raises:
      ValueError: on another share.
    """
    check_number("share", share, 0, 1)
    both = first, second

    def drawn(key: Array, images: ArrayLike) -> Array:
        one, other = (
            _images(policy(jax.random.fold_in(key, i), images)) for i, policy in enumerate(both)
        )
        chosen = jax.random.bernoulli(jax.random.fold_in(key, 2), share, (one.shape[0], 1, 1, 1))
        return jnp.where(chosen, other, one)

    return drawn


def identity(key: Array, images: ArrayLike) -> Array:
    """The images as they are."""
    del key
    return check_images(images)


def flip(key: Array, images: ArrayLike) -> Array:
    """Each image mirrored with probability 1/2: torchvision's RandomHorizontalFlip."""
    return flip_crop(key, images, pad=0)


def flip_crop(key: Array, images: ArrayLike, *, pad: int = 4, padding_mode: str = "zeros") -> Array:
    """Cuts of the padded images, mirrored with probability 1/2: the usual recipe for CIFAR.

    torchvision's RandomCrop(size, padding=pad) and RandomHorizontalFlip. Source: He et al., Deep
    residual learning for image recognition, 2015, https://arxiv.org/abs/1512.03385, section 4.2.

    Args:
      key: a jax.random.key.
      images: [B, H, W, C], uint8 or float32.
      pad: pixels on each side, a whole number, at least 0.
      padding_mode: "zeros" or "reflect" (about the outermost pixels' centres; pad < H, W).

    Returns:
      [B, H, W, C] in the images' dtype.

    Raises:
      ValueError: on other images, pad or padding_mode.
    """
    images = check_images(images)
    batch, height, width, _ = images.shape
    if padding_mode not in ("zeros", "reflect"):
        raise ValueError(f'padding_mode must be "zeros" or "reflect", got {padding_mode!r}')
    if (
        not isinstance(pad, Integral)
        or not 0 <= pad < _MOST_PIXELS
        or (padding_mode == "reflect" and pad >= min(height, width))
    ):
        raise ValueError(
            f"pad must be a whole number, at least 0, to reflect less than H and W, got {pad}; "
            "below 2**30"
        )
    shift_key, flip_key = jax.random.split(key)
    shift = jax.random.randint(shift_key, (2, batch, 1), -pad, pad + 1)
    mirrored = jax.random.bernoulli(flip_key, shape=(batch, 1))
    row, column = jnp.arange(height)[None] + shift[0], jnp.arange(width)[None] + shift[1]
    column = jnp.where(mirrored, width - 1 - column, column)
    if padding_mode == "reflect":
        row, column = (
            size - 1 - jnp.abs(size - 1 - jnp.abs(index))
            for index, size in ((row, height), (column, width))
        )
    return pixels_at(images, row[:, :, None], column[:, None, :], 0)


def random_affine(
    key: Array,
    images: ArrayLike,
    *,
    bounds: AffineBounds | tuple[float, ...] = DEFAULT_BOUNDS,
    interpolation: str = "bicubic",
    padding_mode: str = "reflection",
) -> Array:
    """Affine transforms whose six coordinates are uniform in [-bound, bound].

    With its bounds the control of a learned augmenter: its coordinates, its sampler, no learning.
    torchvision's RandomAffine, in the parts of `affine_matrix`.

    Args:
      key: a jax.random.key.
      images: [B, H, W, C], uint8 or float32.
      bounds: of (tx, ty, rotation, log_scale, log_aspect, shear); see `AffineBounds`.
      interpolation, padding_mode: mode and padding_mode of `grid_sample`.

    Returns:
      [B, H, W, C] in the images' dtype, rounded where that is uint8.

    Raises:
      ValueError: on other images, interpolation or padding_mode, or bounds that are not six
        finite numbers, at least 0.
    """
    images = check_images(images)
    check_range(images, rounded=False)
    shares = jax.random.uniform(key, (images.shape[0], 6), minval=-1.0)
    theta = bounded_affine(shares, bounds, size=images.shape[1:3])
    warped = warp_affine(images, theta, mode=interpolation, padding_mode=padding_mode)
    # A cubic passes the extremes of what it is made of.
    return in_dtype(jnp.clip(warped, 0, 255), images.dtype)


def color_jitter(
    key: Array,
    images: ArrayLike,
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
) -> Array:
    """Brightness, contrast and saturation by random factors, in an order random for each image.

    torchvision's ColorJitter, without a change of hue.

    Args:
      key: a jax.random.key.
      images: [B, H, W, 1 or 3], uint8 or float32, rounded to whole levels first.
      brightness, contrast, saturation: factors are uniform in 1 - this to 1 + this; in [0, 1].

    Returns:
      [B, H, W, C] in the images' dtype, whole levels.

    Raises:
      ValueError: on other images or numbers.
    """
    images = check_images(images, (1, 3))
    drawn = draw_color_jitter(key, images.shape[0], (brightness, contrast, saturation))
    return apply_drawn(images, *drawn)


def draw_color_jitter(
    key: Array, count: int, most: tuple[float, float, float]
) -> tuple[Array, Array]:
    """operation and magnitude [3, count] of `color_jitter`, with its errors."""
    for name, number in zip(("brightness", "contrast", "saturation"), most, strict=True):
        check_number(name, number, 0, 1)
    names = ("brightness", "contrast", "color")
    operation = jnp.array([OPERATIONS.index(name) for name in names])
    magnitude_key, order_key = jax.random.split(key)
    magnitude = jax.random.uniform(magnitude_key, (3, count), minval=-1.0)
    in_order = jnp.tile(jnp.arange(3)[:, None], count)
    order = jax.random.permutation(order_key, in_order, axis=0, independent=True)
    return operation[order], magnitude * jnp.array(most)[order]


def cutout(key: Array, images: ArrayLike, *, size: int = 16, fill: ArrayLike = 0) -> Array:
    """A square of `fill` about a random pixel; it may stick out of the frame.

    Source: DeVries and Taylor, Improved regularization of convolutional neural networks with
    cutout, 2017, https://arxiv.org/abs/1708.04552, and its authors' code, which cuts after
    normalisation: its fill is the mean of the data set.

    Args:
      key: a jax.random.key.
      images: [B, H, W, C], uint8 or float32.
      size: side of the square in pixels, at least 1.
      fill: grey level, or one for each channel.

    Returns:
      [B, H, W, C] in the images' dtype.

    Raises:
      ValueError: on other images or size.
    """
    images = check_images(images)
    batch, height, width, _ = images.shape
    if not isinstance(size, Integral) or not 1 <= size < _MOST_PIXELS:
        raise ValueError(f"size must be a whole number, at least 1, got {size}; below 2**30")
    keys = jax.random.split(key)
    cut = _box(keys, (height, width), jnp.full((2, batch), size))
    return jnp.where(cut[..., None], check_fill(fill, images), images)


def _box(keys: Array, size: tuple[int, int], sides: Array) -> Array:
    """True [B, H, W] in boxes of sides (height, width) [2, B] about a random pixel."""
    inside = []
    for key, pixels, side in zip(keys, size, sides, strict=True):
        first = jax.random.randint(key, side.shape, 0, pixels) - side // 2
        index = jnp.arange(pixels)[None] - first[:, None]
        inside.append((index >= 0) & (index < side[:, None]))
    return inside[0][:, :, None] & inside[1][:, None, :]


def mixup(
    key: Array,
    images: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: float = 1.0,
    num_classes: int | None = None,
) -> tuple[Array, Array]:
    """Weighted means of each image with another one of the batch, and of their labels.

    Source: Zhang et al., mixup: beyond empirical risk minimization, 2018,
    https://arxiv.org/abs/1710.09412, and its authors' code, which draws one weight for a batch;
    here every image has its own, as in torchvision's references for its classification.

    Args:
      key: a jax.random.key.
      images: [B, H, W, C], uint8 or float32.
      labels: [B] integers in [0, m), which is not checked, or [B, m] probabilities.
      alpha: above 0; the first image's weight is from Beta(alpha, alpha).
      num_classes: m, needed for integers.

    Returns:
      images [B, H, W, C] in their dtype, and labels [B, m] float32.

    Raises:
      ValueError: on other images, labels or alpha, or no num_classes for integers.
    """
    images = check_images(images)
    labels = _probabilities(labels, images.shape[0], num_classes)
    weight_key, partner_key = jax.random.split(key)
    weight = _mixing_weight(weight_key, images.shape[0], alpha)
    partner = jax.random.permutation(partner_key, images.shape[0])
    pixels = images.astype(jnp.float32)
    share = weight[:, None, None, None]
    mixed = share * pixels + (1 - share) * _permuted(pixels, partner)
    return in_dtype(mixed, images.dtype), _mix(labels, partner, weight)


def cutmix(
    key: Array,
    images: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: float = 1.0,
    num_classes: int | None = None,
) -> tuple[Array, Array]:
    """A box of each image replaced by that of another; labels weighted by area.

    Source: Yun et al., CutMix: regularization strategy to train strong classifiers with
    localizable features, 2019, https://arxiv.org/abs/1905.04899, and its authors' code, which
    draws one box for a batch; here every image has its own.

    Args:
      key: a jax.random.key.
      images: [B, H, W, C], uint8 or float32.
      labels: [B] integers in [0, m), which is not checked, or [B, m] probabilities.
      alpha: above 0; the box covers a share from Beta(alpha, alpha) where it is in the frame.
      num_classes: m, needed for integers.

    Returns:
      images [B, H, W, C] in their dtype, and labels [B, m] float32.

    Raises:
      ValueError: on other images, labels or alpha, or no num_classes for integers.
    """
    images = check_images(images)
    labels = _probabilities(labels, images.shape[0], num_classes)
    weight_key, partner_key, *box_keys = jax.random.split(key, 4)
    height, width = images.shape[1:3]
    side = jnp.sqrt(1 - _mixing_weight(weight_key, images.shape[0], alpha))
    sides = jnp.stack([height * side, width * side]).astype(jnp.int32)
    box = _box(jnp.stack(box_keys), (height, width), sides)
    partner = jax.random.permutation(partner_key, images.shape[0])
    mixed = jnp.where(box[..., None], _permuted(images, partner), images)
    return mixed, _mix(labels, partner, 1 - box.mean((1, 2)))


def _mixing_weight(key: Array, batch: int, alpha: float) -> Array:
    check_number("alpha", alpha, 1e-30, 1e30)  # which float32 can tell from 0 and infinity
    return jax.random.beta(key, alpha, alpha, (batch,), jnp.float32)


def _mix(labels: Array, partner: Array, weight: Array) -> Array:
    return weight[:, None] * labels + (1 - weight[:, None]) * _permuted(labels, partner)


def _permuted(batch: Array, order: Array) -> Array:
    return divided_like(batch, lambda batch, order: batch[order])(batch, order)


def _probabilities(labels: ArrayLike, batch: int, num_classes: int | None) -> Array:
    labels = jnp.asarray(labels)
    if num_classes is not None and not (isinstance(num_classes, Integral) and num_classes > 1):
        raise ValueError(f"num_classes must be a whole number, at least 2, got {num_classes}")
    if labels.shape == (batch,) and jnp.issubdtype(labels.dtype, jnp.integer):
        if num_classes is None:
            raise ValueError("num_classes is needed for integer labels")
        return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    of_all = labels.ndim == 2 and labels.shape[0] == batch and labels.shape[1] > 1
    if not of_all or num_classes not in (None, labels.shape[1]):
        raise ValueError(
            f"labels must be [B] integers or [B, m] with B = {batch} and m = "
            f"{num_classes or '2 or more'}, got {labels.dtype} {labels.shape}"
        )
    return labels.astype(jnp.float32)


def rand_augment(
    key: Array, images: ArrayLike, *, n: int = 2, m: int = 9, fill: ArrayLike = 0
) -> Array:
    """n operations, each drawn from 14, at one magnitude.

    Source: Cubuk et al., RandAugment: practical automated data augmentation with a reduced search
    space, 2020, https://arxiv.org/abs/1909.13719; operations and magnitudes as in torchvision's
    RandAugment.

    Args:
      key: a jax.random.key.
      images: [B, H, W, 1 or 3], uint8 or float32.
      n: how many operations, one after the other.
      m: magnitude, in 0..30.
      fill: grey level outside the image, or one for each channel.

    Returns:
      [B, H, W, C] in the images' dtype.

    Raises:
      ValueError: on other images, n or m.
    """
    images = check_images(images, (1, 3))
    drawn = draw_rand_augment(key, images.shape, n=n, m=m)
    return apply_drawn(images, *drawn, fill=fill)


def draw_rand_augment(
    key: Array, shape: tuple[int, ...], *, n: int = 2, m: int = 9
) -> tuple[Array, Array]:
    """operation, magnitude [n, B] of `rand_augment` for images of that shape, errors as there."""
    if not isinstance(n, Integral) or n < 0:
        raise ValueError(f"n must be a whole number, at least 0, got {n!r}")
    check_number("m", m, 0, _BINS - 1)
    level = jnp.full((n, shape[0]), m / (_BINS - 1))
    return _draw(key, level, _standard_ranges(shape))


def trivial_augment(key: Array, images: ArrayLike, *, fill: ArrayLike = 0) -> Array:
    """One operation, drawn from 14, at a random magnitude of a wide range.

    Source: Müller and Hutter, TrivialAugment: tuning-free yet state-of-the-art data augmentation,
    2021, https://arxiv.org/abs/2103.10158; operations and magnitudes as in torchvision's
    TrivialAugmentWide.

    Args:
      key: a jax.random.key.
      images: [B, H, W, 1 or 3], uint8 or float32.
      fill: grey level outside the image, or one for each channel.

    Returns:
      [B, H, W, C] in the images' dtype.

    Raises:
      ValueError: on other images.
    """
    images = check_images(images, (1, 3))
    return apply_drawn(images, *draw_trivial_augment(key, images.shape), fill=fill)


def draw_trivial_augment(key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """operation and magnitude [1, B] of `trivial_augment` for images of that shape."""
    level_key, key = jax.random.split(key)
    level = jax.random.randint(level_key, (1, shape[0]), 0, _BINS) / (_BINS - 1)
    return _draw(key, level, _wide_ranges())


def auto_augment(key: Array, images: ArrayLike, *, fill: ArrayLike = 0) -> Array:
    """One of the 25 pairs of operations that were found for CIFAR-10.

    Source: Cubuk et al., AutoAugment: learning augmentation strategies from data, 2019,
    https://arxiv.org/abs/1805.09501; policy and magnitudes as in torchvision's
    AutoAugment(AutoAugmentPolicy.CIFAR10).

    Args:
      key: a jax.random.key.
      images: [B, H, W, 1 or 3], uint8 or float32.
      fill: grey level outside the image, or one for each channel.

    Returns:
      [B, H, W, C] in the images' dtype.

    Raises:
      ValueError: on other images.
    """
    images = check_images(images, (1, 3))
    return apply_drawn(images, *draw_auto_augment(key, images.shape), fill=fill)


def draw_auto_augment(key: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """operation and magnitude [2, B] of `auto_augment` for images of that shape."""
    pair_key, used_key, sign_key = jax.random.split(key, 3)
    pair = jax.random.randint(pair_key, shape[:1], 0, len(_CIFAR10_POLICY))
    names, shares, levels = np.transpose(_CIFAR10_POLICY)  # each [2, 25]
    operation = jnp.array(np.vectorize(OPERATIONS.index)(names))[:, pair]
    used = jax.random.uniform(used_key, operation.shape) < jnp.array(shares.astype(float))[:, pair]
    operation = jnp.where(used, operation, OPERATIONS.index("identity"))
    level = jnp.array(levels.astype(float))[:, pair] / 9
    return operation, _magnitude(sign_key, operation, level, _standard_ranges(shape))


def entropy_magnitude(
    key: Array, images: ArrayLike, strength: ArrayLike, *, fill: ArrayLike = 0
) -> Array:
    """One operation, drawn from 14, at each image's own strength.

    Source: Yang, Shen and Zhao, EntAugment: entropy-driven adaptive data augmentation framework
    for image classification, 2024, https://arxiv.org/abs/2409.06290. The ranges are those of
    `rand_augment`, with both signs, so that strength 0 changes nothing but what has no magnitude;
    the authors' code rounds the strength up to one of 30, shifts by at most 10 pixels, and runs
    the factors of colour, contrast, brightness and sharpness from 0.1 to 1.9.

    Args:
      key: a jax.random.key.
      images: [B, H, W, 1 or 3], uint8 or float32.
      strength: [B] in [0, 1]; see `entropy_strength`.
      fill: grey level outside the image, or one for each channel.

    Returns:
      [B, H, W, C] in the images' dtype.

    Raises:
      ValueError: on other images or shapes.
    """
    images = check_images(images, (1, 3))
    strength = jnp.asarray(strength)
    if strength.shape != images.shape[:1]:
        raise ValueError(f"strength must be [B] with B = {images.shape[0]}, got {strength.shape}")
    level = jnp.clip(strength, 0, 1)
    drawn = divided_like(level, _draw)(key, level, _standard_ranges(images.shape))
    return apply_drawn(images, *drawn, fill=fill)


def entropy_strength(logits: ArrayLike) -> Array:
    """1 - H / log2 m of softmax(logits) [..., m]: [...], 1 where the classifier is certain."""
    logits = jnp.asarray(logits)
    return jax.lax.stop_gradient(1 - uncertainty(logits))


def _standard_ranges(shape: tuple[int, ...]) -> np.ndarray:
    """Of torchvision's AutoAugment and RandAugment."""
    height, width = shape[1:3]
    return _ranges(0.3, 150 / 331 * width, 150 / 331 * height, 30.0, 0.9, 4)


def _wide_ranges() -> np.ndarray:
    """Of torchvision's TrivialAugmentWide."""
    return _ranges(0.99, 32.0, 32.0, 135.0, 0.99, 2)


def _ranges(
    shear: float, shift_x: float, shift_y: float, degrees: float, enhancement: float, bits: int
) -> np.ndarray:
    """Magnitudes [operations, 2] at levels 0 and 1."""
    ends = dict.fromkeys(("brightness", "color", "contrast", "sharpness"), (0.0, enhancement))
    ends |= {"shear_x": (0.0, shear), "shear_y": (0.0, shear), "rotate": (0.0, degrees)}
    ends |= {"translate_x": (0.0, shift_x), "translate_y": (0.0, shift_y)}
    ends |= {"posterize": (8, bits), "solarize": (255.0, 0.0)}
    return np.array([ends.get(name, (0.0, 0.0)) for name in OPERATIONS], np.float32)


def _draw(key: Array, level: Array, ranges: np.ndarray) -> tuple[Array, Array]:
    """operation, uniform, and magnitude of level's shape."""
    operation_key, sign_key = jax.random.split(key)
    operation = jax.random.randint(operation_key, level.shape, 0, _DRAWN)
    return operation, _magnitude(sign_key, operation, level, ranges)


def _magnitude(key: Array, operation: Array, level: Array, ranges: np.ndarray) -> Array:
    """Of a random sign where the operation has one, at level in 0..1; all of one shape."""
    start, end = jnp.moveaxis(jnp.asarray(ranges)[operation], -1, 0)
    magnitude = start + level * (end - start)
    signed = jnp.array([name in _SIGNED for name in OPERATIONS])[operation]
    negative = signed & jax.random.bernoulli(key, shape=level.shape)
    bits = operation == OPERATIONS.index("posterize")
    magnitude = jnp.where(bits, jnp.round(magnitude), magnitude)
    return jnp.where(negative, -magnitude, magnitude)
