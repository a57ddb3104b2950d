"""Second-hand extraction: a copy of a copy."""

from torch import Tensor

from honeytrace.extraction.interface import Api, Extraction, Labels
from honeytrace.extraction.recipe import Recipe
from honeytrace.extraction.session import Session
from honeytrace.training import Progress, predict


def second_hand(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    first: Recipe | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """Make a copy, then copy that copy on the same inputs: the second one never saw an answer of the API.

    The attacker launders the answers, or the second is a customer of the first. Distillation as a removal
    (Hinton, Vinyals & Dean, arXiv 1503.02531; Lukas et al., arXiv 2108.04974, section V).

    Args:
        api, pool, seed, budget, labels, progress: as `random_queries`; with "top1" both copies learn classes.
        recipe: of the second copy. first: of the first copy. Default: the same.

    Returns:
        The second copy; `targets` are the first one's answers.

    Raises:
        TypeError, ValueError: as `random_queries`.
    """
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress)
    queries, targets = session.ask_at_random()
    go_between, _ = (first or recipe).train(queries, targets, seed=(seed + 1) % 2**64, progress=progress)
    told = session.learnable(predict(go_between, queries).float().softmax(1))
    copy, history = recipe.train(queries, told, seed=seed, progress=progress)
    return session.extraction(copy, history, targets=told)
