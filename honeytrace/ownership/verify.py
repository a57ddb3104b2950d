"""`verify`: put a watermark's triggers to a suspect and decide at a declared false-claim probability."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from honeytrace.ownership import ladder
from honeytrace.ownership.answers import (
    AnswerKind,
    FloatArray,
    IntArray,
    ScoreKind,
    clean_labels,
    clean_scores,
    top_labels,
)
from honeytrace.ownership.calibrator import DEFAULT_CALIBRATOR
from honeytrace.ownership.power import smallest_p_value
from honeytrace.ownership.rank_test import exact_p_value, target_rank
from honeytrace.ownership.scores import SCORE_NOISE, fitted_reference, score_against, score_labels
from honeytrace.ownership.sequential import Rule, SequentialTest, check_alpha
from honeytrace.ownership.suspect import Suspect, ask, keyed_order, quiet
from honeytrace.ownership.t_test import TTest, t_test
from honeytrace.ownership.verdict import GroupRecord, Verdict

FEWEST_CANDIDATES = 3
"""Fewer candidates than this carry too little evidence a group for the draw of targets to be worth a test."""


class TriggerGroup(Protocol):
    """One group's verifiable side. The target must be a uniform draw from the candidates that nothing else in
    the group depends on: the tests are exact for that reason and no other."""

    @property
    def candidates(self) -> Sequence[int]:
        """[K] distinct classes the target was drawn from."""
        ...

    @property
    def target(self) -> int:
        """One of the candidates. Secret."""
        ...

    @property
    def triggers(self) -> Tensor:
        """[n, ...] float32 inputs, or token ids int64 [n, T]. Secret."""
        ...

    @property
    def reference_log_probs(self) -> Tensor:
        """[n, C] log-probabilities of the owner's unmarked reference on the triggers, or [R, n, C] of
        several, the plain one first."""
        ...


class VerifiableWatermark(Protocol):
    """What `verify` needs of a watermark."""

    @property
    def groups(self) -> Sequence[TriggerGroup]:
        """The trigger groups; how many there are was fixed when the watermark was made."""
        ...

    @property
    def num_classes(self) -> int:
        """C."""
        ...

    def opened(self, key: Any) -> object:
        """Raise ValueError if the key does not belong to this watermark."""
        ...

    def verification_seed(self, key: Any) -> int:
        """Integer >= 0 for the order of the questions; it must not depend on the targets."""
        ...


def verify(
    suspect: Suspect,
    watermark: VerifiableWatermark,
    key: Any,
    *,
    alpha: float = 1e-3,
    answers: Literal["auto", "scores", "labels"] = "auto",
    scores_are: ScoreKind = "auto",
    rule: Rule = "exact",
    stop_at_claim: bool = True,
    batch_size: int = 256,
    progress: Callable[[int, int, str], None] | None = None,
    triggers: int | None = None,
) -> Verdict:
    """Ask a suspect about the watermark's triggers and decide whether it learned from protected answers.

    If it was not, it is claimed against with probability at most alpha, whatever it is and does: the
    probability is over the key's draw of the target classes, and no assumption is made about honest models
    (DESIGN "Ownership", invariant 7). Groups are asked in an order drawn from the key; after each the rule is
    looked at.

    Groups with different marks (their attribute `mark`, where they have one) are tests of their own, each at
    its equal share of alpha: the claim is made where one of them claims. A copy carries one mark and not the
    other when its maker used scores or labels only, and in one common test the groups it does not carry
    drown those it does.

    By scores, a few triggers of each group are asked. By labels, where the groups have roads to their
    candidates (probes.py), the first triggers' neighbourhoods are asked instead, step by step (ladder.py): a
    copy seldom says the target, but comes nearer to saying it. Flip groups come first: copies that learned
    them are claimed before the graded ones are asked.

    Args:
        suspect: any callable from inputs float32 [n, ...] (or token ids int64 [n, T]) to scores [n, C] or
            labels [n] (tensors, arrays, lists; scores also as `.logits` of an object or first of a tuple). An
            nn.Module is asked in eval mode without gradients and gets its mode back. Answers that make no
            sense are repaired by fixed rules (answers.py).
        watermark: an opened watermark, or anything that satisfies VerifiableWatermark.
        key: its secret key.
        alpha: false-claim probability, in (0, 1). Part of the rule: declare it beforehand, and once.
        answers: "scores", "labels" (top-1 also where the suspect gives scores), or "auto": what the suspect's
            first answer is.
        scores_are: "probabilities", "logits", or "auto", decided for each group by a rule that knows no
            target.
        rule: "exact" (default, more power) or "e-process" (claim when the e-value reaches 1 / alpha);
            sequential.py explains and compares them. Declare it beforehand.
        stop_at_claim: ask no further groups once the rule has claimed. False asks all of them: the claim
            stays as it was made, and the fixed-sample p-value is known.
        batch_size: most inputs given to the suspect at once, >= 1. Groups are never mixed in a batch.
        progress: called after each batch with (queries so far, queries in all, a short text with the running
            e-value; nothing secret). By labels the whole number is an upper bound.
        triggers: how many triggers of each group to ask by scores, the first ones. Default: the watermark's
            `questions_per_group` where it has one, else all. Declare it beforehand.

    Returns:
        A Verdict. Its text and dict hold nothing secret.

    Raises:
        TypeError: suspect is not callable, or answers something that is not numbers.
        ValueError: an argument is out of range, the key is not the watermark's, the suspect's answers have an
            impossible shape or change between scores and labels, or a group has fewer than 3 candidates.
    """
    _check_arguments(suspect, answers, scores_are, batch_size, triggers)
    check_alpha(alpha)  # before it is shared among the marks: half of 1.5 would pass
    watermark.opened(key)
    most = getattr(watermark, "questions_per_group", None) if triggers is None else triggers
    groups = [
        _read_group(group, index, watermark.num_classes, most) for index, group in enumerate(watermark.groups)
    ]
    if not groups:
        raise ValueError("watermark must have at least one trigger group, got none")
    parts = _parts(watermark.groups)
    examiner = _Examiner(
        suspect=suspect,
        groups=groups,
        seed=watermark.verification_seed(key),
        wanted=answers,
        scores_are=scores_are,
        batch_size=batch_size,
        progress=progress,
        num_classes=watermark.num_classes,
    )
    tests: list[SequentialTest] = []
    e_values: list[float] = []
    asked_until_claim = None
    for part in parts:
        test = SequentialTest(alpha / len(parts), len(part), rule)
        e_value, asked = examiner.examine(part, test, stop_at_claim)
        tests.append(test)
        e_values.append(e_value)
        if test.claim and asked_until_claim is None:
            asked_until_claim = asked
        if test.claim and stop_at_claim:
            break
    assert examiner.kind is not None
    evidence = examiner.evidence
    exact = [
        exact_p_value(*_columns([evidence[index] for index in part]))
        for part in parts
        if all(index in evidence for index in part)
    ]
    unasked = len(parts) - len(e_values)
    return Verdict(
        claim=any(test.claim for test in tests),
        alpha=alpha,
        rule=rule,
        parts=len(parts),
        p_value=_union([test.p_value for test in tests], len(parts)),
        # A mean of e-values is one; a part that was not asked has the e-value 1.
        e_value=(sum(e_values) + unasked) / len(parts),
        anytime_p_value=_union([test.anytime_p_value for test in tests], len(parts)),
        exact_p_value=_union(exact, len(parts)) if len(exact) == len(parts) else None,
        smallest_p_value=_union(
            [smallest_p_value([groups[index].candidates.size for index in part]) for part in parts],
            len(parts),
        ),
        queries=examiner.asked if asked_until_claim is None else asked_until_claim,
        queries_total=examiner.queries_total,
        answers=examiner.kind,
        groups=tuple(examiner.records),
        t_test=_compare(examiner.compared),
    )


def _parts(groups: Sequence[TriggerGroup]) -> list[list[int]]:
    """Positions of the groups tested together: those with the same `mark`, or all where they have none."""
    found: dict[object, list[int]] = {}
    for index, group in enumerate(groups):
        found.setdefault(getattr(group, "mark", None), []).append(index)
    return [found[mark] for mark in sorted(found, key=lambda mark: mark != "flip")]


def _union(p_values: Sequence[float], parts: int) -> float:
    """The p-value of "in some part": the smallest one times the number of parts (Bonferroni)."""
    return min(1.0, parts * min(p_values))


@dataclass(kw_only=True, repr=False)
class _Examiner:
    """Puts the questions, part by part, and keeps what came back. No repr: it holds secrets."""

    suspect: Suspect
    groups: Sequence[_Group]
    seed: int
    wanted: Literal["auto", "scores", "labels"]
    scores_are: ScoreKind
    batch_size: int
    progress: Callable[[int, int, str], None] | None
    num_classes: int

    def __post_init__(self) -> None:
        self.kind: AnswerKind | None = None if self.wanted == "auto" else self.wanted
        self.asked = 0
        self.records: list[GroupRecord] = []
        self.evidence: dict[int, tuple[FloatArray, int]] = {}
        self.compared: list[tuple[FloatArray, FloatArray]] = []

    def examine(self, part: Sequence[int], test: SequentialTest, stop_at_claim: bool) -> tuple[float, int]:
        """Ask the groups of a part; gives e-value and queries so far, both as they stood at the claim."""
        asked_until_claim, e_value = self.asked, 1.0
        for place in keyed_order(self.seed, "groups", len(part)):
            index = part[place]
            weights, target_rank_, candidates, queries = self._ask_group(index, test)
            was_claimed = test.claim
            look = test.add(weights, self.groups[index].target_index)
            if not was_claimed:
                asked_until_claim, e_value = self.asked, look.running_e
            self.records.append(
                GroupRecord(
                    index=index,
                    candidates=candidates,
                    target_rank=target_rank_,
                    rank_p_value=target_rank_ / candidates,
                    e_value=look.e_value,
                    running_e=look.running_e,
                    p_value=look.p_value,
                    queries=queries,
                )
            )
            if look.claim and stop_at_claim:
                break
        return e_value, asked_until_claim

    def _ask_group(self, index: int, test: SequentialTest) -> tuple[FloatArray, int, int, int]:
        """Weights [K], the target's rank, K, and how many questions were asked."""
        group = self.groups[index]
        before = self.asked
        first = None
        if self.kind is None and group.roads is not None:
            # Scores or labels? The first trigger's answer tells; by scores it is used too.
            first = self._put(group.triggers[:1], test)
        if self.kind == "labels" and group.roads is not None:
            scores, scale_floor = self._climb(index, group, test), ladder.SCORE_NOISE
        else:
            rows = self._ask_triggers(index, group, test, first)
            assert self.kind is not None
            scores, scale_floor, pair = _score(rows, group, self.kind, self.scores_are)
            self.compared.append(pair)
        weights = DEFAULT_CALIBRATOR.weights(scores, scale_floor=scale_floor)
        self.evidence[index] = (weights, group.target_index)
        return weights, target_rank(scores, group.target_index), scores.size, self.asked - before

    def _ask_triggers(
        self, index: int, group: _Group, test: SequentialTest, first: npt.NDArray[np.generic] | None
    ) -> npt.NDArray[np.generic]:
        """The answers to all triggers, of which the first may have been asked already."""
        order = keyed_order(self.seed, f"triggers of group {index}", len(group.triggers))
        said = []
        if first is not None:
            order = [0, *(place for place in order if place != 0)]
            said.append(first)
        rest = order[sum(map(len, said)) :]
        if rest:
            said.append(self._put(group.triggers[torch.as_tensor(rest)], test))
        return np.concatenate(said)[np.argsort(order)]

    def _climb(self, index: int, group: _Group, test: SequentialTest) -> FloatArray:
        """Scores [K] from labels along the group's roads."""
        assert group.roads is not None
        starts, ends, turns = group.roads
        order = keyed_order(self.seed, f"candidates of group {index}", group.candidates.size)
        climber = ladder.climb(starts, ends, turns, group.candidates, order)
        questions = next(climber)
        while True:
            rows = self._put(questions, test)
            try:
                questions = climber.send(_labels_of(rows, self.num_classes, self.scores_are))
            except StopIteration as end:
                scores: FloatArray = end.value
                return scores

    def _put(self, questions: Tensor, test: SequentialTest) -> npt.NDArray[np.generic]:
        """The answers to these questions, in their order; settles what kind of answers the suspect gives."""
        said: list[npt.NDArray[np.generic]] = []
        for batch in torch.split(questions, self.batch_size):
            with quiet(self.suspect):
                said.append(ask(self.suspect, batch))
            self.asked += len(batch)
            if self.progress is not None:
                place = f"group {len(self.records) + 1} of {len(self.groups)}, e-value {test.e_value:.3g}"
                self.progress(self.asked, max(self.asked, self.queries_total), place)
        self.kind = _kind_of(said, self.kind, self.wanted)
        return np.concatenate(said)

    @property
    def queries_total(self) -> int:
        """Questions of all groups; by labels along roads at most these."""
        total = 0
        for group in self.groups:
            if group.roads is not None and self.kind != "scores":
                starts, _, _ = group.roads
                total += ladder.most_questions(len(starts), group.candidates.size)
            else:
                total += len(group.triggers)
        return total


