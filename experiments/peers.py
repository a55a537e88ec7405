"""What `experiments.benchmark` compares with: the same work in jax.scipy and in other libraries.

A library that is not installed has no contenders.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from PIL import Image, ImageEnhance, ImageOps

from maxent_aug import OPERATIONS, steps

PEERS = {
    "PyTorch": "torch", "kornia": "kornia", "OpenCV": "cv2", "dm_pix": "dm_pix", "keras": "keras"
}  # fmt: skip
PADDING = {  # jax.scipy's and OpenCV's names
    "zeros": ("constant", "BORDER_CONSTANT"),
    "border": ("nearest", "BORDER_REPLICATE"),
    "reflection": ("reflect", "BORDER_REFLECT"),
}
Contender = Callable[[], tuple[Any, ...]]  # returns what is compared


def peer(name: str) -> ModuleType | None:
    """The module of a peer, or None if it is not installed."""
    os.environ.setdefault("KERAS_BACKEND", "jax")  # its own choice is TensorFlow
    try:
        return importlib.import_module(PEERS[name])
    except ImportError:
        return None


def _in_pixels(theta: Any, size: Sequence[int]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(a, b, c), (d, e, f) of x = a column + b row + c, y = d column + e row + f, each [B].

    theta [B, 2, 3] may be of any library.
    """
    height, width = size
    a, b = theta[:, 0, 0], theta[:, 0, 1] * width / height
    d, e = theta[:, 1, 0] * height / width, theta[:, 1, 1]
    x, y = (width - 1) / 2, (height - 1) / 2
    c = theta[:, 0, 2] * width / 2 + x - a * x - b * y
    f = theta[:, 1, 2] * height / 2 + y - d * x - e * y
    return (a, b, c), (d, e, f)


def positions(theta: Any, size: Sequence[int]) -> list[Any]:
    """x and y [B, H, W] in pixels."""
    column, row = np.arange(size[1]), np.arange(size[0])[:, None]
    rows = [[v[:, None, None] for v in line] for line in _in_pixels(theta, size)]
    return [a * column + b * row + c for a, b, c in rows]


def scipy_warp(theta: jax.Array, image: jax.Array, mode: str) -> jax.Array:
    x, y = positions(theta, image.shape[1:3])
    plane = lambda plane, x, y: map_coordinates(plane, [y, x], order=1, mode=mode)  # noqa: E731
    return jax.vmap(jax.vmap(plane, (-1, None, None), -1))(image, x, y)


def dm_pix_warp(dm_pix: ModuleType, theta: jax.Array, image: jax.Array) -> jax.Array:
    (a, b, c), (d, e, f) = _in_pixels(theta, image.shape[1:3])  # dm_pix has y before x
    zero, one = jnp.zeros_like(a), jnp.ones_like(a)
    matrix = jnp.stack([e, d, zero, b, a, zero, zero, zero, one], -1).reshape(-1, 3, 3)
    warp = lambda i, m, o: dm_pix.affine_transform(i, m, offset=o, mode="constant")  # noqa: E731
    return jax.vmap(warp)(image, matrix, jnp.stack([f, c, zero], -1))


def torch_warps(
    theta: np.ndarray,
    image: np.ndarray,
    cotangent: np.ndarray,
    dtype: str,
    sampling: dict[str, str],
    gradients: int,
) -> dict[str, Contender]:
    """PyTorch and kornia; in float32 between the images' dtype, since a grid has the image's.

    `sampling` are mode and padding_mode, which these call as we do.
    """
    if (torch := peer("PyTorch")) is None:
        return {}
    place = torch_device(torch)
    planes, d_out = (
        torch.tensor(x, device=place).permute(0, 3, 1, 2).contiguous().to(getattr(torch, dtype))
        for x in (image, cotangent)
    )
    leaves = torch.tensor(theta, device=place), planes
    leaves = [x.requires_grad_(gradients > i) for i, x in enumerate(leaves)]

    def run(warp: Callable[..., Any], threads: int) -> tuple[Any, ...]:
        torch.set_num_threads(threads)
        out = warp(leaves[0], leaves[1].float()).to(d_out.dtype)
        if gradients == 0:
            return (out,)
        return out.detach(), *torch.autograd.grad(out, leaves[:gradients], d_out)

    sample, threads = partial(_torch_warp, torch, sampling), _thread_counts(torch)
    found = {name: partial(run, sample, n) for name, n in threads.items()}
    reflects = sampling["padding_mode"] == "reflection"  # kornia does so at the centres
    if not reflects and (kornia := peer("kornia")):
        found["kornia"] = partial(
            run, partial(_kornia_warp, torch, kornia, sampling), threads["PyTorch"]
        )
    return found


