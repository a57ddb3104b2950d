"""Rows chosen by scores first: distances and rows are those of the tiles, bit for bit, whatever the data.
Each test also asserts whether scores have decided."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

_C = pytest.importorskip("honeytrace._C", reason="this installation has no compiled core")

import core_calls as core  # noqa: E402

METRICS = ["l1", "l2", "cosine"]
LARGEST = np.finfo(np.float32).max


@pytest.fixture(params=_C.simd_levels(), autouse=True)
def _level(request):
    before = _C.simd_level()
    _C.set_simd_level(request.param)
    yield
    _C.set_simd_level(before)


@contextlib.contextmanager
def preselection(when):
    _C._set_preselection(when)
    before = _C._preselected()
    decided = []
    try:
        yield decided
    finally:
        decided.append(_C._preselected() - before)
        _C._set_preselection("auto")


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def same_both_ways(metric, features, rows, k):
    """How many queries scores have decided; fails unless distances and rows are the same without them."""
    bank = core.pack(rows)
    with preselection("always") as decided:
        distance, index = core.feature_distance(features, bank, k=k, metric=metric)
    with preselection("never") as not_asked:
        expected, expected_index = core.feature_distance(features, bank, k=k, metric=metric)
    assert not_asked == [0]
    np.testing.assert_array_equal(distance.view(np.int32), expected.view(np.int32))
    np.testing.assert_array_equal(index, expected_index)
    return decided[0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("batch", "groups", "size", "width", "k"),
    [
        (4, 1, 8, 1, 1),
        (5, 1, 80, 3, 10),
        (7, 2, 81, 16, 10),
        (64, 1, 500, 17, 10),
        (65, 3, 129, 255, 3),
        (130, 1, 300, 256, 10),
        (67, 1, 200, 257, 1),
        (33, 1, 513, 515, 64),
        (9, 1, 100, 1030, 5),
    ],
)
def test_every_size(rng, metric, batch, groups, size, width, k):
    decided = same_both_ways(metric, normal(rng, batch, width), normal(rng, groups, size, width), k)
    rest = batch % 64  # a block of less than four is not asked
    asked = batch - (rest if rest < 4 else 0)
    # On a line cosine knows two distances, and whole lists tie.
    assert decided == asked * groups or (width == 1 and metric == "cosine")


@pytest.mark.parametrize("metric", METRICS)
def test_half_types(rng, metric):
    features, rows = normal(rng, 20, 64).astype(np.float16), normal(rng, 1, 100, 64)
    assert same_both_ways(metric, features, rows, 10) == 20


@pytest.mark.parametrize("metric", METRICS)
def test_where_it_is_not_worth_while(rng, metric):
    """Three queries, or a k-th part of the rows too large: nobody asks for scores."""
    assert same_both_ways(metric, normal(rng, 3, 32), normal(rng, 1, 100, 32), 10) == 0
    assert same_both_ways(metric, normal(rng, 9, 32), normal(rng, 1, 79, 32), 10) == 0


@pytest.mark.parametrize("metric", METRICS)
def test_queries_that_are_rows_and_rows_that_are_equal(rng, metric):
    rows = normal(rng, 1, 200, 48)
    rows[0, 100:150] = rows[0, :50]  # pairs: ties at every place of the order
    features = np.concatenate([rows[0, :20], rows[0, :20] * np.float32(1.0 + 2.0**-20), normal(rng, 10, 48)])
    assert same_both_ways(metric, features, rows, 10) == 50
    for k in (1, 2, 3):
        assert same_both_ways(metric, features, rows, k) == 50


@pytest.mark.parametrize("metric", METRICS)
def test_all_rows_equal(rng, metric):
    """Every row may be among the nearest: scores give up, and the tiles find the first k."""
    rows = np.repeat(normal(rng, 1, 1, 32), 400, axis=1)
    assert same_both_ways(metric, normal(rng, 8, 32), rows, 10) == 0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("offset", [3.0, 1e2, 1e4])
def test_small_differences_of_large_features(rng, metric, offset):
    """What the scores cancel: differences of a hundredth, a ten-thousandth, and less, of the norm."""
    rows = normal(rng, 1, 300, 64) + np.float32(offset)
    features = normal(rng, 12, 64) + np.float32(offset)
    decided = same_both_ways(metric, features, rows, 10)
    assert decided == (12 if offset == 3.0 else 0 if offset == 1e4 else decided)


@pytest.mark.parametrize("metric", METRICS)
def test_rows_at_a_thousandth_of_their_norm(rng, metric):
    features = normal(rng, 16, 128)
    rows = normal(rng, 1, 400, 128)
    rows[0, 50:66] = features + 1e-3 * normal(rng, 16, 128)
    assert same_both_ways(metric, features, rows, 10) == 16


@pytest.mark.parametrize("metric", METRICS)
def test_rows_that_come_nearer_and_nearer(rng, metric):
    """Each row is a candidate when it is offered, so lists fill and are gone through again and again."""
    features, direction = normal(rng, 8, 40), normal(rng, 40)
    away = np.linspace(30.0, 1.0, 600, dtype=np.float32)[:, None]
    rows = (features.mean(0) + away * direction + 0.3 * normal(rng, 600, 40))[None]
    assert same_both_ways(metric, features, rows, 5) == 8


@pytest.mark.parametrize("metric", METRICS)
def test_nearest_rows_just_beyond_rounding(rng, metric):
    """Distances one unit in the last place apart, many at the k-th: more candidates than rows asked for."""
    features = np.zeros((4, 64), np.float32)
    features[:, 0] = 1.0
    rows = np.zeros((1, 160, 64), np.float32)
    rows[0, :, 0] = 2.0
    rows[0, :, 1] = 1.0 + np.arange(160) * np.float32(2.0**-23)
    rows[0, 40:] += 5.0 * normal(rng, 120, 64)
    rows[0] = rows[0][rng.permutation(160)]
    assert same_both_ways(metric, features, rows, 10) == 4


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-8, 1e12, 1e18, 1e30, 1e38])
def test_every_range(rng, metric, scale):
    features, rows = normal(rng, 6, 24), normal(rng, 1, 100, 24)
    features, rows = (
        np.clip(x.astype(np.float64) * scale, -LARGEST, LARGEST).astype(np.float32) for x in (features, rows)
    )
    decided = same_both_ways(metric, features, rows, 5)
    assert decided == 6 or scale not in (1e-8, 1e12)


@pytest.mark.parametrize("metric", ["l1", "l2"])
@pytest.mark.parametrize("flush", [False, True])
def test_features_whose_squares_vanish(rng, metric, flush):
    """A margin from norms that underflow has taken away would prove too much: nobody asks for scores."""
    torch = pytest.importorskip("torch")
    features, rows = (normal(rng, *shape) * np.float32(2.0**-64) for shape in ((8, 512), (1, 100, 512)))
    if flush and not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        assert same_both_ways(metric, features, rows, 5) == 0
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("metric", METRICS)
def test_queries_of_every_kind_in_one_block(rng, metric):
    """Ordinary ones, zeros, NaN, infinite, huge, tiny: each is what it is alone."""
    features, rows = normal(rng, 20, 32), normal(rng, 1, 100, 32)
    features[3] = 0.0
    features[5, 7] = np.nan
    features[8, 1] = np.inf
    features[9] *= np.float32(1e35)
    features[14] *= np.float32(1e-35)
    decided = same_both_ways(metric, features, rows, 5)
    assert 15 <= decided <= 20
    rows[0, 17] = 0.0  # a norm that cosine cannot divide by
    assert same_both_ways(metric, features, rows, 5) == (0 if metric == "cosine" else decided)


@pytest.mark.parametrize("metric", METRICS)
def test_queries_that_change_places(rng, metric):
    """Those that scores cannot take go first, the others lie in any order; each gets its own distance.

    Found by fuzzing: four in a list, the first and the last of them three apart, were taken for neighbours.
    """
    rows = normal(rng, 1, 100, 8)
    for _ in range(40):
        features = normal(rng, 64, 8)
        features[rng.random(64) < 0.3] *= np.float32(1e-30)
        features[rng.random(64) < 0.1] *= np.float32(1e35)
        decided = same_both_ways(metric, features, rows, 5)
        assert 0 < decided <= 64


@pytest.mark.parametrize("metric", METRICS)
def test_watermark_says_the_same(rng, metric):
    """Offsets in the midst of the distances: some queries are proven far, some are looked at and go on."""
    features, rows = normal(rng, 70, 200), normal(rng, 2, 150, 200)
    bank = core.pack(rows)
    middle = float(np.median(core.feature_distance(features, bank, k=5, metric=metric)[0]))
    args = features, normal(rng, 70, 10), bank, normal(rng, 2, 10), normal(rng, 16, 200)
    answers = {}
    for when in ("always", "never"):
        _C._forget_bounds()
        with preselection(when) as decided:
            answers[when] = core.watermark(*args, k=5, metric=metric, offset=middle, scale=0.1)
        assert (decided[0] > 0) == (when == "always")
    similarity, mixed = answers["always"]
    np.testing.assert_array_equal(similarity, answers["never"][0])
    for ours, theirs in zip(mixed, answers["never"][1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert 0.1 < (answers["never"][0] > 0).mean() < 0.9


def test_the_choice_is_made_once_and_refuses_other_words():
    assert [_C._preselection_pays(code) for code in range(4)] == [
        _C._preselection_pays(code) for code in range(4)
    ]
    assert not _C._preselection_pays(2)  # lp has no scores
    with pytest.raises(ValueError, match="'auto', 'never' or 'always', got 'perhaps'"):
        _C._set_preselection("perhaps")
