"""The GPU benches and the table of floors, as far as they go without a GPU."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
BENCHES = sorted(path.name for path in BENCH.glob("gpu_*.py"))


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCH / name), *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("name", BENCHES)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_bench_without_a_gpu_says_so_in_one_line(name):
    done = run(name, "--quick", "--calls", "3", "--dtype", "bfloat16")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["no GPU that torch can use: nothing was timed"]


@pytest.fixture
def load(monkeypatch):
    """Imports a bench by its name, as the benches import each other."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_the_benches_are_two():
    assert BENCHES == ["gpu_feature_distance.py", "gpu_watermark.py"]


def test_baselines_compute_what_the_ops_compute(load, randn):
    bench = load("gpu_feature_distance")
    from honeytrace import ops

    q, b = randn(5, 20), randn(2, 30, 20)
    for _, metric, p in bench.METRICS:
        wanted = ops.feature_distance(q, b, k=bench.K, metric=metric, p=p)
        assert torch.allclose(bench.chain(q, b, metric, p)(), wanted, rtol=1e-4, atol=1e-5)
    bench = load("gpu_watermark")
    z, r, planes = randn(5, 4), randn(2, 4), randn(64, 20)
    wanted = ops.watermark(q, z, b, r, planes, rule=bench.RULE, seed=1).logits
    assert torch.allclose(bench.chain(q, z, b, r, planes)(), wanted, rtol=1e-4, atol=1e-5)


def test_floors(load, tmp_path):
    roofline = load("roofline")
    a100, h100 = roofline.DEVICES
    assert roofline.device_of("NVIDIA H100 80GB HBM3") is h100
    assert roofline.device_of("NVIDIA GeForce RTX 4090") is None
    # 256 * 8 * 500 * 512 pair features of two instructions each, at 19.5 / 2 T instructions a second
    seconds, limit = roofline.distance("l1", 256, 8, 500, 512).floor(a100)
    assert limit == "vector"
    assert seconds == pytest.approx(256 * 8 * 500 * 512 * 2 / (19.5e12 / 2))
    seconds, limit = roofline.mix(4096, 1000).floor(h100)
    assert limit == "memory"
    assert seconds == pytest.approx(2 * 4 * 4096 * 1000 / 3.35e12, rel=0.02)
    parts = roofline.distance("l1", 32, 8, 500, 512), roofline.sign_hash(32, 512), roofline.mix(32, 100)
    assert roofline.watermark("l1", 32, 8, 500, 512, 100).bytes == sum(part.bytes for part in parts)


def test_the_table_of_floors(tmp_path):
    done = run("roofline.py", "--json", str(tmp_path / "floors.json"))
    assert done.returncode == 0, done.stderr
    table = json.loads((tmp_path / "floors.json").read_text())["table"]
    assert {entry["kernel"].split()[0] for entry in table} == {
        "feature_distance",
        "sign_hash",
        "sign_hash,",
        "watermark_mix",
        "watermark",
        "compose",
    }
    assert all(0 < time < 1e6 for entry in table for time in entry["floor_us"].values())
    assert len(done.stdout.splitlines()) == len(table) + 1


def test_rows_of_results(load, monkeypatch):
    gpu = load("on_gpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    row = gpu.Row("l1 B=1", "cuda", "graph", 9.0, 10.0, 12.0, 4.0, "vector")
    assert row.share == 0.4
    assert "40%" in gpu.line_of(row)
    assert "| l1 B=1 | cuda | graph | 9.00 | 10.00 | 12.00 | 4.00 (vector) | 40% |" in gpu.markdown(
        "t", [row]
    )
    assert len(gpu.line_of(row)) == len(gpu.HEADER)
    assert gpu.quantile([float(i) for i in range(1, 102)], 20) == pytest.approx(21.0)


def test_results_are_printed_and_written(load, monkeypatch, tmp_path, capsys):
    gpu, roofline = load("on_gpu"), load("roofline")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(gpu, "captured", lambda function: (function, "graph"))
    monkeypatch.setattr(gpu, "times_in_turn", lambda functions, calls, cold: [[5.0] * calls] * len(functions))
    sides = {"cuda": lambda: None, "slow": lambda: None, "torch": lambda: None}
    work = roofline.mix(4096, 1000)
    options = argparse.Namespace(output=tmp_path / "card", dtype="float32", calls=4, without=["slow"])
    rows = gpu.compare("mix B=4096 C=1000", sides, work, options, lambda: None)
    assert [row.side for row in rows] == ["cuda", "torch"]
    assert rows[0].share == pytest.approx(1e6 * work.floor(roofline.DEVICES[0])[0] / 5.0)
    gpu.write("mixing", "gpu_mix", rows, options)
    found = json.loads((tmp_path / "card" / "gpu_mix.json").read_text())
    assert [row["p50"] for row in found["rows"]] == [5.0, 5.0]
    assert (tmp_path / "card" / "gpu_mix.md").read_text().count("| mix B=4096 C=1000 |") == 2
    assert "mix B=4096 C=1000" in capsys.readouterr().out
