"""`feature_distance`: how far queries lie from the rows of each trigger group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from honeytrace.ops.bank import Bank
from honeytrace.ops.checks import (
    KERNEL_DTYPES,
    check_device,
    check_finite,
    check_k,
    check_not_empty,
    check_size,
    check_tensor,
)
from honeytrace.ops.library import call, define, is_plain, kernel
from honeytrace.rule import METRICS, check_integer, check_metric

_BLOCK = 1 << 22  # elements of the largest temporary of the backward pass


def bank_tensors(bank: Bank | Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """rows float32 [G, M, D], packed and norms of a bank; a raw tensor has no packed form."""
    if isinstance(bank, Bank):
        return bank.rows, bank.packed, bank.norms
    if isinstance(bank, Tensor) and bank.dim() == 2:
        bank = bank[None]
    check_tensor("bank", bank, 3, "[G, M, D] or [M, D]")
    check_not_empty("bank", bank, 0, "[G, M, D] or [M, D]")
    check_finite("bank", bank)
    return bank.to(torch.float32), None, None


def check_queries(features: Tensor, rows: Tensor, k: int) -> None:
    """The checks of `features` against a bank's rows."""
    check_tensor("features", features, 2, "[B, D]")
    check_size("features", features, 1, "D", rows.shape[2], "bank")
    check_device("bank", rows, features.device, "features")
    check_k(k, rows.shape[1])


def feature_distance(
    features: Tensor, bank: Bank | Tensor, *, k: int = 10, metric: str = "l1", p: float | None = None
) -> Tensor:
    """Mean of the k smallest distances of each query to the rows of each group.

    Args:
        features: [B, D] float32, float16 or bfloat16; B may be 0.
        bank: a `Bank`, or a tensor [G, M, D] or [M, D] (then G = 1), which is packed anew at every call.
        k: number of nearest rows, 1 <= k <= M. Default 10.
        metric: "l1" sum|q-b|/D (default), "l2" sqrt(sum(q-b)^2/D), "lp" (sum|q-b|^p/D)^(1/p),
            "cosine" 1-q.b/(|q||b|), 1 where a norm is 0.
        p: exponent of "lp", finite, >= 1; None with the other metrics.

    Returns:
        [B, G] float32; +inf for queries with a NaN or infinite feature. Differentiable in features and bank
        for every metric, with subgradient 0 where |x| or the root has a kink and for cosine at norm 0; which
        rows are the nearest counts as constant.

    Raises:
        TypeError: an argument of a wrong type or dtype (float64 is for `honeytrace.reference`).
        ValueError: wrong shape, device, k, metric or p; a bank with NaN or infinite values.

    Source: Neural Honeytrace (arXiv 2501.09328), section 4; the mean of k nearest as in its published code.
    """
    if not torch.compiler.is_compiling() and isinstance(bank, Bank) and isinstance(features, Tensor):
        quick = _quick_distance(features, bank, k, metric, p)
        if quick is not None:
            return quick
    rows, packed, norms = bank_tensors(bank)
    code, exponent = check_metric(metric, p)
    check_queries(features, rows, check_integer("k", k, 1, 2**31 - 1))
    distance: Tensor = call(
        op, features.requires_grad or rows.requires_grad, features, rows, packed, norms, k, code, exponent
    )[0]
    return distance


def _quick_distance(features: Tensor, bank: Bank, k: int, metric: str, p: float | None) -> Tensor | None:
    """The distance where nothing is wrong and nobody listens, past the dispatcher; else None."""
    rows, shape = bank.rows, features.shape
    if (
        len(shape) != 2
        or shape[1] != bank.features
        or features.dtype not in KERNEL_DTYPES
        or k.__class__ is not int
        or not 1 <= k <= bank.size
        or (torch.is_grad_enabled() and (features.requires_grad or rows.requires_grad))
        or not is_plain(features, rows)
    ):
        return None
    code, exponent = check_metric(metric, p)
    distance: Tensor = kernel("feature_distance")(features, rows, bank.packed, bank.norms, k, code, exponent)[
        0
    ]
    return distance


