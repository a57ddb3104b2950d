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


# Distances against float64, D <= 200. Worst seen, relative: l1 and l2 2.3e-7, lp 3.0e-7 (its root adds
# error), cosine 2.5e-7. The absolute part is for distances at or near 0; worst seen for cosine 2.3e-7 at
# distances near 1.
DISTANCE = {
    "l1": Tolerance(1e-6, 1e-9),
    "l2": Tolerance(1e-6, 1e-9),
    "lp": Tolerance(1.2e-6, 1e-9),
    "cosine": Tolerance(1e-6, 1e-7),
}

# Rows at 1e-3 of their norm from the query: differences of near float32 numbers are exact, so l1, l2 and lp
# keep the relative error of the sum (worst seen 2.4e-7, lp 3.0e-7). Cosine divides by the norms first and
# rounds: worst seen 6.1e-6. (The expanded form 1 - q.b / (|q| |b|) errs by up to 37% here, and by all of it
# for nearer rows.)
NEAR_DISTANCE = {
    "l1": Tolerance(1e-6, 0.0),
    "l2": Tolerance(1e-6, 0.0),
    "lp": Tolerance(1.2e-6, 0.0),
    "cosine": Tolerance(3e-5, 0.0),
}

# Similarity is an offset less a distance, so its error is absolute: worst seen 4.2e-7 for distances near 1.5.
SIMILARITY = Tolerance(0.0, 1.7e-6)

# Mixed logits given equal similarities, against float64, for logits up to 15 and C <= 257: worst seen 1.7e-6.
# float16 and bfloat16: one rounding unit, for the last rounding may fall to the other side; half a unit is
# seen.
MIXED = {
    torch.float32: Tolerance(1e-6, 4e-6),
    torch.float16: Tolerance(2.0**-10, 2.0**-14),
    torch.bfloat16: Tolerance(2.0**-7, 2.0**-11),
}

# Gradients of the ops (float32) against autograd through the float64 reference: worst seen 3.1e-6 for
# gradients near 10, and 8% of this limit.
GRADIENT = Tolerance(1e-5, 1e-6)

# The published code's outputs (float32 throughout), as the design page demands.
GOLDEN = Tolerance(1e-5, 1e-6)

# Their mixed logits: (1 - w) z + w r can cancel, and there 1e-5 relative is beyond float32: the recorded
# logits lie up to 4e-3 (relative) and 2.9e-6 (absolute) from the float64 result, ours 5e-3 and 2.9e-6, and
# 5.7e-6 from each other, in rows whose largest logit is about 20. Hence the absolute part, 5e-7 of that
# largest logit.
GOLDEN_MIXED = Tolerance(1e-5, 1e-5)

PROBABILITY_SUM = 1e-6
"""How far the probabilities of an answer may miss 1: torch.softmax of C <= 1000 float32 logits from 1 to 1e30
in size, worst seen 2.4e-7."""


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
