"""The operations that RandAugment and its relatives draw, each image with its own, as in Pillow.

Images are [B, H, W, 1 or 3] of 256 grey levels. An image draws one operation, so that the geometric
ones are one affine map and one gather for all images, and those that change a level regardless of
its place one look-up table an image and channel; what remains is computed, on a CPU, only of the
images that drew it.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from maxent_aug.checks import is_known
from maxent_aug.spatial import divided_like, take_pixels

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color",
    "contrast", "sharpness", "posterize", "solarize", "autocontrast", "equalize", "invert",
)  # fmt: skip

_MOST_SIDE = 2**15 - 1  # positions are Pillow's, of 16 bits and 16 after the point
# Of so many images as there are in a batch / _GROUPS at a time the slow operations are computed on
# a CPU: few, as each loop is for 2 or 3 of the 14 operations that are drawn.
_GROUPS = 16


def apply_operations(
    images: ArrayLike, operation: ArrayLike, magnitude: ArrayLike, *, fill: ArrayLike = 0
) -> Array:
    """One operation on each image, or several in turn, as in Pillow with torchvision's magnitudes.

    - shear_x, shear_y: pixels for each pixel, about the upper left corner;
    - translate_x, translate_y: pixels, cut to whole ones, right and down positive;
    - rotate: degrees, counter-clockwise, about the middle;
    - brightness, color, contrast, sharpness: the factor of Pillow's ImageEnhance, less 1;
    - posterize: bits to keep, 1..8, cut to these;
    - solarize: the first level that is inverted;
    - identity, autocontrast, equalize, invert: none.

    Geometric ones take the nearest pixel. One channel has no colour that could change.

    Args:
      images: [B, H, W, 1 or 3], uint8, or float32 in 0..255, rounded to whole levels first.
      operation: [B], indices of `OPERATIONS`, or [n, B]; others leave an image as it is.
      magnitude: [B] or [n, B], finite; geometric ones move no pixel by 32,768 or more.
      fill: level outside the image, or one for each channel.

    Returns:
      [B, H, W, C] in the images' dtype, whole levels. A level may differ by one from Pillow's where
      that cuts what rounding alone keeps from being the next level.

    Raises:
      ValueError: on other shapes or dtypes, and, where it is called with numbers and not traced,
        on images that are plainly of 0..1 or normalised, or on another operation or magnitude.
    """
    operation, magnitude = jnp.asarray(operation), jnp.asarray(magnitude, jnp.float32)
    if is_known(operation):
        for index in np.unique(jax.device_get(operation)):
            if not 0 <= index < len(OPERATIONS):
                raise ValueError(f"operation must be in 0..{len(OPERATIONS) - 1}, got {index}")
    if is_known(magnitude) and not np.isfinite(jax.device_get(magnitude)).all():
        raise ValueError("magnitude must be finite")
    return apply_drawn(images, operation, magnitude, fill=fill)


def apply_drawn(
    images: ArrayLike, operation: Array, magnitude: Array, *, fill: ArrayLike = 0
) -> Array:
    """`apply_operations` of what was drawn, whose numbers no device is asked for."""
    images = check_images(images, (1, 3))
    shape, last = operation.shape, images.shape[0]
    if not jnp.issubdtype(operation.dtype, jnp.integer):
        raise ValueError(f"operation must be integers, got {operation.dtype}")
    if max(images.shape[1:3]) > _MOST_SIDE:
        raise ValueError(f"images must be at most {_MOST_SIDE} a side, got {images.shape}")
    if shape != magnitude.shape or shape not in ((last,), (*shape[:1], last)):
        raise ValueError(
            f"operation and magnitude must be [B] or [n, B] with B = {last}, "
            f"got {shape} and {magnitude.shape}"
        )
    check_range(images)
    levels = in_dtype(images, jnp.dtype(jnp.uint8))
    operation, magnitude = operation.reshape(-1, last), magnitude.reshape(-1, last)
    levels = divided_like(levels, _apply_in_turn)(
        levels, operation, magnitude, check_fill(fill, levels)
    )
    return levels.astype(images.dtype)


@jax.jit
def _apply_in_turn(levels: Array, operation: Array, magnitude: Array, fill: Array) -> Array:
    def step(levels: Array, drawn: tuple[Array, Array]) -> tuple[Array, None]:
        return _apply(levels, *drawn, fill), None

    return jax.lax.scan(step, levels, (operation, magnitude))[0]


def _apply(levels: Array, operation: Array, magnitude: Array, fill: Array) -> Array:
    rows = levels, operation, magnitude
    table = jnp.repeat(_tables(operation, magnitude)[:, None], levels.shape[-1], axis=1)
    measured = _drew(operation, "contrast", "autocontrast", "equalize")
    table = _where_drawn(measured, _measured_tables, rows, table)
    blended = _drew(operation, "color", "sharpness")
    levels = _where_drawn(blended, _blend, rows, levels)
    return _look_up(table, _geometric(levels, operation, magnitude, fill))


def pixels_at(images: Array, row: Array, column: Array, fill: ArrayLike) -> Array:
    """Pixels at row and column, which broadcast to [B, H, W]; `fill` outside the image."""
    batch, height, width, channels = images.shape
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    row, column = jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1)
    found = divided_like(images, take_pixels)(
        images.reshape(batch, -1, channels), row * width + column
    )
    return jnp.where(inside[..., None], found, check_fill(fill, images))


def check_images(images: ArrayLike, channels: tuple[int, ...] | None = None) -> Array:
    """An array; a ValueError if it is not [B, H, W, C], uint8 or float32, of so many channels."""
    images = jnp.asarray(images)
    if images.ndim != 4 or images.dtype not in (jnp.uint8, jnp.float32) or 0 in images.shape:
        raise ValueError(
            "images must be [B, H, W, C] with none of these 0, uint8 or float32, got "
            f"{images.dtype} {images.shape}"
        )
    if channels and images.shape[-1] not in channels:
        allowed = " or ".join(map(str, channels))
        raise ValueError(f"images must have {allowed} channels, got {images.shape[-1]}")
    return images


def check_range(images: Array, *, rounded: bool = True) -> None:
    """ValueError for float images that are known, not traced, and plainly not of 0..255.

    Clipping spoils normalised ones, rounding, too, those of 0..1.
    """
    if not (is_known(images) and images.size and jnp.issubdtype(images.dtype, jnp.floating)):
        return
    low, high, whole = jax.device_get(_range(images))
    if (low < 0 and high <= 16) or (rounded and high <= 1 and not whole):
        raise ValueError(f"images must be of 0..255, got {low:.3g} to {high:.3g}")


@jax.jit
def _range(images: Array) -> tuple[Array, Array, Array]:
    """Least and largest finite value; whether all of these are whole."""
    finite = jnp.isfinite(images)
    whole = jnp.all((images == jnp.round(images)) | ~finite)
    low = images.min(where=finite, initial=jnp.inf)
    return low, images.max(where=finite, initial=-jnp.inf), whole


def check_fill(fill: ArrayLike, images: Array) -> Array:
    """In the images' dtype and range; a ValueError unless a number or one for each channel."""
    fill = jnp.asarray(fill)
    if fill.shape not in ((), images.shape[-1:]):
        raise ValueError(f"fill must be a number or [{images.shape[-1]}], got shape {fill.shape}")
    return in_dtype(fill, images.dtype)