def _fake(
    features: Tensor, rows: Tensor, packed: Tensor | None, norms: Tensor | None, k: int, metric: int, p: float
) -> tuple[Tensor, Tensor]:
    batch, groups = features.shape[0], rows.shape[0]
    return (
        features.new_empty((batch, groups), dtype=torch.float32),
        features.new_empty((batch, groups, k), dtype=torch.int32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, rows, _, _, _, ctx.metric, ctx.p = inputs
    ctx.save_for_backward(features, rows, output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    features, rows, indices = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    of_features, of_rows = distance_backward(
        grad, features, rows, indices, METRICS[ctx.metric], ctx.p, wanted
    )
    return of_features, of_rows, None, None, None, None, None


def distance_backward(
    grad: Tensor,
    features: Tensor,
    rows: Tensor,
    indices: Tensor,
    metric: str,
    p: float,
    wanted: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the mean distance to the rows that `indices` names.

    Args:
        grad: [B, G], gradient of the distance.
        features: [B, D]; rows: [G, M, D]; indices: [B, G, k].
        metric, p: as `feature_distance`.
        wanted: whether the gradients of features and of rows are wanted.

    Returns:
        gradients of features and rows in their shapes and dtypes, None where not wanted. Queries with a
        feature that is not finite have gradient 0.
    """
    groups, size, width = rows.shape
    k = indices.shape[2]
    finite = torch.isfinite(features).all(dim=1)
    q = torch.where(finite[:, None], features, 0.0).to(rows.dtype)
    share = torch.where(finite[:, None], grad, 0.0).to(rows.dtype)[:, :, None, None] / k
    flat_rows = rows.reshape(groups * size, width)
    flat = indices.long() + size * torch.arange(groups, device=rows.device)[:, None]
    step = max(1, _BLOCK // (groups * k * width))
    of_features: list[Tensor] = []
    of_rows = torch.zeros_like(flat_rows) if wanted[1] else None
    for start in range(0, len(q) if any(wanted) else 0, step):
        block = slice(start, start + step)
        toward_q, toward_b = _slopes(q[block, None, None, :], flat_rows[flat[block]], metric, p)
        of_features.append((share[block] * toward_q).sum(dim=(1, 2)))
        if of_rows is not None:
            each = (share[block] * toward_b).reshape(-1, width)
            of_rows = of_rows.index_add(0, flat[block].reshape(-1), each)
    return (
        torch.cat([q[:0], *of_features]).to(features.dtype) if wanted[0] else None,
        of_rows.reshape(rows.shape) if of_rows is not None else None,
    )


def _slopes(q: Tensor, b: Tensor, metric: str, p: float) -> tuple[Tensor, Tensor]:
    """Derivatives of the distance of q [.., D] and b [.., D] in each, 0 wherever there is a kink."""
    width = b.shape[-1]
    if metric == "cosine":
        q_norm, b_norm = (torch.linalg.vector_norm(x.double(), dim=-1, keepdim=True) for x in (q, b))
        zero = (q_norm == 0) | (b_norm == 0)
        u, v = q / torch.where(zero, 1.0, q_norm), b / torch.where(zero, 1.0, b_norm)
        cosine = (u * v).sum(dim=-1, keepdim=True)
        toward_q = torch.where(zero, 0.0, (cosine * u - v) / torch.where(zero, 1.0, q_norm))
        toward_b = torch.where(zero, 0.0, (cosine * v - u) / torch.where(zero, 1.0, b_norm))
        return toward_q.to(q.dtype), toward_b.to(b.dtype)
    difference = q - b
    if metric == "l1" or (metric == "lp" and p == 1):
        toward_q = difference.sign() / width
    else:
        # With m = mean |x|^p, the derivative of m^(1/p) is sign(x) |x|^(p-1) / (D m^((p-1)/p)). Taken
        # relative to the largest |x| nothing under- or overflows.
        exponent = 2.0 if metric == "l2" else p
        top = difference.abs().amax(dim=-1, keepdim=True)
        relative = difference.abs() / torch.where(top > 0, top, 1.0)
        mean = relative.pow(exponent).mean(dim=-1, keepdim=True)
        root = torch.where(top > 0, mean, 1.0).pow((exponent - 1) / exponent)
        toward_q = difference.sign() * relative.pow(exponent - 1) / (width * root)
    return toward_q, -toward_q


op = define(
    "feature_distance",
    "(Tensor features, Tensor rows, Tensor? packed, Tensor? norms, int k, int metric, float p)"
    " -> (Tensor distance, Tensor indices)",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
