"""How much faster `watermark` and `watermark_mix` are than the same steps as torch operators.

Both sides are timed in turn (A B A B ...) in one process; a figure is the ratio of medians, with the 20th to
80th percentile of the rounds' ratios beside it. Baselines: `honeytrace.reference`; `eager`, the mixing as one
would write it with torch's operators; `published`, distances by broadcasting, sort and masks.

    python bench/bench_watermark.py [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from honeytrace import WatermarkRule, ops, reference
from honeytrace.doctor import doctor

ROUNDS = 9
ROUND_SECONDS = 0.05


def published_chain(q: Tensor, z: Tensor, b: Tensor, r: Tensor, rule: WatermarkRule) -> Tensor:
    """One group, logit space, as the published code orders its steps; flips by the global generator."""
    distance = (q[:, None] - b[0][None]).abs().mean(-1).sort(dim=1).values[:, : rule.k].mean(1)
    s = (rule.offsets[0] - distance).clamp(0, 1)
    c = torch.softmax(z, 1).amax(1)
    s = torch.where(c < rule.low_confidence, s**rule.low_power, s)
    w = (s**rule.mixing_power)[:, None]
    mixed = (1 - w) * z + w * r
    flip = torch.rand(len(z)) < torch.floor(s**rule.flip_power * rule.flip_bins) / rule.flip_bins
    mixed[flip] = r
    return mixed


def eager_mix(z: Tensor, s: Tensor, r: Tensor, rule: WatermarkRule) -> Tensor:
    """Mixing in probability space by torch's operators; flips by the global generator."""
    strongest, group = s.max(dim=1)
    w = rule.strength * strongest.double() ** rule.mixing_power
    keep, take = torch.log1p(-w).float()[:, None], torch.log(w).float()[:, None]
    target = r[group]
    taken = torch.logsumexp(z, 1, keepdim=True) + take + torch.log_softmax(target, 1)
    mixed = torch.logaddexp(z + keep, taken)
    flip = torch.rand(len(z)) < torch.floor(strongest**rule.flip_power * rule.flip_bins) / rule.flip_bins
    mixed = torch.where(flip[:, None], target, mixed)
    return torch.where(strongest[:, None] > 0, mixed, z)


def times_in_turn(functions: list[Callable[[], Any]]) -> list[list[float]]:
    """Seconds a call for each function, ROUNDS times, in turn."""
    calls = []
    for function in functions:
        function()
        start = time.perf_counter()
        function()
        calls.append(max(1, int(ROUND_SECONDS / (time.perf_counter() - start))))
    found: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for times, function, n in zip(found, functions, calls, strict=True):
            start = time.perf_counter()
            for _ in range(n):
                function()
            times.append((time.perf_counter() - start) / n)
    return found


def compare(name: str, ours: Callable[[], Any], baselines: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """A row of the table: our time and each baseline's ratio to it."""
    mine, *others = times_in_turn([ours, *baselines.values()])
    row: dict[str, Any] = {"case": name, "microseconds": statistics.median(mine) * 1e6}
    for label, theirs in zip(baselines, others, strict=True):
        ratios = sorted(t / m for t, m in zip(theirs, mine, strict=True))
        row[label] = {
            "ratio": statistics.median(theirs) / statistics.median(mine),
            "p20": ratios[ROUNDS // 5],
            "p80": ratios[-1 - ROUNDS // 5],
        }
    text = "  ".join(
        f"{k} {v['ratio']:7.1f}x [{v['p20']:.1f}, {v['p80']:.1f}]"
        for k, v in row.items()
        if isinstance(v, dict)
    )
    print(f"{name:44s} {row['microseconds']:10.1f} us  {text}")
    return row


def mix_rows() -> list[dict[str, Any]]:
    rows = []
    rule, seed = WatermarkRule(flip_bins=10), 7
    for batch in (1, 32, 256, 4096):
        for classes in (10, 100, 1000):
            z, s, r = 3 * torch.randn(batch, classes), torch.rand(batch, 4), torch.randn(4, classes)
            args = z, s, r, torch.arange(batch)
            rows.append(
                compare(
                    f"watermark_mix B={batch} C={classes} G=4",
                    lambda args=args: ops.watermark_mix(*args, rule=rule, seed=seed),
                    {
                        "eager": lambda args=args: eager_mix(*args[:3], rule),
                        "reference": lambda args=args: reference.watermark_mix(*args, rule=rule, seed=seed),
                    },
                )
            )
    return rows


def watermark_rows() -> list[dict[str, Any]]:
    rows = []
    rule, seed = WatermarkRule.neurht("cifar10"), 7
    for batch in (1, 32, 256):
        q, z, b, r = (
            torch.rand(batch, 512),
            3 * torch.randn(batch, 10),
            torch.rand(1, 500, 512),
            torch.randn(1, 10),
        )
        planes, bank = torch.randn(64, 512), ops.Bank(b)
        rows.append(
            compare(
                f"watermark B={batch} M=500 D=512 C=10 l1",
                lambda q=q, z=z, bank=bank, r=r, p=planes: ops.watermark(
                    q, z, bank, r, p, rule=rule, seed=seed
                ),
                {"published": lambda q=q, z=z, b=b, r=r: published_chain(q, z, b, r, rule)},
            )
        )
    return rows


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = mix_rows() + watermark_rows()
    if options.json:
        options.json.write_text(json.dumps({"machine": doctor(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
