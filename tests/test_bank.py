from __future__ import annotations

import pytest
import torch

from honeytrace import ops
from honeytrace.ops import registry
from honeytrace.ops.bank import pack_panels


def test_holds_float32_rows_and_sizes(randn):
    rows = randn(2, 17, 5)
    bank = ops.Bank(rows)
    assert (bank.groups, bank.size, bank.features) == (2, 17, 5)
    assert bank.rows.dtype == torch.float32
    assert bank.rows.is_contiguous()
    assert torch.equal(bank.rows, rows)
    single = ops.Bank(rows[0].half().t().contiguous().t())
    assert (single.groups, single.size, single.features) == (1, 17, 5)
    assert torch.equal(single.rows[0], rows[0].half().float())


def test_is_a_copy(randn):
    rows, q = randn(1, 17, 5), randn(2, 5)
    bank = ops.Bank(rows)
    expected = ops.feature_distance(q, bank)
    rows.zero_()
    assert torch.equal(ops.feature_distance(q, bank), expected)


def test_packed_layout(randn):
    core = pytest.importorskip("honeytrace._C")
    rows = randn(2, 19, 5)
    bank = ops.Bank(rows)
    of_panels = 2 * 2 * 5 * core.LANES
    panels = bank.packed[:of_panels].view(2, 2, 5, core.LANES)
    order = bank.packed[of_panels : of_panels + 10].view(torch.int32).view(2, 5)
    for m in range(19):
        in_order = rows[:, m].gather(1, order.long())
        assert torch.equal(panels[:, m // core.LANES, :, m % core.LANES], in_order)
    assert torch.allclose(bank.norms[:, :19], rows.norm(dim=-1), rtol=1e-6)


def test_rows_changed_in_place_are_laid_out_again(randn):
    q, bank = randn(2, 5), ops.Bank(randn(2, 19, 5))
    packed = bank.packed
    assert bank.packed is packed
    other = randn(2, 19, 5)
    bank.rows.copy_(other)
    assert torch.equal(ops.feature_distance(q, bank), ops.feature_distance(q, ops.Bank(other)))
    assert torch.equal(bank.norms, ops.Bank(other).norms)
    with torch.inference_mode():
        assert torch.equal(ops.feature_distance(q, ops.Bank(other)), ops.feature_distance(q, bank))


def test_panels_of_the_gpu_kernels(randn):
    rows = randn(2, 19, 5)
    packed, norms = pack_panels(rows)
    panels = packed[:-10].view(2, 2, 5, 16)
    order = packed[-10:].view(torch.int32).view(2, 5)
    assert torch.equal(order.sort(dim=1).values, torch.arange(5).expand(2, 5))
    assert (rows.var(dim=1).gather(1, order.long()).diff(dim=1) <= 0).all()
    for m in range(19):
        assert torch.equal(panels[:, m // 16, :, m % 16], rows[:, m])
    assert not panels[:, 1, :, 3:].any()
    assert torch.allclose(norms[:, :19], rows.norm(dim=-1), rtol=1e-6)
    assert not norms[:, 19:].any()


def test_repr_shows_sizes_and_no_values(randn):
    assert repr(ops.Bank(randn(2, 17, 5))) == "Bank(groups=2, size=17, features=5, device=cpu)"


def test_to_another_device(randn):
    bank = ops.Bank(randn(2, 17, 5))
    assert bank.to("cpu") is bank
    moved = bank.to("meta")
    assert moved.device.type == "meta"
    assert moved.packed is None
    assert (moved.groups, moved.size, moved.features) == (2, 17, 5)


def test_passes_gradients_on(randn):
    rows = randn(17, 5).requires_grad_()
    ops.feature_distance(randn(2, 5), ops.Bank(rows)).sum().backward()
    assert rows.grad.abs().max() > 0


def test_without_a_packed_form_every_backend_still_runs(backend, randn, monkeypatch):
    rows, q = randn(2, 17, 5), randn(3, 5)
    expected = ops.feature_distance(q, ops.Bank(rows))
    monkeypatch.setattr("honeytrace.ops.bank.pack", lambda rows: (None, None))
    bank = ops.Bank(rows)
    assert bank.packed is None
    assert torch.equal(ops.feature_distance(q, bank), expected)
    with registry.force("reference"):
        ops.feature_distance(q, bank)


@pytest.mark.parametrize(
    ("rows", "error", "text"),
    [
        (None, TypeError, r"rows must be a torch.Tensor \[G, M, D\] or \[M, D\], got NoneType"),
        (torch.zeros(3), ValueError, r"rows must have shape .* got \[3\]"),
        (torch.zeros(1, 2, 3, 4), ValueError, "rows must have shape"),
        (torch.zeros(0, 2, 3), ValueError, "rows must have shape .* without empty dimensions"),
        (torch.zeros(2, 0), ValueError, "rows must have shape .* without empty dimensions"),
        (torch.zeros(2, 3).int(), TypeError, "rows must have dtype"),
        (torch.zeros(2, 3).double(), TypeError, "float64 is what honeytrace.reference takes"),
        (torch.full((2, 3), torch.nan), ValueError, "rows must be finite, got NaN or infinite values"),
        (torch.full((2, 3), -torch.inf), ValueError, "rows must be finite"),
    ],
)
def test_bad_rows_are_named(rows, error, text):
    with pytest.raises(error, match=text):
        ops.Bank(rows)
