"""Distillation: a fresh student learns the copy's answers on clean samples."""

from __future__ import annotations

import torch
from torch import nn

from honeytrace.data import Split
from honeytrace.removal.interface import check_arguments, drawn, reborn
from honeytrace.training import Precision, Progress, fit, predict


def distill(
    surrogate: nn.Module,
    data: Split,
    *,
    seed: int,
    precision: Precision = "float32",
    progress: Progress | None = None,
    share: float = 1.0,
    epochs: int = 4,
    temperature: float = 1.0,
    learning_rate: float = 3e-3,
) -> nn.Module:
    """Train a student of the same architecture from scratch on the surrogate's soft answers; no labels used.

    Source: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531; as a
    removal in Lukas et al., arXiv 2108.04974.

    Args:
        share: of `data` whose inputs are used, in (0, 1].
        epochs, learning_rate: of the student.
        temperature: the surrogate's logits are divided by it, above 0. Default 1.
        The others as in `Removal`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """
    check_arguments(
        surrogate,
        data,
        seed=seed,
        precision=precision,
        epochs=epochs,
        learning_rate=learning_rate,
        share=share,
    )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be finite and above 0, got temperature={temperature}")
    inputs = drawn(data, share, seed).inputs
    with torch.no_grad():
        answers = (predict(surrogate, inputs).float() / temperature).softmax(1)
    student = reborn(surrogate, seed)
    fit(
        student,
        inputs,
        answers,
        epochs=epochs,
        seed=seed,
        learning_rate=learning_rate,
        precision=precision,
        progress=progress,
    )
    return student
