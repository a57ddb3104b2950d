"""honeytrace._C on NumPy arrays: addresses and sizes filled in, outputs allocated and poisoned, nothing else.

Features and logits are float32 or float16 arrays; bfloat16 is passed as uint16 bit patterns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from honeytrace import _C

Array = NDArray
METRICS = {"l1": 0, "l2": 1, "lp": 2, "cosine": 3}
DTYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.uint16): 2}
# low_confidence, low_power, high_confidence, high_power, space, strength, mixing_power, flip_power, flip_bins
PLAIN_RULE = (0.0, 1.0, 1.0, 1.0, 1, 0.2, 1.0, 1.0, 0)


class Packed(NamedTuple):
    rows: Array
    packed: Array
    norms: Array


def pack(rows: Array) -> Packed:
    """rows float32 [G, M, D]."""
    groups, size, width = rows.shape
    packed = np.full(_C.packed_size(groups, size, width), np.nan, np.float32)
    norms = np.full((groups, -(-size // _C.LANES) * _C.LANES), np.nan, np.float32)
    rows = np.ascontiguousarray(rows)
    _C.pack_bank(rows.ctypes.data, groups, size, width, packed.ctypes.data, norms.ctypes.data)
    return Packed(rows, packed, norms)


def source(x: Array) -> tuple[int, int, int, int, int]:
    """address, dtype, rows, columns, row stride in elements"""
    assert x.ndim == 2
    assert x.size <= 1 or x.shape[1] == 1 or x.strides[1] == x.itemsize
    return x.ctypes.data, DTYPES[x.dtype], x.shape[0], x.shape[1], x.strides[0] // x.itemsize


def feature_distance(
    features: Array, bank: Packed, *, k: int, metric: str = "l1", p: float = 0.0, threads: int = 1
) -> tuple[Array, Array]:
    """distance [B, G], index [B, G, k]"""
    groups, size, _ = bank.rows.shape
    distance = np.full((len(features), groups), np.nan, np.float32)
    index = np.full((len(features), groups, k), -1, np.int32)
    _C.feature_distance(
        *source(features),
        bank.packed.ctypes.data,
        bank.norms.ctypes.data,
        groups,
        size,
        k,
        METRICS[metric],
        p,
        distance.ctypes.data,
        index.ctypes.data,
        threads,
    )
    return distance, index


def sign_hash(features: Array, planes: Array, *, threads: int = 1) -> Array:
    bucket = np.full(len(features), -77, np.int64)
    planes = np.ascontiguousarray(planes, np.float32)
    _C.sign_hash(*source(features), planes.ctypes.data, len(planes), bucket.ctypes.data, threads)
    return bucket


class Mixed(NamedTuple):
    logits: Array
    group: Array
    flipped: Array


def _empty_mixed(logits: Array) -> Mixed:
    batch = len(logits)
    flipped = np.full(batch, 7, np.uint8).view(np.bool_)
    return Mixed(np.full(logits.shape, 99, logits.dtype), np.full(batch, -7, np.int64), flipped)


def watermark_mix(
    logits: Array,
    similarity: Array,
    target_logits: Array,
    bucket: Array,
    *,
    rule: tuple = PLAIN_RULE,
    seed: int = 0,
    threads: int = 1,
) -> Mixed:
    out = _empty_mixed(logits)
    similarity = np.ascontiguousarray(similarity, np.float32)
    target_logits = np.ascontiguousarray(target_logits, np.float32)
    bucket = np.ascontiguousarray(bucket, np.int64)
    _C.watermark_mix(
        *source(logits),
        similarity.ctypes.data,
        target_logits.ctypes.data,
        bucket.ctypes.data,
        len(target_logits),
        rule,
        seed,
        out.logits.ctypes.data,
        out.group.ctypes.data,
        out.flipped.ctypes.data,
        threads,
    )
    return out


def watermark(
    features: Array,
    logits: Array,
    bank: Packed,
    target_logits: Array,
    planes: Array,
    *,
    k: int,
    metric: str = "l1",
    p: float = 0.0,
    offset: float | Array = 1.0,
    scale: float | Array = 1.0,
    confidence_weight: float = 0.0,
    rule: tuple = PLAIN_RULE,
    seed: int = 0,
    threads: int = 1,
    constant_time: bool = False,
) -> tuple[Array, Mixed]:
    """similarity [B, G], and the mixed answers"""
    groups, size, _ = bank.rows.shape
    offsets = np.full(groups, offset, np.float32)
    scales = np.full(groups, scale, np.float32)
    target_logits = np.ascontiguousarray(target_logits, np.float32)
    planes = np.ascontiguousarray(planes, np.float32)
    similarity = np.full((len(features), groups), np.nan, np.float32)
    out = _empty_mixed(logits)
    address, dtype, _, classes, stride = source(logits)
    _C.watermark(
        *source(features),
        address,
        dtype,
        classes,
        stride,
        bank.packed.ctypes.data,
        bank.norms.ctypes.data,
        groups,
        size,
        target_logits.ctypes.data,
        planes.ctypes.data,
        len(planes),
        k,
        METRICS[metric],
        p,
        offsets.ctypes.data,
        scales.ctypes.data,
        confidence_weight,
        rule,
        seed,
        out.logits.ctypes.data,
        similarity.ctypes.data,
        out.group.ctypes.data,
        out.flipped.ctypes.data,
        threads,
        constant_time,
    )
    return similarity, out
