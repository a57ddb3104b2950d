"""The loop for losses that `honeytrace.training.fit` does not know: several losses, drawn batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from honeytrace.training import Precision, Progress, adamw, descend, device_of


class Batches(Iterator[Tensor]):
    """Endless batches of indices: every `count // size` of them go through all samples once.

    Args:
        count: samples N.
        size: indices in a batch, at most N are given.
        generator: the order of each pass.
    """

    def __init__(self, count: int, size: int, generator: torch.Generator) -> None:
        self._count, self._size, self._generator = count, min(size, count), generator
        self._order = torch.empty(0, dtype=torch.int64)

    def __next__(self) -> Tensor:
        if len(self._order) < self._size:
            self._order = torch.cat([self._order, torch.randperm(self._count, generator=self._generator)])
        batch, self._order = self._order[: self._size], self._order[self._size :]
        return batch


def train_steps(
    model: nn.Module,
    backward: Callable[[], Tensor],
    *,
    steps: int,
    seed: int,
    precision: Precision = "float32",
    learning_rate: float = 3e-3,
    weight_decay: float = 0.01,
    progress: Progress | None = None,
    text: str = "",
) -> None:
    """Train `model` in place with AdamW, in the loop of `honeytrace.training.fit`.

    Args:
        model: left in evaluation mode.
        backward: puts gradients into the model's weights and gives the loss, detached. Runs in training mode,
            under autocast where `precision` says so.
        steps: how many times.
        seed: what a dropout layer draws from; the global random state stays as it was.
        learning_rate: the highest one of the cycle.
        progress, text: told of the steps, with the text and the loss.

    Raises:
        FloatingPointError: the loss became infinite or NaN.
    """
    device = device_of(model)
    optimizer = adamw(list(model.parameters()), learning_rate, weight_decay)

    def learn(_: int) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = backward()
        optimizer.step()
        return loss

    descend(
        model,
        learn,
        optimizer,
        steps=steps,
        seed=seed,
        learning_rate=learning_rate,
        precision=precision,
        place=lambda done: f"{text}, step {done + 1} of {steps}",
        progress=progress,
    )
    model.zero_grad(set_to_none=True)
