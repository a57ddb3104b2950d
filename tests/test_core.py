"""The compiled core directly, on every instruction set, against float64."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

_C = pytest.importorskip("honeytrace._C", reason="this installation has no compiled core")

import core_calls as core  # noqa: E402

LP = [1.0, 1.1, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.3, 8.0]
METRICS = [("l1", 0.0), ("l2", 0.0), ("cosine", 0.0), *(("lp", p) for p in LP)]
# Relative error of a distance against float64, D <= 600: worst seen 4.4e-7 (lp 5), on all levels.
RELATIVE = 2e-6


@pytest.fixture(params=_C.simd_levels(), autouse=True)
def level(request):
    before = _C.simd_level()
    _C.set_simd_level(request.param)
    yield request.param
    _C.set_simd_level(before)


def numbers(seed=0):
    return np.random.default_rng(seed)


def normal(rng, *shape, dtype=np.float32):
    return rng.standard_normal(shape).astype(dtype)


def pair_distances(features, rows, metric, p):
    """[B, G, M] in float64; powers are of differences over the largest one, so they hold for any size."""
    q, b = features.astype(np.float64)[:, None, None], rows.astype(np.float64)[None]
    difference = np.abs(q - b)
    if metric == "cosine":
        q_unit, b_unit = (
            q / np.linalg.norm(q, axis=-1, keepdims=True),
            b / np.linalg.norm(b, axis=-1, keepdims=True),
        )
        return 0.5 * ((q_unit - b_unit) ** 2).sum(-1)
    power = {"l1": 1.0, "l2": 2.0}.get(metric, p)
    largest = np.maximum(difference.max(-1, keepdims=True), 1e-300)
    return (largest * ((difference / largest) ** power).mean(-1, keepdims=True) ** (1 / power))[..., 0]


def check_distances(features, rows, k, metric, p, *, relative=RELATIVE, absolute=1e-7, threads=1):
    """Values against float64; indices by what they point at, for near ties may fall either way."""
    distance, index = core.feature_distance(
        features, core.pack(rows), k=k, metric=metric, p=p, threads=threads
    )
    pairs = pair_distances(features, rows, metric, p)
    smallest = np.sort(pairs, axis=-1)[..., :k]
    np.testing.assert_allclose(distance, smallest.mean(-1), rtol=relative, atol=absolute)
    chosen = np.take_along_axis(pairs, index.astype(np.int64), axis=-1)
    np.testing.assert_allclose(chosen, smallest, rtol=2 * relative, atol=absolute)
    assert all(len(set(of_pair)) == k for of_pair in index.reshape(-1, k).tolist())
    return distance, index


def test_a_packed_bank_holds_panels_of_16_rows_and_the_rows_features_by_falling_variance():
    rows = normal(numbers(), 2, 18, 5) * np.array([1, 3, 2, 0, 3], np.float32)
    rows[..., 4] = rows[..., 1]  # a tie: the first comes first
    bank = core.pack(rows)
    parts = np.split(bank.packed, np.cumsum([2 * 32 * 5, 2 * 5, 2 * 32 * 5, 2 * 32]))
    panels, order, by_row = parts[0].reshape(2, 2, 5, 16), parts[1].view(np.int32), parts[2].reshape(2, 32, 5)
    half_sums, half_squares = (part.reshape(2, 32) for part in parts[3:])
    assert order.tolist() == [1, 4, 2, 0, 3, 1, 4, 2, 0, 3]
    order = order.reshape(2, 5)
    for group in range(2):
        for row in range(32):
            expected = rows[group, row][order[group]] if row < 18 else np.zeros(5)
            assert np.array_equal(panels[group, row // 16, :, row % 16], expected)
            assert np.array_equal(by_row[group, row], expected)
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(half_sums[:, :18], wide.sum(-1) / 2, rtol=2.0**-23)
    np.testing.assert_allclose(half_squares[:, :18], (wide**2).sum(-1) / 2, rtol=2.0**-23)
    assert not half_sums[:, 18:].any()
    assert not half_squares[:, 18:].any()
    norms = np.linalg.norm(rows.astype(np.float64), axis=-1)
    assert np.array_equal(bank.norms[:, :18], norms.astype(np.float32))
    assert not bank.norms[:, 18:].any()


@pytest.mark.parametrize(("metric", "p"), METRICS)
@settings(max_examples=12)
@given(data=st.data())
def test_every_size_and_its_tails(metric, p, data):
    batch = data.draw(st.integers(0, 37))
    groups = data.draw(st.integers(1, 3))
    size = data.draw(st.integers(1, 70))
    width = data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, size))
    rng = numbers(data.draw(st.integers(0, 999)))
    # Distances of a few features may be 0 by chance of rounding only where they are tiny: hence the floor.
    check_distances(normal(rng, batch, width), normal(rng, groups, size, width), k, metric, p, absolute=3e-7)


@pytest.mark.parametrize(("metric", "p"), METRICS)
@pytest.mark.parametrize("width", [255, 256, 257, 600])
def test_long_rows_over_several_feature_blocks(metric, p, width):
    rng = numbers(width)
    check_distances(normal(rng, 18, width), normal(rng, 1, 35, width), 10, metric, p)


@pytest.mark.parametrize(("size", "k"), [(300, 256), (300, 257), (300, 300), (700, 450)])
def test_many_neighbours(size, k):
    """A sorted array up to k = 256, a heap above."""
    rng = numbers(k)
    _, index = check_distances(normal(rng, 3, 7), normal(rng, 2, size, 7), k, "l1", 0.0)
    assert index.shape == (3, 2, k)


def test_equal_distances_are_ordered_by_row():
    rows = np.tile(normal(numbers(), 1, 3, 9), (1, 12, 1))  # row r, r + 3, r + 6, ... are equal
    bank = core.pack(rows)
    query = rows[0, 1:2].copy()
    for k in (1, 5, 12):
        distance, index = core.feature_distance(query, bank, k=k)
        assert distance[0, 0] == 0
        assert index[0, 0].tolist() == [1 + 3 * i for i in range(k)]
    _, index = core.feature_distance(
        np.ones((2, 4), np.float32), core.pack(np.zeros((1, 400, 4), np.float32)), k=300
    )
    assert (index == np.arange(300)).all()


@pytest.mark.parametrize(("metric", "p"), METRICS)
def test_near_rows_keep_their_relative_error(metric, p):
    """Rows at 1e-3 of the query's norm, where |q|^2 + |b|^2 - 2 q.b has lost everything."""
    rng = numbers(5)
    query = normal(rng, 6, 96)
    rows = (query[None, :1] * (1 + 1e-3 * normal(rng, 1, 40, 96))).astype(np.float32)
    relative = 5e-5 if metric == "cosine" else RELATIVE  # the quotients by the norms are rounded: seen 6e-6
    distance, _ = check_distances(query, rows, 10, metric, p, relative=relative, absolute=0.0)
    assert 0 < distance[0, 0] < 2e-3


