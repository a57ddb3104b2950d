"""Fashion-MNIST (Xiao, Rasul & Vollgraf, arXiv 1708.07747): 70,000 grey images of ten kinds of clothes."""

import os
from pathlib import Path

from honeytrace.data import _idx
from honeytrace.data.splits import MissingDataset, Split, Splits

# Where Debian's and Ubuntu's package dataset-fashion-mnist puts the four files.
DEBIAN_DIRECTORY = Path("/usr/share/datasets/fashion-mnist")

_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_HOW_TO_GET = (
    "On Debian and Ubuntu: apt-get install dataset-fashion-mnist. Elsewhere: git clone --depth 1 "
    "https://github.com/zalandoresearch/fashion-mnist, and give its folder data/fashion as directory"
)


def fashion_mnist(directory: str | os.PathLike[str] | None = None) -> Splits:
    """Fashion-MNIST from a directory with its four idx files, plain or gzipped.

    Args:
        directory: where the files ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
            ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte`` lie, each with or without ``.gz``.
            Default: where Debian's package ``dataset-fashion-mnist`` puts them.

    Returns:
        train: the first half of the training images (0-29,999); pool: the second half (30,000-59,999);
        test: the 10,000 test images. Inputs are [N, 1, 28, 28].

    Raises:
        MissingDataset: the directory or one of the files is not there.
        DamagedDataset: a file is cut short or no idx file.
    """
    where = DEBIAN_DIRECTORY if directory is None else Path(directory)
    if not where.is_dir():
        raise MissingDataset(f"Fashion-MNIST is not here: no directory {where}. {_HOW_TO_GET}")
    images, labels = _idx.read_images_and_labels(where, "train", how_to_get=_HOW_TO_GET)
    half = len(images) // 2
    return Splits(
        train=Split(images[:half], labels[:half]),
        pool=Split(images[half:], labels[half:]),
        test=_idx.read_images_and_labels(where, "t10k", how_to_get=_HOW_TO_GET),
        classes=_CLASSES,
    )
