"""From results to tables: lines are attacks and removals, columns are defences, entries sum up the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from honeytrace.evaluation.plan import Plan
from honeytrace.evaluation.store import Result

WORTH_STEALING = 0.15
"""A copy further than this below the victim's accuracy is not worth stealing; its entries are in brackets."""

MISSING, NOT_APPLICABLE, FAILED, NOT_MET = "...", "n/a", "failed", "·"


@dataclass
class Table:
    """One figure for all pairs.

    Attributes:
        title: what the figure is; note: how to read it.
        head: first cell, then the names of the defences.
        lines: name of the attack or removal, then one text for each defence.
        notes: reasons of entries that do not apply or failed.
    """

    title: str
    note: str
    head: list[str]
    lines: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """A heading, the note, the table."""
        rows = [self.head, ["---"] * len(self.head), *self.lines]
        body = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        return "\n\n".join([f"## {self.title}", self.note, body, *self.notes]) + "\n"


def tables(plan: Plan, results: Sequence[Result]) -> list[Table]:
    """All tables of an evaluation.

    Args:
        plan: names rows and columns, in their order.
        results: of its cells, as many as there are.
    """
    grid = _grid(results)
    matrix = [
        ("Claims by scores", _CLAIMS, lambda found: _claims(found, "scores")),
        ("Claims by labels only", _CLAIMS, lambda found: _claims(found, "labels")),
        (
            "Accuracy of the copy, %",
            "On the test images: mean over the seeds, lowest and highest in brackets.",
            lambda found: _spread([100 * f["accuracy_copy"] for f in found]),
        ),
        (
            "Fidelity of the copy, %",
            "Share of test images it labels as the bare victim does.",
            lambda found: _spread([100 * f["fidelity"] for f in found]),
        ),
        (
            "Watermark success rate, %",
            "Share of triggers that the copy answers with the target's label.",
            lambda found: _spread([100 * f["success_rate"] for f in found if "success_rate" in f]),
        ),
        (
            "Mean target probability on triggers, %",
            "Of the copy, and after the stroke of the owner's unmarked reference.",
            _probability,
        ),
        (
            "Queries of a t-test (p < 0.05)",
            "The figure of the literature, to compare with. It is no proof: see the ownership page. "
            "Median over the seeds; a dash: the copy's mean is not above the reference's.",
            _t_test,
        ),
    ]
    made = [_protected(plan, results), _nulls(plan, results)]
    for title, note, write in matrix:
        made.append(_matrix(plan, grid, title, note, write))
    return made


_CLAIMS = (
    "Seeds that are claimed of seeds tried, with the median number of queries until the claim; without any "
    "claim, the smallest p-value. In brackets: copies more than 15 points below the victim's accuracy."
)

Found = list[Result]


def _grid(results: Sequence[Result]) -> dict[tuple[str, str], Found]:
    grid: dict[tuple[str, str], Found] = {}
    for result in results:
        cell = result["cell"]
        grid.setdefault((cell["row"], cell["removal"] or cell["column"]), []).append(result)
    return grid


def _matrix(
    plan: Plan,
    grid: dict[tuple[str, str], Found],
    title: str,
    note: str,
    write: Callable[[Found], str],
) -> Table:
    table = Table(title, note, ["attack or removal", *plan.rows], [])
    reasons: dict[str, None] = {}
    unmet: dict[str, dict[str, None]] = {}
    for name in (*plan.columns, *plan.removals):
        line = [name]
        for row in plan.rows:
            found = grid.get((row, name), [])
            done = [result for result in found if result["status"] == "done"]
            for result in found:
                if result["status"] == "not applicable":
                    reasons[f"n/a, {name}: {result['reason']}."] = None
                elif result["status"] == "failed":
                    reasons[f"failed, {row} / {name}: {result['error']}."] = None
            if done:
                text = write(done)
                poor = statistics.mean(f["accuracy_bare"] - f["accuracy_copy"] for f in done)
                line.append(f"({text})" if poor > WORTH_STEALING and text not in ("", "-") else text)
            elif any(result["status"] == "failed" for result in found):
                line.append(FAILED)
            elif not plan.meets(row, name):
                line.append(NOT_MET)
                unmet.setdefault(plan.reasons[row], {})[row] = None
            else:
                line.append(NOT_APPLICABLE if found else MISSING)
        table.lines.append(line)
    table.notes = [
        *reasons,
        *(f"{NOT_MET}, {', '.join(rows)}: not in the plan; {why}." for why, rows in unmet.items()),
    ]
    return table


