"""Builds honeytrace._C and honeytrace._cuda. Everything else about the package is in pyproject.toml.

Environment, read here only:

HONEYTRACE_NO_EXT=1          no compiled core; the package works on its pure-torch reference (as always on
                             Windows, whose compiler does not take the core's sources)
HONEYTRACE_CUDA=0|1|auto     CUDA kernels: never; always, an error where they cannot be built, never a CPU
                             build in silence; or (the default) where there are nvcc and an NVIDIA driver
HONEYTRACE_CUDA_ARCH=...     compute capabilities to build for, joined by commas, such as 8.0,9.0 (the
                             default); the highest is also kept as PTX for newer GPUs. Where it is set, auto
                             builds if there is nvcc, with or without a driver
HONEYTRACE_SANITIZE=...      address, undefined, thread; several joined by commas (of honeytrace._C alone)
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

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
Built = TypeVar("Built")
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


def find_nvcc() -> str | None:
    """On PATH, in CUDA_HOME, or where NVIDIA's installers put it."""
    home = os.environ.get("CUDA_HOME", "")
    directories = [os.environ.get("PATH", ""), f"{home}/bin" if home else "", "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(filter(None, directories)))


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def cuda_architectures() -> list[str]:
    """As nvcc writes them: 8.0 is 80."""
    text = os.environ.get("HONEYTRACE_CUDA_ARCH", "") or "8.0,9.0"
    names = [part.strip() for part in text.replace(";", ",").split(",")]
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?", name) or float(name.rstrip("af")) < 8.0:
            raise SetupError(
                "HONEYTRACE_CUDA_ARCH must be compute capabilities of 8.0 or above, joined by commas, "
                f"such as 8.0,9.0, got {text!r}"
            )
    return [name.replace(".", "") for name in names]


def nvcc_to_use() -> str | None:
    """The compiler of the CUDA kernels, or None where they are not to be built."""
    wanted = switch("HONEYTRACE_CUDA", "auto", ("0", "1", "auto"))
    cuda_architectures()  # a wrong value is an error, wanted or not
    nvcc = find_nvcc()
    if wanted == "1":
        if nvcc is None:
            raise SetupError(
                "HONEYTRACE_CUDA=1: nvcc not found, neither on PATH nor in CUDA_HOME/bin nor in "
                "/usr/local/cuda/bin"
            )
        if switch("HONEYTRACE_NO_EXT", "0", ("0", "1")) == "1":
            raise SetupError("HONEYTRACE_CUDA=1 and HONEYTRACE_NO_EXT=1 exclude each other")
        return nvcc
    asked_for = bool(os.environ.get("HONEYTRACE_CUDA_ARCH")) or has_driver()
    return nvcc if wanted == "auto" and asked_for else None


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


# No contraction here either: the kernels fuse where they say so, as the core does, and answers agree.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc"]
CUDA_SOURCES = [
    f"csrc/cuda/{name}.cu" for name in ("launch", "metric_l1", "metric_l2", "metric_lp", "metric_cosine")
]
CUDA_HEADERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.*h"))


def architecture_flags() -> list[str]:
    names = cuda_architectures()
    flags = [flag for name in names for flag in ("-gencode", f"arch=compute_{name},code=sm_{name}")]
    newest = max(names, key=lambda name: int(name.rstrip("af")))
    return [*flags, "-gencode", f"arch=compute_{newest},code=compute_{newest}"]


def cuda_extension() -> Extension:
    import pybind11

    return Extension(
        "honeytrace._cuda",
        sources=["csrc/bindings_cuda.cpp", *CUDA_SOURCES],
        depends=CUDA_HEADERS,
        include_dirs=["csrc", pybind11.get_include()],
        extra_compile_args=[*COMMON_FLAGS, "-g0", "-O1"],
        language="c++",
    )


class BuildCore(build_ext):
    """Compiles each source with the flags of its level, several at a time; installs by a rename."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "honeytrace._cuda":
            self.build_cuda(ext)
        else:
            self.build_core(ext)

    def build_cuda(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        assert nvcc is not None  # or there would be no such extension
        objects_directory = Path(self.build_temp) / "cuda"
        objects_directory.mkdir(parents=True, exist_ok=True)
        described = {
            "HONEYTRACE_VERSION": self.distribution.get_version(),
            "HONEYTRACE_COMPILER": compiler_version(nvcc, line=-1),
            "HONEYTRACE_ARCHITECTURES": ",".join(cuda_architectures()),
        }

        def compile_one(source: str) -> str:
            if source.endswith(".cpp"):
                (compiled,) = self.compiler.compile(
                    [source],
                    output_dir=str(objects_directory),
                    macros=[(key, f'"{value}"') for key, value in described.items()],
                    include_dirs=ext.include_dirs,
                    extra_postargs=ext.extra_compile_args,
                    depends=ext.depends,
                )
                return str(compiled)
            target = str(objects_directory / (Path(source).name + ".o"))
            self.run_nvcc([nvcc, *NVCC_FLAGS, *architecture_flags(), "-c", source, "-o", target])
            return target

        objects = self.in_parallel(compile_one, ext.sources)
        linked = objects_directory / Path(self.get_ext_fullpath(ext.name)).name
        # By nvcc, which knows where its runtime is. That is linked in, so the module loads where there is no
        # driver, and says so when asked.
        self.run_nvcc([nvcc, "-shared", "-cudart=static", "-Xlinker=-s", *objects, "-o", str(linked)])
        put_in_place(linked, Path(self.get_ext_fullpath(ext.name)))

    def run_nvcc(self, command: list[str]) -> None:
        self.announce(" ".join(command), level=2)
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SetupError(f"nvcc failed: {error}") from error

    def in_parallel(self, function: Callable[[str], Built], sources: list[str]) -> list[Built]:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return list(pool.map(function, sources))

    def build_core(self, ext: Extension) -> None:
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

        objects = [name for names in self.in_parallel(compile_one, ext.sources) for name in names]
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


def compiler_version(command: str, line: int = 0) -> str:
    try:
        text = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return command
    return text.splitlines()[line].replace('"', "'") if text else command


def packages() -> Iterator[str]:
    for init in sorted((ROOT / "honeytrace").rglob("__init__.py")):
        yield ".".join(init.parent.relative_to(ROOT).parts)
    yield "honeytrace.kernels"


def extensions() -> list[Extension]:
    nvcc = nvcc_to_use()
    if switch("HONEYTRACE_NO_EXT", "0", ("0", "1")) == "1":
        return []
    if sys.platform == "win32":
        # The core needs vector types and builtins of GCC and Clang; MSVC, Python's compiler there, has none.
        print("honeytrace: no compiled core on Windows; everything runs on plain torch", file=sys.stderr)
        return []
    return [core_extension(), *([cuda_extension()] if nvcc is not None else [])]


setup(
    packages=list(packages()),
    # Triton kernels have a directory of their own in the repository and a place in the package.
    package_dir={"honeytrace": "honeytrace", "honeytrace.kernels": "kernels"},
    package_data={
        "honeytrace": ["py.typed", "_C.pyi", "_cuda.pyi"],
        "honeytrace.evaluation": ["plans/*.toml"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildCore},
)
