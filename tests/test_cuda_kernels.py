"""The CUDA kernels, run on the CPU: csrc/cuda compiled with the fibres of tests/simt in place of a GPU's
threads.

Everything but the machine code is what runs on a GPU: Python backend, bindings, launchers, and each kernel
with its barriers, warp votes, copies to shared memory and tails. (How they compile for a GPU is
test_cuda_compile.py; on a GPU they are test_gpu_ops.py.)
"""

from __future__ import annotations

import math

import oracles
import pytest
import simt_module
import torch
from tolerances import DISTANCE, GRADIENT, MIXED, NEAR_DISTANCE, SIMILARITY, Tolerance, assert_close

from honeytrace import WatermarkRule, ops, reference
from honeytrace.ops import cuda_backend, registry

pytest.importorskip("pybind11", reason="pybind11 is not installed")
# One process: the kernels are compiled once.
pytestmark = [
    pytest.mark.xdist_group("cuda_simt"),
    pytest.mark.skipif(simt_module.compiler() is None, reason="there is no C++ compiler"),
]

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
SEED = 0x8000_0000_DEAD_BEEF
FEW, TILE = 1000, 1  # multiprocessors with which 16 and more queries take the one kernel or the other


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    return simt_module.build(tmp_path_factory.mktemp("simt"))


class Machine:
    """How many multiprocessors the launchers believe in, and the workspace of the last call."""

    def __init__(self, module):
        self.module, self.multiprocessors, self.workspace = module, TILE, torch.empty(0)

    def plan(self, features, bank, k):
        (batch, width), (groups, size, _) = features.shape, bank.shape
        return self.module.plan(batch, width, groups, size, k, self.multiprocessors)

    def flags(self, features, bank, k, name="skipped"):
        """Bytes [B, G, parts] of `skipped`, or [B, G] of `exhaustive`, that the last call left."""
        plan, batch, groups = self.plan(features, bank, k), len(features), len(bank)
        shape = (batch, groups, plan["parts"]) if name == "skipped" else (batch, groups)
        return self.workspace[plan[name] :][: math.prod(shape)].view(shape)


@pytest.fixture(autouse=True)
def machine(module, monkeypatch):
    machine = Machine(module)
    allocate = cuda_backend._workspace

    def remembered(*args):
        machine.workspace = allocate(*args)
        machine.workspace.fill_(0xA5)  # what a kernel does not write itself it cannot rely on
        return machine.workspace

    monkeypatch.setattr(cuda_backend, "_cuda", module, raising=False)
    monkeypatch.setattr(cuda_backend, "unavailable", lambda device_type: None)
    monkeypatch.setattr(cuda_backend, "_multiprocessors", lambda device: machine.multiprocessors)
    monkeypatch.setattr(cuda_backend, "_workspace", remembered)
    with registry.force("cuda"):
        yield machine


def nearest(q, b, k, metric, p=None):
    return torch.ops.honeytrace.feature_distance(q, b, None, None, k, CODES.index(metric), p or 1.0)


def expected(q, b, k, metric, p=None):
    with registry.force("reference"):
        return nearest(q, b, k, metric, p)


# Distances ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "p"), METRICS)
@pytest.mark.parametrize(("batch", "multiprocessors"), [(5, TILE), (70, TILE), (18, FEW)])
def test_distance_agrees_with_float64(randn, machine, metric, p, batch, multiprocessors):
    machine.multiprocessors = multiprocessors
    q, b = randn(batch, 83), randn(2, 75, 83)
    assert machine.plan(q, b, 4)["few"] == (batch != 70)
    distance, index = nearest(q, b, 4, metric, p)
    assert_close(distance, oracles.feature_distance(q, b, k=4, metric=metric, p=p), DISTANCE[metric])
    assert torch.equal(index, expected(q, b, 4, metric, p)[1])


