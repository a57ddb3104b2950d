"""What the benches share: timing in turn, one table in three forms, a plot, and what the machine is.

Implementations of one case are timed in turn (A B A B ...) in one process; a figure is a median of rounds, a
lead is a ratio of medians with the 20th to 80th percentile of the rounds' ratios beside it. One thread is
timed by the processor time of the process, which other work on the machine disturbs least; several by the
clock.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from honeytrace.doctor import doctor

ROUNDS = 7
ROUND_SECONDS = 0.03
SLOWEST = 4.0
"""Seconds of a call beyond which an implementation is timed three times only."""


@dataclasses.dataclass
class Row:
    """One case: what was done, and the seconds of a call for each implementation, ours first."""

    op: str
    case: str
    size: dict[str, int]
    settings: dict[str, Any]
    seconds: dict[str, list[float]]
    work: float
    """Units of work in a call."""
    extra_bytes: int | None = None
    unit: str = "features of pairs"

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    @property
    def series(self) -> str:
        """What is alike but for its size: the panel of the plot."""
        settings = self.settings
        kind = settings.get("data") or settings.get("model")
        kind = f"{settings['bent']:.0%} of rows bent" if "bent" in settings else kind
        parts = [self.op, kind, settings.get("dtype"), f"{settings.get('threads')} thread(s)"]
        return ", ".join(part for part in parts if part and part != "float32")

    @property
    def ours(self) -> str:
        return next(iter(self.seconds))

    def lead(self, name: str) -> tuple[float, float, float]:
        """How many times faster ours is: ratio of medians, 20th and 80th percentile of the rounds' ratios."""
        pairs = zip(self.seconds[name], self.seconds[self.ours], strict=False)
        ratios = sorted(theirs / mine for theirs, mine in pairs)
        rank = len(ratios) // 5
        return self.median(name) / self.median(self.ours), ratios[rank], ratios[-1 - rank]

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "op": self.op,
            "case": self.case,
            **self.size,
            **self.settings,
            "giga_per_second": self.work / self.median(self.ours) / 1e9,
            "microseconds": {name: self.median(name) * 1e6 for name in self.seconds},
            "extra_bytes": self.extra_bytes,
        }
        found["lead"] = {
            name: dict(zip(("ratio", "p20", "p80"), self.lead(name), strict=True))
            for name in self.seconds
            if name != self.ours
        }
        return found


def in_turn(functions: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of a call for each function: `rounds` times each, in turn, after one or two to warm up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    calls, times = {}, {}
    for name, function in functions.items():
        function()
        start = clock()
        function()
        once = max(clock() - start, 1e-7)
        calls[name] = max(1, int(ROUND_SECONDS / once))
        times[name] = rounds if once < SLOWEST else 3
    found: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        for name, function in functions.items():
            if number >= times[name]:
                continue
            start = clock()
            for _ in range(calls[name]):
                function()
            found[name].append((clock() - start) / calls[name])
    return found


def peak_extra_bytes(function: Callable[[], Any]) -> int | None:
    """How far the process's memory grows during one call, its results included; Linux only, else None.

    Memory that the process holds already and that the call uses again is not seen, so freed memory is given
    back first; what is left of this error is below a MiB.
    """
    try:
        function()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        result = function()
        peak = _status("VmHWM")
        del result
    except OSError:
        return None
    return max(0, peak - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log seconds over log size: 1 is linear."""
    x, y = [math.log(s) for s in sizes], [math.log(s) for s in seconds]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, instruction set, versions, commit."""
    facts = doctor()
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        named = [
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
        ]
        model = named[0].partition(":")[2].strip() if named else model
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "instruction_set": facts["core"].get("simd_level"),
        "compiler": (facts["core"].get("build") or {}).get("compiler"),
        "versions": facts["versions"],
        "commit": git.stdout.strip() or None,
        "load": round(os.getloadavg()[0], 1),
    }


def header(facts: dict[str, Any]) -> str:
    versions = facts["versions"]
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['instruction_set']}; "
        f"honeytrace {versions['honeytrace']} at {facts['commit']}, torch {versions['torch']}, "
        f"Python {versions['python']}, {facts['compiler']}; load {facts['load']} at the start"
    )


