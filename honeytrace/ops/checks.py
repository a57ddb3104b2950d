"""Checks of op arguments, made in Python before anything is launched, so that kernels need no error path.

Each check names the argument, the value and what was expected. A good call passes through a few comparisons;
the texts are built only when one fails.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

KERNEL_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
REFERENCE_DTYPES = KERNEL_DTYPES | {torch.float64}

_FLOAT64_HINT = "; float64 is what honeytrace.reference takes"


def _dtype_names(dtypes: frozenset[torch.dtype]) -> str:
    return ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))


def check_tensor(
    name: str, value: object, dimensions: int, shape: str, dtypes: frozenset[torch.dtype] = KERNEL_DTYPES
) -> None:
    """TypeError unless `value` is a tensor of one of `dtypes`; ValueError if not `dimensions`-dimensional."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {shape}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        hint = _FLOAT64_HINT if value.dtype == torch.float64 and torch.float32 in dtypes else ""
        raise TypeError(f"{name} must have dtype {_dtype_names(dtypes)}, got {value.dtype}{hint}")
    if value.dim() != dimensions:
        raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")


def check_size(name: str, value: Tensor, dimension: int, letter: str, size: int, other: str) -> None:
    """ValueError unless `value.shape[dimension] == size`, the size that `other` fixed for this letter."""
    if value.shape[dimension] != size:
        raise ValueError(
            f"{name} must have {letter}={size} in dimension {dimension} as {other} has, "
            f"got shape {list(value.shape)}"
        )


def check_not_empty(name: str, value: Tensor, first: int, shape: str) -> None:
    """ValueError if a dimension from `first` on is 0 (a batch may be empty, the rest may not)."""
    for size in value.shape[first:]:
        if size == 0:
            raise ValueError(
                f"{name} must have shape {shape} without empty dimensions, got {list(value.shape)}"
            )


def check_device(name: str, value: Tensor, device: torch.device, other: str) -> None:
    """ValueError unless `value` lies where `other` lies."""
    if value.device != device:
        raise ValueError(f"{name} must be on the device of {other}, {device}, got {value.device}")


def check_k(k: int, rows: int) -> None:
    """ValueError unless 1 <= k <= rows."""
    if not 1 <= k <= rows:
        raise ValueError(f"k must be between 1 and the number of bank rows M={rows}, got k={k}")


def check_seed(seed: object) -> int:
    """The seed as the signed 64-bit integer that op schemas carry. No message ever shows its value."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not 0 <= seed < 1 << 64:
        raise ValueError("seed must be between 0 and 2^64 - 1, got a value outside")
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def unsigned_seed(seed: int) -> int:
    """Undo the signed form of `check_seed`."""
    return seed & 0xFFFF_FFFF_FFFF_FFFF


# Tensors that were found finite: id -> (weak reference, version counter). The look at the values is paid once
# for a tensor, not at every call; a change in place moves the version counter and is looked at again.
_finite: dict[int, tuple[weakref.ref[Tensor], int]] = {}
_finite_lock = threading.Lock()
_FINITE_LIMIT = 256


def check_finite(name: str, value: Tensor) -> None:
    """ValueError if a value is NaN or infinite. Skipped while tracing, where there are no values."""
    if torch.compiler.is_compiling():
        return
    known = _finite.get(id(value))
    if known is not None and known[0]() is value and known[1] == value._version:
        return
    _look_for_nonfinite(name, value)


def _look_for_nonfinite(name: str, value: Tensor) -> None:
    if type(value) not in (Tensor, torch.nn.Parameter) or value.device.type == "meta":
        return  # a fake or otherwise symbolic tensor: the values do not exist
    if value.is_inference():  # has no version counter, so what was found cannot be remembered
        finite = bool(torch.isfinite(value).all())
        if finite:
            return
    elif bool(torch.isfinite(value.detach()).all()):
        with _finite_lock:
            if len(_finite) >= _FINITE_LIMIT:
                _finite.clear()
            _finite[id(value)] = (weakref.ref(value), value._version)
        return
    raise ValueError(f"{name} must be finite, got NaN or infinite values")
