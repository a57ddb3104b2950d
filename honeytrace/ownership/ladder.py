"""How near a suspect's labels come to each candidate class: questions on roads from triggers to the class.

A road leads from a trigger in STEPS steps to an end that is of class c. The owner's reference turns to c at
a known step; a suspect that already says c some steps *earlier* leans to c. How many steps earlier is found
rung by rung, for all candidates alike: who passes a rung climbs on, until one candidate is alone or the
ladder ends; where nobody passes, the next lower rung is tried. Rungs passed are summed over the roads, and
the next trigger's roads are asked until one candidate leads. Which question comes next depends on the
suspect's answers only, never on the target, so the score is a fixed function of suspect, questions and
candidate, and the tests built on it stay exact.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from honeytrace.ownership.answers import FloatArray, IntArray

STEPS = 32
"""Steps of a road; step 0 is the trigger, step STEPS the end."""

STARTS = 4
"""Roads begin at so many triggers of a group at most, its first ones: one trigger's roads have whims of their
own. More than four tell no more."""

LEAD = 3
"""Rungs. Once one candidate leads the next by so many, no further start is asked."""


@dataclass(frozen=True)
class Ladder:
    """Rungs: steps before the reference's own turning point (negative: behind it), ascending. Asking begins
    at rung `start`."""

    rungs: tuple[int, ...]
    start: int


LADDERS = (Ladder((2, 5, 8), 0), Ladder((-7, -4, -1), 0))
"""For the natural road and for the one by gradients, from each start. (The second begins behind the
reference's turning point: steps along the reference's own gradient reach it sooner than any other model.)

Rungs, starts and lead were chosen together on 54 copies of three Fashion-MNIST victims, ten of them after
removals; what was compared is in docs/strength.md ("Roads by label").
"""

SCORE_NOISE = 0.1
"""Rungs. One rung more in one group of equal candidates is evidence; see calibrator.py (scale_floor)."""


def steps() -> range:
    """0 to STEPS."""
    return range(STEPS + 1)


def blend(trigger: Tensor, end: Tensor, step: int) -> Tensor:
    """The input at a step of the road: float32 or int64, the same bits on every machine.

    Of numbers, a mean: two products by dyadic numbers and one sum, each rounded once; NumPy does not fuse
    them. Of token ids there is no mean: of the places where trigger and end differ, the first ones are the
    end's.
    """
    if not trigger.is_floating_point():
        mixed = trigger.detach().cpu().clone()
        places = (mixed != end.cpu()).nonzero()[:, 0]
        places = places[: (2 * step * len(places) + STEPS) // (2 * STEPS)]
        mixed[places] = end.detach().cpu()[places]
        return mixed
    share = np.float32(step / STEPS)
    near, far = trigger.detach().cpu().float().numpy(), end.detach().cpu().float().numpy()
    return torch.from_numpy(near * np.float32(1 - share) + far * share)


def climb(
    starts: Tensor,
    ends: Tensor,
    turns: Sequence[Sequence[Sequence[int]]],
    candidates: IntArray,
    order: Sequence[int],
    ladders: Sequence[Ladder] = LADDERS,
) -> Generator[Tensor, IntArray, FloatArray]:
    """Yield questions [n, ...], take their labels [n], and return the scores [K].

    Args:
        starts: float32 [S, ...] or int64 [S, T], triggers; their roads are asked one start after another,
            until one candidate leads by LEAD.
        ends: [S, R, K, ...]; turns: [S, R, K], where the reference turns.
        candidates: [K] class numbers.
        order: a permutation of range(K), in which candidates are asked.
        ladders: R of them, for the roads of every start.

    Returns:
        [K]: the rungs passed on all roads asked, together.
    """
    score = np.zeros(len(candidates))
    for trigger, its_ends, its_turns in zip(starts, ends, turns, strict=True):
        for road, ladder in enumerate(ladders):
            score += yield from _race(trigger, its_ends[road], its_turns[road], candidates, order, ladder)
        second, first = np.sort(score)[-2:]
        if first - second >= LEAD:
            break
    return score


def _race(
    trigger: Tensor,
    ends: Tensor,
    turns: Sequence[int],
    candidates: IntArray,
    order: Sequence[int],
    ladder: Ladder,
) -> Generator[Tensor, IntArray, IntArray]:
    """As `climb`, along one road to each candidate: ends [K, ...], turns [K]."""
    passed = np.zeros(len(candidates), dtype=np.int64)
    rung, climbing, racing = ladder.start, True, list(order)
    while True:
        places = [min(STEPS, max(0, int(turns[k]) - ladder.rungs[rung])) for k in racing]
        labels = yield torch.stack([blend(trigger, ends[k], p) for k, p in zip(racing, places, strict=True)])
        hits = [k for k, label in zip(racing, labels, strict=True) if label == candidates[k]]
        if rung == ladder.start:
            climbing = bool(hits)
            passed[:] = rung
        elif not climbing:
            passed[:] = rung
        passed[hits] = rung + 1
        if climbing:
            racing = hits
            rung += 1
            if len(racing) <= 1 or rung == len(ladder.rungs):
                return passed
        else:
            rung -= 1
            if hits or rung < 0:
                return passed


def most_questions(starts: int, candidates: int, ladders: Sequence[Ladder] = LADDERS) -> int:
    """Questions of one group at most."""
    rungs = sum(max(len(ladder.rungs) - ladder.start, ladder.start + 1) for ladder in ladders)
    return starts * rungs * candidates
