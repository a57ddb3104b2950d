from __future__ import annotations

import importlib
import itertools

import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import DISTANCE, GRADIENT, NEAR_DISTANCE, Tolerance, assert_close

from honeytrace import ops, reference
from honeytrace.ops import registry
from honeytrace.ops.feature_distance import distance_backward

METRICS = [
    ("l1", None),
    ("l2", None),
    ("lp", 3.0),
    ("lp", 1.5),
    ("lp", 4.7),
    ("lp", 1.0),
    ("lp", 2.0),
    ("cosine", None),
]
SIZES = [  # B, G, M, D, k
    (1, 1, 1, 1, 1),
    (3, 2, 5, 3, 2),
    (7, 1, 16, 8, 16),
    (5, 3, 17, 31, 10),
    (2, 2, 33, 65, 1),
    (33, 1, 100, 129, 10),
    (9, 4, 31, 64, 31),
    (130, 1, 47, 20, 3),
]


@pytest.mark.parametrize(("metric", "p"), METRICS)
@pytest.mark.parametrize(("batch", "groups", "size", "width", "k"), SIZES)
def test_agrees_with_float64(backend, randn, metric, p, batch, groups, size, width, k):
    q, b = randn(batch, width), randn(groups, size, width)
    distance = ops.feature_distance(q, ops.Bank(b), k=k, metric=metric, p=p)
    assert distance.dtype == torch.float32
    assert_close(distance, oracles.feature_distance(q, b, k=k, metric=metric, p=p), DISTANCE[metric])


