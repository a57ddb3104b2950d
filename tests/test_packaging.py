"""The package as others get it: sdist, wheel, editable installation, in environments without torch."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import honeytrace

ROOT = Path(__file__).resolve().parents[1]
# One process, if there are several: the sdist and the wheel are built once.
pytestmark = [pytest.mark.packaging, pytest.mark.slow, pytest.mark.xdist_group("packaging")]
LEFT_OUT = (".*", "build", "dist", "*.so", "*.egg-info", "__pycache__", "results")


def run(*command: object, cwd: Path, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HONEYTRACE_") and k != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | {"PYTHONDONTWRITEBYTECODE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_of_the_tree(target: Path) -> Path:
    return Path(shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*LEFT_OUT)))


def empty_environment(directory: Path) -> Path:
    """Its python."""
    run(sys.executable, "-m", "venv", directory, cwd=directory.parent)
    return directory / "bin" / "python"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return copy_of_the_tree(tmp_path_factory.mktemp("source") / "tree")


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    pytest.importorskip("setuptools")
    pytest.importorskip("pybind11")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tree / 'sdists')!r})"
    run(sys.executable, "-c", code, cwd=tree)
    (found,) = (tree / "sdists").glob("honeytrace-*.tar.gz")
    return found


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, so that the sdist is shown to hold all it needs."""
    directory = tmp_path_factory.mktemp("wheel")
    python = empty_environment(directory / "venv")
    run(python, "-m", "pip", "wheel", "--no-deps", "-w", directory, sdist, cwd=directory)
    (found,) = directory.glob("honeytrace-*.whl")
    return found


def test_the_sdist_holds_what_a_build_needs_and_nothing_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in {".h", ".cpp", ".cu", ".cuh"}
    }
    assert sources <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "kernels/__init__.py", "honeytrace/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"honeytrace", next(top for top in tops if top.endswith(".dist-info"))}
    modules = {
        f"honeytrace/{path.relative_to(ROOT / 'honeytrace')}" for path in (ROOT / "honeytrace").rglob("*.py")
    }
    modules |= {
        f"honeytrace/kernels/{path.relative_to(ROOT / 'kernels')}"
        for path in (ROOT / "kernels").rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == modules
    assert {"honeytrace/py.typed", "honeytrace/_C.pyi", "honeytrace/_cuda.pyi"} <= set(names)
    assert len([name for name in names if name.endswith(".so")]) == 1


WORKS_WITHOUT_TORCH = """
import importlib.util, sys
import honeytrace, honeytrace.kernels
from honeytrace import _C
assert "torch" not in sys.modules and importlib.util.find_spec("torch") is None
assert _C.philox4x32_10((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
assert _C.build_info()["version"] == honeytrace.__version__
print(honeytrace.__file__, honeytrace.kernels.__file__, _C.__file__, sep="\\n")
"""


def test_the_wheel_works_where_torch_never_was(wheel, tmp_path):
    python = empty_environment(tmp_path / "venv")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    files = run(python, "-c", WORKS_WITHOUT_TORCH, cwd=tmp_path).split()
    assert all(Path(file).is_relative_to(tmp_path / "venv") for file in files)
    assert (tmp_path / "venv" / "bin" / "honeytrace").is_file()


def test_an_editable_installation_follows_the_tree(tmp_path):
    """Without the core, which takes minutes; where that lands is the next test's."""
    tree = copy_of_the_tree(tmp_path / "tree")
    python = empty_environment(tmp_path / "venv")
    run(python, "-m", "pip", "install", "--no-deps", "-e", tree, cwd=tmp_path, HONEYTRACE_NO_EXT="1")
    code = "import honeytrace, honeytrace.kernels as k; print(honeytrace.__file__, k.__file__, sep='\\n')"
    package, kernels = run(python, "-c", code, cwd=tmp_path).split()
    assert Path(package) == tree / "honeytrace" / "__init__.py"
    assert Path(kernels) == tree / "kernels" / "__init__.py"
    (tree / "kernels" / "added.py").write_text("value = 42\n")
    code = "import honeytrace.kernels.added as added; print(added.value)"
    # From elsewhere, and from the tree itself, where the directory honeytrace shadows the installation.
    assert run(python, "-c", code, cwd=tmp_path).strip() == "42"
    assert run(python, "-c", code, cwd=tree).strip() == "42"


def test_the_core_lies_beside_the_package():
    """In the installation that runs the tests, an editable one where `make install` made it."""
    core = pytest.importorskip("honeytrace._C", reason="this installation has no compiled core")
    assert Path(core.__file__).parent == Path(honeytrace.__file__).parent


def test_without_the_core_the_package_is_pure_python(tree, tmp_path):
    tree = copy_of_the_tree(tmp_path / "tree")
    python = empty_environment(tmp_path / "venv")
    run(python, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, tree, cwd=tmp_path, HONEYTRACE_NO_EXT="1")
    (wheel,) = tmp_path.glob("honeytrace-*-none-any.whl")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    code = "import importlib.util, honeytrace; print(importlib.util.find_spec('honeytrace._C'))"
    assert run(python, "-c", code, cwd=tmp_path).strip() == "None"


def refusal(code: str = "import setup", **environment: str) -> str:
    """How `code` ends, with a setup.py that is only asked for its version: "" or the last line."""
    pytest.importorskip("pybind11")
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("HONEYTRACE_", "CUDA_"))
    }
    command = [sys.executable, "-c", f"import sys; sys.argv[1:] = ['--quiet', '--version']\n{code}"]
    done = subprocess.run(
        command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=120
    )
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("value", ["0", "auto", ""])
def test_cuda_is_not_built_unless_asked_for(value):
    assert refusal(HONEYTRACE_CUDA=value) == ""


