"""What the tests share: backends to run on, and reproducible random tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from honeytrace.ops import registry

try:
    from honeytrace import _C
except ImportError:  # an installation without the compiled core: everything runs on the reference
    _C = None  # type: ignore[assignment]

settings.register_profile(
    "honeytrace",
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("honeytrace")

pytest.register_assert_rewrite("op_contract")  # the tests that the kernels' test files share

CPU_BACKENDS = ["reference", *(f"cpp-{level}" for level in (_C.simd_levels() if _C is not None else []))]
"""Every backend that runs on CPU tensors here, the compiled core once for each instruction set."""

if os.environ.get("TRITON_INTERPRET") == "1" and registry.unavailable("triton", "cpu") is None:
    CPU_BACKENDS.insert(1, "triton")  # slow: tests/test_triton.py runs a selection, in a process of its own


def _running(spec: str) -> Iterator[str]:
    name, _, level = spec.partition("-")
    before = _C.simd_level() if level else None
    if level:
        _C.set_simd_level(level)
    try:
        with registry.force(name):
            yield spec
    finally:
        if before is not None:
            _C.set_simd_level(before)


@pytest.fixture(params=CPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test on each CPU backend and instruction set in turn; the value is its name."""
    yield from _running(request.param)


@pytest.fixture(params=sorted({CPU_BACKENDS[0], CPU_BACKENDS[-1]}))
def any_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """As `backend`, but the compiled core at its best level only: for what does not depend on the level."""
    yield from _running(request.param)


@pytest.fixture
def randn() -> Callable[..., torch.Tensor]:
    """`randn(*shape)`: normal float32 from a generator of the test's own."""
    generator = torch.Generator().manual_seed(20250109)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """`threads(n)` sets torch's threads; the number from before comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
