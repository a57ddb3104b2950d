"""The torch library `honeytrace`: one place where ops are declared and given to the dispatcher.

`Library.define` and `impl` are used rather than `torch.library.custom_op`: a call costs a third of the time,
and torch.compile, torch.export and opcheck work alike. The kernels behind an op come from
`honeytrace.ops.registry`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from honeytrace.ops import registry

# Lives as long as the process, or its ops vanish. (Any: torch leaves the class's methods without types.)
LIBRARY: Any = torch.library.Library("honeytrace", "DEF")  # type: ignore[no-untyped-call]

Op = Callable[..., Any]


def define(
    name: str,
    schema: str,
    *,
    fake: Op,
    backward: Op | None = None,
    setup_context: Op | None = None,
) -> Op:
    """Declare op `name` with its fake, its gradient and an implementation on CPU and CUDA.

    Args:
        name: the op's name in the library and in every backend's table.
        schema: arguments and returns, as in native_functions.yaml.
        fake: shapes and dtypes of the outputs, for tracing.
        backward, setup_context: as `torch.library.register_autograd` takes them; None for an op without a
            gradient.

    Returns:
        the op's overload, to be called with positional arguments.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    qualified = f"honeytrace::{name}"
    for key, device_type in (("CPU", "cpu"), ("CUDA", "cuda")):
        LIBRARY.impl(name, _launcher(name, device_type), key)
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    overload: Op = getattr(torch.ops.honeytrace, name).default
    return overload


def _launcher(name: str, device_type: str) -> Op:
    chosen = registry.chosen_implementations  # a dict that the registry clears when the choice changes
    key = (name, device_type)

    def launch(*args: Any) -> Any:
        implementation = chosen.get(key)
        if implementation is None:
            implementation = registry.implementation(name, device_type)
        return implementation(*args)

    return launch


def _plain_keys() -> tuple[frozenset[int], frozenset[int]]:
    """Dispatch keys of ordinary CPU tensors, and of a thread on which no mode and no transform is active."""
    tensors, threads = set(), set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            tensors.add(_keys_of(torch.empty(0, device="cpu")).raw_repr())
            threads.add(_keys_of_thread().raw_repr())
    return frozenset(tensors), frozenset(threads)


_keys_of: Callable[[Tensor], Any] = torch._C._dispatch_keys
_keys_of_thread: Callable[[], Any] = torch._C._dispatch_tls_local_include_set
_PLAIN_TENSORS, _PLAIN_THREADS = _plain_keys()
_profiled: Callable[[], bool] = torch._C._autograd._profiler_enabled


def is_plain(*tensors: Tensor) -> bool:
    """Whether torch's dispatcher would do nothing with these tensors but call the kernel on the CPU.

    Not so for fake, wrapped, lazily negated and other special tensors, on other devices, under a mode
    (FakeTensorMode), a transform (torch.func) or the profiler; not to be asked while torch.compile traces.
    Where it is so, a small op may save itself the dispatcher, which costs more than its kernel.
    """
    if _keys_of_thread().raw_repr() not in _PLAIN_THREADS or _profiled():
        return False
    for tensor in tensors:  # noqa: SIM110 (a generator costs as much as all the rest)
        if _keys_of(tensor).raw_repr() not in _PLAIN_TENSORS:
            return False
    return True


def kernel(name: str) -> Op:
    """What runs op `name` on the CPU now: for calls that `is_plain` lets past the dispatcher."""
    chosen = registry.chosen_implementations.get((name, "cpu"))
    return chosen if chosen is not None else registry.implementation(name, "cpu")


_BelowAutograd: Callable[[], contextlib.AbstractContextManager[Any]] = getattr(
    torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext
)


def call(op: Op, wants_gradient: bool, *args: Any) -> Any:
    """op(*args), past the autograd key, the dearest step of a call, when no input wants a gradient."""
    if torch.compiler.is_compiling() or (wants_gradient and torch.is_grad_enabled()):
        return op(*args)
    with _BelowAutograd():
        return op(*args)