def cells(row: Row, names: Sequence[str], unit: str) -> list[str]:
    found = [row.op, row.case, f"{row.median(row.ours) * 1e6:,.1f}"]
    found.append(f"{row.work / row.median(row.ours) / 1e9:.1f}" if unit else "")
    for name in names:
        if name in row.seconds:
            ratio, low, high = row.lead(name)
            found.append(f"{ratio:.2f} [{low:.2f}, {high:.2f}]")
        else:
            found.append("-")
    found.append("-" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.1f}")
    return found


class Report:
    """Rows as they come, on the terminal at once; at the end as JSON, Markdown and a plot."""

    def __init__(self, title: str, names: Sequence[str], unit: str, options: argparse.Namespace) -> None:
        self.title, self.names, self.unit, self.options = title, list(names), unit, options
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.machine = machine()
        self.columns = ["op", "case", "us", unit, *[f"x {name}" for name in names], "extra MiB"]
        self.widths = [15, 44, 12, 8, *[20 for _ in names], 9]
        print(header(self.machine))
        self._print(self.columns)

    def _print(self, columns: Sequence[str]) -> None:
        print("  ".join(c.ljust(w) for c, w in zip(columns, self.widths, strict=True)), flush=True)

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        self._print(cells(row, self.names, self.unit))
        return row

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    def write(self) -> None:
        if self.options.json:
            content = {"title": self.title, "machine": self.machine, "notes": self.notes}
            content["rows"] = [row.to_dict() for row in self.rows]
            self.options.json.write_text(json.dumps(content, indent=1) + "\n")
        if self.options.markdown:
            self.options.markdown.write_text(self.markdown())
        if self.options.plot:
            plot(self.rows, self.title, self.options.plot)

    def markdown(self) -> str:
        """The table, with the machine above it and the notes below."""
        lines = [f"# {self.title}", "", header(self.machine), ""]
        lines.append(
            "`x name`: how many times faster ours is, ratio of medians and 20th to 80th percentile of the "
            "rounds' ratios; below 1 it is slower."
        )
        lines += ["", "| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(cells(row, self.names, self.unit)) + " |" for row in self.rows]
        return "\n".join([*lines, "", *[f"- {note}" for note in self.notes], ""])


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Seconds over work, both logarithmic: a panel for each series, a line for each implementation."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    series = list(dict.fromkeys(row.series for row in rows))
    columns = min(4, len(series))
    lines = -(-len(series) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4.2 * columns, 3.6 * lines), squeeze=False)
    names = list(dict.fromkeys(name for row in rows for name in row.seconds))
    palette = pyplot.rcParams["axes.prop_cycle"].by_key()["color"]
    colours = dict(zip(names, palette, strict=False))
    for axis in axes.flat[len(series) :]:
        axis.axis("off")
    for axis, label in zip(axes.flat, series, strict=False):
        for name in names:
            points = sorted((r.work, r.median(name)) for r in rows if r.series == label and name in r.seconds)
            if points:
                axis.plot(*zip(*points, strict=True), "o-", ms=3, lw=1, label=name, color=colours[name])
        unit = next(r.unit for r in rows if r.series == label)
        axis.set(xscale="log", yscale="log", xlabel=unit, ylabel="seconds")
        axis.set_title(label, fontsize=9)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all benches have."""
    found = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    found.add_argument("--quick", action="store_true", help="few sizes, one thread")
    found.add_argument("--threads", type=int, default=None, help="default: one, then all")
    found.add_argument(
        "--compile", action="store_true", help="also torch.compile (half a minute for each case)"
    )
    found.add_argument("--data", choices=["digits", "fashion"], default="digits", help="of the real features")
    found.add_argument("--json", type=Path)
    found.add_argument("--markdown", type=Path)
    found.add_argument("--plot", type=Path)
    return found


def thread_counts(options: argparse.Namespace) -> list[int]:
    if options.threads is not None:
        return [options.threads]
    every = os.cpu_count() or 1
    return [1] if options.quick or every == 1 else [1, every]


def use_threads(count: int) -> None:
    torch.set_num_threads(count)
    try:
        import faiss
    except ImportError:
        return
    faiss.omp_set_num_threads(count)
