"""`compose`: a * (1 - mask) + b * mask with a mask that broadcasts, bound by memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .language import OPTIONS, cdiv, jit_unspecialized, power_of_two, tl


@jit_unspecialized("middle", "inner", "outer_step", "middle_step", "inner_step")
def compose_kernel(
    a_ptr: tl.tensor,
    b_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    out_ptr: tl.tensor,
    count: tl.tensor,
    middle: tl.tensor,
    inner: tl.tensor,
    outer_step: tl.tensor,
    middle_step: tl.tensor,
    inner_step: tl.tensor,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Elements in order; the mask of element (x, y, z) of [outer, middle, inner] lies at the three steps.

    FLAT: the mask has an element for each, in order.
    """
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    a = tl.load(a_ptr + offset, mask=inside, other=0.0)
    b = tl.load(b_ptr + offset, mask=inside, other=0.0)
    if FLAT:
        where = offset
    else:
        z = offset % inner
        rest = offset // inner
        where = (rest // middle) * outer_step + (rest % middle) * middle_step + z * inner_step
    m = tl.load(mask_ptr + where, mask=inside, other=0.0).to(tl.float32)
    blended = a.to(tl.float32) * (1.0 - m) + b.to(tl.float32) * m
    # Where the mask is 0 or 1 the sample's own bits are kept: 0 * NaN is NaN.
    out = tl.where(m == 0.0, a, tl.where(m == 1.0, b, blended.to(a.dtype)))
    tl.store(out_ptr + offset, out, mask=inside)


def _collapse(shape: torch.Size, strides: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """The fewest dimensions that walk through the same elements."""
    sizes: list[int] = []
    steps: list[int] = []
    for size, step in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if sizes and steps[-1] == step * size:
            sizes[-1] *= size
            steps[-1] = step
        else:
            sizes.append(size)
            steps.append(step)
    return sizes, steps


def compose(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """a, b contiguous, of one shape and dtype; mask broadcasts to it. -> a's shape and dtype."""
    out = torch.empty_like(a, memory_format=torch.contiguous_format)
    count = a.numel()
    if count == 0:
        return out
    wide = mask.expand(a.shape)
    sizes, steps = _collapse(wide.shape, wide.stride())
    if len(sizes) > 3:
        wide = wide.contiguous()
        sizes, steps = [count], [1]
    flat = steps in ([], [1])
    sizes, steps = [1] * (3 - len(sizes)) + sizes, [0] * (3 - len(steps)) + steps
    block = min(1024, power_of_two(count))
    compose_kernel[(cdiv(count, block),)](
        a, b, wide, out, count, sizes[1], sizes[2], *steps, FLAT=flat, BLOCK=block, num_warps=4, **OPTIONS
    )
    return out
