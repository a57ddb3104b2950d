"""What calibration chose and what it costs, to be read. Nothing here gives a trigger or a target away."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from honeytrace import notebook
from honeytrace.ownership.power import plan, smallest_p_value
from honeytrace.watermark.groups import Family, Mark


@dataclass(frozen=True, kw_only=True)
class GroupSummary:
    """One group: its kind, the share of likely queries it marks, and how well a copy should learn it.

    Attributes:
        share: of likely queries within the group's offset.
        lift: predicted share of the mark that a copy shows at the triggers, in [0, 1].
        isolation: distance to the second nearest cluster over that to its own; 0 for composites.
        candidates, triggers: how many.
    """

    family: Family
    mark: Mark
    share: float
    lift: float
    isolation: float
    candidates: int
    triggers: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Attributes:
    budget: the accuracy drop that was allowed (share of answers).
    accuracy, accuracy_graded, accuracy_marked: of the bare model, with the graded mark, with all marks.
    expected_drop: what the model's own probabilities expect all marks to cost.
    strength: of the graded mark, after fitting.
    bent, flipped: share of likely queries whose answer changes at all, and whose label is replaced.
    measured_on: number of samples behind the accuracies.
    groups: one entry a group.
    """

    budget: float
    accuracy: float
    accuracy_graded: float
    accuracy_marked: float
    expected_drop: float
    strength: float
    bent: float
    flipped: float
    measured_on: int
    groups: tuple[GroupSummary, ...]

    @classmethod
    def empty(cls) -> Summary:
        """Before anything was measured."""
        numbers = {entry.name: 0 for entry in dataclasses.fields(cls) if entry.name != "groups"}
        return cls(**numbers, groups=())

    def of(self, mark: Mark) -> tuple[GroupSummary, ...]:
        """The groups with this mark."""
        return tuple(group for group in self.groups if group.mark == mark)

    def without_flips(self) -> Summary:
        """The same watermark's graded part."""
        return dataclasses.replace(
            self,
            accuracy_marked=self.accuracy_graded,
            expected_drop=0.0,
            flipped=0.0,
            groups=self.of("graded"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Summary:
        """What `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: other fields, numbers that are not finite, unknown words.
        """
        groups = tuple(GroupSummary(**group) for group in fields["groups"])
        summary = cls(**{**fields, "groups": groups})
        parts: tuple[Summary | GroupSummary, ...] = (summary, *groups)
        for part in parts:
            for entry in dataclasses.fields(part):
                value = getattr(part, entry.name)
                if entry.type in ("float", "int"):
                    number = type(value) is int or (entry.type == "float" and type(value) is float)
                    if not number or not -1e9 <= value <= 1e9:
                        raise ValueError(f"{entry.name} must be a finite number of type {entry.type}")
        for group in groups:
            if group.family not in get_args(Family) or group.mark not in get_args(Mark):
                raise ValueError("family and mark must be known words")
            if group.candidates < 1 or group.triggers < 1:
                raise ValueError("candidates and triggers must be at least 1")
        return summary

    def warnings(self, alpha: float = 1e-3) -> list[str]:
        """What this watermark cannot promise, in words; empty when there is nothing to warn of."""
        found = []
        parts = len({group.mark for group in self.groups})  # each mark is tested at its share of alpha
        for mark, attackers in (
            ("graded", "attackers who use scores"),
            ("flip", "attackers who use labels only"),
        ):
            groups = self.of("graded" if mark == "graded" else "flip")
            if not groups:
                why = " (left out, or dearer than the accuracy budget)" if mark == "flip" else ""
                found.append(f"no {mark} mark{why}: nothing is promised against {attackers}")
                continue
            best = min(1.0, parts * smallest_p_value([group.candidates for group in groups]))
            if best > alpha:
                found.append(f"{mark}: even a perfect copy would only reach p = {best:.2g}, not {alpha:g}")
                continue
            chance = plan(
                len(groups),
                [group.candidates for group in groups],
                [_first(group) for group in groups],
                alpha / parts,
            )
            if chance < 0.25:  # the lift understates how often the target comes first
                found.append(
                    f"{mark}: a claim at {alpha:g} is unlikely (about {chance:.0%}); {attackers} may get away"
                )
        return found

    def __str__(self) -> str:
        lines = [name + value for name, value in self._facts()]
        lines += [f"  warning: {text}" for text in self.warnings()]
        return "\n".join(["Watermark, as calibrated", *lines])

    def _repr_html_(self) -> str:
        rows = [
            (
                group.mark,
                group.family,
                f"{group.share:.2%}",
                f"{group.lift:.2f}",
                f"{group.candidates}",
                f"{group.triggers}",
            )
            for group in self.groups
        ]
        facts = [(name.strip(), value.strip()) for name, value in self._facts()]
        warnings = self.warnings()
        return notebook.card(
            "Watermark, as calibrated",
            notebook.facts(facts),
            notebook.table(("mark", "family", "share", "lift", "candidates", "triggers"), rows),
            notebook.notes(f"warning: {text}" for text in warnings),
            side="bad" if warnings else "good",
        )

    def _facts(self) -> list[tuple[str, str]]:
        def points(value: float) -> str:
            return f"{100 * value:.2f} points"

        facts = [
            ("  accuracy, bare model       ", f"{self.accuracy:.2%}  (on {self.measured_on:,} samples)"),
            ("  accuracy lost, graded mark ", points(self.accuracy - self.accuracy_graded)),
            (
                "  accuracy lost, all marks   ",
                f"{points(self.accuracy - self.accuracy_marked)}  (expected {points(self.expected_drop)}, "
                f"allowed {points(self.budget)})",
            ),
            (
                "  answers changed at all     ",
                f"{self.bent:.2%} of likely queries, by at most {self.strength:.2g}",
            ),
            ("  labels replaced            ", f"{self.flipped:.2%} of likely queries"),
        ]
        for mark in ("graded", "flip"):
            groups = self.of("graded" if mark == "graded" else "flip")
            if groups:
                lifts = [group.lift for group in groups]
                kinds = {
                    family: sum(g.family == family for g in groups) for family in ("cluster", "composite")
                }
                kind = ", ".join(f"{count} {family}" for family, count in kinds.items() if count)
                facts.append(
                    (
                        f"  {mark + ' groups':<27}",
                        f"{len(groups)} ({kind}); predicted lift {min(lifts):.2f} to {max(lifts):.2f}; "
                        f"{groups[0].triggers} triggers each",
                    )
                )
        return facts


def _first(group: GroupSummary) -> float:
    """Chance that a copy puts the target first: by the mark, or where that is not learned, by luck."""
    lift = max(0.0, min(0.95, group.lift))
    return lift + (1 - lift) / group.candidates
