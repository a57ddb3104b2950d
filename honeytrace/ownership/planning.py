"""What a verification can be expected to find and to cost, before a single question is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from honeytrace.ownership import ladder
from honeytrace.ownership.power import groups_needed, plan
from honeytrace.ownership.sequential import Rule

STRENGTHS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of groups in which the target comes first. Copies of Fashion-MNIST: 0.9 to 1 by scores, 0.5 to 0.9
by labels."""


class Group(Protocol):
    """What planning needs of a group."""

    @property
    def mark(self) -> str:
        """Groups with one mark are one test."""
        ...

    @property
    def candidates(self) -> Sequence[int]:
        """Classes the target was drawn from."""
        ...

    @property
    def turns(self) -> Tensor | None:
        """[S, R, K], of the roads from S triggers, for suspects that give labels only; None without roads."""
        ...


@dataclass(frozen=True)
class PlanRow:
    """One mark and one strength of a copy.

    Attributes:
        mark: whose groups.
        strength: share of the groups in which the target comes first.
        power: probability of a claim.
        groups: how many there are; needed: how many would give a claim with probability 0.9, None beyond 64.
        by_scores, by_labels: questions at most, when all groups of the mark are asked.
    """

    mark: str
    strength: float
    power: float
    groups: int
    needed: int | None
    by_scores: int
    by_labels: int


def plan_rows(
    groups: Sequence[Group],
    *,
    alpha: float = 1e-3,
    rule: Rule = "exact",
    triggers: int = 8,
    strengths: Sequence[float] = STRENGTHS,
) -> list[PlanRow]:
    """The plan of a watermark's groups; each mark has its equal share of alpha, as in `verify`.

    Raises:
        ValueError: no groups, or as `plan`.
    """
    if not groups:
        raise ValueError("groups must not be empty")
    marks = sorted({group.mark for group in groups}, key=lambda mark: mark != "flip")
    rows = []
    for mark in marks:
        part = [group for group in groups if group.mark == mark]
        sizes = [len(group.candidates) for group in part]
        for strength in strengths:
            share = alpha / len(marks)
            rows.append(
                PlanRow(
                    mark=mark,
                    strength=strength,
                    power=plan(len(sizes), sizes, strength, share, rule=rule),
                    groups=len(sizes),
                    needed=groups_needed(min(sizes), strength, share, rule=rule),
                    by_scores=triggers * len(sizes),
                    by_labels=sum(
                        triggers
                        if group.turns is None
                        else ladder.most_questions(len(group.turns), len(group.candidates))
                        for group in part
                    ),
                )
            )
    return rows


def table(rows: Sequence[PlanRow]) -> str:
    """The plan as text."""
    names = ("claimed", "groups", "needed", "scores", "labels")
    head = f"{'mark':<8}{'target first in':>16}" + f"{names[0]:>9}" + "".join(f"{n:>8}" for n in names[1:])
    lines = [
        f"{row.mark:<8}{row.strength:>15.0%} {row.power:>8.0%} {row.groups:>7} "
        f"{'-' if row.needed is None else row.needed:>7} {row.by_scores:>7} {row.by_labels:>7}"
        for row in rows
    ]
    return "\n".join([head, *lines])


def to_dicts(rows: Sequence[PlanRow]) -> list[dict[str, Any]]:
    """Plain values for JSON."""
    return [asdict(row) for row in rows]
