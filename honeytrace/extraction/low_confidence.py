"""Low-confidence filtering: answers the victim is unsure of are not learned."""

from torch import Tensor

from honeytrace.extraction.interface import Api, Extraction, Labels
from honeytrace.extraction.outliers import others
from honeytrace.extraction.recipe import Recipe
from honeytrace.extraction.session import Session
from honeytrace.training import Progress


def low_confidence(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    minimum: float = 0.9,
    progress: Progress | None = None,
) -> Extraction:
    """Leave out every answer whose largest probability is below `minimum`, and train on the rest.

    A watermark that mixes another class into an answer, or that bends what the model is unsure of, shows as
    low confidence (removal by thresholding, as against Neural Honeytrace, arXiv 2501.09328).

    Args:
        api: must give probabilities; `labels` may be "top1" all the same.
        pool, recipe, seed, budget, labels, progress: as `random_queries`.
        minimum: in (0, 1). Default 0.9: where a tenth or more of another class was mixed in, it is left out.

    Returns:
        The copy; `suspected` are the rows left out.

    Raises:
        TypeError, ValueError: as `random_queries`; `minimum` is out of range; no answer is as sure as that.
    """
    if not 0 < minimum < 1:
        raise ValueError(f"minimum must be in (0, 1), got minimum={minimum}")
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress, needs="scores")
    queries, targets = session.ask_at_random()
    confidence = session.asked()[1].amax(1)
    kept = (confidence >= minimum).nonzero().flatten()
    if len(kept) == 0:
        raise ValueError(
            f"minimum={minimum} leaves none of {len(queries)} answers: the surest has {confidence.max():.3f}"
        )
    copy, history = recipe.train(queries[kept], targets[kept], seed=seed, progress=progress)
    return session.extraction(copy, history, kept=kept, suspected=others(kept, len(queries)))
