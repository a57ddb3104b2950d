"""Marks tested apart: what the division of alpha promises and what it buys."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from honeytrace.ownership import verify

CLASSES, CANDIDATES, TRIGGERS = 10, 8, 4


@dataclass
class Group:
    """Trigger inputs of group g are vectors (g, t)."""

    mark: str
    target: int
    triggers: Tensor
    candidates: tuple[int, ...] = tuple(range(CANDIDATES))
    reference_log_probs: Tensor = field(
        default_factory=lambda: torch.full((TRIGGERS, CLASSES), -math.log(CLASSES))
    )


@dataclass
class FakeWatermark:
    groups: list[Group]
    num_classes: int = CLASSES

    def opened(self, key: object) -> None:
        pass

    def verification_seed(self, key: object) -> int:
        return 7


def watermark(marks: str, rng: np.random.Generator) -> FakeWatermark:
    """One group for each letter: s for "graded", f for "flip"."""
    return FakeWatermark(
        [
            Group(
                mark={"s": "graded", "f": "flip"}[mark],
                target=int(rng.integers(CANDIDATES)),
                triggers=torch.tensor([[float(g), float(t)] for t in range(TRIGGERS)]),
            )
            for g, mark in enumerate(marks)
        ]
    )


def suspect(rng: np.random.Generator, wm: FakeWatermark, carries: str = ""):
    """Random answers, the same for each group's triggers; the groups of one mark favour their target."""
    said = rng.dirichlet(np.ones(CLASSES), size=len(wm.groups))
    for g, group in enumerate(wm.groups):
        if group.mark == carries:
            said[g] *= 0.5
            said[g, group.target] += 0.5
    table = torch.tensor(said)
    return lambda inputs: table[inputs[:, 0].long()]


def test_a_copy_that_carries_one_mark_only_is_claimed():
    rng = np.random.default_rng(1)
    claims = {"graded": 0, "flip": 0}
    for _ in range(30):
        wm = watermark("ssssssffffff", rng)
        for mark in claims:
            verdict = verify(suspect(rng, wm, mark), wm, None)
            claims[mark] += verdict.claim
            assert verdict.parts == 2
    assert claims == {"graded": 30, "flip": 30}


@pytest.mark.parametrize("rule", ["exact", "e-process"])
@pytest.mark.parametrize("stop_at_claim", [True, False])
def test_innocents_are_claimed_no_more_often_than_alpha(rule, stop_at_claim):
    rng = np.random.default_rng(2)
    alpha, tries, claims, e_values = 0.1, 300, 0, []
    for _ in range(tries):
        wm = watermark("ssffff", rng)
        verdict = verify(
            suspect(rng, wm), wm, None, alpha=alpha, rule=rule, stop_at_claim=stop_at_claim, answers="scores"
        )
        claims += verdict.claim
        e_values.append(verdict.e_value)
        assert verdict.claim == (verdict.p_value <= alpha)
    # Four standard deviations of a binomial at alpha itself.
    assert claims <= tries * alpha + 4 * math.sqrt(tries * alpha * (1 - alpha))
    assert np.mean(e_values) <= 1 + 4 * np.std(e_values) / math.sqrt(tries)


def test_one_mark_alone_is_one_test_at_the_whole_alpha():
    rng = np.random.default_rng(3)
    wm = watermark("ffffff", rng)
    found = verify(suspect(rng, wm, "flip"), wm, None)
    assert found.parts == 1
    assert found.smallest_p_value == pytest.approx(CANDIDATES**-6)
    both = watermark("ssffffff", rng)
    assert verify(suspect(rng, both), both, None).smallest_p_value == pytest.approx(2 * CANDIDATES**-6)


def test_groups_keep_their_places_and_asking_stops_with_the_first_part_that_claims():
    rng = np.random.default_rng(4)
    wm = watermark("sfsfsfsfsfsf", rng)
    found = verify(suspect(rng, wm, "flip"), wm, None)
    assert found.claim
    # Flips first: who learned them is claimed before the graded groups are asked.
    assert {wm.groups[record.index].mark for record in found.groups} == {"flip"}
    assert found.queries == TRIGGERS * len(found.groups)
    assert found.exact_p_value is None
    whole = verify(suspect(rng, wm, "graded"), wm, None, stop_at_claim=False)
    assert sorted(record.index for record in whole.groups) == list(range(12))
    assert whole.exact_p_value is not None
    assert TRIGGERS * 6 < whole.queries < TRIGGERS * 12
    assert "2 parts at alpha / 2 each" in str(whole)
