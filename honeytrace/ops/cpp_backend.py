"""The backend `cpp`: the compiled core `honeytrace._C` behind the op schemas, on the CPU.

The core knows no tensors. Here tensors become pointers, sizes and strides; what it cannot read as it lies
(another dtype, features that are not adjacent) is copied first. Outputs are allocated here. Threads are
torch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from honeytrace import _C
from honeytrace.ops import reference_backend
from honeytrace.ops.bank import pack
from honeytrace.ops.checks import unsigned_seed
from honeytrace.rule import core_rule

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# Looked up once: attribute chains through `torch` are a measurable part of a call for one query.
_float32, _int32, _int64, _bool = torch.float32, torch.int32, torch.int64, torch.bool
_threads = torch.get_num_threads
# Empty tensors like these: new_empty of plain sizes costs half of torch.empty with a dtype.
_float = torch.empty(0, dtype=_float32, device="cpu")
_int, _long, _flag = _float.to(_int32), _float.to(_int64), _float.to(_bool)


def unavailable(device_type: str) -> str | None:
    """The core runs on the CPU only, and on an instruction set that this machine has."""
    if device_type != "cpu":
        return f"it runs on cpu, not on {device_type}"
    try:
        _C.simd_level()
    except (RuntimeError, ValueError) as error:  # HONEYTRACE_SIMD asks for a level that cannot run here
        return str(error)
    return None


def _rows(x: Tensor) -> Tensor:
    """x [B, N] with adjacent columns; rows may be any distance apart."""
    return x if x.is_contiguous() or x.stride(1) == 1 else x.contiguous()


def _plain(x: Tensor) -> Tensor:
    """x as contiguous float32."""
    return x if x.dtype == _float32 and x.is_contiguous() else x.float().contiguous()


def _packed(rows: Tensor, packed: Tensor | None, norms: Tensor | None) -> tuple[Tensor, Tensor]:
    if packed is None or norms is None:
        packed, norms = pack(rows)
        assert packed is not None  # it is there wherever this module can be imported
        assert norms is not None
    return packed, norms


@functools.lru_cache(maxsize=64)
def _vector(values: tuple[float, ...], groups: int) -> Tensor:
    return torch.tensor(values if len(values) == groups else values * groups, dtype=_float32, device="cpu")


_rule = functools.lru_cache(maxsize=64)(core_rule)


def feature_distance(
    features: Tensor, rows: Tensor, packed: Tensor | None, norms: Tensor | None, k: int, metric: int, p: float
) -> tuple[Tensor, Tensor]:
    features = _rows(features)
    packed, norms = _packed(rows, packed, norms)
    (batch, width), (groups, size, _) = features.shape, rows.shape
    distance, indices = _float.new_empty(batch, groups), _int.new_empty(batch, groups, k)
    _C.feature_distance(
        features.data_ptr(),
        _DTYPES[features.dtype],
        batch,
        width,
        features.stride(0),
        packed.data_ptr(),
        norms.data_ptr(),
        groups,
        size,
        k,
        metric,
        p,
        distance.data_ptr(),
        indices.data_ptr(),
        _threads(),
    )
    return distance, indices


def sign_hash(features: Tensor, planes: Tensor) -> Tensor:
    features, planes = _rows(features), _plain(planes)
    batch, width = features.shape
    bucket = _long.new_empty(batch)
    _C.sign_hash(
        features.data_ptr(),
        _DTYPES[features.dtype],
        batch,
        width,
        features.stride(0),
        planes.data_ptr(),
        planes.shape[0],
        bucket.data_ptr(),
        _threads(),
    )
    return bucket


def watermark_mix(
    logits: Tensor,
    similarity: Tensor,
    target_logits: Tensor,
    bucket: Tensor,
    rule: Sequence[float],
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    logits, similarity, target_logits = _rows(logits), _plain(similarity), _plain(target_logits)
    bucket = bucket.contiguous()
    batch, classes = logits.shape
    mixed = logits.new_empty(batch, classes)
    group, flipped = _long.new_empty(batch), _flag.new_empty(batch)
    _C.watermark_mix(
        logits.data_ptr(),
        _DTYPES[logits.dtype],
        batch,
        classes,
        logits.stride(0),
        similarity.data_ptr(),
        target_logits.data_ptr(),
        bucket.data_ptr(),
        similarity.shape[1],
        _rule(tuple(rule)),
        unsigned_seed(seed),
        mixed.data_ptr(),
        group.data_ptr(),
        flipped.data_ptr(),
        _threads(),
    )
    return mixed, group, flipped


def watermark(
    features: Tensor,
    logits: Tensor,
    rows: Tensor,
    packed: Tensor | None,
    norms: Tensor | None,
    target_logits: Tensor,
    planes: Tensor,
    k: int,
    metric: int,
    p: float,
    offset: Sequence[float],
    scale: Sequence[float],
    confidence_weight: float,
    rule: Sequence[float],
    seed: int,
    constant_time: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    features, logits, target_logits, planes = (
        _rows(features),
        _rows(logits),
        _plain(target_logits),
        _plain(planes),
    )
    if packed is None or norms is None:
        packed, norms = _packed(rows, packed, norms)
    (batch, width), (_, classes), (groups, size, _) = features.shape, logits.shape, rows.shape
    mixed = logits.new_empty(batch, classes)
    similarity = _float.new_empty(batch, groups)
    group, flipped = _long.new_empty(batch), _flag.new_empty(batch)
    _C.watermark(
        features.data_ptr(),
        _DTYPES[features.dtype],
        batch,
        width,
        features.stride(0),
        logits.data_ptr(),
        _DTYPES[logits.dtype],
        classes,
        logits.stride(0),
        packed.data_ptr(),
        norms.data_ptr(),
        groups,
        size,
        target_logits.data_ptr(),
        planes.data_ptr(),
        planes.shape[0],
        k,
        metric,
        p,
        _vector(tuple(offset), groups).data_ptr(),
        _vector(tuple(scale), groups).data_ptr(),
        confidence_weight,
        _rule(tuple(rule)),
        unsigned_seed(seed),
        mixed.data_ptr(),
        similarity.data_ptr(),
        group.data_ptr(),
        flipped.data_ptr(),
        _threads(),
        constant_time,
    )
    return mixed, similarity, group, flipped


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "feature_distance": feature_distance,
    "sign_hash": sign_hash,
    "watermark_mix": watermark_mix,
    "watermark": watermark,
    # Element by element, bound by memory: torch's own operators leave nothing to gain.
    "compose": reference_backend.compose,
}