@pytest.mark.parametrize(("metric", "p"), [("l1", None), ("lp", 1.5), ("lp", 4.7), ("cosine", None)])
def test_kernels_parts_and_positions_give_the_same_bits(randn, machine, metric, p):
    q, b = randn(66, 530), randn(1, 130, 530)  # more features than eight slices
    whole = nearest(q, b, 3, metric, p)
    assert machine.plan(q, b, 3)["parts"] == 2
    for rows in ([7], [65, 0, 7]):
        alone = nearest(q[rows], b, 3, metric, p)
        assert machine.plan(q[rows], b, 3)["few"]
        assert all(torch.equal(x, y[rows]) for x, y in zip(alone, whole, strict=True))
    machine.multiprocessors = FEW
    assert machine.plan(q, b, 3)["few"]
    assert machine.plan(q[:40], b, 3)["parts"] == 3
    assert all(torch.equal(x, y[:20]) for x, y in zip(nearest(q[:20], b, 3, metric, p), whole, strict=True))


@pytest.mark.parametrize(
    ("order", "copies"), [("reverse", "late"), ("shuffle", "early"), ("as it is", "early")]
)
def test_no_answer_hangs_on_the_order_of_threads_and_copies(randn, machine, monkeypatch, order, copies):
    q, z, b, r = randn(20, 70), 2 * randn(20, 9), randn(2, 70, 70), 3 * randn(2, 9)
    planes = randn(64, 70)
    rule = WatermarkRule(offset=1.15, scale=0.3, k=5, metric="l1", flip_bins=4, confidence_weight=0.1)
    for machine.multiprocessors in (TILE, FEW):
        ordered = ops.watermark(q, z, b, r, planes, rule=rule, seed=SEED)
        with monkeypatch.context() as patch:
            patch.setenv("HT_SIMT_ORDER", order)
            patch.setenv("HT_SIMT_COPIES", copies)
            other = ops.watermark(q, z, b, r, planes, rule=rule, seed=SEED)
        assert all(torch.equal(x, y) for x, y in zip(ordered, other, strict=True))


@pytest.mark.parametrize(("size", "k"), [(1, 1), (5, 5), (17, 16), (70, 65)])
def test_any_number_of_neighbours(randn, size, k):
    for batch in (2, 17):
        q, b = randn(batch, 2), randn(1, size, 2)
        distance, index = nearest(q, b, k, "l1")
        assert_close(distance, oracles.feature_distance(q, b, k=k), DISTANCE["l1"])
        assert torch.equal(index, expected(q, b, k, "l1")[1])


@pytest.mark.parametrize(("metric", "p"), [("l2", None), ("lp", 3.0), ("lp", 50.5), ("cosine", None)])
@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_extreme_magnitudes(randn, metric, p, scale):
    for batch in (3, 17):
        q, b = randn(batch, 9), randn(1, 18, 9)
        wanted = oracles.feature_distance(q, b, k=2, metric=metric, p=p)
        wanted = wanted * (1 if metric == "cosine" else scale)
        assert_close(nearest(q * scale, b * scale, 2, metric, p)[0], wanted, Tolerance(1e-5, 0.0))


@pytest.mark.parametrize(("metric", "p"), [("l1", None), ("l2", None), ("lp", 1.5), ("cosine", None)])
def test_near_rows_do_not_cancel(randn, metric, p):
    q = randn(17, 40) + 3
    b = q[:1, None] * (1 + 1e-3 * randn(1, 20, 40))
    wanted = oracles.feature_distance(q, b, k=5, metric=metric, p=p)
    for rows in (slice(0, 1), slice(0, 17)):
        assert_close(nearest(q[rows], b, 5, metric, p)[0], wanted[rows], NEAR_DISTANCE[metric])


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_a_query_that_is_not_finite(randn, bad):
    for batch, metric in ((3, "l1"), (17, "l2"), (17, "cosine")):
        q, b = randn(batch, 70), randn(2, 18, 70)
        wanted = [x.clone() for x in nearest(q, b, 3, metric)]
        q[1, 64] = bad
        wanted[0][1] = torch.inf
        wanted[1][1] = torch.arange(3)
        assert all(torch.equal(x, y) for x, y in zip(nearest(q, b, 3, metric), wanted, strict=True))


def test_ties_go_to_the_lower_row():
    b = torch.zeros(1, 150, 3)
    b[0, 20:, 0] = 1
    b[0, ::2] = -b[0, ::2]
    for batch in (2, 20):
        assert nearest(torch.zeros(batch, 3), b, 23, "l1")[1][-1, 0].tolist() == list(range(23))
        assert nearest(torch.zeros(batch, 3), b[:, 20:], 23, "l2")[1][-1, 0].tolist() == list(range(23))


