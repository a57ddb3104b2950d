"""The Triton backend. Its kernels run here under Triton's interpreter, on CPU tensors.

Whether Triton interprets is fixed when it is imported, and in this process torch or another test may have
imported it. So the tests of the kernels, `interpreted_triton.py`, run in a process of their own, in parts
that pytest-xdist can spread. How the kernels compile for a GPU is `test_triton_compile.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from honeytrace.ops import registry

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
PARTS = {
    "distance": "distance or path or neighbours or magnitudes",
    "proofs": "near_rows or prove or bound or query or ties or norms or gradients",
}
SIBLINGS = "4.0 or 2.5 or 1.0 or -inf or 1.3 or [3.0] or torch.float16"
"""Tests whose like runs all the same: powers of a kind, the other half type. Left to `make test-long`."""


@pytest.mark.parametrize("part", [*PARTS, "rest", pytest.param("siblings", marks=pytest.mark.long)])
def test_kernels_under_the_interpreter(part: str) -> None:
    chosen = PARTS.get(part) or " and ".join(f"not ({names})" for names in PARTS.values())
    chosen = SIBLINGS if part == "siblings" else f"({chosen}) and not ({SIBLINGS})"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HONEYTRACE_BACKEND", None)
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-x"]
    done = subprocess.run(
        [*command, "-k", chosen, str(HERE / "interpreted_triton.py")],
        env=environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_without_the_interpreter_it_wants_a_gpu() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        assert registry.unavailable("triton", "cpu") is None
        assert "interpreter" in str(registry.unavailable("triton", "cuda"))
    else:
        assert "TRITON_INTERPRET=1" in str(registry.unavailable("triton", "cpu"))
    assert "it runs on cuda, not on xpu" in str(registry.unavailable("triton", "xpu"))
