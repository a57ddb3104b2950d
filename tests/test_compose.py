from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import GRADIENT, Tolerance, assert_close

from honeytrace import ops, reference

ONE_ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask_shape", [(4, 3, 8, 8), (1, 1, 8, 8), (8, 8), (4, 1, 1, 1), (), (8, 1)])
def test_blends_as_the_formula_says(backend, randn, dtype, mask_shape):
    a, b = randn(4, 3, 8, 8, dtype=dtype), randn(4, 3, 8, 8, dtype=dtype)
    mask = randn(*mask_shape).sigmoid()
    out = ops.compose(a, b, mask)
    assert out.dtype == dtype
    expected = a.double() * (1 - mask.double()) + b.double() * mask.double()
    assert_close(out, expected, Tolerance(ONE_ROUNDING[dtype], 4 * ONE_ROUNDING[dtype]))


@given(st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=1, max_size=30), st.integers(0, 99))
def test_is_exact_where_the_mask_is_0_or_1(backend, mask, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, len(mask), generator=generator)[:, None]
    a[:, ::3] = torch.nan
    b[:, ::4] = torch.inf
    m = torch.tensor(mask)
    out = ops.compose(a, b, m).view(torch.int32)[0]
    assert torch.equal(out[m == 0], a.view(torch.int32)[0, m == 0])
    assert torch.equal(out[m == 1], b.view(torch.int32)[0, m == 1])


def test_layouts_and_modes(backend, randn):
    a, b, mask = randn(4, 6), randn(4, 6), randn(4, 6).sigmoid()
    expected = ops.compose(a, b, mask)
    assert torch.equal(ops.compose(a.t().contiguous().t(), b, mask.t().contiguous().t()), expected)
    with torch.inference_mode():
        assert torch.equal(ops.compose(a.clone(), b.clone(), mask.clone()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.compose(a, b, mask), expected)
    with torch.device("meta"):
        assert torch.equal(ops.compose(a, b, mask), expected)
    assert ops.compose(a[:0], b[:0], mask[:0]).shape == (0, 6)


@pytest.mark.parametrize("mask_shape", [(3, 4), (4,), (3, 1), ()])
def test_gradients(any_level, randn, mask_shape):
    wide = [
        x.requires_grad_()
        for x in (randn(3, 4).double(), randn(3, 4).double(), randn(*mask_shape).sigmoid().double())
    ]
    assert torch.autograd.gradcheck(reference.compose, wide)
    narrow = [x.detach().float().requires_grad_() for x in wide]
    grad = randn(3, 4)
    actual = torch.autograd.grad(ops.compose(*narrow), narrow, grad)
    expected = torch.autograd.grad(reference.compose(*wide), wide, grad.double())
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, GRADIENT)


def test_opcheck_and_compile(any_level, randn):
    for gradient in (False, True):
        args = [x.requires_grad_(gradient) for x in (randn(3, 4), randn(3, 4), randn(4).sigmoid())]
        torch.library.opcheck(torch.ops.honeytrace.compose.default, tuple(args))
    compiled = torch.compile(ops.compose, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), ops.compose(*args))


A = torch.zeros(2, 3)


@pytest.mark.parametrize("function", [ops.compose, reference.compose])
@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        ((None, A, A), TypeError, "a must be a torch.Tensor, got NoneType"),
        ((A, [1], A), TypeError, "b must be a torch.Tensor, got list"),
        ((A, A, 0.5), TypeError, "mask must be a torch.Tensor, got float"),
        ((A.int(), A, A), TypeError, "a must have dtype"),
        ((A, A, A > 0), TypeError, "mask must have dtype"),
        ((A, A.half(), A), TypeError, "b must have a's dtype torch.float32, got torch.float16"),
        ((A, A[:1], A), ValueError, r"b must have a's shape \[2, 3\], got \[1, 3\]"),
        ((A, A, torch.zeros(2)), ValueError, r"mask must broadcast to a's shape \[2, 3\], got \[2\]"),
        ((A, A, torch.zeros(1, 2, 3)), ValueError, "mask must broadcast"),
        ((A, A.to("meta"), A), ValueError, "b must be on the device of a, cpu, got meta"),
    ],
)
def test_bad_input_is_named(function, args, error, text):
    with pytest.raises(error, match=text):
        function(*args)
