"""Outlier filtering: what a model fits worst is what a watermark bent sharply."""

import torch
from torch import Tensor, nn

from honeytrace.training import excess_loss


def worst_dropped(model: nn.Module, inputs: Tensor, targets: Tensor, *, share: float) -> Tensor:
    """Rows that remain when the share of samples that `model` fits worst is left out.

    "Worst" is the highest excess loss (cross entropy less the target's own entropy), so that an honest but
    undecided answer does not count as badly fitted. Of equal ones the later goes first.

    Args:
        model: trained on these very samples.
        inputs: [N, ...].
        targets: labels [N] or probabilities [N, C], as in ``honeytrace.training.fit``.
        share: in [0, 1); floor(share * N) samples are left out.

    Returns:
        int64 [N - floor(share * N)], ascending, on the device of `inputs`.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or value.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got share={share}")
    losses = excess_loss(model, inputs, targets)
    # A loss that is not a number would sort anywhere: it is the worst there is.
    order = torch.argsort(losses.nan_to_num(nan=torch.inf), stable=True)
    return order[: len(order) - int(share * len(order))].sort().values
