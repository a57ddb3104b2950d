"""Exact tests with the targets' draw as the only source of chance.

Condition on everything the suspect says. Each target is then one of K_g candidates with equal probability,
independent of the answers and of the other targets, so the null distribution of *any* statistic of (answers,
targets) is a count, not an approximation. Source: DESIGN "Ownership"; this is a randomisation test in
Fisher's sense.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from honeytrace.ownership.answers import FloatArray, IntArray

LATTICE = 2.0**-9
"""Step of the grid on which log-weights are added up. The statistic is the rounded sum, for the target and
for its alternatives alike; so the grid costs no exactness, and 8 groups of 8 candidates (16.8 million
combinations) are counted in milliseconds."""


def target_rank(scores: npt.ArrayLike, target_index: int) -> int:
    """1 + how many *other* candidates score at least as high as the target. Ties go against the owner.

    Args:
        scores: [K].
        target_index: position of the target among the candidates.
    """
    f = np.asarray(scores, dtype=np.float64)
    _check_index(f, target_index)
    return int((f >= f[target_index]).sum())


def rank_p_value(scores: npt.ArrayLike, target_index: int) -> float:
    """Share of the candidates whose score is at least the target's: an exact p-value of one group.

    Proof that P(p <= t) <= t for every t, ties or not. Let r(c) = #{c': f(c') >= f(c)} and m = the largest
    value of r that is <= tK. Candidates with r(c) <= m all have f(c) >= the lowest score s among them, and a
    candidate that attains s has r = #{c': f(c') >= s} <= m; so at most m <= tK candidates have r <= tK, and a
    uniform target is among them with probability at most t. Without ties r takes the values 1..K once each:
    P(p <= j/K) = j/K.
    """
    f = np.asarray(scores, dtype=np.float64)
    return target_rank(f, target_index) / f.size


def lattice_steps(weights: npt.ArrayLike) -> IntArray:
    """[K] weights -> [K] int64 >= 0: log-weights in steps of LATTICE above the smallest; all w > 0."""
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 1 or w.size == 0 or not (np.isfinite(w).all() and (w > 0).all()):
        raise ValueError("weights must have shape [K] and be finite and above 0")
    steps = np.rint(np.log(w) / LATTICE).astype(np.int64)
    return np.asarray(steps - steps.min(), dtype=np.int64)


def add_group(distribution: FloatArray, steps: IntArray) -> FloatArray:
    """Distribution of (sum so far) + (one of `steps`, each with probability 1/K).

    Args:
        distribution: [S] float64, probability (possibly with stopped paths removed) of the sums 0..S-1.
        steps: [K] int64 >= 0.
    """
    values, counts = np.unique(steps, return_counts=True)
    total = np.zeros(len(distribution) + int(values[-1]))
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        total[value : value + len(distribution)] += distribution * (count / steps.size)
    return total


def upper_tail(distribution: FloatArray) -> FloatArray:
    """[S] -> [S]: probability of each sum or more."""
    return np.asarray(np.cumsum(distribution[::-1])[::-1], dtype=np.float64)


def exact_p_value(weights: Sequence[npt.ArrayLike], target_indices: Sequence[int]) -> float:
    """Fixed-sample p-value of all groups: P(sum of log-weights of uniform targets >= the sum observed).

    The statistic is the sum of the groups' calibrated log-weights, the logarithm of the e-value up to a
    constant, and not the sum of log rank p-values: where some groups fail it claims far more often (7 groups
    of 8 candidates, two of them failed: 0.83 against 0.47 to 0.61 at 1e-3), for a score says how far ahead or
    behind a target is. It is computed by convolving the groups' null distributions, so group sizes may
    differ. By Markov's inequality it is at most 1 / (product of the e-values), but for the rounding to
    LATTICE.

    Exact for given answers: conditionally on them all combinations of targets are equally likely, and P(p <=
    t) <= t for any discrete statistic. Equal sums count against the owner.

    Valid only when the number of groups was fixed beforehand: not after stopping early (see sequential.py).

    Args:
        weights: for each group [K_g], from a calibrator.
        target_indices: for each group, the target's position among the candidates.

    Raises:
        ValueError: no group, different lengths, an index out of range, weights not positive.
    """
    if len(weights) != len(target_indices) or not weights:
        raise ValueError(
            "weights and target_indices must have one entry a group, at least one, got "
            f"{len(weights)} and {len(target_indices)}"
        )
    distribution, observed = np.ones(1), 0
    for group_weights, index in zip(weights, target_indices, strict=True):
        steps = lattice_steps(group_weights)
        _check_index(steps, index)
        distribution = add_group(distribution, steps)
        observed += int(steps[index])
    return float(min(1.0, distribution[observed:].sum()))


def _check_index(values: npt.NDArray[np.generic], index: int) -> None:
    if values.ndim != 1 or not 0 <= index < values.size:
        raise ValueError(f"the target must be one of the K={values.size} candidates of its group")
