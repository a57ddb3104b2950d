"""Small worlds that the watermark's tests share, each made once: a data set, a model, a watermark on it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from honeytrace.training import fit, seeded
from honeytrace.watermark import SecretKey, Watermark, calibrate

KEY = SecretKey(bytes(range(32)))


class Blobs(NamedTuple):
    """Ten overlapping Gaussian clouds in 24 dimensions, and a classifier of them with 20 features."""

    model: nn.Module
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def mlp(classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, classes))


@functools.cache
def blobs() -> Blobs:
    generator = torch.Generator().manual_seed(7)
    # Four clouds a class: a class is more than one compact cluster, as in real data.
    centres = 1.7 * torch.randn(10, 4, 24, generator=generator)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(10, (count,), generator=generator)
        cloud = torch.randint(4, (count,), generator=generator)
        noise = torch.randn(count, 24, generator=generator)
        return centres[labels, cloud] + noise, labels

    train, test = draw(3000), draw(1500)
    model = seeded(mlp, 1)
    fit(model, *train, epochs=4, batch_size=64, learning_rate=2e-2, seed=1)
    return Blobs(model, train, test)


def mark(key: SecretKey = KEY, **settings: object) -> Watermark:
    """A watermark on the blobs with few groups, calibrated afresh."""
    world = blobs()
    settings = {"max_accuracy_drop": 0.02, "graded_groups": 3, "flip_groups": 3, **settings}
    return calibrate(world.model, world.train, key=key, **settings)


@functools.cache
def marked() -> Watermark:
    """`mark()`, made once. Nobody may change it."""
    return mark()
