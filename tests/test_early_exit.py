"""`watermark` computes a distance only where it may matter. Its answers are those of the exhaustive kernel,
bit for bit, whatever the data; each test also asserts that the path it is about has run."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

_C = pytest.importorskip("honeytrace._C", reason="this installation has no compiled core")

import core_calls as core  # noqa: E402

METRICS = [("l1", 0.0), ("l2", 0.0), ("cosine", 0.0), ("lp", 1.5), ("lp", 3.0), ("lp", 7.3), ("lp", 40.0)]


@pytest.fixture(params=_C.simd_levels(), autouse=True)
def _level(request):
    before = _C.simd_level()
    _C.set_simd_level(request.param)
    _C._forget_bounds()
    yield
    _C.set_simd_level(before)


@contextlib.contextmanager
def exhaustive():
    _C._set_exhaustive(True)
    try:
        yield
    finally:
        _C._set_exhaustive(False)


class Decided(dict):
    """Queries decided without looking, by bounds, by computing, within the context."""

    def __enter__(self):
        self.before = _C._bounded_counts()
        return self

    def __exit__(self, *_):
        names = ("without_looking", "by_bounds", "finished")
        self.update(
            zip(names, (b - a for a, b in zip(self.before, _C._bounded_counts(), strict=True)), strict=True)
        )


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def similarity_both_ways(features, rows, **settings_):
    """similarity of the call as it is, checked against the exhaustive one, and how it was decided."""
    rng = np.random.default_rng(1)
    bank = core.pack(rows)
    classes = 5
    logits = settings_.pop("logits", None)
    if logits is None:
        logits = (3 * normal(rng, len(features), classes)).astype(np.float32)
    args = features, logits, bank, normal(rng, len(rows), classes), normal(rng, 8, rows.shape[2])
    _C._forget_bounds()
    with Decided() as decided:
        similarity, mixed = core.watermark(*args, **settings_)
    with exhaustive(), Decided() as not_asked:
        expected, expected_mixed = core.watermark(*args, **settings_)
    with Decided() as not_asked_either:
        even, even_mixed = core.watermark(*args, constant_time=True, **settings_)
    assert sum(not_asked.values()) == sum(not_asked_either.values()) == 0
    assert sum(decided.values()) == len(features) * len(rows)
    assert similarity.tobytes() == expected.tobytes() == even.tobytes()
    for name in core.Mixed._fields:
        assert getattr(mixed, name).tobytes() == getattr(expected_mixed, name).tobytes()
        assert getattr(even_mixed, name).tobytes() == getattr(expected_mixed, name).tobytes()
    return expected, decided


def distances(features, rows, **settings_):
    return core.feature_distance(features, core.pack(rows), **settings_)[0]


@pytest.mark.parametrize(("metric", "p"), METRICS)
@pytest.mark.parametrize("width", [40, 130, 300, 1100])
def test_far_queries_are_proven_far_by_some_of_their_features(metric, p, width):
    rng = np.random.default_rng(width)
    rows = (normal(rng, 1, 1, width) + 0.1 * normal(rng, 2, 45, width)).astype(np.float32)
    features = normal(rng, 70, width)
    features[::7] = rows[0, :10] + 0.05 * normal(rng, 10, width)
    reach = 0.3 * float(np.median(distances(features, rows, k=5, metric=metric, p=p)))
    similarity, decided = similarity_both_ways(
        features, rows, k=5, metric=metric, p=p, offset=reach, scale=reach
    )
    assert (similarity > 0).any()
    assert decided["finished"] >= (similarity > 0).sum()
    if p != 40.0:  # no bound is tried above p = 16
        assert decided["by_bounds"] >= 70


@pytest.mark.parametrize(("metric", "p"), METRICS[:5])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_offsets_at_the_very_distances(metric, p, k):
    """An offset that is one query's distance, the numbers next to it, and everything near."""
    rng = np.random.default_rng(k)
    rows, features = normal(rng, 1, 20, 70), normal(rng, 33, 70)
    exact = distances(features, rows, k=k, metric=metric, p=p)[:, 0]
    for at in (exact.min(), np.sort(exact)[5], exact.max()):
        for offset in (np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(np.inf))):
            similarity, _ = similarity_both_ways(
                features, rows, k=k, metric=metric, p=p, offset=float(offset), scale=1e-7
            )
            assert np.array_equal(similarity[:, 0] > 0, exact < offset)


