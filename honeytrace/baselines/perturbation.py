"""Defences that blur the answers. They are no watermark: rows to compare with.

Each wraps the victim and changes its probabilities; the result is handed on as logits (their logarithm), so
that a softmax behind it gives the changed probabilities.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from honeytrace.baselines.interface import Defended, check_arguments, unmarked_victim
from honeytrace.data import Split
from honeytrace.training import Precision, Progress

# A probability of 0 is served as this: its logarithm is finite, and it is below what an answer shows.
_LEAST = 1e-12


class Perturbed(nn.Module):
    """A victim whose probabilities are changed before they leave.

    Args:
        victim: [B, ...] to logits [B, C]; shared, not copied.
        change: probabilities [B, C] (float32, rows sum to 1) to numbers [B, C] of 0 or more; rows need not
            sum to 1.
    """

    def __init__(self, victim: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.victim = victim
        self._change = change
        self.train(victim.training)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, ...] to logits float32 [B, C]."""
        probabilities: Tensor = self.victim(inputs).float().softmax(1)
        return self._change(probabilities).clamp_min(_LEAST).log()


def none(
    train: Split,
    *,
    architecture: Callable[[], nn.Module],
    seed: int,
    epochs: int,
    trigger_data: Split,
    victim: nn.Module | None = None,
    reference: nn.Module | None = None,
    target: int | None = None,
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> Defended:
    """No defence: the unmarked victim as it is. Arguments as in `Defence`."""
    check_arguments(train, trigger_data, seed=seed, epochs=epochs, precision=precision)
    model, _ = unmarked_victim(
        victim, train, architecture, seed=seed, epochs=epochs, precision=precision, progress=progress
    )
    return Defended(model)


def rounding(
    train: Split,
    *,
    architecture: Callable[[], nn.Module],
    seed: int,
    epochs: int,
    trigger_data: Split,
    victim: nn.Module | None = None,
    reference: nn.Module | None = None,
    target: int | None = None,
    precision: Precision = "float32",
    progress: Progress | None = None,
    decimals: int = 2,
) -> Defended:
    """Probabilities rounded to `decimals` places and divided by their sum again.

    Source: Tramer et al., "Stealing Machine Learning Models via Prediction APIs", arXiv 1609.02943, section 7
    (rounding confidences; two places is the coarsest they try).

    Args:
        decimals: 1 to 6, default 2. The others as in `Defence`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """
    check_arguments(train, trigger_data, seed=seed, epochs=epochs, precision=precision)
    _check_int("decimals", decimals, 1, 6)
    model, _ = unmarked_victim(
        victim, train, architecture, seed=seed, epochs=epochs, precision=precision, progress=progress
    )
    return Defended(Perturbed(model, lambda probabilities: probabilities.round(decimals=decimals)))


def top_k(
    train: Split,
    *,
    architecture: Callable[[], nn.Module],
    seed: int,
    epochs: int,
    trigger_data: Split,
    victim: nn.Module | None = None,
    reference: nn.Module | None = None,
    target: int | None = None,
    precision: Precision = "float32",
    progress: Progress | None = None,
    k: int = 3,
) -> Defended:
    """Only the k largest probabilities are told, divided by their sum; all others are 0.

    Source: Orekondy, Schiele & Fritz, "Knockoff Nets", arXiv 1812.02766, section 6 (truncated posteriors).

    Args:
        k: 1 to C, default 3. The others as in `Defence`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """
    check_arguments(train, trigger_data, seed=seed, epochs=epochs, precision=precision)
    model, classes = unmarked_victim(
        victim, train, architecture, seed=seed, epochs=epochs, precision=precision, progress=progress
    )
    _check_int("k", k, 1, classes)

    def largest(probabilities: Tensor) -> Tensor:
        values, places = probabilities.topk(k, dim=1)
        return torch.zeros_like(probabilities).scatter(1, places, values)

    return Defended(Perturbed(model, largest))


def reverse_sigmoid(
    train: Split,
    *,
    architecture: Callable[[], nn.Module],
    seed: int,
    epochs: int,
    trigger_data: Split,
    victim: nn.Module | None = None,
    reference: nn.Module | None = None,
    target: int | None = None,
    precision: Precision = "float32",
    progress: Progress | None = None,
    beta: float = 1.0,
    gamma: float = 0.1,
) -> Defended:
    """Probabilities y become y - beta * (sigmoid(gamma * logit(y)) - 1/2), divided by their sum again.

    The gradient of what is told points away from the truth where the model is sure.

    Source: Lee, Edwards, Molloy & Su, "Defending Against Neural Network Model Stealing Attacks Using
    Deceptive Perturbations", arXiv 1806.00054, section III. Defaults as in the Adversarial Robustness
    Toolbox.

    Args:
        beta: strength, in (0, 1] (above 1 the label itself could change).
        gamma: steepness, above 0. The others as in `Defence`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """
    check_arguments(train, trigger_data, seed=seed, epochs=epochs, precision=precision)
    if not 0 < beta <= 1:
        raise ValueError(f"beta must be above 0 and at most 1, got beta={beta}")
    if not 0 < gamma < float("inf"):
        raise ValueError(f"gamma must be finite and above 0, got gamma={gamma}")
    model, _ = unmarked_victim(
        victim, train, architecture, seed=seed, epochs=epochs, precision=precision, progress=progress
    )

    def deceive(probabilities: Tensor) -> Tensor:
        inner = probabilities.logit(eps=1e-7)
        return (probabilities - beta * (torch.sigmoid(gamma * inner) - 0.5)).clamp_min(0)

    return Defended(Perturbed(model, deceive))


def _check_int(name: str, value: int, minimum: int, maximum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not minimum <= value <= maximum:
        raise ValueError(f"{name} must be between {minimum} and {maximum}, got {name}={value}")
