"""Builds honeytrace._C. Everything else about the package is in pyproject.toml.

Environment, read here only:

HONEYTRACE_NO_EXT=1          no compiled core; the package works on its pure-torch reference
HONEYTRACE_CUDA=0|1|auto     1 is an error where CUDA cannot be built, never a CPU build in silence
HONEYTRACE_SANITIZE=...      address, undefined, thread; several joined by commas
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
IS_X86 = platform.machine().lower() in {"x86_64", "amd64"} and sys.maxsize > 2**32
IS_ARM = platform.machine().lower() in {"aarch64", "arm64"}

# No -march, so that one binary serves every machine of its platform; only the source of a level gets the
# level's instructions. No contraction: a multiply-add is fused where the source says so, on every compiler.
COMMON_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
LEVEL_FLAGS = {
    "level_avx2.cpp": AVX2_FLAGS,
    "level_avx512.cpp": [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}
SANITIZERS = ("address", "undefined", "thread")


def switch(name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, "") or default
    if value not in allowed:
        raise SetupError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def sanitizers() -> list[str]:
    names = [name for name in os.environ.get("HONEYTRACE_SANITIZE", "").split(",") if name]
    unknown = [name for name in names if name not in SANITIZERS]
    if unknown or {"address", "thread"} <= set(names):
        raise SetupError(
            "HONEYTRACE_SANITIZE takes address,undefined or thread (address and thread exclude each other), "
            f"got {os.environ['HONEYTRACE_SANITIZE']!r}"
        )
    return names


def check_cuda() -> None:
    """There are no CUDA sources in this version: say so to whoever insists on them."""
    if switch("HONEYTRACE_CUDA", "auto", ("0", "1", "auto")) != "1":
        return
    directories = os.pathsep.join([os.environ.get("PATH", ""), os.environ.get("CUDA_HOME", "") + "/bin"])
    if shutil.which("nvcc", path=directories) is None:
        raise SetupError("HONEYTRACE_CUDA=1: nvcc not found, neither on PATH nor in CUDA_HOME/bin")
    raise SetupError("HONEYTRACE_CUDA=1: the CUDA sources are not part of this version; use 0 or auto")


def core_sources() -> list[str]:
    levels = ["scalar"] + ["avx2", "avx512"] * IS_X86 + ["neon"] * IS_ARM
    files = ["bindings.cpp", "cpu/ops.cpp", *(f"cpu/level_{level}.cpp" for level in levels)]
    return [f"csrc/{name}" for name in [*files, "cpu/dispatch.cpp", "cpu/pool.cpp"]]


def core_extension() -> Extension:
    import pybind11

    sanitize = [f"-fsanitize={name}" for name in sanitizers()]
    # Optimising instrumented kernels takes GCC ten minutes and tells no more.
    debug = ["-g", "-O0", "-fno-omit-frame-pointer"] if sanitize else ["-g0"]
    strip = ["-Wl,-s"] if sys.platform.startswith("linux") and not sanitize else []
    return Extension(
        "honeytrace._C",
        sources=core_sources(),
        include_dirs=["csrc", pybind11.get_include()],
        extra_compile_args=[*COMMON_FLAGS, *debug, *sanitize],
        extra_link_args=[*sanitize, *strip, "-pthread"],
        language="c++",
    )


class BuildCore(build_ext):
    """Compiles each source with the flags of its level, several at a time; installs by a rename."""

    def build_extension(self, ext: Extension) -> None:
        version = self.distribution.get_version()
        compiler = compiler_version(self.compiler.compiler_so[0])
        described = {
            "HONEYTRACE_VERSION": version,
            "HONEYTRACE_COMPILER": compiler,
            "HONEYTRACE_FLAGS": " ".join(ext.extra_compile_args),
            "HONEYTRACE_SANITIZERS": ",".join(sanitizers()),
        }
        variant = "-".join(sanitizers()) or "release"
        objects_directory = str(Path(self.build_temp) / variant)

        def compile_one(source: str) -> list[str]:
            name = Path(source).name
            is_glue = name == "bindings.cpp"
            macros = [(key, f'"{value}"') for key, value in described.items() if is_glue]
            # -O1: pybind11's templates do not get faster by more, and compile in half the time.
            glue = ["-O1"] if is_glue and not sanitizers() else []
            return self.compiler.compile(
                [source],
                output_dir=objects_directory,
                macros=macros,
                include_dirs=ext.include_dirs,
                extra_postargs=[*ext.extra_compile_args, *glue, *LEVEL_FLAGS.get(name, [])],
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = [name for names in pool.map(compile_one, ext.sources) for name in names]
        target = Path(self.get_ext_fullpath(ext.name))
        linked = Path(objects_directory) / target.name
        self.compiler.link_shared_object(
            objects,
            str(linked),
            extra_postargs=ext.extra_link_args,
            target_lang="c++",
            build_temp=self.build_temp,
        )
        put_in_place(linked, target)

    def copy_extensions_to_source(self) -> None:
        build_py = self.get_finalized_command("build_py")
        for ext in self.extensions:
            package, _, _ = ext.name.rpartition(".")
            target = Path(build_py.get_package_dir(package)) / Path(self.get_ext_filename(ext.name)).name
            put_in_place(Path(self.build_lib) / self.get_ext_filename(ext.name), target)


def put_in_place(built: Path, target: Path) -> None:
    """Copies beside the target and renames: a process that has the old library loaded keeps it whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(built, partial)
    partial.chmod(0o755)
    partial.replace(target)


def compiler_version(command: str) -> str:
    try:
        text = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return command
    return text.splitlines()[0].replace('"', "'") if text else command


def packages() -> Iterator[str]:
    for init in sorted((ROOT / "honeytrace").rglob("__init__.py")):
        yield ".".join(init.parent.relative_to(ROOT).parts)
    yield "honeytrace.kernels"


def extensions() -> list[Extension]:
    check_cuda()
    if switch("HONEYTRACE_NO_EXT", "0", ("0", "1")) == "1":
        return []
    return [core_extension()]


setup(
    packages=list(packages()),
    # Triton kernels have a directory of their own in the repository and a place in the package.
    package_dir={"honeytrace": "honeytrace", "honeytrace.kernels": "kernels"},
    package_data={"honeytrace": ["py.typed", "_C.pyi"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildCore},
)
