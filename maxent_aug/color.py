"""Changes of colour, differentiable in how large they are: what `spatial` is for position."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from maxent_aug.checks import at_least_float32, broadcasts


class ColorBounds(NamedTuple):
    """The most that each coordinate of a change of colour may be, to either side.

    brightness in units of the images' values (of normalised ones: standard deviations of the data),
    hue in radians.
    """

    brightness: float = 1.0
    log_contrast: float = float(np.log(2))
    log_saturation: float = float(np.log(3))
    hue: float = float(np.radians(45))


@broadcasts
def adjust_color(images: ArrayLike, color: ArrayLike) -> Array:
    """Changes contrast, saturation, hue and brightness of images.

    A pixel is its grey, the mean of its channels, and the rest, its colour. Contrast multiplies the
    distance of each pixel's grey to the mean of the image's, saturation its colour; hue turns that
    about the grey axis, red to blue to green; brightness is added to all. Values are not clipped.

    Args:
      images: [..., H, W, 3], floating point, of any mean and scale that the channels share.
      color: [..., 4], broadcast against the images: brightness, log of contrast, log of saturation,
        hue in radians; 0 changes nothing.

    Returns:
      [..., H, W, 3], at least float32.

    Raises:
      ValueError: on other shapes, images of integers, or a complex color.
    """
    images, color = jnp.asarray(images), at_least_float32(color, "color")
    if images.ndim < 3 or images.shape[-1] != 3 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images must be floating point [..., H, W, 3], got {images.dtype} {images.shape}"
        )
    count = len(ColorBounds._fields)
    if color.shape[-1:] != (count,):
        raise ValueError(f"color must be [..., {count}], got {color.shape}")
    try:
        jnp.broadcast_shapes(images.shape[:-3], color.shape[:-1])
    except ValueError:
        raise ValueError(
            f"leading dimensions must broadcast, got images {images.shape} and color {color.shape}"
        ) from None
    dtype = jnp.promote_types(images.dtype, color.dtype)
    images = images.astype(dtype)
    coordinates = (color.astype(dtype)[..., i, None, None, None] for i in range(count))
    brightness, log_contrast, log_saturation, hue = coordinates
    grey = images.mean(-1, keepdims=True)
    middle = grey.mean((-3, -2), keepdims=True)
    chroma = images - grey
    red, green, blue = jnp.split(chroma, 3, -1)
    quarter = jnp.concatenate([green - blue, blue - red, red - green], -1) / math.sqrt(3)
    turned = chroma * jnp.cos(hue) + quarter * jnp.sin(hue)
    contrasted = jnp.exp(log_contrast) * (grey - middle)
    return brightness + middle + contrasted + jnp.exp(log_saturation) * turned
