"""Extraction by random queries: the attack that all others are measured against."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from honeytrace.extraction.interface import Api, Extraction, ask
from honeytrace.extraction.outliers import worst_dropped
from honeytrace.training import Augment, History, Progress, check_settings, fit, seeded


def random_queries(
    api: Api,
    pool: Tensor,
    *,
    surrogate: Callable[[], nn.Module],
    epochs: int,
    seed: int,
    labels: Literal["soft", "top1"] = "soft",
    budget: int | None = None,
    drop_worst: float = 0.0,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    augment: Augment | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """Ask about inputs drawn at random from a pool, and train a copy on the answers.

    The random strategy of KnockoffNets (Orekondy, Schiele & Fritz, arXiv 1812.02766, section 4.1.1). With
    `drop_worst`, the attacker trains once, leaves out the queries that the copy fits worst, and trains again
    from scratch: watermarks that overwrite single answers do not live through that.

    Args:
        api: any callable from inputs [B, ...] to probabilities [B, C] or labels [B].
        pool: the attacker's inputs, floating point [N, ...].
        surrogate: makes a fresh model from [B, ...] to logits [B, C]; called under `seed`, so that the same
            arguments give the same copy.
        epochs: passes over the answers (in each of the two trainings, where there are two).
        seed: 0 to 2**64 - 1; fixes the queries, the surrogate's first weights and its training.
        labels: learn from the probabilities ("soft", default) or from the most probable class ("top1").
        budget: number of queries, at most N; default: the whole pool. No input is sent twice.
        drop_worst: share of the queries left out of the second training, in [0, 1). Default 0: one training.
        batch_size, learning_rate, augment: as in ``honeytrace.training.fit``.
        progress: told of every batch asked, then of every batch learned.

    Returns:
        The copy with all queries and answers, and which of them it was finally trained on.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value, the API's answers are malformed, or soft
            labels are wanted of an API that gives labels only.
    """
    # Everything that can be wrong is looked at first: queries may cost money, and cannot be taken back.
    _check(pool, surrogate, labels, budget, drop_worst)
    check_settings(epochs=epochs, seed=seed, batch_size=batch_size, learning_rate=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(len(pool), generator=generator)[:budget].to(pool.device)
    queries = pool[indices]
    answers = ask(api, queries, progress=progress)
    targets = _targets(answers, labels)

    def train(queries: Tensor, targets: Tensor) -> tuple[nn.Module, History]:
        copy = seeded(surrogate, seed)
        history = fit(
            copy,
            queries,
            targets,
            epochs=epochs,
            seed=seed,
            batch_size=batch_size,
            learning_rate=learning_rate,
            augment=augment,
            progress=progress,
        )
        return copy, history

    copy, history = train(queries, targets)
    kept = torch.arange(len(queries), device=queries.device)
    if drop_worst > 0:
        kept = worst_dropped(copy, queries, targets, share=drop_worst)
        copy, history = train(queries[kept], targets[kept])
    return Extraction(copy, queries, answers, indices, kept, history)


def _targets(answers: Tensor, labels: str) -> Tensor:
    """What the copy learns: labels int64 [n], or probabilities float32 [n, C] whose rows sum to 1."""
    if answers.dim() == 1:
        if labels == "soft":
            raise ValueError(
                'labels="soft" needs an api that gives probabilities [B, C]; this one gives labels [B]'
            )
        return answers
    if labels == "top1":
        return answers.argmax(1)
    return answers / answers.sum(1, keepdim=True)  # rounded answers need not sum to 1 by themselves


def _check(
    pool: Tensor, surrogate: Callable[[], nn.Module], labels: str, budget: int | None, drop_worst: float
) -> None:
    if not isinstance(pool, Tensor):
        raise TypeError(f"pool must be a tensor, got {type(pool).__name__}")
    if pool.dim() < 2 or len(pool) == 0 or not pool.is_floating_point():
        raise ValueError(
            f"pool must be floating point [N, ...] with N >= 1, got {pool.dtype} {list(pool.shape)}"
        )
    if isinstance(surrogate, nn.Module) or not callable(surrogate):
        raise TypeError(
            "surrogate must be a callable that makes a fresh model, such as lambda: small_cnn(10, 1, 28), "
            f"got {type(surrogate).__name__}"
        )
    if labels not in ("soft", "top1"):
        raise ValueError(f'labels must be "soft" or "top1", got labels={labels!r}')
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int)):
        raise TypeError(f"budget must be an int or None, got {type(budget).__name__}")
    if budget is not None and not 1 <= budget <= len(pool):
        raise ValueError(
            f"budget must be between 1 and the size of the pool N={len(pool)}, got budget={budget}"
        )
    if not 0 <= drop_worst < 1:
        raise ValueError(f"drop_worst must be in [0, 1), got drop_worst={drop_worst}")
