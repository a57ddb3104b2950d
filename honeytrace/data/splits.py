"""What every data set is handed out as, and the two ways in which one can fail to be there."""

from typing import NamedTuple

from torch import Tensor


class Split(NamedTuple):
    """Images, or rows of a table, with their labels."""

    inputs: Tensor
    """float32: images [N, channels, height, width] in [0, 1], rows [N, columns]"""
    labels: Tensor
    """int64 [N]"""


class Splits(NamedTuple):
    """One data set, divided between the people of the story. No original image is in two parts."""

    train: Split
    """What the owner trains the victim on."""
    pool: Split
    """What the attacker draws queries from; the attacker does not use the labels."""
    test: Split
    """What neither of them has seen: measures accuracy and fidelity, and gives triggers for verification."""
    classes: tuple[str, ...]
    """The names of the classes, in the order of their labels."""


class MissingDataset(FileNotFoundError):
    """A data set is not on this machine; the message holds the command that brings it."""


class DamagedDataset(ValueError):
    """A file is there but is not what it should be; the message names the file and what is wrong."""
