"""Label recovery: turn marked answers back into clean ones before they are learned."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from honeytrace.extraction.interface import Api, Extraction, Labels
from honeytrace.extraction.nearest_rows import nearest_rows
from honeytrace.extraction.recipe import Recipe
from honeytrace.extraction.session import Session
from honeytrace.extraction.simulated_marks import Pairs, simulated_pairs
from honeytrace.ops import Bank
from honeytrace.training import Progress, fit, predict, seeded
from honeytrace.watermark import SecretKey, Watermark

# Hidden layers of the recovering network for ten classes in the published code of ModelGuard (USENIX Security
# 2024), which re-implements D-DAE.
_HIDDEN = (128, 64)
_BLOCK = 4096


class Defence(Protocol):
    """What the attacker believes the API's owner did to the model."""

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor, seed: int) -> nn.Module:
        """A defended version of `model` (logits in, logits out), set up on labelled data of its own."""


def honeytrace_defence(model: nn.Module, inputs: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """`model` protected by a Honeytrace of the attacker's own making: default settings, a key from `seed`.

    At most 8,000 of the inputs are used, for calibration is the dear part of the attack. Fewer than 2,500 get
    as many graded groups as they can fill, and no flips.
    """
    key = SecretKey(hashlib.sha256(f"shadow {seed}".encode("ascii")).digest())
    few: dict[str, Any] = {"graded_groups": max(1, min(8, len(inputs) // 125)), "flips": False}
    data = (inputs[:8000], labels[:8000])
    watermark = Watermark.calibrate(model, data, key=key, **(few if len(inputs) < 2500 else {}))
    return watermark.protect(model)


def d_dae(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    defence: Defence = honeytrace_defence,
    shadows: int = 2,
    recovery_epochs: int = 10,
    progress: Progress | None = None,
) -> Extraction:
    """Learn on defended shadow models how answers are bent, and unbend the API's with what was learned.

    Chen et al., "D-DAE: Defense-Penetrating Model Extraction Attacks" (IEEE S&P 2023): a generative network
    is trained on pairs of defended and clean answers of shadow models, and turns the API's answers into clean
    ones. The paper's first step, finding out which defence it is, is left out: this attacker knows. Shadows
    learn the answers' labels, which a graded mark leaves as they are. The network sees the classes in the
    order of their probability, so that what it learns about one target holds for any other.

    Args:
        api: must give probabilities. pool, recipe, seed, budget, labels, progress: as `random_queries`.
        defence: applied to the shadows. Default: `honeytrace_defence`.
        shadows: models, each trained on a random half of the queries, at least 1. Default 2.
        recovery_epochs: of the network's training. Default 10.

    Returns:
        The copy; `targets` are the recovered answers.

    Raises:
        TypeError, ValueError: as `random_queries`, or a setting is out of range.
    """
    _check_count("shadows", shadows)
    _check_count("recovery_epochs", recovery_epochs)
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress, needs="scores")
    queries, _ = session.ask_at_random()
    best = session.asked()[1].argmax(1)
    pairs: list[Pairs] = []
    for number in range(shadows):
        own = (seed + 1 + number) % 2**64
        half = torch.randperm(len(queries), generator=session.generator)[: max(1, len(queries) // 2)]
        half = half.to(queries.device)
        shadow, _ = recipe.train(queries[half], best[half], seed=own, progress=progress)
        defended = defence(shadow, queries, best, own)
        pairs.append(Pairs(*(predict(model, queries).float().softmax(1) for model in (shadow, defended))))
    learned = Pairs(*(torch.cat(side) for side in zip(*pairs, strict=True)))
    return _with_network(session, recipe, learned, recovery_epochs)


def d_dae_plus(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    pairs: int = 100_000,
    concentration: float = 8.0,
    recovery_epochs: int = 5,
    progress: Progress | None = None,
) -> Extraction:
    """`d_dae` without shadow models: the network learns from made-up pairs (`simulated_pairs`).

    "D-DAE+" as it is called in the code of Neural Honeytrace (arXiv 2501.09328). One model is trained on the
    answers' labels all the same, to know what clean answers look like.

    Args:
        api: must give probabilities. pool, recipe, seed, budget, labels, progress: as `random_queries`.
        pairs: made up for the network. Default 100,000.
        concentration: of the Dirichlet draws around clean answers. Default 8.
        recovery_epochs: of the network's training. Default 5.

    Raises:
        TypeError, ValueError: as `d_dae`.
    """
    _check_count("pairs", pairs)
    _check_count("recovery_epochs", recovery_epochs)
    _check_above("concentration", concentration)
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress, needs="scores")
    made = _made_up(session, recipe, pairs, concentration)
    return _with_network(session, recipe, made, recovery_epochs)


def bayes(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    table: int = 1_000_000,
    concentration: float = 8.0,
    tolerance: float = 0.01,
    neighbours: int = 32,
    progress: Progress | None = None,
) -> Extraction:
    """Look every answer up in a table of made-up marked answers, and learn the mean of their clean originals.

    The Bayes attack of Tang et al., "ModelGuard" (USENIX Security 2024): with clean answers drawn from the
    prior and marked as the defence would, the mean of the clean originals of an answer's neighbours estimates
    its clean posterior. The classes are put in the order of their probability first, so that the table serves
    all targets at once. Settings as against Neural Honeytrace (arXiv 2501.09328).

    Args:
        api: must give probabilities. pool, recipe, seed, budget, labels, progress: as `random_queries`.
        table: number of pairs. Default 1,000,000. concentration: of the Dirichlet draws. Default 8.
        tolerance: neighbours lie within this Euclidean distance; where none does, the nearest one stands for
            all. Default 0.01.
        neighbours: at most so many are averaged. Default 32.

    Returns:
        The copy; `targets` are the recovered answers.

    Raises:
        TypeError, ValueError: as `random_queries`, or a setting is out of range.
    """
    _check_count("table", table)
    _check_count("neighbours", neighbours)
    _check_above("concentration", concentration)
    _check_above("tolerance", tolerance)
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress, needs="scores")
    made = _made_up(session, recipe, table, concentration)
    marked, clean = _in_order(made.marked, made.clean)
    bank = Bank(marked)

    def looked_up(answers: Tensor) -> Tensor:
        distances, rows = nearest_rows(answers, bank, k=min(neighbours, table))
        near = distances <= tolerance
        near[:, 0] = True
        weights = near / near.sum(1, keepdim=True)
        return (weights[:, :, None] * clean[rows]).sum(1)

    return _recovered(session, recipe, looked_up)


def _made_up(session: Session, recipe: Recipe, count: int, concentration: float) -> Pairs:
    """Ask, and make up pairs around the answers of a model that learned labels only."""
    queries, _ = session.ask_at_random()
    best = session.asked()[1].argmax(1)
    own = (session.seed + 1) % 2**64
    model, _ = recipe.train(queries, best, seed=own, progress=session.progress)
    prototypes = predict(model, queries).float().softmax(1).cpu()
    return simulated_pairs(prototypes, count, concentration=concentration, seed=own)


def _with_network(session: Session, recipe: Recipe, pairs: Pairs, epochs: int) -> Extraction:
    marked, clean = _in_order(pairs.marked.cpu(), pairs.clean.cpu())
    network = seeded(lambda: _network(marked.shape[1]), session.seed)
    fit(network, marked, clean, epochs=epochs, seed=session.seed, batch_size=256, progress=session.progress)
    return _recovered(session, recipe, lambda answers: predict(network, answers).softmax(1))


def _recovered(session: Session, recipe: Recipe, recover: Callable[[Tensor], Tensor]) -> Extraction:
    """Train the copy on what `recover` makes of the answers (sorted, on the CPU)."""
    queries, answers, _ = session.asked()
    answers = (answers / answers.sum(1, keepdim=True)).cpu()
    sorted_answers, order = answers.sort(dim=1, descending=True, stable=True)
    found = torch.cat([recover(block) for block in torch.split(sorted_answers, _BLOCK)])
    clean = torch.empty_like(answers).scatter_(1, order, found).to(queries.device)
    targets = session.learnable(clean)
    copy, history = recipe.train(queries, targets, seed=session.seed, progress=session.progress)
    return session.extraction(copy, history, targets=targets)


def _in_order(marked: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Both [n, C] with the classes of each row in the falling order of its marked probabilities."""
    marked, order = marked.sort(dim=1, descending=True, stable=True)
    return marked, clean.gather(1, order)


def _network(classes: int) -> nn.Module:
    first, second = _HIDDEN
    return nn.Sequential(
        nn.Linear(classes, first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Linear(second, classes),
    )


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int of at least 1, got {name}={value!r}")


def _check_above(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {name}={value}")
