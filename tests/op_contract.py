"""What every device kernel of the ops keeps to, whatever runs it: one class of tests for all of them.

`interpreted_triton.py` (Triton's interpreter), `test_cuda_kernels.py` (fibres in place of GPU threads) and
`test_gpu_ops.py` (a GPU) each subclass `OpContract`: they say how an op is called, which kernels can answer a
call, and at which sizes, chosen to cross the edges of their own tiles. A test with an argument `foo_size`
runs over the `foo_sizes` of the subclass.
"""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from tolerances import DISTANCE, GRADIENT, MIXED, NEAR_DISTANCE, SIMILARITY, Tolerance, assert_close

from honeytrace import WatermarkRule, ops, reference
from honeytrace.ops import registry

METRICS = [
    ("l1", None),
    ("l2", None),
    ("lp", 3.0),
    ("lp", 1.5),
    ("lp", 4.0),
    ("lp", 2.5),
    ("lp", 4.7),
    ("lp", 1.0),
    ("cosine", None),
]
CODES = ["l1", "l2", "lp", "cosine"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Sizes = tuple[tuple[int, ...], ...]
SEED = 0x8000_0000_DEAD_BEEF

RULES = {
    "default": WatermarkRule(),
    "published": WatermarkRule.neurht("caltech256"),
    "all of it": WatermarkRule(
        strength=0.9,
        mixing_power=1.7,
        low_confidence=0.4,
        low_power=0.3,
        high_confidence=0.6,
        high_power=2.5,
        flip_power=0.7,
        flip_bins=7,
    ),
    "full strength": WatermarkRule(strength=1.0, mixing_power=0.5),
    "no strength": WatermarkRule(strength=0.0),
}


def nearest(q, b, k, metric, p=None):
    """Mean of the k smallest distances, and which rows they are, by the op."""
    return torch.ops.honeytrace.feature_distance(q, b, None, None, k, CODES.index(metric), p or 1.0)


def expected(q, b, k, metric, p=None):
    """As `nearest`, by the reference."""
    with registry.force("reference"):
        return nearest(q, b, k, metric, p)


def answers(randn, batch, groups, classes, dtype=torch.float32):
    """logits, similarity, target_logits, bucket."""
    similarity = randn(batch, groups).mul(0.5).clamp(0, 1)
    bucket = torch.arange(batch) * 0x1234_5678_9ABC_DEF - 2**62
    return (3 * randn(batch, classes)).to(dtype), similarity, 4 * randn(groups, classes), bucket


def assert_same(actual, wanted):
    """Two sequences of tensors hold the same numbers; NaN equals NaN."""
    for one, other in zip(actual, wanted, strict=True):
        if one.is_floating_point():
            one, other = one.nan_to_num(7), other.nan_to_num(7)
        assert torch.equal(one, other)


class OpContract:
    """A subclass describes its device under test by the attributes and methods above the first test."""

    device = "cpu"
    """Where the op's tensors live. Inputs are drawn, and results are compared, on the CPU."""

    exact_order = True
    """Whether sums round as the reference's do: rows fall in its order, products near 0 have its sign."""

    distance_sizes: Sizes  # batch, groups, rows, width, k
    neighbour_sizes: Sizes  # batch, rows, width, k
    magnitude_sizes: Sizes  # batch, rows, width
    near_row_sizes: Sizes  # batch, groups, rows, width
    broken_query_sizes: Sizes  # batch, groups, rows, width, which feature
    tie_sizes: Sizes  # batch, rows
    zero_norm_sizes: Sizes  # batch, rows, width, k
    half_feature_sizes: Sizes  # batch, groups, rows, width, k
    gradient_sizes: Sizes  # batch, groups, rows, width, k
    hash_sizes: Sizes  # batch, width, planes
    mixing_sizes: Sizes  # batch, groups, classes
    kept_row_sizes: Sizes = ((6, 2, 5), (6, 2, 8), (6, 2, 9))  # batch, groups, classes
    fused_sizes: Sizes  # batch, groups, rows, width, classes
    opcheck_sizes: Sizes = ((2, 1, 5, 4, 3), (3, 3, 12, 8, 64))  # batch, groups, rows, width, planes

    def paths(self, metric, batch, k):
        """Names of the kernels that can answer this call. Here the op itself chooses."""
        return ("the op's",)

    def nearest(self, q, b, k, metric, p=None, path=None):
        """distance [B, G] and index [B, G, k] on the CPU, by the kernel `path`."""
        return self.call(nearest, q, b, k, metric, p)

    def call(self, op, *args, **options):
        """`op` with its tensors on the device, its results on the CPU."""
        found = op(*(x.to(self.device) if isinstance(x, torch.Tensor) else x for x in args), **options)
        if isinstance(found, torch.Tensor):
            return found.cpu()
        moved = [x.cpu() for x in found]
        return type(found)(*moved) if hasattr(found, "_fields") else tuple(moved)

    def compose_error(self, dtype):
        """Relative error that `compose` may have where its mask is neither 0 nor 1."""
        return 0.0

    def pytest_generate_tests(self, metafunc):
        for name in metafunc.fixturenames:
            if name.endswith("_size"):
                sizes = getattr(self, f"{name}s")
                metafunc.parametrize(name, sizes, ids=["x".join(map(str, size)) for size in sizes])

    # Distances --------------------------------------------------------------------------------------

    @pytest.mark.parametrize(("metric", "p"), METRICS)
    def test_distance_agrees_with_float64(self, randn, metric, p, distance_size):
        batch, groups, size, width, k = distance_size
        q, b = randn(batch, width), randn(groups, size, width)
        pairs = torch.from_numpy(oracles.pair_distances(q, b, metric, p))
        for path in self.paths(metric, batch, k):
            distance, index = self.nearest(q, b, k, metric, p, path)
            assert_close(distance, oracles.feature_distance(q, b, k=k, metric=metric, p=p), DISTANCE[metric])
            found = pairs.gather(2, index.long())
            assert_close(found, pairs.sort(dim=2).values[..., :k], DISTANCE[metric])
            assert (index.sort(dim=2).values.diff(dim=2) > 0).all()
            if self.exact_order:
                assert torch.equal(index, expected(q, b, k, metric, p)[1])

    def test_any_number_of_neighbours(self, randn, neighbour_size):
        batch, size, width, k = neighbour_size
        q, b = randn(batch, width), randn(1, size, width)
        level = torch.zeros(batch, 3), torch.zeros(1, size, 3)
        for path in self.paths("l1", batch, k):
            distance, index = self.nearest(q, b, k, "l1", path=path)
            assert_close(distance, oracles.feature_distance(q, b, k=k), DISTANCE["l1"])
            if self.exact_order:
                assert torch.equal(index, expected(q, b, k, "l1")[1])
            assert self.nearest(*level, k, "l1", path=path)[1][-1, 0].tolist() == list(range(k))

    @pytest.mark.parametrize(("metric", "p"), [("l2", None), ("lp", 3.0), ("lp", 50.5), ("cosine", None)])
    @pytest.mark.parametrize("scale", [1e-30, 1e25])
    def test_extreme_magnitudes(self, randn, metric, p, scale, magnitude_size):
        batch, size, width = magnitude_size
        q, b = randn(batch, width), randn(1, size, width)
        wanted = oracles.feature_distance(q, b, k=2, metric=metric, p=p)
        wanted = wanted * (1 if metric == "cosine" else scale)
        for path in self.paths(metric, batch, 2):
            distance, _ = self.nearest(q * scale, b * scale, 2, metric, p, path)
            assert_close(distance, wanted, Tolerance(1e-5, 0.0))

    @pytest.mark.parametrize(("metric", "p"), [("l1", None), ("l2", None), ("lp", 1.5), ("cosine", None)])
    def test_near_rows_do_not_cancel(self, randn, metric, p, near_row_size):
        batch, groups, size, width = near_row_size
        q = randn(batch, width) + 3
        b = q[:groups, None] * (1 + 1e-3 * randn(groups, size, width))
        wanted = oracles.feature_distance(q, b, k=5, metric=metric, p=p)
        for rows in (slice(0, 1), slice(0, batch)):
            for path in self.paths(metric, len(q[rows]), 5):
                distance, _ = self.nearest(q[rows], b, 5, metric, p, path)
                assert_close(distance, wanted[rows], NEAR_DISTANCE[metric])

    @pytest.mark.parametrize("bad", [math.nan, -math.inf])
    @pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
    def test_a_query_that_is_not_finite(self, randn, metric, bad, broken_query_size):
        batch, groups, size, width, feature = broken_query_size
        q, b = randn(batch, width), randn(groups, size, width)
        broken = q.clone()
        broken[1, feature] = bad
        for path in self.paths(metric, batch, 3):
            wanted = [x.clone() for x in self.nearest(q, b, 3, metric, path=path)]
            wanted[0][1] = torch.inf
            wanted[1][1] = torch.arange(3)
            found = self.nearest(broken, b, 3, metric, path=path)
            assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))

    def test_ties_go_to_the_lower_row(self, tie_size):
        batch, size = tie_size
        b = torch.zeros(1, size, 3)
        b[0, 20:, 0] = 1
        b[0, ::2] = -b[0, ::2]
        for metric, rows in (("l1", b), ("l2", b[:, 20:])):
            for path in self.paths(metric, batch, 23):
                _, index = self.nearest(torch.zeros(batch, 3), rows, 23, metric, path=path)
                assert index.tolist() == [[list(range(23))]] * batch

    def test_norms_of_0(self, randn, zero_norm_size):
        batch, size, width, k = zero_norm_size
        q, b = randn(batch, width), randn(1, size, width)
        q[0] = 0
        b[0, 2] = 0
        for path in self.paths("cosine", batch, k):
            assert self.nearest(q, b, k, "cosine", path=path)[0][0] == 1

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
    def test_half_features_and_odd_addresses(self, randn, metric, dtype, half_feature_size):
        batch, groups, size, width, k = half_feature_size
        q, b = randn(batch, width).to(dtype), randn(groups, size, width)
        # Not at a multiple of 16 bytes.
        odd = torch.zeros(batch, width + 3, dtype=dtype, device=self.device)[:, 1 : 1 + width].copy_(q)
        wanted = self.nearest(q.float(), b, k, metric, path=self.paths(metric, batch, k)[0])
        for path in self.paths(metric, batch, k):
            for features in (q, odd):
                found = self.nearest(features, b, k, metric, path=path)
                assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
        turned = self.call(nearest, q.to(self.device).t().contiguous().t(), b, k, metric)
        assert all(torch.equal(x, y) for x, y in zip(turned, wanted, strict=True))

    def test_layouts_and_an_empty_batch(self, randn):
        q, b = (x.to(self.device) for x in (randn(3, 6), randn(2, 11, 6)))
        wanted = ops.feature_distance(q, ops.Bank(b), k=3)
        spread = torch.zeros(3, 12, device=self.device)
        spread[:, ::2] = q
        turned = b.transpose(1, 2).contiguous().transpose(1, 2)
        signs = torch.complex(q, -q).conj().imag.neg().neg()
        for features in (spread[:, ::2], q.t().contiguous().t(), signs):
            assert torch.equal(ops.feature_distance(features, turned, k=3), wanted)
        assert ops.feature_distance(q[:0], b, k=3).shape == (0, 2)
        assert torch.equal(ops.feature_distance(q[:1].expand(3, 6), b, k=3), wanted[:1].expand(3, 2))

    @pytest.mark.parametrize(("metric", "p"), [("l1", None), ("l2", None), ("lp", 3.0), ("cosine", None)])
    def test_gradients(self, randn, metric, p, gradient_size):
        batch, groups, size, width, k = gradient_size
        q, b, weight = randn(batch, width), randn(groups, size, width), randn(batch, groups)
        narrow = [x.to(self.device).requires_grad_() for x in (q, b)]
        wide = [x.double().requires_grad_() for x in (q, b)]
        distance = ops.feature_distance(*narrow, k=k, metric=metric, p=p)
        exact = reference.feature_distance(*wide, k=k, metric=metric, p=p)
        found = torch.autograd.grad((distance * weight.to(self.device)).sum(), narrow)
        wanted = torch.autograd.grad((exact * weight).sum(), wide)
        for actual, want in zip(found, wanted, strict=True):
            assert_close(actual.cpu(), want, GRADIENT)

    # Hash, mixing, compose --------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_sign_hash(self, randn, dtype, hash_size):
        batch, width, planes = hash_size
        q, normals = randn(batch, width).to(dtype), randn(planes, width)
        found = self.call(ops.sign_hash, q, normals)
        dots = q.double() @ normals.double().t()
        # A product within rounding of 0 may fall on either side.
        sure = dots.abs() > 1e-5 * (q.double().norm(dim=1)[:, None] * normals.double().norm(dim=1))
        bits = (found[:, None] >> torch.arange(planes)) & 1
        assert (bits == (dots >= 0))[sure].all()
        if self.exact_order:
            assert torch.equal(found, self.call(ops.sign_hash, q.float(), normals))
            assert torch.equal(found, reference.sign_hash(q.float(), normals))
        every_bit = (1 << planes) - 1 - ((planes == 64) << 64)
        assert self.call(ops.sign_hash, torch.zeros(1, width, dtype=dtype), normals).item() == every_bit
        q[-1, 0] = torch.nan
        broken = self.call(ops.sign_hash, q, normals)
        assert broken[-1] == 0
        assert torch.equal(broken[:-1], found[:-1])

    @pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_mixing_agrees_with_the_float64_reference(self, randn, rule, dtype, mixing_size):
        logits, similarity, target, bucket = answers(randn, *mixing_size, dtype)
        wide = logits.double(), similarity.double(), target.double(), bucket
        wanted = reference.watermark_mix(*wide, rule=rule, seed=SEED)
        mixed, group, flipped = self.call(
            ops.watermark_mix, logits, similarity, target, bucket, rule=rule, seed=SEED
        )
        assert torch.equal(group, wanted[1])
        assert torch.equal(flipped, wanted[2])
        assert_close(mixed, wanted[0], MIXED[dtype])

    @pytest.mark.parametrize("power", [0.25, 0.7, 1.3, 3.0, 4.0])
    def test_flips_are_those_of_the_reference(self, power):
        # Similarities at which s ^ power * bins is a whole number, and their neighbours, decide on the last
        # bit.
        steps = torch.arange(9) / 8
        s = torch.cat([steps, steps.nextafter(torch.tensor(0.0)), steps**4])[:, None]
        rule = WatermarkRule(
            flip_bins=8, flip_power=power, low_confidence=1.0, low_power=0.25 if power > 1 else 1.0
        )
        logits = torch.linspace(-3, 3, 2 * len(s)).view(-1, 2)
        args = logits, s, torch.ones(1, 2), torch.arange(len(s)) - 2**40
        wanted = reference.watermark_mix(*args, rule=rule, seed=SEED)[2]
        assert torch.equal(self.call(ops.watermark_mix, *args, rule=rule, seed=SEED)[2], wanted)
        assert 0 < wanted.sum() < len(s)

    def test_rows_that_keep_their_bits(self, randn, kept_row_size):
        logits, similarity, target, bucket = answers(randn, *kept_row_size)
        similarity[:2] = 0
        similarity[2] = torch.nan
        logits[0, 1] = -0.0
        logits[3, 2] = torch.inf
        logits.view(torch.int32)[4, 0] = 0x7FC12345
        similarity[5] = torch.tensor([0.5, 0.5])
        classes = logits.shape[1]
        rolled = logits.to(self.device).repeat(1, 2)[:, 1 : 1 + classes]  # spread rows at odd addresses
        for z in (logits, rolled):
            mixed, group, flipped = self.call(
                ops.watermark_mix, z, similarity, target, bucket, rule=RULES["all of it"], seed=1
            )
            given = z.cpu().contiguous()
            assert torch.equal(mixed[:5].view(torch.int32), given[:5].view(torch.int32))
            assert not torch.equal(mixed[5], given[5])
            assert group.tolist() == [0] * 6
            assert not flipped[:5].any()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("space", ["logits", "probabilities"])
    def test_answers_stay_finite(self, dtype, space):
        limit, huge = torch.finfo(dtype).max, torch.finfo(torch.float32).max
        z = torch.tensor([[limit, -limit, 0.0], [-limit, -limit, -limit], [limit, limit, limit]]).to(dtype)
        bucket = torch.zeros(3, dtype=torch.int64)
        for target in ([[huge, -huge, 0.0]], [[-huge, -huge, -huge]]):
            for strength in (0.0, 0.5, 1.0):
                rule = WatermarkRule(space=space, strength=strength, flip_bins=2)
                for similarity in (0.3, 1.0):
                    args = z, torch.full((3, 1), similarity), torch.tensor(target), bucket
                    assert torch.isfinite(self.call(ops.watermark_mix, *args, rule=rule, seed=3)[0]).all()

    @pytest.mark.parametrize(
        "shape", [(4, 3, 2, 5), (1, 1, 2, 5), (2, 5), (4, 1, 1, 1), (), (2, 1), (3, 1, 5)], ids=str
    )
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_compose(self, randn, shape, dtype):
        a, b = randn(4, 3, 2, 5, dtype=dtype), randn(4, 3, 2, 5, dtype=dtype)
        mask = randn(*shape).sigmoid().round(decimals=1).sub(0.3).clamp(0, 0.4).mul(2.5)
        a[0, 0, 0, 0], b[1, 2, 1, 0] = torch.nan, torch.inf
        out, wanted = self.call(ops.compose, a, b, mask), reference.compose(a, b, mask)
        exact = ((mask == 0) | (mask == 1)).expand(a.shape)
        integers = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(out.view(integers)[exact], wanted.view(integers)[exact])
        assert torch.equal(out.isnan(), wanted.isnan())
        error = Tolerance(self.compose_error(dtype), 0.0)
        assert_close(out[~exact].nan_to_num(7), wanted[~exact].nan_to_num(7), error)

    # The fused op -----------------------------------------------------------------------------------

    @pytest.mark.parametrize(("metric", "k"), [("l1", 3), ("cosine", 3), ("l2", 40)])
    def test_watermark_agrees_with_the_reference_and_stands_alone(self, randn, metric, k, fused_size):
        batch, groups, size, width, classes = fused_size
        k = min(k, size)
        rule = WatermarkRule(
            metric=metric, offset=(1.5, 1.4), scale=0.7, confidence_weight=0.1, k=k, flip_bins=5, strength=0.6
        )
        q, z = randn(batch, width), 2 * randn(batch, classes)
        rest = randn(groups, size, width), 3 * randn(groups, classes), randn(64, width)
        q[2, 3] = torch.nan
        z[4, 0] = -torch.inf

        def watermark(q, z, b, *others):
            return ops.watermark(q, z, ops.Bank(b), *others, rule=rule, seed=SEED)

        output = self.call(watermark, q, z, *rest)
        wanted = reference.watermark(q, z, *rest, rule=rule, seed=SEED)
        assert (output.similarity > 0).any()
        assert_close(output.similarity, wanted.similarity, SIMILARITY)
        assert torch.equal(output.group, wanted.group)
        assert torch.equal(output.flipped, wanted.flipped)
        assert_close(output.logits, wanted.logits, Tolerance(1e-5, 2e-5))
        for rows in ([batch - 1], [3, 2, 0], [4, 3, 2, 0]):
            assert_same(self.call(watermark, q[rows], z[rows], *rest), [x[rows] for x in output])
        assert self.call(watermark, q[:0], z[:0], *rest).logits.shape == (0, classes)

    def test_half_answers_of_the_fused_op(self, randn):
        rule = WatermarkRule(offset=1.6, k=2)
        args = randn(2, 5).half(), randn(2, 3).bfloat16(), randn(1, 6, 5), randn(1, 3), randn(8, 5)
        logits = self.call(ops.watermark, *args, rule=rule, seed=1).logits
        assert logits.dtype == torch.bfloat16
        assert_close(logits, reference.watermark(*args, rule=rule, seed=1).logits, MIXED[torch.bfloat16])

    def test_opcheck(self, randn, opcheck_size):
        batch, groups, size, width, planes = opcheck_size
        drawn = randn(batch, width), randn(groups, size, width), randn(planes, width)
        q, b, normals = (x.to(self.device) for x in drawn)
        torch.library.opcheck(torch.ops.honeytrace.feature_distance.default, (q, b, None, None, 2, 0, 1.0))
        torch.library.opcheck(torch.ops.honeytrace.sign_hash.default, (q, normals))
