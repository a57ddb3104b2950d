"""Averages of several answers about one input: over small changes of it, or over the same question."""

import torch
from torch import Tensor
from torch.nn import functional

from honeytrace import data
from honeytrace.extraction.interface import Api, Extraction, Labels
from honeytrace.extraction.recipe import Recipe
from honeytrace.extraction.session import Session
from honeytrace.training import Augment, Progress


def smoothing(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    views: int = 3,
    change: Augment | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """Ask about each input as it is and under small changes, and learn the average of the answers.

    The smoothing attack of Lukas et al., "SoK: How Robust is Image Classification Deep Neural Network
    Watermarking?", arXiv 2108.04974, section V; three queries an image as against Neural Honeytrace
    (arXiv 2501.09328).

    Args:
        api, pool, recipe, seed, labels, progress: as `random_queries`. Of an API that gives labels the
            most frequent one is learned (of equally frequent ones the lowest).
        budget: number of queries; budget // views inputs are drawn, and what is left over is spent on further
            views of the first of them. Default: the size of the pool.
        views: queries about one input, at least 2. Default 3.
        change: what is done to an input. Default: the recipe's `augment`, else ``honeytrace.data.augment``
            (images only).

    Returns:
        The copy, trained on the unchanged inputs (`kept`) and the averages (`targets`).

    Raises:
        TypeError, ValueError: as `random_queries`; too small or too large a budget for that many views.
    """
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress, repeats=True)
    return _averaged(session, recipe, "views", views, change or recipe.augment or _small_change)


def repeat(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    times: int = 3,
    progress: Progress | None = None,
) -> Extraction:
    """Ask the same questions several times, and learn the average of the answers.

    Against marks that are drawn anew at every call. A deterministic watermark does not notice it.

    Args:
        api, pool, recipe, seed, budget, labels, progress: as `smoothing`.
        times: how often each input is sent, at least 2. Default 3.

    Raises:
        TypeError, ValueError: as `smoothing`.
    """
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress, repeats=True)
    return _averaged(session, recipe, "times", times, lambda batch, generator: batch)


def _small_change(batch: Tensor, generator: torch.Generator) -> Tensor:
    return data.augment(batch, generator)


def _averaged(session: Session, recipe: Recipe, name: str, views: int, change: Augment) -> Extraction:
    if isinstance(views, bool) or not isinstance(views, int):
        raise TypeError(f"{name} must be an int, got {type(views).__name__}")
    if views < 2:
        raise ValueError(f"{name} must be at least 2, got {name}={views}")
    count = session.budget // views
    if not 1 <= count <= len(session.pool):
        raise ValueError(
            f"budget must pay {name}={views} queries for between 1 and all N={len(session.pool)} inputs of "
            f"the pool, got budget={session.budget}"
        )
    rows = session.draw(count)
    session.ask(session.pool[rows], rows)
    changes = torch.Generator(device=session.pool.device).manual_seed(session.seed)
    while session.left:
        again = rows[: session.left]
        session.ask(change(session.pool[again], changes), again)
    queries, answers, _ = session.asked()
    owner = torch.arange(len(queries), device=queries.device) % count
    targets = _means(answers, owner, count)
    if answers.dim() == 1 or session.labels == "top1":
        targets = targets.argmax(1)
    copy, history = recipe.train(queries[:count], targets, seed=session.seed, progress=session.progress)
    kept = torch.arange(count, device=queries.device)
    return session.extraction(copy, history, kept=kept, targets=targets)


def _means(answers: Tensor, owner: Tensor, count: int) -> Tensor:
    """Mean answer [count, C] of each owner; labels count as one-hot answers."""
    if answers.dim() == 1:
        answers = functional.one_hot(answers).float()
    sums = answers.new_zeros(count, answers.shape[1]).index_add_(0, owner, answers)
    return sums / sums.sum(1, keepdim=True)