@pytest.mark.parametrize(("metric", "p"), METRICS)
@pytest.mark.parametrize("k", [1, 4])
def test_the_first_look_sees_the_whole_distance(metric, p, k):
    """All differences lie in the features looked at first, and the offset within a unit of the distance: a
    bound that promises the least bit too much is wrong here."""
    rng = np.random.default_rng(7)
    rows, features = np.zeros((1, 20, 256), np.float32), np.zeros((40, 256), np.float32)
    rows[..., 40:72], features[:, 40:72] = normal(rng, 1, 20, 32), normal(rng, 40, 32)
    exact = distances(features, rows, k=k, metric=metric, p=p)[:, 0]
    for at in np.sort(exact)[::5]:
        for offset in (np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(np.inf)), at * 1.001):
            similarity, decided = similarity_both_ways(
                features, rows, k=k, metric=metric, p=p, offset=float(offset), scale=1e-7
            )
            assert np.array_equal(similarity[:, 0] > 0, exact < np.float32(offset))
    assert decided["by_bounds"] > 0 or p == 40.0 or at == exact.max()


@pytest.mark.parametrize(("metric", "p"), METRICS[:5])
@pytest.mark.parametrize("exponent", [-44, -38, -25, -12, 0, 12, 18, 25, 37])
def test_tiny_and_huge_numbers(metric, p, exponent):
    rng = np.random.default_rng(exponent + 50)
    with np.errstate(under="ignore"):
        rows = (normal(rng, 1, 20, 66) * 10.0**exponent).astype(np.float32)
        features = (normal(rng, 21, 66) * 10.0**exponent).astype(np.float32)
    features[3], features[4] = rows[0, 2], 0
    features[5] = features[5] * np.float32(1e-3)
    exact = distances(features, rows, k=2, metric=metric, p=p)[:, 0]
    for offset in (np.median(exact), exact.max(), exact[3], np.float32(10.0) * exact.max()):
        if np.isfinite(offset):
            similarity_both_ways(features, rows, k=2, metric=metric, p=p, offset=float(offset))


@pytest.mark.parametrize(("metric", "p"), METRICS[:5])
def test_differences_that_overflow_are_far(metric, p):
    rng = np.random.default_rng(2)
    rows, features = normal(rng, 1, 20, 66), normal(rng, 8, 66)
    rows[0, ::2] *= np.float32(1e38)
    features[::2] *= np.float32(-1e38)
    similarity_both_ways(features, rows, k=3, metric=metric, p=p, offset=2.0)
    similarity_both_ways(features, rows, k=15, metric=metric, p=p, offset=1e37)


@pytest.mark.parametrize(("metric", "p"), METRICS[:5])
def test_equal_rows_zero_rows_and_equal_distances(metric, p):
    rng = np.random.default_rng(3)
    rows = np.tile(normal(rng, 1, 1, 64), (1, 40, 1))
    features = np.concatenate([rows[0, :3], normal(rng, 5, 64), np.zeros((2, 64), np.float32)])
    exact = distances(features, rows, k=10, metric=metric, p=p)[:, 0]
    for offset in (*np.unique(exact), 1.0):
        for value in (offset, np.nextafter(np.float32(offset), np.float32(9))):
            similarity_both_ways(features, rows, k=10, metric=metric, p=p, offset=float(value), scale=1e-3)
    rows[0, 5:9] = 0
    similarity_both_ways(features, rows, k=10, metric=metric, p=p, offset=1.0 + 1e-6)
    similarity_both_ways(features, rows, k=3, metric=metric, p=p, offset=0.4)


