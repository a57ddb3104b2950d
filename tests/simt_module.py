"""csrc/cuda compiled for the host: its kernels, launchers and bindings with every GPU thread a fibre
(tests/simt).

What comes out is `honeytrace._cuda` for CPU addresses, so that the backend `cuda` runs, kernel by kernel, on
CPU tensors.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [ROOT / "csrc" / "bindings_cuda.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
FLAGS = [
    "-std=c++17",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-U_FORTIFY_SOURCE",
]
DESCRIPTION = {"VERSION": "host", "COMPILER": "host", "ARCHITECTURES": "simt"}


def compiler() -> str | None:
    """GCC or Clang, by the name that they share."""
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def build(directory: Path) -> ModuleType:
    """Compile into `directory` and import."""
    import pybind11

    command = [str(compiler()), *FLAGS, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'simt'}"]
    command += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    command += [f'-DHONEYTRACE_{name}="{value}"' for name, value in DESCRIPTION.items()]

    def compile_one(source: Path) -> Path:
        target = directory / f"{source.name}.o"
        level = "-O0" if source.suffix == ".cpp" else "-O1"
        run([*command, level, "-x", "c++", "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    library = directory / "_cuda.so"
    run([command[0], "-shared", *map(str, objects), "-o", str(library)])
    spec = importlib.util.spec_from_file_location("_cuda", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
