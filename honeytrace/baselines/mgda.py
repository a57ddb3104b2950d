"""MGDA: the weights of several losses, so that a step along the weighted gradient lowers all of them.

Source: Desideri, "Multiple-gradient descent algorithm" (2012); Sener & Koltun, "Multi-Task Learning as
Multi-Objective Optimization", arXiv 1810.04650, section 3 and algorithm 2 (Frank-Wolfe).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_STEPS = 250
_ENOUGH = 1e-7


def min_norm_weights(gram: Tensor) -> Tensor:
    """Weights of the point of smallest norm in the convex hull of K vectors.

    Closed form for two; Frank-Wolfe with exact line search and away steps for more, until no exchange of
    weight lowers the square norm by more than 1e-7 of the largest square norm.

    Args:
        gram: [K, K] inner products of the vectors, symmetric, finite, K >= 1.

    Returns:
        float64 [K], 0 or more, sum 1.

    Raises:
        ValueError: gram is not square, or not finite.
    """
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or len(gram) == 0:
        raise ValueError(f"gram must have shape [K, K] with K >= 1, got {list(gram.shape)}")
    if not gram.isfinite().all():
        raise ValueError("gram must be finite")
    gram = gram.detach().double().cpu()
    count = len(gram)
    if count == 1:
        return torch.ones(1, dtype=torch.float64)
    if count == 2:
        return _of_two(float(gram[0, 0]), float(gram[0, 1]), float(gram[1, 1]))
    weights = torch.zeros(count, dtype=torch.float64)
    weights[int(gram.diagonal().argmin())] = 1
    for _ in range(_STEPS):
        slopes = gram @ weights
        best = int(slopes.argmin())
        held = torch.where(weights > 0, slopes, -torch.inf)
        worst = int(held.argmax())
        if float(slopes[worst] - slopes[best]) <= _ENOUGH * float(gram.diagonal().max()):
            break
        # Weight goes from the worst vector that has any to the best one, as far as it helps.
        curve = float(gram[best, best] + gram[worst, worst] - 2 * gram[best, worst])
        gain = float(slopes[worst] - slopes[best])
        step = min(float(weights[worst]), gain / curve if curve > 0 else 1.0)
        weights[best] += step
        weights[worst] = weights[worst] - step if step < float(weights[worst]) else 0.0
    return weights / weights.sum()


def loss_plus_weights(losses: Sequence[Tensor], gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """MGDA weights after the "loss+" normalisation: each gradient is divided by loss times gradient norm.

    A loss or gradient of 0 is at its goal: its normalised vector would be infinite, and it gets weight 0.

    Args:
        losses: K scalars of 0 or more.
        gradients: for each loss its gradients by every weight of the model, in one order.

    Returns:
        float64 [K], 0 or more, sum 1: the weights of the hull's point, divided by the norms that were taken
        out, for the losses and gradients as they are. So the weighted gradient is a positive multiple of the
        point itself, along which no loss rises (Sener & Koltun, theorem 1).
    """
    flat = torch.stack([torch.cat([part.flatten() for part in parts]).float() for parts in gradients])
    norms = flat.norm(dim=1)
    scale = torch.stack([loss.detach().float() for loss in losses]) * norms
    alive = scale > 1e-12
    weights = torch.zeros(len(losses), dtype=torch.float64)
    if not alive.any():
        weights[:] = 1 / len(losses)
        return weights
    vectors = flat[alive] / scale[alive, None]
    weights[alive.cpu()] = min_norm_weights(vectors @ vectors.T)
    weights[alive.cpu()] /= scale[alive].double().cpu()
    return weights / weights.sum()


def _of_two(first: float, mixed: float, second: float) -> Tensor:
    """For |a|^2, ab and |b|^2: the projection of 0 on the segment from a to b."""
    if mixed >= first:
        weight = 1.0
    elif mixed >= second:
        weight = 0.0
    else:
        weight = (second - mixed) / (first + second - 2 * mixed)
    return torch.tensor([weight, 1 - weight], dtype=torch.float64)
