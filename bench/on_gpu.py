"""Timing on a GPU, for the benches bench/gpu_*.py: CUDA events, a cold L2 cache, all sides in turn.

A figure is the median of single calls with the 20th and 80th percentile beside it. Before each call a buffer
larger than the L2 cache is overwritten, so that every call reads its operands from memory. Calls are captured
in a CUDA graph where they can be, which leaves the launch latency of Python out; where not, the row says
"eager".
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import machine
from roofline import Work, device_of

from honeytrace.ops import registry

RESULTS = Path(__file__).resolve().parent / "results"
CALLS = 60
WARM_UP = 5


def arguments_of(description: str, command: list[str]) -> argparse.Namespace:
    """--quick, --calls, --dtype, --without and --output; exits with one line where there is no GPU."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="two sizes only")
    parser.add_argument("--calls", type=int, default=CALLS, help=f"calls of each side (default {CALLS})")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument(
        "--without", action="append", default=[], metavar="SIDE", help="a side to leave out, such as compiled"
    )
    parser.add_argument("--output", type=Path, help="directory of the results (default bench/results/<card>)")
    options = parser.parse_args(command)
    if not torch.cuda.is_available():
        sys.exit("no GPU that torch can use: nothing was timed")
    return options


def gpu_backends() -> list[str]:
    """Those of our backends that run here, with a line for each that does not."""
    found = []
    for name in ("cuda", "triton"):
        reason = registry.unavailable(name, "cuda")
        if reason is None:
            found.append(name)
        else:
            print(f"{name}: left out, {reason}")
    return found


class Cold:
    """Empties the L2 cache by writing more than fits into it."""

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        size = 4 * max(int(getattr(properties, "L2_cache_size", 0)), 32 * 2**20)
        self._buffer = torch.empty(size, dtype=torch.uint8, device="cuda")

    def __call__(self) -> None:
        self._buffer.zero_()


def captured(function: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
    """The call as a CUDA graph, and "graph"; itself and "eager" where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = function()
    except RuntimeError:
        torch.cuda.synchronize()
        return function, "eager"

    def replay(_kept: Any = kept) -> None:
        graph.replay()

    return replay, "graph"


def times_in_turn(functions: list[Callable[[], Any]], calls: int, cold: Cold) -> list[list[float]]:
    """Microseconds of each call of each function."""
    found: list[list[float]] = [[] for _ in functions]
    for _ in range(calls):
        events = []
        for function in functions:
            cold()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize()
        for times, (begin, end) in zip(found, events, strict=True):
            times.append(1e3 * begin.elapsed_time(end))
    return found


@dataclasses.dataclass(frozen=True)
class Row:
    """One side at one size."""

    name: str
    side: str
    mode: str
    p20: float
    p50: float
    p80: float
    floor_us: float | None
    limit: str | None

    @property
    def share(self) -> float | None:
        """Of the floor in the time that was measured."""
        return None if self.floor_us is None else self.floor_us / self.p50


def quantile(times: list[float], percent: int) -> float:
    return statistics.quantiles(times, n=100, method="inclusive")[percent - 1]


def compare(
    name: str,
    sides: dict[str, Callable[[], Any]],
    work: Work,
    options: argparse.Namespace,
    cold: Cold,
) -> list[Row]:
    """Time all sides in turn that `options` do not leave out, print a line for each."""
    prepared = {side: captured(call) for side, call in sides.items() if side not in options.without}
    measured = times_in_turn([call for call, _ in prepared.values()], options.calls, cold)
    device = device_of(torch.cuda.get_device_name())
    floor, limit = (None, None) if device is None else work.floor(device)
    rows = []
    for (side, (_, mode)), times in zip(prepared.items(), measured, strict=True):
        p20, p50, p80 = (quantile(times, percent) for percent in (20, 50, 80))
        row = Row(name, side, mode, p20, p50, p80, None if floor is None else 1e6 * floor, limit)
        print(line_of(row), flush=True)
        rows.append(row)
    return rows


HEADER = (
    f"{'case':44}{'side':16}{'mode':7}{'p20 us':>10}{'p50 us':>10}{'p80 us':>10}{'floor us':>10}{'share':>7}"
)


def line_of(row: Row) -> str:
    floor = "-" if row.floor_us is None else f"{row.floor_us:.2f}"
    share = "-" if row.share is None else f"{100 * row.share:.0f}%"
    times = "".join(f"{value:>10.2f}" for value in (row.p20, row.p50, row.p80))
    return f"{row.name:44}{row.side:16}{row.mode:7}{times}{floor:>10}{share:>7}"


def markdown(title: str, rows: list[Row]) -> str:
    lines = [f"# {title}", "", f"{torch.cuda.get_device_name()}, torch {torch.__version__}", ""]
    lines += ["| case | side | mode | p20 us | p50 us | p80 us | floor us | share of the floor |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for row in rows:
        floor = "" if row.floor_us is None else f"{row.floor_us:.2f} ({row.limit})"
        share = "" if row.share is None else f"{100 * row.share:.0f}%"
        times = f"{row.p20:.2f} | {row.p50:.2f} | {row.p80:.2f}"
        lines.append(f"| {row.name} | {row.side} | {row.mode} | {times} | {floor} | {share} |")
    return "\n".join(lines) + "\n"


def write(title: str, stem: str, rows: list[Row], options: argparse.Namespace) -> None:
    """JSON and Markdown under bench/results/<card>, or where --output says."""
    card = torch.cuda.get_device_name().lower().replace(" ", "-")
    directory = options.output or RESULTS / card
    directory.mkdir(parents=True, exist_ok=True)
    facts = {**machine(), "gpu": torch.cuda.get_device_name(), "dtype": options.dtype, "calls": options.calls}
    table = [{**dataclasses.asdict(row), "share": row.share} for row in rows]
    text = json.dumps({"machine": facts, "rows": table}, indent=1, default=str)
    (directory / f"{stem}.json").write_text(text + "\n")
    (directory / f"{stem}.md").write_text(markdown(title, rows))
    print(f"written: {directory / stem}.json and .md")