@given(
    batch=st.integers(1, 9),
    groups=st.integers(1, 3),
    size=st.integers(1, 40),
    width=st.integers(1, 70),
    metric=st.sampled_from(METRICS),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_any_size_agrees_with_float64(backend, batch, groups, size, width, metric, scale, seed, data):
    generator = torch.Generator().manual_seed(seed)
    q = scale * torch.randn(batch, width, generator=generator)
    b = scale * torch.randn(groups, size, width, generator=generator)
    k = data.draw(st.integers(1, size))
    distance = ops.feature_distance(q, b, k=k, metric=metric[0], p=metric[1])
    expected = oracles.feature_distance(q, b, k=k, metric=metric[0], p=metric[1])
    assert_close(distance, expected, DISTANCE[metric[0]])


@pytest.mark.parametrize(("metric", "p"), METRICS)
def test_near_rows_do_not_cancel(backend, randn, metric, p):
    q = randn(6, 200) + 3
    b = q[:, None] * (1 + 1e-3 * randn(6, 20, 200))
    distance = ops.feature_distance(q, b, k=5, metric=metric, p=p)
    assert_close(distance, oracles.feature_distance(q, b, k=5, metric=metric, p=p), NEAR_DISTANCE[metric])


@pytest.mark.parametrize(("metric", "p"), METRICS)
@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_extreme_magnitudes_neither_vanish_nor_overflow(backend, randn, metric, p, scale):
    q, b = randn(4, 33), randn(1, 20, 33)
    expected = oracles.feature_distance(q, b, k=4, metric=metric, p=p) * (1 if metric == "cosine" else scale)
    distance = ops.feature_distance(q * scale, b * scale, k=4, metric=metric, p=p)
    assert_close(distance, expected, Tolerance(1e-5, 0.0))


@pytest.mark.parametrize("p", [16.0, 50.5, 300.0])
def test_a_large_p_approaches_the_largest_difference(backend, randn, p):
    q, b = randn(3, 40), randn(1, 9, 40)
    expected = oracles.feature_distance(q, b, k=2, metric="lp", p=p)
    assert_close(ops.feature_distance(q, b, k=2, metric="lp", p=p), expected, Tolerance(5e-6, 0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_half_features(backend, randn, dtype, metric):
    q, b = randn(5, 37, dtype=dtype), randn(2, 19, 37)
    distance = ops.feature_distance(q, b, k=3, metric=metric)
    assert distance.dtype == torch.float32
    assert_close(distance, oracles.feature_distance(q, b, k=3, metric=metric), DISTANCE[metric])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_bank_is_widened(backend, randn, dtype):
    q, b = randn(5, 37), randn(2, 19, 37, dtype=dtype)
    for bank in (b, ops.Bank(b)):
        assert torch.equal(ops.feature_distance(q, bank, k=3), ops.feature_distance(q, b.float(), k=3))


def indices_of(q, b, k, metric="l1", p=1.0):
    code = ["l1", "l2", "lp", "cosine"].index(metric)
    return torch.ops.honeytrace.feature_distance(q, b, None, None, k, code, p)[1]


def test_ties_go_to_the_lower_row(backend):
    b = torch.zeros(1, 50, 3)
    b[0, 20:, 0] = 1
    b[0, ::2] = -b[0, ::2]  # distance 1 all the same
    assert indices_of(torch.zeros(2, 3), b, 23)[0, 0].tolist() == list(range(23))
    assert indices_of(torch.tensor([[1.0, 0, 0]]), b, 16)[0, 0].tolist() == [*range(21, 50, 2), 0]


def test_indices_are_sorted_by_distance(backend, randn):
    q, b = randn(7, 30), randn(3, 41, 30)
    index = indices_of(q, b, 12).long()
    distances = torch.from_numpy(oracles.pair_distances(q, b, "l1", None))
    assert torch.equal(index, distances.argsort(dim=-1)[..., :12])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
def test_a_query_that_is_not_finite_is_infinitely_far(backend, randn, bad, metric):
    q, b = randn(4, 20), randn(2, 15, 20)
    expected = ops.feature_distance(q, b, k=3, metric=metric)
    q[1, 19] = bad
    expected[1] = torch.inf
    assert torch.equal(ops.feature_distance(q, b, k=3, metric=metric), expected)
    assert indices_of(q, b, 3, metric)[1].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_cosine_of_a_zero_vector_is_1(backend, randn):
    q, b = randn(3, 8), randn(1, 5, 8)
    q[0] = 0
    b[0, 2] = 0
    assert ops.feature_distance(q, b, k=5, metric="cosine")[0] == 1
    assert_close(
        ops.feature_distance(q, b, k=5, metric="cosine"),
        oracles.feature_distance(q, b, k=5, metric="cosine"),
        DISTANCE["cosine"],
    )


def test_every_layout_gives_the_same_bits(backend, randn):
    q, bank = randn(6, 24), ops.Bank(randn(2, 18, 24))
    expected = ops.feature_distance(q, bank)
    wide = torch.zeros(6, 50)
    wide[:, 3:27] = q
    spread = torch.zeros(6, 48)
    spread[:, ::2] = q
    for layout in (wide[:, 3:27], q.t().contiguous().t(), spread[:, ::2], torch.flip(q, [0]).flip([0])):
        assert torch.equal(ops.feature_distance(layout, bank), expected)
    assert torch.equal(ops.feature_distance(q[:1].expand(4, 24), bank), expected[:1].expand(4, 2))
    negative = torch.complex(q, -q).conj().imag  # q, stored as -q with a flag
    assert negative.is_neg()
    assert torch.equal(ops.feature_distance(negative, bank), expected)


def test_bank_layouts(backend, randn):
    q, b = randn(3, 10), randn(12, 10)
    expected = ops.feature_distance(q, ops.Bank(b))
    for bank in (b, b[None], b.t().contiguous().t(), ops.Bank(b[None])):
        assert torch.equal(ops.feature_distance(q, bank), expected)


def test_modes(backend, randn):
    q, bank = randn(4, 12), ops.Bank(randn(2, 11, 12))
    expected = ops.feature_distance(q, bank)
    with torch.inference_mode():
        assert torch.equal(ops.feature_distance(q.clone(), bank), expected)
        assert torch.equal(ops.feature_distance(q, ops.Bank(bank.rows.clone())), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.feature_distance(q, bank), expected)
        assert torch.equal(reference.feature_distance(q, bank), reference.feature_distance(q, bank.rows))
    with torch.device("meta"):  # a default device is no device of the arguments
        assert torch.equal(ops.feature_distance(q, bank), expected)
        assert torch.equal(ops.feature_distance(q, ops.Bank(bank.rows)), expected)
    assert ops.feature_distance(q.requires_grad_(), bank).requires_grad
    with torch.no_grad():
        assert not ops.feature_distance(q, bank).requires_grad


def test_empty_batch(backend, randn):
    bank = ops.Bank(randn(3, 11, 12))
    q = torch.empty(0, 12, requires_grad=True)
    distance = ops.feature_distance(q, bank)
    assert distance.shape == (0, 3)
    distance.sum().backward()
    assert q.grad.shape == (0, 12)


def test_float64_reference(randn):
    q, b = randn(4, 12, dtype=torch.float64), randn(2, 11, 12, dtype=torch.float64)
    for metric, p in METRICS:
        distance = reference.feature_distance(q, b, k=4, metric=metric, p=p)
        assert distance.dtype == torch.float64
        expected = oracles.feature_distance(q, b, k=4, metric=metric, p=p)
        assert_close(distance, expected, Tolerance(1e-14, 1e-15))


def test_reference_in_small_blocks_gives_the_same_bits(monkeypatch, randn):
    q, b = randn(9, 12), randn(2, 40, 12)
    expected = reference.feature_distance(q, b)
    for block in (1, 12 * 7, 12 * 40 * 2):
        monkeypatch.setattr(reference, "_BLOCK", block)
        assert torch.equal(reference.feature_distance(q, b), expected)


# Gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "p"), METRICS)
def test_reference_gradcheck(randn, metric, p):
    q = randn(3, 6, dtype=torch.float64).requires_grad_()
    b = randn(2, 7, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, b: reference.feature_distance(q, b, k=3, metric=metric, p=p), (q, b)
    )


@pytest.mark.parametrize(("metric", "p"), METRICS)
def test_gradient_agrees_with_the_reference(any_level, randn, metric, p):
    q, b, weight = randn(5, 13), randn(2, 11, 13), randn(5, 2)
    q[3, 0] = torch.nan
    weight[3] = 0  # its distance is infinite in both
    wide = [x.double().requires_grad_() for x in (q, b)]
    distance = reference.feature_distance(wide[0], wide[1], k=4, metric=metric, p=p)
    expected = torch.autograd.grad((torch.where(weight != 0, distance, 0) * weight).sum(), wide)
    for bank in (b.requires_grad_(), ops.Bank(b)):
        q.grad = b.grad = None
        distance = ops.feature_distance(q.requires_grad_(), bank, k=4, metric=metric, p=p)
        (torch.where(weight != 0, distance, 0) * weight).sum().backward()
        for actual, wanted in zip((q.grad, b.grad), expected, strict=True):
            assert_close(actual, wanted, GRADIENT)
    assert (q.grad[3] == 0).all()


@pytest.mark.parametrize(("metric", "p"), METRICS)
def test_gradient_is_0_at_zero_differences(backend, randn, metric, p):
    b = randn(1, 6, 5)
    b[0, 1] = b[0, 0]
    q = b[0, :1].clone()
    for function in (ops.feature_distance, reference.feature_distance):
        x, rows = q.clone().requires_grad_(), b.clone().requires_grad_()
        function(x, rows, k=2, metric=metric, p=p).sum().backward()
        assert x.grad.abs().max() < 1e-6  # cosine: the gradient of a unit vector on itself, within rounding
        assert rows.grad.abs().max() < 1e-6
    zero = torch.zeros(1, 5)
    for function in (ops.feature_distance, reference.feature_distance):
        x, rows = zero.clone().requires_grad_(), b.clone().requires_grad_()
        function(x, rows, k=2, metric=metric, p=p).sum().backward()
        assert torch.isfinite(x.grad).all()
        assert torch.isfinite(rows.grad).all()
        assert metric != "cosine" or (x.grad == 0).all()


def test_gradient_in_blocks(monkeypatch, randn):
    q, b, grad = randn(7, 6), randn(2, 9, 6), randn(7, 2)
    index = indices_of(q, b, 3)
    expected = distance_backward(grad, q, b, index, "l2", 1.0, (True, True))
    module = importlib.import_module(
        "honeytrace.ops.feature_distance"
    )  # the package's attribute is the function
    monkeypatch.setattr(module, "_BLOCK", 2 * 3 * 6 * 2)
    for actual, wanted in zip(
        distance_backward(grad, q, b, index, "l2", 1.0, (True, True)), expected, strict=True
    ):
        assert_close(actual, wanted, GRADIENT)
    assert distance_backward(grad, q, b, index, "l2", 1.0, (True, False))[1] is None
    assert distance_backward(grad, q, b, index, "l2", 1.0, (False, True))[0] is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient_has_the_features_dtype(any_level, randn, dtype):
    q = randn(3, 6, dtype=dtype).requires_grad_()
    ops.feature_distance(q, randn(9, 6), k=2, metric="l2").sum().backward()
    assert q.grad.dtype == dtype
    assert torch.isfinite(q.grad).all()


# Tracing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient", [False, True])
def test_opcheck(any_level, randn, gradient):
    q, b = randn(4, 9).requires_grad_(gradient), randn(2, 6, 9).requires_grad_(gradient)
    torch.library.opcheck(torch.ops.honeytrace.feature_distance.default, (q, b, None, None, 3, 1, 1.0))


def test_compiles_without_a_break_for_any_batch(randn):
    bank = ops.Bank(randn(2, 11, 6))
    compiled = torch.compile(
        lambda q: ops.feature_distance(q, bank, k=3) * 2, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch in (3, 5):
        q = randn(batch, 6).requires_grad_()
        assert torch.equal(compiled(q), ops.feature_distance(q, bank, k=3) * 2)
        compiled(q).sum().backward()
        assert q.grad is not None


def test_exports(randn):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bank = ops.Bank(randn(2, 11, 6))

        def forward(self, q):
            return ops.feature_distance(q, self.bank, k=3)

    module, q = Module(), randn(4, 6)
    program = torch.export.export(module, (q,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    q = randn(7, 6)
    assert torch.equal(program.module()(q), module(q))


# Bad input ------------------------------------------------------------------------------------------

Q, B = torch.zeros(2, 3), torch.zeros(1, 4, 3)
BAD = [
    ((None, B), {}, TypeError, r"features must be a torch.Tensor \[B, D\], got NoneType"),
    ((Q, [[1.0]]), {}, TypeError, r"bank must be a torch.Tensor \[G, M, D\] or \[M, D\], got list"),
    ((Q.int(), B), {}, TypeError, "features must have dtype .*float32.* got torch.int32"),
    ((Q.bool(), B), {}, TypeError, "features must have dtype"),
    ((Q[0], B), {}, ValueError, r"features must have shape \[B, D\], got \[3\]"),
    ((Q[:, :2], B), {}, ValueError, r"features must have D=3 in dimension 1 as bank has, got shape \[2, 2\]"),
    ((Q, B[0, 0]), {}, ValueError, r"bank must have shape \[G, M, D\] or \[M, D\], got \[3\]"),
    ((Q, B[:, :0]), {}, ValueError, "bank must have shape .* without empty dimensions"),
    ((Q.to("meta"), B), {}, ValueError, "bank must be on the device of features, meta, got cpu"),
    ((Q, torch.full((1, 4, 3), torch.nan)), {}, ValueError, "bank must be finite"),
    ((Q, torch.full((1, 4, 3), torch.inf)), {}, ValueError, "bank must be finite"),
    ((Q, B), {"k": 5}, ValueError, "k must be between 1 and the number of bank rows M=4, got k=5"),
    ((Q, B), {"k": 0}, ValueError, "k must be between 1 and"),
    ((Q, B), {"k": 2.0}, TypeError, "k must be an int, got 2.0 of type float"),
    ((Q, B), {"k": True}, TypeError, "k must be an int"),
    (
        (Q, B),
        {"k": 2, "metric": "l3"},
        ValueError,
        "metric must be one of 'l1', 'l2', 'lp', 'cosine', got metric='l3'",
    ),
    ((Q, B), {"k": 2, "metric": 1}, TypeError, "metric must be a str"),
    ((Q, B), {"k": 2, "metric": "lp"}, ValueError, 'p must be given with metric="lp"'),
    ((Q, B), {"k": 2, "metric": "lp", "p": 0.5}, ValueError, "p must be finite and at least 1, got p=0.5"),
    ((Q, B), {"k": 2, "metric": "lp", "p": float("inf")}, ValueError, "p must be finite"),
    ((Q, B), {"k": 2, "metric": "lp", "p": "3"}, TypeError, "p must be a number"),
    ((Q, B), {"k": 2, "p": 3.0}, ValueError, 'p is for metric="lp" only'),
]


@pytest.mark.parametrize(("args", "kwargs", "error", "text"), BAD)
@pytest.mark.parametrize("function", [ops.feature_distance, reference.feature_distance])
def test_bad_input_is_named(function, args, kwargs, error, text):
    with pytest.raises(error, match=text):
        function(*args, **{"k": 2, **kwargs})


def test_float64_points_to_the_reference():
    for q, b in ((Q.double(), B), (Q, B.double())):
        with pytest.raises(TypeError, match=r"got torch.float64; float64 is what honeytrace.reference takes"):
            ops.feature_distance(q, b, k=2)


def test_a_bank_changed_in_place_is_looked_at_again():
    b = torch.zeros(1, 4, 3)
    ops.feature_distance(Q, b, k=2)
    b[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="bank must be finite"):
        ops.feature_distance(Q, b, k=2)


def test_backends_agree_on_the_rows(randn):
    q, b = randn(20, 40), randn(2, 60, 40)
    for metric in ("l1", "l2", "cosine"):
        found = []
        for name in registry.PREFERENCE["cpu"]:
            if registry.unavailable(name, "cpu") is None:
                with registry.force(name):
                    found.append(indices_of(q, b, 5, metric))
        for one, other in itertools.pairwise(found):
            assert torch.equal(one, other)
