"""Runs a notebook's code cells in order, as a kernel would, and gives what each one shows.

    python tests/notebooks.py examples/protect_and_verify.ipynb     # writes the outputs into the file

No kernel, no messages: a cell is its statements, and what its last expression shows.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run(path: Path) -> list[tuple[dict[str, Any], dict[str, str]]]:
    """Each code cell, and its last value as {"text/plain": ..., "text/html": ...} or {}.

    Raises what a cell raises, with the cell's text as a note in the traceback's file name.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        where = f"{path.name}, cell {number}"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, where, "exec"), names)
            value = (
                eval(compile(ast.Expression(last.value), where, "eval"), names) if last is not None else None
            )
        found: dict[str, str] = {}
        if value is not None:
            found["text/plain"] = value if isinstance(value, str) else str(value)
            if hasattr(value, "_repr_html_"):
                found["text/html"] = value._repr_html_()
        if printed.getvalue():
            found["stdout"] = printed.getvalue()
        shown.append((cell, found))
    return shown


def write(path: Path) -> None:
    """Run it and keep what it shows."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    shown = iter(run(path))
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        _, found = next(shown)
        printed = found.pop("stdout", "")
        outputs: list[dict[str, Any]] = []
        if printed:
            outputs.append({"output_type": "stream", "name": "stdout", "text": printed})
        if found:
            outputs.append(
                {"output_type": "execute_result", "execution_count": None, "data": found, "metadata": {}}
            )
        cell["outputs"] = outputs
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
