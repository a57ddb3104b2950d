"""Outlier filtering: what a model fits worst is what a watermark bent sharply."""

import torch
from torch import Tensor, nn

from honeytrace.extraction.interface import Api, Extraction, Labels
from honeytrace.extraction.recipe import Recipe
from honeytrace.extraction.session import Session
from honeytrace.training import Progress, excess_loss


def outliers(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    share: float = 0.1,
    progress: Progress | None = None,
) -> Extraction:
    """Train a copy, leave out the queries that it fits worst, train again from scratch.

    Watermarks that overwrite single answers do not live through that: such an answer is an outlier. The
    filter itself is the trimmed loss of robust regression (Rousseeuw, "Least Median of Squares Regression",
    1984, section 5), in one step.

    Args:
        api, pool, recipe, seed, budget, labels, progress: as `random_queries`.
        share: of the queries that are left out, in [0, 1). Default 0.1. With 0 there is one training only.

    Returns:
        The second copy; `suspected` are the rows left out, `kept` the others.

    Raises:
        TypeError, ValueError: as `random_queries`, or `share` is out of range.
    """
    _check_share(share)
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress)
    queries, targets = session.ask_at_random()
    copy, history = recipe.train(queries, targets, seed=seed, progress=progress)
    kept = torch.arange(len(queries), device=queries.device)
    if share > 0:
        kept = worst_dropped(copy, queries, targets, share=share)
        copy, history = recipe.train(queries[kept], targets[kept], seed=seed, progress=progress)
    return session.extraction(copy, history, kept=kept, suspected=others(kept, len(queries)))


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
    _check_share(share)
    return lowest(excess_loss(model, inputs, targets), share=share)


def lowest(losses: Tensor, *, share: float) -> Tensor:
    """Rows of `losses` [N] that remain when the floor(share * N) highest are left out: int64, ascending."""
    # A loss that is not a number would sort anywhere: it is the worst there is.
    order = torch.argsort(losses.nan_to_num(nan=torch.inf), stable=True)
    return order[: len(order) - int(share * len(order))].sort().values


def others(rows: Tensor, count: int) -> Tensor:
    """The rows of 0..count-1 that are not among `rows`: int64, ascending."""
    left = torch.ones(count, dtype=torch.bool, device=rows.device)
    left[rows] = False
    return left.nonzero().flatten()


def _check_share(share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got share={share}")
