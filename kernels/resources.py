"""What the compiler makes of the kernels, without a GPU: registers, shared and local memory, machine code.

Each kernel is compiled ahead of time with the tile sizes it is launched with, to a cubin for sm_80 and sm_90,
and read with the tools that come with Triton. `python -m honeytrace.kernels.resources` prints the table. This
needs compiled kernels: not under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from . import compose, feature_distance, sign_hash, watermark_mix
from .configs import RESCORE, TABLE
from .language import INTERPRETED, OPTIONS

TARGETS = (80, 90)
"""Compute capabilities that are compiled for: A100 and H100."""

L1, L2, LP, COSINE = feature_distance.L1, feature_distance.L2, feature_distance.LP, feature_distance.COSINE


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel with one set of compile-time values: `types` as Triton writes them, for the other
    arguments."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 1
    registers: int | None = None
    aligned: tuple[str, ...] = ()
    """Integer arguments that are multiples of 16 at launch, besides all pointers."""


@dataclasses.dataclass(frozen=True)
class Resources:
    """registers and local bytes of a thread, shared bytes of a block, and how often each instruction
    occurs."""

    case: Case
    capability: int
    registers: int
    local: int
    stack: int
    shared: int
    instructions: collections.Counter[str]

    def count(self, prefix: str) -> int:
        """Instructions whose name starts with `prefix`, as LDG.E.128 does with LDG."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix))

    def blocks(self) -> int:
        """Blocks of this kernel that a multiprocessor holds, by registers, shared memory and threads."""
        threads = 32 * self.case.warps
        shared_limit = 227 * 1024 if self.capability >= 90 else 163 * 1024
        by_registers = 65536 // (threads * -(-self.registers // 8) * 8)
        by_shared = shared_limit // (self.shared + 1024)
        return min(by_registers, by_shared, 2048 // threads, 32)


_POINTERS = {
    "q_ptr": "*fp32",
    "b_ptr": "*fp32",
    "rows_ptr": "*fp32",
    "q_norm_ptr": "*fp32",
    "norm_ptr": "*fp32",
    "above_ptr": "*i64",
    "keys_ptr": "*i64",
    "packed_ptr": "*fp32",
    "finite_ptr": "*i8",
    "distance_ptr": "*fp32",
    "index_ptr": "*i32",
    "exhaustive_ptr": "*i8",
    "planes_ptr": "*fp32",
    "bucket_ptr": "*i64",
    "similarity_ptr": "*fp32",
    "offset_ptr": "*fp32",
    "scale_ptr": "*fp32",
    "target_ptr": "*fp32",
    "rule_ptr": "*fp64",
    "clipped_ptr": "*fp32",
    "group_ptr": "*i64",
    "flipped_ptr": "*i8",
    "seed": "i64",
}
_FLOATS = ("p", "inverse_p", "inverse_p_low", "error", "slack", "confidence_weight", "largest")


def _types(kernel: Any, data: str) -> dict[str, str]:
    """Types of the arguments that are not compile-time values: data tensors of type `data`."""
    types = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            continue
        default = f"*{data}" if name.endswith("_ptr") else "fp32" if name in _FLOATS else "i32"
        types[name] = _POINTERS.get(name, default)
    return types


def cases() -> Iterator[Case]:
    """Every kernel with the tile sizes of `configs`, for float32 unless its name says otherwise."""
    kernels = feature_distance
    metrics = (
        ("l1", L1, 0),
        ("l2", L2, 0),
        ("l3", LP, 6),
        ("l1.5", LP, 3),
        ("lp", LP, 0),
        ("cosine", COSINE, 0),
    )
    for path, size in (("tile", "large"), ("tile", "small"), ("few", "large")):
        for metric, code, halves in metrics:
            config = TABLE[path, kernels.metric_name(code, halves), size]
            yield Case(
                f"nearest {path} {metric}{' small' if size == 'small' else ''}",
                kernels.nearest_kernel,
                _types(kernels.nearest_kernel, "fp32"),
                {
                    "METRIC": code,
                    "HALVES": halves,
                    "SLOTS": 16,
                    "FEW": path == "few",
                    "LATER": False,
                    "BLOCK_Q": config.block_q,
                    "BLOCK_M": config.block_m,
                    "UNROLL": config.unroll,
                },
                config.warps,
                registers=config.registers,
                aligned=("width",),
            )
    for name, metric, code, data, size in (
        ("l2", "l2", L2, "fp32", "large"),
        ("l2 small", "l2", L2, "fp32", "small"),
        ("l2 bfloat16", "l2", L2, "bf16", "large"),
        ("cosine", "cosine", COSINE, "fp32", "large"),
    ):
        dot = TABLE["dot", metric, size]
        yield Case(
            f"candidates {name}",
            kernels.candidates_kernel,
            _types(kernels.candidates_kernel, data),
            {
                "METRIC": code,
                "SLOTS": 16,
                "BLOCK_Q": dot.block_q,
                "BLOCK_M": dot.block_m,
                "BLOCK_D": dot.block_d,
            },
            dot.warps,
            dot.stages,
            dot.registers,
            aligned=("width", "stride"),
        )
    for metric, code in (("l2", L2), ("cosine", COSINE)):
        for keys in (16, 128):
            yield Case(
                f"rescore {metric} {keys}",
                kernels.rescore_kernel,
                _types(kernels.rescore_kernel, "fp32"),
                {"METRIC": code, "SLOTS": 16, "KEYS": keys, "UNROLL": dot.unroll},
                RESCORE.warps,
                registers=RESCORE.registers,
                aligned=("width",),
            )
    for keys, warps in ((256, 1), (2048, 4)):
        yield Case(
            f"merge {keys}",
            kernels.merge_kernel,
            _types(kernels.merge_kernel, "fp32"),
            {"SLOTS": 16, "KEYS": keys},
            warps,
        )
    for name, unit, data in (("", False, "fp32"), (" unit", True, "fp32"), (" bfloat16", False, "bf16")):
        yield Case(
            f"prepare{name}",
            kernels.prepare_kernel,
            _types(kernels.prepare_kernel, data),
            {"UNIT": unit, "BLOCK_D": 128},
            aligned=("width", "stride"),
        )
    yield Case(
        "sign_hash",
        sign_hash.sign_hash_kernel,
        _types(sign_hash.sign_hash_kernel, "fp32"),
        {"BLOCK_Q": 16, "BLOCK_D": 64},
        stages=2,
        aligned=("width", "stride"),
    )
    mix = watermark_mix.watermark_mix_kernel
    for name, whole, block, space, data in (
        ("128", True, 128, 1, "fp32"),
        ("1024", True, 1024, 1, "fp32"),
        ("1024 logits", True, 1024, 0, "fp32"),
        ("1024 bfloat16", True, 1024, 1, "bf16"),
        ("4096", True, 4096, 1, "fp32"),
        ("tiled", False, 4096, 1, "fp32"),
    ):
        yield Case(
            f"watermark_mix {name}",
            mix,
            _types(mix, data),
            {"FUSED": True, "SPACE": space, "WHOLE": whole, "BLOCK_C": block, "BLOCK_G": 8},
            watermark_mix.warps(block),
            aligned=("classes", "stride"),
        )
    for name, flat in (("flat", True), ("broadcast", False)):
        yield Case(
            f"compose {name}",
            compose.compose_kernel,
            _types(compose.compose_kernel, "fp32"),
            {"FLAT": flat, "BLOCK": 1024},
            aligned=("count",),
        )


def tool(name: str) -> Path:
    """A program of Triton's own NVIDIA tools."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _output(*command: str | os.PathLike[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_case(case: Case, capability: int) -> Resources:
    """Compile for a compute capability such as 90, and read the cubin.

    Raises:
        RuntimeError: under the interpreter, which leaves nothing to compile.
    """
    if INTERPRETED:
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1")
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    divisible = [["tt.divisibility", 16]]
    attributes = {
        (names.index(name),): divisible
        for name, kind in case.types.items()
        if kind.startswith("*") or name in case.aligned
    }
    source = triton.compiler.ASTSource(case.kernel, signature, case.constants, attributes)
    options = {"num_warps": case.warps, "num_stages": case.stages, "maxnreg": case.registers, **OPTIONS}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(tool("cuobjdump"), "-res-usage", cubin)
        code = _output(tool("nvdisasm"), "-c", cubin)
    figures = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code)
    return Resources(
        case=case,
        capability=capability,
        registers=figures["REG"],
        local=figures["LOCAL"],
        stack=figures["STACK"],
        shared=figures["SHARED"] + compiled.metadata.shared,
        instructions=collections.Counter(opcodes),
    )


def main() -> None:
    """Print registers, spills, shared memory, blocks on a multiprocessor and telling instructions."""
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    header = f"{'kernel':26} {'sm':>3} {'regs':>5} {'stack':>5} {'local':>5} {'shared':>7} {'blocks':>6}"
    print(f"{header}  instructions")
    for case in cases():
        if wanted not in case.name:
            continue
        for capability in TARGETS:
            r = compile_case(case, capability)
            telling = (
                "LDG.E.128",
                "LDG.E.64",
                "LDG",
                "LDGSTS",
                "LDL",
                "STL",
                "HMMA",
                "HGMMA",
                "BAR",
                "SHFL",
                "FADD",
            )
            notes = " ".join(f"{name}={r.count(name)}" for name in telling if r.count(name))
            print(
                f"{case.name:26} {capability:>3} {r.registers:>5} {r.stack:>5} {r.local:>5} {r.shared:>7} "
                f"{r.blocks():>6}  {notes}",
                flush=True,
            )


if __name__ == "__main__":
    main()