def test_norms_of_0_half_features_and_addresses(randn):
    for batch in (3, 17):
        q, b = randn(batch, 8), randn(1, 18, 8)
        q[0] = 0
        b[0, 2] = 0
        assert nearest(q, b, 18, "cosine")[0][0] == 1
        for dtype in (torch.float16, torch.bfloat16):
            x = q.to(dtype)
            assert torch.equal(nearest(x, b, 3, "l2")[0], nearest(x.float(), b, 3, "l2")[0])
            odd = torch.zeros(batch, 11, dtype=dtype)[:, 1:9].copy_(x)  # not at a multiple of 16 bytes
            assert torch.equal(nearest(odd, b, 3, "l2")[0], nearest(x, b, 3, "l2")[0])


def test_layouts_and_an_empty_batch(randn):
    q, b = randn(3, 6), randn(2, 11, 6)
    wanted = ops.feature_distance(q, ops.Bank(b), k=3)
    spread = torch.zeros(3, 12)
    spread[:, ::2] = q
    turned = b.transpose(1, 2).contiguous().transpose(1, 2)
    for features in (spread[:, ::2], q.t().contiguous().t(), torch.complex(q, -q).conj().imag.neg().neg()):
        assert torch.equal(ops.feature_distance(features, turned, k=3), wanted)
    assert ops.feature_distance(q[:0], b, k=3).shape == (0, 2)
    assert torch.equal(ops.feature_distance(q[:1].expand(3, 6), b, k=3), wanted[:1].expand(3, 2))


def test_gradients(randn):
    q, b, weight = randn(3, 7), randn(2, 9, 7), randn(3, 2)
    for metric in ("l1", "cosine"):
        narrow, wide = ([x.to(t).requires_grad_() for x in (q, b)] for t in (torch.float32, torch.float64))
        loss = (ops.feature_distance(*narrow, k=2, metric=metric) * weight).sum()
        wanted = torch.autograd.grad(
            (reference.feature_distance(*wide, k=2, metric=metric) * weight).sum(), wide
        )
        for actual, want in zip(torch.autograd.grad(loss, narrow), wanted, strict=True):
            assert_close(actual, want, GRADIENT)


# Stopping early -------------------------------------------------------------------------------------

LEFT_OUT, STOPPED = 1, 2


@pytest.mark.parametrize(("metric", "p"), [("l1", None), ("l2", None), ("lp", 2.5), ("cosine", None)])
@pytest.mark.parametrize(("batch", "width"), [(20, 400), (3, 1200)])
def test_rows_behind_the_nearest_are_not_summed_to_the_end(randn, machine, metric, p, batch, width):
    b = 3 * randn(4, 192, width)  # four groups: the bank stays in one part
    b[:, :64] = 0.01 * randn(4, 64, width) + 1
    q = 0.01 * randn(batch, width) + 1
    distance, index = nearest(q, b, 4, metric, p)
    assert (machine.flags(q, b, 4) == STOPPED).all()
    assert torch.equal(index, expected(q, b, 4, metric, p)[1])
    assert_close(distance, oracles.feature_distance(q, b, k=4, metric=metric, p=p), NEAR_DISTANCE[metric])


@pytest.mark.parametrize(("batch", "width"), [(20, 400), (3, 1200)])
def test_what_tells_most_is_summed_first(randn, machine, batch, width):
    # Rows and queries differ in the last 12 features only: in their own order a tile would go to the end.
    b, q = torch.zeros(4, 192, width), torch.zeros(batch, width)
    b[:, :, -12:] = 3 * randn(4, 192, 12)
    b[:, :64] = 0.01 * randn(4, 64, width)
    distance, index = nearest(q, b, 4, "l1")
    assert (machine.flags(q, b, 4) == STOPPED).all()
    assert torch.equal(index, expected(q, b, 4, "l1")[1])
    assert_close(distance, oracles.feature_distance(q, b, k=4), DISTANCE["l1"])


