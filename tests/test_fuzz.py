"""Short forms of the fuzzing runs: make fuzz-core, fuzz-threads, fuzz-files (docs/reliability.md)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FUZZ = ROOT / "csrc" / "fuzz"
compiled = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("make") is None or shutil.which("g++") is None,
    reason="needs make and GCC's sanitizers on Linux",
)


def output(*command: str | Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("MAKEFLAGS", None)
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def count(name: str, text: str) -> int:
    found = re.search(rf"{name} (\d+)", text)
    assert found, text
    return int(found[1])


@compiled
@pytest.mark.slow
def test_the_core_on_the_kept_inputs_and_some_mutations(tmp_path):
    said = output("make", "-s", "-C", FUZZ, f"BUILD={tmp_path}", "CXX=g++", "short")
    kept = len((FUZZ / "corpus.hex").read_text().splitlines())
    assert count("corpus", said) == kept > 50
    assert count("executions", said) == 180 > kept


@compiled
@pytest.mark.slow
def test_callers_at_once_under_the_thread_sanitizer(tmp_path):
    said = output("make", "-s", "-C", FUZZ, f"BUILD={tmp_path}", "CXX=g++", "race-short")
    assert count("calls", said) >= 12
    assert count("workers", said) >= 1


def test_the_fuzzed_core_has_the_flags_of_the_built_one():
    setup, make = (ROOT / "setup.py").read_text(), (FUZZ / "Makefile").read_text()
    for flag in ("-ffp-contract=off", "-fno-math-errno", "-std=c++17"):
        assert flag in make
        assert flag in setup
    for level in ("avx2", "avx512"):
        (flags,) = re.findall(rf"^FLAGS_{level} := (.*)$", make, re.MULTILINE)
        assert flags.replace("$(FLAGS_avx2) ", "").split() == re.findall(
            r"-m[a-z0-9]+", built_with(setup, level)
        )


def built_with(setup: str, level: str) -> str:
    pattern = r"^AVX2_FLAGS = (.*)$" if level == "avx2" else r'"level_avx512.cpp": (.*)$'
    (line,) = re.findall(pattern, setup, re.MULTILINE)
    return str(line)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_files_that_were_tampered_with(tmp_path):
    said = output(
        sys.executable,
        ROOT / "tests" / "fuzz_files.py",
        "--seconds",
        "500",
        "--most",
        "400",
        "--findings",
        tmp_path,
    )
    assert count("executions", said) == 400
    assert count("findings", said) == 0
    read = re.findall(r"^(\w+) +(\d+) files, +(\d+) refused$", said, re.MULTILINE)
    assert len(read) == 14
    assert all(int(files) > 12 for _, files, _ in read)
    # Most are refused where refusing is the answer: the mutations reach what they are meant for.
    assert all(
        int(refused) > 0.3 * int(files) for name, files, refused in read if name in {"watermark", "key"}
    )