def _torch_warp(torch: ModuleType, sampling: dict[str, str], theta: Any, image: Any) -> Any:
    nn = torch.nn.functional
    grid = nn.affine_grid(theta, image.shape, align_corners=False)
    return nn.grid_sample(image, grid, **sampling, align_corners=False)


def _kornia_warp(
    torch: ModuleType, kornia: ModuleType, sampling: dict[str, str], theta: Any, image: Any
) -> Any:
    size = tuple(image.shape[2:])
    rows = [torch.stack(row, -1) for row in _in_pixels(theta, size)]
    last = torch.tensor([0.0, 0.0, 1.0], device=theta.device).expand_as(rows[0])
    input_to_output = torch.linalg.inv(torch.stack([*rows, last], 1))[:, :2]
    return kornia.geometry.warp_affine(image, input_to_output, size, **sampling)


def _thread_counts(torch: ModuleType) -> dict[str, int]:
    """Contenders by name. Threads that wait for each other may be slower than one."""
    found = {"PyTorch": os.cpu_count() or 1}
    return found if torch_device(torch) == "cuda" else found | {"PyTorch, 1 thread": 1}


def torch_device(torch: ModuleType) -> str:
    """Beside JAX on its GPU, else on the CPU."""
    gpu = jax.default_backend() == "gpu" and torch.cuda.is_available()
    return "cuda" if gpu else "cpu"


def opencv_warps(theta: np.ndarray, image: np.ndarray, border: str) -> dict[str, Contender]:
    if (cv2 := peer("OpenCV")) is None:
        return {}
    rows = _in_pixels(theta.astype(np.float64), image.shape[1:3])
    matrices = np.stack([np.stack(row, -1) for row in rows], 1)
    out, size = np.empty_like(image), image.shape[2:0:-1]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP

    def run(threads: int) -> tuple[np.ndarray]:
        cv2.setNumThreads(threads)
        for source, matrix, target in zip(image, matrices, out, strict=True):
            cv2.warpAffine(source, matrix, size, target, flags, getattr(cv2, border))
        return (out,)

    return {"OpenCV, 1 thread": partial(run, 1), "OpenCV": partial(run, -1)}


def torch_steps(
    model: steps.ModelState, images: np.ndarray, labels: np.ndarray, precision: str
) -> dict[str, Contender]:
    """Training steps of a classifier of basic blocks with the same weights, by Adam at 1e-3."""
    if (torch := peer("PyTorch")) is None:
        return {}
    inputs = (torch, model, images, labels, precision)
    return {name: _torch_step(*inputs, n) for name, n in _thread_counts(torch).items()}


def _torch_step(
    torch: ModuleType,
    model: steps.ModelState,
    images: np.ndarray,
    labels: np.ndarray,
    precision: str,
    threads: int,
) -> Contender:
    """Channels last; autocast for bfloat16."""
    nn, place = torch.nn.functional, torch_device(torch)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"

    def put(x: Any) -> Any:
        x = torch.tensor(np.asarray(x), device=place)
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    def weight(x: Any) -> Any:  # HWIO to OIHW
        return put(np.transpose(x, (3, 2, 0, 1)) if np.ndim(x) == 4 else x).requires_grad_()

    params = jax.tree.map(weight, model.params)
    statistics = jax.tree.map(put, model.batch_stats)
    pixels, targets = put(np.transpose(images, (0, 3, 1, 2))), put(labels).long()
    adam = torch.optim.Adam(jax.tree.leaves(params), lr=1e-3, fused=True)

    def run() -> tuple[Any]:
        torch.set_num_threads(threads)
        with torch.autocast(place, torch.bfloat16, enabled=precision == "bfloat16"):
            x = nn.relu(_torch_layer(nn, pixels, params, statistics, 0))
            for index in range(sum("Block" in name for name in params)):
                name = f"BasicBlock_{index}"
                x = _torch_block(nn, x, params[name], statistics[name])
        logits = x.mean((2, 3), dtype=torch.float32) @ params["Dense_0"]["kernel"]
        loss = nn.cross_entropy(logits + params["Dense_0"]["bias"], targets)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return (loss.detach(),)

    return run


