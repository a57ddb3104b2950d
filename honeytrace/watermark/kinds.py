"""Kinds of input, and what the trigger families need to know of each: how two samples become one, and what a
small change of one is.

    float32 [N, ..., H, W]  images      masks; moved by a pixel
    float32 [N, D]          tables      columns from one row or the other; a few columns of a neighbour's
    int64 [N, T]            tokens      splice, interleave, template; tokens dropped and swapped (tokens.py)

All that is drawn comes from the key's stream for inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from honeytrace.ops import compose
from honeytrace.watermark.key import KeyStream
from honeytrace.watermark.masks import draw_mask
from honeytrace.watermark.tokens import Frame, Tokens

_CHANGED_COLUMNS = 6
"""One column in so many is another row's where a row is changed a little."""


class Kind(Protocol):
    """What differs between kinds of input."""

    def mixture(
        self, stream: KeyStream, shape: tuple[int, ...], second: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """A way to make one sample of two, ([n, ...], [n, ...]) -> [n, ...], drawn from the key.

        Args:
            shape: of a sample; second: the owner's samples of the class that the second ones are of.
        """

    def changed(self, inputs: Tensor, stream: KeyStream) -> Tensor:
        """The inputs [n, ...], then small changes of them: [m, ...], m >= n."""

    def fitted(self, ends: Tensor, trigger: Tensor) -> Tensor:
        """Samples [n, ...] made so that a road can lead to them from `trigger` [...]."""


class Images:
    """Numbers with height and width, and whatever else is float32 and no table."""

    def mixture(
        self, stream: KeyStream, shape: tuple[int, ...], second: Tensor
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """By a mask."""
        return _by_mask(stream, shape)

    def changed(self, inputs: Tensor, stream: KeyStream) -> Tensor:
        """Images [n, C, H, W] are moved by one pixel in four directions.

        The row or column that is uncovered repeats the edge, as a camera that moved a little would.
        """
        if inputs.dim() != 4 or min(inputs.shape[-2:]) < 4:
            return inputs
        padded = torch.nn.functional.pad(inputs, (1, 1, 1, 1), mode="replicate")
        height, width = inputs.shape[-2:]
        moved = [
            padded[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
            for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1))
        ]
        return torch.cat([inputs, *moved])

    def fitted(self, ends: Tensor, trigger: Tensor) -> Tensor:
        """As they are."""
        return ends


class Tables(Images):
    """Rows of columns, each with values of its own: no column ever gets a value that it does not have."""

    def changed(self, inputs: Tensor, stream: KeyStream) -> Tensor:
        """Four times, one column in six of each row [n, D] is another's of these rows."""
        count, columns = inputs.shape
        if count < 2:
            return inputs
        found = [inputs]
        for _ in range(4):
            rows = inputs.clone()
            for row in range(count):
                other = (row + 1 + stream.below(count - 1)) % count
                chosen = stream.permutation(columns)[: max(1, columns // _CHANGED_COLUMNS)]
                rows[row, chosen] = inputs[other, chosen]
            found.append(rows)
        return torch.cat(found)


def kind_of(inputs: Tensor) -> Kind:
    """The kind that inputs [N, ...] are of; what all of them share (a tokenizer's frame) is read off them."""
    if not inputs.is_floating_point():
        return Tokens(Frame.of(inputs))
    return Tables() if inputs.dim() == 2 else Images()


def _by_mask(stream: KeyStream, shape: tuple[int, ...]) -> Callable[[Tensor, Tensor], Tensor]:
    mask = draw_mask(stream, shape).render(shape)

    def mix(a: Tensor, b: Tensor) -> Tensor:
        return compose(a, b, mask)

    return mix
