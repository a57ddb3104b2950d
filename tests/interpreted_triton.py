"""The Triton kernels on CPU tensors. Not collected by itself: `test_triton.py` runs it, in a process in which
Triton was imported with TRITON_INTERPRET=1. By hand: TRITON_INTERPRET=1 pytest tests/interpreted_triton.py

The interpreter pays by the operation, so sizes are small and tiles smaller still: every loop runs more than
once and every edge is ragged. (With TRITON_INTERPRET=1 the fixture `backend` of all other tests has "triton"
too, for those who have an hour.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import oracles
import pytest
import torch
from tolerances import DISTANCE, GRADIENT, MIXED, NEAR_DISTANCE, SIMILARITY, Tolerance, assert_close

from honeytrace import WatermarkRule, ops, reference
from honeytrace.kernels import compose as compose_kernels
from honeytrace.kernels import feature_distance as kernels
from honeytrace.kernels import watermark_mix as mix_kernels
from honeytrace.kernels.configs import TABLE, Config, bank_splits, size_class
from honeytrace.kernels.language import INTERPRETED
from honeytrace.kernels.philox import philox
from honeytrace.ops import registry
from honeytrace.ops.bank import pack_panels

assert INTERPRETED, "run with TRITON_INTERPRET=1"

METRICS = [("l1", None), ("l2", None), ("lp", 3.0), ("lp", 1.5), ("lp", 4.7), ("lp", 1.0), ("cosine", None)]
CODES = ["l1", "l2", "lp", "cosine"]
TILES = {
    "tile": Config(block_q=4, block_m=16, warps=4),
    "few": Config(block_q=1, block_m=16, warps=4),
    "dot": Config(block_q=16, block_m=16, warps=4, block_d=16),
}
SEED = 0x8000_0000_DEAD_BEEF


@pytest.fixture(autouse=True)
def on_triton() -> Iterator[None]:
    with registry.force("triton"):
        yield


def nearest(q, b, k, metric, p=None, path="tile", parts=2, **extra):
    """Distance and indices by one path, in small tiles and several parts of the bank."""
    b = b.float().contiguous()
    return kernels.feature_distance(
        q,
        b,
        *pack_panels(b),
        k,
        CODES.index(metric),
        p or 1.0,
        path=path,
        config=TILES[path],
        parts=parts,
        **extra,
    )


def expected(q, b, k, metric, p=None):
    with registry.force("reference"):
        return torch.ops.honeytrace.feature_distance(q, b, None, None, k, CODES.index(metric), p or 1.0)


# Distances ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "p"), METRICS)
def test_distance_agrees_with_float64(randn, metric, p):
    q, b = randn(5, 19), randn(2, 21, 19)
    distance, index = nearest(q, b, 4, metric, p)
    assert_close(distance, oracles.feature_distance(q, b, k=4, metric=metric, p=p), DISTANCE[metric])
    assert torch.equal(index, expected(q, b, 4, metric, p)[1])


@pytest.mark.parametrize(("metric", "p"), [("l1", None), ("l2", None), ("lp", 1.5), ("cosine", None)])
def test_every_path_gives_the_same_bits(randn, metric, p):
    q, b = randn(2, 66), randn(1, 18, 66)
    b[0, 5] = q[0]
    one = nearest(q, b, 3, metric, p, parts=1)
    assert torch.equal(one[1], expected(q, b, 3, metric, p)[1])
    for path in ("tile", "few", "dot") if metric in ("l2", "cosine") else ("tile", "few"):
        for rows in (slice(0, 2), slice(1, 2)):
            found = nearest(q[rows], b, 3, metric, p, path=path)
            assert all(torch.equal(x, y[rows]) for x, y in zip(found, one, strict=True))


@pytest.mark.parametrize(("size", "k"), [(1, 1), (5, 5), (17, 16), (70, 65)])
def test_any_number_of_neighbours(randn, size, k):
    q, b = randn(2, 2), randn(1, size, 2)
    for path in ("tile", "few"):
        distance, index = nearest(q, b, k, "l1", path=path, parts=2)
        assert_close(distance, oracles.feature_distance(q, b, k=k), DISTANCE["l1"])
        assert torch.equal(index, expected(q, b, k, "l1")[1])


@pytest.mark.parametrize(("metric", "p"), [("l2", None), ("lp", 3.0), ("lp", 50.5), ("cosine", None)])
@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_extreme_magnitudes(randn, metric, p, scale):
    q, b = randn(3, 9), randn(1, 18, 9)
    wanted = oracles.feature_distance(q, b, k=2, metric=metric, p=p) * (1 if metric == "cosine" else scale)
    for path in ("tile", "few", "dot") if metric in ("l2", "cosine") else ("tile",):
        distance, _ = nearest(q * scale, b * scale, 2, metric, p, path=path)
        assert_close(distance, wanted, Tolerance(1e-5, 0.0))


@pytest.mark.parametrize(("metric", "p"), [("l1", None), ("l2", None), ("lp", 1.5), ("cosine", None)])
def test_near_rows_do_not_cancel(randn, metric, p):
    q = randn(2, 40) + 3
    b = q[:, None] * (1 + 1e-3 * randn(2, 20, 40))
    wanted = oracles.feature_distance(q, b, k=5, metric=metric, p=p)
    for path in ("tile", "dot") if metric in ("l2", "cosine") else ("tile",):
        assert_close(nearest(q, b, 5, metric, p, path=path)[0], wanted, NEAR_DISTANCE[metric])


def test_tensor_cores_prove_what_they_select(randn):
    q, b = randn(4, 20), randn(1, 60, 20)
    for metric in ("l2", "cosine"):
        seen = {}
        found = nearest(q, b, 2, metric, path="dot", statistics=seen)
        assert not seen["exhaustive"].any()
        assert torch.equal(found[1], expected(q, b, 2, metric)[1])


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_what_cannot_be_proven_is_searched_through(randn, metric):
    q = randn(3, 6)
    b = q[:1, None].expand(1, 50, 6) * torch.ones(
        50, 1
    )  # all rows equal: nothing distinguishes the candidates
    b = b.clone()
    b[0, 49] = q[2]
    q[1, 2] = torch.nan
    seen = {}
    distance, index = nearest(q, b, 2, metric, path="dot", parts=1, statistics=seen)
    assert seen["exhaustive"][:, 0].tolist() == [1, 0, 1]
    assert torch.equal(index, expected(q, b, 2, metric)[1])
    assert_close(distance, expected(q, b, 2, metric)[0], NEAR_DISTANCE[metric]._replace(absolute=1e-7))


def test_the_error_bound_of_the_expanded_form_holds(randn):
    # TF32 keeps 10 bits of the mantissa; here the three products are made of operands that were truncated to
    # it.
    def truncated(x):
        return (x.view(torch.int32) & -8192).view(torch.float32)

    for width in (3, 64, 500):
        q, b = randn(40, width), randn(60, width)
        b[:40] = q * (1 + 1e-4 * randn(40, width))
        (qh, ql), (bh, bl) = ((truncated(x), truncated(x - truncated(x))) for x in (q, b))
        dot = qh @ bh.t() + (qh @ bl.t() + ql @ bh.t())
        norms = [x.double().norm(dim=1).float() for x in (q, b)]
        squares = norms[0][:, None] ** 2 + norms[1] ** 2 - 2 * dot
        exact = ((q.double()[:, None] - b.double()) ** 2).sum(-1)
        limit = kernels.dot_error(width) * (norms[0][:, None] + norms[1]) ** 2
        assert ((squares - exact).abs() < limit / 2).all()


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_query_that_is_not_finite(randn, bad):
    q, b = randn(3, 5), randn(2, 18, 5)
    for path, metric in (("tile", "l1"), ("few", "l2"), ("dot", "cosine")):
        wanted = [x.clone() for x in nearest(q, b, 3, metric, path=path)]
        broken = q.clone()
        broken[1, 4] = bad
        wanted[0][1] = torch.inf
        wanted[1][1] = torch.arange(3)
        for actual, want in zip(nearest(broken, b, 3, metric, path=path), wanted, strict=True):
            assert torch.equal(actual, want)


def test_ties_go_to_the_lower_row():
    b = torch.zeros(1, 50, 3)
    b[0, 20:, 0] = 1
    b[0, ::2] = -b[0, ::2]
    for path in ("tile", "few"):
        assert nearest(torch.zeros(2, 3), b, 23, "l1", path=path)[1][0, 0].tolist() == list(range(23))


def test_norms_of_0_and_half_features(randn):
    q, b = randn(3, 8), randn(1, 18, 8)
    q[0] = 0
    b[0, 2] = 0
    for path in ("tile", "few", "dot"):
        distance, _ = nearest(q, b, 18 if path != "dot" else 4, "cosine", path=path)
        assert distance[0] == 1
    for dtype in (torch.float16, torch.bfloat16):
        x = q.to(dtype)
        for path in ("tile", "dot"):
            assert torch.equal(nearest(x, b, 3, "l2", path=path)[0], nearest(x.float(), b, 3, "l2")[0])


def test_distance_op_layouts_and_empty_batch(randn):
    q, b = randn(3, 6), randn(2, 11, 6)
    wanted = ops.feature_distance(q, ops.Bank(b), k=3)
    spread = torch.zeros(3, 12)
    spread[:, ::2] = q
    for features in (spread[:, ::2], q.t().contiguous().t(), torch.complex(q, -q).conj().imag.neg().neg()):
        assert torch.equal(
            ops.feature_distance(features, b.transpose(1, 2).contiguous().transpose(1, 2), k=3), wanted
        )
    assert ops.feature_distance(q[:0], b, k=3).shape == (0, 2)


def test_gradients(randn):
    q, b, weight = randn(3, 7), randn(2, 9, 7), randn(3, 2)
    for metric in ("l1", "l2", "cosine"):
        narrow = [x.clone().requires_grad_() for x in (q, b)]
        wide = [x.double().requires_grad_() for x in (q, b)]
        grads = torch.autograd.grad(
            (ops.feature_distance(*narrow, k=2, metric=metric) * weight).sum(), narrow
        )
        wanted = torch.autograd.grad(
            (reference.feature_distance(*wide, k=2, metric=metric) * weight).sum(), wide
        )
        for actual, want in zip(grads, wanted, strict=True):
            assert_close(actual, want, GRADIENT)


def test_paths_and_splits():
    assert kernels.choose_path(kernels.L2, 1, 500, 10) == "few"
    assert kernels.choose_path(kernels.L2, 256, 500, 10) == "dot"
    assert kernels.choose_path(kernels.COSINE, 256, 500, 50) == "tile"
    assert kernels.choose_path(kernels.L1, 256, 500, 10) == "tile"
    for programs in (1, 7, 1000):
        for tiles in (1, 2, 9, 31):
            parts = bank_splits(programs, tiles, torch.device("cpu"), 128)
            assert (parts - 1) * -(-tiles // parts) < tiles  # the last part is not empty
    assert all(c.block_q in (1, 16, 32, 64, 128) for c in TABLE.values())
    # On a device of one multiprocessor two tiles are enough.
    cpu = torch.device("cpu")
    assert size_class("tile", "l1", 16, 1, 128, cpu) == "small"
    assert size_class("tile", "l1", 17, 1, 128, cpu) == "large"
    assert size_class("dot", "l2", 64, 2, 64, cpu) == "large"
    assert [kernels.metric_name(*kernels._halves(2, p)) for p in (1, 2, 1.5, 4.7)] == [
        "l1",
        "l2",
        "lp",
        "lp any",
    ]


# Hash, Philox, mixing, compose ----------------------------------------------------------------------


def test_philox_known_answers_and_the_reference():
    counter = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    key = (0xA4093822, 0x299F31D0)
    known = torch.tensor([[*counter, *key], [0] * 6, [0xFFFFFFFF] * 6]).t()
    assert philox(known).t().tolist() == [
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ]
    words = torch.randint(0, 2**32, (6, 100), generator=torch.Generator().manual_seed(1))
    assert torch.equal(
        philox(words), torch.stack(reference.philox4x32_10(tuple(words[:4]), tuple(words[4:])))
    )


@pytest.mark.parametrize(("batch", "width", "planes"), [(1, 1, 1), (5, 70, 64), (3, 33, 63)])
def test_sign_hash(randn, batch, width, planes):
    q, normals = randn(batch, width), randn(planes, width)
    assert torch.equal(ops.sign_hash(q, normals), reference.sign_hash(q, normals))
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(ops.sign_hash(q.to(dtype), normals), ops.sign_hash(q.to(dtype).float(), normals))
    assert ops.sign_hash(torch.zeros(1, width), normals).item() == (1 << planes) - 1 - ((planes == 64) << 64)
    q[-1, 0] = torch.nan
    assert ops.sign_hash(q, normals)[-1] == 0


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


def answers(randn, batch, groups, classes, dtype=torch.float32):
    similarity = randn(batch, groups).mul(0.5).clamp(0, 1)
    bucket = torch.arange(batch) * 0x1234_5678_9ABC_DEF - 2**62
    return (3 * randn(batch, classes)).to(dtype), similarity, 4 * randn(groups, classes), bucket


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mixing_agrees_with_the_float64_reference(randn, rule, dtype):
    for shape in ((1, 1, 1), (7, 3, 10), (3, 5, 100)):
        logits, similarity, target, bucket = answers(randn, *shape, dtype)
        mixed, group, flipped = ops.watermark_mix(logits, similarity, target, bucket, rule=rule, seed=SEED)
        wide = reference.watermark_mix(
            logits.double(), similarity.double(), target.double(), bucket, rule=rule, seed=SEED
        )
        assert torch.equal(group, wide[1])
        assert torch.equal(flipped, wide[2])
        assert_close(mixed, wide[0], MIXED[dtype])


@pytest.mark.parametrize("name", ["published", "all of it"])
def test_mixing_in_several_tiles(randn, name):
    logits, similarity, target, bucket = answers(randn, 5, 2, 37)
    logits[1, 36] = torch.inf
    numbers = torch.tensor(RULES[name].mixing_numbers, dtype=torch.float64)
    found = [
        mix_kernels.watermark_mix(
            logits, similarity, target, bucket, numbers, int(numbers[4]), 5 - 2**63, tile=tile
        )
        for tile in (64, 16)
    ]
    for one, other in zip(*([x[i] for i in (0, 2, 3)] for x in found), strict=True):
        assert_close(one, other, MIXED[torch.float32])


@pytest.mark.parametrize("power", [0.25, 1.3, 3.0, 4.0])
def test_flips_are_those_of_the_reference(power):
    # Similarities at which s ^ power * bins is a whole number, and their neighbours, decide on the last bit.
    steps = torch.arange(9) / 8
    s = torch.cat([steps, steps.nextafter(torch.tensor(0.0)), steps**4])[:, None]
    rule = WatermarkRule(
        flip_bins=8, flip_power=power, low_confidence=1.0, low_power=0.25 if power > 1 else 1.0
    )
    logits = torch.linspace(-3, 3, 2 * len(s)).view(-1, 2)
    bucket = torch.arange(len(s)) - 2**40
    wanted = reference.watermark_mix(logits, s, torch.ones(1, 2), bucket, rule=rule, seed=SEED)[2]
    assert torch.equal(
        ops.watermark_mix(logits, s, torch.ones(1, 2), bucket, rule=rule, seed=SEED)[2], wanted
    )
    assert 0 < wanted.sum() < len(s)


def test_rows_that_keep_their_bits(randn):
    logits, similarity, target, bucket = answers(randn, 6, 2, 5)
    similarity[:2] = 0
    similarity[2] = torch.nan
    logits[0, 1] = -0.0
    logits[3, 2] = torch.inf
    logits.view(torch.int32)[4, 0] = 0x7FC12345
    similarity[5] = torch.tensor([0.5, 0.5])
    mixed, group, flipped = ops.watermark_mix(
        logits, similarity, target, bucket, rule=RULES["all of it"], seed=1
    )
    assert torch.equal(mixed[:5].view(torch.int32), logits[:5].view(torch.int32))
    assert group.tolist() == [0] * 6
    assert not flipped[:5].any()


def test_answers_stay_finite():
    for dtype in (torch.float32, torch.float16):
        limit = torch.finfo(dtype).max
        z = torch.tensor([[limit, -limit, 0.0], [-limit, -limit, -limit], [limit, limit, limit]]).to(dtype)
        huge = torch.finfo(torch.float32).max
        for target in ([[huge, -huge, 0.0]], [[-huge, -huge, -huge]]):
            for space in ("logits", "probabilities"):
                for strength in (0.0, 0.5, 1.0):
                    rule = WatermarkRule(space=space, strength=strength, flip_bins=2)
                    s, bucket = torch.full((3, 1), 0.3), torch.zeros(3, dtype=torch.int64)
                    mixed = ops.watermark_mix(z, s, torch.tensor(target), bucket, rule=rule, seed=3)[0]
                    assert torch.isfinite(mixed).all()


@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (1, 1, 2, 5), (2, 5), (4, 1, 1, 1), (), (2, 1), (3, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compose(randn, shape, dtype):
    a, b = randn(4, 3, 2, 5, dtype=dtype), randn(4, 3, 2, 5, dtype=dtype)
    mask = randn(*shape).sigmoid().round(decimals=1).sub(0.3).clamp(0, 0.4).mul(2.5)
    a[0, 0, 0, 0] = torch.nan
    out, wanted = ops.compose(a, b, mask), reference.compose(a, b, mask)
    exact = ((mask == 0) | (mask == 1)).expand(a.shape)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(integers)[exact], wanted.view(integers)[exact])
    # To bfloat16 the interpreter truncates, where the GPU rounds: one unit.
    unit = Tolerance(0.0 if dtype == torch.float32 else 2.0**-7, 0.0)
    assert_close(out[~exact].nan_to_num(7), wanted[~exact].nan_to_num(7), unit)


def test_compose_collapses_dimensions():
    walk: Callable[..., object] = compose_kernels._collapse
    assert walk(torch.Size([4, 3, 8, 8]), (192, 64, 8, 1)) == ([768], [1])
    assert walk(torch.Size([4, 3, 8, 8]), (0, 0, 8, 1)) == ([12, 64], [0, 1])
    assert walk(torch.Size([4, 3, 8, 8]), (1, 0, 0, 0)) == ([4, 192], [1, 0])


# The fused op ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l1", "cosine"])
def test_watermark_agrees_with_the_reference_and_stands_alone(randn, metric):
    rule = WatermarkRule(
        metric=metric, offset=(1.5, 1.4), scale=0.7, confidence_weight=0.1, k=3, flip_bins=5, strength=0.6
    )
    q, z, b, r, planes = randn(6, 12), 2 * randn(6, 7), randn(2, 15, 12), 3 * randn(2, 7), randn(64, 12)
    q[2, 3] = torch.nan
    z[4, 0] = -torch.inf
    output = ops.watermark(q, z, ops.Bank(b), r, planes, rule=rule, seed=SEED)
    wanted = reference.watermark(q, z, b, r, planes, rule=rule, seed=SEED)
    assert (output.similarity > 0).any()
    assert_close(output.similarity, wanted.similarity, SIMILARITY)
    assert torch.equal(output.group, wanted.group)
    assert torch.equal(output.flipped, wanted.flipped)
    assert_close(output.logits, wanted.logits, Tolerance(1e-5, 2e-5))
    for rows in (torch.tensor([5]), torch.tensor([3, 2, 0])):
        alone = ops.watermark(q[rows], z[rows], ops.Bank(b), r, planes, rule=rule, seed=SEED)
        for one, whole in zip(alone, output, strict=True):
            assert torch.equal(
                one.nan_to_num(7) if one.is_floating_point() else one,
                whole[rows].nan_to_num(7) if whole.is_floating_point() else whole[rows],
            )


def test_half_answers_of_the_fused_op(randn):
    rule = WatermarkRule(offset=1.6, k=2)
    args = randn(2, 5).half(), randn(2, 3).bfloat16(), randn(1, 6, 5), randn(1, 3), randn(8, 5)
    output = ops.watermark(*args, rule=rule, seed=1)
    assert output.logits.dtype == torch.bfloat16
    assert_close(output.logits, reference.watermark(*args, rule=rule, seed=1).logits, MIXED[torch.bfloat16])


def test_opcheck(randn):
    torch.library.opcheck(
        torch.ops.honeytrace.feature_distance.default, (randn(2, 4), randn(1, 5, 4), None, None, 2, 0, 1.0)
    )
    torch.library.opcheck(torch.ops.honeytrace.sign_hash.default, (randn(2, 4), randn(3, 4)))
