from __future__ import annotations

import math

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import GRADIENT, MIXED, PROBABILITY_SUM, Tolerance, assert_close

from honeytrace import WatermarkRule, ops, reference
from honeytrace.ops import registry
from honeytrace.ops.watermark_mix import mix_backward

SEED = 0x8000_0000_DEAD_BEEF
RULES = {
    "default": WatermarkRule(),
    "published": WatermarkRule.neurht("cifar10"),
    "published, both thresholds": WatermarkRule.neurht("caltech256"),
    "all of it": WatermarkRule(
        space="probabilities",
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


def inputs(randn, batch=12, groups=3, classes=10, dtype=torch.float32):
    similarity = randn(batch, groups).mul(0.5).clamp(0, 1)
    logits = 3 * randn(batch, classes)
    bucket = torch.arange(batch) * 0x1234_5678_9ABC_DEF - 2**62
    return logits.to(dtype), similarity, 4 * randn(groups, classes), bucket


@pytest.fixture(params=RULES.values(), ids=RULES)
def rule(request):
    return request.param


@pytest.mark.parametrize(
    ("batch", "groups", "classes", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (5, 1, 2, torch.float32),
        (12, 3, 10, torch.float32),
        (33, 2, 100, torch.float32),
        (3, 17, 257, torch.float32),
        (12, 3, 37, torch.float16),
        (12, 3, 37, torch.bfloat16),
    ],
)
def test_agrees_with_the_float64_reference(backend, randn, rule, batch, groups, classes, dtype):
    logits, similarity, target, bucket = inputs(randn, batch, groups, classes, dtype)
    mixed, group, flipped = ops.watermark_mix(logits, similarity, target, bucket, rule=rule, seed=SEED)
    assert mixed.dtype == dtype
    wide = reference.watermark_mix(
        logits.double(), similarity.double(), target.double(), bucket, rule=rule, seed=SEED
    )
    assert torch.equal(group, wide[1])
    assert torch.equal(flipped, wide[2])
    assert_close(mixed, wide[0], MIXED[dtype])


def test_group_is_the_first_largest_similarity(backend, randn):
    logits, _, target, bucket = inputs(randn, 6, 4)
    nan = math.nan
    similarity = torch.tensor(
        [
            [0.0, 0.5, 0.5, 0.2],
            [0.0, 0.0, 0.0, 0.0],
            [nan, 0.0, 0.1, nan],
            [nan, nan, nan, nan],
            [1.0, 1.0, 1.0, 1.0],
            [0.0, 1e-38, 0.0, 0.0],
        ]
    )
    mixed, group, _ = ops.watermark_mix(logits, similarity, target, bucket, rule=WatermarkRule(), seed=1)
    assert group.tolist() == [1, 0, 2, 0, 0, 1]
    for row in (1, 3):
        assert torch.equal(mixed[row], logits[row])


@pytest.mark.parametrize("strength", [0.0, 0.2, 1.0])
def test_probability_space_mixes_distributions_and_keeps_the_log_sum(backend, randn, strength):
    logits, similarity, target, bucket = inputs(randn)
    rule = WatermarkRule(strength=strength, mixing_power=2.0)
    mixed, group, _ = ops.watermark_mix(logits, similarity, target, bucket, rule=rule, seed=1)
    weight = strength * similarity.double().amax(dim=1) ** 2
    expected = oracles.mixed_probabilities(logits, target[group], weight)
    assert_close(torch.softmax(mixed.double(), 1), expected, Tolerance(1e-5, 1e-7))
    assert_close(torch.logsumexp(mixed, 1), torch.logsumexp(logits, 1), Tolerance(1e-6, 1e-6))


def test_logit_space_mixes_logits(backend, randn):
    logits, similarity, target, bucket = inputs(randn)
    rule = WatermarkRule(space="logits", strength=0.7)
    mixed, group, _ = ops.watermark_mix(logits, similarity, target, bucket, rule=rule, seed=1)
    w = 0.7 * similarity.double().amax(dim=1, keepdim=True)
    assert_close(mixed, (1 - w) * logits.double() + w * target[group].double(), MIXED[torch.float32])


def test_confidence_shaping(backend, randn):
    z = torch.tensor([[0.0, 0.0, 0.0], [0.7, 0.0, 0.0], [5.0, 0.0, 0.0]])  # confidence 1/3, 0.50, 0.99
    s = torch.full((3, 1), 0.25)
    rule = WatermarkRule(
        space="logits", strength=1.0, low_confidence=0.4, low_power=0.5, high_confidence=0.9, high_power=2.0
    )
    target = torch.full((1, 3), 100.0)
    mixed, _, _ = ops.watermark_mix(z, s, target, torch.zeros(3, dtype=torch.int64), rule=rule, seed=1)
    weight = torch.tensor([[0.5], [0.25], [0.0625]])
    assert_close(mixed, (1 - weight) * z + weight * target, MIXED[torch.float32])


def test_flips_follow_their_probability_and_the_bins(backend):
    n = 4000
    rule = WatermarkRule(space="logits", strength=0.0, flip_bins=4, flip_power=2.0)
    bucket = torch.arange(n)
    target = torch.full((1, 2), 9.0)
    for s, p in ((0.4, 0.0), (0.5, 0.25), (0.8, 0.5), (1.0, 1.0)):
        mixed, _, flipped = ops.watermark_mix(
            torch.zeros(n, 2), torch.full((n, 1), s), target, bucket, rule=rule, seed=7
        )
        assert abs(flipped.double().mean() - p) <= 4 * math.sqrt(p * (1 - p) / n)
        assert torch.equal((mixed == 9).all(dim=1), flipped)


@given(
    s=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40),
    bins=st.integers(0, 50),
    power=st.sampled_from([0.25, 0.5, 1.0, 1.3, 2.0, 3.0, 4.0]),
    low=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(-(2**63), 2**63 - 41),
)
def test_every_backend_flips_the_same_rows(s, bins, power, low, seed, first):
    rule = WatermarkRule(flip_bins=bins, flip_power=power, low_confidence=low, low_power=0.25)
    similarity = torch.tensor(s)[:, None]
    logits = torch.linspace(-3, 3, 4 * len(s)).view(len(s), 4)
    bucket = torch.arange(len(s)) + first
    found = []
    for name in registry.PREFERENCE["cpu"]:
        if registry.unavailable(name, "cpu") is None:
            with registry.force(name):
                found.append(
                    ops.watermark_mix(logits, similarity, torch.ones(1, 4), bucket, rule=rule, seed=seed)[2]
                )
    assert all(torch.equal(flipped, found[0]) for flipped in found)
    probability = reference.flip_probability(
        reference.shape_similarity(similarity[:, 0], reference.confidence(logits), rule=rule), rule=rule
    )
    words = reference.philox4x32_10(
        (bucket & 0xFFFFFFFF, (bucket >> 32) & 0xFFFFFFFF, 0, 0), (seed & 0xFFFFFFFF, seed >> 32)
    )
    assert torch.equal(found[0], (words[0] < probability * 2.0**32) & (similarity[:, 0] > 0))


def test_recorded_flips_take_the_place_of_the_draw(randn):
    logits, similarity, target, bucket = inputs(randn)
    flips = torch.arange(12) % 2 == 0
    mixed, group, flipped = reference.watermark_mix(
        logits, similarity, target, bucket, rule=WatermarkRule(), seed=1, flipped=flips
    )
    assert torch.equal(flipped, flips & (similarity > 0).any(dim=1))
    assert torch.equal(mixed[flipped], target[group][flipped])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_answers_stay_finite(backend, dtype):
    limit = torch.finfo(dtype).max
    z = torch.tensor(
        [[limit, -limit, 0.0], [-limit, -limit, -limit], [limit, limit, limit], [1e4, -1e4, 0.0]]
    )
    z = z.to(dtype)
    huge = torch.finfo(torch.float32).max
    for target in ([[huge, -huge, 0.0]], [[-huge, huge, huge]], [[1e4, -1e4, 0.0]], [[-huge, -huge, -huge]]):
        for space in ("logits", "probabilities"):
            for strength in (1e-30, 1.0):
                for s in (1e-38, 0.3, 1.0):
                    mixed, _, _ = ops.watermark_mix(
                        z,
                        torch.full((4, 1), s),
                        torch.tensor(target),
                        torch.zeros(4, dtype=torch.int64),
                        rule=WatermarkRule(space=space, strength=strength, flip_bins=2),
                        seed=3,
                    )
                    assert torch.isfinite(mixed).all()
                    total = torch.softmax(mixed.float(), dim=1).sum(dim=1)
                    assert (total - 1).abs().max() < PROBABILITY_SUM


def test_layouts_and_modes(backend, randn, rule):
    logits, similarity, target, bucket = inputs(randn)
    expected = ops.watermark_mix(logits, similarity, target, bucket, rule=rule, seed=SEED)

    def same(*args):
        outputs = ops.watermark_mix(*args, rule=rule, seed=SEED)
        return all(torch.equal(a, e) for a, e in zip(outputs, expected, strict=True))

    spread = [torch.zeros(*x.shape, 2, dtype=x.dtype) for x in (logits, similarity, target, bucket)]
    for wide, x in zip(spread, (logits, similarity, target, bucket), strict=True):
        wide[..., 0] = x
    assert same(*(wide[..., 0] for wide in spread))
    assert same(logits.t().contiguous().t(), similarity.t().contiguous().t(), target, bucket)
    assert same(logits, similarity.double().float(), target, bucket)
    with torch.inference_mode():
        assert same(logits.clone(), similarity.clone(), target.clone(), bucket.clone())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(logits, similarity, target, bucket)
    with torch.device("meta"):
        assert same(logits, similarity, target, bucket)
    empty = ops.watermark_mix(logits[:0], similarity[:0], target, bucket[:0], rule=rule, seed=SEED)
    assert [list(x.shape) for x in empty] == [[0, 10], [0], [0]]
    before = [x.clone() for x in (logits, similarity, target, bucket)]
    ops.watermark_mix(logits, similarity, target, bucket, rule=rule, seed=SEED)
    assert all(torch.equal(x, y) for x, y in zip(before, (logits, similarity, target, bucket), strict=True))


# Gradients ------------------------------------------------------------------------------------------


def wide_inputs(randn):
    logits, similarity, target, bucket = inputs(randn, 8, 3, 5, torch.float64)
    similarity = similarity.double()
    similarity[0] = 0
    return logits, similarity, target.double(), bucket


def test_reference_gradcheck(randn, rule):
    logits, similarity, target, bucket = wide_inputs(randn)
    # In the interior: at 0 and 1 similarity has a kink, and NaN steps over it.
    similarity = torch.where(similarity > 0, similarity * 0.8 + 0.1, 0)

    def function(z, s, r):
        full = torch.where(similarity > 0, s, 0)
        return reference.watermark_mix(z, full, r, bucket, rule=rule, seed=SEED)[0]

    args = [x.clone().requires_grad_() for x in (logits, similarity, target)]
    assert torch.autograd.gradcheck(function, args)


def test_gradient_agrees_with_the_reference(any_level, randn, rule):
    logits, similarity, target, bucket = wide_inputs(randn)
    logits[1, 0] = torch.inf
    similarity[2] = torch.tensor([torch.nan, 0.2, 0.1])
    narrow = [x.float().requires_grad_() for x in (logits, similarity, target)]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    grad = randn(8, 5)
    outputs = ops.watermark_mix(*narrow, bucket, rule=rule, seed=SEED)
    expected = reference.watermark_mix(*wide, bucket, rule=rule, seed=SEED)
    assert torch.equal(outputs[2], expected[2])
    for actual, wanted in zip(
        torch.autograd.grad(outputs[0], narrow, grad),
        torch.autograd.grad(expected[0], wide, grad.double()),
        strict=True,
    ):
        assert_close(actual, torch.nan_to_num(wanted), GRADIENT)
    assert not outputs[1].requires_grad
    assert not outputs[2].requires_grad


def test_gradient_of_copied_and_flipped_rows(any_level, randn):
    logits, similarity, target, bucket = inputs(randn, 6, 2, 4)
    similarity[:] = 0
    similarity[3:, 1] = 1
    rule = WatermarkRule(flip_bins=1)  # similarity 1 always flips
    args = [x.requires_grad_() for x in (logits, similarity, target)]
    mixed, _, flipped = ops.watermark_mix(*args, bucket, rule=rule, seed=SEED)
    assert flipped.tolist() == [False] * 3 + [True] * 3
    grad = randn(6, 4)
    of_logits, of_similarity, of_target = torch.autograd.grad(mixed, args, grad)
    assert torch.equal(of_logits, torch.where(flipped[:, None], 0, grad))
    assert (of_similarity == 0).all()
    assert_close(of_target, torch.stack([torch.zeros(4), grad[3:].sum(0)]), GRADIENT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_has_the_inputs_dtypes(any_level, randn, dtype, rule):
    args = [x.to(dtype).requires_grad_() for x in inputs(randn)[:3]]
    mixed, _, _ = ops.watermark_mix(*args, inputs(randn)[3], rule=rule, seed=SEED)
    for x, grad in zip(args, torch.autograd.grad(mixed.float().square().sum(), args), strict=True):
        assert grad.dtype == dtype
        assert grad.shape == x.shape
        assert torch.isfinite(grad).all()


def test_backward_formula_in_float64(randn, rule):
    logits, similarity, target, bucket = wide_inputs(randn)
    args = [x.requires_grad_() for x in (logits, similarity, target)]
    mixed, group, flipped = reference.watermark_mix(*args, bucket, rule=rule, seed=SEED)
    grad = randn(8, 5, dtype=torch.float64)
    expected = torch.autograd.grad(mixed, args, grad)
    with torch.no_grad():
        actual = mix_backward(grad, *args, group, flipped, rule.mixing_numbers)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, Tolerance(1e-11, 1e-13))


# Tracing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(any_level, randn, gradient):
    logits, similarity, target, bucket = inputs(randn)
    args = [x.requires_grad_(gradient) for x in (logits, similarity, target)]
    rule = RULES["all of it"]
    torch.library.opcheck(
        torch.ops.honeytrace.watermark_mix.default, (*args, bucket, list(rule.mixing_numbers), -5)
    )


def test_compiles_without_a_break(randn):
    rule = RULES["all of it"]

    def function(logits, similarity, target, bucket):
        return ops.watermark_mix(logits, similarity, target, bucket, rule=rule, seed=SEED)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 9):
        args = inputs(randn, batch)
        for actual, expected in zip(compiled(*args), function(*args), strict=True):
            assert torch.equal(actual, expected)


