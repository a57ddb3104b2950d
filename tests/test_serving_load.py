"""A short run of bench/soak_http.py: 2,048 queries in flight at a server bare and at one protected."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from worlds import blobs, marked

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import soak_http

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="reads the times of Linux"),
]


def test_a_crowd_is_answered_without_an_error_and_without_growing_memory(tmp_path):
    marked().save(tmp_path / "mark.honeytrace")
    save_file(blobs().model.state_dict(), tmp_path / "weights.safetensors")
    common = {
        "model": f"{Path(__file__).resolve().parent / 'worlds.py'}:mlp",
        "weights": str(tmp_path / "weights.safetensors"),
        "threads": 1,
    }
    bare = {**common, "watermark": None, "settings": {"input_shape": [24]}}
    protected = {**common, "watermark": str(tmp_path / "mark.honeytrace"), "settings": {}}
    inputs = blobs().test[0]
    with soak_http.server(bare) as first, soak_http.server(protected) as second:
        servers = {"bare": first, "protected": second}
        found = soak_http.soak(servers, inputs, rounds=3, blocks={"crowd": 256, "single": 20})
    assert found["in_flight"] == 2048
    for load in ("crowd", "single"):
        for name in servers:
            answers = found[f"{load}, {name}"]
            assert answers["errors"] == 0, answers
            assert answers["compared"] > 0
    # The step of some microseconds beside the HTTP of some hundred; the gate itself is the long form's.
    assert found["crowd, protected"]["work_of_bare"][0] < 1.5
    for name in servers:
        grown = found[f"memory, {name}"]
        assert grown["last_mib"] - grown["first_mib"] < 30, grown
