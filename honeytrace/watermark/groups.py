"""One trigger group: where answers are bent, towards what, and the inputs that prove it later."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from honeytrace.ownership.suspect import input_bytes
from honeytrace.watermark.key import KeyStream, SecretKey

Family = Literal["composite", "cluster"]
Mark = Literal["graded", "flip"]

MOST_CANDIDATES = 16
"""A target is drawn from at most so many classes. Four groups of 16 reach beyond 1e-3 already, and a suspect
that gives labels only has to be asked about every candidate."""


@dataclass(frozen=True, kw_only=True)
class TriggerGroup:
    """A trigger group with its target. Only `family` and `mark` are shown in the repr.

    Attributes:
        family: "composite" (two samples put together by a mask) or "cluster" (a compact group of natural
            samples).
        mark: "graded" (a share of the target's answer is mixed in) or "flip" (the answer is the target's).
        sources: the two classes the group lies between; never among the candidates.
        candidates: the classes the target was drawn from, ascending; see `candidates_of`.
        target: the class answers are bent to. Drawn from the key, independent of everything else in the
            group.
        triggers: float32 [n, ...], or token ids int64 [n, T]: what a suspect will be asked.
        reference_log_probs: float32 [n, C], the unmarked reference on the triggers; [R, n, C] of several, the
            plain one first.
        ends, turns: [S, 2, K, ...] of the triggers' dtype and int64 [S, 2, K], two roads from each of the
            first S triggers to every candidate, for suspects that give labels only (probes.py); None where
            the watermark was made without them. `calibrate` makes them for `probes.starts_for` triggers.
    """

    family: Family
    mark: Mark
    sources: tuple[int, int] = field(repr=False)
    candidates: tuple[int, ...] = field(repr=False)
    target: int = field(repr=False)
    triggers: Tensor = field(repr=False)
    reference_log_probs: Tensor = field(repr=False)
    ends: Tensor | None = field(default=None, repr=False)
    turns: Tensor | None = field(default=None, repr=False)


def candidates_of(sources: tuple[int, int], num_classes: int, stream: KeyStream) -> tuple[int, ...]:
    """The classes a group's target is drawn from, ascending: all but its sources.

    Where those are more than MOST_CANDIDATES, so many of them, drawn from the key's stream for inputs.
    """
    others = [c for c in range(num_classes) if c not in sources]
    if len(others) <= MOST_CANDIDATES:
        return tuple(others)
    return tuple(sorted(others[i] for i in stream.permutation(len(others))[:MOST_CANDIDATES]))


def draw_target(
    key: SecretKey, triggers: Tensor, candidates: Sequence[int], beacon: str | None = None
) -> int:
    """The target of a group: uniform over its candidates.

    Drawn from a stream of the key that is named after the triggers and the candidates. So each group has its
    own draw, independent of all others and of the stream that chose the inputs; a target cannot be moved to
    another group; and whoever holds the opened key and the triggers can draw it again.

    Args:
        triggers: float32 [n, ...] or int64 [n, T]; candidates: at least one class.
        beacon: a public random value that was not known when key and triggers were committed to; then nobody
            could choose them for their target (docs/ownership.md).
    """
    digest = hashlib.sha256(repr((tuple(triggers.shape), tuple(candidates))).encode("ascii"))
    digest.update(input_bytes(triggers))
    purpose = f"target/{digest.hexdigest()}"
    if beacon is not None:
        purpose += f"/beacon/{hashlib.sha256(beacon.encode('utf-8')).hexdigest()}"
    return key.stream(purpose).choice(tuple(candidates))
