"""Writes grid_sample.npz: PyTorch's affine_grid and grid_sample, values and gradients.

    pip install torch==2.13.0 && python tests/golden/make_grid_sample.py

Images and cotangents are stored channels last, as the library has them; everything is float32.
"""

import itertools
import pathlib

import numpy as np
import torch
from torch.nn import functional

# name: image [N, H, W, C] and the output's (height, width)
SHAPES = {"rgb": ((3, 5, 7, 3), (4, 6)), "grey": ((2, 6, 4, 1), (6, 4))}


def main() -> None:
    random = np.random.default_rng(0)
    arrays = {}
    for name, (shape, size) in SHAPES.items():
        n, channels = shape[0], shape[-1]
        image = random.normal(size=shape)
        theta = np.eye(2, 3) + random.normal(scale=0.5, size=(n, 2, 3))
        cotangent = random.normal(size=(n, *size, channels))
        inputs = {"image": image, "theta": theta, "cotangent": cotangent}
        inputs = {k: v.astype(np.float32) for k, v in inputs.items()}
        arrays |= {f"{name}/{k}": v for k, v in inputs.items()}
        for align_corners in (False, True):
            for mode, padding_mode in itertools.product(
                ("bilinear", "bicubic", "nearest"), ("zeros", "border", "reflection")
            ):
                case = f"{name}/{mode}/{padding_mode}/{align_corners}"
                tensors = {k: torch.tensor(v) for k, v in inputs.items()}
                tensors["image"].requires_grad_()
                tensors["theta"].requires_grad_()
                grid = functional.affine_grid(
                    tensors["theta"], [n, channels, *size], align_corners=align_corners
                )
                grid.retain_grad()
                out = functional.grid_sample(
                    tensors["image"].permute(0, 3, 1, 2), grid, mode, padding_mode, align_corners
                ).permute(0, 2, 3, 1)
                out.backward(tensors["cotangent"])
                arrays[f"{name}/grid/{align_corners}"] = grid.detach().numpy()
                arrays[f"{case}/out"] = out.detach().numpy()
                arrays[f"{case}/d_image"] = tensors["image"].grad.numpy()
                arrays[f"{case}/d_grid"] = grid.grad.numpy()
                arrays[f"{case}/d_theta"] = tensors["theta"].grad.numpy()
    np.savez_compressed(pathlib.Path(__file__).parent / "grid_sample.npz", **arrays)


if __name__ == "__main__":
    main()
