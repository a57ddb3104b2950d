"""Accusers who cheat before the suspect is asked, and a million keys: the stated probability holds.

The accusers here hold everything but the public random value: they choose triggers, reference and key as they
like, knowing the innocent model. Targets are drawn afterwards (that is what the beacon is for).
"""

from __future__ import annotations

import dataclasses
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor
from worlds import KEY, blobs, mark

from honeytrace.ownership import DEFAULT_CALIBRATOR, verify
from honeytrace.ownership.rank_test import lattice_steps
from honeytrace.ownership.sequential import SequentialTest, spending
from honeytrace.watermark import SecretKey, Watermark
from honeytrace.watermark.groups import draw_target

CLASSES, K = 10, 8


def boundaries(weights: list[np.ndarray], alpha: float) -> list[int]:
    """The exact rule's boundary at each look: a copy of the definition, for speed."""
    alive, spent, found = np.ones(1), 0.0, []
    for w, budget in zip(weights, spending(alpha, len(weights)), strict=True):
        steps = lattice_steps(w)
        following = np.zeros(len(alive) + int(steps.max()))
        for step in steps:
            following[step : step + len(alive)] += alive / len(steps)
        tail = np.cumsum(following[::-1])[::-1]
        boundary = int(np.searchsorted(-tail, -(budget * (1 + 1e-12) - spent)))
        spent += float(tail[boundary]) if boundary < len(tail) else 0.0
        found.append(boundary)
        alive = following[:boundary]
    return found


