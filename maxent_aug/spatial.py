"""Affine maps and differentiable image sampling, in PyTorch's conventions.

theta [..., 2, 3] maps output to input positions in normalised (x, y), both in [-1, 1] over the
image, y down (Jaderberg et al. 2015, https://arxiv.org/abs/1506.02025).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

_MODES = ("bilinear", "nearest")
_PADDING_MODES = ("zeros", "border", "reflection")


def affine_matrix(
    *,
    rotation: ArrayLike = 0.0,
    log_scale: ArrayLike = 0.0,
    log_aspect: ArrayLike = 0.0,
    shear: ArrayLike = 0.0,
    translation: ArrayLike = 0.0,
    flip: ArrayLike = False,
) -> jax.Array:
    """theta = [R @ Shear @ diag(sx, sy) @ Flip | translation].

    R = [[cos, -sin], [sin, cos]] of rotation, Shear = [[1, shear], [0, 1]], Flip = diag(-1, 1) or I,
    sx = exp(log_scale + log_aspect / 2), sy = exp(log_scale - log_aspect / 2). These are the parts
    of theta, which maps output to input; what is seen done to the picture is the inverse,
    `decompose_affine(invert_affine(theta))`. y points down: a positive rotation of the picture is
    clockwise.

    Args:
      rotation, log_scale, log_aspect, shear: [...], radians and natural logarithms; broadcast.
      translation: a scalar for both axes or [..., 2] as (x, y); 2 is the full width of the image.
      flip: [...], true mirrors x first.

    Returns:
      theta [..., 2, 3], at least float32.

    Raises:
      ValueError: if translation is neither a scalar nor [..., 2].
    """
    translation = _at_least_float32(translation)
    if translation.ndim and translation.shape[-1] != 2:
        raise ValueError(f"translation must be a scalar or [..., 2], got {translation.shape}")
    rotation, log_scale, log_aspect, shear = map(
        _at_least_float32, (rotation, log_scale, log_aspect, shear)
    )
    tx, ty = (translation[..., 0], translation[..., 1]) if translation.ndim else (translation,) * 2
    cos, sin = jnp.cos(rotation), jnp.sin(rotation)
    mirror = jnp.where(jnp.asarray(flip), -1.0, 1.0).astype(rotation.dtype)
    sx = mirror * jnp.exp(log_scale + log_aspect / 2)
    sy = jnp.exp(log_scale - log_aspect / 2)
    entries = (cos * sx, (cos * shear - sin) * sy, tx, sin * sx, (sin * shear + cos) * sy, ty)
    entries = jnp.broadcast_arrays(*entries)
    return jnp.stack(entries, axis=-1).reshape(*entries[0].shape, 2, 3)


def decompose_affine(theta: ArrayLike) -> dict[str, jax.Array]:
    """The six arguments of `affine_matrix` that give theta, rotation in (-pi, pi].

    A singular theta has no such parts; lengths are kept above 1e-6 so that values and gradients
    stay finite, and `affine_matrix` of the result is still close to theta.

    Args:
      theta: [..., 2, 3].

    Returns:
      rotation, log_scale, log_aspect, shear, flip (bool): [...]; translation: [..., 2].

    Raises:
      ValueError: if theta is not [..., 2, 3].
    """
    theta = _check_theta(theta)
    a, b, c, d = theta[..., 0, 0], theta[..., 0, 1], theta[..., 1, 0], theta[..., 1, 1]
    flip = a * d < b * c
    a, c = jnp.where(flip, -a, a), jnp.where(flip, -c, c)
    # The direction of a column of length 0 is free: x.
    short = a * a + c * c < 1e-12
    a, c = jnp.where(short, 1e-6, a), jnp.where(short, 0.0, c)
    sx = jnp.sqrt(a * a + c * c)
    cos, sin = a / sx, c / sx
    sy = jnp.maximum(cos * d - sin * b, 1e-6)
    rotation = jnp.arctan2(c, a)
    return {
        "rotation": jnp.where(rotation <= -jnp.pi, jnp.pi, rotation),  # c = -0.0
        "log_scale": (jnp.log(sx) + jnp.log(sy)) / 2,
        "log_aspect": jnp.log(sx) - jnp.log(sy),
        "shear": (cos * b + sin * d) / sy,
        "translation": theta[..., 2],
        "flip": flip,
    }


def invert_affine(theta: ArrayLike) -> jax.Array:
    """theta of the inverse map; not finite where theta is singular.

    Args:
      theta: [..., 2, 3].

    Returns:
      [..., 2, 3], at least float32.

    Raises:
      ValueError: if theta is not [..., 2, 3].
    """
    theta = _check_theta(theta)
    a, b, tx = theta[..., 0, 0], theta[..., 0, 1], theta[..., 0, 2]
    c, d, ty = theta[..., 1, 0], theta[..., 1, 1], theta[..., 1, 2]
    entries = jnp.stack([d, -b, b * ty - d * tx, -c, a, c * tx - a * ty], axis=-1)
    return (entries / (a * d - b * c)[..., None]).reshape(theta.shape)


def affine_grid(theta: ArrayLike, size: Sequence[int], *, align_corners: bool = False) -> jax.Array:
    """Sampling positions of the affine map theta; torch.nn.functional.affine_grid.

    Args:
      theta: [..., 2, 3].
      size: (height, width) of the output.
      align_corners: whether -1 and 1 are the centres of the outermost pixels or their outer edges.

    Returns:
      grid [..., H, W, 2] of normalised (x, y), at least float32.

    Raises:
      ValueError: if theta is not [..., 2, 3] or size is not two positive integers.
    """
    theta = _check_theta(theta)
    height, width = _check_size(size)
    x = _pixel_centres(width, align_corners).astype(theta.dtype)
    y = _pixel_centres(height, align_corners).astype(theta.dtype)[:, None, None]
    # Products and sums, not a matmul: accelerators round a matmul's inputs to bfloat16.
    column = theta[..., None, None, :, :]
    return column[..., 0] * x[:, None] + column[..., 1] * y + column[..., 2]


def grid_sample(
    image: ArrayLike,
    grid: ArrayLike,
    *,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> jax.Array:
    """The image at the grid's positions; torch.nn.functional.grid_sample, channels last.

    Nothing outside the image is ever read. An infinite position is far outside; a NaN gives NaN,
    so that a diverged theta is seen.

    Args:
      image: [..., H, W, C], any real dtype.
      grid: [..., H', W', 2], normalised (x, y); leading dimensions broadcast with the image's.
      mode: "bilinear" or "nearest" (ties to even; gradient 0 in the grid).
      padding_mode: what lies outside: "zeros", "border" (the nearest pixel) or "reflection".
      align_corners: whether -1 and 1 are the centres of the outermost pixels or their outer edges.

    Returns:
      [..., H', W', C] in the image's dtype, float32 for integers; computed in at least float32.

    Raises:
      ValueError: on other shapes or names.
    """
    image, grid = jnp.asarray(image), _at_least_float32(grid)
    _check_sample(image, grid, mode, padding_mode)
    height, width, channels = image.shape[-3:]
    x = _pixel_position(grid[..., 0], width, padding_mode, align_corners)
    y = _pixel_position(grid[..., 1], height, padding_mode, align_corners)
    images = image.shape[:-3]
    flat = _at_least_float32(image.reshape(-1, channels))
    first = jnp.arange(flat.shape[0] // (height * width), dtype=jnp.int32) * (height * width)
    first = first.reshape(*images, 1, 1)

    def tap(x, y):  # the pixels at integer positions, 0 outside
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        column = jnp.clip(x, 0, width - 1).astype(jnp.int32)
        row = jnp.clip(y, 0, height - 1).astype(jnp.int32)
        pixels = flat.at[first + row * width + column].get(mode="clip")
        return jnp.where(inside[..., None], pixels, 0)

    if mode == "nearest":
        out = tap(jnp.round(x), jnp.round(y))
        out = jnp.where(jnp.isnan(x + y)[..., None], jnp.nan, out)
    else:
        left, top = jnp.floor(x), jnp.floor(y)
        right_weight, bottom_weight = (x - left)[..., None], (y - top)[..., None]
        upper = tap(left, top) * (1 - right_weight) + tap(left + 1, top) * right_weight
        lower = tap(left, top + 1) * (1 - right_weight) + tap(left + 1, top + 1) * right_weight
        out = upper * (1 - bottom_weight) + lower * bottom_weight
    return out.astype(_output_dtype(image))


def warp_affine(
    image: ArrayLike,
    theta: ArrayLike,
    *,
    size: Sequence[int] | None = None,
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> jax.Array:
    """The image under the affine map theta: grid_sample(image, affine_grid(theta, size)).

    Args:
      image: [..., H, W, C], any real dtype.
      theta: [..., 2, 3]; leading dimensions broadcast with the image's.
      size: (height, width) of the result, by default the image's.
      padding_mode: "zeros", "border" or "reflection".
      align_corners: see `affine_grid`.

    Returns:
      [..., *size, C] in the image's dtype, float32 for integers.

    Raises:
      ValueError: on other shapes or names.
    """
    image = jnp.asarray(image)
    if image.ndim < 3:
        raise ValueError(f"image must be [..., H, W, C], got shape {image.shape}")
    grid = affine_grid(
        theta, image.shape[-3:-1] if size is None else size, align_corners=align_corners
    )
    return grid_sample(image, grid, padding_mode=padding_mode, align_corners=align_corners)


def _pixel_centres(size: int, align_corners: bool) -> jax.Array:
    """Normalised positions [size] of the pixels' centres, float32."""
    if align_corners:
        return jnp.linspace(-1.0, 1.0, size) if size > 1 else jnp.zeros(1)
    return (2 * jnp.arange(size, dtype=jnp.float32) + 1) / size - 1