def _protected(plan: Plan, results: Sequence[Result]) -> Table:
    table = Table(
        "Accuracy of the protected model, %",
        "On the test images, without the defence and with it: mean over the seeds, lowest and highest in "
        "brackets. Triggers: share that the protected model itself answers with the target's label (a graded "
        "mark leaves labels alone). False alarms: the same of the sources' samples combined in all other "
        "ways.",
        [
            "defence",
            "bare",
            "protected",
            "points lost",
            "triggers, %",
            "false alarms, %",
            "why there may be no claim",
        ],
        [],
    )
    for row in plan.rows:
        done = [r for r in results if r["cell"]["row"] == row and r["status"] == "done"]
        # Figures of the row itself; cells of earlier days have fewer of them.
        latest = sorted(done, key=lambda result: len(result))
        once = list({result["cell"]["seed"]: result for result in latest}.values())
        if not once:
            table.lines.append([row, *[MISSING] * 5, ""])
            continue
        lost = [100 * (r["accuracy_bare"] - r["accuracy_protected"]) for r in once]
        table.lines.append(
            [
                row,
                _spread([100 * r["accuracy_bare"] for r in once]),
                _spread([100 * r["accuracy_protected"] for r in once]),
                _spread(lost, digits=2),
                *(_percent(once, figure) for figure in ("success_protected", "false_alarms")),
                _limits(once[0]),
            ]
        )
    return table


def _percent(results: Sequence[Result], figure: str) -> str:
    return _spread([100 * r[figure] for r in results if r.get(figure) is not None])


def _limits(result: Result) -> str:
    if result["claims"] is None:
        return str(result["why_no_claim"])
    smallest = result["smallest_p_value"]
    if smallest > result["cell"]["alpha"]:
        return f"a perfect copy would only reach p = {smallest:.2g}: too few groups for the level"
    return ""


def _nulls(plan: Plan, results: Sequence[Result]) -> Table:
    """False claims among the copies of the bare model."""
    done = [r for r in results if r["status"] == "done" and r.get("null")]
    table = Table(
        "False claims",
        "Copies of the bare model, made by every attack and removal, put to the test of the honeytrace "
        "watermark of their seed. Verdicts on copies of one seed share the draw of the targets and are not "
        "independent.",
        ["answers", "verdicts", "false claims", "smallest p-value"],
        [],
    )
    for answers in ("scores", "labels"):
        told = [r["claims"][answers] for r in done]
        claims = sum(t["claim"] for t in told)
        smallest = f"{min(t['p_value'] for t in told):.2g}" if told else MISSING
        table.lines.append([answers, str(len(told)), str(claims), smallest])
    return table


def _claims(found: Found, answers: str) -> str:
    told = [f["claims"][answers] for f in found if f["claims"] is not None]
    if not told:
        return "-"
    claimed = [t for t in told if t["claim"]]
    share = f"{len(claimed)}/{len(told)}"
    if claimed:
        return f"**{share}** in {statistics.median(t['queries'] for t in claimed):.0f}"
    return f"{share}, p {min(t['p_value'] for t in told):.1g}"


def _probability(found: Found) -> str:
    marked = [f for f in found if "target_probability" in f]
    if not marked:
        return "-"
    own = statistics.mean(100 * f["target_probability"] for f in marked)
    reference = statistics.mean(100 * f["target_probability_reference"] for f in marked)
    return f"{own:.1f} / {reference:.1f}"


def _t_test(found: Found) -> str:
    told = [f["t_test_queries"] for f in found if f.get("t_test_queries") is not None]
    return f"{statistics.median(told):.0f}" if told else "-"


def _spread(values: Sequence[float], digits: int = 1) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"
