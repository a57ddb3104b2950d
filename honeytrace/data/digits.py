"""scikit-learn's handwritten digits (from the UCI archive), multiplied by small random changes."""

import torch

from honeytrace.data.augment import augment
from honeytrace.data.splits import MissingDataset, Split, Splits

# Share of the 1,797 originals, and images made of each (itself among them). The owner gets the most
# originals: the victim's quality depends on them. The attacker's fewer are copied more often, so that both
# hold about 8,000 images and the budget of queries is not what limits the copy. A fifth is left for tests:
# 361 originals put the standard error of an accuracy near 99% at half a point, and six images of each give
# some two thousand candidates for triggers.
_SHARES = {"train": (0.45, 10), "pool": (0.35, 13), "test": (0.20, 6)}
_CLASSES = tuple(str(digit) for digit in range(10))


def digits(seed: int = 0) -> Splits:
    """The 1,797 grey 8x8 digits that come with scikit-learn, divided at random and then multiplied.

    Needs no download. First the originals are divided, then each part is extended by changed copies of its
    own originals (``honeytrace.data.augment`` with its defaults), so no part holds a relative of an image
    in another. In every part the unchanged originals come first.

    Args:
        seed: 0 to 2**63 - 1; fixes the division and the changes. Default 0.

    Returns:
        train: 8,080 images of 808 originals; pool: 8,164 of 628; test: 2,166 of 361. Inputs are
        [N, 1, 8, 8].

    Raises:
        MissingDataset: scikit-learn is not installed.
    """
    try:
        # Here and not above: it takes seconds, and the other data sets do without it.
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDataset("the digits come with scikit-learn: pip install scikit-learn") from error
    generator = torch.Generator().manual_seed(seed)
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(images), generator=generator)
    parts: dict[str, Split] = {}
    start = 0
    for name, (share, copies) in _SHARES.items():
        stop = len(images) if name == "test" else start + int(share * len(images))
        chosen = order[start:stop]
        parts[name] = _multiplied(Split(images[chosen], labels[chosen]), copies, generator)
        start = stop
    return Splits(**parts, classes=_CLASSES)


def _multiplied(originals: Split, copies: int, generator: torch.Generator) -> Split:
    """`copies` images of each original: itself, unchanged, then copies - 1 changed ones."""
    changed = augment(originals.inputs.repeat(copies - 1, 1, 1, 1), generator)
    return Split(torch.cat([originals.inputs, changed]), originals.labels.repeat(copies))
