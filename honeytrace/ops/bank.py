"""The trigger bank, laid out once for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from honeytrace.ops.checks import check_finite, check_not_empty, check_tensor

PANEL = 16
"""Rows that the GPU kernels read side by side."""


class Bank:
    """Rows of features of G trigger groups, checked and packed once; every op takes it in place of the raw
    tensor.

    Args:
        rows: [G, M, D], or [M, D] for one group; float32, float16 or bfloat16, finite. The rows are copied (a
            later change of the tensor does not reach the bank); the copy is differentiable, so a bank made
            from rows that require a gradient passes it on.

    Attributes:
        rows: float32 [G, M, D], contiguous.
        packed: the rows in the layout of the device's kernels, float32, one dimension: the compiled core's on
            the CPU (None without it), that of `pack_panels` on CUDA, None elsewhere.
        norms: Euclidean norms of the rows as the kernels want them, float32 [G, M rounded up to 16]; None
            with it. Both are made once, and again only after `rows` was changed in place.
        groups, size, features: G, M and D.

    Raises:
        TypeError: rows of another type or dtype.
        ValueError: another number of dimensions, an empty dimension, a NaN or infinite value.
    """

    def __init__(self, rows: Tensor) -> None:
        if isinstance(rows, Tensor) and rows.dim() == 2:
            rows = rows[None]
        check_tensor("rows", rows, 3, "[G, M, D] or [M, D]")
        check_not_empty("rows", rows, 0, "[G, M, D] or [M, D]")
        check_finite("rows", rows)
        self._hold(rows.to(torch.float32, copy=True, memory_format=torch.contiguous_format))

    def _hold(self, rows: Tensor) -> None:
        self.rows = rows
        self.groups, self.size, self.features = rows.shape
        self._packed: Tensor | None
        self._norms: Tensor | None
        self._version: int | None
        self._lay_out()

    def _lay_out(self) -> None:
        self._packed, self._norms = pack(self.rows)
        # An inference tensor has no version counter: a change of it in place goes unseen.
        self._version = None if self.rows.is_inference() else self.rows._version

    def _renew(self) -> None:
        """Lay the rows out again if they were changed in place; a program that torch traces does not look."""
        if (
            self._version is not None
            and not torch.compiler.is_compiling()
            and self.rows._version != self._version
        ):
            self._lay_out()

    @property
    def packed(self) -> Tensor | None:
        self._renew()
        return self._packed

    @property
    def norms(self) -> Tensor | None:
        self._renew()
        return self._norms

    def to(self, device: torch.device | str) -> Bank:
        """The bank on `device`; itself if it is there already."""
        if torch.device(device) == self.rows.device:
            return self
        moved = self.rows.to(device)
        if moved.device == self.rows.device:
            return self
        bank = Bank.__new__(Bank)
        bank._hold(moved)
        return bank

    @property
    def device(self) -> torch.device:
        """Where the rows lie."""
        return self.rows.device

    def __repr__(self) -> str:
        # Sizes only: the rows give the triggers away.
        return f"Bank(groups={self.groups}, size={self.size}, features={self.features}, device={self.device})"


def pack(rows: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Lay float32 rows [G, M, D] out for the kernels of their device; (None, None) where there are none."""
    if rows.device.type == "cuda":
        return pack_panels(rows)
    if rows.device.type != "cpu":
        return None, None
    try:
        from honeytrace import _C
    except ImportError:
        return None, None
    groups, size, features = rows.shape
    source = rows.detach().contiguous()
    packed = source.new_empty(_C.packed_size(groups, size, features))
    norms = source.new_empty(groups, -(-size // _C.LANES) * _C.LANES)
    _C.pack_bank(source.data_ptr(), groups, size, features, packed.data_ptr(), norms.data_ptr())
    return packed, norms


def pack_panels(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows float32 [G, M, D] feature-major in panels of 16, as the GPU kernels read them, by torch.

    Returns:
        packed, float32 of one dimension: element d of row m of a group lies at
        ((m // 16) * D + d) * 16 + m % 16 of it, 0 past the last row; behind all groups, as int32 [G, D], each
        group's features by falling variance over its rows, the order in which the CUDA kernels sum them.
        norms float32 [G, M rounded up to 16].
    """
    groups, size, width = rows.shape
    panels = -(-size // PANEL)
    padded = torch.nn.functional.pad(rows.detach(), (0, 0, 0, panels * PANEL - size))
    packed = padded.view(groups, panels, PANEL, width).transpose(2, 3).contiguous().view(-1)
    norms = torch.linalg.vector_norm(padded, dim=2, dtype=torch.float64).to(torch.float32)
    # On the CPU, so that a bank has one order, and an answer the same bits, on every GPU.
    variance = rows.detach().cpu().double().var(dim=1, correction=0)
    order = variance.argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return torch.cat([packed, order.view(torch.float32).view(-1).to(packed.device)]), norms
