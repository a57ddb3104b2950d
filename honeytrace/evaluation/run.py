"""Running a plan: what is there already is kept, the rest is run, everything is reported."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from honeytrace.evaluation.cells import run_cell
from honeytrace.evaluation.engines import CellFunction, Engine, in_process
from honeytrace.evaluation.plan import Plan
from honeytrace.evaluation.store import Result, Store

Say = Callable[[str], object]


def evaluate(
    plan: Plan,
    directory: str | os.PathLike[str],
    *,
    engine: Engine = in_process,
    run: CellFunction = run_cell,
    say: Say = lambda text: None,
) -> list[Result]:
    """Run what is missing of a plan.

    Every cell is a pure function of its settings and seed, and lies in a file of its own once it is finished:
    a run that was killed at any point goes on when it is called again. A cell that fails is reported, does
    not stop the others, and is tried again by the next run.

    Args:
        plan: the matrix.
        directory: of the results; made when first needed.
        engine: where cells are run.
        run: what is run.
        say: told one line for each cell, with the time left.

    Returns:
        The results of all cells of the plan, in its order; failed ones with ``status`` "failed" and an
        ``error``.
    """
    store = Store(directory)
    cells = list(plan.cells())
    results: dict[str, Result] = {}
    for cell in cells:
        found = store.get(cell)
        if found is not None:
            results[cell.digest] = found
    missing = [cell for cell in cells if cell.digest not in results]
    if results:
        say(f"{len(results)} of {len(cells)} cells are there already")
    store.directory.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for done, (cell, found) in enumerate(engine(run, missing, str(store.directory)), start=1):
        if found["status"] == "failed":
            results[cell.digest] = {**found, "cell": cell.to_dict()}
        else:
            results[cell.digest] = store.put(cell, found)
        left = (time.monotonic() - began) / done * (len(missing) - done)
        say(f"{done}/{len(missing)} {cell.title}: {outcome(found)}; {_duration(left)} left")
    return [{**results[cell.digest], "cell": cell.to_dict()} for cell in cells]


def outcome(found: dict[str, Any]) -> str:
    """A cell's result in a few words."""
    if found["status"] == "failed":
        return f"FAILED: {found['error']}"
    if found["status"] == "not applicable":
        return f"does not apply: {found['reason']}"
    accuracy = f"copy {found['accuracy_copy']:.1%}"
    if found["claims"] is None:
        return f"{accuracy}, {found['why_no_claim']}"
    words = [
        f"{answers} {'CLAIM' if told['claim'] else 'no claim'} p={told['p_value']:.1g}"
        for answers, told in found["claims"].items()
    ]
    return ", ".join([accuracy, *words])


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
