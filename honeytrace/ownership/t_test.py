"""The papers' t-test, as a figure to compare with. NOT a proof of anything.

Published schemes compare the probabilities a suspect and an innocent model give to the target class, query by
query, with a two-sample t-test (Neural Honeytrace, arXiv 2501.09328, among others). It treats the queries as
the sample. But queries to one suspect share that suspect: any small bias of an honest model towards the
target becomes "significant" with enough queries, and how much honest models differ from one another is
nowhere in it. So no claim rests on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from honeytrace.ownership.answers import FloatArray

MOST_QUERIES = 10**9
"""queries_to_significance looks no further."""


@dataclass(frozen=True)
class TTest:
    """Welch's one-sided two-sample t-test: does the suspect favour the target class over the reference?

    A comparison figure, not evidence; see the module's text.

    Attributes:
        suspect_mean, reference_mean: mean target probability, or share of target labels.
        statistic: t (infinite when neither side varies and the means differ).
        p_value: one-sided p-value, under assumptions that verification does not share.
        queries: pairs of answers compared.
        level: the level meant by queries_to_significance.
        queries_to_significance: smallest number of queries at which means and spreads like these give a
            p-value below the level; None when the suspect's mean is not the larger one.
    """

    suspect_mean: float
    reference_mean: float
    statistic: float
    p_value: float
    queries: int
    level: float
    queries_to_significance: int | None


def t_test(suspect: npt.ArrayLike, reference: npt.ArrayLike, *, level: float = 0.05) -> TTest:
    """Compare target probabilities query by query.

    Args:
        suspect: [n] probability (or 0/1 hit) of the target class in each of the suspect's answers.
        reference: [n] the same of an innocent model.
        level: significance level for queries_to_significance; the papers use 0.05.

    Raises:
        ValueError: shapes differ, n < 2, a value is not finite, or level is not in (0, 1).
    """
    x, y = np.asarray(suspect, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or x.size < 2:
        raise ValueError(
            "suspect and reference must have one shape [n] with n >= 2, got "
            f"{list(x.shape)} and {list(y.shape)}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("suspect and reference must be finite")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    difference = float(x.mean() - y.mean())
    if _spread(x) == 0 and _spread(y) == 0:
        statistic = math.inf * difference if difference else 0.0
        p_value = 0.5 if difference == 0 else float(difference < 0)
    else:
        moments = x.mean(), math.sqrt(_spread(x)), x.size, y.mean(), math.sqrt(_spread(y)), y.size
        result = stats.ttest_ind_from_stats(*moments, equal_var=False, alternative="greater")
        statistic, p_value = float(result.statistic), float(result.pvalue)
    return TTest(
        suspect_mean=float(x.mean()),
        reference_mean=float(y.mean()),
        statistic=statistic,
        p_value=p_value,
        queries=int(x.size),
        level=level,
        queries_to_significance=queries_to_significance(difference, _spread(x), _spread(y), level=level),
    )


def queries_to_significance(
    difference: float, suspect_variance: float, reference_variance: float, *, level: float = 0.05
) -> int | None:
    """Smallest n >= 2 at which Welch's test of n against n answers with these moments is below level.

    Returns:
        n, or None when the difference is not positive or n would be above MOST_QUERIES.
    """
    if not difference > 0:
        return None
    low, high = 2, 2
    while not _significant(high, difference, suspect_variance, reference_variance, level):
        low, high = high + 1, high * 2
        if high > MOST_QUERIES:
            return None
    while low < high:
        middle = (low + high) // 2
        if _significant(middle, difference, suspect_variance, reference_variance, level):
            high = middle
        else:
            low = middle + 1
    return high


def _significant(n: int, difference: float, a: float, b: float, level: float) -> bool:
    if a + b == 0:
        return True
    freedom = (n - 1) * (a + b) ** 2 / (a * a + b * b)
    return bool(stats.t.sf(difference / math.sqrt((a + b) / n), freedom) < level)


def _spread(values: FloatArray) -> float:
    # Equal numbers have variance 0; their floating-point mean need not equal them.
    return float(values.var(ddof=1)) if np.ptp(values) > 0 else 0.0