@dataclass(frozen=True, repr=False)
class _Group:
    """A TriggerGroup that has been checked. No repr: it holds secrets."""

    candidates: npt.NDArray[np.int64]
    target_index: int
    triggers: Tensor
    reference: FloatArray
    """[R, n, C] log-probabilities, the plain reference first."""
    roads: tuple[Tensor, Tensor, list[list[list[int]]]] | None
    """Where they start [S, ...], where they end [S, R, K, ...], where the plain reference turns [S, R, K]."""


def _read_group(group: TriggerGroup, index: int, num_classes: int, most: int | None) -> _Group:
    """Errors here name the group and what is wrong, never a target or a trigger."""
    candidates = np.asarray(list(group.candidates), dtype=np.int64)
    if candidates.size < FEWEST_CANDIDATES:
        raise ValueError(
            f"group {index} has {candidates.size} candidate classes for its target, at least "
            f"{FEWEST_CANDIDATES} are needed (num_classes={num_classes}: a task needs at least "
            f"{FEWEST_CANDIDATES} classes beside a group's source classes)"
        )
    position = np.flatnonzero(candidates == group.target)
    if position.size != 1:
        raise ValueError(f"group {index}: the target must be exactly one of the candidates")
    given = group.reference_log_probs.detach().cpu().double().numpy()
    reference = given[None] if given.ndim == 2 else given
    if reference.ndim != 3 or reference.shape[1:] != (len(group.triggers), num_classes) or not given.size:
        raise ValueError(
            f"group {index}: reference_log_probs must have shape [n, C] or [R, n, C] for "
            f"n={len(group.triggers)} >= 1 triggers and C={num_classes}, got {list(given.shape)}"
        )
    ends, turns = getattr(group, "ends", None), getattr(group, "turns", None)
    triggers = group.triggers.detach()
    roads = None if ends is None or turns is None else (triggers[: len(ends)], ends.detach(), turns.tolist())
    return _Group(candidates, int(position[0]), triggers[:most], reference[:, :most], roads)


