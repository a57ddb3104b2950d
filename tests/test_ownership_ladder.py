"""The ladder by labels: blind to the target and equal for all candidates."""

from __future__ import annotations

import inspect
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor
from worlds import KEY, blobs, marked

from honeytrace.ownership import verify
from honeytrace.ownership.ladder import LADDERS, STEPS, Ladder, blend, climb, most_questions


def scores(
    suspect, candidates: list[int], turns: list[list[int]], order: list[int] | None = None
) -> tuple[np.ndarray, int]:
    """The end of road r to candidate k is a one-hot of (r, k), so a question shows all."""
    roads, size = len(turns), len(candidates)
    ends = torch.eye(roads * size).reshape(roads, size, -1)
    climber = climb(
        torch.zeros(roads * size),
        ends,
        turns,
        np.array(candidates),
        list(range(size)) if order is None else order,
    )
    asked, questions = 0, next(climber)
    while True:
        asked += len(questions)
        try:
            questions = climber.send(np.array([suspect(q, candidates, roads) for q in questions]))
        except StopIteration as end:
            return end.value, asked


def turning(steps: dict[tuple[int, int], int]):
    """A suspect that says candidate k from a given step of road r on, and no class before."""

    def suspect(question: Tensor, candidates: list[int], roads: int) -> int:
        place = int(question.argmax())
        step = round(float(question.max()) * STEPS)
        road, k = divmod(place, len(candidates))
        return candidates[k] if question.max() > 0 and step >= steps[road, k] else -1

    return suspect


def reference(size: int, shift: dict[int, int], turn: int = 20) -> dict[tuple[int, int], int]:
    return {(r, k): turn - shift.get(k, 0) for r in range(2) for k in range(size)}


@pytest.mark.parametrize("leader", range(5))
@pytest.mark.parametrize("shift", [-6, -3, 1, 2, 3, 5, 8])
def test_who_turns_earlier_than_all_others_leads(leader, shift):
    turns = [[20] * 5, [20] * 5]
    others = dict.fromkeys(range(5), -20)
    found, asked = scores(turning(reference(5, {**others, leader: shift})), [3, 4, 5, 7, 9], turns)
    assert found.argmax() == leader
    assert (found == found.max()).sum() == 1
    assert asked <= most_questions(5)


def test_candidates_are_treated_alike():
    """A permutation of what the candidates do is a permutation of their scores, in any order of asking."""
    turns = [[20] * 4, [20] * 4]
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
    turns = [[20] * 4, [20] * 4]
    found, _ = scores(lambda q, c, r: says, [1, 3, 5, 7], turns)
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
    assert most_questions(8, (Ladder((0, 1, 2), 1),)) == 16


def test_climbing_is_told_nothing_of_the_target():
    assert not {"target", "target_index", "group"} & set(inspect.signature(climb).parameters)


def test_calibration_lays_a_road_to_every_candidate():
    for group in marked().groups:
        assert group.ends is not None
        assert group.turns is not None
        assert group.ends.shape == (2, len(group.candidates), 24)
        for road in range(2):
            for k, label in enumerate(group.candidates):
                place = int(group.turns[road, k])
                points = [blend(group.triggers[0], group.ends[road, k], step) for step in range(STEPS + 1)]
                with torch.no_grad():
                    said = blobs().model(torch.stack(points)).argmax(1).tolist()
                assert place == next((step for step, s in enumerate(said) if s == label), STEPS + 1)


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
