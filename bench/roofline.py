"""The least time that each GPU kernel can take: operations, bytes, and the floor on A100 and H100.

A measured time divided into its floor is the share of the machine that a kernel uses. Nothing here is
measured and no GPU is needed.

    python bench/roofline.py [--json FILE]

The CUDA kernels take differences on the vector units throughout; the Triton kernels select on tensor cores
where they can (l2, cosine, and the sign hash), in rows of their own here. The GPU benches divide these floors
by what they measure.

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
WATERMARK_SIZES = [  # B, G, M, D, C
    (1, 1, 500, 512, 10),
    (32, 8, 500, 512, 100),
    (256, 1, 500, 512, 10),
    (256, 8, 500, 512, 100),
    (1024, 8, 500, 2048, 1000),
]
COMPOSE_SIZES = [(32, 3 * 32 * 32), (256, 3 * 224 * 224)]
K = 10


def distance(
    metric: str, batch: int, groups: int, rows: int, width: int, *, tensor_cores: bool = False
) -> Work:
    """The k nearest rows of each group; on tensor cores by three products, then 16 candidates directly."""
    pairs = batch * groups * rows * width
    traffic = 4 * (batch * width + groups * rows * width + batch * groups * (1 + K))
    size = f"B={batch} G={groups} M={rows} D={width}"
    if tensor_cores:
        rescored = 16 * batch * groups * width
        return Work(f"feature_distance {metric}, tensor cores", size, 2 * rescored, 3 * 2 * pairs, traffic)
    return Work(f"feature_distance {metric}", size, PAIR_INSTRUCTIONS[metric] * pairs, 0, traffic)


def sign_hash(batch: int, width: int, *, tensor_cores: bool = False) -> Work:
    """64 planes."""
    traffic, products = 4 * (batch * width + 64 * width) + 8 * batch, 64 * batch * width
    name, size = "sign_hash", f"B={batch} D={width} P=64"
    if tensor_cores:
        return Work(f"{name}, tensor cores", size, 0, 3 * 2 * products, traffic)
    return Work(name, size, products, 0, traffic)


def mix(batch: int, classes: int, dtype: str = "float32") -> Work:
    """Probability space, 8 groups: three exponentials, a logarithm and more, 40 instructions for a class."""
    element = 4 if dtype == "float32" else 2
    traffic = 2 * element * batch * classes + 4 * 8 * classes + batch * (4 * 8 + 8 + 8 + 1)
    return Work("watermark_mix", f"B={batch} C={classes} {dtype}", 40 * batch * classes, 0, traffic)


def watermark(metric: str, batch: int, groups: int, rows: int, width: int, classes: int) -> Work:
    """All three in one call, every distance to the end: a call that stops early may beat this floor."""
    steps = (distance(metric, batch, groups, rows, width), sign_hash(batch, width), mix(batch, classes))
    return Work(
        f"watermark {metric}",
        f"B={batch} G={groups} M={rows} D={width} C={classes}",
        sum(step.instructions for step in steps),
        0,
        sum(step.bytes for step in steps),
    )


def compose(batch: int, elements: int) -> Work:
    count = batch * elements
    return Work("compose", f"B={batch} N={elements}", 6 * count, 0, 4 * (3 * count + elements))


def distance_work() -> Iterator[Work]:
    for batch, groups, rows, width in DISTANCE_SIZES:
        for metric in PAIR_INSTRUCTIONS:
            yield distance(metric, batch, groups, rows, width)
        if batch >= 16:
            for metric in ("l2", "cosine"):
                yield distance(metric, batch, groups, rows, width, tensor_cores=True)


def other_work() -> Iterator[Work]:
    for batch, width in HASH_SIZES:
        yield sign_hash(batch, width)
        yield sign_hash(batch, width, tensor_cores=True)
    for batch, classes in MIX_SIZES:
        yield mix(batch, classes)
        yield mix(batch, classes, "bfloat16")
    for size in WATERMARK_SIZES:
        yield watermark("l1", *size)
    for batch, elements in COMPOSE_SIZES:
        yield compose(batch, elements)


def device_of(name: str) -> Device | None:
    """The device of this table that a card's name speaks of, if any."""
    return next((device for device in DEVICES if device.name.split()[0] in name), None)


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
