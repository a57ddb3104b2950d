"""`sign_hash`: a 64-bit bucket of the features, equal for equal queries and for most nearly equal ones."""

from __future__ import annotations

import torch
from torch import Tensor

from honeytrace.ops.checks import check_tensor
from honeytrace.ops.library import call, define
from honeytrace.ops.reference import check_planes


def sign_hash(features: Tensor, planes: Tensor) -> Tensor:
    """Bit j of the bucket says on which side of plane j a query lies: dot(q, plane_j) >= 0.

    Args:
        features: [B, D] float32, float16 or bfloat16; B may be 0.
        planes: [P, D] of the same dtypes, 1 <= P <= 64, finite. They are secret: they reveal the buckets.

    Returns:
        [B] int64; 0 for queries with a NaN or infinite feature. Not differentiable.

    Raises:
        TypeError: an argument of a wrong type or dtype.
        ValueError: wrong shape or device, planes that are not finite.

    Source: Charikar, "Similarity estimation techniques from rounding algorithms" (STOC 2002).
    """
    check_tensor("features", features, 2, "[B, D]")
    check_tensor("planes", planes, 2, "[P, D]")
    check_planes(features, planes)
    bucket: Tensor = call(op, False, features.detach(), planes.detach())
    return bucket


def _fake(features: Tensor, planes: Tensor) -> Tensor:
    return features.new_empty((features.shape[0],), dtype=torch.int64)


op = define("sign_hash", "(Tensor features, Tensor planes) -> Tensor", fake=_fake)
