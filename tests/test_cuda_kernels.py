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
from op_contract import SEED, OpContract, expected, nearest
from tolerances import DISTANCE, NEAR_DISTANCE, assert_close

from honeytrace import WatermarkRule, ops, reference
from honeytrace.ops import cuda_backend, registry

pytest.importorskip("pybind11", reason="pybind11 is not installed")
# One process: the kernels are compiled once.
pytestmark = [
    pytest.mark.xdist_group("cuda_simt"),
    pytest.mark.skipif(simt_module.compiler() is None, reason="there is no C++ compiler"),
]

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


class TestCuda(OpContract):
    distance_sizes = ((5, 2, 75, 83, 4), (18, 2, 75, 83, 4), (70, 2, 75, 83, 4))
    neighbour_sizes = tuple(
        (batch, rows, 2, k) for rows, k in ((1, 1), (5, 5), (17, 16), (70, 65)) for batch in (2, 17)
    )
    magnitude_sizes = ((3, 18, 9), (17, 18, 9))
    near_row_sizes = ((17, 1, 20, 40),)
    broken_query_sizes = ((3, 2, 18, 70, 64), (17, 2, 18, 70, 64))
    tie_sizes = ((2, 150), (20, 150))
    zero_norm_sizes = ((3, 18, 8, 18), (17, 18, 8, 18))
    half_feature_sizes = ((3, 1, 18, 8, 3), (17, 1, 18, 8, 3))
    gradient_sizes = ((3, 2, 9, 7, 2),)
    hash_sizes = ((1, 1, 1), (18, 150, 64), (3, 33, 63), (5, 64, 32))
    mixing_sizes = ((1, 1, 1), (7, 3, 10), (3, 5, 104), (2, 2, 1100))
    fused_sizes = ((19, 2, 45, 12, 7),)

    @pytest.fixture(autouse=True)
    def on_machine(self, machine):
        self.machine = machine

    def paths(self, metric, batch, k):
        return ("few",) if batch < 16 else ("tile", "few")

    def nearest(self, q, b, k, metric, p=None, path=None):
        self.machine.multiprocessors = FEW if path == "few" and len(q) >= 16 else TILE
        assert self.machine.plan(q, b, k)["few"] == (path == "few")
        return nearest(q, b, k, metric, p)


# Distances ------------------------------------------------------------------------------------------


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