def test_no_feature_is_looked_at_where_no_distance_is_small_enough():
    rng = np.random.default_rng(4)
    rows, features = normal(rng, 3, 20, 64), normal(rng, 9, 64)
    logits = 3 * normal(rng, 9, 5)
    logits[2, 1], features[4, 7] = np.nan, np.inf
    offset = np.array([0.0, -1.0, 100.0], np.float32)
    similarity, decided = similarity_both_ways(features, rows, k=3, offset=offset, logits=logits)
    assert decided["without_looking"] == 9 * 2 + 2
    assert decided["finished"] == 7
    assert (similarity[[0, 1, 3], 2] == 1).all()
    # Above confidence 0.2 the offset of 0.2 * 100 is used up.
    similarity, decided = similarity_both_ways(features, rows[:1], k=3, offset=20.0, confidence_weight=100.0)
    assert decided["without_looking"] == 9
    assert not similarity.any()


def test_a_mean_is_proven_large_though_some_rows_are_near():
    """Two rows of the ten lie below the threshold: only the bound of their mean decides."""
    rng = np.random.default_rng(5)
    features = normal(rng, 16, 256)
    rows = 9 * normal(rng, 1, 64, 256)
    rows[0, [3, 40]] = features[0] + np.float32(0.01)
    _, decided = similarity_both_ways(features[:1], rows, k=10, offset=1.0)
    assert decided["by_bounds"] == 1
    _, decided = similarity_both_ways(features[:1], rows, k=2, offset=1.0)
    assert decided["finished"] == 1


@pytest.mark.parametrize("k", [256, 257])
def test_many_neighbours(k):
    rng = np.random.default_rng(k)
    rows, features = normal(rng, 1, 300, 64), 9 * normal(rng, 9, 64)
    _, decided = similarity_both_ways(features, rows, k=k, offset=1.0)
    assert decided["by_bounds"] == (9 if k == 256 else 0)


def test_where_bounds_prove_nothing_they_are_tried_less_and_less():
    rng = np.random.default_rng(6)
    rows, features, near = normal(rng, 1, 40, 128), normal(rng, 64, 128), 0.01 * normal(rng, 64, 128)
    bank, logits, target, planes = core.pack(rows), normal(rng, 64, 5), normal(rng, 1, 5), normal(rng, 8, 128)

    def decided(q, offset):
        with Decided() as counts:
            core.watermark(q, logits, bank, target, planes, k=3, offset=offset)
        return counts

    assert decided(near, 1e-3)["by_bounds"] == 64
    for _ in range(20):
        assert decided(features, 9.0)["finished"] == 64
    # One block of eight is still looked at; when that finds bounds to pay again, all are.
    tried = [decided(near, 1e-3)["by_bounds"] == 64 for _ in range(12)]
    assert not all(tried)
    assert all(tried[8:])


@settings(max_examples=60)
@given(data=st.data())
def test_any_size_any_offset(data):
    metric, p = data.draw(st.sampled_from(METRICS))
    batch, groups = data.draw(st.integers(1, 130)), data.draw(st.integers(1, 3))
    size, width = (
        data.draw(st.integers(1, 60)),
        data.draw(st.sampled_from([3, 16, 31, 33, 64, 100, 257, 520])),
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    rows, features = normal(rng, groups, size, width), normal(rng, batch, width)
    spread = np.linspace(0.05, 2, width).astype(np.float32)  # some features tell more than others
    k = data.draw(st.integers(1, min(size, 12)))
    settings_ = {"k": k, "metric": metric, "p": p, "threads": data.draw(st.integers(1, 3))}
    offsets = np.quantile(
        distances(features * spread, rows * spread, k=k, metric=metric, p=p),
        data.draw(st.floats(0, 1)),
        axis=0,
    )
    similarity_both_ways(
        features * spread,
        rows * spread,
        offset=offsets.astype(np.float32),
        scale=0.1,
        confidence_weight=data.draw(st.sampled_from([0.0, 0.05, 1.0])),
        **settings_,
    )
