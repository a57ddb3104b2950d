"""An HTTP soak on loopback: a model bare, protected, and protected in constant time, side by side.

    python bench/soak_http.py [--model vgg|cnn] [--rounds 12] [--json FILE]

Three servers, each a process of its own with one thread of PyTorch, answer the same queries in turn, block by
block, so that whatever else the machine does falls on all of them. Two loads:

    crowd    256 connections with 8 inputs each: 2,048 queries in flight at any moment
    single   one connection, one input at a time

The server's processor time for an input is given beside the rate: other work disturbs it least. Every answer
must have status 200 and hold one row of scores for each input; a sample is compared with the
first answer to the same question. Memory is that of the server process after each round, and its slope over
the rounds but for the first two.

The same functions, shorter, are a test: tests/test_serving_load.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CONNECTIONS, ROWS = 256, 8
"""Of the crowd."""

SERVE = """
import json, sys
import uvicorn
from honeytrace.serving import Limits, ServiceSpec
from honeytrace.serving.http import create_app
given = json.loads(sys.argv[1])
given["settings"]["limits"] = Limits(waiting=1 << 14)
app = create_app(ServiceSpec(**given).load())
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False)
"""


@dataclasses.dataclass
class Answers:
    """What one load has found at one server."""

    seconds: list[float] = dataclasses.field(default_factory=list)
    """Of every request."""
    rates: list[float] = dataclasses.field(default_factory=list)
    """Inputs a second, of every block."""
    work: list[float] = dataclasses.field(default_factory=list)
    """Seconds of the server's processor time for an input, of every block."""
    errors: list[str] = dataclasses.field(default_factory=list)
    compared: int = 0

    def to_dict(self) -> dict[str, Any]:
        quantiles = np.quantile(self.seconds, [0.5, 0.99]) * 1e3
        return {
            "requests": len(self.seconds),
            "errors": len(self.errors),
            "compared": self.compared,
            "p50_ms": float(quantiles[0]),
            "p99_ms": float(quantiles[1]),
            "inputs_per_second": statistics.median(self.rates),
            "processor_us_per_input": statistics.median(self.work) * 1e6,
        }


class Connection:
    """One keep-alive connection that asks and reads, no more."""

    def __init__(self, host: str, port: int) -> None:
        self._place, self._streams = (host, port), None

    async def ask(self, body: bytes) -> tuple[int, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._place)
        reader, writer = self._streams
        head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        header = await reader.readuntil(b"\r\n\r\n")
        fields = header.decode().lower().split("\r\n")
        length = next(int(f.partition(":")[2]) for f in fields if f.startswith("content-length:"))
        return int(fields[0].split()[1]), await reader.readexactly(length)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


async def block(
    server: tuple[int, int],
    bodies: Sequence[bytes],
    *,
    rows: int,
    connections: int,
    requests: int,
    answers: Answers,
    known: dict[int, Any],
) -> None:
    """`requests` requests of `rows` inputs over `connections` connections, each with the next body."""
    port, process = server
    held = [Connection("127.0.0.1", port) for _ in range(connections)]
    numbers = iter(range(requests))

    async def client(connection: Connection) -> None:
        for number in numbers:
            which = number % len(bodies)
            start = time.perf_counter()
            try:
                status, content = await connection.ask(bodies[which])
            except (OSError, EOFError, ValueError, asyncio.IncompleteReadError) as error:
                answers.errors.append(type(error).__name__)
                return
            answers.seconds.append(time.perf_counter() - start)
            if status != 200:
                answers.errors.append(f"status {status}")
            elif number % 16 == 0 or which not in known:
                scores = np.array(json.loads(content)["scores"])
                first = known.setdefault(which, scores)
                answers.compared += 1
                if scores.shape != first.shape or not np.allclose(scores, first, rtol=1e-3, atol=1e-5):
                    answers.errors.append("another answer to the same question")

    start, work = time.perf_counter(), processor_time(process)
    await asyncio.gather(*map(client, held))
    answers.rates.append(rows * requests / (time.perf_counter() - start))
    answers.work.append((processor_time(process) - work) / (rows * requests))
    for connection in held:
        connection.close()