def _check_arguments(
    suspect: Suspect, answers: str, scores_are: str, batch_size: int, triggers: int | None
) -> None:
    if not callable(suspect):
        raise TypeError(f"suspect must be callable, got {type(suspect).__name__}")
    if answers not in ("auto", "scores", "labels"):
        raise ValueError(f"answers must be 'auto', 'scores' or 'labels', got {answers!r}")
    if scores_are not in ("auto", "probabilities", "logits"):
        raise ValueError(f"scores_are must be 'auto', 'probabilities' or 'logits', got {scores_are!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if triggers is not None and triggers < 1:
        raise ValueError(f"triggers must be at least 1 or None, got {triggers}")


def _kind_of(said: list[npt.NDArray[np.generic]], kind: AnswerKind | None, wanted: str) -> AnswerKind:
    dimensions = {rows.ndim for rows in said}
    if kind is None:
        kind = "scores" if said[0].ndim == 2 else "labels"
    if kind == "scores" and 1 in dimensions:
        raise ValueError(
            f"suspect returned labels [n] where scores [n, C] were expected (answers={wanted!r})"
        )
    if len(dimensions) > 1 or (wanted == "auto" and kind == "labels" and 2 in dimensions):
        raise ValueError("suspect changed between scores [n, C] and labels [n] from one batch to another")
    return kind


def _score(
    rows: npt.NDArray[np.generic], group: _Group, kind: AnswerKind, scores_are: ScoreKind
) -> tuple[FloatArray, float, tuple[FloatArray, FloatArray]]:
    """Scores [K], size of meaningless differences, target probabilities (suspect's, reference's)."""
    num_classes = group.reference.shape[-1]
    target = int(group.candidates[group.target_index])
    if rows.ndim == 2:
        probabilities = clean_scores(rows, num_classes=num_classes, scores_are=scores_are)
    if kind == "scores":
        expected = fitted_reference(probabilities, group.reference)
        scores = score_against(probabilities, expected, group.candidates)
        return scores, SCORE_NOISE, (probabilities[:, target], expected[:, target])
    labels = top_labels(probabilities) if rows.ndim == 2 else clean_labels(rows, num_classes=num_classes)
    plain = group.reference[0].argmax(axis=1)
    scores = score_labels(labels, plain, group.candidates, num_classes=num_classes)
    hits = (labels == target).astype(np.float64), (plain == target).astype(np.float64)
    return scores, 1 / len(labels), hits  # one answer more or less is no evidence


def _labels_of(rows: npt.NDArray[np.generic], num_classes: int, scores_are: ScoreKind) -> IntArray:
    """[n] top-1 labels of an answer that is labels [n] or scores [n, C]."""
    if rows.ndim == 2:
        return top_labels(clean_scores(rows, num_classes=num_classes, scores_are=scores_are))
    return clean_labels(rows, num_classes=num_classes)


def _columns(evidence: list[tuple[FloatArray, int]]) -> tuple[list[FloatArray], list[int]]:
    return [weights for weights, _ in evidence], [index for _, index in evidence]


def _compare(compared: list[tuple[FloatArray, FloatArray]]) -> TTest | None:
    if not compared:
        return None  # by labels along roads there are no answers to the triggers themselves
    suspect = np.concatenate([pair[0] for pair in compared])
    reference = np.concatenate([pair[1] for pair in compared])
    if suspect.size < 2 or not math.isfinite(float(suspect.sum() + reference.sum())):
        return None
    return t_test(suspect, reference)
