"""The least time that each GPU kernel can take: operations, bytes, and the floor on A100 and H100.

A measured time divided into its floor is the share of the machine that a kernel uses. Nothing here is
measured and no GPU is needed.

    python bench/roofline.py [--json FILE]

The floor is the largest of: bytes over memory bandwidth, with everything read and written once; instructions
of the vector units over their rate; products over the rate of the tensor cores. Kernels of few microseconds
are bound by launch latency instead, which the floor leaves out.

Peaks, without sparsity: NVIDIA A100 80GB SXM datasheet (2021: 19.5 TFLOP/s FP32, 156 TFLOP/s TF32, 2039 GB/s)
and NVIDIA H100 SXM datasheet (2023: 67 TFLOP/s FP32, 989 TFLOP/s TF32 with sparsity, half of it without,
3.35 TB/s). A FP32 FLOP/s peak counts two for a multiply-add; an addition alone is one instruction as well, so
the rate of instructions is half of the peak.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Device:
    """Peaks in units of a second: instructions of the vector units (lanes), TF32 operations, bytes."""

    name: str
    instructions: float
    tf32: float
    bytes: float


DEVICES = (
    Device("A100 80GB SXM", 19.5e12 / 2, 156e12, 2.039e12),
    Device("H100 SXM", 67e12 / 2, 494.5e12, 3.35e12),
)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a call must do: instructions of vector lanes, TF32 operations (two for a product) and bytes."""

    kernel: str
    size: str
    instructions: float
    tf32: float
    bytes: float

    def floor(self, device: Device) -> tuple[float, str]:
        """Seconds, and which limit it is."""
        times = {
            "memory": self.bytes / device.bytes,
            "vector": self.instructions / device.instructions,
            "tensor": self.tf32 / device.tf32,
        }
        limit = max(times, key=lambda name: times[name])
        return times[limit], limit


# Vector instructions for one feature of one pair: what the formula needs at the least, |.| being free.
PAIR_INSTRUCTIONS = {
    "l1": 2,  # subtract, add the absolute value
    "l2": 2,  # subtract, multiply-add
    "cosine": 2,
    "lp 3": 4,  # subtract, square, times |.|, add
    "lp 1.5": 5,  # subtract, root (two instructions, one of a quarter of the rate is not counted), times, add
    "lp any": 56,  # as compiled: a logarithm and an exponential with their exponents taken apart
}
DISTANCE_SIZES = [  # B, G, M, D
    (1, 1, 500, 512),
    (1, 8, 500, 512),
    (32, 1, 500, 512),
    (256, 1, 500, 512),
    (256, 8, 500, 512),
    (1024, 8, 500, 2048),
    (4096, 8, 2000, 1024),
]
MIX_SIZES = [(1, 10), (256, 100), (4096, 1000), (256, 21841)]
HASH_SIZES = [(1, 512), (256, 512), (4096, 2048)]
COMPOSE_SIZES = [(32, 3 * 32 * 32), (256, 3 * 224 * 224)]
K = 10


def distance_work() -> Iterator[Work]:
    for batch, groups, rows, width in DISTANCE_SIZES:
        pairs = batch * groups * rows * width
        size = f"B={batch} G={groups} M={rows} D={width}"
        traffic = 4 * (batch * width + groups * rows * width + batch * groups * (1 + K))
        for metric, instructions in PAIR_INSTRUCTIONS.items():
            yield Work(f"feature_distance {metric}", size, instructions * pairs, 0, traffic)
        if batch >= 16:
            # Three products for the selection, then 16 candidates of each query directly, read from their
            # rows.
            rescored = 16 * batch * groups * width
            for metric in ("l2", "cosine"):
                name = f"feature_distance {metric}, tensor cores"
                yield Work(name, size, 2 * rescored, 3 * 2 * pairs, traffic)


def other_work() -> Iterator[Work]:
    for batch, width in HASH_SIZES:
        traffic = 4 * (batch * width + 64 * width) + 8 * batch
        yield Work("sign_hash", f"B={batch} D={width} P=64", 0, 3 * 2 * 64 * batch * width, traffic)
    for batch, classes in MIX_SIZES:
        # Probability space: three exponentials, a logarithm and the rest, some 40 instructions for a class.
        for dtype, width in (("float32", 4), ("bfloat16", 2)):
            traffic = 2 * width * batch * classes + 4 * 8 * classes + batch * (4 * 8 + 8 + 8 + 1)
            size = f"B={batch} C={classes} {dtype}"
            yield Work("watermark_mix", size, 40 * batch * classes, 0, traffic)
    for batch, elements in COMPOSE_SIZES:
        count = batch * elements
        yield Work("compose", f"B={batch} N={elements}", 6 * count, 0, 4 * (3 * count + elements))


def table() -> list[dict[str, object]]:
    """One entry for each kernel and size: work, and for each device the floor in microseconds and its
    limit."""
    entries: list[dict[str, object]] = []
    for work in (*distance_work(), *other_work()):
        floors = {device.name: work.floor(device) for device in DEVICES}
        entries.append(
            {
                **dataclasses.asdict(work),
                "floor_us": {name: 1e6 * seconds for name, (seconds, _) in floors.items()},
                "limit": {name: limit for name, (_, limit) in floors.items()},
            }
        )
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description="Floors of the GPU kernels on A100 and H100.")
    parser.add_argument("--json", type=Path, help="write the table there")
    arguments = parser.parse_args()
    columns = "".join(f"{device.name + ' us':>18} {'limit':<7}" for device in DEVICES)
    print(f"{'kernel':<38}{'size':<30}{'instr':>10}{'tf32 op':>10}{'bytes':>10}{columns}")
    for work in (*distance_work(), *other_work()):
        cells = ""
        for device in DEVICES:
            seconds, limit = work.floor(device)
            cells += f"{1e6 * seconds:>18.3f} {limit:<7}"
        amounts = f"{work.instructions:>10.3g}{work.tf32:>10.3g}{work.bytes:>10.3g}"
        print(f"{work.kernel:<38}{work.size:<30}{amounts}{cells}")
    if arguments.json:
        devices = [dataclasses.asdict(device) for device in DEVICES]
        arguments.json.write_text(json.dumps({"devices": devices, "table": table()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