def bodies_of(inputs: Any, rows: int) -> list[bytes]:
    """Requests of `rows` inputs each."""
    whole = inputs[: len(inputs) // rows * rows]
    return [json.dumps({"inputs": part.tolist()}).encode() for part in whole.split(rows)]


def processor_time(pid: int) -> float:
    """Seconds that all threads of a process have run."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has ended
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def memory(pid: int) -> float:
    """MiB of a process that are in memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return float("nan")


def soak(
    servers: dict[str, tuple[int, int]], inputs: Any, *, rounds: int, blocks: dict[str, int]
) -> dict[str, Any]:
    """Ask the servers in turn.

    Args:
        servers: name -> (port, process). The first is the one the others are compared with.
        inputs: a tensor [N, ...], N >= 8.
        rounds: of all loads at all servers.
        blocks: requests in a block of each load, "crowd" and "single".
    """
    loads = {"crowd": (CONNECTIONS, bodies_of(inputs, ROWS)), "single": (1, bodies_of(inputs, 1))}
    found = {load: {name: Answers() for name in servers} for load in loads}
    known: dict[tuple[str, str], dict[int, Any]] = {(a, b): {} for a in loads for b in servers}
    sizes: dict[str, list[float]] = {name: [] for name in servers}
    for turn in range(rounds):
        order = list(servers)[turn % len(servers) :] + list(servers)[: turn % len(servers)]
        for load, (connections, bodies) in loads.items():
            for name in order:
                asyncio.run(
                    block(
                        servers[name],
                        bodies,
                        rows=ROWS if load == "crowd" else 1,
                        connections=connections,
                        requests=blocks[load],
                        answers=found[load][name],
                        known=known[load, name],
                    )
                )
        for name, (_, process) in servers.items():
            sizes[name].append(memory(process))
    bare = next(iter(servers))
    result: dict[str, Any] = {"rounds": rounds, "in_flight": CONNECTIONS * ROWS}
    for load in loads:
        for name, answers in found[load].items():
            result[f"{load}, {name}"] = answers.to_dict() | {
                "rate_of_bare": ratio(answers.rates, found[load][bare].rates),
                "work_of_bare": ratio(answers.work, found[load][bare].work),
                "first_errors": answers.errors[:3],
            }
    for name, seen in sizes.items():
        settled = seen[min(2, len(seen) - 1) :]
        slope = float(np.polyfit(range(len(settled)), settled, 1)[0]) if len(settled) > 1 else 0.0
        asked = sum(len(found[load][name].seconds) for load in loads) / rounds
        result[f"memory, {name}"] = {
            "first_mib": seen[0],
            "last_mib": seen[-1],
            "mib_per_1000_requests": slope / asked * 1000,
        }
    return result


def ratio(mine: Sequence[float], bare: Sequence[float]) -> list[float]:
    """Of each round's figures: median, 20th and 80th percentile."""
    found = sorted(a / b for a, b in zip(mine, bare, strict=True))
    rank = len(found) // 5
    return [statistics.median(found), found[rank], found[-1 - rank]]


@contextlib.contextmanager
def server(spec: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """(port, process) of a server in a process of its own."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SERVE, json.dumps(spec), str(port)], env=environment)
    try:
        last = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
                break
            assert process.poll() is None, "the server ended"
            assert time.monotonic() < last, "the server is not ready"
            time.sleep(0.1)
        yield port, process.pid
    finally:
        process.terminate()
        process.wait(20)


def vgg() -> Any:
    """VGG16 with batch normalisation, 512 features, for the digits."""
    from honeytrace import models

    return models.vgg(10, 1, 8, depth=16, width=64)


def cnn() -> Any:
    """The default victim, 128 features, for the digits."""
    from honeytrace import models

    return models.small_cnn(10, 1, 8)


def make_files(kind: str, directory: Path) -> Any:
    """Weights and watermark of a trained model; the test inputs."""
    import torch
    from safetensors.torch import save_file

    import honeytrace as ht
    from honeytrace import data, training

    splits = data.digits()
    weights, mark = directory / f"{kind}.safetensors", directory / f"{kind}.honeytrace"
    if not mark.exists():
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        model = training.seeded({"vgg": vgg, "cnn": cnn}[kind], 1)
        # A few steps make a good classifier of digits, and the large one takes most of a second for each.
        count, epochs = (3000, 2) if kind == "vgg" else (len(splits.train.inputs), 3)
        training.fit(model, *(part[:count] for part in splits.train), epochs=epochs, seed=1)
        print(f"{kind}: {training.accuracy(model, *splits.test):.2%} of the test images", file=sys.stderr)
        wm = ht.Watermark.calibrate(
            model, splits.train, key=ht.SecretKey.generate(), trigger_data=splits.test
        )
        save_file(model.state_dict(), weights)
        wm.save(mark)
    return splits.pool.inputs[:2048]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=["vgg", "cnn"], default="vgg")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--crowd", type=int, default=768, help="requests of a block")
    parser.add_argument("--single", type=int, default=200, help="requests of a block")
    parser.add_argument("--directory", type=Path, help="keep trained model and watermark there")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        kept = given.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        inputs = make_files(given.model, kept)
        common = {
            "model": f"{Path(__file__).resolve()}:{given.model}",
            "weights": str(kept / f"{given.model}.safetensors"),
            "threads": 1,
        }
        mark = str(kept / f"{given.model}.honeytrace")
        specs = {
            "bare": {"watermark": None, "settings": {"input_shape": list(inputs.shape[1:])}},
            "protected": {"watermark": mark, "settings": {}},
            "constant time": {"watermark": mark, "settings": {"constant_time": True}},
        }
        servers = {name: stack.enter_context(server({**common, **spec})) for name, spec in specs.items()}
        blocks = {"crowd": given.crowd, "single": given.single}
        soak(servers, inputs, rounds=1, blocks=blocks)  # warm
        found = {"model": given.model, **soak(servers, inputs, rounds=given.rounds, blocks=blocks)}
    for name, values in found.items():
        print(f"{name:24} {values}")
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