def thresholds(randn, machine, batch, width, near):
    """Queries far from all rows but for the first `near`, which lie at some rows of the last tile."""
    b = randn(1, 160, width)
    q = 4 * randn(batch, width)
    q[:near] = b[0, 150] + 0.5 * randn(near, width)
    rule = WatermarkRule(offset=0.9, scale=1.0, k=3, metric="l1", confidence_weight=0.2, strength=0.5)
    z, r, planes = randn(batch, 5), randn(1, 5), randn(16, width)
    output = ops.watermark(q, z, b, r, planes, rule=rule, seed=SEED)
    flags = machine.flags(q, b, rule.k).clone(), machine.flags(q, b, rule.k, "exhaustive").clone()
    distance = ops.feature_distance(q, b, k=rule.k)
    confidence = reference.similarity(distance, z, rule=rule)  # the same arithmetic on the full distances
    assert torch.equal(output.similarity, confidence)
    return output, *flags


@pytest.mark.parametrize(("batch", "width"), [(20, 400), (3, 1200)])
def test_far_queries_are_proven_far(randn, machine, batch, width):
    output, skipped, exhaustive = thresholds(randn, machine, batch, width, 0)
    assert (skipped == LEFT_OUT | STOPPED).all()
    assert not exhaustive.any()
    assert not output.similarity.any()


@pytest.mark.parametrize(("batch", "width"), [(20, 400), (3, 1200)])
def test_what_the_threshold_leaves_open_is_searched_through(randn, machine, batch, width):
    # Near rows come in the last tile, after others were left out: the mean of 3 is open until they are seen.
    output, skipped, exhaustive = thresholds(randn, machine, batch, width, 2)
    assert (skipped[:2] & LEFT_OUT).any()
    assert exhaustive[:2].all()
    assert not exhaustive[2:].any()
    assert not output.similarity[2:].any()


# Hash, mixing, compose ------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "width", "planes"), [(1, 1, 1), (18, 150, 64), (3, 33, 63), (5, 64, 32)])
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
    for shape in ((1, 1, 1), (7, 3, 10), (3, 5, 104), (2, 2, 1100)):
        logits, similarity, target, bucket = answers(randn, *shape, dtype)
        mixed, group, flipped = ops.watermark_mix(logits, similarity, target, bucket, rule=rule, seed=SEED)
        wide = reference.watermark_mix(
            logits.double(), similarity.double(), target.double(), bucket, rule=rule, seed=SEED
        )
        assert torch.equal(group, wide[1])
        assert torch.equal(flipped, wide[2])
        assert_close(mixed, wide[0], MIXED[dtype])


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


@pytest.mark.parametrize("classes", [5, 8, 9])
def test_rows_that_keep_their_bits(randn, classes):
    logits, similarity, target, bucket = answers(randn, 6, 2, classes)
    similarity[:2] = 0
    similarity[2] = torch.nan
    logits[0, 1] = -0.0
    logits[3, 2] = torch.inf
    logits.view(torch.int32)[4, 0] = 0x7FC12345
    similarity[5] = torch.tensor([0.5, 0.5])
    for x in (logits, torch.cat([logits, logits], dim=1)[:, 1 : 1 + classes]):
        mixed, group, flipped = ops.watermark_mix(
            x, similarity, target, bucket, rule=RULES["all of it"], seed=1
        )
        kept = (similarity.nan_to_num() == 0).all(1) | ~torch.isfinite(x).all(1)
        assert kept.sum() >= 3
        assert torch.equal(mixed[kept].view(torch.int32), x[kept].contiguous().view(torch.int32))
        assert not group[kept].any()
        assert not flipped[kept].any()


def test_answers_stay_finite():
    for dtype in (torch.float32, torch.float16):
        limit = torch.finfo(dtype).max
        z = torch.tensor([[limit, -limit, 0.0], [-limit, -limit, -limit], [limit, limit, limit]]).to(dtype)
        huge = torch.finfo(torch.float32).max
        for target in ([[huge, -huge, 0.0]], [[-huge, -huge, -huge]]):
            for space in ("logits", "probabilities"):
                for strength in (0.0, 0.5, 1.0):
                    rule = WatermarkRule(space=space, strength=strength, flip_bins=2)
                    s, bucket = torch.full((3, 1), 1.0), torch.zeros(3, dtype=torch.int64)
                    mixed = ops.watermark_mix(z, s, torch.tensor(target), bucket, rule=rule, seed=3)[0]
                    assert torch.isfinite(mixed).all()


