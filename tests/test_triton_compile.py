"""What Triton makes of the kernels for sm_80 and sm_90, without a GPU: registers, spills and machine code.

`python -m honeytrace.kernels.resources` prints all of it; here are the cases that have most to lose.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: there is nothing to compile", allow_module_level=True)

from honeytrace.kernels import resources

CASES = {case.name: case for case in resources.cases()}
CHOSEN = [
    "nearest tile l1",
    "nearest tile l1 small",
    "nearest tile l1.5",  # the most registers
    "nearest few l2",
    "candidates l2",
    "candidates l2 small",
    "rescore l2 16",
    "merge 256",
    "prepare unit",
    "sign_hash",
    "watermark_mix 1024 bfloat16",
    "compose flat",
]


@pytest.fixture(scope="module", params=[(name, sm) for name in CHOSEN for sm in resources.TARGETS], ids=str)
def compiled(request, tmp_path_factory):
    name, capability = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        return resources.compile_case(CASES[name], capability)


def test_machine_code(compiled):
    name, code = compiled.case.name, compiled
    assert code.local == code.stack == 0, f"{name} spills"
    assert code.count("LDL") == code.count("STL") == 0, f"{name} has local memory"
    assert code.registers <= 255
    assert code.blocks() >= 2, f"{name}: one block on a multiprocessor hides nothing"
    if name.startswith("nearest tile"):
        # The inner loop reads four queries at once; a feature costs 16 pairs and five loads, in small tiles 8
        # pairs and three loads; those leave room for four blocks.
        small = name.endswith("small")
        assert code.count("LDG.E.128") >= 4 * (2 if small else 4)
        assert code.blocks() >= (4 if small else 2)
        assert code.count("HMMA") == 0
    if name.startswith("candidates"):
        assert code.count("HGMMA" if code.capability == 90 else "HMMA") > 0
        assert any(op.startswith("LDGSTS") and "128" in op for op in code.instructions), "narrow copies"
    if name == "sign_hash":
        assert code.count("HMMA") > 0
    if name.startswith(("prepare", "watermark_mix", "compose", "merge")):
        assert code.count("LDG.E.128") > 0
    if name.startswith(("watermark_mix", "compose")):
        assert any(op.startswith("STG") and ("128" in op or "64" in op) for op in code.instructions)
    if name.startswith("watermark_mix"):
        assert code.count("DMUL") > 0, "shaping must be in float64"


def test_every_kernel_has_a_case_and_launches_what_is_compiled():
    from honeytrace.kernels import compose, feature_distance, sign_hash, watermark_mix

    kernels = {
        value
        for module in (compose, feature_distance, sign_hash, watermark_mix)
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    }
    assert kernels == {case.kernel for case in CASES.values()}
    for case in CASES.values():
        constants = {parameter.name for parameter in case.kernel.params if parameter.is_constexpr}
        assert constants == set(case.constants)
        assert constants | set(case.types) == set(case.kernel.arg_names)
