"""Requests of all kinds to a served model, made by Schemathesis from the model's own OpenAPI description.

    python tests/fuzz_http.py [--examples 1000] [--seed 0]

Good requests must be answered as described, bad ones refused with a documented status, and nothing may be an
error of the server. Exit code 0 when all is so. The same, shorter, is a test: tests/test_serving_fuzz.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from served import serving
from torch import nn
from worlds import blobs, marked

from honeytrace.serving import Limits, Service

SETTINGS = """
[checks]
negative_data_rejection.expected-statuses = [400, 405, 413, 415, 422]
"""
"""A request with too many inputs may be too large before it is too many: 413."""


class Bounded(nn.Sequential):
    """The blobs' classifier behind a clamp, so that every finite input has a finite answer."""

    def forward(self, x: Any) -> Any:
        return super().forward(x.clamp(-1e3, 1e3))


class Counts:
    """Metrics that count."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()

    def answered(self, *, rows: int, seconds: float) -> None:
        self.statuses[200] += 1

    def refused(self, status: int) -> None:
        self.statuses[status] += 1

    def marked(self, *, rows: int, bent: int) -> None: ...


def fuzz(answers: Any, examples: int, seed: int, mode: str = "all") -> dict[str, Any]:
    """How the server fared: exit code and output of Schemathesis, and the statuses of /classify.

    mode: "positive" (requests that the description allows), "negative" (that it does not) or "all".
    """
    counts = Counts()
    model = Bounded(*blobs().model)
    service = Service(model, marked(), answers=answers, limits=Limits(rows=4), metrics=counts)
    with serving(service) as url, tempfile.TemporaryDirectory() as directory:
        Path(directory, "schemathesis.toml").write_text(SETTINGS)
        words = ["run", f"{url}/openapi.json", "--max-examples", str(examples), "--seed", str(seed)]
        words += ["--phases", "examples,coverage,fuzzing", "--mode", mode, "--workers", "1", "--no-color"]
        words += ["--generation-database", "none", "--suppress-health-check", "all"]
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=directory)
        alive = service.ready
    statuses = {str(status): number for status, number in sorted(counts.statuses.items())}
    return {
        "code": done.returncode,
        "alive": alive,
        "statuses": statuses,
        "output": done.stdout + done.stderr,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="of each operation and kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = {}
    for answers in ("probabilities", "labels"):
        for mode in ("positive", "negative"):
            result = fuzz(answers, given.examples, given.seed, mode)
            print(result.pop("output"))
            print(f"{answers}, {mode}: {result}", flush=True)
            found[f"{answers}, {mode}"] = result
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(any(result["code"] != 0 or not result["alive"] for result in found.values()))


if __name__ == "__main__":
    main()
