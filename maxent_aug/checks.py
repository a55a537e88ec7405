"""What arguments may be: each check gives a ValueError of one line that names the argument.

What is traced, under `jit` for instance, has a shape and a dtype but no numbers to look at: these
are then not checked.
"""

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

# Of functions whose arguments broadcast, or arrays within: where JAX is told to refuse unequal
# ranks (jax_numpy_rank_promotion), that is meant for its user's own code.
broadcasts = jax.numpy_rank_promotion("allow")


def is_known(array: Any) -> bool:
    """Whether its numbers can be looked at: not traced, and all on devices of this process."""
    return not isinstance(array, Tracer) and getattr(array, "is_fully_addressable", True)


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """A ValueError unless it is a real number from low to high; NaN is none."""
    if not is_known(value):
        return
    number = isinstance(value, Real | jax.Array | np.ndarray) and getattr(value, "ndim", 0) == 0
    if not number or not low <= jax.device_get(value) <= high:
        shown = " ".join(repr(value).split())  # an array's has several lines
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {shown:.80}")


def at_least_float32(x: ArrayLike, name: str) -> jax.Array:
    """An array of floating point, in its own type if that has 32 bits; a ValueError if complex."""
    x = jnp.asarray(x)
    if jnp.iscomplexobj(x):
        raise ValueError(f"{name} must be real, got {x.dtype} {x.shape}")
    wide = jnp.issubdtype(x.dtype, jnp.inexact) and jnp.finfo(x.dtype).bits >= 32
    return x if wide else x.astype(jnp.float32)


def check_size(size: Sequence[int]) -> tuple[int, int]:
    """(height, width); a ValueError if it is not two positive integers."""
    size = tuple(size) if isinstance(size, Iterable) else (size,)
    if len(size) != 2 or not all(isinstance(n, Integral) and n > 0 for n in size):
        raise ValueError(f"size must be (height, width), two positive integers, got {size}")
    return int(size[0]), int(size[1])


def check_image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """(H, W, C); a ValueError if it is not three positive integers."""
    shape = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    if len(shape) != 3 or not all(isinstance(n, Integral) and n > 0 for n in shape):
        raise ValueError(f"image_shape must be (H, W, C), each 1 or more, got {shape}")
    return int(shape[0]), int(shape[1]), int(shape[2])
