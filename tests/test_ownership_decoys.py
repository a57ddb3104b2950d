"""Decoy places for tasks with two classes: exact by enumeration, alive on copies, deaf to adversaries."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from honeytrace.ownership.decoys import DecoyGroup, Place, verify_decoys

PLACES, TRIGGERS = 8, 4


def groups(count: int, rng: np.random.Generator, marked: list[int] | None = None) -> list[DecoyGroup]:
    """Binary task; trigger t of place k in group g is the vector (g, k, t)."""
    found = []
    for g in range(count):
        places = [
            Place(
                torch.tensor([[g, k, t] for t in range(TRIGGERS)], dtype=torch.float32),
                torch.tensor([[0.9, 0.1]] * TRIGGERS).log(),
                target=1,
            )
            for k in range(PLACES)
        ]
        draw = int(rng.integers(PLACES)) if marked is None else marked[g]
        found.append(DecoyGroup(places, draw))
    return found


def copy_of(made: list[DecoyGroup], strength: float = 0.3):
    def suspect(inputs: Tensor) -> Tensor:
        marks = torch.tensor([group.marked for group in made])
        learned = marks[inputs[:, 0].long()] == inputs[:, 1].long()
        second = 0.1 + 0.02 * torch.sin(7 * inputs.sum(1)) + strength * learned
        return torch.stack([1 - second, second], dim=1)

    return suspect


def test_a_copy_of_a_binary_classifier_is_claimed():
    made = groups(6, np.random.default_rng(0))
    found = verify_decoys(copy_of(made), made, seed=1)
    assert found.claim
    assert found.p_value <= 1e-3


def test_by_labels():
    made = groups(6, np.random.default_rng(1))
    suspect = copy_of(made, 0.6)
    assert verify_decoys(lambda x: suspect(x).argmax(1), made, seed=1).claim
    assert not verify_decoys(lambda x: torch.zeros(len(x)), made, seed=1).claim


@pytest.mark.parametrize(
    "suspect",
    [
        lambda x: torch.stack([x[:, 1], -x[:, 1]], 1),  # leans to some places, whatever is marked
        lambda x: torch.full((len(x), 2), torch.nan),
        lambda x: (x[:, 1] > 3).long(),
        lambda x: torch.stack([x[:, 2], x[:, 1] * x[:, 0]], 1),
    ],
)
@pytest.mark.parametrize(("rule", "count"), [("exact", 2), ("e-process", 2), ("exact", 3)])
def test_every_draw_of_the_marked_places_is_counted(suspect, rule, count):
    """All draws of two or three groups, 64 or 512: claims at most as often as alpha, e-values of mean 1."""
    rng, alpha = np.random.default_rng(2), 0.02
    claims, e_values = 0, []
    for marked in itertools.product(range(PLACES), repeat=count):
        found = verify_decoys(suspect, groups(count, rng, list(marked)), seed=3, alpha=alpha, rule=rule)
        claims += found.claim
        e_values.append(found.e_value)
    assert claims <= alpha * PLACES**count
    assert np.mean(e_values) == pytest.approx(1)


def test_what_cannot_be_tested_is_refused():
    made = groups(1, np.random.default_rng(0))
    for wrong in (DecoyGroup(made[0].places[:2], 0), DecoyGroup(made[0].places, PLACES)):
        with pytest.raises(ValueError):
            verify_decoys(copy_of(made), [wrong], seed=0)
    assert "triggers" not in repr(made)