@pytest.mark.parametrize("exponent", [-44, -38, -30, -20, -12, 12, 18, 19, 25, 37])
@pytest.mark.parametrize(("metric", "p"), [*METRICS, ("lp", 40.0), ("lp", 300.5)])
def test_huge_and_tiny_numbers(metric, p, exponent):
    """Sums of powers would overflow or vanish; the distances do not."""
    rng = numbers(exponent + 50)
    with np.errstate(under="ignore"):
        query = (normal(rng, 5, 33).astype(np.float64) * 10.0**exponent).astype(np.float32)
        rows = (normal(rng, 1, 20, 33).astype(np.float64) * 10.0**exponent).astype(np.float32)
    if metric == "cosine" and exponent == -44:  # a row may be all zeros here: another test
        rows[..., 0] = query[..., 0] = 1e-44
    check_distances(query, rows, 3, metric, p, relative=4e-6, absolute=3e-45)


@pytest.mark.parametrize(("metric", "p"), METRICS)
def test_a_difference_beyond_float32_is_infinitely_far(metric, p):
    rows = np.full((1, 3, 4), -3e38, np.float32)
    rows[0, 1] = 3e38
    distance, index = core.feature_distance(
        np.full((1, 4), 3e38, np.float32), core.pack(rows), k=2, metric=metric, p=p
    )
    assert index.tolist() == [[[1, 0]]]
    assert distance[0, 0] == (1.0 if metric == "cosine" else np.inf)


