"""The pages of the interface: built without a warning, and a first page that names every module."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import honeytrace

ROOT = Path(__file__).resolve().parents[1]


SOME = ["honeytrace.records", "honeytrace.ownership.commitment", "honeytrace.numpy", "honeytrace.watermark"]
"""Ordinary docstrings, dataclasses, a NamedTuple, names that are fetched late. `make docs` builds all."""


@pytest.mark.slow
def test_pages_are_built_from_docstrings_without_a_warning(tmp_path):
    pytest.importorskip("pdoc", reason="the extra 'docs' is not installed")
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "build_api.py"), str(tmp_path), *SOME],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    page = (tmp_path / "honeytrace" / "watermark.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in page for name in ("Watermark", "SecretKey", "calibrate"))
    first = (tmp_path / "index.html").read_text(encoding="utf-8")
    named = [link.removesuffix(".html").replace("/", ".") for link in re.findall(r'href="([^"]+)"', first)]
    assert named[0] == "honeytrace"
    assert set(SOME) <= set(named)
    assert all(importlib.util.find_spec(name) is not None for name in named)
    modules = {name for name, (_, attribute) in honeytrace._LAZY.items() if attribute is None}
    assert {f"honeytrace.{name}" for name in modules - {"reference"}} <= set(named)
