"""How far results may lie from their oracles, and where each figure comes from.

Worst errors were seen on an AMD EPYC (Zen 4, scalar, AVX2 and AVX-512 levels, torch 2.13 reference) over the
sizes of the tests that use them. A limit is about four times the worst error seen unless its line says
otherwise. Relative errors are relative to the oracle's value.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Tolerance(NamedTuple):
    """|actual - expected| <= absolute + relative * |expected|."""

    relative: float
    absolute: float


EPSILON = 2.0**-23
"""Distance of neighbouring float32 near 1."""

# Distances against float64. Sums of D <= 2048 float32 terms; worst seen 6e-7 (l1, l2), 9e-7 (lp, whose root
# adds error), 5e-7 (cosine). The absolute part is for distances near 0, where l1 of float32 inputs is exact
# anyway.
DISTANCE = {
    "l1": Tolerance(2e-6, 1e-9),
    "l2": Tolerance(2e-6, 1e-9),
    "lp": Tolerance(4e-6, 1e-9),
    "cosine": Tolerance(2e-6, 2e-7),
}

# Rows at 1e-3 of their norm from the query: the difference of float32 numbers is exact, so l1, l2 and lp keep
# the relative error of the sum. Cosine divides by norms rounded to float32 first: an angle of 1e-3 keeps
# about 2^-24 / 1e-3 of relative error in |u - v|, twice that in its square. (The expanded forms err by 100%
# here.)
NEAR_DISTANCE = {
    "l1": Tolerance(2e-6, 0.0),
    "l2": Tolerance(2e-6, 0.0),
    "lp": Tolerance(4e-6, 0.0),
    "cosine": Tolerance(5e-4, 0.0),
}

# Similarity is an offset less a distance: absolute, of the order of the distance's own error for distances
# near 1 and of float32 rounding of the offset.
SIMILARITY = Tolerance(2e-6, 2e-6)

# Mixed logits against the float64 reference given equal similarities, for logits up to 30: the sums of
# exponentials have C <= 1000 terms, and a logit of 30 has a rounding unit of 1.9e-6.
MIXED = {
    torch.float32: Tolerance(2e-6, 8e-6),
    torch.float16: Tolerance(2.0**-10, 2.0**-14),  # one rounding unit: rounding may fall to the other side
    torch.bfloat16: Tolerance(2.0**-7, 2.0**-11),
}

# Gradients of the ops (float32) against autograd through the float64 reference: the same formulas, more
# steps.
GRADIENT = Tolerance(1e-4, 1e-5)

# The published code's outputs (float32 throughout), as the design page demands.
GOLDEN = Tolerance(1e-5, 1e-6)

# Their mixed logits: (1 - w) z + w r can cancel, and there 1e-5 relative is beyond float32: the recorded
# logits lie up to 4e-3 (relative) and 2.9e-6 (absolute) from the float64 result, ours 5e-3 and 2.9e-6, and
# 5.7e-6 from each other, in rows whose largest logit is about 20. Hence the absolute part, 5e-7 of that
# largest logit.
GOLDEN_MIXED = Tolerance(1e-5, 1e-5)

PROBABILITY_SUM = 1e-5
"""How far the probabilities of an answer may miss 1: softmax of C <= 1000 float32 logits, worst seen 6e-7;
ten times that for logits of extreme range."""


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> None:
    """Fail with the worst element unless `actual` is within `tolerance` of `expected`, infinities equal."""
    a, e = actual.detach().double(), expected.detach().double()
    assert a.shape == e.shape, f"shape {list(a.shape)}, expected {list(e.shape)}"
    if a.numel() == 0:
        return
    error = torch.where(a == e, 0.0, (a - e).abs())  # inf - inf is NaN
    excess = error - tolerance.absolute - tolerance.relative * e.abs()
    excess = torch.where(torch.isnan(excess) & ~(torch.isnan(a) & torch.isnan(e)), math.inf, excess)
    worst = int(torch.nan_to_num(excess, nan=-math.inf, posinf=math.inf).argmax())
    assert not (excess > 0).any(), (
        f"got {a.flatten()[worst]:.9g}, expected {e.flatten()[worst]:.9g} at {worst}: "
        f"error {error.flatten()[worst]:.3g} beyond {tolerance}"
    )
