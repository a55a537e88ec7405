"""A learned augmenter in one file, to be applied in any training loop."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array
from jax.typing import ArrayLike

from maxent_aug.models import StochasticAugmenter
from maxent_aug.run_folder import write_atomically
from maxent_aug.spatial import AffineBounds
from maxent_aug.steps import denormalize, normalize

FORMAT = 1
# What else odd files raise: encrypted, nested without end, arrays beyond all memory, widths of 0.
_ODD = (RuntimeError, MemoryError, ArithmeticError)
FIELDS = ("bounds", "padding_mode", "start_width", "least_width", "share", "width", "hidden")


def save_augmenter(
    path: str | Path,
    module: StochasticAugmenter,
    params: Any,
    *,
    mean: ArrayLike,
    sd: ArrayLike,
    image_shape: tuple[int, ...],
) -> None:
    """Writes a trained augmenter, whole or not at all; NumPy's npz, without pickles.

    Args:
      path: of the file; .npz by custom.
      module, params: the network and its weights.
      mean, sd: [C] of images / 255, which it was trained with; see `steps.normalize`.
      image_shape: (H, W, C) of the images that it was trained on.
    """
    about = {name: getattr(module, name) for name in FIELDS}
    about |= {"format": FORMAT, "image_shape": list(image_shape)}
    arrays: dict[str, Any] = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    content = io.BytesIO()
    np.savez(content, about=json.dumps(about), mean=mean, sd=sd, **arrays)
    write_atomically(Path(path), content.getvalue())


def load_augmenter(path: str | Path) -> Callable[[Array, ArrayLike], tuple[Array, Array]]:
    """Reads a trained augmenter, frozen.

    Args:
      path: of a file of `save_augmenter`, such as augmenter.npz in the folder of a run of
        `experiments.learn`.

    Returns:
      A jitted function (key, images) -> (images, theta): key is a typed random key; images are
      [B, H, W, C], uint8 or float32 in 0..255, and keep their dtype; theta is [B, 2, 3]. It raises
      ValueError for images of another shape than it was trained on.

    Raises:
      ValueError: if the file is not an augmenter's.
      OSError: if it cannot be read.
    """
    try:
        # Opened here: np.load leaves a file that is no zip open.
        with Path(path).open("rb") as content, np.load(content, allow_pickle=False) as file:
            if any(part.compress_size != part.file_size for part in file.zip.infolist()):
                raise ValueError("compressed, perhaps a bomb")
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
        if about.pop("format") != FORMAT:
            raise ValueError("another format")
        shape = tuple(about.pop("image_shape"))
        mean, sd = arrays.pop("mean"), arrays.pop("sd")
        module = StochasticAugmenter(**about | {"bounds": AffineBounds(*about["bounds"])})
        params = traverse_util.unflatten_dict(arrays, sep="/")
        _check(module, params, shape)
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, *_ODD):
        raise ValueError(f"{path} is not an augmenter's file, or is damaged") from None

    @jax.jit
    def augment(key: Array, images: ArrayLike) -> tuple[Array, Array]:
        images = jnp.asarray(images)
        if images.shape[1:] != shape or images.dtype not in (jnp.uint8, jnp.float32):
            raise ValueError(
                f"images must be uint8 or float32 [B, {', '.join(map(str, shape))}], got "
                f"{images.dtype} {images.shape}"
            )
        result: Any = module.apply({"params": params}, normalize(images, mean, sd), key)
        augmented, theta = result
        if images.dtype == jnp.uint8:
            return denormalize(augmented, mean, sd), theta
        return (augmented * sd + mean) * 255.0, theta

    return augment


def _check(module: StochasticAugmenter, params: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the weights are those of the network."""
    key = jax.eval_shape(jax.random.key, 0)
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    wanted = jax.eval_shape(module.init, key, image, key)["params"]
    shapes = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (wanted, params)]
    if shapes[0] != shapes[1]:
        raise ValueError("other weights")
