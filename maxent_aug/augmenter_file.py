"""A learned augmenter in one file: for any training loop with this package, or for any with JAX."""

import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array, export
from jax.typing import ArrayLike

from maxent_aug.checks import broadcasts, check_image_shape, is_known
from maxent_aug.color import ColorBounds
from maxent_aug.models import StochasticAugmenter
from maxent_aug.operations import check_range
from maxent_aug.run_folder import write_atomically, write_json
from maxent_aug.spatial import AffineBounds
from maxent_aug.steps import denormalize, normalize

FORMAT = 4
PLATFORMS = ("cpu", "cuda", "tpu")  # of an exported program
# What odd files raise, too: encrypted, nested without end, arrays beyond all memory, widths of 0.
_ODD = (RuntimeError, MemoryError, ArithmeticError)
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, *_ODD)
_OF_FLAX = ("parent", "name")  # what every module has beside its own options


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

    Raises:
      ValueError: on another network, weights that are not its own or not finite, or another mean,
        sd or shape; mean and sd lie in [0, 1].
    """
    if not isinstance(module, StochasticAugmenter):
        raise ValueError(f"module must be a StochasticAugmenter, got {type(module).__name__}")
    image_shape = check_image_shape(image_shape)
    _check(module, params, np.asarray(mean), np.asarray(sd), image_shape)
    options = (field.name for field in fields(module) if field.name not in _OF_FLAX)
    about = {name: getattr(module, name) for name in options}
    about |= {"format": FORMAT, "image_shape": image_shape}
    arrays: dict[str, Any] = traverse_util.flatten_dict(jax.device_get(params), sep="/")
    content = io.BytesIO()
    np.savez(content, about=json.dumps(about, default=_number), mean=mean, sd=sd, **arrays)
    write_atomically(Path(path), content.getvalue())


def _number(value: Any) -> int | float:
    """Python's, of an array's or NumPy's."""
    return np.asarray(value).item()


def load_augmenter(
    path: str | Path, *, share: float | None = None, with_color: bool = False
) -> Callable[..., tuple[Any, ...]]:
    """Reads a trained augmenter, frozen.

    Args:
      path: of a file of `save_augmenter`, such as augmenter.npz in the folder of a run of
        `experiments.learn`.
      share: of the images that get an affine transform, above 0, at most 1; by default as in its
        training. The others are shifted by whole pixels, if its training had them so. Colours, if
        it has learned to change them, change in all; but if its training had a policy of their own
        for the others (`--config.policy=A:B`), they are left as they are.
      with_color: whether to return these changes, too.

    Returns:
      A compiled function (key, images, uncertainty=None) -> (images, theta): key is a typed random
      key; images are [B, H, W, C], uint8 or float32 in 0..255, and keep their dtype; uncertainty is
      [B] in [0, 1], H / log2 m of your own classifier on these images, by default that which the
      network assumes (of `experiments.learn`, that of images never seen at the end of its
      training); theta is [B, 2, 3]. It raises ValueError for images of another shape than it was
      trained on, for uncertainties of another shape than [B] and, where it is called with numbers
      and not traced, for uncertainties outside of [0, 1] and images that are plainly of 0..1 or
      normalised.
      With with_color it returns (images, theta, color), color [B, 4] as `adjust_color` takes it, of
      normalised images, or None if the augmenter leaves colours as they are.

    Raises:
      ValueError: if the file is not an augmenter's, or on another share.
      OSError: if it cannot be read.
    """
    loaded = _read(Path(path))
    if share is not None:
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0, at most 1, got {share}")
        loaded = loaded._replace(module=loaded.module.clone(share=share))

    @jax.jit
    def compiled(
        key: Array, images: Array, uncertainty: ArrayLike | None = None
    ) -> tuple[Any, ...]:
        if images.shape[1:] != loaded.image_shape or images.dtype not in (jnp.uint8, jnp.float32):
            raise ValueError(
                f"images must be uint8 or float32 [B, {', '.join(map(str, loaded.image_shape))}], "
                f"got {images.dtype} {images.shape}"
            )
        if uncertainty is not None:
            uncertainty = jnp.asarray(uncertainty, jnp.float32)
            if uncertainty.shape != images.shape[:1]:
                raise ValueError(
                    f"uncertainty must be [{images.shape[0]}], one number an image, "
                    f"got {uncertainty.shape}"
                )
        augmented, theta, color = loaded.apply(key, images, uncertainty)
        return (augmented, theta, color) if with_color else (augmented, theta)

    def augment(
        key: Array, images: ArrayLike, uncertainty: ArrayLike | None = None
    ) -> tuple[Any, ...]:
        images = jnp.asarray(images)
        check_range(images)
        _check_uncertainty(uncertainty)
        return compiled(key, images, uncertainty)

    return augment