def in_dtype(images: Array, dtype: jnp.dtype) -> Array:
    """The images in dtype, rounded to whole levels if that is uint8 and theirs is not."""
    if images.dtype != dtype == jnp.uint8:
        images = jnp.clip(jnp.round(images), 0, 255)
    return images.astype(dtype)


def _drew(operation: Array, *names: str) -> Array:
    return jnp.isin(operation, jnp.array([OPERATIONS.index(name) for name in names]))


def _where_drawn(
    drew: Array, function: Callable[..., Array], rows: tuple[Array, ...], otherwise: Array
) -> Array:
    """function(*rows) [B, ...] where drew [B]."""
    # An accelerator computes all rows in less time than it takes to ask it how many were drawn.
    return jax.lax.platform_dependent(
        drew,
        rows,
        otherwise,
        cpu=partial(_of_drawn_rows, function),
        default=partial(_of_all_rows, function),
    )


def _of_drawn_rows(
    function: Callable[..., Array], drew: Array, rows: tuple[Array, ...], otherwise: Array
) -> Array:
    """`_where_drawn`, computed of hardly more rows than needed, in a loop over groups of them."""
    batch = drew.shape[0]
    group = -(-batch // _GROUPS)
    drawn = jnp.nonzero(drew, size=_GROUPS * group, fill_value=batch)[0]
    # In `jax.shard_map` what a loop changes must vary over devices from the start, as images do.
    otherwise += (0 * rows[0].ravel()[0]).astype(otherwise.dtype)

    def body(step: Array, out: Array) -> Array:
        index = jax.lax.dynamic_slice_in_dim(drawn, step * group, group)
        found = function(*(row.at[index].get(mode="clip") for row in rows))
        return out.at[index].set(found, mode="drop")

    return jax.lax.fori_loop(0, -(-drew.sum() // group), body, otherwise)


def _of_all_rows(
    function: Callable[..., Array], drew: Array, rows: tuple[Array, ...], otherwise: Array
) -> Array:
    """`_where_drawn`, computed of all rows."""
    drew = drew.reshape(-1, *[1] * (otherwise.ndim - 1))
    return jnp.where(drew, function(*rows), otherwise)


def _geometric(images: Array, operation: Array, magnitude: Array, fill: ArrayLike) -> Array:
    """Shears, translations and rotations, in Pillow's 16.16 fixed point."""
    height, width = images.shape[1:3]
    angle, shift_x, shift_y, shear_x, shear_y = (
        jnp.where(_drew(operation, name), magnitude, 0.0)
        for name in ("rotate", "translate_x", "translate_y", "shear_x", "shear_y")
    )
    cos, sin = jnp.cos(jnp.deg2rad(angle)), jnp.sin(jnp.deg2rad(angle))
    x0 = (1 - cos) * width / 2 + sin * height / 2 - jnp.trunc(shift_x)
    y0 = (1 - cos) * height / 2 - sin * width / 2 - jnp.trunc(shift_y)

    y, x = jnp.arange(height)[None, :, None], jnp.arange(width)[None, None, :]

    def index(along_x: Array, along_y: Array, start: Array) -> Array:
        start += along_x / 2 + along_y / 2  # the middle of the first pixel
        along_x, along_y, start = (
            jnp.floor(v * 65536 + 0.5).astype(jnp.int32)[:, None, None]
            for v in (along_x, along_y, start)
        )
        return (along_x * x + along_y * y + start) >> 16

    row, column = index(sin + shear_y, cos, y0), index(cos, shear_x - sin, x0)
    return pixels_at(images, row, column, fill)


def _tables(operation: Array, magnitude: Array) -> Array:
    """[B, 256]: the level that each level becomes, where that depends on nothing else."""
    drew = {name: _drew(operation, name)[:, None] for name in OPERATIONS}
    magnitude, level = magnitude[:, None], jnp.arange(256)[None]
    table = _enhance(level, 0, 1 + jnp.where(drew["brightness"], magnitude, 0.0))
    kept = 0xFF00 >> jnp.clip(magnitude.astype(jnp.int32), 1, 8)
    table &= jnp.where(drew["posterize"], kept, 255).astype(jnp.uint8)
    inverted = drew["invert"] | (drew["solarize"] & (level.astype(magnitude.dtype) >= magnitude))
    return jnp.where(inverted, 255 - table, table)


def _measured_tables(images: Array, operation: Array, magnitude: Array) -> Array:
    """[B, C, 256] of contrast, autocontrast and equalize, which depend on the image."""
    batch, height, width, channels = images.shape
    mean = (_grey(images).sum((1, 2))[:, None] + height * width // 2) // (height * width)
    contrast = _enhance(jnp.arange(256)[None, None], mean, 1 + magnitude[:, None, None])

    def count(levels: Array) -> Array:
        return jnp.zeros(256, jnp.int32).at[levels].add(1)

    histogram = jax.vmap(jax.vmap(count, -1))(images.reshape(batch, -1, channels))
    drew = (_drew(operation, name)[:, None, None] for name in ("contrast", "autocontrast"))
    return jnp.select([*drew], [contrast, _stretched(histogram)], _equalized(histogram))


def _stretched(histogram: Array) -> Array:
    """Pillow's autocontrast, from and to [B, C, 256]."""
    seen, level = histogram > 0, jnp.arange(256)[None, None]
    low = jnp.argmax(seen, axis=-1, keepdims=True)
    high = 255 - jnp.argmax(seen[..., ::-1], axis=-1, keepdims=True)
    # Cut to whole levels; 1e-3 is less than the least step, 1 / 255, and more than the error.
    slope = 255 / jnp.maximum(high - low, 1)
    stretched = jnp.clip((level - low).astype(slope.dtype) * slope + 1e-3, 0, 255)
    return jnp.where(high > low, stretched.astype(jnp.uint8), level.astype(jnp.uint8))


def _equalized(histogram: Array) -> Array:
    """Pillow's equalize, from and to [B, C, 256]."""
    below = jnp.cumsum(histogram, axis=-1) - histogram
    step = jnp.where(histogram > 0, below, 0).max(-1, keepdims=True) // 255
    table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, table, jnp.arange(256)[None, None]).astype(jnp.uint8)


def _look_up(table: Array, images: Array) -> Array:
    """table [B, C, 256] at the levels of images [B, H, W, C]."""
    batch, _, _, channels = images.shape
    # One table an image: one a channel is slow.
    first = jnp.arange(0, 256 * channels, 256)
    index = first[None, None, None] + images.astype(jnp.int32)
    found = take_pixels(table.reshape(batch, -1, 1), index.reshape(batch, -1, channels))
    return found.reshape(images.shape)


def _blend(images: Array, operation: Array, magnitude: Array) -> Array:
    """Color or sharpness: away from the grey or the smoothed image, or towards it."""
    color, magnitude = (v[:, None, None, None] for v in (_drew(operation, "color"), magnitude))
    return _enhance(images, jnp.where(color, _grey(images), _smooth(images)), 1 + magnitude)


def _enhance(levels: Array, degenerate: ArrayLike, factor: Array) -> Array:
    """Pillow's Image.blend: cut to whole levels, after rounding to float32 as there."""
    degenerate = jnp.asarray(degenerate, jnp.int32)
    away = (levels.astype(jnp.int32) - degenerate).astype(factor.dtype)
    enhanced = degenerate.astype(factor.dtype) + factor * away
    return jnp.clip(enhanced, 0, 255).astype(jnp.uint8)


def _grey(images: Array) -> Array:
    """Pillow's convert("L"), [B, H, W, 1] int32."""
    images = images.astype(jnp.int32)
    if images.shape[-1] == 1:
        return images
    red, green, blue = jnp.split(images, 3, axis=-1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _smooth(images: Array) -> Array:
    """Pillow's ImageFilter.SMOOTH, int32; it leaves the outermost pixels as they are."""
    images = images.astype(jnp.int32)
    if min(images.shape[1:3]) < 3:
        return images
    rows = images[:, :-2] + images[:, 1:-1] + images[:, 2:]
    window = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = (window + 4 * images[:, 1:-1, 1:-1] + 6) // 13  # to the nearest: 13 is odd
    return images.at[:, 1:-1, 1:-1].set(inner)
