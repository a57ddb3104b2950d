"""Small random changes that leave an image's class as it is."""

import math

import torch
from torch import Tensor
from torch.nn import functional


def augment(
    inputs: Tensor,
    generator: torch.Generator,
    *,
    rotation: float = 12.0,
    scale: float = 0.1,
    shift: float = 1.0,
    noise: float = 0.05,
) -> Tensor:
    """Turn, scale and move each image by its own random amount, then add noise.

    One affine map for each image, sampled bilinearly, zeros outside; Gaussian noise; cut to [0, 1]. Fits
    ``honeytrace.training.fit(augment=...)``.

    Args:
        inputs: floating point [N, channels, H, W] in [0, 1].
        generator: the only source of randomness, on the device of `inputs`.
        rotation: up to this many degrees in either direction.
        scale: up to this share larger or smaller.
        shift: up to this many pixels along each axis.
        noise: standard deviation of the noise on each value.

    Returns:
        [N, channels, H, W], dtype of `inputs`.

    Raises:
        ValueError: `inputs` has another number of dimensions.
    """
    if inputs.dim() != 4:
        raise ValueError(f"inputs must have shape [N, channels, H, W], got {list(inputs.shape)}")
    count, _, height, width = inputs.shape
    dtype, device = inputs.dtype, inputs.device
    turn, size, down, right = 2 * torch.rand(4, count, generator=generator, dtype=dtype, device=device) - 1
    angle = turn * math.radians(rotation)
    size = 1 + scale * size
    # grid_sample asks, for each pixel of the result, where to look in the input, in units of half a side.
    rows = torch.stack(
        [
            torch.stack([angle.cos() / size, -angle.sin() / size, 2 * shift / width * right], dim=1),
            torch.stack([angle.sin() / size, angle.cos() / size, 2 * shift / height * down], dim=1),
        ],
        dim=1,
    )
    grid = functional.affine_grid(rows, list(inputs.shape), align_corners=False)
    moved = functional.grid_sample(inputs, grid, align_corners=False)
    moved += noise * torch.randn(moved.shape, generator=generator, dtype=dtype, device=device)
    return moved.clamp_(0, 1)
