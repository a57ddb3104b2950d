"""What learning from noisy labels offers an attacker: bootstrapped targets and co-teaching."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from honeytrace.extraction.interface import Api, Extraction, Labels
from honeytrace.extraction.outliers import lowest, others
from honeytrace.extraction.recipe import Recipe
from honeytrace.extraction.session import Session
from honeytrace.training import Progress, excess_loss

# Weights of the answers in section 3.3 of the paper.
_TRUST = {"soft": 0.95, "hard": 0.8}


def bootstrap(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    kind: Literal["hard", "soft"] = "hard",
    trust: float | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """Learn from a mixture of the answer and of what the copy itself believes at that moment.

    Reed et al., "Training Deep Neural Networks on Noisy Labels with Bootstrapping", arXiv 1412.6596, section
    3.3: the target is trust * answer + (1 - trust) * belief, where the belief is the copy's distribution
    ("soft") or its most probable class ("hard").

    Args:
        api, pool, recipe, seed, budget, labels, progress: as `random_queries`.
        kind: of belief. Default "hard", the better one in the paper.
        trust: weight of the answer, in (0, 1]. Default: the paper's, 0.8 for "hard" and 0.95 for "soft".

    Returns:
        The copy; `targets` are the answers, for the beliefs changed with every step.

    Raises:
        TypeError, ValueError: as `random_queries`, or a setting is out of range.
    """
    if kind not in _TRUST:
        raise ValueError(f'kind must be "hard" or "soft", got kind={kind!r}')
    share = _TRUST[kind] if trust is None else trust
    if not 0 < share <= 1:
        raise ValueError(f"trust must be in (0, 1], got trust={trust}")
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress)
    queries, targets = session.ask_at_random()
    copy = recipe.fresh(seed)

    def objective(batch: Tensor, wanted: Tensor, place: float) -> tuple[Tensor, Tensor]:
        logits = copy(batch).float()
        belief = logits.argmax(1) if kind == "hard" else logits.detach().softmax(1)
        told, believed = (functional.cross_entropy(logits, target) for target in (wanted, belief))
        return share * told + (1 - share) * believed, logits

    history = recipe.train_on(copy, queries, targets, seed=seed, objective=objective, progress=progress)
    return session.extraction(copy, history)


def co_teaching(
    api: Api,
    pool: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    budget: int | None = None,
    labels: Labels = "soft",
    rate: float = 0.1,
    progress: Progress | None = None,
) -> Extraction:
    """Train two copies side by side; each learns from what the other one fits well.

    Han et al., "Co-teaching: Robust Training of Deep Neural Networks with Extremely Noisy Labels", arXiv
    1804.06872, algorithm 1: in every batch each copy picks the samples of smallest loss for its peer; the
    share left out rises from 0 to `rate` over the first quarter of the training and stays there.

    Args:
        api, pool, recipe, seed, budget, labels, progress: as `random_queries`.
        rate: share of answers thought to be wrong, in (0, 1). Default 0.1.

    Returns:
        The first copy. `suspected` are the share `rate` of the answers that its peer fits worst in the end.

    Raises:
        TypeError, ValueError: as `random_queries`, or `rate` is out of range.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate must be in (0, 1), got rate={rate}")
    session = Session(api, pool, seed=seed, budget=budget, labels=labels, progress=progress)
    queries, targets = session.ask_at_random()
    copy, peer = recipe.fresh(seed), recipe.fresh((seed + 1) % 2**64)

    def objective(batch: Tensor, wanted: Tensor, place: float) -> tuple[Tensor, Tensor]:
        logits = copy(batch).float(), peer(batch).float()
        losses = [functional.cross_entropy(each, wanted, reduction="none") for each in logits]
        # The target's own entropy is no fault of the fit: an honest but undecided answer is no outlier.
        excess = 0.0 if wanted.dim() == 1 else torch.xlogy(wanted, wanted).sum(1)
        out = rate * min(1.0, 4 * place)
        picks = [lowest((loss + excess).detach(), share=out) for loss in losses]
        return losses[0][picks[1]].mean() + losses[1][picks[0]].mean(), logits[0]

    pair = nn.ModuleList([copy, peer])
    history = recipe.train_on(pair, queries, targets, seed=seed, objective=objective, progress=progress)
    kept = lowest(excess_loss(peer, queries, targets), share=rate)
    return session.extraction(copy, history, kept=kept, suspected=others(kept, len(queries)))
