"""The backend `cuda`: the compiled kernels `honeytrace._cuda` behind the op schemas, on CUDA tensors.

The kernels know no tensors. Here tensors become addresses, sizes, strides and the current stream of their
device; what cannot be read as it lies (another dtype, features that are not adjacent) is copied first.
Outputs and one workspace for each call are allocated here, by torch, so that its memory pools and CUDA graphs
work as with any other op. No call waits for the device. What a rule needs on the device (offsets and scales
of the groups) is sent there once and stays; this happens at the first call, which must not be the one that is
captured.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from honeytrace.ops.bank import pack_panels
from honeytrace.ops.checks import unsigned_seed
from honeytrace.ops.registry import BackendUnavailable

not_loaded: str | None = None
"""Why the compiled kernels are not there."""

try:
    import honeytrace._cuda as _cuda
except ModuleNotFoundError:
    not_loaded = "it was not built: set HONEYTRACE_CUDA=1 and install honeytrace again"
except ImportError as error:
    not_loaded = f"honeytrace._cuda cannot be loaded: {error}"

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def unavailable(device_type: str) -> str | None:
    """It runs on CUDA tensors, where it was built and the driver finds a GPU that it was built for."""
    if device_type != "cuda":
        return f"it runs on cuda, not on {device_type}"
    if not_loaded is not None:
        return not_loaded
    if not torch.cuda.is_available():
        return "no GPU is visible to torch" if torch.version.cuda is not None else "this torch has no CUDA"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or above"
    return None


def build_info() -> _cuda.BuildInfo:
    """Compiler and architectures of the kernels; only where they are loaded."""
    return _cuda.build_info()


def _check(code: int) -> None:
    """RuntimeError with the error's name unless a launch succeeded."""
    if code != 0:
        raise RuntimeError(
            f"CUDA refused a launch of honeytrace: {_cuda.error_name(code)} ({_cuda.error_text(code)})"
        )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The tensor's device, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _device(tensor: Tensor, workspace: Tensor | None = None) -> tuple[int, int, int, int]:
    """Index, number of multiprocessors, current stream and workspace."""
    device = tensor.device
    stream = torch.cuda.current_stream(device).cuda_stream if tensor.is_cuda else 0
    address = 0 if workspace is None else workspace.data_ptr()
    return device.index or 0, _multiprocessors(device), stream, address


def _rows(x: Tensor) -> Tensor:
    """x [B, N] with adjacent columns and resolved values; rows may be any distance apart."""
    x = x if x.stride(1) == 1 and x.stride(0) >= 0 else x.contiguous()
    return x.resolve_neg()


def _plain(x: Tensor) -> Tensor:
    """x as contiguous float32."""
    return x.to(torch.float32).contiguous().resolve_neg()


def _described(x: Tensor) -> tuple[int, int, int, int, int]:
    """Address, dtype, rows, columns and row stride of x [B, N]."""
    return x.data_ptr(), _DTYPES[x.dtype], x.shape[0], x.shape[1], x.stride(0)


def _packed(rows: Tensor, packed: Tensor | None, norms: Tensor | None) -> tuple[Tensor, Tensor]:
    """In panels of 16 rows; a bank of CPU tensors (of the tests) is laid out for the compiled CPU core."""
    return pack_panels(rows) if packed is None or norms is None or not rows.is_cuda else (packed, norms)


def _workspace(features: Tensor, rows: Tensor, k: int) -> Tensor:
    (batch, width), (groups, size, _) = features.shape, rows.shape
    needed = _cuda.workspace_bytes(batch, width, groups, size, k, _multiprocessors(features.device))
    return torch.empty(needed, dtype=torch.uint8, device=features.device)


@functools.cache
def _vector(values: tuple[float, ...], groups: int, device: torch.device) -> Tensor:
    """`values` on the device for good; a single one is repeated."""
    repeated = values if len(values) == groups else values * groups
    return torch.tensor(repeated, dtype=torch.float32, device=device)


def _rule(numbers: Sequence[float]) -> tuple[float, float, float, float, int, float, float, float, int]:
    """The numbers of `WatermarkRule.mixing_numbers` as the kernels want them: space and flip_bins as int."""
    low, low_power, high, high_power, space, strength, mixing, flip, bins = numbers
    return low, low_power, high, high_power, int(space), strength, mixing, flip, int(bins)


def feature_distance(
    features: Tensor, rows: Tensor, packed: Tensor | None, norms: Tensor | None, k: int, metric: int, p: float
) -> tuple[Tensor, Tensor]:
    with _on(features):
        features = _rows(features)
        packed, norms = _packed(rows, packed, norms)
        groups, size, _ = rows.shape
        distance = features.new_empty(len(features), groups, dtype=torch.float32)
        indices = features.new_empty(len(features), groups, k, dtype=torch.int32)
        workspace = _workspace(features, rows, k)
        code = _cuda.feature_distance(
            _described(features),
            (packed.data_ptr(), norms.data_ptr(), groups, size),
            (k, metric, p),
            distance.data_ptr(),
            indices.data_ptr(),
            _device(features, workspace),
        )
    _check(code)
    return distance, indices


