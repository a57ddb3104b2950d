"""Which kernels run: the backends, in the order in which a device prefers them.

A backend is a module with two names:

    unavailable(device_type) -> str | None      the reason why it cannot run there now, None if it can
    IMPLEMENTATIONS: dict[str, Callable]        op name -> function with the op schema's arguments and returns

To add one, write that module under the path named in `BACKENDS`, and nothing else. A backend may leave ops
out; the next one in the order takes them.

`HONEYTRACE_BACKEND=<name>` or `force(name)` takes one backend for everything: what it cannot do then raises
and says why. Without it the choice is automatic, falls back, and says so once.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

BACKENDS: dict[str, str] = {
    "reference": "honeytrace.ops.reference_backend",
    "cpp": "honeytrace.ops.cpp_backend",
    "triton": "honeytrace.ops.triton_backend",
    "cuda": "honeytrace.ops.cuda_backend",
}

PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}
"""What an automatic choice tries for a device, best first. (Triton runs on CPU tensors only when forced,
under its interpreter.)"""

ENVIRONMENT_VARIABLE = "HONEYTRACE_BACKEND"

Implementation = Callable[..., Any]

chosen_implementations: dict[tuple[str, str], Implementation] = {}
"""(op, device type) -> what `implementation` chose. Ops look here first."""

_forced: str | None = None
_warned: set[tuple[str, str]] = set()


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run; the text says why."""


class BackendFallback(RuntimeWarning):
    """An automatic choice took another backend than the device's best."""


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {source}={name!r}")
    return name


def forced_backend() -> str | None:
    """The backend that is taken for everything: by `force`, else by HONEYTRACE_BACKEND, else None.

    Raises:
        ValueError: HONEYTRACE_BACKEND names no backend.
    """
    if _forced is not None:
        return _forced
    name = os.environ.get(ENVIRONMENT_VARIABLE, "")
    return _check_name(name, ENVIRONMENT_VARIABLE) if name else None


def _module(name: str) -> ModuleType | str:
    """The backend's module, or the reason why there is none."""
    path = BACKENDS[name]
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or path
        if path == missing or path.startswith(missing + "."):
            return f"this installation has no {missing}"
        return f"{path} needs the module {missing}, which is not installed"
    except ImportError as error:
        return f"{path} cannot be imported: {error}"


def unavailable(name: str, device_type: str, op: str | None = None) -> str | None:
    """Why backend `name` cannot run (op `op`) on `device_type`, or None if it can."""
    module = _module(_check_name(name, "backend"))
    if isinstance(module, str):
        return module
    reason: str | None = module.unavailable(device_type)
    if reason is None and op is not None and op not in module.IMPLEMENTATIONS:
        reason = f"it has no {op}"
    return reason


def select(op: str, device_type: str) -> str:
    """The name of the backend that runs `op` on `device_type`.

    Raises:
        BackendUnavailable: a forced backend cannot, or no backend can.
    """
    forced = forced_backend()
    if forced is not None:
        reason = unavailable(forced, device_type, op)
        if reason is not None:
            raise BackendUnavailable(
                f"backend {forced!r} was forced and cannot run {op} on {device_type}: {reason}"
            )
        return forced
    reasons: list[str] = []
    for name in PREFERENCE.get(device_type, ()):
        reason = unavailable(name, device_type, op)
        if reason is None:
            if reasons and (device_type, name) not in _warned:
                _warned.add((device_type, name))
                warnings.warn(
                    f"honeytrace runs on backend {name!r} on {device_type} ({'; '.join(reasons)})",
                    BackendFallback,
                    stacklevel=2,
                )
            return name
        reasons.append(f"{name} is not available: {reason}")
    raise BackendUnavailable(
        f"no backend runs {op} on {device_type}: {'; '.join(reasons) or 'none knows this device'}"
    )


def implementation(op: str, device_type: str) -> Implementation:
    """The function that runs `op` on `device_type`; remembered until the choice changes."""
    module = _module(select(op, device_type))
    assert isinstance(module, ModuleType)  # select has just imported it
    chosen: Implementation = module.IMPLEMENTATIONS[op]
    chosen_implementations[op, device_type] = chosen
    return chosen


def reset() -> None:
    """Forget what was chosen: HONEYTRACE_BACKEND is read and backends are asked again at the next call."""
    chosen_implementations.clear()
    _warned.clear()


@contextlib.contextmanager
def force(name: str) -> Iterator[None]:
    """Within the context take backend `name` for everything, in all threads.

    Raises:
        ValueError: an unknown name. Whether the backend can run is found out by the first op.
    """
    global _forced
    before, _forced = _forced, _check_name(name, "backend")
    chosen_implementations.clear()
    try:
        yield
    finally:
        _forced = before
        chosen_implementations.clear()
