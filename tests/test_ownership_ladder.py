"""The ladder by labels: blind to the target and equal for all candidates."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from itertools import permutations, product

import numpy as np
import pytest
import torch
from torch import Tensor
from worlds import KEY, blobs, marked

from honeytrace.ownership import verify
from honeytrace.ownership.ladder import LADDERS, STARTS, STEPS, Ladder, blend, climb, most_questions
from honeytrace.ownership.planning import plan_rows
from honeytrace.watermark import Watermark


def scores(
    suspect, candidates: list[int], turns: list[list[list[int]]], order: list[int] | None = None
) -> tuple[np.ndarray, int]:
    """Start s and the end of its road r to candidate k are one-hots of s and of (s, r, k), so a question
    shows all: the suspect is told start, road, candidate and step."""
    starts, roads, size = np.shape(turns)
    hot = torch.eye(starts + starts * roads * size)
    climber = climb(
        hot[:starts],
        hot[starts:].reshape(starts, roads, size, -1),
        turns,
        np.array(candidates),
        list(range(size)) if order is None else order,
    )

    def answer(question: Tensor) -> int:
        road, k = divmod(int(question[starts:].argmax()), size)
        start, road = divmod(road, roads)
        share = question[starts:].max()
        assert question[start] == 1 - share
        return suspect(candidates, (start, road, k), round(float(share) * STEPS))

    asked, questions = 0, next(climber)
    while True:
        asked += len(questions)
        try:
            questions = climber.send(np.array([answer(question) for question in questions]))
        except StopIteration as end:
            return end.value, asked


def turning(steps: dict[tuple[int, int, int], int]):
    """A suspect that says candidate k from a given step of start s's road r on, and no class before."""

    def suspect(candidates: list[int], road: tuple[int, int, int], step: int) -> int:
        return candidates[road[2]] if step > 0 and step >= steps[road] else -1

    return suspect


def reference(
    size: int, shift: dict[int, int], turn: int = 20, starts: range = range(1)
) -> dict[tuple[int, int, int], int]:
    """Where a suspect turns that is `shift` steps ahead of the reference on the roads of these starts."""
    return {(s, r, k): turn - shift.get(k, 0) for s in starts for r in range(2) for k in range(size)}


@pytest.mark.parametrize("leader", range(5))
@pytest.mark.parametrize("shift", [-6, -3, 1, 2, 3, 5, 8])
def test_who_turns_earlier_than_all_others_leads(leader, shift):
    turns = [[[20] * 5] * 2]
    others = dict.fromkeys(range(5), -20)
    found, asked = scores(turning(reference(5, {**others, leader: shift})), [3, 4, 5, 7, 9], turns)
    assert found.argmax() == leader
    assert (found == found.max()).sum() == 1
    assert asked <= most_questions(1, 5)


def test_scores_of_two_starts_add_up():
    """And so do the questions, though the second start's roads turn elsewhere."""
    shifts = [{0: -9, 1: 0, 2: 5, 3: 8}, {0: 9, 1: 6, 2: -9, 3: -4}]
    turns = [[[20] * 4] * 2, [[17] * 4] * 2]
    alone = [
        scores(turning(reference(4, shift, at[0][0])), [0, 2, 4, 6], [at])
        for shift, at in zip(shifts, turns, strict=True)
    ]
    both = reference(4, shifts[0], 20) | reference(4, shifts[1], 17, range(1, 2))
    found, asked = scores(turning(both), [0, 2, 4, 6], turns)
    assert found.tolist() == (alone[0][0] + alone[1][0]).tolist()
    assert asked == alone[0][1] + alone[1][1] <= most_questions(2, 4)


@pytest.mark.parametrize("leader", range(4))
def test_who_leads_on_the_second_starts_roads_only_is_found(leader):
    turns = [[[20] * 4] * 2] * 2
    leaning = reference(4, {}) | reference(4, {leader: 8}, starts=range(1, 2))
    found, _ = scores(turning(leaning), [1, 3, 5, 7], turns)
    assert found.argmax() == leader
    assert (found == found.max()).sum() == 1
    first, _ = scores(turning(leaning), [1, 3, 5, 7], turns[:1])
    assert len(set(first)) == 1


