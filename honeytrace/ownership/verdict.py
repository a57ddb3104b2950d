"""What a verification found, readable by people and by machines, with nothing secret in it.

DESIGN invariant 5: a verdict holds counts, ranks, p-values and e-values. Targets, source classes, triggers,
seeds and the key are not in it, so printing, logging or mailing it gives nothing away.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from honeytrace import notebook
from honeytrace.ownership.answers import AnswerKind
from honeytrace.ownership.sequential import Rule
from honeytrace.ownership.t_test import TTest


@dataclass(frozen=True, kw_only=True)
class GroupRecord:
    """One trigger group, in the order of asking.

    Attributes:
        index: the group's position in the watermark.
        candidates: K, number of classes the target was drawn from.
        target_rank: 1 is first; ties count against the owner.
        rank_p_value: target_rank / K, an exact p-value of this group alone.
        e_value: the group's e-value, between 0 and K; its mean is 1 for an uninvolved suspect.
        running_e: product of the e-values so far, of this part's groups.
        p_value: the rule's p-value of this part as it stood after this group.
        queries: triggers asked in this group.
    """

    index: int
    candidates: int
    target_rank: int
    rank_p_value: float
    e_value: float
    running_e: float
    p_value: float
    queries: int


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of `verify`.

    The claim rests on one rule, declared before the first question (`rule`), and on its p-value. Everything
    else is
    information: it may look stronger or weaker than the claim and changes nothing.

    Attributes:
        claim: True when p_value <= alpha: a suspect made without the owner's answers is claimed against with
            probability at most alpha, over the key's draw of the targets.
        alpha: that probability, as declared.
        rule: "exact" or "e-process"; see sequential.py.
        parts: number of tests (one for each kind of mark) that alpha was divided among, equally.
        p_value: the rule's own. An interrupted or stopped verification needs no correction.
        e_value: product of the groups' e-values at the claim, or after the last group; the mean over the
            parts where there are several. May be multiplied with e-values of other, independent keys.
        anytime_p_value: 1 / largest running e-value (at most 1): valid for any alpha, chosen at any time.
        exact_p_value: fixed-sample p-value of all groups together; None when asking stopped before the last
            group, where it would not hold. A second figure; no claim rests on it.
        smallest_p_value: what a perfect copy would get from the groups there are. Above alpha, no claim is
            possible.
        queries: triggers asked until the claim, or in all when there is none.
        queries_total: triggers of all groups.
        answers: "scores" or "labels", what was used.
        groups: one record a group, in the order of asking.
        t_test: the papers' comparison figure over all triggers asked. Not proof; see t_test.py.
    """

    claim: bool
    alpha: float
    rule: Rule
    parts: int = 1
    p_value: float
    e_value: float
    anytime_p_value: float
    exact_p_value: float | None
    smallest_p_value: float
    queries: int
    queries_total: int
    answers: AnswerKind
    groups: tuple[GroupRecord, ...]
    t_test: TTest | None

    def __str__(self) -> str:
        lines = [self._headline()]
        width = max(len(name) for name, _ in self._facts())
        lines += [f"  {name:<{width}}  {value}" for name, value in self._facts()]
        lines.append("  " + "  ".join(f"{name:>10}" for name in _COLUMNS))
        lines += [
            "  " + "  ".join(f"{cell:>10}" for cell in _row(n, record)) for n, record in self._numbered()
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts for json.dumps. Infinite numbers become None."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}

    def _repr_html_(self) -> str:
        groups = notebook.table(_COLUMNS, (_row(n, record) for n, record in self._numbered()))
        side = "bad" if self.claim else "plain"
        return notebook.card(self._headline(), notebook.facts(self._facts()), groups, side=side)

    def _numbered(self) -> list[tuple[int, GroupRecord]]:
        return list(enumerate(self.groups, start=1))

    def _headline(self) -> str:
        if self.claim:
            return (
                f"CLAIM: trained on the protected answers (p = {self.p_value:.2g} <= alpha = {self.alpha:g})"
            )
        return f"NO CLAIM: the evidence is not enough (p = {self.p_value:.2g} > alpha = {self.alpha:g})"

    def _facts(self) -> list[tuple[str, str]]:
        rule = {"exact": "exact sequential test", "e-process": "e-process, claim at 1 / alpha"}[self.rule]
        exact = "not asked to the end" if self.exact_p_value is None else f"{self.exact_p_value:.2g}"
        if self.parts > 1:
            rule += f", {self.parts} parts at alpha / {self.parts} each"
        facts = [
            ("rule", rule),
            ("p-value", f"{self.p_value:.2g}  (the claim rests on this one)"),
            ("e-value", f"{self.e_value:.4g}  (any-time p-value {self.anytime_p_value:.2g})"),
            ("all groups", f"{exact}  (fixed-sample p-value, second figure)"),
            ("queries", f"{self.queries} of {self.queries_total}, by {self.answers}"),
        ]
        if self.smallest_p_value > self.alpha:
            best = f"a perfect copy would get p = {self.smallest_p_value:.2g}"
            facts.append(("warning", f"these groups cannot reach alpha: {best}"))
        if self.t_test is not None:
            needed = self.t_test.queries_to_significance
            shown = "never" if needed is None else f"after about {needed} queries"
            facts.append(("t-test", f"below {self.t_test.level:g} {shown}  (papers' figure, not proof)"))
        return facts


_COLUMNS = ("group", "candidates", "rank", "e-value", "running e", "p-value", "queries")


def _row(number: int, record: GroupRecord) -> tuple[str, ...]:
    return (
        str(number),
        str(record.candidates),
        str(record.target_rank),
        f"{record.e_value:.3g}",
        f"{record.running_e:.3g}",
        f"{record.p_value:.2g}",
        str(record.queries),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
