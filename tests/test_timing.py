"""What the time of the watermark's step tells of the answer. The usual kernel computes a distance only where
it may matter, so that a bent answer takes longer; constant_time does the same work for every query.

Both are measured by one instrument, which the usual kernel shows to see something. The figures of a real
model, and over HTTP: bench/timing_of_answers.py and docs/serving.md.
"""

from __future__ import annotations

import numpy as np
import pytest
from timed import chance_longer, one_place, times_of

pytest.importorskip("honeytrace._C", reason="this installation has no compiled core")

from honeytrace import WatermarkRule
from honeytrace.numpy import Marker

QUERIES, REPEATS, TRIES = 60, 60, 4


def times_by(marker: Marker, features: np.ndarray, logits: np.ndarray, constant_time: bool) -> np.ndarray:
    """[queries, repeats], without the first ones."""
    place, put = one_place(features, logits)

    def ask(query: int) -> object:
        return marker.mark(*place, constant_time=constant_time)

    return times_of(ask, len(features), REPEATS, prepare=put)[:, 5:]


@pytest.mark.perf
@pytest.mark.parametrize("flip_bins", [0, 10])
def test_time_tells_bent_answers_from_others_only_without_constant_time(flip_bins):
    rng = np.random.default_rng(3)
    centres = 2 * rng.standard_normal((16, 1, 256))
    bank = (centres + 0.3 * rng.standard_normal((16, 32, 256))).astype(np.float32)
    near = centres[rng.integers(16, size=QUERIES), 0] + 0.3 * rng.standard_normal((QUERIES, 256))
    far = 2 * rng.standard_normal((QUERIES, 256))
    features = np.concatenate([near, far]).astype(np.float32)
    logits = (4 * rng.standard_normal((2 * QUERIES, 10))).astype(np.float32)
    rule = WatermarkRule(k=5, offset=0.9, scale=0.9, flip_bins=flip_bins, mixing_power=0.25, strength=0.2)
    targets = rng.standard_normal((16, 10)).astype(np.float32)
    marker = Marker(bank, targets, rng.standard_normal((16, 256)).astype(np.float32), rule=rule, seed=9)
    bent = marker.mark(features, logits).similarity.max(axis=1) > 0
    assert bent[:QUERIES].all()
    assert not bent[QUERIES:].any()

    # What one question tells. The median of a query's 55 times tells more, also of what is not the kernel's:
    # differences of a thousandth come and go, and two queries of one kind show them as well.
    for _ in range(TRIES):  # the instrument must see what there is to see: beside other work it does not
        usual = times_by(marker, features, logits, constant_time=False)
        seen = chance_longer(usual[bent].ravel(), usual[~bent].ravel())
        even = times_by(marker, features, logits, constant_time=True)
        if seen > 0.75:
            break
    assert seen > 0.75
    assert 0.45 < chance_longer(even[bent].ravel(), even[~bent].ravel()) < 0.55
    medians = np.median(even, axis=1)
    assert abs(np.median(medians[bent]) / np.median(medians[~bent]) - 1) < 0.01