@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (1, 1, 2, 5), (2, 5), (4, 1, 1, 1), (), (2, 1), (3, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compose(randn, shape, dtype):
    a, b = randn(4, 3, 2, 5, dtype=dtype), randn(4, 3, 2, 5, dtype=dtype)
    mask = randn(*shape).sigmoid().round(decimals=1).sub(0.3).clamp(0, 0.4).mul(2.5)
    a[0, 0, 0, 0], b[1, 2, 1, 0] = torch.nan, torch.inf
    out, wanted = ops.compose(a, b, mask), reference.compose(a, b, mask)
    exact = ((mask == 0) | (mask == 1)).expand(a.shape)
    integers = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(integers)[exact], wanted.view(integers)[exact])
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(out.nan_to_num(7), wanted.nan_to_num(7))


# The fused op ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "k"), [("l1", 3), ("cosine", 3), ("l2", 40)])
def test_watermark_agrees_with_the_reference_and_stands_alone(randn, machine, metric, k):
    rule = WatermarkRule(
        metric=metric, offset=(1.5, 1.4), scale=0.7, confidence_weight=0.1, k=k, flip_bins=5, strength=0.6
    )
    q, z, b, r, planes = randn(19, 12), 2 * randn(19, 7), randn(2, 45, 12), 3 * randn(2, 7), randn(64, 12)
    q[2, 3] = torch.nan
    z[4, 0] = -torch.inf
    output = ops.watermark(q, z, ops.Bank(b), r, planes, rule=rule, seed=SEED)
    wanted = reference.watermark(q, z, b, r, planes, rule=rule, seed=SEED)
    assert (output.similarity > 0).any()
    assert_close(output.similarity, wanted.similarity, SIMILARITY)
    assert torch.equal(output.group, wanted.group)
    assert torch.equal(output.flipped, wanted.flipped)
    assert_close(output.logits, wanted.logits, Tolerance(1e-5, 2e-5))
    for rows in (torch.tensor([18]), torch.tensor([4, 3, 2, 0])):
        alone = ops.watermark(q[rows], z[rows], ops.Bank(b), r, planes, rule=rule, seed=SEED)
        for one, whole in zip(alone, output, strict=True):
            assert torch.equal(
                one.nan_to_num(7) if one.is_floating_point() else one,
                whole[rows].nan_to_num(7) if whole.is_floating_point() else whole[rows],
            )
    assert ops.watermark(q[:0], z[:0], b, r, planes, rule=rule, seed=1).logits.shape == (0, 7)


def test_half_answers_of_the_fused_op(randn):
    rule = WatermarkRule(offset=1.6, k=2)
    args = randn(2, 5).half(), randn(2, 3).bfloat16(), randn(1, 6, 5), randn(1, 3), randn(8, 5)
    output = ops.watermark(*args, rule=rule, seed=1)
    assert output.logits.dtype == torch.bfloat16
    assert_close(output.logits, reference.watermark(*args, rule=rule, seed=1).logits, MIXED[torch.bfloat16])


# Refusals -------------------------------------------------------------------------------------------


def test_a_refused_launch_names_the_error(module, randn, monkeypatch):
    class Refusing:
        workspace_bytes = module.workspace_bytes
        error_name = staticmethod(lambda code: f"cudaErrorNumber{code}")
        error_text = staticmethod(lambda code: "no kernel image")
        feature_distance = staticmethod(lambda *args: 209)

    monkeypatch.setattr(cuda_backend, "_cuda", Refusing)
    with pytest.raises(RuntimeError, match=r"launch of honeytrace: cudaErrorNumber209 \(no kernel image\)"):
        ops.feature_distance(randn(2, 3), randn(4, 3), k=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 6}, "k must be between 1 and 5, got k=6"),
        ({"metric": 4}, "metric must be between 0 and 3"),
        ({"p": 0.5}, "p must be at least 1 and finite, got p=0.5"),
        ({"dtype": 3}, "dtype must be between 0 and 2"),
        ({"groups": 70000}, "groups must be between 1 and 65535"),
        ({"stride": -1}, "row_stride must be at least 0"),
    ],
)
def test_the_bindings_refuse_what_would_crash(module, change, message):
    given = {"k": 1, "metric": 2, "p": 3.0, "dtype": 0, "groups": 1, "stride": 3} | change
    with pytest.raises(ValueError, match=message):
        module.feature_distance(
            (0, given["dtype"], 2, 3, given["stride"]),
            (0, 0, given["groups"], 5),
            (given["k"], given["metric"], given["p"]),
            0,
            0,
            (0, 1, 0, 0),
        )