def _torch_block(nn: ModuleType, x: Any, params: Any, statistics: Any) -> Any:
    stride = 2 if len(params["Conv_0"]["kernel"]) > x.shape[1] else 1
    y = nn.relu(_torch_layer(nn, x, params, statistics, 0, stride))
    y = _torch_layer(nn, y, params, statistics, 1)
    if "Conv_2" in params:
        x = _torch_layer(nn, x, params, statistics, 2, stride)
    return nn.relu(y + x)


def _torch_layer(
    nn: ModuleType, x: Any, params: Any, statistics: Any, index: int, stride: int = 1
) -> Any:
    """A convolution and its batch normalisation."""
    kernel, norm = params[f"Conv_{index}"]["kernel"], params[f"BatchNorm_{index}"]
    padding = kernel.shape[-1] // 2
    if padding and stride == 2:  # as flax pads
        x, padding = nn.pad(x, (0, 1, 0, 1)), 0
    x = nn.conv2d(x, kernel, stride=stride, padding=padding)
    running = statistics[f"BatchNorm_{index}"]
    return nn.batch_norm(x, running["mean"], running["var"], norm["scale"], norm["bias"], True)


def pillow_policy(images: np.ndarray, operation: np.ndarray, magnitude: np.ndarray) -> Contender:
    """operation, magnitude [n, B] in turn on uint8 images [B, H, W, C], one image at a time."""
    names = np.array(OPERATIONS)[operation].T.tolist()
    magnitudes = magnitude.T.tolist()

    def run() -> tuple[np.ndarray]:
        out = np.empty_like(images)
        for array, image, drawn in zip(
            out, images, zip(names, magnitudes, strict=True), strict=True
        ):
            picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
            for name, value in zip(*drawn, strict=True):
                picture = pillow_operation(picture, name, value)
            array[...] = np.asarray(picture).reshape(array.shape)
        return (out,)

    return run


def pillow_operation(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    """One of OPERATIONS, as torchvision has Pillow do it."""
    pixels = int(magnitude)
    affine = {
        "shear_x": (1, magnitude, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, magnitude, 1, 0),
        "translate_x": (1, 0, -pixels, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, -pixels),
    }
    enhancers = {
        "brightness": ImageEnhance.Brightness, "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast, "sharpness": ImageEnhance.Sharpness,
    }  # fmt: skip
    if name in affine:
        return image.transform(image.size, Image.Transform.AFFINE, affine[name])
    if name in enhancers:
        return enhancers[name](image).enhance(1 + magnitude)
    match name:
        case "identity":
            return image
        case "rotate":
            return image.rotate(magnitude)
        case "posterize":
            return ImageOps.posterize(image, pixels)
        case "solarize":
            return ImageOps.solarize(image, magnitude)  # pyright: ignore[reportArgumentType]
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "invert":
            return ImageOps.invert(image)
    raise ValueError(f"{name} is none of {OPERATIONS}")


def keras_rand_augment(images: jax.Array, n: int, factor: float) -> dict[str, Contender]:
    """keras' layer, which draws n operations for all of a batch, compiled by its JAX backend."""
    if (keras := peer("keras")) is None or keras.backend.backend() != "jax":
        return {}
    layer = keras.layers.RandAugment((0, 255), n, factor, interpolation="nearest")
    layer.build(images.shape)
    run = jax.jit(lambda seeds, images: layer.stateless_call([], seeds, images, training=True))
    seeds = [variable.value for variable in layer.non_trainable_variables]
    return {"keras": partial(run, seeds, images)}
