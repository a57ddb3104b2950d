"""The idx format of the MNIST family: a header that says type and shape, then the raw values."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from honeytrace.data.splits import DamagedDataset, MissingDataset, Split

_UNSIGNED_BYTE = 0x08


def find(directory: Path, name: str) -> Path | None:
    """The file `name` in `directory`, plain or with ``.gz`` behind it; None if neither is there."""
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def read_images_and_labels(directory: Path, part: str, *, how_to_get: str) -> Split:
    """Read ``<part>-images-idx3-ubyte`` and ``<part>-labels-idx1-ubyte``, each plain or gzipped.

    Args:
        directory: where the two files lie.
        part: "train" or "t10k", as the data sets of the family name them.
        how_to_get: the end of the error message when a file is missing.

    Returns:
        Images float32 [N, 1, H, W] in [0, 1] and labels int64 [N].

    Raises:
        MissingDataset: one of the files is not there.
        DamagedDataset: one of them is not idx, is cut short, or the two do not fit.
    """
    found: list[Path] = []
    for name in (f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"):
        path = find(directory, name)
        if path is None:
            raise MissingDataset(f"no {name} or {name}.gz in {directory}. {how_to_get}")
        found.append(path)
    images, labels = read(found[0], dimensions=3), read(found[1], dimensions=1)
    if len(images) != len(labels):
        raise DamagedDataset(f"{found[0]} holds {len(images)} images but {found[1]} {len(labels)} labels")
    return Split(images.unsqueeze(1).float() / 255, labels.long())


def read(path: Path, *, dimensions: int) -> Tensor:
    """Read one idx file of unsigned bytes, plain or gzipped, as a uint8 tensor with `dimensions` dimensions.

    Raises:
        DamagedDataset: the file is not idx of that kind, or its length is not what its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DamagedDataset(f"{path} cannot be read: {error}") from error
    expected = bytes((0, 0, _UNSIGNED_BYTE, dimensions))
    start = 4 + 4 * dimensions
    if content[:4] != expected or len(content) < start:
        raise DamagedDataset(
            f"{path} is no idx file of {dimensions}-dimensional unsigned bytes: it starts with "
            f"{content[:4].hex(' ') or 'nothing'}, expected {expected.hex(' ')}"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != math.prod(shape):
        raise DamagedDataset(
            f"{path} is damaged: its header says {list(shape)}, that is {math.prod(shape)} bytes, "
            f"but {len(content) - start} follow"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())
