"""What a suspect answered, made safe to score.

A suspect is a stranger's program: it may answer NaN, infinities, negative "probabilities" or rows that do not
sum to one. Each such answer is replaced by a fixed rule that never looks at a target, so the tests of this
package stay exact whatever a suspect does (a rule that depended on the target would let the verifier choose
the outcome). A wrong *shape* is no answer at all and raises.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

AnswerKind = Literal["scores", "labels"]
ScoreKind = Literal["auto", "probabilities", "logits"]

NO_LABEL = -1
"""Stands for an answer that names no class; it is a hit for nobody."""

# Answers rounded to two digits over many classes still sum to one within this.
_SUM_SLACK = 0.02


def clean_scores(scores: npt.ArrayLike, *, num_classes: int, scores_are: ScoreKind = "auto") -> FloatArray:
    """The suspect's answers as probabilities: finite, not negative, each row summing to one.

    Args:
        scores: [n, C] real numbers.
        num_classes: C.
        scores_are: "probabilities", "logits" (log-probabilities are logits too), or "auto": probabilities
            when at least half of the rows have all entries in [0, 1] and a sum in (0, 1.02], logits
            otherwise.

    Returns:
        [n, C] float64. Rows are repaired one by one, for no target in particular:

        ================================  ==========================================================
        a row with                        becomes
        ================================  ==========================================================
        any NaN                           uniform
        +inf entries                      all weight shared equally by them
        negative entries (probabilities)  0 in their place, then divided by the sum
        a sum other than 1                divided by the sum
        nothing left (all 0 or -inf)      uniform
        ================================  ==========================================================

    Raises:
        ValueError: the shape is not [n, C], or scores_are is none of the three words.
        TypeError: the entries are not real numbers.
    """
    if scores_are not in ("auto", "probabilities", "logits"):
        raise ValueError(f"scores_are must be 'auto', 'probabilities' or 'logits', got {scores_are!r}")
    rows = _real_array(scores, "scores")
    if rows.ndim != 2 or rows.shape[1] != num_classes:
        raise ValueError(f"scores must have shape [n, C] with C={num_classes}, got {list(rows.shape)}")
    if rows.shape[0] == 0:
        return rows
    if scores_are == "auto":
        scores_are = "probabilities" if _look_like_probabilities(rows) else "logits"

    lost = np.isnan(rows).any(axis=1)
    infinite: npt.NDArray[np.bool_] = np.asarray(np.isposinf(rows))
    if scores_are == "probabilities":
        weights = np.clip(np.where(np.isfinite(rows), rows, 0.0), 0.0, None)
        top = weights.max(axis=1, keepdims=True)
        weights = weights / np.where(top > 0, top, 1.0)  # the sum of huge entries would overflow
    else:
        finite = np.where(np.isfinite(rows), rows, -np.inf)
        top = finite.max(axis=1, keepdims=True)
        # Halves, for the difference of two entries near the largest double would overflow.
        half = finite / 2 - np.where(np.isfinite(top), top, 0.0) / 2
        weights = np.exp(2 * np.maximum(half, -1e4))
        weights[np.isneginf(finite)] = 0.0
    weights = np.where(infinite.any(axis=1, keepdims=True), infinite.astype(np.float64), weights)
    weights[lost] = 0.0
    sums = weights.sum(axis=1, keepdims=True)
    uniform = np.full_like(weights, 1.0 / num_classes)
    result: FloatArray = np.where(sums > 0, weights / np.where(sums > 0, sums, 1.0), uniform)
    return result


def clean_labels(labels: npt.ArrayLike, *, num_classes: int) -> IntArray:
    """The suspect's top-1 answers as class numbers.

    Args:
        labels: [n] numbers. Whole numbers in [0, C) are classes; anything else (NaN, infinite, out of range,
            broken numbers) becomes NO_LABEL and is a hit for nobody.
        num_classes: C.

    Returns:
        [n] int64.

    Raises:
        ValueError: the shape is not [n].
        TypeError: the entries are not real numbers.
    """
    raw = np.asarray(labels)
    if raw.ndim != 1:
        raise ValueError(f"labels must have shape [n], got {list(raw.shape)}")
    values = _real_array(raw, "labels")
    known = np.isfinite(values) & (values >= 0) & (values < num_classes) & (values == np.floor(values))
    return np.where(known, np.where(known, values, 0.0), NO_LABEL).astype(np.int64)


def top_labels(probabilities: FloatArray) -> IntArray:
    """[n] int64: the most probable class of each row of [n, C]; NO_LABEL where the maximum is shared.

    Taking the first of several maxima would favour low class numbers, and a suspect that answers uniform rows
    would be counted as one that always says class 0. Harmless for exactness, misleading to a reader.
    """
    top = probabilities.max(axis=1, keepdims=True)
    shared = (probabilities == top).sum(axis=1) > 1
    return np.where(shared, NO_LABEL, probabilities.argmax(axis=1)).astype(np.int64)


def _look_like_probabilities(rows: FloatArray) -> bool:
    with np.errstate(invalid="ignore", over="ignore"):
        inside: npt.NDArray[np.bool_] = np.asarray(((rows >= 0) & (rows <= 1)).all(axis=1))
        sums = np.where(inside[:, None], rows, 0.0).sum(axis=1)
    return bool(2 * (inside & (sums > 0) & (sums <= 1 + _SUM_SLACK)).sum() >= len(rows))


def _real_array(values: npt.ArrayLike, name: str) -> FloatArray:
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be real numbers, got dtype {array.dtype}")
    return array.astype(np.float64)