def _check_uncertainty(uncertainty: ArrayLike | None) -> None:
    """Raises ValueError if it has numbers that are known and outside of [0, 1]."""
    if uncertainty is None or not is_known(uncertainty):
        return
    values = np.asarray(uncertainty)
    wrong = values[~((values >= 0) & (values <= 1 + 1e-3))]
    if wrong.size:
        raise ValueError(
            f"uncertainty must be within [0, 1], H / log2 m (`maxent_aug.uncertainty`), got "
            f"{wrong.flat[0]:.3g}"
        )


def export_augmenter(path: str | Path, to: str | Path) -> dict[str, Any]:
    """Writes a trained augmenter as a program, StableHLO, that JAX runs without this package.

    It maps (key, images, uncertainty) to (images, theta): a typed random key of JAX's default kind;
    images float32 [B, H, W, C] in 0..255, any B; uncertainty float32 [B], H / log2 m of a
    classifier; theta float32 [B, 2, 3]. Beside it, under the same name with .json, is written what
    it takes and does.

    Args:
      path: of a file of `save_augmenter`.
      to: of the program, NAME.stablehlo.

    Returns:
      The content of the JSON file.

    Raises:
      ValueError: if the file is not an augmenter's, or `to` has another ending.
      OSError: if one cannot be read or written.

    Source: jax.export, https://docs.jax.dev/en/latest/export/export.html.
    """
    to = Path(to)
    if to.suffix != ".stablehlo":
        raise ValueError(f"{to} must be called NAME.stablehlo")
    loaded = _read(Path(path))
    (batch,) = export.symbolic_shape("batch")
    inputs = (
        jax.eval_shape(jax.random.key, 0),
        jax.ShapeDtypeStruct((batch, *loaded.image_shape), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.float32),
    )
    apply = jax.jit(lambda *inputs: loaded.apply(*inputs)[:2])
    program = export.export(apply, platforms=PLATFORMS)(*inputs)
    about = {
        "program": to.name,
        **_description(loaded),
        "platforms": list(PLATFORMS),
        "jax": jax.__version__,
        "calling_convention_version": program.calling_convention_version,
    }
    write_atomically(to, bytes(program.serialize()))
    write_json(to.with_suffix(".json"), about)
    return about


class _Loaded(NamedTuple):
    """The content of a file."""

    module: StochasticAugmenter
    params: Any
    mean: np.ndarray
    sd: np.ndarray
    image_shape: tuple[int, ...]

    @broadcasts
    def apply(
        self, key: Array, images: Array, uncertainty: Array | None = None
    ) -> tuple[Array, Array, Array | None]:
        """Images of 0..255, uint8 or float32 [B, H, W, C], augmented, with theta and color."""
        inputs = normalize(images, self.mean, self.sd), key, uncertainty
        result: Any = self.module.apply({"params": self.params}, *inputs, method="augment")
        augmented, theta, color = result
        if images.dtype == jnp.uint8:
            return denormalize(augmented, self.mean, self.sd), theta, color
        # A cubic passes the extremes of what it is made of.
        augmented = jnp.clip((augmented * self.sd + self.mean) * 255.0, 0.0, 255.0)
        return augmented.astype(images.dtype), theta, color


