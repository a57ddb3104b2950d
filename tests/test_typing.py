"""What a type checker sees of the package: a user's typed program, and a stub that is the module's own."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import honeytrace

STUB = Path(honeytrace.__file__).with_name("_C.pyi")

PROGRAM = """
import torch
from torch import Tensor, nn

import honeytrace as ht
from honeytrace import records

key: ht.SecretKey = ht.SecretKey.generate()
model: nn.Module = nn.Linear(3, 4)
data: tuple[Tensor, Tensor] = (torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64))
watermark: ht.Watermark = ht.Watermark.calibrate(model, data, key=key, max_accuracy_drop=0.005)
served: nn.Module = watermark.protect(model)
watermark.save("model.honeytrace")
verdict: ht.Verdict = ht.verify(served, ht.Watermark.load("model.honeytrace"), key)
claimed: bool = verdict.claim
p: float = verdict.p_value
rows: list[dict[str, str | int | float | bool | None]] = records.rows([verdict])
distance: Tensor = ht.ops.feature_distance(torch.zeros(2, 3), torch.zeros(1, 12, 3), k=10, metric="l1")
rule = ht.WatermarkRule(strength=0.1)
reveal_type(verdict.groups)
ht.verify(served, watermark)  # E: key is missing
wrong: str = verdict.p_value  # E: a float
ht.Watermark.calibrate(model, data, key="secret")  # E: no key
"""


# Reading torch's and NumPy's own annotations takes most of a minute and is not tested here: they are Any.
SETTINGS = """
[mypy]
strict = true
follow_imports = silent

[mypy-torch.*,numpy.*,scipy.*,sklearn.*,matplotlib.*,cryptography.*,rich.*,click.*,safetensors.*]
follow_imports = skip
"""


@pytest.mark.slow
def test_a_users_typed_program(tmp_path):
    """Strictly checked from outside; the three lines marked E are errors, and nothing else is.

    MYPYPATH, because no type checker looks into the hooks of an editable installation.
    """
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "settings.ini").write_text(SETTINGS)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=settings.ini", "--no-incremental", "program.py"],
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(STUB.parents[1])},
        capture_output=True,
        text=True,
        timeout=500,
    )
    expected = {n for n, line in enumerate(PROGRAM.splitlines(), start=1) if "# E:" in line}
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert {int(line.split(":")[1]) for line in errors} == expected, done.stdout + done.stderr
    assert "honeytrace.ownership.verdict.GroupRecord" in done.stdout
    assert (STUB.parent / "py.typed").is_file()


def test_the_stub_of_the_core_names_what_the_core_has():
    core = pytest.importorskip("honeytrace._C", reason="this installation has no compiled core")
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    held = {name for name, value in vars(core).items() if inspect.isroutine(value)}
    assert set(functions) == held
    for name, node in functions.items():
        signature = (getattr(core, name).__doc__ or "").splitlines()[0]
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            assert f"{argument.arg}:" in signature, f"{name} takes no {argument.arg}: {signature}"
        assert signature.count(":") == len(node.args.args) + len(node.args.kwonlyargs), signature
    assigned = {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    assert assigned <= set(vars(core))
