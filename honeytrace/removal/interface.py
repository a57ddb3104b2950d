"""What all removals share: their call, and how the attacker's few clean samples are drawn."""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from torch import Tensor, nn

from honeytrace.data import Split
from honeytrace.training import Precision, Progress, check_settings, device_of, seeded


class Removal(Protocol):
    """A removal by its common arguments; each function has settings of its own beside them."""

    def __call__(
        self,
        surrogate: nn.Module,
        data: Split,
        *,
        seed: int,
        precision: Precision = "float32",
        progress: Progress | None = None,
    ) -> nn.Module:
        """Try to take a watermark out of a copy without knowing it.

        Args:
            surrogate: from [B, ...] to logits [B, C]; stays as it is.
            data: the attacker's own samples with labels (true ones, or the copy's own); each removal says
                what share of them it uses.
            seed: 0 to 2**64 - 1; fixes which samples, and all training.
            precision: as in ``honeytrace.training.fit``.
            progress: told of every batch.

        Returns:
            A new model of the surrogate's architecture, in evaluation mode.

        Raises:
            TypeError, ValueError: an argument has a wrong type or value.
        """


def check_arguments(
    surrogate: nn.Module,
    data: Split,
    *,
    seed: int,
    precision: Precision,
    epochs: int = 1,
    learning_rate: float = 1.0,
    share: float = 1.0,
) -> None:
    """Raise TypeError or ValueError for what every removal would refuse."""
    if not isinstance(surrogate, nn.Module):
        raise TypeError(f"surrogate must be a torch.nn.Module, got {type(surrogate).__name__}")
    check_settings(epochs=epochs, seed=seed, precision=precision, learning_rate=learning_rate)
    if not (isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)):
        raise TypeError(f"data must be a pair (inputs, labels) of tensors, got {type(data).__name__}")
    if not data[0].is_floating_point() or data[1].is_floating_point():
        raise TypeError(
            f"data must hold floating-point inputs and integer labels, "
            f"got {data[0].dtype} and {data[1].dtype}"
        )
    if data[0].dim() < 2 or len(data[0]) == 0 or data[1].shape != data[0].shape[:1]:
        raise ValueError(
            f"data must hold inputs [N, ...] and labels [N] with N >= 1, "
            f"got {list(data[0].shape)} and {list(data[1].shape)}"
        )
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got share={share}")


def drawn(data: Split, share: float, seed: int) -> Split:
    """A random share of the samples, at least one."""
    count = max(1, round(share * len(data[0])))
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed % 2**63))[:count]
    return Split(data[0][order.to(data[0].device)], data[1][order.to(data[1].device)])


def twin(model: nn.Module) -> nn.Module:
    """A copy whose weights are its own and may all be trained."""
    made = copy.deepcopy(model)
    made.requires_grad_(True)
    return made.eval()


def reborn(model: nn.Module, seed: int) -> nn.Module:
    """A copy with fresh first weights, drawn on the CPU: every part that can reset its parameters does."""
    device = device_of(model)

    def factory() -> nn.Module:
        # A GPU would draw from a generator of its own, which `seeded` leaves alone.
        made = twin(model).to("cpu")
        for module in made.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        return made

    return seeded(factory, seed).to(device)
