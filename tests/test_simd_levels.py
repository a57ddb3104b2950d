"""Choosing an instruction set: what the machine and the build allow, and that no level leaks into another."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

_C = pytest.importorskip("honeytrace._C", reason="this installation has no compiled core")

import core_calls as core  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
ORDER = ["scalar", "avx2", "avx512", "neon"]
# bit patterns of bfloat16 from 0.5 to 2 and their negatives
HALVES = np.random.default_rng(3).integers(0x3F00, 0x4000, (37, 43)).astype(np.uint16)
HALVES[::2] |= np.uint16(0x8000)
METRICS = [("l1", 0.0), ("l2", 0.0), ("cosine", 0.0), ("lp", 1.5), ("lp", 2.3), ("lp", 3.0), ("lp", 5.0)]


@pytest.fixture(autouse=True)
def _level_from_before():
    before = _C.simd_level()
    yield
    _C.set_simd_level(before)


def ask(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name != "HONEYTRACE_SIMD"}
    return subprocess.run(
        [sys.executable, "-c", f"from honeytrace import _C\n{code}"],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_levels_are_those_of_the_build_that_this_machine_runs():
    levels = _C.simd_levels()
    assert levels[0] == "scalar"
    assert levels == [name for name in ORDER if name in levels]
    assert set(levels) <= set(_C.build_info()["levels"])
    if platform.system() == "Linux" and platform.machine() == "x86_64":
        flags = set(Path("/proc/cpuinfo").read_text().split())
        assert ("avx2" in levels) == ({"avx2", "fma", "f16c"} <= flags)
        needed = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
        assert ("avx512" in levels) == (needed <= flags and "avx2" in levels)


@pytest.mark.parametrize("unset", [{}, {"HONEYTRACE_SIMD": ""}])
def test_the_strongest_level_is_the_default(unset):
    assert ask("print(_C.simd_level())", **unset).stdout.strip() == _C.simd_levels()[-1]


@pytest.mark.parametrize("name", _C.simd_levels())
def test_the_environment_chooses_a_level(name):
    assert ask("print(_C.simd_level())", HONEYTRACE_SIMD=name).stdout.strip() == name


def test_the_environment_is_read_once():
    code = "import os; before = _C.simd_level(); os.environ['HONEYTRACE_SIMD'] = 'sse9'"
    assert ask(f"{code}; assert _C.simd_level() == before", HONEYTRACE_SIMD="scalar").returncode == 0


def test_an_impossible_level_is_refused_with_the_possible_ones():
    possible = ", ".join(_C.simd_levels())
    with pytest.raises(ValueError, match=rf"name must be one of .*\({possible}\), got 'sse9'"):
        _C.set_simd_level("sse9")
    refused = ask("_C.simd_level()", HONEYTRACE_SIMD="sse9")
    assert refused.returncode != 0
    assert f"({possible}), got 'sse9'" in refused.stderr
    assert "HONEYTRACE_SIMD" in refused.stderr
    # Importing asks for no level, so it cannot fail.
    assert ask("", HONEYTRACE_SIMD="sse9").returncode == 0


def everything(level: str) -> dict[str, bytes]:
    """Bytes of each operation's results on one level, over sizes with tails."""
    _C.set_simd_level(level)
    rng = np.random.default_rng(7)
    features = rng.standard_normal((37, 301)).astype(np.float32)
    bank = core.pack(rng.standard_normal((2, 75, 301)).astype(np.float32))
    planes = rng.standard_normal((64, 301))
    logits = rng.standard_normal((37, 43)).astype(np.float32)
    target = rng.standard_normal((2, 43))
    rule = (0.3, 0.5, 0.9, 2.0, 1, 0.5, 1.0, 3.0, 10)
    out = {
        f"{metric}{p}": core.feature_distance(features, bank, k=9, metric=metric, p=p)[0].tobytes()
        for metric, p in METRICS
    }
    out["hash"] = core.sign_hash(features, planes).tobytes()
    similarity, mixed = core.watermark(
        features,
        logits,
        bank,
        target,
        planes,
        k=9,
        metric="l2",
        offset=1.9,
        confidence_weight=0.3,
        rule=rule,
        seed=1,
    )
    bent = rng.random((37, 2)).astype(np.float32)
    for name, given in (("float32", logits), ("float16", logits.astype(np.float16)), ("bfloat16", HALVES)):
        for space in (0, 1):
            answers = core.watermark_mix(
                given, bent, target, np.arange(37), rule=(*rule[:4], space, *rule[5:])
            )
            out[f"{name}{space}"] = answers.logits.tobytes()
    return out | {"similarity": similarity.tobytes(), "answers": mixed.logits.tobytes()}


def test_levels_with_a_fused_multiply_add_give_the_same_bits():
    """Replicas on unlike machines then answer alike. The scalar level rounds products, and shares l1 only."""
    fused = [name for name in _C.simd_levels() if name != "scalar"]
    results = {name: everything(name) for name in _C.simd_levels()}
    for name in fused[1:]:
        assert results[name] == results[fused[0]]
    for name in fused:
        assert results[name]["l10.0"] == results["scalar"]["l10.0"]
        assert results[name]["l20.0"] != results["scalar"]["l20.0"], (
            "the level that was asked for did not run"
        )


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None or shutil.which("nm") is None, reason="needs a C++ compiler and nm")
@pytest.mark.parametrize("level", _C.build_info()["levels"])
def test_a_level_exports_no_function_that_another_could_pick_up(level, tmp_path):
    """Or the linker would merge an inline function compiled for AVX-512 with its namesake that was not.

    Which of the two stays is chance, and on an old machine the wrong one is an illegal instruction. So each
    symbol that may be merged carries its level's namespace. No optimisation, lest inlining hide one.
    """
    flags = {"avx2": ["-mavx2", "-mfma", "-mf16c"]}
    flags["avx512"] = [*flags["avx2"], "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
    source, built = ROOT / "csrc" / "cpu" / f"level_{level}.cpp", tmp_path / "level.o"
    options = ["-std=c++17", "-O0", "-fno-exceptions", f"-I{ROOT / 'csrc'}", *flags.get(level, [])]
    subprocess.run([compiler(), *options, "-c", source, "-o", built], check=True, timeout=300)
    listed = subprocess.run(["nm", "-C", built], check=True, capture_output=True, text=True).stdout
    defined = [line.split(maxsplit=2) for line in listed.splitlines() if not line.startswith(" ")]
    merged = [name for _, kind, name in defined if kind in "WVu"]
    assert merged, "nothing to check: the pattern no longer fits nm's output"
    assert [name for name in merged if f"honeytrace::{level}::" not in name] == []
