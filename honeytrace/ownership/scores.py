"""How strongly a suspect leans to each candidate class of a trigger group.

Source: DESIGN "Ownership". Every score is a fixed function of (suspect's answers, owner's reference, class).
It is computed for *all* candidates alike and never told which one is the target; that, and the target's
uniform draw, is the whole reason why the tests built on it are exact.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from honeytrace.ownership.answers import FloatArray, IntArray, clean_labels, clean_scores

PROBABILITY_FLOOR = 1e-4
"""Added to both probabilities before the logarithm (eps).

Why 1e-4: (1) far below, a classifier's probability says how it was trained, not what it learned about a
trigger, and log-ratios down there (1e-9 against 1e-6 is 6.9 nats) would drown the mark in noise; with the
floor they are 0.01 nats. (2) A graded mark lifts its target to 0.05-0.2, and what a removal that makes the
copy sure of itself leaves of that is often below 0.001: with a floor of 1e-3 boundary repair and heavy
pruning hid it (docs/strength.md). (3) Scores are bounded by log(1 + 1/eps) = 9.2 nats, so that no single
trigger decides a group. Answers rounded to three digits are scored a little worse than with 1e-3. Exactness
does not depend on the value: any constant would do.
"""

FITTING_STEPS = 50
"""Of the mixture of references. What is left to gain after so many is far below SCORE_NOISE."""

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
        reference_log_probs: [n, C], the owner's unmarked reference on the same triggers, or [R, n, C] of
            several, of which `fitted_reference` is compared with; -inf stands for 0.
        candidates: [K] class numbers.
        floor: eps > 0.

    Returns:
        [K] float64, in nats, in the order of the candidates.

    Raises:
        ValueError: shapes differ, n = 0, a candidate is no class, floor <= 0, or the reference has a NaN.
    """
    return score_against(
        probabilities, fitted_reference(probabilities, reference_log_probs), candidates, floor=floor
    )


def score_against(
    probabilities: npt.ArrayLike,
    expected: npt.ArrayLike,
    candidates: npt.ArrayLike,
    *,
    floor: float = PROBABILITY_FLOOR,
) -> FloatArray:
    """`score_probabilities` with the reference fitted already: `expected` are its probabilities [n, C].

    Raises:
        ValueError: a candidate is no class, or floor <= 0.
    """
    if not floor > 0:
        raise ValueError(f"floor must be above 0, got {floor}")
    suspect = np.asarray(probabilities, dtype=np.float64)
    classes = _check_candidates(candidates, suspect.shape[-1])
    reference = np.asarray(expected, dtype=np.float64)[:, classes]
    return np.asarray(
        (np.log(suspect[:, classes] + floor) - np.log(reference + floor)).mean(axis=0), dtype=np.float64
    )


def fitted_reference(probabilities: npt.ArrayLike, reference_log_probs: npt.ArrayLike) -> FloatArray:
    """The mixture of unmarked references that a suspect's answers are nearest to.

    A removal changes a copy beside the mark: pruning leaves it unsure, boundary repair sure of itself, and
    every class moves with that. A reference that went the same way moved alike, so that what is left over is
    the mark. Which way a suspect went is read off all its answers to the group: the mixture's weights
    minimise the mean divergence KL(suspect || mixture) (expectation maximisation, Dempster, Laird & Rubin
    1977, FITTING_STEPS from equal weights). Targets have no part in it, so exactness is as with one.

    Args:
        probabilities: [n, C], the suspect's answers after clean_scores.
        reference_log_probs: [n, C] or [R, n, C]; -inf stands for 0.

    Returns:
        [n, C] float64, probabilities.

    Raises:
        ValueError: shapes differ, n or R = 0, or a reference has a NaN.
    """
    suspect = np.asarray(probabilities, dtype=np.float64)
    logarithms = np.asarray(reference_log_probs, dtype=np.float64)
    several = logarithms[None] if logarithms.ndim == 2 else logarithms
    if several.ndim != 3 or suspect.shape != several.shape[1:] or several.size == 0:
        raise ValueError(
            "probabilities and reference_log_probs must have one shape [n, C] with n >= 1 (or [R, n, C] for "
            f"R references), got {list(suspect.shape)} and {list(logarithms.shape)}"
        )
    if np.isnan(several).any():
        raise ValueError("reference_log_probs must have no NaN: it is the owner's own model that answered it")
    references = np.exp(several)
    weights = np.full(len(references), 1 / len(references))
    for _ in range(FITTING_STEPS if len(references) > 1 else 0):
        mixture = np.tensordot(weights, references, axes=1)
        share = np.divide(suspect, mixture, out=np.zeros_like(suspect), where=mixture > 0)
        weights = weights * (references * share).sum(axis=(1, 2))
        total = float(weights.sum())
        if not total > 0:  # no reference gives any probability to what the suspect says
            weights, total = np.ones(len(references)), float(len(references))
        weights = weights / total
    return np.asarray(np.tensordot(weights, references, axes=1), dtype=np.float64)


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
    "fitted_reference",
    "score_labels",
    "score_probabilities",
]