@pytest.mark.parametrize("p", [2.5, 3.0, 6.6, 8.0])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3])
def test_lp_holds_over_ordinary_magnitudes(p, scale):
    rng = numbers(3)
    check_distances(
        (scale * normal(rng, 4, 65)).astype(np.float32),
        (scale * normal(rng, 1, 17, 65)).astype(np.float32),
        5,
        "lp",
        p,
        absolute=0.0,
    )


def test_a_norm_of_zero_is_at_cosine_distance_1():
    rng = numbers()
    query, rows = normal(rng, 3, 6), normal(rng, 1, 20, 6)
    query[1] = 0
    rows[0, 4] = 0
    distance, index = core.feature_distance(query, core.pack(rows), k=20, metric="cosine")
    assert distance[1, 0] == 1
    assert index[1, 0].tolist() == list(range(20))
    alone, _ = core.feature_distance(query, core.pack(rows[:, 4:5]), k=1, metric="cosine")
    assert (alone == 1).all()


@pytest.mark.parametrize(("metric", "p"), METRICS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_query_that_is_not_finite_is_infinitely_far_and_alone_in_that(metric, p, bad):
    rng = numbers(9)
    query, bank = normal(rng, 21, 19), core.pack(normal(rng, 2, 30, 19))
    expected, expected_index = core.feature_distance(query, bank, k=4, metric=metric, p=p)
    for row, column in ((0, 0), (7, 18), (20, 16)):
        query[row, column] = bad
        expected[row], expected_index[row] = np.inf, np.arange(4)
    distance, index = core.feature_distance(query, bank, k=4, metric=metric, p=p)
    assert np.array_equal(distance, expected)
    assert np.array_equal(index, expected_index)


@pytest.mark.parametrize(("metric", "p"), METRICS)
def test_a_batch_gives_what_its_rows_give_alone_on_any_number_of_threads(metric, p):
    rng = numbers(11)
    query, bank = normal(rng, 150, 70), core.pack(normal(rng, 2, 130, 70))
    whole, index = core.feature_distance(query, bank, k=7, metric=metric, p=p)
    for threads in (2, 3, 8):
        again, index_again = core.feature_distance(query, bank, k=7, metric=metric, p=p, threads=threads)
        assert whole.tobytes() == again.tobytes()
        assert index.tobytes() == index_again.tobytes()
    for i in (0, 1, 15, 16, 63, 64, 149):
        alone, index_alone = core.feature_distance(query[i : i + 1], bank, k=7, metric=metric, p=p)
        assert alone.tobytes() == whole[i].tobytes()
        assert index_alone.tobytes() == index[i].tobytes()
    order = rng.permutation(150)
    shuffled, _ = core.feature_distance(query[order], bank, k=7, metric=metric, p=p, threads=2)
    assert shuffled.tobytes() == whole[order].tobytes()


def to_bfloat16(x):
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 50])
def test_half_types_are_read_exactly_and_strides_are_followed(width):
    rng = numbers(width)
    bank = core.pack(normal(rng, 1, 20, width))
    wide = normal(rng, 9, width + 5)
    wide[0, 2] = 6e-8  # subnormal in float16
    for narrow, back in (
        (wide.astype(np.float16), lambda x: x.astype(np.float32)),
        (to_bfloat16(wide), from_bfloat16),
    ):
        view = narrow[:, 2 : 2 + width]
        plain = np.ascontiguousarray(back(np.ascontiguousarray(view)))
        assert np.array_equal(
            core.feature_distance(view, bank, k=3)[0], core.feature_distance(plain, bank, k=3)[0]
        )
        planes = normal(rng, 64, width)
        assert np.array_equal(core.sign_hash(view, planes), core.sign_hash(plain, planes))
    for bad in (np.float16(np.nan), np.float16(np.inf)):
        features = np.ones((1, width), np.float16)
        features[0, -1] = bad
        assert core.feature_distance(features, bank, k=1)[0][0, 0] == np.inf


