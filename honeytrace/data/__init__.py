"""Small real data sets, divided between owner, attacker and test."""

from honeytrace.data.augment import augment
from honeytrace.data.cifar import cifar10, cifar100
from honeytrace.data.digits import digits
from honeytrace.data.fashion_mnist import fashion_mnist
from honeytrace.data.mnist_digits import mnist_digits
from honeytrace.data.splits import DamagedDataset, MissingDataset, Split, Splits

__all__ = [
    "DamagedDataset",
    "MissingDataset",
    "Split",
    "Splits",
    "augment",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "mnist_digits",
]
