"""Every op on a GPU, on every GPU backend, against the float64 reference on the CPU. One command: make
test-gpu

What needs no GPU is tested without one: the same kernels under Triton's interpreter (interpreted_triton.py)
and with fibres in place of GPU threads (test_cuda_kernels.py), and what they compile to.
"""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from tolerances import DISTANCE, GRADIENT, MIXED, NEAR_DISTANCE, SIMILARITY, Tolerance, assert_close

from honeytrace import WatermarkRule, ops, reference
from honeytrace.ops import registry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
]

METRICS = [
    ("l1", None),
    ("l2", None),
    ("lp", 3.0),
    ("lp", 1.5),
    ("lp", 4.0),
    ("lp", 2.5),
    ("lp", 4.7),
    ("cosine", None),
]
CODES = ["l1", "l2", "lp", "cosine"]
SEED = 0x8000_0000_DEAD_BEEF
RULE = WatermarkRule(offset=1.15, scale=0.3, k=5, confidence_weight=0.1, strength=0.6, flip_bins=5)


@pytest.fixture(params=["cuda", "triton"], autouse=True)
def gpu_backend(request):
    reason = registry.unavailable(request.param, "cuda")
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    with registry.force(request.param):
        yield request.param


def world(randn, batch=70, groups=3, size=150, width=130, classes=37):
    """features, logits, bank, target_logits, planes; on the GPU."""
    tensors = (
        randn(batch, width),
        2 * randn(batch, classes),
        randn(groups, size, width),
        3 * randn(groups, classes),
        randn(64, width),
    )
    return tuple(x.cuda() for x in tensors)


def nearest(q, b, k, metric, p=None):
    found = torch.ops.honeytrace.feature_distance(
        q.cuda(), b.cuda(), None, None, k, CODES.index(metric), p or 1.0
    )
    return tuple(x.cpu() for x in found)


def on_cpu(name, *args):
    with registry.force("reference"):
        return getattr(torch.ops.honeytrace, name)(*args)


# Distances ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "p"), METRICS)
@pytest.mark.parametrize(
    ("batch", "groups", "size", "width", "k"),
    [(1, 1, 500, 512, 10), (5, 2, 37, 19, 4), (130, 3, 333, 131, 10), (65, 1, 1000, 200, 40)],
)
def test_distance_agrees_with_float64(randn, metric, p, batch, groups, size, width, k):
    q, b = randn(batch, width), randn(groups, size, width)
    distance, index = nearest(q, b, k, metric, p)
    assert_close(distance, oracles.feature_distance(q, b, k=k, metric=metric, p=p), DISTANCE[metric])
    # Rows whose distances differ by less than rounding may change places: what they are at is compared.
    pairs = torch.from_numpy(oracles.pair_distances(q, b, metric, p))
    found = pairs.gather(2, index.long())
    assert_close(found, pairs.sort(dim=2).values[..., :k], DISTANCE[metric])
    assert (index.sort(dim=2).values.diff(dim=2) > 0).all()


