"""What the augmenter does, in numbers and in words: per image, and whether it has collapsed.

Everything here speaks of the *picture*: "turned left" means that a person sees the picture turned
to the left. theta itself maps output to input coordinates, the inverse of that.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from maxent_aug.checks import broadcasts, check_size
from maxent_aug.losses import entropy
from maxent_aug.spatial import AffineBounds, affine_grid, decompose_affine, invert_affine

# Nobody sees less than this; used for the word "unchanged".
VISIBLE_PX = 0.05

# A theta whose inverse float32 cannot tell from a singular matrix is reported as this enlargement.
MOST_SCALE = 1e3
MOST_CONDITION = 1e5


# Of `AffineBounds`, and of `ColorBounds`, in words.
COORDINATES = (
    ("tx", "shift to the side"),
    ("ty", "shift up or down"),
    ("rotation", "rotation"),
    ("log_scale", "scale"),
    ("log_aspect", "aspect"),
    ("shear", "shear"),
    ("brightness", "brightness"),
    ("log_contrast", "contrast"),
    ("log_saturation", "saturation"),
    ("hue", "hue"),
)


@broadcasts
def picture_transform(theta: Array, size: tuple[int, int]) -> dict[str, Array]:
    """What a person sees done to the picture, in human units.

    The parts apply in the order flip, scale and aspect, shear, rotation, shift, about the middle
    of the frame, and are measured in pixels, so that they are right for oblong images as well.

    Args:
      theta: [..., 2, 3], output -> input, normalised (x, y).
      size: (height, width) of the image in pixels.

    Returns:
      A dict of [...] arrays:
        rotation_deg: in (-180, 180], counter-clockwise ("to the left") positive;
        scale: above 1 when the picture is enlarged;
        aspect: above 1 when it is stretched in width, below 1 in height;
        shear: horizontal shift for each pixel further down, before the rotation;
        shift_x_px, shift_y_px: where the middle of the picture goes, right and *down* positive;
        flip: boolean, mirrored left to right.
      Finite for every finite theta: one that maps the frame to a line or a point counts as an
      enlargement by 1000.

    Raises:
      ValueError: if theta does not end in (2, 3) or size is not two positive integers.
    """
    parts = decompose_affine(_picture_affine(theta, size))
    shift = parts["translation"]
    degrees = -jnp.rad2deg(parts["rotation"])  # y points down: a positive angle is clockwise
    return {
        "rotation_deg": jnp.where(degrees <= -180, 180.0, degrees),
        "scale": jnp.exp(parts["log_scale"]),
        "aspect": jnp.exp(parts["log_aspect"]),
        "shear": parts["shear"],
        "shift_x_px": shift[..., 0],
        "shift_y_px": shift[..., 1],
        "flip": parts["flip"],
    }


@broadcasts
def displacement_px(theta: Array, size: tuple[int, int]) -> Array:
    """How far the point of the picture that moves most moves: [..., 2, 3] -> [...] pixels."""
    affine = _picture_affine(theta, size)
    height, width = size
    x, y = jnp.array([-1.0, 1.0, -1.0, 1.0]) * width / 2, jnp.array([-1, -1, 1, 1]) * height / 2
    a = affine[..., None]
    # The displacement is affine in the position, so its length is largest at a corner.
    dx = (a[..., 0, 0, :] - 1) * x + a[..., 0, 1, :] * y + a[..., 0, 2, :]
    dy = a[..., 1, 0, :] * x + (a[..., 1, 1, :] - 1) * y + a[..., 1, 2, :]
    return jnp.max(jnp.hypot(dx, dy), axis=-1)


def describe(theta: Array, size: tuple[int, int], color: ArrayLike | None = None) -> list[str]:
    """The transform of each image in words, e.g. "turned 12° left, 1.20x, 3.1 px right 0.4 px up".

    Args:
      theta: [N, 2, 3], output -> input.
      size: (height, width) in pixels.
      color: [N, 4] of `adjust_color` on normalised images, if colours were changed: words such as
        "0.3 sd darker, 1.20x contrast, 0.85x saturation, hue +12°" follow.

    Returns:
      N descriptions of what is seen done to the picture; "unchanged" where no point moves by
      0.05 px or more and no colour changes by what is said; "not finite" of what is not.

    Raises:
      ValueError: if theta is not [N, 2, 3], or color not [N, 4].
    """
    if np.ndim(theta) != 3:
        raise ValueError(f"theta has shape {np.shape(theta)}; describe takes [N, 2, 3]")
    parts, moved = jax.device_get(_seen(jnp.asarray(theta), check_size(size)))
    said = [_words({k: v[i] for k, v in parts.items()}, moved[i]) for i in range(len(moved))]
    if color is not None:
        if np.shape(color) != (len(said), 4):
            raise ValueError(f"color has shape {np.shape(color)}; here it must be [{len(said)}, 4]")
        for words, each in zip(said, np.asarray(color, np.float64), strict=True):
            words += _color_words(*each) if np.isfinite(each).all() else ["colours not finite"]
    return [", ".join(filter(None, words)) or "unchanged" for words in said]


@partial(jax.jit, static_argnums=1)
@broadcasts
def per_image(
    theta: Array, size: tuple[int, int], logits_before: Array, logits_after: Array
) -> dict[str, Array]:
    """The diagnostics of each image, for `summarise`; those of several calls can be concatenated.

    Args:
      theta: [B, 2, 3], output -> input.
      size: (height, width) in pixels.
      logits_before: [B, m] of the classifier on the images.
      logits_after: [B, m] of the classifier on the augmented images.

    Returns:
      The [B] arrays of `picture_transform`, and
        theta: [B, 2, 3], as given;
        distance_from_identity: ||theta - identity||_F;
        shift_px: length of the shift;
        entropy_before, entropy_after: bits;
        outside_frame: share of the sampling grid outside the image, in [0, 1].

    Raises:
      ValueError: on other shapes, or different numbers of images.
    """
    counts = [each.shape[0] for each in (theta, logits_before, logits_after)]
    if len(set(counts)) > 1:
        raise ValueError(f"theta and logits must be of the same images, got {counts} of them")
    picture = picture_transform(theta, size)

    def outside_frame(theta: Array) -> Array:
        outside = jnp.any(jnp.abs(affine_grid(theta, size)) > 1, axis=-1)
        return jnp.mean(outside, axis=(-2, -1))

    return {
        "theta": theta,
        "distance_from_identity": jnp.linalg.norm(theta - jnp.eye(2, 3), axis=(-2, -1)),
        **picture,
        "shift_px": jnp.hypot(picture["shift_x_px"], picture["shift_y_px"]),
        "entropy_before": entropy(logits_before),
        "entropy_after": entropy(logits_after),
        # A grid is as large as the image: not those of all test images at once.
        "outside_frame": jax.lax.map(outside_frame, theta, batch_size=256),
    }


@jax.jit
@broadcasts
def summarise(images: dict[str, Any]) -> dict[str, Array]:
    """Means and deviations over images of what `per_image` returned: has the augmenter collapsed?

    Collapse to the identity shows as distance_from_identity near 0, collapse to one transform
    for all as a spread that is small beside that distance.

    Args:
      images: the dict of `per_image`, of any number of images, on the device or on the host.

    Returns:
      Scalars: distance_from_identity, rotation_deg (circular mean), rotation_deg_sd (of the
      angle to that mean), scale, scale_sd, shear, shear_sd, shift_px, shift_px_sd, spread (root
      mean square of ||theta - mean theta||_F), entropy_before, entropy_after, outside_frame.
      Deviations are over images (population), and 0 for a single one; all are NaN for none.
    """
    theta = jnp.asarray(images["theta"])
    mean = partial(jnp.mean, axis=0)

    def sd(deviation: Array) -> Array:
        return jnp.sqrt(mean(jnp.square(deviation)))

    angle = jnp.deg2rad(jnp.asarray(images["rotation_deg"]))
    direction = jnp.arctan2(mean(jnp.sin(angle)), mean(jnp.cos(angle)))
    away = angle - direction
    summary = {
        "distance_from_identity": mean(images["distance_from_identity"]),
        "rotation_deg": jnp.rad2deg(direction),
        "rotation_deg_sd": jnp.rad2deg(sd(jnp.arctan2(jnp.sin(away), jnp.cos(away)))),
    }
    for name in ("scale", "shear", "shift_px"):
        summary[name] = mean(images[name])
        summary[f"{name}_sd"] = sd(jnp.asarray(images[name]) - summary[name])
    summary["spread"] = sd(jnp.linalg.norm(theta - mean(theta), axis=(-2, -1)))
    for name in ("entropy_before", "entropy_after", "outside_frame"):
        summary[name] = mean(images[name])
    return summary


@jax.jit
@broadcasts
def boxes(half_width: Array) -> dict[str, Array]:
    """What a `StochasticAugmenter` has learned, over images: has it collapsed?

    A half-width near 0 is a constant transform, one near 1 the bound; a spread of 0 means that all
    images have the same box.

    Args:
      half_width: [N, 6], or with colours [N, 10], shares of the bounds.

    Returns:
      Scalars: half_width_NAME for each coordinate of `AffineBounds` and `ColorBounds`, a mean, and
      spread_between: root mean square, over images and coordinates, of the distance to these means.

    Raises:
      ValueError: on another shape.
    """
    half_width = jnp.asarray(half_width)
    affine, with_color = len(AffineBounds._fields), len(COORDINATES)
    if half_width.ndim != 2 or half_width.shape[1] not in (affine, with_color):
        raise ValueError(
            f"half_width must be [N, {affine}] or [N, {with_color}], got {half_width.shape}"
        )
    means = half_width.mean(0)
    names = [name for name, _ in COORDINATES][: len(means)]
    found = {f"half_width_{name}": mean for name, mean in zip(names, means, strict=True)}
    return found | {"spread_between": jnp.sqrt(jnp.mean(jnp.square(half_width - means)))}


@partial(jax.jit, static_argnames="size")
@broadcasts
def draws(
    theta: Array, theta_again: Array, size: tuple[int, int] | None = None
) -> dict[str, Array]:
    """How two draws of an augmenter for the same images differ: what is noise, what is the image.

    Args:
      theta, theta_again: [N, 2, 3]; equal ones of an augmenter that draws nothing.
      size: (height, width) in pixels; by default of square images.

    Returns:
      Scalars: spread_of_draws, the deviation of theta for one image (root mean square of
      ||theta - its mean||_F); spread_of_images, that of the images' means; beyond_bounds, the
      share of coordinates whose size is above 0.95 of `AffineBounds`.
    """
    within = jnp.mean(jnp.square(theta - theta_again).sum((-2, -1))) / 2
    both = jnp.stack([theta, theta_again])
    total = jnp.mean(jnp.square(both - both.mean((0, 1))).sum((-2, -1)))
    parts = decompose_affine(both, size=size)
    names = ("rotation", "log_scale", "log_aspect", "shear")
    coordinates = [parts["translation"], *(parts[name][..., None] for name in names)]
    shares = jnp.abs(jnp.concatenate(coordinates, axis=-1)) / jnp.array(AffineBounds())
    return {
        "spread_of_draws": jnp.sqrt(within),
        "spread_of_images": jnp.sqrt(jnp.maximum(total - within, 0.0)),
        "beyond_bounds": jnp.mean(shares > 0.95),
    }


def collapse(
    theta: Array, size: tuple[int, int], logits_before: Array, logits_after: Array
) -> dict[str, Array]:
    """`summarise(per_image(...))`: whether the augmenter has collapsed, a flat dict of scalars."""
    theta, *logits = map(jnp.asarray, (theta, logits_before, logits_after))
    return summarise(per_image(theta, check_size(size), *logits))


def _picture_affine(theta: Array, size: tuple[int, int]) -> Array:
    """The input -> output affine in pixels from the middle of the frame; finite if theta is."""
    theta = jnp.asarray(theta, jnp.float32)
    if theta.shape[-2:] != (2, 3):
        raise ValueError(f"theta has shape {theta.shape}; it must end in (2, 3)")
    size = check_size(size)
    half = jnp.array([size[1], size[0]], jnp.float32) / 2
    # One unit of x is half a width, one of y half a height: D theta D^-1, shift times D.
    pixels = half[:, None] / jnp.append(half, 1.0)
    theta = jnp.where(jnp.isfinite(theta), jnp.clip(theta * pixels, -1e6, 1e6), jnp.nan)
    linear = theta[..., :2]
    det = linear[..., 0, 0] * linear[..., 1, 1] - linear[..., 0, 1] * linear[..., 1, 0]
    squares = jnp.sum(jnp.square(linear), axis=(-2, -1))
    # Written so that a NaN stays one, as infinity became: a broken run is no enlargement.
    singular = (jnp.abs(det) < squares / MOST_CONDITION) | (jnp.abs(det) < MOST_SCALE**-2)
    point = jnp.concatenate([jnp.eye(2) / MOST_SCALE, jnp.zeros((2, 1))], axis=-1)
    return invert_affine(jnp.where(singular[..., None, None], point, theta))


@partial(jax.jit, static_argnums=1)
def _seen(theta: Array, size: tuple[int, int]) -> tuple[dict[str, Array], Array]:
    return picture_transform(theta, size), displacement_px(theta, size)


def _words(part: dict[str, Any], furthest: float) -> list[str]:
    if not np.isfinite(furthest):
        return ["not finite"]
    if furthest < VISIBLE_PX:
        return []
    turned, sheared = _number(abs(part["rotation_deg"])), f"{part['shear']:.2f}"
    scale, aspect = _factor(part["scale"]), _factor(max(part["aspect"], 1 / part["aspect"]))
    shift = [
        f"{_number(abs(pixels))} px {positive if pixels > 0 else negative}"
        for pixels, positive, negative in (
            (part["shift_x_px"], "right", "left"),
            (part["shift_y_px"], "down", "up"),
        )
        if _number(abs(pixels)) != "0.0"
    ]
    said = [
        "mirrored" if part["flip"] else "",
        f"turned {turned}° {'left' if part['rotation_deg'] > 0 else 'right'}"
        if turned != "0.0"
        else "",
        f"{scale}x" if scale != "1.00" else "",
        f"{aspect}x {'wider' if part['aspect'] > 1 else 'taller'}" if aspect != "1.00" else "",
        f"shear {_signed(sheared)}" if float(sheared) else "",
        " ".join(shift),
    ]
    return said if any(said) else [f"moved {furthest:.2f} px"]


def _color_words(
    brightness: float, log_contrast: float, log_saturation: float, hue: float
) -> list[str]:
    brighter, turned = _number(abs(brightness)), f"{np.rad2deg(hue):+.0f}"
    contrast, saturation = _factor(np.exp(log_contrast)), _factor(np.exp(log_saturation))
    return [
        f"{brighter} sd {'brighter' if brightness > 0 else 'darker'}" if brighter != "0.0" else "",
        f"{contrast}x contrast" if contrast != "1.00" else "",
        f"{saturation}x saturation" if saturation != "1.00" else "",
        f"hue {_signed(turned)}°" if turned not in ("+0", "-0") else "",
    ]


def _signed(number: str) -> str:
    return number.replace("-", "−")


def _number(value: float) -> str:
    """One decimal where it matters: 3.1, 12."""
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _factor(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
