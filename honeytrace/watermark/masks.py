"""How two samples are put together into one: masks for `honeytrace.ops.compose`, drawn from the key.

A mask says for every position which share comes from the second sample. Families follow the combiners of
Composite Backdoor Attack (Lin et al., CCS 2020, section 4.1), MEA-Defender (arXiv 2401.15239, section IV-B)
and the composite bank of Neural Honeytrace (arXiv 2501.09328, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from honeytrace.watermark.key import KeyStream

PLANE_FAMILIES = ("quadrant", "half", "stripes", "diagonal", "donut", "band", "paste", "blend")
"""For inputs with height and width."""

LINE_FAMILIES = ("columns", "half", "stripes", "band")
"""For inputs that are one row of a table [D]. Each column is wholly one row's or the other's: a mean of two
values is often no value of the column."""


@dataclass(frozen=True)
class Mask:
    """A family and its geometry as fractions of the sample's size, so that it fits every size.

    Attributes:
        family: one of PLANE_FAMILIES or LINE_FAMILIES.
        numbers: what the family needs; see `draw_mask`.
    """

    family: str
    numbers: tuple[float, ...]

    def render(self, shape: Sequence[int]) -> Tensor:
        """The mask for samples of this shape: float32, [H, W] for [..., H, W], [D] for [D].

        Raises:
            ValueError: the family is none for a shape of so many dimensions, or it has none.
        """
        if not shape:
            raise ValueError("shape must have at least one dimension, got ()")
        if self.family not in (PLANE_FAMILIES if len(shape) > 1 else LINE_FAMILIES):
            wanted = "one dimension" if self.family == "columns" else "height and width"
            raise ValueError(f"mask family {self.family!r} needs {wanted}, got shape {list(shape)}")
        if self.family == "blend":
            return torch.full(tuple(shape[-2:]), self.numbers[0])
        if len(shape) == 1:
            if self.family == "columns":
                chosen = [min(shape[0] - 1, int(place * shape[0])) for place in self.numbers]
                return torch.zeros(shape[0]).index_fill(0, torch.tensor(chosen, dtype=torch.int64), 1.0)
            return self._along(torch.arange(shape[0]), shape[0])
        rows = torch.arange(shape[-2])[:, None].expand(shape[-2], shape[-1])
        columns = torch.arange(shape[-1])[None, :].expand(shape[-2], shape[-1])
        y, x = (rows + 0.5) / shape[-2], (columns + 0.5) / shape[-1]
        if self.family == "quadrant":
            down, right = self.numbers
            inside = ((y > 0.5) == (down > 0)) & ((x > 0.5) == (right > 0))
        elif self.family == "diagonal":
            inside = (y > x) if self.numbers[0] > 0 else (y > 1 - x)
        elif self.family == "donut":
            inner, outer = self.numbers
            radius = ((y - 0.5) ** 2 + (x - 0.5) ** 2).sqrt()
            inside = (radius >= inner) & (radius <= outer)
        elif self.family == "paste":
            top, left, height, width = self.numbers
            inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
        else:
            vertical, *numbers = self.numbers
            mask = Mask(self.family, (0.0, *numbers))
            return mask._along(columns, shape[-1]) if vertical > 0 else mask._along(rows, shape[-2])
        return inside.float()

    def _along(self, position: Tensor, size: int) -> Tensor:
        """The families that change along one axis only. `position` counts from 0 to size - 1."""
        numbers = self.numbers[1:]
        centre = (position + 0.5) / size
        if self.family == "half":
            inside = (centre > 0.5) == (numbers[0] > 0)
        elif self.family == "stripes":
            width = max(1, round(numbers[0] * size))
            inside = (position // width) % 2 == 1
        else:
            inside = (centre >= numbers[0]) & (centre < numbers[0] + numbers[1])
        return inside.float()


def draw_mask(stream: KeyStream, shape: Sequence[int]) -> Mask:
    """A mask for samples of this shape: family and geometry uniform over a small grid, from the stream."""
    family = stream.choice(PLANE_FAMILIES if len(shape) > 1 else LINE_FAMILIES)
    flag = float(stream.below(2))
    numbers: tuple[float, ...]
    if family == "columns":
        size = shape[0]
        count = min(max(1, round(stream.choice((0.3, 0.5, 0.7)) * size)), max(1, size - 1))
        numbers = tuple((place + 0.5) / size for place in sorted(stream.permutation(size)[:count]))
    elif family in ("quadrant", "half"):
        numbers = (flag, float(stream.below(2)))
    elif family == "stripes":
        numbers = (flag, stream.choice((1 / 14, 1 / 7, 1 / 4)))
    elif family == "diagonal":
        numbers = (flag,)
    elif family == "donut":
        inner = stream.choice((0.15, 0.2, 0.25))
        numbers = (inner, inner + stream.choice((0.15, 0.2)))
    elif family == "band":
        numbers = (flag, stream.choice((0.2, 0.3, 0.4)), stream.choice((0.3, 0.4)))
    elif family == "paste":
        numbers = (
            *(stream.choice((0.1, 0.25, 0.4)) for _ in range(2)),
            *(stream.choice((0.4, 0.5)) for _ in range(2)),
        )
    else:
        numbers = (stream.choice((0.4, 0.5, 0.6)),)
    return Mask(family, numbers)
