"""Extraction by random queries: the attack that all others are measured against."""

from torch import Tensor

from honeytrace.extraction.interface import Api, Extraction, Labels
from honeytrace.extraction.recipe import Recipe
from honeytrace.extraction.session import Session
from honeytrace.training import Progress


def random_queries(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    progress: Progress | None = None,
) -> Extraction:
    """Ask about inputs drawn at random from a pool, and train a copy on the answers.

    The random strategy of KnockoffNets (Orekondy, Schiele & Fritz, arXiv 1812.02766, section 4.1.1). What
    the pool holds is the caller's choice: with images of another kind than the victim was trained on, this is
    the out-of-distribution attack.

    Args:
        api: any callable from inputs [B, ...] to probabilities [B, C] or labels [B].
        pool: the attacker's inputs, floating point [N, ...].
        recipe: which model is trained as the copy, and how.
        seed: 0 to 2**64 - 1; fixes the queries, the copy's first weights and its training.
        budget: number of queries, at most N; default: the whole pool. No input is sent twice.
        labels: learn from the probabilities ("soft", default) or from the most probable class ("top1").
        progress: told of every batch asked, then of every batch learned.

    Returns:
        The copy with all queries and answers.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value, the API's answers are malformed, or soft
            labels are wanted of an API that gives labels only.
    """
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress)
    queries, targets = session.ask_at_random()
    return session.extraction(*recipe.train(queries, targets, seed=seed, progress=progress))
