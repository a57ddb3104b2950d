"""How strongly a suspect leans to each candidate class of a trigger group.

Source: DESIGN "Ownership". Every score is a fixed function of (suspect's answers, owner's reference, class).
It is computed for *all* candidates alike and never told which one is the target; that, and the target's
uniform draw, is the whole reason why the tests built on it are exact.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from honeytrace.ownership.answers import FloatArray, IntArray, clean_labels, clean_scores

PROBABILITY_FLOOR = 1e-3
"""Added to both probabilities before the logarithm (eps).

Why 1e-3: (1) below a thousandth a classifier's probability says how it was trained, not what it learned about
a trigger, and log-ratios down there (1e-9 against 1e-6 is 6.9 nats) would drown the mark in noise; with the
floor they are 0.001 nats. (2) A graded mark lifts its target to 0.05-0.2, which the floor leaves at 3 to 5
nats. (3) An API that rounds to three digits gives the same scores to within the rounding. (4) Scores are
bounded by log(1 + 1/eps) = 6.9 nats, so that no single trigger decides a group. Exactness does not depend on
the value: any constant would do.
"""

SCORE_NOISE = 0.1
"""Nats. Score differences well below this are not worth a bet; see calibrator.py (scale_floor)."""


def score_probabilities(
    probabilities: npt.ArrayLike,
    reference_log_probs: npt.ArrayLike,
    candidates: npt.ArrayLike,
    *,
    floor: float = PROBABILITY_FLOOR,
) -> FloatArray:
    """f_g(c) = mean over the triggers of log(p_suspect(c) + floor) - log(p_reference(c) + floor).

    Args:
        probabilities: [n, C], the suspect's answers after clean_scores.
        reference_log_probs: [n, C], the owner's unmarked reference on the same triggers; -inf stands for 0.
        candidates: [K] class numbers.
        floor: eps > 0.

    Returns:
        [K] float64, in nats, in the order of the candidates.

    Raises:
        ValueError: shapes differ, n = 0, a candidate is no class, floor <= 0, or the reference has a NaN.
    """
    if not floor > 0:
        raise ValueError(f"floor must be above 0, got {floor}")
    suspect = np.asarray(probabilities, dtype=np.float64)
    reference = np.asarray(reference_log_probs, dtype=np.float64)
    classes = _check_shapes(suspect, reference, candidates)
    suspect, reference = suspect[:, classes], reference[:, classes]
    return np.asarray(
        (np.log(suspect + floor) - np.log(np.exp(reference) + floor)).mean(axis=0), dtype=np.float64
    )


def score_labels(
    labels: npt.ArrayLike, reference_labels: npt.ArrayLike, candidates: npt.ArrayLike, *, num_classes: int
) -> FloatArray:
    """f_g(c) = share of triggers the suspect calls c minus the share the reference calls c.

    Args:
        labels: [n], the suspect's top-1 classes; whatever is no class is a hit for nobody.
        reference_labels: [n], the top-1 classes of the owner's unmarked reference.
        candidates: [K] class numbers.
        num_classes: C.

    Returns:
        [K] float64 in [-1, 1], in the order of the candidates. Ties are the rule here, not the exception; the
        calibrator gives tied candidates equal weight.

    Raises:
        ValueError: shapes differ, n = 0, or a candidate is no class.
    """
    said = clean_labels(labels, num_classes=num_classes)
    expected = clean_labels(reference_labels, num_classes=num_classes)
    if said.shape != expected.shape or said.size == 0:
        raise ValueError(
            f"labels and reference_labels must have one shape [n] with n >= 1, got {list(said.shape)} and "
            f"{list(expected.shape)}"
        )
    classes = _check_candidates(candidates, num_classes)
    hits = (said[:, None] == classes).sum(axis=0) - (expected[:, None] == classes).sum(axis=0)
    # Whole numbers until the last step, so that equal counts are equal scores to the last bit.
    return np.asarray(hits / said.size, dtype=np.float64)


def _check_shapes(suspect: FloatArray, reference: FloatArray, candidates: npt.ArrayLike) -> IntArray:
    if suspect.ndim != 2 or suspect.shape != reference.shape or suspect.shape[0] == 0:
        raise ValueError(
            "probabilities and reference_log_probs must have one shape [n, C] with n >= 1, got "
            f"{list(suspect.shape)} and {list(reference.shape)}"
        )
    if np.isnan(reference).any():
        raise ValueError("reference_log_probs must have no NaN: it is the owner's own model that answered it")
    return _check_candidates(candidates, suspect.shape[1])


def _check_candidates(candidates: npt.ArrayLike, num_classes: int) -> IntArray:
    classes = np.asarray(candidates)
    if classes.ndim != 1 or classes.dtype.kind not in "iu" or len(np.unique(classes)) != classes.size:
        raise ValueError("candidates must be a list of distinct class numbers")
    if classes.size == 0 or classes.min() < 0 or classes.max() >= num_classes:
        raise ValueError(f"candidates must be classes in [0, C) with C={num_classes}")
    return classes.astype(np.int64)


__all__ = [
    "PROBABILITY_FLOOR",
    "SCORE_NOISE",
    "clean_labels",
    "clean_scores",
    "score_labels",
    "score_probabilities",
]
