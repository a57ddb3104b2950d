"""Small real data sets, divided between owner, attacker and test."""

from honeytrace.data.fashion_mnist import fashion_mnist
from honeytrace.data.splits import DamagedDataset, MissingDataset, Split, Splits

__all__ = ["DamagedDataset", "MissingDataset", "Split", "Splits", "fashion_mnist"]