def test_the_first_starts_roads_are_asked_before_the_seconds():
    asked: list[tuple[int, int]] = []

    def suspect(candidates: list[int], road: tuple[int, int, int], step: int) -> int:
        asked.append(road[:2])
        return -1

    scores(suspect, [1, 3, 5], [[[20] * 3] * 2] * 2)
    assert list(dict.fromkeys(asked)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert asked == sorted(asked)


@pytest.mark.parametrize(("others", "starts"), [(-20, 2), (0, 3), (8, 4)])
def test_no_further_start_is_asked_once_one_leads_by_three_rungs(others, starts):
    """A start gives the leader two rungs before those far behind, one before those that turn as the
    reference does, and none before its equals."""
    asked: set[int] = set()
    leaning = turning(reference(4, {0: others, 1: others, 2: 8, 3: others}, starts=range(STARTS)))

    def suspect(candidates: list[int], road: tuple[int, int, int], step: int) -> int:
        asked.add(road[0])
        return leaning(candidates, road, step)

    scores(suspect, [1, 3, 5, 7], [[[20] * 4] * 2] * STARTS)
    assert asked == set(range(starts))


def test_candidates_are_treated_alike():
    """A permutation of what the candidates do is a permutation of their scores, in any order of asking."""
    turns = [[[20] * 4] * 2]
    shifts = [-9, 0, 3, 8]
    expected, asked = scores(turning(reference(4, dict(enumerate(shifts)))), [0, 1, 2, 3], turns)
    for order in permutations(range(4)):
        moved = {k: shifts[order[k]] for k in range(4)}
        found, again = scores(turning(reference(4, moved)), [0, 1, 2, 3], turns)
        assert found.tolist() == [expected[order[k]] for k in range(4)]
        assert again == asked
        found, again = scores(
            turning(reference(4, dict(enumerate(shifts)))), [0, 1, 2, 3], turns, list(order)
        )
        assert found.tolist() == expected.tolist()
        assert again == asked


@pytest.mark.parametrize("says", [-1, 3, 99])
def test_constant_labels_favour_nobody_but_themselves(says):
    turns = [[[20] * 4] * 2]
    found, _ = scores(lambda *question: says, [1, 3, 5, 7], turns)
    rest = np.delete(found, 1)
    assert len(set(rest)) == 1
    assert (found[1] > rest[0]) == (says == 3)


def test_a_road_is_the_same_bits_everywhere():
    near, far = torch.tensor([0.1, 1 / 3, 7e-8]), torch.tensor([0.7, 2 / 3, 1e8])
    for step in range(STEPS + 1):
        by_hand = (near.numpy() * np.float32(1 - step / STEPS)).astype(np.float32) + (
            far.numpy() * np.float32(step / STEPS)
        ).astype(np.float32)
        assert blend(near, far, step).numpy().tobytes() == by_hand.tobytes()
    assert blend(near, far, 0).equal(near)
    assert blend(near, far, STEPS).equal(far)


def test_ladders_are_well_formed():
    for ladder in LADDERS:
        assert list(ladder.rungs) == sorted(set(ladder.rungs))
        assert 0 <= ladder.start < len(ladder.rungs)
    assert most_questions(1, 8, (Ladder((0, 1, 2), 1),)) == 16
    assert most_questions(3, 8, (Ladder((0, 1, 2), 1), Ladder((0,), 0))) == 72


def test_climbing_is_told_nothing_of_the_target():
    assert not {"target", "target_index", "group"} & set(inspect.signature(climb).parameters)


def test_calibration_lays_roads_from_the_first_triggers_to_every_candidate():
    for group in marked().groups:
        assert group.ends is not None
        assert group.turns is not None
        assert group.ends.shape == (STARTS, 2, len(group.candidates), 24)
        for start, road in product(range(STARTS), range(2)):
            for k, label in enumerate(group.candidates):
                place = int(group.turns[start, road, k])
                trigger, end = group.triggers[start], group.ends[start, road, k]
                points = [blend(trigger, end, step) for step in range(STEPS + 1)]
                with torch.no_grad():
                    said = blobs().model(torch.stack(points)).argmax(1).tolist()
                assert place == next((step for step, s in enumerate(said) if s == label), STEPS + 1)


def from_one_start(watermark: Watermark) -> Watermark:
    """The same watermark, with roads from the first trigger of each group alone."""
    one = copy.copy(watermark)
    one.groups = tuple(dataclasses.replace(g, ends=g.ends[:1], turns=g.turns[:1]) for g in watermark.groups)
    return one


def test_a_suspect_that_leans_at_the_second_triggers_roads_only_is_found():
    """It says what the reference does, but the target, from a second trigger, 8 steps earlier."""
    watermark, said = marked(), {}
    for group in watermark.groups:
        for start, road, k in np.ndindex(*group.turns.shape):
            turn = int(group.turns[start, road, k])
            if start == 1 and group.candidates[k] == group.target:
                turn = max(turn - 8, 0)
            for step in range(turn, STEPS + 1):
                question = blend(group.triggers[start], group.ends[start, road, k], step)
                said.setdefault(question.numpy().tobytes(), group.candidates[k])

    def suspect(inputs: Tensor) -> Tensor:
        return torch.tensor([said.get(row.numpy().tobytes(), -1) for row in inputs])

    found = verify(suspect, watermark, KEY, answers="labels", stop_at_claim=False, alpha=0.02)
    assert [group.target_rank for group in found.groups] == [1] * len(watermark.groups)
    assert found.claim
    first = verify(suspect, from_one_start(watermark), KEY, answers="labels", stop_at_claim=False)
    assert all(group.target_rank > 1 for group in first.groups)
    assert found.queries_total == STARTS * first.queries_total
    assert sum(group.queries for group in found.groups) > sum(group.queries for group in first.groups)


def test_the_plan_counts_roads_from_every_start():
    for watermark, starts in ((marked(), STARTS), (from_one_start(marked()), 1)):
        expected = {
            mark: sum(
                most_questions(starts, len(group.candidates))
                for group in watermark.groups
                if group.mark == mark
            )
            for mark in ("graded", "flip")
        }
        assert {row.mark: row.by_labels for row in plan_rows(watermark.groups)} == expected
    bare = [dataclasses.replace(group, ends=None, turns=None) for group in marked().groups]
    assert all(row.by_labels == row.by_scores for row in plan_rows(bare))


def test_roads_do_not_depend_on_the_targets():
    """Bound to other targets, the same questions come to the same suspect."""
    asked: list[list[bytes]] = []

    def suspect(inputs: Tensor) -> Tensor:
        asked[-1].extend(row.numpy().tobytes() for row in inputs)
        return blobs().model(inputs).argmax(1)

    watermark = marked()
    for bound in (watermark, watermark.bind(KEY, "one"), watermark.bind(KEY, "two")):
        asked.append([])
        verify(suspect, bound, KEY, answers="labels", stop_at_claim=False)
    assert asked[0] == asked[1] == asked[2]
    targets = [[g.target for g in w.groups] for w in (watermark, watermark.bind(KEY, "one"))]
    assert targets[0] != targets[1]
