"""What nvcc makes of the CUDA kernels for sm_80 and sm_90, without a GPU: registers, spills and machine code.

`python tests/cubins.py` prints all of it.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import cubins
import pytest

ROOT = Path(__file__).resolve().parents[1]
# One process: the kernels are compiled once.
pytest.importorskip("pybind11", reason="pybind11 is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("cuda_compile"),
    pytest.mark.skipif(cubins.nvcc() is None, reason="nvcc is not installed"),
    pytest.mark.skipif(cubins.tool("nvdisasm") is None, reason="nvdisasm is not installed"),
]
CAPABILITIES = (80, 90)
METRICS = ("L1", "L2", "Cosine", "L3", "L4", "LpThreeHalves", "LpHalves", "LpAny")
NAMES = [f"{kind}_kernel {metric}" for kind in ("tile", "few", "merge") for metric in METRICS]
NAMES += ["rows_kernel", "mix_kernel", "compose_kernel"]
SHARED = {"tile": 33152, "few": 5216, "merge": 5216, "rows": 21776, "mix": 80, "compose": 0}
"""Bytes that the launchers ask for; test_shared_memory_is_what_the_launchers_ask_for holds them to it."""


def flags_of_the_build() -> list[str]:
    """NVCC_FLAGS of setup.py. (To import setup.py is to run it.)"""
    tree = ast.parse((ROOT / "setup.py").read_text())
    values = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return [flag for flag in ast.literal_eval(values["NVCC_FLAGS"]) if flag != "-Icsrc"]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return tmp_path_factory.mktemp("objects")


@pytest.fixture(scope="module")
def kernels(objects):
    return cubins.compile_all(flags_of_the_build(), cubins.SOURCES, list(CAPABILITIES), objects)


def test_the_flags_here_are_those_of_the_build():
    assert flags_of_the_build() == cubins.FLAGS


def test_every_kernel_is_compiled(kernels):
    assert set(kernels) == {(name, capability) for name in NAMES for capability in CAPABILITIES}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", NAMES)
def test_resources_and_machine_code(kernels, name, capability):
    kernel = kernels[name, capability]
    kind, metric = name.partition("_kernel")[0], name.partition(" ")[2]
    assert kernel.stack == kernel.local == 0, "spills"
    assert kernel.count("LDL") == kernel.count("STL") == 0, "local memory"
    assert kernel.blocks(SHARED[kind]) >= (3 if name == "tile_kernel LpAny" else 4)
    if kind == "tile":
        check_tile(kernel, metric)
    if kind in ("few", "merge"):
        # Queries and rows of a feature by one load each, four features a turn.
        assert kernel.count("LDG.E.128") >= 8
        assert kernel.count("SHFL") > 0
    if kind == "rows":
        assert kernel.count("LDG.E.128") > 0
        assert kernel.count("STG.E.128") > 0
        assert kernel.count("LDS.128") >= 6, "the sign hash reads queries and planes by fours"
        assert kernel.count("FFMA") >= 64
    if kind == "mix":
        assert kernel.count("LDG.E.128") > 0
        assert kernel.count("STG.E.128") > 0
        assert kernel.count("DFMA") > 0, "decisions must be double"
    # Distances are differences, so that near rows do not cancel: no kernel here multiplies matrices.
    assert kernel.count("HMMA") == kernel.count("HGMMA") == 0


def check_tile(kernel: cubins.Kernel, metric: str) -> None:
    features = 1 if metric in ("LpHalves", "LpAny") else 8
    assert kernel.count("LDGSTS.E", "128") == 8, "copies of 16 bytes past the registers, two stages"
    assert kernel.count("LDG.E.128") == 0
    assert kernel.count("LDS.128") >= 3 * features, "three loads for the 32 pairs of a feature"
    assert kernel.count("STS.128") >= 8, "distances to shared memory by fours"
    pairs = 32 * features
    if metric == "L1":
        assert kernel.count("FADD") >= 2 * pairs
    if metric in ("L2", "Cosine"):
        # 256 differences and 256 multiply-adds
        assert kernel.count("FADD") >= pairs
        assert kernel.count("FFMA") >= pairs
    if metric == "LpThreeHalves":
        assert kernel.count("MUFU.RSQ") >= pairs


def test_shared_memory_is_what_the_launchers_ask_for(tmp_path):
    """sizeof of the structs, from the compiler."""
    names = {"tile": "TileMemory", "few": "FewMemory", "rows": "HashMemory", "mix": "MixMemory"}
    checks = "".join(
        f"static_assert(sizeof(honeytrace::device::{struct}) == {SHARED[kind]}, {kind!r});\n".replace(
            "'", '"'
        )
        for kind, struct in names.items()
    )
    source = tmp_path / "sizes.cu"
    source.write_text(f'#include "cuda/few.cuh"\n#include "cuda/mix.cuh"\n#include "cuda/tile.cuh"\n{checks}')
    cubins.output(
        str(cubins.nvcc()), *cubins.FLAGS, f"-I{ROOT / 'csrc'}", "-ptx", source, "-o", tmp_path / "sizes.ptx"
    )
    launchers = (ROOT / "csrc/cuda/launch.cu").read_text() + (ROOT / "csrc/cuda/selection.cuh").read_text()
    assert set(re.findall(r"sizeof\((\w+Memory)\)", launchers)) == {*names.values(), "PrepareMemory"}


LAUNCHES = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
code = module.sign_hash((0, 0, 2, 3, 3), (0, 4), 0, (0, 1, 0, 0))
print(module.error_name(code), module.workspace_bytes(256, 512, 8, 500, 10, 132))
"""


@pytest.mark.skipif(Path("/proc/driver/nvidia/version").exists(), reason="there is a GPU driver")
def test_the_module_loads_without_a_driver_and_names_the_error(kernels, objects):
    assert kernels
    done = cubins.output(sys.executable, "-c", LAUNCHES, cubins.link(objects)).split()
    assert done[0] in ("cudaErrorInsufficientDriver", "cudaErrorNoDevice")
    assert int(done[1]) > 4 * 256 * 512


def test_every_gpu_that_nvcc_knows(tmp_path):
    newest = cubins.capabilities()[-1]
    assert newest >= 90
    kernels = cubins.compile_all(cubins.FLAGS, ["csrc/cuda/metric_l1.cu"], [newest], tmp_path)
    assert len(kernels) == 3
    for kernel in kernels.values():
        assert kernel.stack == kernel.local == kernel.count("LDL") == 0