def _pixel_position(
    normalised: jax.Array, size: int, padding_mode: str, align_corners: bool
) -> jax.Array:
    """Where on an axis of `size` pixels to read: in [0, size - 1], or [-1, size] with zeros."""
    low, span = (0.0, size - 1.0) if align_corners else (-0.5, float(size))
    position = (normalised + 1) * (span / 2) + low
    if padding_mode == "zeros":  # from one pixel outside on, all is zero
        return jnp.clip(position, -1, size)
    if padding_mode == "reflection" and span > 0:
        period = jnp.abs(position - low) % (2 * span)
        position = jnp.minimum(period, 2 * span - period) + low
    return jnp.clip(position, 0, size - 1)


def _at_least_float32(x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _output_dtype(image: jax.Array) -> jnp.dtype:
    return image.dtype if jnp.issubdtype(image.dtype, jnp.floating) else jnp.dtype(jnp.float32)


def _check_theta(theta: ArrayLike) -> jax.Array:
    theta = _at_least_float32(theta)
    if theta.shape[-2:] != (2, 3):
        raise ValueError(f"theta must be [..., 2, 3], got shape {theta.shape}")
    return theta


def _check_size(size: Sequence[int]) -> tuple[int, int]:
    size = tuple(size)
    if len(size) != 2 or any(int(n) != n or n < 1 for n in size):
        raise ValueError(f"size must be (height, width), two positive integers, got {size}")
    return int(size[0]), int(size[1])


def _check_sample(image: jax.Array, grid: jax.Array, mode: str, padding_mode: str) -> None:
    if image.ndim < 3 or 0 in image.shape[-3:]:
        raise ValueError(f"image must be [..., H, W, C], got shape {image.shape}")
    if grid.ndim < 3 or grid.shape[-1] != 2:
        raise ValueError(f"grid must be [..., H, W, 2], got shape {grid.shape}")
    try:
        jnp.broadcast_shapes(image.shape[:-3], grid.shape[:-3])
    except ValueError:
        raise ValueError(
            "leading dimensions must broadcast, got "
            f"image {image.shape} and grid (or theta's grid) {grid.shape}"
        ) from None
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {_MODES}, got {mode!r}")
    if padding_mode not in _PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {_PADDING_MODES}, got {padding_mode!r}")
