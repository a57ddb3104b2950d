"""The door to Triton: its language and its decorator, given types here once.

Triton has no type information, so everything that comes out of it is `Any`; what these modules promise to
each other and to `honeytrace.ops` is typed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, for functions of fixed types."""
    return triton.jit(function)


def jit_unspecialized(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit`, where the values of the arguments `names` may change without another compilation."""

    def decorate(function: Callable[..., Any]) -> Any:
        return triton.jit(function, do_not_specialize=list(names))

    return decorate


@jit
def _probe() -> None:
    pass


INTERPRETED: bool = isinstance(_probe, InterpretedFunction)
"""Whether kernels are run by Triton's interpreter, on CPU tensors: TRITON_INTERPRET=1 when Triton was
imported."""

OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
"""For every launch. Multiply-adds are fused where the source says so and nowhere else, as in the compiled
core: two kernels that write the same sum then round it alike, whatever surrounds it."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


__all__ = [
    "INTERPRETED",
    "OPTIONS",
    "cdiv",
    "jit",
    "jit_unspecialized",
    "power_of_two",
    "tl",
]
