"""From scores to weights on the candidates, and from weights to an e-value.

A calibrator maps the K scores of a group to K weights that sum to one, treating all candidates alike. The
group's e-value is e_g = K * weight of the target. If the target is a uniform draw independent of the scores,
E[e_g | scores] = sum over c of (1/K) * K * w_c = 1, whatever the scores are: exact, no assumption about
suspects.

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
        """[..., K] scores -> [..., K] weights: positive, summing to one, permuted with the candidates."""
        ...


@dataclass(frozen=True, kw_only=True)
class SoftmaxCalibrator:
    """w = share / K + (1 - share) * mean over lambda of softmax(lambda * z), z the standardised scores.

    z = (f - mean f) / sqrt(var f + scale_floor^2) over the group's candidates: no unit, no parameter to fit,
    and bounded (an outlier among K has z <= (K - 1) / sqrt(K), 2.5 for 8 candidates), so one wild score
    cannot buy the whole weight. scale_floor keeps groups in which nothing moved from being blown up into a
    bet on noise; equal scores get equal weights, so a silent group has e = 1 and costs nothing.

    Attributes:
        lambdas: strengths of the bet, mixed in equal parts. For scores with normal noise and a target shifted
            by lambda standard deviations softmax(lambda z) is the likelihood ratio, so the grid is a set of
            guesses at the mark's strength.
        uniform_share: part of the weight given to all candidates alike. A group that fails completely costs
            at most the factor 1 / uniform_share, and e_g <= K.

    The defaults come from simulated copies (tests/test_ownership_power.py prints the table): rate of claims
    at 1e-3 with 8 candidates, of 6 / 7 / 8 groups, two of them failed; the rules are those of sequential.py.

    ========================  ==================  ==================
    calibrator                exact               e-process
    ========================  ==================  ==================
    1, 2, 4; share 0.1        0.76  0.93  0.98    0.53  0.81  0.93
    1, 2, 4; share 0.05       0.76  0.93  0.97    0.55  0.81  0.93
    1, 2, 4; share 0.2        0.77  0.92  0.98    0.46  0.78  0.92
    1, 2, 4; share 0.3        0.77  0.92  0.97    0.35  0.71  0.90
    0.5, 1, 2, 4; share 0.1   0.76  0.92  0.97    0.41  0.76  0.91
    2; share 0.1              0.76  0.93  0.98    0.57  0.82  0.93
    4; share 0.1              0.76  0.91  0.97    0.53  0.74  0.87
    ranks, decay 0.3          0.65  0.82  0.94    0.39  0.69  0.84
    ranks, decay 0.5          0.61  0.81  0.92    0.20  0.49  0.72
    ========================  ==================  ==================

    The exact rule hardly minds lambda and share. For the e-process the grid around 2 is within 0.04 of the
    best single value, which nobody knows beforehand, and a share of 0.1 is worth 0.05 while a failed group
    costs half as much.
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
        scale = np.hypot(np.sqrt((centred**2).mean(axis=-1, keepdims=True)), scale_floor / size)
        z = centred / np.where(scale > 0, scale, 1.0)
        powers = np.asarray(self.lambdas).reshape(-1, *[1] * z.ndim) * z
        bets = np.exp(powers - powers.max(axis=-1, keepdims=True))
        bets = (bets / bets.sum(axis=-1, keepdims=True)).mean(axis=0)
        return _mix_uniform(bets, self.uniform_share)


@dataclass(frozen=True, kw_only=True)
class RankCalibrator:
    """w = share / K + (1 - share) * decay^(rank - 1) / sum of these; tied candidates share equally.

    The alternative to SoftmaxCalibrator. It cannot tell a narrow second place from a far one, and in the
    simulation it claims less often whenever some groups fail; it is better only for scores with very heavy
    tails.

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


def e_values(weights: npt.ArrayLike) -> FloatArray:
    """[..., K] weights -> [..., K]: K * w, the group's e-value for each candidate as the target."""
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


DEFAULT_CALIBRATOR = SoftmaxCalibrator()
"""The calibrator of `verify`. Fixed here, before any suspect: it is part of the pre-declared rule."""
