"""What this installation runs on, and why: the facts one asks for first when something is slow or missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

import honeytrace
from honeytrace.ops import cuda_backend, registry

_PACKAGES = ("torch", "triton", "numpy", "safetensors")
_VARIABLES = ("HONEYTRACE_BACKEND", "HONEYTRACE_SIMD", "OMP_NUM_THREADS")


def doctor() -> dict[str, Any]:
    """Versions, instruction set, threads, backends and GPU, as plain JSON values.

    Returns:
        versions: honeytrace, python, platform and packages (None where one is not installed).
        core: the compiled core: available, reason (when not), simd_level in use, simd_levels that can run,
            build.
        cuda_core: the compiled CUDA kernels: available (built and loaded), reason (when not), build.
        threads: what a call uses, torch.get_num_threads().
        gpu: available, reason (when not), devices (name, compute capability, GiB).
        backends: for each device type and backend: available and reason (None when available).
        chosen: for each device type the backend that `watermark` runs on, or None with the reason.
        forced: the backend that was forced, or None.
        environment: the variables that change a choice, where set.
    """
    return {
        "versions": {
            "honeytrace": honeytrace.__version__,
            "python": platform.python_version(),
            "platform": f"{sys.platform} {platform.machine()}",
            **{name: _version(name) for name in _PACKAGES},
        },
        "core": _core(),
        "cuda_core": _cuda_core(),
        "threads": torch.get_num_threads(),
        "gpu": _gpu(),
        "backends": {
            device: {name: _available(registry.unavailable(name, device)) for name in registry.BACKENDS}
            for device in registry.PREFERENCE
        },
        "chosen": {device: _chosen(device) for device in registry.PREFERENCE},
        "forced": _forced(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _available(reason: str | None) -> dict[str, Any]:
    return {"available": reason is None, "reason": reason}


def _core() -> dict[str, Any]:
    try:
        from honeytrace import _C

        return {
            **_available(None),
            "simd_level": _C.simd_level(),
            "simd_levels": list(_C.simd_levels()),
            "build": dict(_C.build_info()),
        }
    except (
        ImportError,
        RuntimeError,
        ValueError,
    ) as error:  # no core, or HONEYTRACE_SIMD asks for the impossible
        return _available(str(error))


def _cuda_core() -> dict[str, Any]:
    if cuda_backend.not_loaded is not None:
        return _available(cuda_backend.not_loaded)
    return {**_available(None), "build": dict(cuda_backend.build_info())}


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        return {
            **_available("no GPU is visible to torch" if built else "this torch has no CUDA"),
            "devices": [],
        }
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {**_available(None), "devices": devices}


def _chosen(device_type: str) -> dict[str, Any]:
    try:
        forced = registry.forced_backend()
        if forced is not None:
            reason = registry.unavailable(forced, device_type, "watermark")
            return {"backend": forced if reason is None else None, "reason": reason or "it was forced"}
    except ValueError as error:
        return {"backend": None, "reason": str(error)}
    skipped: list[str] = []
    for name in registry.PREFERENCE[device_type]:
        reason = registry.unavailable(name, device_type, "watermark")
        if reason is None:
            return {"backend": name, "reason": "; ".join(skipped) or "the best for this device"}
        skipped.append(f"{name} is not available: {reason}")
    return {"backend": None, "reason": "; ".join(skipped)}


def _forced() -> str | None:
    try:
        return registry.forced_backend()
    except ValueError as error:
        return str(error)
