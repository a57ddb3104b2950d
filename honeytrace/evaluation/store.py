"""Results on disk, one file a cell: a run that is killed loses no more than the cell it was at."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import honeytrace
from honeytrace.evaluation.plan import Cell
from honeytrace.files import write_private

Result = dict[str, Any]
"""The cell's settings under "cell", its figures, and where they were measured."""

FINISHED = ("done", "not applicable")


class Store:
    """The directory of an evaluation.

    Args:
        directory: holds ``cells/`` (one JSON file each, named by content), ``models/``, and what is reported.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self.cells = self.directory / "cells"

    def get(self, cell: Cell) -> Result | None:
        """The finished result of a cell, under the names the cell has now; None: to be run."""
        try:
            found = json.loads(self._path(cell).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return None  # not there, or cut off by something that is not us: run it again
        if not isinstance(found, dict) or found.get("status") not in FINISHED:
            return None
        return {**found, "cell": cell.to_dict()}

    def put(self, cell: Cell, found: Result) -> Result:
        """Write a cell's result, whole or not at all."""
        result = {**found, "cell": cell.to_dict(), "digest": cell.digest, "made_with": made_with()}
        self.cells.mkdir(parents=True, exist_ok=True)
        content = json.dumps(result, sort_keys=True, indent=1, allow_nan=False) + "\n"
        write_private(self._path(cell), memoryview(content.encode("utf-8")), overwrite=True)
        return result

    def adopt(self, lines: str | os.PathLike[str]) -> int:
        """Take over the finished cells of a ``cells.jsonl``; gives how many were new.

        Raises:
            ValueError: a line is no result.
        """
        new = 0
        for number, line in enumerate(Path(lines).read_text("utf-8").splitlines(), start=1):
            try:
                found = json.loads(line)
                cell = Cell(**found["cell"])
            except (ValueError, TypeError, KeyError, RecursionError):
                raise ValueError(f"{lines} line {number} is no result of a cell") from None
            if found.get("status") in FINISHED and self.get(cell) is None:
                self.cells.mkdir(parents=True, exist_ok=True)
                content = json.dumps(found, sort_keys=True, indent=1) + "\n"
                write_private(self._path(cell), memoryview(content.encode("utf-8")), overwrite=True)
                new += 1
        return new

    def all(self, cells: Iterable[Cell]) -> list[Result]:
        """Finished results of these cells, in their order."""
        return [found for cell in cells if (found := self.get(cell)) is not None]

    def _path(self, cell: Cell) -> Path:
        return self.cells / f"{cell.digest}.json"


def made_with() -> dict[str, Any]:
    """Versions and machine, for the result."""
    return {
        "honeytrace": honeytrace.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
    }


def write_lines(results: Sequence[Result], path: Path) -> None:
    """All results as JSON lines."""
    content = "".join(json.dumps(result, sort_keys=True, allow_nan=False) + "\n" for result in results)
    write_private(path, memoryview(content.encode("utf-8")), overwrite=True)
