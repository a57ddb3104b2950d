"""How long single questions take, and whether that tells two kinds of them apart: for tests and benches."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
from scipy.stats import mannwhitneyu


def times_of(
    ask: Callable[[int], object],
    queries: int,
    repeats: int,
    *,
    prepare: Callable[[int], object] = lambda query: None,
    seed: int = 0,
) -> np.ndarray:
    """Seconds of ask(query) [queries, repeats]; each round goes over all queries in an order of its own.
    `prepare` is called before each question and is not timed."""
    order = random.Random(seed)
    times = np.zeros((queries, repeats))
    for repeat in range(repeats):
        for query in order.sample(range(queries), queries):
            prepare(query)
            start = time.perf_counter()
            ask(query)
            times[query, repeat] = time.perf_counter() - start
    return times


def one_place(*rows: np.ndarray) -> tuple[list[np.ndarray], Callable[[int], None]]:
    """A batch of one, and what puts row `query` of each of `rows` there. Where a row lies in memory can take
    longer, too, than a row beside it."""
    place = [np.empty_like(part[:1]) for part in rows]

    def put(query: int) -> None:
        for one, part in zip(place, rows, strict=True):
            one[0] = part[query]

    return place, put


def chance_longer(one: np.ndarray, other: np.ndarray) -> float:
    """P(one of the first takes longer than one of the second), ties half: the area under the ROC curve."""
    return float(mannwhitneyu(one, other).statistic / (len(one) * len(other)))
