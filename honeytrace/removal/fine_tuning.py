"""Fine-tuning on a few clean labels."""

from __future__ import annotations

from torch import nn

from honeytrace.data import Split
from honeytrace.removal.interface import check_arguments, drawn, twin
from honeytrace.training import Precision, Progress, fit


def fine_tune(
    surrogate: nn.Module,
    data: Split,
    *,
    seed: int,
    precision: Precision = "float32",
    progress: Progress | None = None,
    share: float = 0.1,
    epochs: int = 10,
    learning_rate: float = 1e-3,
) -> nn.Module:
    """Train all layers further on a share of clean labels.

    Source: Adi et al., "Turning Your Weakness Into a Strength", arXiv 1802.04633, section 5.3 ("fine-tune all
    levels").

    Args:
        share: of `data` that is used, in (0, 1]. Default 0.1.
        epochs: passes over it.
        learning_rate: the highest of the cycle.
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
    model = twin(surrogate)
    fit(
        model,
        *drawn(data, share, seed),
        epochs=epochs,
        seed=seed,
        learning_rate=learning_rate,
        precision=precision,
        progress=progress,
    )
    return model
