"""What a pile of answers gives away by itself: classes that are likelier than they should be."""

import torch
from torch import Tensor
from torch.nn import functional

_BINS = 25
_PILE = 10
"""Fewer answers above the background than this are no pile."""


def mixed_in(answers: Tensor) -> tuple[Tensor, Tensor]:
    """How likely it is, of each answer, that a watermark mixed a class into it, and which.

    A classifier's second largest probability is the rarer the larger it is, but a mark that mixes a target
    into many answers with weights around w piles them up near w, in few pairs of (first, second) class. The
    background is the largest falling curve below the histogram over all answers; each pair's share in it is
    read off where no pile is. What a pair has above its background is mixed in. An answer of that first class
    that gives the other class such a probability is then suspected too where that class is only its third.

    Args:
        answers: probabilities [n, C], C >= 3.

    Returns:
        Probability float64 [n] in [0, 1], 0 wherever the histogram falls as it should, and class int64 [n].
    """
    classes = answers.shape[1]
    top, which = answers.double().topk(2, dim=1)
    pairs = which[:, 0] * classes + which[:, 1]
    counts = torch.zeros(classes * classes, _BINS, dtype=torch.float64, device=answers.device)
    counts.index_put_((pairs, _bin(top[:, 1])), torch.ones_like(top[:, 0]), accumulate=True)
    overall = _smooth(counts.sum(0, keepdim=True))[0]
    background = overall.cummin(0).values
    excess = 1 - background / overall.clamp(min=1e-9)
    calm = excess < 0.2
    expected = counts[:, calm].sum(1, keepdim=True) * (background / background[calm].sum())
    found = (1 - expected / _smooth(counts).clamp(min=1e-9)).clamp(0, 1) * (excess > 0.05)
    found *= (found * counts).sum(1, keepdim=True) >= _PILE
    of_class = found.view(classes, classes, _BINS)[which[:, 0]].gather(2, _bin(answers)[:, :, None])[:, :, 0]
    of_class.scatter_(1, which[:, :1], 0.0)
    best = of_class.max(dim=1)
    return best.values, best.indices


def _bin(values: Tensor) -> Tensor:
    """The bin of each probability; those of 0.5 and more share the last one."""
    return (2 * _BINS * values.double()).long().clamp(0, _BINS - 1)


def _smooth(counts: Tensor) -> Tensor:
    """Each row [.., bins] averaged with its neighbours: 1/4, 1/2, 1/4."""
    padded = functional.pad(counts[:, None], (1, 1), mode="replicate")
    kernel = torch.tensor([[[0.25, 0.5, 0.25]]], dtype=counts.dtype, device=counts.device)
    return functional.conv1d(padded, kernel)[:, 0]