@pytest.mark.parametrize(("metric", "p"), METRICS)
def test_a_row_alone_is_what_it_is_in_a_batch(randn, metric, p):
    q, b = randn(300, 530), randn(2, 700, 530)
    whole = nearest(q, b, 7, metric, p)
    for rows in ([7], [299, 0, 7], list(range(40)), list(range(299, 99, -1))):
        alone = nearest(q[rows], b, 7, metric, p)
        assert all(torch.equal(x, y[rows]) for x, y in zip(alone, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_half_features_and_odd_addresses(randn, metric, dtype):
    for batch in (3, 70):
        q, b = randn(batch, 72).to(dtype), randn(2, 90, 72)
        wanted = nearest(q.float(), b, 5, metric)
        odd = torch.zeros(batch, 75, dtype=dtype, device="cuda")[:, 1:73].copy_(q)
        for features in (q, odd, q.t().contiguous().t()):
            found = nearest(features, b, 5, metric)
            assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("size", "k"), [(1, 1), (5, 5), (17, 16), (70, 65), (300, 300)])
def test_any_number_of_neighbours(randn, size, k):
    for batch in (2, 40):
        q, b = randn(batch, 6), randn(1, size, 6)
        distance, _ = nearest(q, b, k, "l1")
        assert_close(distance, oracles.feature_distance(q, b, k=k), DISTANCE["l1"])
    assert nearest(torch.zeros(40, 3), torch.zeros(1, size, 3), k, "l1")[1][-1, 0].tolist() == list(range(k))


@pytest.mark.parametrize(("metric", "p"), [("l2", None), ("lp", 3.0), ("lp", 50.5), ("cosine", None)])
@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_extreme_magnitudes(randn, metric, p, scale):
    for batch in (3, 70):
        q, b = randn(batch, 9), randn(1, 80, 9)
        wanted = oracles.feature_distance(q, b, k=2, metric=metric, p=p)
        wanted = wanted * (1 if metric == "cosine" else scale)
        assert_close(nearest(q * scale, b * scale, 2, metric, p)[0], wanted, Tolerance(1e-5, 0.0))


@pytest.mark.parametrize(("metric", "p"), [("l1", None), ("l2", None), ("lp", 1.5), ("cosine", None)])
def test_near_rows_do_not_cancel(randn, metric, p):
    q = randn(70, 200) + 3
    b = q[:1, None] * (1 + 1e-3 * randn(1, 90, 200))
    wanted = oracles.feature_distance(q, b, k=5, metric=metric, p=p)
    for rows in (slice(0, 1), slice(0, 70)):
        assert_close(nearest(q[rows], b, 5, metric, p)[0], wanted[rows], NEAR_DISTANCE[metric])


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_query_that_is_not_finite(randn, bad):
    for batch, metric in ((3, "l1"), (70, "l2"), (70, "cosine")):
        q, b = randn(batch, 70), randn(2, 90, 70)
        wanted = [x.clone() for x in nearest(q, b, 3, metric)]
        q[1, 64] = bad
        wanted[0][1] = torch.inf
        wanted[1][1] = torch.arange(3)
        assert all(torch.equal(x, y) for x, y in zip(nearest(q, b, 3, metric), wanted, strict=True))


@pytest.mark.parametrize(("metric", "p"), [("l1", None), ("l2", None), ("lp", 3.0), ("cosine", None)])
def test_gradients(randn, metric, p):
    q, b, weight = randn(6, 17), randn(2, 29, 17), randn(6, 2)
    narrow = [x.cuda().requires_grad_() for x in (q, b)]
    wide = [x.double().requires_grad_() for x in (q, b)]
    loss = (ops.feature_distance(*narrow, k=3, metric=metric, p=p) * weight.cuda()).sum()
    wanted = torch.autograd.grad(
        (reference.feature_distance(*wide, k=3, metric=metric, p=p) * weight).sum(), wide
    )
    for actual, want in zip(torch.autograd.grad(loss, narrow), wanted, strict=True):
        assert_close(actual.cpu(), want, GRADIENT)


# Hash, mixing, compose ------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "width", "planes"), [(1, 1, 1), (300, 513, 64), (3, 33, 63), (17, 64, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sign_hash(randn, batch, width, planes, dtype):
    q, normals = randn(batch, width).to(dtype), randn(planes, width)
    q[-1, 0] = torch.nan
    found = ops.sign_hash(q.cuda(), normals.cuda()).cpu()
    dots = q.double() @ normals.double().t()
    # A product within rounding of 0 may fall on either side.
    sure = dots.abs() > 1e-5 * (q.double().norm(dim=1)[:, None] * normals.double().norm(dim=1))
    bits = (found[:, None] >> torch.arange(planes)) & 1
    assert (bits == (dots >= 0))[:-1][sure[:-1]].all()
    assert found[-1] == 0


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


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mixing_agrees_with_the_float64_reference(randn, rule, dtype):
    for batch, groups, classes in ((1, 1, 1), (300, 3, 10), (33, 5, 104), (7, 2, 5001)):
        similarity = randn(batch, groups).mul(0.5).clamp(0, 1)
        bucket = torch.arange(batch) * 0x1234_5678_9ABC_DEF - 2**62
        logits, target = (3 * randn(batch, classes)).to(dtype), 4 * randn(groups, classes)
        args = [x.cuda() for x in (logits, similarity, target, bucket)]
        mixed, group, flipped = (x.cpu() for x in ops.watermark_mix(*args, rule=rule, seed=SEED))
        wide = reference.watermark_mix(
            logits.double(), similarity.double(), target.double(), bucket, rule=rule, seed=SEED
        )
        assert torch.equal(group, wide[1])
        assert torch.equal(flipped, wide[2])
        assert_close(mixed, wide[0], MIXED[dtype])


@pytest.mark.parametrize("power", [0.25, 0.7, 1.3, 3.0, 4.0])
def test_flips_are_those_of_the_reference(power):
    steps = torch.arange(9) / 8
    s = torch.cat([steps, steps.nextafter(torch.tensor(0.0)), steps**4])[:, None]
    rule = WatermarkRule(
        flip_bins=8, flip_power=power, low_confidence=1.0, low_power=0.25 if power > 1 else 1.0
    )
    logits = torch.linspace(-3, 3, 2 * len(s)).view(-1, 2)
    bucket = torch.arange(len(s)) - 2**40
    args = logits, s, torch.ones(1, 2), bucket
    wanted = reference.watermark_mix(*args, rule=rule, seed=SEED)[2]
    found = ops.watermark_mix(*(x.cuda() for x in args), rule=rule, seed=SEED)[2].cpu()
    assert torch.equal(found, wanted)
    assert 0 < wanted.sum() < len(s)


@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (1, 1, 2, 5), (4, 1, 1, 1), (), (2, 1), (3, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compose(randn, shape, dtype):
    a, b = randn(4, 3, 2, 5, dtype=dtype), randn(4, 3, 2, 5, dtype=dtype)
    mask = randn(*shape).sigmoid().round(decimals=1).sub(0.3).clamp(0, 0.4).mul(2.5)
    a[0, 0, 0, 0] = torch.nan
    out = ops.compose(a.cuda(), b.cuda(), mask.cuda()).cpu()
    wanted = reference.compose(a, b, mask)
    exact = ((mask == 0) | (mask == 1)).expand(a.shape)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(integers)[exact], wanted.view(integers)[exact])
    assert torch.equal(out.nan_to_num(7), wanted.nan_to_num(7))


# The fused op ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "k"), [("l1", 5), ("l2", 5), ("cosine", 5), ("l2", 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_watermark_agrees_with_the_reference_and_stands_alone(randn, metric, k, dtype):
    offsets = {"l1": 1.1, "l2": 1.3, "cosine": 0.9}
    rule = WatermarkRule(
        metric=metric, offset=offsets[metric], scale=0.5, confidence_weight=0.1, k=k, strength=0.6
    )
    q, z, b, r, planes = world(randn, batch=200)
    q[:90] = b[0, 3] + 0.6 * q[:90]
    q[2, 3], z[4, 0] = torch.nan, -torch.inf
    q, z = q.to(dtype), z.to(dtype)
    bank = ops.Bank(b)
    output = ops.watermark(q, z, bank, r, planes, rule=rule, seed=SEED)
    args = [x.cpu() for x in (q, z, b, r, planes)]
    wanted = reference.watermark(*args, rule=rule, seed=SEED)
    assert 0 < (output.similarity > 0).sum() < output.similarity.numel()
    assert_close(output.similarity.cpu(), wanted.similarity, SIMILARITY)
    # From the similarities on, the answers are those of the float64 mixing.
    bucket = torch.zeros(len(z), dtype=torch.int64)
    mixed, group, _ = reference.watermark_mix(
        z.cpu().double(), output.similarity.cpu().double(), r.cpu().double(), bucket, rule=rule, seed=SEED
    )
    assert torch.equal(output.group.cpu(), group)
    assert_close(output.logits.cpu(), mixed, MIXED[dtype])
    for rows in ([199], [4, 3, 2, 0], list(range(50, 150))):
        alone = ops.watermark(q[rows], z[rows], bank, r, planes, rule=rule, seed=SEED)
        for one, whole in zip(alone, output, strict=True):
            assert torch.equal(one.nan_to_num(7), whole[rows].nan_to_num(7))


def test_far_queries_keep_their_answers_bit_for_bit(randn):
    q, z, b, r, planes = world(randn, batch=300, width=512)
    output = ops.watermark(4 * q, z, ops.Bank(b), r, planes, rule=RULE, seed=SEED)
    assert not output.similarity.any()
    assert torch.equal(output.logits, z)
    # Where the distance counts, it is the one that is computed without a threshold.
    distance = ops.feature_distance(q, b, k=RULE.k)
    near = ops.watermark(q, z, ops.Bank(b), r, planes, rule=RULE, seed=SEED)
    assert (near.similarity > 0).any()
    assert_close(near.similarity, reference.similarity(distance, z, rule=RULE), Tolerance(0.0, 1e-6))


def test_a_bank_is_packed_once_and_again_after_a_change(randn):
    q, _, b, _, _ = world(randn)
    bank = ops.Bank(b)
    packed = bank.packed
    first = ops.feature_distance(q, bank)
    assert bank.packed is packed
    bank.rows.mul_(2)
    assert torch.equal(ops.feature_distance(q, bank), ops.feature_distance(q, 2 * b))
    assert torch.equal(ops.feature_distance(q, b), first)
    assert ops.Bank(b.cpu()).to("cuda").packed.is_cuda


# Streams, devices, graphs, compilers ----------------------------------------------------------------


def outputs_of(q, z, bank, r, planes):
    return ops.watermark(q, z, bank, r, planes, rule=RULE, seed=SEED)


def test_the_current_stream_is_used(randn):
    args = world(randn)
    args = (*args[:2], ops.Bank(args[2]), *args[3:])
    wanted = outputs_of(*args)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Long work first: a launch on another stream would read features that are not there yet.
        late = torch.full_like(args[0], torch.nan)
        slow = torch.randn(2000, 2000, device="cuda")
        for _ in range(20):
            slow = slow @ slow
            slow = slow / slow.norm()
        late.copy_(args[0])
        found = outputs_of(late, *args[1:])
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_tensors_on_another_device_than_the_current_one(randn):
    args = world(randn)
    wanted = outputs_of(*args[:2], ops.Bank(args[2]), *args[3:])
    moved = [x.to("cuda:1") for x in args]
    with torch.cuda.device(0):
        found = outputs_of(*moved[:2], ops.Bank(moved[2]), *moved[3:])
        assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in found)
    assert all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("batch", [4, 200])
