"""Pairs of clean and marked answers, made up: what an attacker can think of without asking anybody."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

STRONGEST = 0.3
"""Largest weight that a made-up graded mark mixes in. Honeytrace's default strength is 0.2."""


class Pairs(NamedTuple):
    """n answers before and after a mark, probabilities float32 [n, C] each."""

    clean: Tensor
    marked: Tensor


def simulated_pairs(
    prototypes: Tensor, count: int, *, concentration: float, seed: int, share: float = 0.3
) -> Pairs:
    """Clean answers scattered around prototypes, and what marks of unknown targets and weights make of them.

    Each clean answer is a draw from a Dirichlet distribution with `concentration` times a random prototype as
    its parameters. A share of them is then mixed with a random other class than its first, with a weight
    uniform in (0, 0.3); the others stay as they are.

    Args:
        prototypes: probabilities [m, C] of a model that the attacker believes unmarked.
        count: pairs to make.
        concentration: above 0; the larger, the nearer to the prototypes.
        seed: fixes all draws.
        share: of marked answers, in [0, 1]. Default 0.3.
    """
    random = np.random.default_rng(seed)
    chosen = prototypes[torch.from_numpy(random.integers(len(prototypes), size=count))]
    # A parameter of 0 is no distribution, and one far below 1e-3 gives draws that underflow to 0.
    shape = (concentration * chosen.cpu().numpy()).clip(min=1e-3)
    drawn = torch.from_numpy(random.standard_gamma(shape, dtype=np.float32)) + 1e-12
    clean = drawn / drawn.sum(1, keepdim=True)
    classes = clean.shape[1]
    first = clean.argmax(1)
    target = (first + torch.from_numpy(random.integers(1, classes, size=count))) % classes
    weight = torch.from_numpy(STRONGEST * random.random(count, dtype=np.float32))
    weight[torch.from_numpy(random.random(count)) >= share] = 0.0
    marked = (1 - weight)[:, None] * clean
    marked[torch.arange(count), target] += weight
    return Pairs(clean, marked)