# Bad input ------------------------------------------------------------------------------------------

Z, S, R, K = torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(1, 3), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize("function", [ops.watermark_mix, reference.watermark_mix])
@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((None, S, R, K), TypeError, r"logits must be a torch.Tensor \[B, C\], got NoneType"),
        ((Z.int(), S, R, K), TypeError, "logits must have dtype"),
        ((Z[0], S, R, K), ValueError, r"logits must have shape \[B, C\], got \[3\]"),
        ((Z[:, :0], S, R[:, :0], K), ValueError, "logits must have shape .* without empty dimensions"),
        ((Z, S.int(), R, K), TypeError, "similarity must have dtype"),
        (
            (Z, S[:1], R, K),
            ValueError,
            r"similarity must have B=2 in dimension 0 as logits has, got shape \[1, 1\]",
        ),
        ((Z, S[:, :0], R[:0], K), ValueError, "similarity must have shape"),
        ((Z, S, R.int(), K), TypeError, "target_logits must have dtype"),
        ((Z, S, R[0], K), ValueError, r"target_logits must have shape \[G, C\], got \[3\]"),
        (
            (Z, S, R.expand(2, 3), K),
            ValueError,
            "target_logits must have G=1 in dimension 0 as similarity has",
        ),
        ((Z, S, R[:, :2], K), ValueError, "target_logits must have C=3 in dimension 1 as logits has"),
        ((Z, S, R * torch.nan, K), ValueError, "target_logits must be finite"),
        ((Z, S, R, K.int()), TypeError, "bucket must have dtype int64, got torch.int32"),
        ((Z, S, R, K.float()), TypeError, "bucket must have dtype int64"),
        ((Z, S, R, K[:1]), ValueError, "bucket must have B=2"),
        ((Z, S, R, K[:, None]), ValueError, r"bucket must have shape \[B\]"),
        ((Z, S.to("meta"), R, K), ValueError, "similarity must be on the device of logits, cpu, got meta"),
        ((Z, S, R.to("meta"), K), ValueError, "target_logits must be on the device"),
        ((Z, S, R, K.to("meta")), ValueError, "bucket must be on the device"),
    ],
)
def test_bad_input_is_named(function, args, error, text):
    with pytest.raises(error, match=text):
        function(*args, rule=WatermarkRule(), seed=1)


@pytest.mark.parametrize("function", [ops.watermark_mix, reference.watermark_mix])
@pytest.mark.parametrize(
    ("seed", "error", "text"),
    [
        (-1, ValueError, "seed must be between 0 and 2"),
        (2**64, ValueError, "seed must be between 0 and 2"),
        (1.5, TypeError, "seed must be an int, got float"),
        (True, TypeError, "seed must be an int, got bool"),
    ],
)
def test_a_bad_seed_is_refused_and_not_shown(function, seed, error, text):
    with pytest.raises(error, match=text) as caught:
        function(Z, S, R, K, rule=WatermarkRule(), seed=seed)
    assert str(2**64) not in str(caught.value)


def test_the_rule_must_be_one():
    for function in (ops.watermark_mix, reference.watermark_mix):
        with pytest.raises(TypeError, match="rule must be a WatermarkRule, got dict"):
            function(Z, S, R, K, rule={}, seed=1)


def test_float64_points_to_the_reference():
    for args in ((Z.double(), S, R), (Z, S.double(), R), (Z, S, R.double())):
        with pytest.raises(TypeError, match="float64 is what honeytrace"):
            ops.watermark_mix(*args, K, rule=WatermarkRule(), seed=1)