def test_cuda_graph(randn, batch):
    q, z, b, r, planes = world(randn, batch=batch)
    bank = ops.Bank(b)
    outputs_of(q, z, bank, r, planes)  # what is done once is not captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs_of(q, z, bank, r, planes)
    other = world(randn, batch=batch)
    q.copy_(other[0])
    z.copy_(other[1])
    graph.replay()
    torch.cuda.synchronize()
    wanted = outputs_of(q, z, bank, r, planes)
    assert all(torch.equal(x, y) for x, y in zip(captured, wanted, strict=True))


def test_no_call_waits_for_the_device(randn):
    q, z, b, r, planes = world(randn)
    bank = ops.Bank(b)
    outputs_of(q, z, bank, r, planes)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs_of(q, z, bank, r, planes)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_torch_compile(randn):
    q, z, b, r, planes = world(randn)
    bank = ops.Bank(b)
    wanted = outputs_of(q, z, bank, r, planes)
    compiled = torch.compile(outputs_of, fullgraph=True)
    assert all(torch.equal(x, y) for x, y in zip(compiled(q, z, bank, r, planes), wanted, strict=True))


def test_many_threads(randn):
    from concurrent.futures import ThreadPoolExecutor

    args = world(randn)
    args = (*args[:2], ops.Bank(args[2]), *args[3:])
    wanted = outputs_of(*args)

    def work(_):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = outputs_of(*args)
            torch.cuda.current_stream().synchronize()
        return found

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(work, range(16)):
            assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def test_opcheck(randn):
    q, _, b, _, planes = world(randn, batch=3, size=12, width=8)
    torch.library.opcheck(torch.ops.honeytrace.feature_distance.default, (q, b, None, None, 2, 0, 1.0))
    torch.library.opcheck(torch.ops.honeytrace.sign_hash.default, (q, planes))
