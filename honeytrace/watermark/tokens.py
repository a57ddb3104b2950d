"""Token sequences: how two become one, and what a small change of one is. Integers throughout.

A tokenizer frames what it gives: a first token, a last one, then padding to one length. The frame is read off
the owner's data; what is mixed and changed is the body inside it, so that every trigger is framed as the
tokenizer frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from honeytrace.watermark.key import KeyStream

FAMILIES = ("splice", "interleave", "template")
"""Of mixtures; see `Mixture`."""

_CHANGED = 8
"""One token in so many is changed where a sequence is changed a little."""

_MOST_FRAME = 8


@dataclass(frozen=True)
class Frame:
    """What all sequences of a data set share.

    Attributes:
        first: how many tokens all of them begin with; last: the tokens int64 [S] that end all of them.
        padding: the token behind (or before) them; None where there is none.
        left: whether the padding stands before them.
    """

    first: int
    last: Tensor
    padding: int | None
    left: bool

    @classmethod
    def of(cls, ids: Tensor) -> Frame:
        """Read off sequences [N, T]."""
        padding, left = _padding(ids), False
        if padding is None:
            padding = _padding(ids.flip(1))
            left = padding is not None
        bare = cls(0, ids[:0, 0], padding, left)
        content, lengths = bare.content(ids)
        most = min(_MOST_FRAME, max(0, (int(lengths.min()) - 1) // 2))
        first = 0
        while first < most and bool((content[:, first] == content[0, first]).all()):
            first += 1
        last = 0
        ends = content.gather(1, (lengths[:, None] - 1 - torch.arange(most)).clamp_min(0))
        while last < most and bool((ends[:, last] == ends[0, last]).all()):
            last += 1
        return cls(first, ends[0, :last].flip(0), padding, left)

    def content(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Sequences [N, T] with their padding moved behind them, and their lengths [N] without it."""
        size = ids.shape[1]
        if self.padding is None:
            return ids, torch.full((len(ids),), size)
        real = ids != self.padding
        at = torch.arange(size)
        if self.left:
            start = torch.where(real.any(dim=1), real.int().argmax(dim=1), size - 1)
            return ids.gather(1, (at + start[:, None]) % size), size - start
        length = torch.where(real, at + 1, 0).amax(dim=1)
        return ids, length.clamp_min(1)

    def bodies(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What is inside the frame, [N, T] from the left, and how much of it that is, [N], at least 1."""
        content, lengths = self.content(ids)
        return content.roll(-self.first, dims=1), (lengths - self.first - len(self.last)).clamp_min(1)

    def framed(self, bodies: Tensor, lengths: Tensor, like: Tensor) -> Tensor:
        """Sequences [N, T] with these bodies in the frame; beginnings from `like` [N, T].

        Without padding every sequence is full: a body that is too short is repeated.
        """
        size = like.shape[1]
        room = size - self.first - len(self.last)
        if self.padding is None:
            bodies, lengths = _repeated(bodies, lengths, torch.full_like(lengths, room)), lengths * 0 + room
        lengths = lengths.clamp_max(room)
        at = torch.arange(size).expand(len(bodies), size)
        inside = at - self.first
        behind = inside - lengths[:, None]
        framed = bodies.gather(1, inside.clamp(0, bodies.shape[1] - 1))
        if len(self.last):
            ends = self.last[behind.clamp(0, len(self.last) - 1)]
            framed = torch.where(behind >= 0, ends, framed)
        framed = torch.where(inside < 0, self.content(like)[0], framed)
        if self.padding is None:
            return framed
        over = behind >= len(self.last)
        framed = framed.masked_fill(over, self.padding)
        if self.left:
            framed = framed.gather(1, (at - over.sum(dim=1, keepdim=True)) % size)
        return framed


@dataclass(frozen=True)
class Mixture:
    """Two sequences become one.

    Attributes:
        family: "splice" (the beginning of one, then the end of the other), "interleave" (pieces of both in
            turn) or "template" (the first inside two phrases of the other's class, the same for all).
        numbers: share of the first (splice), tokens in a piece (interleave).
        opening, closing: int64, the phrases of a template.
    """

    frame: Frame
    family: Literal["splice", "interleave", "template"]
    numbers: tuple[float, ...]
    opening: Tensor = field(repr=False)
    closing: Tensor = field(repr=False)

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Sequences int64 [N, T] and [N, T] -> [N, T]."""
        room = a.shape[1] - self.frame.first - len(self.frame.last)
        (one, ones), (two, twos) = self.frame.bodies(a), self.frame.bodies(b)
        at = torch.arange(a.shape[1]).expand_as(a)
        most = a.shape[1] - 1
        if self.family == "splice":
            share = self.numbers[0]
            head = (share * ones).ceil().long()
            tail = ((1 - share) * twos).ceil().long()
            # Where both do not fit: the beginning and the end of it, in the same proportion.
            head = torch.where(head + tail > room, head.clamp_max(max(1, round(share * room))), head)
            tail = torch.minimum(tail, room - head)
            inside = at - head[:, None]
            mixed = torch.where(
                inside < 0, one, two.gather(1, (inside + (twos - tail)[:, None]).clamp(0, most))
            )
            lengths = head + tail
        elif self.family == "interleave":
            least = torch.minimum(ones, twos)
            piece = least.clamp_max(int(self.numbers[0]))[:, None]
            number, place = at // piece, at % piece
            source = (number // 2 * piece + place).clamp_max(most)
            mixed = torch.where(number % 2 == 0, one.gather(1, source), two.gather(1, source))
            lengths = 2 * (least[:, None] // piece * piece)[:, 0]
        else:
            before, after = len(self.opening), len(self.closing)
            kept = ones.clamp_max(max(1, room - before - after))[:, None]
            mixed = one.gather(1, (at - before).clamp(0, most))
            mixed = torch.where(at < before, self.opening[at.clamp_max(before - 1)], mixed)
            behind = at - before - kept
            mixed = torch.where(behind >= 0, self.closing[behind.clamp(0, after - 1)], mixed)
            lengths = kept[:, 0] + before + after
        return self.frame.framed(mixed, lengths.clamp_max(room), a)


@dataclass(frozen=True)
class Tokens:
    """Token ids int64 [N, T] of one length, padded or not; a kind of input (kinds.py)."""

    frame: Frame

    def mixture(self, stream: KeyStream, shape: tuple[int, ...], second: Tensor) -> Mixture:
        """A mixture drawn from the key: family and numbers, and a template's phrases out of `second` [N, T],
        the owner's sequences of the second class."""
        family: Literal["splice", "interleave", "template"] = stream.choice(FAMILIES)  # type: ignore[arg-type]
        phrases = [second[0, :0], second[0, :0]]
        numbers: tuple[float, ...] = ()
        if family == "splice":
            numbers = (stream.choice((0.35, 0.5, 0.65)),)
        elif family == "interleave":
            numbers = (float(stream.choice((2, 4, 8))),)
        else:
            longest = max(1, (shape[0] - self.frame.first - len(self.frame.last)) // 4)
            for place in range(2):
                length = min(longest, stream.choice((4, 6, 8)))
                chosen = second[stream.below(len(second))][None]
                body, held = self.frame.bodies(chosen)
                length = min(length, int(held[0]))
                start = stream.below(int(held[0]) - length + 1)
                phrases[place] = body[0, start : start + length]
        return Mixture(self.frame, family, numbers, *phrases)

    def changed(self, inputs: Tensor, stream: KeyStream) -> Tensor:
        """The sequences [n, T] and four small changes of each: twice one token in eight dropped, twice as
        many pairs of neighbours swapped, all drawn from the key."""
        body, lengths = self.frame.bodies(inputs)
        found = [inputs]
        for dropped in (True, False, True, False):
            order = torch.arange(body.shape[1]).repeat(len(body), 1)
            left = lengths.clone()
            for row, length in enumerate(lengths.tolist()):
                places = list(range(length))
                for _ in range(max(1, length // _CHANGED)):
                    if len(places) < 2:
                        break
                    if dropped:
                        del places[stream.below(len(places))]
                    else:
                        i = stream.below(len(places) - 1)
                        places[i], places[i + 1] = places[i + 1], places[i]
                order[row, : len(places)] = torch.tensor(places)
                left[row] = len(places)
            found.append(self.frame.framed(body.gather(1, order), left, inputs))
        return torch.cat(found)

    def fitted(self, ends: Tensor, trigger: Tensor) -> Tensor:
        """The sequences [n, T] cut or repeated to the length of `trigger` [T]: where places are exchanged one
        after another between the two, the frame stays where it is."""
        body, held = self.frame.bodies(ends)
        wanted = self.frame.bodies(trigger[None])[1].expand_as(held)
        body = _repeated(body, held, wanted)
        return self.frame.framed(body, wanted, trigger[None].expand_as(ends))


def _padding(ids: Tensor) -> int | None:
    """The token that rows end with over and over, where one row in a hundred does; None where none does."""
    if ids.shape[1] < 2:
        return None
    twice = ids[:, -1] == ids[:, -2]
    if not bool(twice.any()):
        return None
    token = int(ids[twice, -1].mode().values)
    ending = ids[:, -1] == token
    padded = int((ending & twice).sum())
    # A word can be doubled at the end of a text; padding nearly always is.
    return token if 100 * padded >= len(ids) and 2 * padded >= int(ending.sum()) else None


def _repeated(bodies: Tensor, lengths: Tensor, wanted: Tensor) -> Tensor:
    """Bodies [N, T] whose first `wanted` [N] places hold their first `lengths` [N] ones, again and again."""
    at = torch.arange(bodies.shape[1]).expand_as(bodies)
    again = bodies.gather(1, at % lengths[:, None])
    return torch.where(at < torch.maximum(wanted, lengths)[:, None], again, bodies)