@settings(max_examples=20)
@given(
    batch=st.integers(0, 11), planes=st.integers(1, 64), width=st.integers(1, 50), seed=st.integers(0, 999)
)
def test_hash_bits_are_signs(batch, planes, width, seed):
    rng = numbers(seed)
    features, normals = normal(rng, batch, width), normal(rng, planes, width)
    dots = features.astype(np.float64) @ normals.astype(np.float64).T
    expected = ((dots >= 0).astype(np.uint64) << np.arange(planes, dtype=np.uint64)).sum(-1, dtype=np.uint64)
    got = core.sign_hash(features, normals).view(np.uint64)
    certain = ((np.abs(dots) > 1e-5).astype(np.uint64) << np.arange(planes, dtype=np.uint64)).sum(
        -1, dtype=np.uint64
    )
    assert np.array_equal(got & certain, expected & certain)
    for i in range(batch):
        assert core.sign_hash(features[i : i + 1], normals).view(np.uint64)[0] == got[i]


def test_hash_of_zero_and_of_what_is_not_finite():
    features = np.zeros((3, 20), np.float32)
    features[1, 3], features[2, 19] = np.nan, -np.inf
    assert core.sign_hash(features, normal(numbers(), 64, 20)).tolist() == [-1, 0, 0]


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("classes", [1, 2, 10, 15, 16, 17, 100, 1000, 5000])
@pytest.mark.parametrize("spread", [0.01, 1.0, 12.0, 60.0])
def test_confidence_is_the_largest_softmax(classes, spread):
    """Seen through a similarity of 0 - 0 + 1 * confidence."""
    rng = numbers(classes)
    logits = (spread * normal(rng, 6, classes)).astype(np.float32)
    features = normal(rng, 1, 4).repeat(6, axis=0)
    bank = core.pack(features[None, :1])
    similarity, _ = core.watermark(
        features,
        logits,
        bank,
        np.zeros((1, classes)),
        normal(rng, 2, 4),
        k=1,
        offset=0.0,
        confidence_weight=-1.0,
    )
    # Four units in the last place; worst seen 2.
    np.testing.assert_allclose(similarity[:, 0], softmax(logits.astype(np.float64)).max(-1), rtol=4 * 2**-23)


def shaped_rule(**changes):
    names = ("low_confidence", "low_power", "high_confidence", "high_power", "space", "strength")
    values = dict(zip((*names, "mixing_power", "flip_power", "flip_bins"), core.PLAIN_RULE, strict=True))
    return tuple((values | changes).values())


