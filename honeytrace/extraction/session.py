"""`Session`: one attacker's dealings with the API, within the budget and written down."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from honeytrace.extraction.interface import Api, Extraction, Labels, Needs, ask, checked
from honeytrace.training import History, Progress, check_settings


class Session:
    """Asks the API, never about more inputs than the budget allows, and keeps the record.

    Everything that can be wrong is looked at before the first question: queries may cost money, and cannot be
    taken back.

    Args:
        api, pool, seed, budget, labels, progress: as every attack takes them (see `random_queries`).
        needs: what the attack cannot do without: "scores" refuses an API that gives labels only.
        repeats: the attack may ask about more inputs than the pool holds (it changes or repeats them).

    Attributes:
        pool, seed, labels, progress: as given.
        budget: number of queries; the size of the pool where none was given.
        generator: the attack's own source of random numbers, on the CPU.
    """

    def __init__(
        self,
        api: Api,
        pool: Tensor,
        *,
        seed: int,
        budget: int | None,
        labels: Labels,
        progress: Progress | None,
        needs: Needs = "labels",
        repeats: bool = False,
    ) -> None:
        _check_pool(pool, repeats)
        if labels not in ("soft", "top1"):
            raise ValueError(f'labels must be "soft" or "top1", got labels={labels!r}')
        _check_budget(budget, len(pool), repeats)
        check_settings(epochs=1, seed=seed)
        self.pool, self.seed, self.labels, self.progress = pool, seed, labels, progress
        self.budget = len(pool) if budget is None else budget
        self.generator = torch.Generator().manual_seed(seed)
        self._api, self._needs = api, needs
        self._record: list[tuple[Tensor, Tensor, Tensor]] = []
        self._asked = 0

    @property
    def left(self) -> int:
        """Queries that may still be asked."""
        return self.budget - self._asked

    def draw(self, count: int) -> Tensor:
        """Rows of the pool, int64 [count], at random and without repetition."""
        return torch.randperm(len(self.pool), generator=self.generator)[:count].to(self.pool.device)

    def ask(self, queries: Tensor, indices: Tensor) -> Tensor:
        """The answers to `queries` [n, ...], made from the pool's rows `indices` [n] (-1: from none), as they
        come: probabilities float32 [n, C] or labels int64 [n].

        Raises:
            TypeError, ValueError: as ``honeytrace.extraction.ask``; also where the attack needs probabilities
                and the API gives labels only.
        """
        if len(queries) > self.left:
            raise AssertionError(
                f"the attack asks {len(queries)} queries, {self.left} are left in its budget"
            )
        answers = ask(self._checked_api, queries, progress=self.progress)
        if self._record and answers.shape[1:] != self._record[0][1].shape[1:]:
            raise ValueError(
                f"api changed the shape of its answers on the way: after {list(self._record[0][1].shape)} "
                f"came {list(answers.shape)}"
            )
        self._record.append((queries, answers, indices))
        self._asked += len(queries)
        return answers

    def ask_at_random(self) -> tuple[Tensor, Tensor]:
        """Spend the whole budget on inputs drawn at random from the pool: (queries, what to learn)."""
        rows = self.draw(self.budget)
        return self.pool[rows], self.learnable(self.ask(self.pool[rows], rows))

    def learnable(self, answers: Tensor) -> Tensor:
        """What a copy learns from answers: labels int64 [n], or probabilities float32 [n, C] (sum 1)."""
        if answers.dim() == 1:
            return answers
        if self.labels == "top1":
            return answers.argmax(1)
        return answers / answers.sum(1, keepdim=True)  # rounded answers need not sum to 1 by themselves

    def asked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Everything so far: queries [n, ...], answers, indices [n]."""
        queries, answers, indices = zip(*self._record, strict=True)
        return torch.cat(queries), torch.cat(answers), torch.cat(indices)

    def extraction(
        self,
        surrogate: nn.Module,
        history: History,
        *,
        targets: Tensor | None = None,
        kept: Tensor | None = None,
        suspected: Tensor | None = None,
    ) -> Extraction:
        """The copy with the record.

        Args:
            targets: what was learned about the kept rows. Default: what is `learnable` from their answers.
            kept: rows that were learned. Default: all.
            suspected: rows thought to be bent. Default: none.
        """
        queries, answers, indices = self.asked()
        if kept is None:
            kept = torch.arange(len(queries), device=queries.device)
        if targets is None:
            targets = self.learnable(answers[kept])
        if suspected is None:
            suspected = kept[:0]
        return Extraction(surrogate, queries, answers, indices, kept, targets, suspected, history)

    def _checked_api(self, inputs: Tensor) -> Tensor:
        """The API, refused at its first answer where it gives less than the attack needs."""
        answers = checked(self._api(inputs), len(inputs))
        if answers.dim() == 1:
            if self._needs == "scores":
                raise ValueError(
                    "this attack works on scores: it needs an api that gives probabilities [B, C]; this one "
                    "gives labels [B]"
                )
            if self.labels == "soft":
                raise ValueError(
                    'labels="soft" needs an api that gives probabilities [B, C]; this one gives labels [B]'
                )
        return answers


def _check_pool(pool: Tensor, changes: bool) -> None:
    if not isinstance(pool, Tensor):
        raise TypeError(f"pool must be a tensor, got {type(pool).__name__}")
    tokens = pool.dtype == torch.int64 and pool.dim() == 2
    if tokens and changes:
        raise ValueError("pool must be floating point: this attack changes inputs, and got token ids")
    if pool.dim() < 2 or len(pool) == 0 or not (pool.is_floating_point() or tokens):
        raise ValueError(
            "pool must be floating point [N, ...] or token ids int64 [N, T] with N >= 1, "
            f"got {pool.dtype} {list(pool.shape)}"
        )


def _check_budget(budget: int | None, size: int, repeats: bool) -> None:
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"budget must be an int or None, got {type(budget).__name__}")
    if budget < 1 or (budget > size and not repeats):
        raise ValueError(
            f"budget must be at least 1, got budget={budget}"
            if repeats
            else f"budget must be between 1 and the size of the pool N={size}, got budget={budget}"
        )
