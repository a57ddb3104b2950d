"""The attacker who knows Honeytrace but not the key: hunts for bent answers, then drops or repairs them."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from honeytrace.extraction.answer_statistics import mixed_in
from honeytrace.extraction.interface import Api, Extraction, Labels, best_class
from honeytrace.extraction.outliers import others
from honeytrace.extraction.recipe import Recipe
from honeytrace.extraction.session import Session
from honeytrace.training import Progress, predict


class Hunt(NamedTuple):
    """What the hunter believes about n answers."""

    mixed: Tensor
    """How likely it is that a class was mixed into the answer, float64 [n] in [0, 1]; 0 for labels."""
    misfit: Tensor
    """Excess loss of the answer under models that did not learn it, in nats, float32 [n]."""
    expected: Tensor
    """Mean answer of these models, probabilities float32 [n, C]."""
    suspected: Tensor
    """Rows believed to be bent, int64, ascending."""
    targets: Tensor
    """The class each suspected answer is believed to be bent to, int64, beside `suspected`."""


def hunt(
    queries: Tensor,
    answers: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    clean: tuple[Tensor, Tensor] | None = None,
    folds: int = 2,
    least: float = 0.5,
    share: float = 0.03,
    progress: Progress | None = None,
) -> Hunt:
    """Find bent answers without the key.

    Graded marks show in the answers' statistics (`mixed_in`); flips do not, but a model that did not learn
    them disagrees with them. Such models are either trained on labelled data of the attacker's own, or
    cross-fitted: the answers that look unmixed are cut into folds, and each answer is judged by the models
    that learned the other folds.

    Args:
        queries: [n, ...]. answers: probabilities [n, C] or labels [n] to them, as learned (see
            `Session.learnable`).
        recipe, seed, progress: as `random_queries`.
        clean: inputs [M, ...] and labels int64 [M] that no API was asked about. Default: none.
        folds: models of the ensemble, at least 2; costs folds - 1 trainings when cross-fitted. Default 2.
        least: an answer that is mixed with at least this probability is suspected. Default 0.5.
        share: of the answers, those with the highest misfit are suspected besides, in [0, 1). Default 0.03.

    Raises:
        ValueError: a setting is out of range.
    """
    _check_hunt(folds, least, share)
    mixed = torch.zeros(len(answers), dtype=torch.float64, device=answers.device)
    added = best_class(answers)
    if answers.dim() == 2 and answers.shape[1] >= 3:
        mixed, added = mixed_in(answers)
    statistical = mixed >= least
    trusted = (~statistical).nonzero().flatten()
    if clean is None:
        expected = _cross_fitted(queries, answers, trusted, recipe, folds, seed, progress)
    else:
        models = [recipe.train(*clean, seed=(seed + n) % 2**64, progress=progress)[0] for n in range(folds)]
        expected = _mean_answer(models, queries)
    misfit = _misfit(expected, answers)
    worst = torch.argsort(misfit.masked_fill(statistical, -torch.inf), descending=True, stable=True)
    suspect = statistical.clone()
    suspect[worst[: int(share * len(answers))]] = True
    rows = suspect.nonzero().flatten()
    targets = torch.where(statistical, added, best_class(answers))[rows]
    return Hunt(mixed, misfit, expected, rows, targets)


def bent_hunting(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    mode: Literal["drop", "repair"],
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    clean: tuple[Tensor, Tensor] | None = None,
    folds: int = 2,
    least: float = 0.5,
    share: float = 0.03,
    progress: Progress | None = None,
) -> Extraction:
    """`hunt` for bent answers, leave them out or unbend them, and train on what comes of it.

    This project's own attack: what somebody can do who has read its documentation and lacks the key.

    Args:
        api, pool, recipe, seed, budget, labels, progress: as `random_queries`. An API that gives scores
            is hunted by them, whatever the copy learns.
        mode: "drop" trains on the answers that are not suspected, "repair" on all, the suspected ones
            `repaired`.
        clean, folds, least, share: as `hunt`.

    Returns:
        The copy; `suspected` are the rows left out, or whose targets were changed.

    Raises:
        TypeError, ValueError: as `random_queries` and `hunt`, or `mode` is none of the two.
    """
    if mode not in ("drop", "repair"):
        raise ValueError(f'mode must be "drop" or "repair", got mode={mode!r}')
    _check_hunt(folds, least, share)
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress)
    queries, targets = session.ask_at_random()
    answers = session.asked()[1]
    if answers.dim() == 2:
        answers = answers / answers.sum(1, keepdim=True)
    found = hunt(
        queries,
        answers,
        recipe,
        seed=(seed + 1) % 2**64,
        clean=clean,
        folds=folds,
        least=least,
        share=share,
        progress=progress,
    )
    kept = torch.arange(len(queries), device=queries.device)
    if mode == "drop":
        kept = others(found.suspected, len(queries))
    else:
        targets = session.learnable(repaired(answers, found, least=least))
    copy, history = recipe.train(queries[kept], targets[kept], seed=seed, progress=progress)
    return session.extraction(copy, history, targets=targets[kept], kept=kept, suspected=found.suspected)


def repaired(answers: Tensor, found: Hunt, *, least: float = 0.5) -> Tensor:
    """The answers [n, C] or [n] with the suspected ones unbent.

    A class that was mixed in is cut down to the next smaller probability (an unmarked answer would rank it
    below that); an answer that does not fit is replaced by what the hunter's models expected.
    """
    rows = found.suspected
    mended = answers.clone()
    if answers.dim() == 1:
        mended[rows] = found.expected[rows].argmax(1)
        return mended
    mended[rows] = found.expected[rows].to(answers.dtype)
    statistical = found.mixed[rows] >= least
    mixed, added = rows[statistical], found.targets[statistical, None]
    bent = answers[mixed]
    height = bent.gather(1, added)
    below = bent.masked_fill(bent >= height, 0.0).amax(1, keepdim=True)
    bent = bent.scatter(1, added, below)
    mended[mixed] = bent / bent.sum(1, keepdim=True)
    return mended


def _cross_fitted(
    queries: Tensor,
    answers: Tensor,
    trusted: Tensor,
    recipe: Recipe,
    folds: int,
    seed: int,
    progress: Progress | None,
) -> Tensor:
    """Mean answer [n, C] to each query of the models that did not learn it. They learn trusted rows only."""
    if len(trusted) < folds:
        raise ValueError(f"hardly any of {len(queries)} answers looks unbent: there is nothing to learn from")
    fold = torch.randperm(len(queries), generator=torch.Generator().manual_seed(seed)) % folds
    fold = fold.to(queries.device)
    of_trusted = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    of_trusted[trusted] = True
    given: list[Tensor] = []
    judged: list[Tensor] = []
    for left_out in range(folds):
        learned = (of_trusted & (fold != left_out)).nonzero().flatten()
        model, _ = recipe.train(
            queries[learned], answers[learned], seed=(seed + left_out) % 2**64, progress=progress
        )
        judged.append((fold == left_out).nonzero().flatten())
        given.append(_mean_answer([model], queries[judged[-1]]))
    return torch.cat(given)[torch.cat(judged).argsort()]


def _mean_answer(models: list[nn.Module], queries: Tensor) -> Tensor:
    return torch.stack([predict(model, queries).float().softmax(1) for model in models]).mean(0)


def _misfit(expected: Tensor, answers: Tensor) -> Tensor:
    log_expected = expected.clamp(min=1e-12).log()
    if answers.dim() == 1:
        return functional.nll_loss(log_expected, answers, reduction="none")
    return (torch.xlogy(answers, answers) - answers * log_expected).sum(1)


def _check_hunt(folds: int, least: float, share: float) -> None:
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ValueError(f"folds must be an int of at least 2, got folds={folds}")
    if not 0 < least <= 1:
        raise ValueError(f"least must be in (0, 1], got least={least}")
    if not 0 <= share < 1:
        raise ValueError(f"share must be in [0, 1), got share={share}")
