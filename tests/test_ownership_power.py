"""Planning is exact, and the calibrator and the rule that are the defaults are the better ones."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from honeytrace.ownership import (
    DEFAULT_CALIBRATOR,
    RankCalibrator,
    SoftmaxCalibrator,
    groups_needed,
    plan,
    run,
    smallest_p_value,
)
from honeytrace.ownership.calibrator import Calibrator
from honeytrace.ownership.sequential import RULES


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("p_first", [1 / 4, 0.6, 1.0])
def test_plan_equals_enumeration(rule, p_first):
    groups, alpha = 5, 0.02
    sizes, chances = [4, 4, 3, 4, 5], [p_first] * groups
    expected = 0.0
    for hits in itertools.product([True, False], repeat=groups):
        weights = [
            DEFAULT_CALIBRATOR.weights(np.eye(k)[0 if hit else 1]) for k, hit in zip(sizes, hits, strict=True)
        ]
        chance = math.prod(p if hit else 1 - p for p, hit in zip(chances, hits, strict=True))
        expected += chance * run(weights, [0] * groups, alpha=alpha, rule=rule).claim
    assert plan(groups, sizes, chances, alpha, rule=rule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [0.1, 1e-2, 1e-3])
def test_an_innocent_is_claimed_with_at_most_alpha(rule, alpha):
    for groups in (1, 4, 7, 12):
        assert plan(groups, 8, 1 / 8, alpha, rule=rule) <= alpha * (1 + 1e-9)


def test_plan_says_what_cannot_be_reached_and_what_is_needed():
    assert plan(3, 8, 1.0) == 0.0
    assert smallest_p_value([8, 8, 8]) == pytest.approx(1 / 512)
    assert plan(4, 8, 1.0) == 1.0
    assert groups_needed(8, 1.0) == 4
    needed = groups_needed(8, 0.7, power=0.9)
    assert needed is not None
    assert plan(needed, 8, 0.7) >= 0.9 > plan(needed - 1, 8, 0.7)
    assert groups_needed(8, 1 / 8) is None
    assert plan(7, 8, 0.9) > plan(7, 8, 0.6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: plan(0, 8, 0.5),
        lambda: plan(2, [8], 0.5),
        lambda: plan(2, 2, 0.5),
        lambda: plan(2, 8, 1.5),
        lambda: plan(2, 8, 0.5, 0.0),
        lambda: plan(2, 8, 0.5, rule="hope"),  # type: ignore[arg-type]
        lambda: groups_needed(8, 0.5, power=1.0),
        lambda: groups_needed(8, 0.5, at_most=0),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(ValueError):
        make()


def simulated_scores(copies: int, groups: int, failed: int, seed: int) -> np.ndarray:
    """[copies, groups, 8] scores of marked copies; the target is candidate 0.

    Noise of unequal size among candidates; sound groups shift their target by about 4 noise units (it ranks
    first in 90%), failed ones by 1, which groups fail is drawn.
    """
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((copies, groups, 8)) * np.exp(0.4 * rng.standard_normal((copies, groups, 8)))
    fails = rng.permuted(np.tile(np.arange(groups) < failed, (copies, 1)), axis=1)
    scores[..., 0] += np.where(fails, 1.0, 4 * (1 + 0.3 * rng.standard_normal((copies, groups))))
    return scores


def claim_rate(scores: np.ndarray, calibrator: Calibrator, rule: str) -> tuple[float, float]:
    """Rate of claims at 1e-3 and mean number of groups asked."""
    weights = calibrator.weights(scores)
    tests = [run(list(w), [0] * len(w), alpha=1e-3, rule=rule) for w in weights]  # type: ignore[arg-type]
    return float(np.mean([t.claim for t in tests])), float(np.mean([len(t.looks) for t in tests]))


def test_the_defaults_are_the_better_choice_when_a_third_of_the_groups_fail():
    scores = simulated_scores(250, 7, 2, seed=11)
    exact, exact_groups = claim_rate(scores, DEFAULT_CALIBRATOR, "exact")
    ville, ville_groups = claim_rate(scores, DEFAULT_CALIBRATOR, "e-process")
    ranks, _ = claim_rate(scores, RankCalibrator(), "exact")
    assert exact > 0.85
    assert exact > ville + 0.05
    assert exact_groups < ville_groups
    assert exact > ranks + 0.03
    for other in (SoftmaxCalibrator(uniform_share=0.3), SoftmaxCalibrator(lambdas=(0.5, 1.0))):
        assert ville > claim_rate(scores, other, "e-process")[0]


def print_table() -> None:
    """The table the defaults come from: `python tests/test_ownership_power.py`, about two minutes."""
    calibrators: dict[str, Calibrator] = {
        "lambda 1,2,4 share 0.1 (default)": DEFAULT_CALIBRATOR,
        "lambda 1,2,4 share 0.05": SoftmaxCalibrator(uniform_share=0.05),
        "lambda 1,2,4 share 0.2": SoftmaxCalibrator(uniform_share=0.2),
        "lambda 1,2,4 share 0.3": SoftmaxCalibrator(uniform_share=0.3),
        "lambda 0.5,1,2,4 share 0.1": SoftmaxCalibrator(lambdas=(0.5, 1.0, 2.0, 4.0)),
        "lambda 2 share 0.1": SoftmaxCalibrator(lambdas=(2.0,)),
        "lambda 4 share 0.1": SoftmaxCalibrator(lambdas=(4.0,)),
        "ranks, decay 0.3": RankCalibrator(),
        "ranks, decay 0.5": RankCalibrator(decay=0.5),
    }
    data = [simulated_scores(1000, groups, groups // 3, seed=groups) for groups in (6, 7, 8)]
    for name, calibrator in calibrators.items():
        for rule in RULES:
            cells = [claim_rate(scores, calibrator, rule) for scores in data]
            print(f"{name:34s} {rule:10s}", "  ".join(f"{rate:.2f} ({asked:.1f})" for rate, asked in cells))


if __name__ == "__main__":
    print_table()
