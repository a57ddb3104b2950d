"""Small real data sets, divided between owner, attacker and test."""

from honeytrace.data.augment import augment
from honeytrace.data.cifar import cifar10, cifar100
from honeytrace.data.digits import digits
from honeytrace.data.fashion_mnist import fashion_mnist
from honeytrace.data.letters import letters
from honeytrace.data.mnist_digits import mnist_digits
from honeytrace.data.reuters import Corpus, Texts, reuters
from honeytrace.data.splits import DamagedDataset, MissingDataset, Split, Splits

__all__ = [
    "Corpus",
    "DamagedDataset",
    "MissingDataset",
    "Split",
    "Splits",
    "Texts",
    "augment",
    "cifar10",
    "cifar100",
    "digits",
    "fashion_mnist",
    "letters",
    "mnist_digits",
    "reuters",
]