def sign_hash(features: Tensor, planes: Tensor) -> Tensor:
    with _on(features):
        features, planes = _rows(features), _plain(planes)
        bucket = features.new_empty(len(features), dtype=torch.int64)
        code = _cuda.sign_hash(
            _described(features), (planes.data_ptr(), len(planes)), bucket.data_ptr(), _device(features)
        )
    _check(code)
    return bucket


def watermark_mix(
    logits: Tensor,
    similarity: Tensor,
    target_logits: Tensor,
    bucket: Tensor,
    rule: Sequence[float],
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    with _on(logits):
        logits, similarity, target_logits = _rows(logits), _plain(similarity), _plain(target_logits)
        bucket = bucket.contiguous()
        mixed = torch.empty_like(logits, memory_format=torch.contiguous_format)
        group = logits.new_empty(len(logits), dtype=torch.int64)
        flipped = logits.new_empty(len(logits), dtype=torch.bool)
        code = _cuda.watermark_mix(
            _described(logits),
            similarity.data_ptr(),
            target_logits.data_ptr(),
            bucket.data_ptr(),
            similarity.shape[1],
            _rule(rule),
            unsigned_seed(seed),
            mixed.data_ptr(),
            group.data_ptr(),
            flipped.data_ptr(),
            _device(logits),
        )
    _check(code)
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
    if constant_time:
        raise BackendUnavailable("backend 'cuda' has no constant_time watermark; it is for the CPU")
    with _on(features):
        features, logits = _rows(features), _rows(logits)
        target_logits, planes = _plain(target_logits), _plain(planes)
        packed, norms = _packed(rows, packed, norms)
        groups, size, _ = rows.shape
        offsets = _vector(tuple(offset), groups, features.device)
        scales = _vector(tuple(scale), groups, features.device)
        mixed = torch.empty_like(logits, memory_format=torch.contiguous_format)
        similarity = features.new_empty(len(features), groups, dtype=torch.float32)
        group = logits.new_empty(len(logits), dtype=torch.int64)
        flipped = logits.new_empty(len(logits), dtype=torch.bool)
        workspace = _workspace(features, rows, k)
        code = _cuda.watermark(
            _described(features),
            _described(logits),
            (packed.data_ptr(), norms.data_ptr(), groups, size),
            target_logits.data_ptr(),
            (planes.data_ptr(), len(planes)),
            (k, metric, p),
            (offsets.data_ptr(), scales.data_ptr(), confidence_weight),
            _rule(rule),
            unsigned_seed(seed),
            mixed.data_ptr(),
            similarity.data_ptr(),
            group.data_ptr(),
            flipped.data_ptr(),
            _device(features, workspace),
        )
    _check(code)
    return mixed, similarity, group, flipped


def compose(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    with _on(a):
        a, b, mask = (x.resolve_neg() for x in (a, b, mask))
        a, b = a.contiguous(), b.contiguous()
        out = torch.empty_like(a)
        sizes, steps, mask = mask_walk(mask.expand(a.shape))
        code = _cuda.compose(
            a.data_ptr(),
            b.data_ptr(),
            mask.data_ptr(),
            out.data_ptr(),
            _DTYPES[a.dtype],
            _DTYPES[mask.dtype],
            a.numel(),
            sizes,
            steps,
            _device(a),
        )
    _check(code)
    return out


def mask_walk(mask: Tensor) -> tuple[tuple[int, int], tuple[int, int, int], Tensor]:
    """How elements [outer, middle, inner] in order find their mask: (middle, inner), three steps, the mask.

    Dimensions that one step walks through are joined; a mask that more than three are left of is copied.
    """
    sizes: list[int] = []
    steps: list[int] = []
    for size, step in zip(mask.shape, mask.stride(), strict=True):
        if size == 1:
            continue
        if sizes and steps[-1] == step * size:
            sizes[-1] *= size
            steps[-1] = step
        else:
            sizes.append(size)
            steps.append(step)
    if len(sizes) > 3:
        mask = mask.contiguous()
        sizes, steps = [mask.numel()], [1]
    if len(sizes) <= 1:  # one step for all: no division in the kernel
        return (1, 1), (steps[0] if steps else 0, 0, 0), mask
    if len(sizes) == 2:
        sizes, steps = [1, *sizes], [0, *steps]
    return (sizes[1], sizes[2]), (steps[0], steps[1], steps[2]), mask


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "feature_distance": feature_distance,
    "sign_hash": sign_hash,
    "watermark_mix": watermark_mix,
    "watermark": watermark,
    "compose": compose,
}