def _description(loaded: _Loaded) -> dict[str, Any]:
    """What an exported augmenter takes and does, for people and JSON."""
    module, shape = loaded.module, ["batch", *loaded.image_shape]
    return {
        "inputs": {
            "key": "jax.random.key(seed)",
            "images": {"dtype": "float32", "shape": shape, "range": [0, 255]},
            "uncertainty": {
                "dtype": "float32",
                "shape": ["batch"],
                "range": [0, 1],
                "meaning": "H / log2 m of your classifier's predictions for these images",
                "of_images_never_seen": module.uncertainty,
            },
        },
        "outputs": {
            "images": {"dtype": "float32", "shape": shape, "range": [0, 255]},
            "theta": {
                "dtype": "float32",
                "shape": ["batch", 2, 3],
                "meaning": "output to input positions in normalised (x, y), as in PyTorch's "
                "affine_grid with align_corners=False",
            },
        },
        "normalization": {
            "of": "images / 255, inside of the program",
            "mean": loaded.mean.tolist(),
            "sd": loaded.sd.tolist(),
        },
        "bounds": {
            "units": "tx, ty: 2 is the full width; rotation: radians; the others: as they are",
            **module.bounds._asdict(),
        },
        "color_bounds": module.color
        and {
            "of": "all images, whatever share_transformed is"
            if module.others_shift is not None
            else "the images that get an affine transform",
            "units": "brightness: sd of normalised images; hue: radians; the others: as they are",
            **module.color._asdict(),
        },
        "interpolation": module.interpolation,
        "padding_mode": module.padding_mode,
        "share_transformed": module.share,
        "others_shift": {
            "unit": "share of the width and of the height, by whole pixels, at most",
            "value": module.others_shift,
        },
    }


def _read(path: Path) -> _Loaded:
    """Raises ValueError or OSError."""
    reason = "is not an augmenter's file, or is damaged"
    try:
        # Opened here: np.load leaves a file that is no zip open.
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            if any(part.compress_size != part.file_size for part in file.zip.infolist()):
                raise ValueError("compressed, perhaps a bomb")
            arrays = {name: file[name] for name in file.files}
        about = json.loads(str(arrays.pop("about")))
        if (found := int(about.pop("format"))) != FORMAT:
            reason = f"was written by another version (its format is {found}, this one's {FORMAT})"
            raise ValueError
        shape = tuple(about.pop("image_shape"))
        mean, sd = arrays.pop("mean"), arrays.pop("sd")
        color = about.get("color")  # older files have none
        bounds = {"bounds": AffineBounds(*about["bounds"]), "color": color and ColorBounds(*color)}
        module = StochasticAugmenter(**about | bounds)
        params = traverse_util.unflatten_dict(arrays, sep="/")
        _check(module, params, mean, sd, shape)
    except _DAMAGE as error:
        raise ValueError(f"{path} {reason}") from error
    return _Loaded(module, params, mean, sd, shape)


def _check(
    module: StochasticAugmenter, params: Any, mean: Any, sd: Any, shape: tuple[int, ...]
) -> None:
    """Raises ValueError unless the weights are those of the network, and all numbers sound."""
    for name, value in (("mean", mean), ("sd", sd)):
        if value.shape not in ((), (1,), shape[-1:]) or value.dtype.kind not in "fiu":
            raise ValueError(f"{name} must be [{shape[-1]}], one number a channel, got {value}")
    finite = all(np.isfinite(x).all() for x in jax.tree.leaves((params, mean, sd)))
    if not finite or (sd <= 0).any():
        raise ValueError("weights, mean and sd must be finite, sd above 0")
    if (mean < 0).any() or (np.maximum(mean, sd) > 1).any():
        raise ValueError(f"mean and sd must be of images / 255, in [0, 1], got {mean} and {sd}")
    key = jax.eval_shape(jax.random.key, 0)
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    wanted = jax.eval_shape(module.init, key, image, key)["params"]
    shapes = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (wanted, params)]
    if shapes[0] != shapes[1]:
        raise ValueError('params must be the network\'s own, float32: variables["params"]')
