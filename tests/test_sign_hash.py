from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from honeytrace import ops, reference


def buckets(q, planes):
    """Bits by Python integers and float64 dot products; and the smallest |dot|, where rounding may decide."""
    dots = q.double() @ planes.double().t()
    words = [sum(1 << j for j, bit in enumerate(row) if bit) for row in (dots >= 0).tolist()]
    return [w - (1 << 64) if w >= 1 << 63 else w for w in words], float(
        dots.abs().min()
    ) if dots.numel() else 1.0


@given(
    batch=st.integers(0, 9), width=st.integers(1, 70), planes=st.integers(1, 64), seed=st.integers(0, 2**31)
)
def test_bits_are_signs_of_dot_products(backend, batch, width, planes, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, width, generator=generator)
    normals = torch.randn(planes, width, generator=generator)
    expected, margin = buckets(q, normals)
    if margin > 1e-5:
        assert ops.sign_hash(q, normals).tolist() == expected


@pytest.mark.parametrize("planes", [1, 63, 64])
def test_a_zero_query_is_on_the_upper_side_of_every_plane(backend, randn, planes):
    word = (1 << planes) - 1
    assert ops.sign_hash(torch.zeros(1, 5), randn(planes, 5)).tolist() == [
        word - (1 << 64) if planes == 64 else word
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_and_planes(backend, randn, dtype):
    q, planes = randn(6, 33, dtype=dtype), randn(64, 33, dtype=dtype)
    assert torch.equal(ops.sign_hash(q, planes), ops.sign_hash(q.float(), planes.float()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_query_that_is_not_finite_has_bucket_0(backend, randn, bad):
    q, planes = randn(4, 9), randn(64, 9)
    expected = ops.sign_hash(q, planes)
    q[2, 8] = bad
    expected[2] = 0
    assert torch.equal(ops.sign_hash(q, planes), expected)


def test_layouts_and_modes(backend, randn):
    q, planes = randn(6, 24), randn(64, 24)
    expected = ops.sign_hash(q, planes)
    spread = torch.zeros(6, 48)
    spread[:, ::2] = q
    for features in (spread[:, ::2], q.t().contiguous().t(), q.clone().requires_grad_()):
        for normals in (planes, planes.t().contiguous().t(), planes.clone().requires_grad_()):
            bucket = ops.sign_hash(features, normals)
            assert torch.equal(bucket, expected)
            assert bucket.dtype == torch.int64
    with torch.inference_mode():
        assert torch.equal(ops.sign_hash(q.clone(), planes.clone()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.sign_hash(q, planes), expected)
    with torch.device("meta"):
        assert torch.equal(ops.sign_hash(q, planes), expected)
    assert ops.sign_hash(q[:0], planes).shape == (0,)


def test_near_queries_share_their_bucket(backend, randn):
    q, planes = randn(200, 128), randn(16, 128)
    near = q + 1e-4 * randn(200, 128)
    assert (ops.sign_hash(q, planes) == ops.sign_hash(near, planes)).float().mean() > 0.97
    assert ops.sign_hash(q, planes).unique().numel() > 150


def test_float64_reference(randn):
    q, planes = randn(5, 20, dtype=torch.float64), randn(64, 20, dtype=torch.float64)
    assert reference.sign_hash(q, planes).tolist() == buckets(q, planes)[0]


def test_opcheck_and_compile(any_level, randn):
    q, planes = randn(4, 9), randn(64, 9)
    torch.library.opcheck(torch.ops.honeytrace.sign_hash.default, (q, planes))
    compiled = torch.compile(ops.sign_hash, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, planes), ops.sign_hash(q, planes))


Q, P = torch.zeros(2, 3), torch.ones(64, 3)


@pytest.mark.parametrize("function", [ops.sign_hash, reference.sign_hash])
@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((Q.tolist(), P), TypeError, "features must be a torch.Tensor"),
        ((Q, None), TypeError, "planes must be a torch.Tensor"),
        ((Q.long(), P), TypeError, "features must have dtype"),
        ((Q, P.long()), TypeError, "planes must have dtype"),
        ((Q[0], P), ValueError, r"features must have shape \[B, D\], got \[3\]"),
        ((Q, P[0]), ValueError, r"planes must have shape \[P, D\]"),
        (
            (Q, P[:, :2]),
            ValueError,
            r"planes must have D=3 in dimension 1 as features has, got shape \[64, 2\]",
        ),
        ((Q, P[:0]), ValueError, "planes must have between 1 and 64 rows"),
        ((Q, torch.ones(65, 3)), ValueError, r"planes must have between 1 and 64 rows, got shape \[65, 3\]"),
        ((Q, P.to("meta")), ValueError, "planes must be on the device of features"),
        ((Q, torch.full((1, 3), torch.nan)), ValueError, "planes must be finite"),
    ],
)
def test_bad_input_is_named(function, args, error, text):
    with pytest.raises(error, match=text):
        function(*args)


def test_float64_points_to_the_reference():
    with pytest.raises(TypeError, match="float64 is what honeytrace"):
        ops.sign_hash(Q.double(), P)