def claims(weights: list[np.ndarray], draws: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether each draw of the targets [n, G] is claimed by the exact rule and by the e-process."""
    sums = np.zeros(len(draws), dtype=np.int64)
    log_e = np.zeros(len(draws))
    exact = np.zeros(len(draws), dtype=bool)
    e_process = np.zeros(len(draws), dtype=bool)
    for g, (w, boundary) in enumerate(zip(weights, boundaries(weights, alpha), strict=True)):
        sums += lattice_steps(w)[draws[:, g]]
        log_e += np.log(K * w)[draws[:, g]]
        exact |= sums >= boundary
        e_process |= log_e >= -math.log(alpha)
    return exact, e_process


def suspects(rng: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """Scores [K] of eight groups, as innocents of several kinds give them."""
    return {
        "normal": [rng.normal(size=K) for _ in range(8)],
        "heavy tails": [rng.standard_cauchy(size=K) for _ in range(8)],
        "one class always": [np.eye(K)[3] for _ in range(8)],
        "ties": [rng.integers(0, 2, size=K).astype(float) for _ in range(8)],
        "nothing moves": [np.zeros(K) for _ in range(8)],
        "ever wilder": [rng.normal(size=K) * 10.0**g for g in range(8)],
    }


def test_the_copy_of_the_definition_is_the_definition():
    rng = np.random.default_rng(0)
    for scores in suspects(rng).values():
        weights = [DEFAULT_CALIBRATOR.weights(s, scale_floor=0.1) for s in scores]
        draws = rng.integers(K, size=(150, 8))
        draws[:40] = [int(np.argmax(s)) for s in scores]
        draws[:40, 4:] = rng.integers(K, size=(40, 4))
        exact, e_process = claims(weights, draws, 0.01)
        for rule, expected in (("exact", exact), ("e-process", e_process)):
            for draw, claim in zip(draws, expected, strict=True):
                test = SequentialTest(0.01, 8, rule)  # type: ignore[arg-type]
                for w, target in zip(weights, draw, strict=True):
                    test.add(w, int(target))
                assert test.claim == claim


def test_false_claims_over_a_million_keys():
    """Every level, every kind of suspect, both rules: no more false claims than a binomial allows."""
    keys, rng = 1_000_000, np.random.default_rng(1)
    draws = rng.integers(K, size=(keys, 8))
    for scores in suspects(rng).values():
        weights = [DEFAULT_CALIBRATOR.weights(s, scale_floor=0.1) for s in scores]
        for alpha in (0.1, 0.01, 0.001):
            for found in claims(weights, draws, alpha):
                assert found.sum() <= binom.ppf(1 - 1e-6, keys, alpha)


def test_the_exact_rule_spends_what_it_may():
    """Not merely valid: with scores that have no ties, nearly all of alpha is used."""
    rng = np.random.default_rng(2)
    weights = [DEFAULT_CALIBRATOR.weights(rng.normal(size=K), scale_floor=0.1) for _ in range(8)]
    exact, _ = claims(weights, rng.integers(K, size=(200_000, 8)), 0.01)
    assert exact.mean() > 0.008


# free choice of triggers ----------


def drawn_by_beacon(groups: list, beacon: str) -> list[int]:
    return [draw_target(KEY, g.triggers, g.candidates, beacon) for g in groups]


def test_triggers_chosen_against_an_innocent_model_do_not_help():
    """In each group the innocent model says a class of the accuser's choice, loudly, and the reference does
    not, as with adversarial examples. The lot falls afterwards."""
    watermark = mark(graded_groups=4, flip_groups=4)
    loud = [g.candidates[0] for g in watermark.groups]
    found = []
    for n in range(400):
        bound = watermark.bind(KEY, f"beacon {n}")

        def accused(inputs: Tensor) -> Tensor:
            gaps = torch.stack([torch.cdist(inputs, g.triggers).amin(dim=1) for g in watermark.groups], 1)
            return torch.eye(CLASSES)[torch.tensor(loud)[gaps.argmin(1)]]

        found.append(verify(accused, bound, KEY, alpha=0.05, answers="scores").claim)
    assert sum(found) <= binom.ppf(1 - 1e-6, 400, 0.05)


def test_beacons_draw_uniformly_and_independently():
    watermark = mark(graded_groups=2, flip_groups=2)
    draws = np.array([drawn_by_beacon(list(watermark.groups), f"beacon {n}") for n in range(2000)])
    for g, group in enumerate(watermark.groups):
        counts = np.array([(draws[:, g] == c).sum() for c in group.candidates])
        assert counts.sum() == 2000
        assert (((counts - 250.0) ** 2) / 250).sum() < 40  # chi-square, 7 degrees: 1e-6
    same = (draws[:, 0] == draws[:, 1]).mean()
    assert same < 0.2


# trying keys ----------


def lucky_key(watermark: Watermark, wanted: list[int], tries: int) -> tuple[SecretKey, int]:
    best, most = KEY, -1
    for n in range(tries):
        key = SecretKey(n.to_bytes(32, "big"))
        drawn = [draw_target(key, g.triggers, g.candidates) for g in watermark.groups]
        hits = sum(d == w for d, w in zip(drawn, wanted, strict=True))
        if hits > most:
            best, most = key, hits
    return best, most


def test_trying_keys_works_without_a_beacon_and_is_useless_with_one():
    """Why the note "there is no beacon" matters."""
    watermark = mark(graded_groups=3, flip_groups=3)
    wanted = [g.candidates[0] for g in watermark.groups]
    key, hits = lucky_key(watermark, wanted, 3000)
    assert hits >= 4  # by chance a key has 0.75
    after = []
    for n in range(300):
        drawn = [draw_target(key, g.triggers, g.candidates, f"b{n}") for g in watermark.groups]
        after.append(sum(d == w for d, w in zip(drawn, wanted, strict=True)))
    assert np.mean(after) == pytest.approx(6 / 8, abs=0.2)


def test_a_key_that_does_not_draw_these_targets_is_refused():
    watermark = mark(graded_groups=2, flip_groups=2)
    group = watermark.groups[0]
    other = next(c for c in group.candidates if c != group.target)
    watermark.groups = (dataclasses.replace(group, target=other), *watermark.groups[1:])
    with pytest.raises(ValueError, match="not the ones its key draws"):
        verify(blobs().model, watermark, KEY)


def test_many_commitments_are_chances_that_the_multiplication_accounts_for():
    """An accuser deposits m keys and shows the best: corrected, it is below alpha as seldom as alpha."""
    rng = np.random.default_rng(3)
    weights = [DEFAULT_CALIBRATOR.weights(rng.normal(size=K), scale_floor=0.1) for _ in range(4)]
    sums = np.array([0])
    for w in weights:
        sums = (sums[:, None] + lattice_steps(w)).ravel()
    tail = np.array([(sums >= s).mean() for s in np.unique(sums)])
    p_of = tail[np.searchsorted(np.unique(sums), sums)]
    for m in (1, 10, 100):
        best = rng.choice(p_of, size=(20_000, m)).min(axis=1)
        claimed = (m * best <= 0.05).sum()
        assert claimed <= binom.ppf(1 - 1e-6, 20_000, 0.05)
        if m > 1:
            assert (best <= 0.05).mean() > 0.3  # uncorrected, it would be a false claim more often than not


@pytest.mark.slow
def test_the_null_audit_finds_no_more_false_claims_than_allowed(tmp_path):
    """bench/null_audit.py, small; a second run goes on from what the first one kept."""
    bench = Path(__file__).resolve().parent.parent / "bench" / "null_audit.py"
    module = runpy.run_path(str(bench))
    said: list[str] = []
    found = module["audit"]("digits", 2, 1, 200, tmp_path, said.append)["figures"]
    again = module["audit"]("digits", 2, 1, 200, tmp_path, said.append)["figures"]
    assert found == again
    for name, row in found["tests"].items():
        if name != "t-test":
            # A fixed seed, and 99.5% three times for four tests: it holds or the audit is broken.
            assert all(row["false_claims"][level] <= row["allowed"][level] for level in row["allowed"]), name
    assert "| t-test |" in module["table"](found)
