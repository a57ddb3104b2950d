"""The backend `triton`: the kernels of `honeytrace.kernels` behind the op schemas.

It runs on CUDA tensors, and on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1 before Triton is
imported), which is how it is tested without a GPU.

No call waits for the device. What a rule needs on the device (a few numbers) is sent there once and stays, so
that CUDA graphs may keep pointing at it; like the compilation of the kernels this happens at the first call,
which must not be the one that is captured.

The gradient of `feature_distance` is the shared one of `honeytrace.ops.feature_distance`: it gathers k rows
for a query, which is bound by memory and done by torch's own gather and index_add at that bound, and it is
needed by those who attack through the watermark, never in an answer.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from honeytrace.kernels import compose as compose_kernels
from honeytrace.kernels import feature_distance as distance_kernels
from honeytrace.kernels import sign_hash as hash_kernels
from honeytrace.kernels import watermark_mix as mix_kernels
from honeytrace.kernels.language import INTERPRETED
from honeytrace.ops.bank import pack_panels
from honeytrace.ops.registry import BackendUnavailable

P = ParamSpec("P")
T = TypeVar("T")

_interpreter = threading.Lock()  # it keeps the position in the grid in a global variable


def unavailable(device_type: str) -> str | None:
    """CUDA tensors when compiled; CPU tensors when interpreted, since the interpreter was loaded instead."""
    if device_type == "cpu":
        return None if INTERPRETED else "it runs on cpu only under its interpreter, with TRITON_INTERPRET=1"
    if device_type != "cuda":
        return f"it runs on cuda, not on {device_type}"
    if INTERPRETED:
        return "TRITON_INTERPRET=1 loaded its interpreter, which runs on cpu"
    if not torch.cuda.is_available():
        return "no GPU is visible to torch"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or above"
    return None


def _on_device(function: Callable[P, T]) -> Callable[P, T]:
    """Launch on the device of the tensors, whichever is current; one call at a time in the interpreter."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        first = args[0]
        assert isinstance(first, Tensor)
        if INTERPRETED:
            with _interpreter:
                return function(*args, **kwargs)
        guard = torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
        with guard:
            return function(*args, **kwargs)

    return wrapper


def _rows(x: Tensor) -> Tensor:
    """x [B, N] with adjacent columns, and its values resolved (a lazily negated tensor is not)."""
    return (x if x.stride(1) == 1 else x.contiguous()).resolve_neg()


def _plain(x: Tensor) -> Tensor:
    """x as contiguous float32."""
    return x.to(torch.float32).contiguous().resolve_neg()


def _panels(rows: Tensor, packed: Tensor | None, norms: Tensor | None) -> tuple[Tensor, Tensor]:
    """The bank in panels of 16 rows. On the CPU it is laid out for the compiled core, in other panels."""
    return pack_panels(rows) if packed is None or norms is None or not rows.is_cuda else (packed, norms)


@functools.cache
def _vector(values: tuple[float, ...], count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` on the device for good; a single one is repeated."""
    repeated = values if len(values) == count else values * count
    return torch.tensor(repeated, dtype=dtype, device=device)


@_on_device
def feature_distance(
    features: Tensor, rows: Tensor, packed: Tensor | None, norms: Tensor | None, k: int, metric: int, p: float
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = distance_kernels.feature_distance(
        _rows(features), rows.contiguous(), *_panels(rows, packed, norms), k, metric, p
    )
    return found


@_on_device
def sign_hash(features: Tensor, planes: Tensor) -> Tensor:
    bucket: Tensor = hash_kernels.sign_hash(_rows(features), _plain(planes))
    return bucket


@_on_device
def watermark_mix(
    logits: Tensor,
    similarity: Tensor,
    target_logits: Tensor,
    bucket: Tensor,
    rule: Sequence[float],
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    numbers = tuple(rule)
    mixed, _, group, flipped = mix_kernels.watermark_mix(
        _rows(logits),
        _plain(similarity),
        _plain(target_logits),
        bucket.contiguous(),
        _vector(numbers, len(numbers), torch.float64, logits.device),
        int(numbers[4]),
        seed,
    )
    return mixed, group, flipped


@_on_device
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
    if constant_time:
        raise BackendUnavailable("backend 'triton' has no constant_time watermark; it is for the CPU")
    features, numbers, groups, device = _rows(features), tuple(rule), rows.shape[0], features.device
    distance, _ = distance_kernels.feature_distance(
        features, rows.contiguous(), *_panels(rows, packed, norms), k, metric, p
    )
    mixed, similarity, group, flipped = mix_kernels.watermark_mix(
        _rows(logits),
        distance,
        _plain(target_logits),
        hash_kernels.sign_hash(features, _plain(planes)),
        _vector(numbers, len(numbers), torch.float64, device),
        int(numbers[4]),
        seed,
        offset=_vector(tuple(offset), groups, torch.float32, device),
        scale=_vector(tuple(scale), groups, torch.float32, device),
        confidence_weight=confidence_weight,
    )
    return mixed, similarity, group, flipped


@_on_device
def compose(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    a, b = (x.contiguous().resolve_neg() for x in (a, b))
    composed: Tensor = compose_kernels.compose(a, b, mask.resolve_neg())
    return composed


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "feature_distance": feature_distance,
    "sign_hash": sign_hash,
    "watermark_mix": watermark_mix,
    "watermark": watermark,
    "compose": compose,
}
