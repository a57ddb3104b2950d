"""Every op on a GPU, on every GPU backend, against the float64 reference on the CPU. One command: make
test-gpu

What needs no GPU is tested without one: the same kernels under Triton's interpreter (interpreted_triton.py)
and with fibres in place of GPU threads (test_cuda_kernels.py), and what they compile to.
"""

from __future__ import annotations

import pytest
import torch
from op_contract import METRICS, SEED, OpContract
from tolerances import MIXED, SIMILARITY, Tolerance, assert_close

from honeytrace import WatermarkRule, ops, reference
from honeytrace.ops import registry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
]

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


class TestGpu(OpContract):
    device = "cuda"
    exact_order = False

    distance_sizes = (
        (1, 1, 500, 512, 10),
        (5, 2, 37, 19, 4),
        (130, 3, 333, 131, 10),
        (65, 1, 1000, 200, 40),
    )
    neighbour_sizes = tuple(
        (batch, rows, 6, k)
        for rows, k in ((1, 1), (5, 5), (17, 16), (70, 65), (300, 300))
        for batch in (2, 40)
    )
    magnitude_sizes = ((3, 80, 9), (70, 80, 9))
    near_row_sizes = ((70, 1, 90, 200),)
    broken_query_sizes = ((3, 2, 90, 70, 64), (70, 2, 90, 70, 64))
    tie_sizes = ((2, 150), (70, 150))
    zero_norm_sizes = ((3, 90, 8, 90), (70, 90, 8, 90), (70, 90, 8, 4))
    half_feature_sizes = ((3, 2, 90, 72, 5), (70, 2, 90, 72, 5))
    gradient_sizes = ((6, 2, 29, 17, 3),)
    hash_sizes = ((1, 1, 1), (300, 513, 64), (3, 33, 63), (17, 64, 32))
    mixing_sizes = ((1, 1, 1), (300, 3, 10), (33, 5, 104), (7, 2, 5001))

    @pytest.mark.parametrize(("metric", "p"), METRICS)
    def test_a_row_alone_is_what_it_is_in_a_batch(self, randn, metric, p):
        q, b = randn(300, 530), randn(2, 700, 530)
        whole = self.nearest(q, b, 7, metric, p)
        for rows in ([7], [299, 0, 7], list(range(40)), list(range(299, 99, -1))):
            alone = self.nearest(q[rows], b, 7, metric, p)
            assert all(torch.equal(x, y[rows]) for x, y in zip(alone, whole, strict=True))

    # In place of the contract's: sums are rounded in another order here, so the answers are compared from the
    # similarities on.
    @pytest.mark.parametrize(("metric", "k"), [("l1", 5), ("l2", 5), ("cosine", 5), ("l2", 40)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_watermark_agrees_with_the_reference_and_stands_alone(self, randn, metric, k, dtype):
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


# The fused op ---------------------------------------------------------------------------------------


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
