"""Affine maps and differentiable image sampling, in PyTorch's conventions.

theta [..., 2, 3] maps output to input positions in normalised (x, y), both in [-1, 1] over the
image, y down (Jaderberg et al. 2015, https://arxiv.org/abs/1506.02025).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import auto_axes
from jax.typing import ArrayLike

from maxent_aug.checks import at_least_float32, broadcasts, check_size

_CUBIC = -0.75  # PyTorch's choice among the cubic kernels of Keys 1981: the slope at distance 1

_MODES = ("bilinear", "bicubic", "nearest")
_PADDING_MODES = ("zeros", "border", "reflection")
_METHODS = ("auto", "gather", "matmul")


@broadcasts
def affine_matrix(
    *,
    rotation: ArrayLike = 0.0,
    log_scale: ArrayLike = 0.0,
    log_aspect: ArrayLike = 0.0,
    shear: ArrayLike = 0.0,
    translation: ArrayLike = 0.0,
    flip: ArrayLike = False,
    size: Sequence[int] | None = None,
) -> jax.Array:
    """theta = [R @ Shear @ diag(sx, sy) @ Flip | translation].

    R = [[cos, -sin], [sin, cos]], Shear = [[1, shear], [0, 1]], Flip = diag(-1, 1) or identity,
    sx = exp(log_scale + log_aspect / 2), sy = exp(log_scale - log_aspect / 2). These are the parts
    of theta, which maps output to input; what is seen done to the picture is the inverse,
    `decompose_affine(invert_affine(theta))`. y points down: a positive rotation of the picture is
    clockwise.

    Args:
      rotation, log_scale, log_aspect, shear: [...], radians and natural logarithms; broadcast.
      translation: a scalar for both axes or [..., 2] as (x, y); 2 is the full width of the image.
      flip: [...], true mirrors x first.
      size: (height, width) of the images, where R and Shear are of square pixels, so that oblong
        images are rotated, too, and not sheared; by default they are of normalised units.

    Returns:
      theta [..., 2, 3], at least float32.

    Raises:
      ValueError: if translation is neither a scalar nor [..., 2], one is complex, or size is not
        two positive integers.
    """
    given = rotation, log_scale, log_aspect, shear, translation
    parts = [x if isinstance(x, float) else jnp.asarray(x) for x in given]  # floats have no dtype
    if any(map(jnp.iscomplexobj, parts)):
        raise ValueError("the parts of an affine map must be real, got a complex one")
    dtype = jnp.promote_types(jnp.result_type(*parts), jnp.float32)
    rotation, log_scale, log_aspect, shear, translation = (jnp.asarray(x, dtype) for x in parts)
    if translation.ndim and translation.shape[-1] != 2:
        raise ValueError(f"translation must be a scalar or [..., 2], got {translation.shape}")
    tx, ty = (translation[..., 0], translation[..., 1]) if translation.ndim else (translation,) * 2
    cos, sin = jnp.cos(rotation), jnp.sin(rotation)
    mirror = jnp.where(jnp.asarray(flip), -1.0, 1.0).astype(rotation.dtype)
    sx = mirror * jnp.exp(log_scale + log_aspect / 2)
    sy = jnp.exp(log_scale - log_aspect / 2)
    ratio = _height_by_width(size)
    along_y, along_x = (cos * shear - sin) * sy * ratio, sin * sx / ratio
    entries = (cos * sx, along_y, tx, along_x, (sin * shear + cos) * sy, ty)
    entries = jnp.broadcast_arrays(*entries)
    return jnp.stack(entries, axis=-1).reshape(*entries[0].shape, 2, 3)


def _height_by_width(size: Sequence[int] | None) -> float:
    """Units of x in one of y: the linear part in pixels, D theta D^-1 with D = diag(W, H) / 2."""
    height, width = (1, 1) if size is None else check_size(size)
    return height / width


class AffineBounds(NamedTuple):
    """Largest absolute value of each coordinate of a bounded affine transform.

    tx and ty in normalised units (2 is the full width), rotation in radians.
    """

    tx: float = 0.25
    ty: float = 0.25
    rotation: float = float(np.radians(30))
    log_scale: float = float(np.log(1.3))
    log_aspect: float = float(np.log(1.2))
    shear: float = 0.3


DEFAULT_BOUNDS = AffineBounds()
# More than most images can bear: how much of it to use is what a stochastic augmenter learns.
WIDE_BOUNDS = AffineBounds(
    0.375, 0.375, float(np.radians(45)), float(np.log(1.5)), float(np.log(1.4)), 0.5
)


@broadcasts
def bounded_affine(
    shares: ArrayLike,
    bounds: AffineBounds | tuple[float, ...] = DEFAULT_BOUNDS,
    *,
    size: Sequence[int] | None = None,
) -> jax.Array:
    """theta whose six coordinates are shares of their bounds: `affine_matrix` of shares * bounds.

    Args:
      shares: [..., 6] in [-1, 1], in the order of `AffineBounds`; 0 is the identity.
      bounds: six finite numbers, at least 0.
      size: of `affine_matrix`.

    Returns:
      theta [..., 2, 3], at least float32.

    Raises:
      ValueError: on other shapes, bounds or size.
    """
    shares = at_least_float32(shares, "shares")
    if np.shape(bounds) != (6,) or not all(0 <= bound < math.inf for bound in bounds):
        raise ValueError(f"bounds must be six finite numbers, at least 0, got {bounds}")
    if shares.shape[-1:] != (6,):
        raise ValueError(f"shares must be [..., 6], got {shares.shape}")
    tx, ty, rotation, log_scale, log_aspect, shear = (
        float(b) * share for b, share in zip(bounds, jnp.moveaxis(shares, -1, 0), strict=True)
    )
    return affine_matrix(
        rotation=rotation,
        log_scale=log_scale,
        log_aspect=log_aspect,
        shear=shear,
        translation=jnp.stack([tx, ty], -1),
        size=size,
    )


@broadcasts
def decompose_affine(
    theta: ArrayLike, *, size: Sequence[int] | None = None
) -> dict[str, jax.Array]:
    """The six arguments of `affine_matrix` that give theta, rotation in (-pi, pi].

    A singular theta has no such parts; lengths are kept above 1e-6 so that values and gradients
    stay finite, and `affine_matrix` of the result is still close to theta.

    Args:
      theta: [..., 2, 3].
      size: of `affine_matrix`.

    Returns:
      rotation, log_scale, log_aspect, shear, flip (bool): [...]; translation: [..., 2].

    Raises:
      ValueError: if theta is not [..., 2, 3], or on another size.
    """
    theta, ratio = _check_theta(theta), _height_by_width(size)
    a, b = theta[..., 0, 0], theta[..., 0, 1] / ratio
    c, d = theta[..., 1, 0] * ratio, theta[..., 1, 1]
    # The direction of a column of length 0 is free: x.
    short = a * a + c * c < 1e-12
    a, c = jnp.where(short, 1e-6, a), jnp.where(short, 0.0, c)
    sx = jnp.sqrt(a * a + c * c)
    flip = a * d < b * c
    a, c = jnp.where(flip, -a, a), jnp.where(flip, -c, c)
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


@broadcasts
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


@broadcasts
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
    theta, size = _check_theta(theta), check_size(size)
    position = _affine_position(theta, size, (1.0, 1.0), align_corners)
    return jnp.stack([_total(axis) for axis in position], axis=-1)


@broadcasts
def grid_sample(
    image: ArrayLike,
    grid: ArrayLike,
    *,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
    method: str = "auto",
) -> jax.Array:
    """The image at the grid's positions; torch.nn.functional.grid_sample, channels last.

    Nothing outside the image is ever read. An infinite position is far outside (with reflection:
    NaN); a NaN position gives NaN, so that a diverged theta is seen. At a pixel's centre the
    gradient is the one towards larger x and y, so it is not 0 at the identity.

    Args:
      image: [..., H, W, C], any real dtype.
      grid: [..., H', W', 2], normalised (x, y); leading dimensions broadcast with the image's.
      mode: "bilinear", "bicubic" (16 pixels each: blurs less, and may pass the image's extremes) or
        "nearest" (ties to even; no gradient in the grid).
      padding_mode: what lies outside: "zeros", "border" (the nearest pixel) or "reflection".
      align_corners: whether -1 and 1 are the centres of the outermost pixels or their outer edges.
      method: "gather", "matmul" (neither gather nor scatter, for TPUs, where these are slow; cost
        grows with the square of the pixels; one pixel that is not finite makes NaN of nearly all)
        or "auto": matmul on TPU, gather elsewhere.

    Returns:
      [..., H', W', C] in the image's dtype, float32 for integers; computed in at least float32.

    Raises:
      ValueError: on other shapes or names.
    """
    image, grid = jnp.asarray(image), at_least_float32(grid, "grid")
    if grid.ndim < 3 or grid.shape[-1] != 2:
        raise ValueError(f"grid must be [..., H, W, 2], got {grid.shape}")
    _check_image(image, "grid", grid.shape, grid.shape[:-3])
    half = _half_extents(image.shape[-3:-1], align_corners)
    x, y = grid[..., 0] * half[1], grid[..., 1] * half[0]
    return _sample(image, (x,), (y,), mode, padding_mode, align_corners, method)


@broadcasts
def warp_affine(
    image: ArrayLike,
    theta: ArrayLike,
    *,
    size: Sequence[int] | None = None,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool = False,
    method: str = "auto",
) -> jax.Array:
    """The image under the affine map theta: grid_sample(image, affine_grid(theta, size)).

    Exact at the identity, and faster than the two calls.

    Args:
      image: [..., H, W, C], any real dtype.
      theta: [..., 2, 3]; leading dimensions broadcast with the image's.
      size: (height, width) of the result, by default the image's.
      mode, padding_mode, align_corners, method: see `grid_sample`.

    Returns:
      [..., *size, C] in the image's dtype, float32 for integers.

    Raises:
      ValueError: on other shapes or names.
    """
    image, theta = jnp.asarray(image), _check_theta(theta)
    _check_image(image, "theta", theta.shape, theta.shape[:-2])
    size = image.shape[-3:-1] if size is None else check_size(size)
    half = _half_extents(image.shape[-3:-1], align_corners)
    x, y = _affine_position(theta, size, half, align_corners)
    return _sample(image, x, y, mode, padding_mode, align_corners, method)


def _half_extents(size: Sequence[int], align_corners: bool) -> tuple[float, float]:
    """Pixels from an image's centre to the normalised coordinate 1, (height, width)."""
    if not isinstance(align_corners, bool | np.bool_):
        raise ValueError(f"align_corners must be True or False, got {align_corners!r}")
    height, width = (n - 1 if align_corners else n for n in size)
    return height / 2, width / 2


# A position on an axis: the sum of its parts, [..., H', 1] and [..., 1, W'] or one [..., H', W'].
_Parts = tuple[jax.Array, ...]


def _total(parts: _Parts) -> jax.Array:
    return sum(parts[1:], start=parts[0])


def _affine_position(
    theta: jax.Array, size: Sequence[int], half: tuple[float, float], align_corners: bool
) -> tuple[_Parts, _Parts]:
    """x and y, in units of 1 / half from the input's centre.

    Sums of products, not a matmul: accelerators round a matmul's inputs to bfloat16.
    """
    # Whole pixels from the centre times a ratio: exact at the identity.
    y, x = (jnp.arange(n, dtype=theta.dtype) - (n - 1) / 2 for n in size)
    unit_y, unit_x = (h or 1.0 for h in _half_extents(size, align_corners))

    def axis(row: jax.Array, half: float) -> _Parts:
        along_x = row[..., :1] * (half / unit_x) * x + row[..., 2:] * half
        along_y = row[..., 1:2] * (half / unit_y) * y
        return along_x[..., None, :], along_y[..., :, None]

    return axis(theta[..., 0, :], half[1]), axis(theta[..., 1, :], half[0])


class _Kernel(NamedTuple):
    """What pixels a position is made of: the arguments of `grid_sample`."""

    mode: str
    padding_mode: str
    align_corners: bool


def _sample(
    image: jax.Array,
    x: _Parts,
    y: _Parts,
    mode: str,
    padding_mode: str,
    align_corners: bool,
    method: str,
) -> jax.Array:
    """The image at x, y, in pixels from the image's centre."""
    for name, value, allowed in (
        ("interpolation mode", mode, _MODES),
        ("padding_mode", padding_mode, _PADDING_MODES),
        ("method", method, _METHODS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
    return _sample_by(method, _Kernel(mode, padding_mode, align_corners), image, x, y)


@partial(jax.jit, static_argnums=(0, 1))
def _sample_by(method: str, kernel: _Kernel, image: jax.Array, x: _Parts, y: _Parts) -> jax.Array:
    height, width = image.shape[-3:-1]
    x, y = ((axis[0] + (n - 1) / 2, *axis[1:]) for axis, n in ((x, width), (y, height)))
    if kernel.padding_mode != "zeros":
        x = (_padded_position(_total(x), width, kernel),)
        y = (_padded_position(_total(y), height, kernel),)
    pixels = at_least_float32(image, "image")
    matmul, gather = partial(_sample_matmul, kernel=kernel), partial(_sample_gather, kernel=kernel)
    if method == "auto":  # decided when it is lowered: an exported program may be for several
        sample = partial(jax.lax.platform_dependent, tpu=matmul, default=gather)
    else:
        sample = matmul if method == "matmul" else gather
    # On a mesh of explicit axes one of images and positions may be divided, the other not.
    like = jax.eval_shape(
        lambda pixels, x: pixels[..., :1, :1, :] + _total(x)[..., None].astype(pixels.dtype),
        pixels,
        x,
    )
    out = divided_like(like, sample)(pixels, x, y)
    return out.astype(image.dtype if jnp.issubdtype(image.dtype, jnp.floating) else jnp.float32)


def _sample_gather(image: jax.Array, x: _Parts, y: _Parts, kernel: _Kernel) -> jax.Array:
    """The image at x, y, in pixels from its first pixel, tap by tap."""
    if kernel.mode == "nearest":
        return _gather(image, _total(x), _total(y), kernel)
    if image.shape[-1] == 1:  # else XLA reads the taps anew for each of the position's parts
        x, y = (_total(x),), (_total(y),)
    # Complex before the parts are added up, so that their gradients are taken apart when small.
    return _interpolate(kernel, image, _total(tuple(map(jax.lax.complex, x, y))))


def _padded_position(position: jax.Array, size: int, kernel: _Kernel) -> jax.Array:
    """Where to read instead on an axis of `size` pixels, with border or reflection."""
    low, span = (0.0, size - 1.0) if kernel.align_corners else (-0.5, float(size))
    if kernel.padding_mode == "reflection" and span > 0:
        period = jnp.abs(position - low) % (2 * span)
        position = jnp.minimum(period, 2 * span - period) + low
    # A cubic changes up to two pixels beyond the outermost ones.
    first, last = (-2, size + 1) if kernel.mode == "bicubic" else (0, size - 1)
    position = jnp.where(position <= first, first, position)  # clip has half a gradient at the ends
    return jnp.where(position >= last, last, position)


def _taps(
    position: jax.Array, size: int, kernel: _Kernel
) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """(index, weight, d weight / d position) of the pixels read on an axis; 0 outside."""
    # floor and floor + 1: with ceil both coincide at the identity, whose gradient is then 0.
    first = jnp.floor(position)
    if kernel.mode == "nearest":
        ones = jnp.where(jnp.isnan(position), jnp.nan, jnp.ones_like(position))
        taps = [(jnp.round(position), ones, jnp.zeros_like(position))]
    elif kernel.mode == "bilinear":
        after, one = position - first, jnp.ones_like(position)
        taps = [(first, 1 - after, -one), (first + 1, after, one)]
    else:
        taps = [(first + i, *_cubic(position - first, i)) for i in (-1, 0, 1, 2)]
    if kernel.padding_mode != "zeros":
        return [
            (_padded_index(index, size, kernel), weight, slope) for index, weight, slope in taps
        ]
    inside = [~((index < 0) | (index > size - 1)) for index, _, _ in taps]  # true for NaN
    return [
        (
            jnp.clip(index, 0, size - 1).astype(jnp.int32),
            jnp.where(ok, weight, 0),
            jnp.where(ok, slope, 0),
        )
        for ok, (index, weight, slope) in zip(inside, taps, strict=True)
    ]


def _padded_index(index: jax.Array, size: int, kernel: _Kernel) -> jax.Array:
    """The pixel to read instead of one at most two pixels outside, with border or reflection."""
    index, last = index.astype(jnp.int32), size - 1
    if kernel.padding_mode == "reflection":
        edge = 0 if kernel.align_corners else 1
        index = jnp.where(index < 0, -edge - index, index)
        index = jnp.where(index > last, 2 * last + edge - index, index)
    return jnp.clip(index, 0, last)


def _cubic(fraction: jax.Array, tap: int) -> tuple[jax.Array, jax.Array]:
    """Weight of the pixel `tap` after the first, and its slope, at a fraction beyond the first.

    Source: Keys 1981, "Cubic convolution interpolation for digital image processing".
    """
    sign = 1.0 if tap <= 0 else -1.0
    d = sign * (fraction - tap)  # the distance, known to be below or above 1
    if tap in (0, 1):
        weight = ((_CUBIC + 2) * d - (_CUBIC + 3)) * d * d + 1
        slope = (3 * (_CUBIC + 2) * d - 2 * (_CUBIC + 3)) * d
    else:
        weight = _CUBIC * (((d - 5) * d + 8) * d - 4)
        slope = _CUBIC * ((3 * d - 10) * d + 8)
    return weight, sign * slope


def _gather(
    image: jax.Array,
    x: jax.Array,
    y: jax.Array,
    kernel: _Kernel,
    *,
    slopes: bool = False,
    one_after_another: bool = False,
) -> jax.Array:
    """Sum of the taps' pixels times weights, or d/dx + i d/dy of it.

    Of the transpose, a scatter a tap, each scatter adds to the result of the one before if they are
    to come `one_after_another`; else each begins with zeros, and their results are added up.
    """
    height, width, channels = image.shape[-3:]
    pixels, first = image.reshape(*image.shape[:-3], height * width, channels), 0
    if one_after_another:  # a scatter into one array is faster than into one an image
        pixels = pixels.reshape(-1, channels)
        first = jnp.arange(len(image))[:, None, None] * height * width
    columns = _taps(x, width, kernel)
    out = d_x = d_y = zero = jnp.zeros((), image.dtype)
    for row, weight_y, slope_y in _taps(y, height, kernel):
        line = d_line = zero
        for column, weight_x, slope_x in columns:
            # One index: XLA fuses no index tuples.
            pixel = take_pixels(pixels, first + row * width + column)
            line += weight_x[..., None] * pixel
            if slopes:
                d_line += slope_x[..., None] * pixel
            if one_after_another:
                # XLA folds a sum into a scatter, but not a sum of two scatters; this hides one.
                pixels = jax.lax.optimization_barrier(pixels)
        if slopes:
            d_x += weight_y[..., None] * d_line
            d_y += slope_y[..., None] * line
        else:
            out += weight_y[..., None] * line
    return jax.lax.complex(d_x, d_y) if slopes else out


def divided_like(like: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """function, its result divided among devices as the array `like` is, on a mesh of any axes."""
    sharding = jax.typeof(like).sharding
    explicit = tuple(sharding.mesh.explicit_axes)
    if not explicit:
        return function
    return auto_axes(function, axes=explicit, out_sharding=sharding)  # pyright: ignore


def take_pixels(pixels: jax.Array, index: jax.Array) -> jax.Array:
    """[..., H, W, C]: pixels [..., n, C] at index [..., H, W]; leading dimensions broadcast.

    Image by image, so that a batch divided among devices stays so.
    """

    def take(pixels: jax.Array, index: jax.Array) -> jax.Array:
        return pixels.at[index].get(mode="clip", wrap_negative_indices=False)

    return jnp.vectorize(take, signature="(n,c),(h,w)->(h,w,c)")(pixels, index)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _interpolate(kernel: _Kernel, image: jax.Array, position: jax.Array) -> jax.Array:
    """The image at position x + iy.

    Autodiff of a gather is slow. In the position it would add up one scatter a tap though the
    derivative is only a sum of the same taps; x and y are one complex number so that both
    derivatives come out of one pass over the image.
    """
    return _gather(image, position.real, position.imag, kernel)


@broadcasts  # called when a caller's program is differentiated
def _interpolate_jvp(kernel, primals, tangents):
    (image, position), (d_image, d_position) = primals, tangents
    out = _interpolate(kernel, image, position)
    d_out = jnp.zeros_like(out)
    if not isinstance(d_image, SymbolicZero):
        d_out += jax.lax.platform_dependent(
            d_image,
            position,
            cpu=partial(_gather_in_groups, kernel=kernel),
            default=lambda image, at: _gather(image, at.real, at.imag, kernel),
        )
    if not isinstance(d_position, SymbolicZero):
        if image.shape[-1] > 1:  # else one pass over the taps is enough for value and slopes
            # XLA would store the taps for both passes, or read them anew for each of the six sums.
            image = jax.lax.optimization_barrier(image)
            d_position = jax.lax.optimization_barrier(d_position)
        slope = _gather(image, position.real, position.imag, kernel, slopes=True)
        d_out += (slope.conj() * d_position[..., None]).real
    return out, d_out


_interpolate.defjvp(_interpolate_jvp, symbolic_zeros=True)


def _gather_in_groups(image: jax.Array, position: jax.Array, kernel: _Kernel) -> jax.Array:
    """_interpolate in the form whose transpose, a scatter a tap, is fast on a CPU.

    What is added up, 4 or 16 pixels for each, should not leave the caches: a group of images at a
    time, and two groups at once, since a scatter runs on one core. And XLA adds slices of four
    numbers as vectors, but of three number by number.
    """
    lead = jnp.broadcast_shapes(image.shape[:-3], position.shape[:-2])
    shape, size, channels = image.shape[-3:], position.shape[-2:], image.shape[-1]
    count, most = math.prod(lead), max(1, 2**17 // max(1, math.prod(size) * channels))
    if not isinstance(count, int):  # exported for any number of images
        return _gather(image, position.real, position.imag, kernel)
    group = next(n for n in range(most, 0, -1) if count % n == 0)

    def split(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:  # flat: else XLA copies it
        x = jnp.broadcast_to(x, (*lead, *shape))
        return x.reshape(count // group, group * math.prod(shape))

    @partial(jax.checkpoint, prevent_cse=False)
    def sample(_: None, inputs: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        image, x, y = (
            inputs[0].reshape(group, *shape),
            *(p.reshape(group, *size) for p in inputs[1:]),
        )
        if channels == 3:
            image = jnp.pad(image, ((0, 0), (0, 0), (0, 0), (0, 1)))
        out = _gather(image, x, y, kernel, one_after_another=True)
        return None, out[..., :channels].ravel()

    parts = split(image, shape), split(position.real, size), split(position.imag, size)
    _, out = jax.lax.scan(sample, None, parts, unroll=2)
    return out.reshape(*lead, *size, channels)


def _sample_matmul(image: jax.Array, x: _Parts, y: _Parts, kernel: _Kernel) -> jax.Array:
    """out[p, c] = sum_h weight_y[p, h] sum_w weight_x[p, w] image[h, w, c].

    One output row at a time, recomputed in the backward pass: sum_w is [..., W', H, C] for a row.
    """
    height, width = image.shape[-3:-1]

    def weights(position: jax.Array, size: int) -> jax.Array:
        position = jnp.clip(position, -3, size + 2)  # a cubic has no gradient at infinity
        pixel = jnp.arange(size)
        return sum(
            (
                jnp.where(index[..., None] == pixel, weight[..., None], 0)
                for index, weight, _ in _taps(position, size, kernel)
            ),
            jnp.zeros((), position.dtype),
        )

    @jax.checkpoint
    def row(xy: tuple[jax.Array, jax.Array]) -> jax.Array:
        columns = jnp.einsum(
            "...pw,...hwc->...phc", weights(xy[0], width), image, precision="highest"
        )
        return (weights(xy[1], height)[..., None] * columns).sum(-2)

    rows = jax.lax.map(row, tuple(jnp.moveaxis(_total(axis), -2, 0) for axis in (x, y)))
    return jnp.moveaxis(rows, 0, -3)


def _check_theta(theta: ArrayLike) -> jax.Array:
    theta = at_least_float32(theta, "theta")
    if theta.shape[-2:] != (2, 3):
        raise ValueError(f"theta must be [..., 2, 3], got {theta.shape}")
    return theta


def _check_image(image: jax.Array, name: str, shape: tuple[int, ...], lead: tuple[int, ...]):
    if image.ndim < 3 or 0 in image.shape[-3:] or jnp.iscomplexobj(image):
        raise ValueError(
            f"image must be real [..., H, W, C] with none of these 0, got {image.dtype} "
            f"{image.shape}"
        )
    try:
        jnp.broadcast_shapes(image.shape[:-3], lead)
    except ValueError:
        raise ValueError(
            f"leading dimensions must broadcast, got image {image.shape} and {name} {shape}"
        ) from None
