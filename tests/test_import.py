"""Invariant 8: importing the package compiles nothing, starts no thread and needs no GPU."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import honeytrace

PROBE = """
import json, os, sys

def tasks():  # threads of the process as the system counts them, where it tells
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1

started = []
sys.addaudithook(lambda event, args: started.append(event) if event in {events!r} else None)
{before}
threads = tasks()
{statement}
print(json.dumps({{
    "modules": sorted(m for m in sys.modules if m.split(".")[0] in {packages!r}),
    "threads": tasks() - threads,
    "started": started,
    "cuda": "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized(),
}}))
"""
PACKAGES = ("torch", "triton", "numpy", "honeytrace")
EVENTS = ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec", "_thread.start_new_thread", "os.fork")


def probe(statement: str, before: str = "") -> dict:
    code = PROBE.format(events=EVENTS, packages=PACKAGES, before=before, statement=statement)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_importing_the_package_loads_nothing_heavy():
    found = probe("import honeytrace")
    assert found["modules"] == ["honeytrace"]
    assert found["threads"] == 0
    assert found["started"] == []


def test_importing_the_ops_compiles_nothing_and_starts_no_thread():
    found = probe("import honeytrace.ops, honeytrace.doctor", before="import torch, torch.library")
    assert found["threads"] == 0
    assert found["started"] == []
    assert not found["cuda"]
    assert not any(module.startswith(("torch._inductor", "triton")) for module in found["modules"])


def test_names_resolve_once_and_are_listed():
    for name in honeytrace.__all__:
        assert getattr(honeytrace, name) is getattr(honeytrace, name)
        assert name in dir(honeytrace)
    with pytest.raises(AttributeError, match="module 'honeytrace' has no attribute 'nothing'"):
        honeytrace.nothing  # noqa: B018


def test_every_lazy_name_is_public():
    assert set(honeytrace._LAZY) <= set(honeytrace.__all__)
