"""`sign_hash`: on which side of up to 64 planes a query lies, as one 64-bit word.

A product of two thin matrices on the tensor cores in 3xTF32, which is as near to the exact dot product as a
sum in float32. One tile shape for every batch: a query's bits depend on nothing beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .language import INTERPRETED, OPTIONS, cdiv, jit_unspecialized, tl
from .numerics import is_finite


@jit_unspecialized("batch", "planes")
def sign_hash_kernel(
    features_ptr: tl.tensor,
    stride: tl.tensor,
    planes_ptr: tl.tensor,
    bucket_ptr: tl.tensor,
    batch: tl.tensor,
    width: tl.tensor,
    planes: tl.tensor,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """One program for BLOCK_Q queries; planes [P, D] contiguous. Bit j is dot(q, plane_j) >= 0."""
    query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    plane = tl.arange(0, 64)
    inside = query < batch
    step = tl.arange(0, BLOCK_D)
    q_rows = features_ptr + query.to(tl.int64)[:, None] * stride
    p_rows = planes_ptr + plane[:, None] * width
    broken = tl.zeros([BLOCK_Q], tl.int32)
    dot = tl.zeros([BLOCK_Q, 64], tl.float32)
    for start in range(0, width, BLOCK_D):
        d = start + step
        q = tl.load(q_rows + d[None, :], mask=inside[:, None] & (d < width)[None, :], other=0.0).to(
            tl.float32
        )
        p = tl.load(p_rows + d[None, :], mask=(plane < planes)[:, None] & (d < width)[None, :], other=0.0)
        finite = is_finite(q)
        broken = tl.maximum(broken, tl.max(tl.where(finite, 0, 1), axis=1))
        dot = tl.dot(tl.where(finite, q, 0.0), tl.trans(p.to(tl.float32)), dot, input_precision="tf32x3")
    bits = (dot >= 0).to(tl.int64) << plane[None, :].to(tl.int64)
    word = tl.sum(tl.where((plane < planes)[None, :], bits, 0), axis=1)
    tl.store(bucket_ptr + query, tl.where(broken == 0, word, 0), mask=inside)


BLOCK_Q, BLOCK_D = (16, 64) if not INTERPRETED else (64, 64)


def sign_hash(features: Tensor, planes: Tensor) -> Tensor:
    """features [B, D] with adjacent columns, planes [P, D] contiguous, 1 <= P <= 64 -> [B] int64."""
    batch, width = features.shape
    bucket = features.new_empty(batch, dtype=torch.int64)
    if batch > 0:
        sign_hash_kernel[(cdiv(batch, BLOCK_Q),)](
            features,
            features.stride(0),
            planes,
            bucket,
            batch,
            width,
            planes.shape[0],
            BLOCK_Q=BLOCK_Q,
            BLOCK_D=BLOCK_D,
            num_warps=4,
            num_stages=2,
            **OPTIONS,
        )
    return bucket
