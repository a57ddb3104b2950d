"""From scores to weights on the candidates, and from weights to an e-value.

A calibrator maps the K scores of a group to K weights that sum to one, treating all candidates alike. The group's
e-value is e_g = K * weight of the target. If the target is a uniform draw independent of the scores,
E[e_g | scores] = sum over c of (1/K) * K * w_c = 1, whatever the scores are: exact, no assumption about suspects.

Sources: DESIGN "Ownership"; Vovk and Wang, "E-values: calibration, combination and applications" (2021), for
products of e-values; Shafer, "Testing by betting" (2021), for reading w as a bet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from honeytrace.ownership.answers import FloatArray


class Calibrator(Protocol):
    """A fixed rule from scores to weights, chosen before any answer is seen."""

    def weights(self, scores: npt.ArrayLike, *, scale_floor: float = 0.0) -> FloatArray:
        """[..., K] scores -> [..., K] weights: positive, summing to one, moved along when candidates are permuted."""
        ...


@dataclass(frozen=True, kw_only=True)
class SoftmaxCalibrator:
    """w = share / K + (1 - share) * mean over lambda of softmax(lambda * z), z the standardised scores.

    z = (f - mean f) / sqrt(var f + scale_floor^2) over the group's candidates: no unit, no parameter to fit, and
    bounded (an outlier among K has z <= (K - 1) / sqrt(K), 2.5 for 8 candidates), so one wild score cannot buy the
    whole weight. scale_floor keeps groups in which nothing moved from being blown up into a bet on noise; equal
    scores get equal weights, so a silent group has e = 1 and costs nothing.

    Attributes:
        lambdas: strengths of the bet, mixed in equal parts. For scores with normal noise and a target shifted by
            lambda standard deviations softmax(lambda z) is the likelihood ratio, so the grid is a set of guesses at
            the mark's strength.
        uniform_share: part of the weight given to all candidates alike. A group that fails completely costs at most
            the factor 1 / uniform_share, and e_g <= K.

    The defaults come from the table in tests/test_ownership_power.py: rates of a claim at 1e-3, targets ranked first
    in 90% of the sound groups (a shift of 4 noise units) and a third of the groups failed.
    """

    lambdas: tuple[float, ...] = (1.0, 2.0, 4.0)
    uniform_share: float = 0.1

    def __post_init__(self) -> None:
        if not self.lambdas or not all(math.isfinite(x) and x > 0 for x in self.lambdas):
            raise ValueError(f"lambdas must be positive finite numbers, at least one, got {self.lambdas}")
        _check_share(self.uniform_share)

    def weights(self, scores: npt.ArrayLike, *, scale_floor: float = 0.0) -> FloatArray:
        """[..., K] finite scores -> [..., K] weights. Raises ValueError for non-finite scores or K = 0."""
        f = _check_scores(scores)
        if not (math.isfinite(scale_floor) and scale_floor >= 0):
            raise ValueError(f"scale_floor must be finite and not negative, got {scale_floor}")
        size = np.maximum(np.abs(f).max(axis=-1, keepdims=True), 1.0)  # squares of huge scores would overflow
        f = f / size
        centred = f - f.mean(axis=-1, keepdims=True)
        # The mean of equal numbers need not be that number in floating point: rounding is not evidence.
        centred = np.where(np.ptp(f, axis=-1, keepdims=True) > 0, centred, 0.0)
        scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + (scale_floor / size) ** 2)
        z = centred / np.where(scale > 0, scale, 1.0)
        powers = np.asarray(self.lambdas)[(slice(None), *([None] * z.ndim))] * z
        bets = np.exp(powers - powers.max(axis=-1, keepdims=True))
        bets = (bets / bets.sum(axis=-1, keepdims=True)).mean(axis=0)
        return _mix_uniform(bets, self.uniform_share)


@dataclass(frozen=True, kw_only=True)
class RankCalibrator:
    """w depends on the rank alone: share / K + (1 - share) * decay^(rank - 1), normalised; ties share equally.

    The alternative to SoftmaxCalibrator. It cannot tell a narrow second place from a far one, and in the simulation
    it claims less often whenever some groups fail; it is better only for scores with very heavy tails.

    Attributes:
        decay: in (0, 1), weight of a rank relative to the rank before it.
        uniform_share: as in SoftmaxCalibrator.
    """

    decay: float = 0.3
    uniform_share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must be between 0 and 1, got {self.decay}")
        _check_share(self.uniform_share)

    def weights(self, scores: npt.ArrayLike, *, scale_floor: float = 0.0) -> FloatArray:
        """[..., K] finite scores -> [..., K] weights. scale_floor is not used: ranks have no scale."""
        f = _check_scores(scores)
        size = f.shape[-1]
        ladder = self.decay ** np.arange(size, dtype=np.float64)
        ladder = np.concatenate([[0.0], np.cumsum(ladder / ladder.sum())])
        above = (f[..., None, :] > f[..., :, None]).sum(axis=-1)
        tied = (f[..., None, :] == f[..., :, None]).sum(axis=-1)
        # Candidates tied on the ranks above+1 .. above+tied share what these ranks hold together.
        return _mix_uniform((ladder[above + tied] - ladder[above]) / tied, self.uniform_share)


DEFAULT_CALIBRATOR = SoftmaxCalibrator()
"""The calibrator of `verify`. Fixed here, before any suspect: it is part of the pre-declared rule."""


def e_values(weights: npt.ArrayLike) -> FloatArray:
    """[..., K] weights -> [..., K]: what the group's e-value would be for each candidate as the target, K * w."""
    w = np.asarray(weights, dtype=np.float64)
    return np.asarray(w * w.shape[-1], dtype=np.float64)


def _mix_uniform(bets: FloatArray, share: float) -> FloatArray:
    mixed = share / bets.shape[-1] + (1 - share) * bets
    return np.asarray(mixed / mixed.sum(axis=-1, keepdims=True), dtype=np.float64)


def _check_scores(scores: npt.ArrayLike) -> FloatArray:
    f = np.asarray(scores, dtype=np.float64)
    if f.ndim == 0 or f.shape[-1] == 0:
        raise ValueError(f"scores must have shape [..., K] with K >= 1, got {list(f.shape)}")
    if not np.isfinite(f).all():
        raise ValueError("scores must be finite; answers are repaired before they are scored")
    return f


def _check_share(share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"uniform_share must be above 0 and at most 1, got {share}")