@pytest.mark.parametrize("classes", [1, 3, 16, 33, 257])
@pytest.mark.parametrize("space", [0, 1])
def test_mixing_against_float64(classes, space):
    rng = numbers(classes)
    logits = (4 * normal(rng, 30, classes)).astype(np.float32)
    target = (4 * normal(rng, 2, classes)).astype(np.float32)
    similarity = rng.random((30, 2)).astype(np.float32)
    rule = shaped_rule(space=space, strength=0.7, mixing_power=2.0, low_confidence=0.5, low_power=0.25)
    mixed = core.watermark_mix(logits, similarity, target, np.zeros(30), rule=rule)
    group = similarity.argmax(-1)
    assert np.array_equal(mixed.group, group)
    assert not mixed.flipped.any()
    z, r = logits.astype(np.float64), target.astype(np.float64)[group]
    s = similarity.max(-1).astype(np.float64)
    s = np.where(softmax(z).max(-1) < 0.5, s**0.25, s)
    w = (0.7 * s**2)[:, None]
    if space == 0:
        np.testing.assert_allclose(mixed.logits, (1 - w) * z + w * r, rtol=1e-6, atol=3e-6)
    else:
        np.testing.assert_allclose(
            softmax(mixed.logits.astype(np.float64)),
            (1 - w) * softmax(z) + w * softmax(r),
            rtol=2e-5,
            atol=1e-9,
        )
        lse = np.log(np.exp(z).sum(-1)), np.log(np.exp(mixed.logits.astype(np.float64)).sum(-1))
        np.testing.assert_allclose(*lse, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_similarity_0_copies_the_row_bit_for_bit(dtype):
    rng = numbers()
    logits = normal(rng, 6, 19, dtype=np.float32)
    logits = to_bfloat16(logits) if dtype == np.uint16 else logits.astype(dtype)
    bits = logits.view(np.uint32 if dtype == np.float32 else np.uint16)
    bits[1, 3] = 0x7FA12345 if dtype == np.float32 else 0x7FA1  # NaN with a payload, similarity above 0
    similarity = np.array([[0, 0], [0.5, 1], [np.nan, 0], [0, np.nan], [-0.0, 0], [0, 0.5]], np.float32)
    mixed = core.watermark_mix(logits, similarity, normal(rng, 2, 19), np.zeros(6))
    assert mixed.logits[:5].tobytes() == logits[:5].tobytes()
    assert mixed.logits[5].tobytes() != logits[5].tobytes()
    assert mixed.group.tolist() == [0, 0, 0, 0, 0, 1]
    assert not mixed.flipped.any()


def test_full_weight_gives_the_target_and_answers_stay_finite():
    target = np.array([[6e4, -6e4, 0.0]], np.float32)
    logits = np.array([[6.5e4, 6.5e4, -6.5e4]], np.float16)
    for space in (0, 1):
        rule = shaped_rule(space=space, strength=1.0)
        mixed = core.watermark_mix(logits, np.ones((1, 1)), target, np.zeros(1), rule=rule)
        assert np.isfinite(mixed.logits).all()
        np.testing.assert_allclose(softmax(mixed.logits.astype(np.float64))[0], [1, 0, 0], atol=1e-6)
    far = np.array([[3e38, -3e38]], np.float32)
    mixed = core.watermark_mix(far, np.ones((1, 1)), -far, np.zeros(1), rule=shaped_rule(strength=0.5))
    assert np.isfinite(mixed.logits).all()
    half = np.array([[6.5e4, -6.5e4]], np.float16)
    mixed = core.watermark_mix(
        half, np.ones((1, 1)), far, np.zeros(1), rule=shaped_rule(space=0, strength=1.0)
    )
    assert mixed.logits.tolist() == [[65504.0, -65504.0]]


def nearest_bfloat16(x):
    """Round to nearest, ties to even, on the bits."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("classes", [1, 7, 16, 40, 2048])
def test_answers_in_half_types_are_rounded_to_nearest_even(classes):
    """Seen on flipped rows, whose answer is the target: any finite float32, subnormals and ties included."""
    rng = numbers(classes)
    target = rng.integers(0, 2**32, (1, classes), dtype=np.uint32)
    target[:, ::3] &= np.uint32(0xFFFF8000)  # ties of bfloat16
    target[:, 1::3] = (rng.integers(0, 2, classes)[1::3] << 31) | (
        (rng.integers(96, 144, classes)[1::3] << 23) | (rng.integers(0, 2**12, classes)[1::3] << 11)
    )  # around the range of float16, with ties
    target = target.view(np.float32)
    target[~np.isfinite(target)] = 1.5
    always = shaped_rule(flip_bins=1)
    for logits, largest in ((np.ones((2, classes), np.float16), 65504.0), (None, 3.3895313892515355e38)):
        given_ = to_bfloat16(np.ones((2, classes))) if logits is None else logits
        mixed = core.watermark_mix(given_, np.ones((2, 1)), target, np.zeros(2), rule=always)
        assert mixed.flipped.all()
        clamped = np.clip(target, np.float32(-largest), np.float32(largest))
        with np.errstate(over="ignore", under="ignore"):
            expected = nearest_bfloat16(clamped) if logits is None else clamped.astype(np.float16)
        assert np.array_equal(mixed.logits[1].view(np.uint16), expected[0].view(np.uint16))


def philox(counter, key):
    """The definition, in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


word = st.integers(0, 2**32 - 1)


@given(counter=st.tuples(word, word, word, word), key=st.tuples(word, word))
def test_philox_words(counter, key):
    assert _C.philox4x32_10(counter, key) == philox(counter, key)


@given(seed=st.integers(0, 2**64 - 1))
def test_flips_follow_bucket_group_and_seed(seed):
    rng = numbers(seed % 997)
    batch = 40
    bucket = rng.integers(-(2**63), 2**63, batch)
    similarity = rng.random((batch, 3)).astype(np.float32)
    target = normal(rng, 3, 5)
    rule = shaped_rule(flip_power=3.0, flip_bins=10)
    logits = normal(rng, batch, 5)
    mixed = core.watermark_mix(logits, similarity, target, bucket, rule=rule, seed=seed)
    for i in range(batch):
        g = int(similarity[i].argmax())
        s = float(similarity[i, g])
        unsigned = int(bucket[i]) % 2**64
        u = philox((unsigned % 2**32, unsigned >> 32, g, 0), (seed % 2**32, seed >> 32))[0] * 2.0**-32
        assert mixed.flipped[i] == (u < np.floor(s * s * s * 10) / 10)
        if mixed.flipped[i]:
            assert np.array_equal(mixed.logits[i], target[g])


@pytest.mark.parametrize(("metric", "p"), [("l1", 0.0), ("l2", 0.0), ("cosine", 0.0), ("lp", 3.0)])
@pytest.mark.parametrize("batch", [0, 1, 5, 130])
def test_the_fused_call_is_its_steps(metric, p, batch):
    rng = numbers(batch)
    features, logits = normal(rng, batch, 30), (3 * normal(rng, batch, 11)).astype(np.float16)
    if batch > 2:
        features[1, 4] = np.nan
        logits[2, 0] = np.inf
    bank, target, planes = core.pack(normal(rng, 3, 45, 30)), normal(rng, 3, 11), normal(rng, 64, 30)
    rule = shaped_rule(low_confidence=0.4, low_power=0.5, high_confidence=0.9, high_power=3.0, flip_bins=8)
    offset, scale = np.array([1.2, 1.0, 1.4], np.float32), np.array([1.0, 0.5, 2.0], np.float32)
    settings_ = {"k": 5, "metric": metric, "p": p}
    similarity, fused = core.watermark(
        features,
        logits,
        bank,
        target,
        planes,
        **settings_,
        offset=offset,
        scale=scale,
        rule=rule,
        seed=2**64 - 3,
    )
    distance, _ = core.feature_distance(features, bank, **settings_)
    expected = np.clip((offset - distance) / scale, 0, 1).astype(np.float32)
    expected[[i for i in (1, 2) if batch > 2]] = 0
    assert np.array_equal(similarity, expected)
    steps = core.watermark_mix(
        logits, similarity, target, core.sign_hash(features, planes), rule=rule, seed=2**64 - 3
    )
    for name in core.Mixed._fields:
        assert getattr(fused, name).tobytes() == getattr(steps, name).tobytes(), name
    for threads in (2, 5):
        _, again = core.watermark(
            features,
            logits,
            bank,
            target,
            planes,
            **settings_,
            offset=offset,
            scale=scale,
            rule=rule,
            seed=2**64 - 3,
            threads=threads,
        )
        assert again.logits.tobytes() == fused.logits.tobytes()
    if batch > 2:
        assert fused.logits[1:3].tobytes() == logits[1:3].tobytes()


def test_flush_to_zero_of_the_caller_does_not_reach_the_answer():
    torch = pytest.importorskip("torch")
    rng = numbers()
    query = (normal(rng, 40, 16) * 1e-39).astype(np.float32)
    bank = core.pack((normal(rng, 1, 30, 16) * 1e-39).astype(np.float32))
    expected, _ = core.feature_distance(query, bank, k=3)
    assert (expected > 0).all()
    assert torch.set_flush_denormal(True)
    try:
        distance, _ = core.feature_distance(query, bank, k=3)
    finally:
        torch.set_flush_denormal(False)
    assert distance.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k must be between 1 and the number of bank rows M=5, got k=0"),
        ({"k": 6}, "k must be between 1 and the number of bank rows M=5, got k=6"),
        ({"metric": 4}, "metric must be 0 .l1., 1 .l2., 2 .lp. or 3 .cosine., got metric=4"),
        ({"metric": 2, "p": 0.5}, "p must be at least 1 and finite, got p=0.5"),
        ({"metric": 2, "p": float("nan")}, "p must be at least 1 and finite, got p=nan"),
        ({"metric": 2, "p": float("inf")}, "p must be at least 1 and finite, got p=inf"),
        ({"threads": 0}, "threads must be at least 1, got threads=0"),
        ({"dtype": 3}, "dtype must be 0 .float32., 1 .float16. or 2 .bfloat16., got dtype=3"),
        ({"batch": -1}, "batch must be at least 0, got batch=-1"),
        ({"row_stride": -2}, "row_stride must be at least 0, got row_stride=-2"),
    ],
)
def test_a_wrong_size_or_code_is_refused(changes, message):
    query, bank = np.zeros((2, 3), np.float32), core.pack(np.zeros((1, 5, 3), np.float32))
    distance = np.zeros((2, 1), np.float32)
    arguments = {
        "features_ptr": query.ctypes.data,
        "dtype": 0,
        "batch": 2,
        "features": 3,
        "row_stride": 3,
        "packed_ptr": bank.packed.ctypes.data,
        "norms_ptr": bank.norms.ctypes.data,
        "groups": 1,
        "rows": 5,
        "k": 1,
        "metric": 0,
        "p": 0.0,
        "distance_ptr": distance.ctypes.data,
        "index_ptr": 0,
        "threads": 1,
    }
    _C.feature_distance(**arguments)
    with pytest.raises(ValueError, match=message):
        _C.feature_distance(**(arguments | changes))


