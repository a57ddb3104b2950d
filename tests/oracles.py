"""Slow, plain float64 versions of the ops, written from the formulas alone (NumPy, loops), for the tests."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def pair_distances(features: Tensor, rows: Tensor, metric: str, p: float | None) -> np.ndarray:
    """Distances [B, G, M] in float64."""
    q = features.detach().double().numpy()[:, None, None, :]
    b = rows.detach().double().numpy()[None]
    width = b.shape[-1]
    if metric == "l1":
        return np.abs(q - b).sum(-1) / width
    if metric == "l2":
        return np.sqrt(((q - b) ** 2).sum(-1) / width)
    if metric == "lp":
        return (np.abs(q - b) ** p).sum(-1) ** (1 / p) / width ** (1 / p)
    norms = np.linalg.norm(q, axis=-1) * np.linalg.norm(b, axis=-1)
    safe = np.where(norms > 0, norms, 1)
    cosine = np.where(norms > 0, (q * b).sum(-1) / safe, 0)
    return 1 - cosine


def feature_distance(
    features: Tensor, rows: Tensor, *, k: int, metric: str = "l1", p: float | None = None
) -> Tensor:
    """Mean of the k smallest, [B, G] float64."""
    distances = pair_distances(features, rows, metric, p)
    return torch.from_numpy(np.sort(distances, axis=-1)[..., :k].mean(-1))


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def mixed_probabilities(z: Tensor, r: Tensor, weight: Tensor) -> Tensor:
    """(1 - w) softmax(z) + w softmax(r) of rows [B, C] with weights [B], float64."""
    w = weight.double().numpy()[:, None]
    return torch.from_numpy((1 - w) * softmax(z.double().numpy()) + w * softmax(r.double().numpy()))
