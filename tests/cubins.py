"""What nvcc makes of csrc/cuda, without a GPU: registers, memory and machine code of every kernel.

python tests/cubins.py prints the table.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED_LIMIT = {
    80: 163 * 1024,
    90: 227 * 1024,
}  # bytes of a multiprocessor, CUDA C++ programming guide, table 27


@functools.cache
def nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@functools.cache
def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or its copy in Triton's wheel."""
    found = importlib.util.find_spec("triton")
    folder = Path(found.origin).parent / "backends/nvidia/bin" if found and found.origin else None
    return shutil.which(name) or (shutil.which(name, path=folder) if folder else None)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """name as in the source, the metric behind it; registers and stack bytes of a thread; instructions."""

    name: str
    capability: int
    registers: int
    stack: int
    local: int
    instructions: collections.Counter[str]

    def count(self, *parts: str) -> int:
        """Instructions in whose names all parts occur, the first at the beginning."""
        return sum(
            n
            for name, n in self.instructions.items()
            if name.startswith(parts[0]) and all(part in name for part in parts)
        )

    def blocks(self, shared: int, threads: int = 128) -> int:
        """Blocks that a multiprocessor holds, by registers, shared memory and threads."""
        by_registers = 65536 // (threads * -(-self.registers // 8) * 8)
        limit = SHARED_LIMIT.get(self.capability, 99 * 1024)
        return min(by_registers, limit // (shared + 1024), 2048 // threads)


def output(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, cwd=cwd
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def readable(symbol: str) -> str:
    """tile_kernel L1, of _ZN10honeytrace6device11tile_kernelINS0_2L1EEE..."""
    found = re.match(r"_ZN10honeytrace6device\d+([a-z_]+_kernel)(?:INS0_\d+(\w+?)E)?E", symbol)
    assert found is not None, symbol
    return " ".join(filter(None, found.groups()))


def read(cubin: Path, capability: int) -> list[Kernel]:
    usage = output(str(tool("cuobjdump")), "-res-usage", cubin)
    code = output(str(tool("nvdisasm")), "-c", cubin)
    parts = dict(re.findall(r"\.section\s+\.text\.(\w+),[^\n]*\n(.*?)(?=\n//-----|\Z)", code, re.DOTALL))
    kernels = []
    for symbol, figures in re.findall(r"Function (\w+):\n([^\n]*)", usage):
        sizes = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", figures)}
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", parts[symbol])
        kernels.append(
            Kernel(
                readable(symbol),
                capability,
                sizes["REG"],
                sizes["STACK"],
                sizes["LOCAL"],
                collections.Counter(opcodes),
            )
        )
    return kernels


def compile_all(
    flags: list[str], sources: list[str], capabilities: list[int], directory: Path
) -> dict[tuple[str, int], Kernel]:
    """(name, capability) -> kernel. The objects stay in `directory`."""

    def compile_one(source: str) -> list[Kernel]:
        target = directory / f"{Path(source).name}.o"
        architectures = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in capabilities]
        output(str(nvcc()), *flags, f"-I{ROOT / 'csrc'}", *architectures, "-c", ROOT / source, "-o", target)
        output(str(tool("cuobjdump")), "-xelf", "all", target, cwd=directory)
        return [
            kernel
            for number in capabilities
            for cubin in directory.glob(f"{Path(source).name}.*.sm_{number}.cubin")
            for kernel in read(cubin, number)
        ]

    with ThreadPoolExecutor(2) as pool:
        found = [kernel for kernels in pool.map(compile_one, sources) for kernel in kernels]
    return {(kernel.name, kernel.capability): kernel for kernel in found}


def link(directory: Path) -> Path:
    """honeytrace._cuda of the objects in `directory`, with nvcc's runtime linked in, as setup.py does it."""
    import pybind11

    bindings, module = directory / "bindings.o", directory / "_cuda.so"
    described = [f'-DHONEYTRACE_{name}="x"' for name in ("VERSION", "COMPILER", "ARCHITECTURES")]
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = ["c++", "-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", *described]
    command += [f"-I{path}" for path in includes]
    output(*command, "-c", ROOT / "csrc/bindings_cuda.cpp", "-o", bindings)
    objects = sorted(directory.glob("*.cu.o"))
    output(str(nvcc()), "-shared", "-cudart=static", *objects, bindings, "-o", module)
    return module


def capabilities() -> list[int]:
    """Those that this nvcc compiles for, from 8.0 on."""
    found = (int(name) for name in re.findall(r"compute_(\d+)\b", output(str(nvcc()), "--list-gpu-arch")))
    return sorted(number for number in found if number >= 80)


FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
SOURCES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))]
TELLING = ["LDG.E.128", "LDGSTS.E", "LDS.128", "STG.E.128", "FADD", "FFMA", "DFMA", "MUFU", "SHFL", "BAR"]


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        kernels = compile_all(FLAGS, SOURCES, [80, 90], Path(directory))
    for kernel in kernels.values():
        notes = " ".join(f"{name}={kernel.count(name)}" for name in TELLING if kernel.count(name))
        print(
            f"{kernel.name:28} {kernel.capability:>3} {kernel.registers:>4} {kernel.stack:>3} "
            f"{kernel.local:>3}  {notes}"
        )


if __name__ == "__main__":
    sys.exit(main())