@pytest.mark.skipif(
    "address" in _C.build_info()["sanitizers"], reason="its allocator aborts, it does not throw"
)
def test_an_exception_on_a_worker_reaches_the_caller_and_the_pool_goes_on():
    rng = numbers()
    query, bank = normal(rng, 200, 64), core.pack(normal(rng, 1, 100, 64))
    expected, _ = core.feature_distance(query, bank, k=3, threads=4)
    distance = np.zeros((200, 1), np.float32)
    claimed = 2**45  # a bank so large that room for its k smallest cannot be had; it is never read
    with pytest.raises(MemoryError):
        _C.feature_distance(
            *core.source(query), bank.packed.ctypes.data, bank.norms.ctypes.data, 1, claimed, claimed, 0, 0.0,
            distance.ctypes.data, 0, 4,
        )  # fmt: skip
    again, _ = core.feature_distance(query, bank, k=3, threads=4)
    assert again.tobytes() == expected.tobytes()


def test_callers_on_many_threads_neither_wait_for_each_other_nor_disturb():
    rng = numbers()
    bank = core.pack(normal(rng, 1, 200, 64))
    queries = [normal(rng, 90 + i, 64) for i in range(8)]
    expected = [core.feature_distance(query, bank, k=5)[0] for query in queries]
    wrong = []

    def ask(i):
        for _ in range(10):
            distance, _ = core.feature_distance(queries[i], bank, k=5, threads=3)
            if distance.tobytes() != expected[i].tobytes():
                wrong.append(i)

    callers = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert not any(caller.is_alive() for caller in callers)
    assert not wrong
    assert _C.pool_workers() > 0