def test_asking_for_cuda_is_an_error_that_says_why():
    code = "import setup; setup.find_nvcc = lambda: None; setup.nvcc_to_use()"
    assert "HONEYTRACE_CUDA=1: nvcc not found" in refusal(code, HONEYTRACE_CUDA="1")
    code = "import setup; setup.find_nvcc = lambda: '/usr/bin/nvcc'; print(setup.nvcc_to_use())"
    both = refusal(code, HONEYTRACE_CUDA="1", HONEYTRACE_NO_EXT="1")
    assert "HONEYTRACE_CUDA=1 and HONEYTRACE_NO_EXT=1 exclude each other" in both


CHOICES = """
import setup
setup.find_nvcc = lambda: {nvcc!r}
setup.has_driver = lambda: {driver}
assert setup.nvcc_to_use() == {chosen!r}
"""


@pytest.mark.parametrize(
    ("nvcc", "driver", "environment", "built"),
    [
        ("/bin/nvcc", True, {}, True),
        ("/bin/nvcc", False, {}, False),
        (None, True, {}, False),
        ("/bin/nvcc", False, {"HONEYTRACE_CUDA_ARCH": "8.0"}, True),
        ("/bin/nvcc", True, {"HONEYTRACE_CUDA": "0", "HONEYTRACE_CUDA_ARCH": "8.0"}, False),
        ("/bin/nvcc", False, {"HONEYTRACE_CUDA": "1"}, True),
    ],
)
def test_when_the_cuda_kernels_are_built(nvcc, driver, environment, built):
    code = CHOICES.format(nvcc=nvcc, driver=driver, chosen=nvcc if built else None)
    assert refusal(code, **environment) == ""


def test_architectures_of_the_cuda_kernels():
    code = "import setup; assert setup.architecture_flags()[1::2] == [{}]"
    flags = "'arch=compute_80,code=sm_80', 'arch=compute_90,code=sm_90', 'arch=compute_90,code=compute_90'"
    assert refusal(code.format(flags)) == ""
    flags = "'arch=compute_90a,code=sm_90a', 'arch=compute_90a,code=compute_90a'"
    assert refusal(code.format(flags), HONEYTRACE_CUDA_ARCH="9.0a") == ""


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("HONEYTRACE_CUDA", "yes", "HONEYTRACE_CUDA must be one of 0, 1, auto, got 'yes'"),
        ("HONEYTRACE_CUDA_ARCH", "7.5", "HONEYTRACE_CUDA_ARCH must be compute capabilities of 8.0 or above"),
        ("HONEYTRACE_CUDA_ARCH", "sm_90", "such as 8.0,9.0, got 'sm_90'"),
        ("HONEYTRACE_NO_EXT", "true", "HONEYTRACE_NO_EXT must be one of 0, 1, got 'true'"),
        ("HONEYTRACE_SANITIZE", "memory", "HONEYTRACE_SANITIZE takes address,undefined or thread"),
        ("HONEYTRACE_SANITIZE", "address,thread", "address and thread exclude each other"),
    ],
)
def test_a_switch_with_an_unknown_value_is_refused(name, value, message):
    assert message in refusal(**{name: value})


@pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which("objdump") is None, reason="reads ELF with objdump"
)
def test_the_core_needs_no_newer_machine_than_its_platform_and_exports_one_symbol():
    _C = pytest.importorskip("honeytrace._C")
    exported = run("objdump", "-T", _C.__file__, cwd=ROOT)
    defined = [line.split()[-1] for line in exported.splitlines() if " g " in line and "*UND*" not in line]
    assert defined == ["PyInit__C"]
