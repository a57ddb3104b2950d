"""How long single questions take, and whether that tells two kinds of them apart: for tests and benches."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
from scipy.stats import mannwhitneyu


def times_of(ask: Callable[[int], object], queries: int, repeats: int, *, seed: int = 0) -> np.ndarray:
    """Seconds of ask(query) [queries, repeats]; each round goes over all queries in an order of its own."""
    order = random.Random(seed)
    times = np.zeros((queries, repeats))
    for repeat in range(repeats):
        for query in order.sample(range(queries), queries):
            start = time.perf_counter()
            ask(query)
            times[query, repeat] = time.perf_counter() - start
    return times


def from_one_place(function: Callable[..., object], *rows: np.ndarray) -> Callable[[int], object]:
    """ask(query): `function` of a batch of one, row `query` of each of `rows`, copied to one place in memory.

    Where a row lies can take longer, too, than a row beside it.
    """
    place = [np.empty_like(part[:1]) for part in rows]

    def ask(query: int) -> object:
        for one, part in zip(place, rows, strict=True):
            one[0] = part[query]
        return function(*place)

    return ask


def chance_longer(one: np.ndarray, other: np.ndarray) -> float:
    """P(one of the first takes longer than one of the second), ties half: the area under the ROC curve."""
    return float(mannwhitneyu(one, other).statistic / (len(one) * len(other)))