FRESH_PROCESS = """
import os, sys
sys.path.insert(0, {tests!r})
from honeytrace import _C
assert _C.pool_workers() == 0, "importing started threads"
import numpy as np, core_calls as core
rng = np.random.default_rng(0)
query = rng.standard_normal((256, 64)).astype(np.float32)
bank = core.pack(rng.standard_normal((1, 200, 64)).astype(np.float32))
core.feature_distance(query[:1], bank, k=3, threads=4)
assert _C.pool_workers() == 0, "a small call woke the pool"
expected, _ = core.feature_distance(query, bank, k=3, threads=3)
assert _C.pool_workers() == 2, _C.pool_workers()
child = os.fork()
if child == 0:
    inherited = _C.pool_workers()
    distance, _ = core.feature_distance(query, bank, k=3, threads=3)
    good = inherited == 0 and _C.pool_workers() == 2 and distance.tobytes() == expected.tobytes()
    os._exit(0 if good else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
again, _ = core.feature_distance(query, bank, k=3, threads=3)
assert again.tobytes() == expected.tobytes()
"""


@pytest.mark.parametrize("attempt", range(2))
def test_threads_start_with_the_first_parallel_call_and_again_after_a_fork(attempt, level):
    code = FRESH_PROCESS.format(tests=os.path.dirname(__file__))
    environment = os.environ | {"HONEYTRACE_SIMD": level}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
