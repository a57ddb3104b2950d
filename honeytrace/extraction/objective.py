"""Training with a loss of one's own, for attackers who do not trust the answers' plain cross entropy."""

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from honeytrace.extraction.recipe import Recipe
from honeytrace.training import History, Progress


class Objective(Protocol):
    """The loss of one batch."""

    def __call__(self, batch: Tensor, wanted: Tensor, place: float) -> tuple[Tensor, Tensor]:
        """From a batch [B, ...], its targets and the share of the training that is over, in [0, 1): the loss,
        and the copy's logits [B, C]."""


def fit_objective(
    trained: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    recipe: Recipe,
    objective: Objective,
    *,
    seed: int,
    progress: Progress | None = None,
) -> History:
    """Train `trained` in place by an objective: ``honeytrace.training.fit`` with another loss.

    Args:
        trained: holds everything that is trained; the objective calls it.
        inputs, targets: as ``fit``. recipe: epochs, batch size, learning rate (the highest of one cycle),
            augmentation and precision.
        seed: fixes the order of the samples, augmentation and dropout. The global random state is untouched.

    Returns:
        Loss and accuracy of each epoch.

    Raises:
        FloatingPointError: the loss became infinite or NaN.
    """
    device = next(trained.parameters()).device
    batches = math.ceil(len(inputs) / recipe.batch_size)
    total = recipe.epochs * batches
    optimizer = torch.optim.AdamW(trained.parameters(), lr=recipe.learning_rate)
    schedule = OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=total, pct_start=0.25, cycle_momentum=False
    )
    order = torch.Generator().manual_seed(seed)
    changes = torch.Generator(device=inputs.device).manual_seed((seed + 1) % 2**64)
    losses: list[float] = []
    accuracies: list[float] = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        trained.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        trained.train()
        for epoch in range(recipe.epochs):
            loss_sum, hits = 0.0, 0
            order_now = torch.randperm(len(inputs), generator=order).tensor_split(batches)
            for number, rows in enumerate(order_now):
                step = epoch * batches + number
                rows = rows.to(inputs.device)
                batch = inputs[rows] if recipe.augment is None else recipe.augment(inputs[rows], changes)
                wanted = targets[rows].to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
                    loss, logits = objective(batch.to(device), wanted, step / total)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"the loss became {value} in epoch {epoch + 1} of {recipe.epochs}"
                    )
                loss_sum += value * len(rows)
                hits += int((logits.detach().argmax(1) == best_class(wanted)).sum())
                if progress is not None:
                    progress(step + 1, total, f"epoch {epoch + 1} of {recipe.epochs}, loss {value:.3f}")
            losses.append(loss_sum / len(inputs))
            accuracies.append(hits / len(inputs))
    trained.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    trained.eval()
    return History(tuple(losses), tuple(accuracies))


def best_class(targets: Tensor) -> Tensor:
    """Labels [N] as they are; of probabilities [N, C] the first largest."""
    return targets if targets.dim() == 1 else targets.argmax(1)
