"""`compose`: two samples and a mask make a trigger."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from honeytrace.ops.checks import KERNEL_DTYPES
from honeytrace.ops.library import call, define
from honeytrace.ops.reference import check_compose


def compose(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """a * (1 - mask) + b * mask: exactly a where the mask is 0, exactly b where it is 1 (even beside NaN).

    Args:
        a, b: samples of one shape [B, ...] and dtype, float32, float16 or bfloat16.
        mask: values in [0, 1], of these dtypes, broadcastable to a's shape.

    Returns:
        a's shape and dtype; the sum is formed in float32. Differentiable in all three.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: shapes or devices that do not fit.

    Source: MEA-Defender (arXiv 2401.15239), section 4: watermark samples combined from two source classes.
    """
    check_compose(a, b, mask, KERNEL_DTYPES)
    composed: Tensor = call(op, a.requires_grad or b.requires_grad or mask.requires_grad, a, b, mask)
    return composed


def _fake(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return a.new_empty(a.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b, mask = ctx.saved_tensors
    wide, m = grad.float(), mask.float()
    return (
        (wide * (1 - m)).to(a.dtype),
        (wide * m).to(b.dtype),
        (wide * (b.float() - a.float())).sum_to_size(mask.shape).to(mask.dtype),
    )


op = define(
    "compose",
    "(Tensor a, Tensor b, Tensor mask) -> Tensor",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
