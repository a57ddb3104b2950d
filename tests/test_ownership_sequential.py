"""Invariant 7: the false-claim probability holds for any suspect, also when stopping at the worst moment."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from honeytrace.ownership import (
    DEFAULT_CALIBRATOR,
    RankCalibrator,
    SequentialTest,
    SoftmaxCalibrator,
    e_values,
    exact_p_value,
    run,
)
from honeytrace.ownership.rank_test import lattice_steps
from honeytrace.ownership.sequential import RULES, spending


def perfect(groups: int, candidates: int = 8) -> list[np.ndarray]:
    return [DEFAULT_CALIBRATOR.weights(np.eye(candidates)[0], scale_floor=0.1)] * groups


def outcomes(weights: list[np.ndarray], alpha: float, rule: str) -> list[SequentialTest]:
    """The test run to its end for every combination of targets, all equally likely."""
    return [
        run(weights, targets, alpha=alpha, rule=rule)  # type: ignore[arg-type]
        for targets in itertools.product(*[range(len(w)) for w in weights])
    ]


@pytest.mark.parametrize("rule", RULES)
@given(
    groups=st.lists(
        st.one_of(
            st.lists(st.floats(-4, 4), min_size=2, max_size=4),
            st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=4),
        ),
        min_size=1,
        max_size=4,
    ),
    alpha=st.sampled_from([0.3, 0.1, 0.05, 1 / 16, 1 / 64]),
)
@settings(max_examples=50, deadline=None)
def test_false_claims_by_enumeration(rule, groups, alpha):
    calibrator = SoftmaxCalibrator(lambdas=(8.0,), uniform_share=0.01)  # bold bets are the hard case
    tests = outcomes([calibrator.weights(g) for g in groups], alpha, rule)
    claims = np.mean([test.claim for test in tests])
    assert claims <= alpha * (1 + 1e-9)
    p = np.array([test.p_value for test in tests])
    for level in p:
        assert np.mean(p <= level) <= level * (1 + 1e-9)
    assert all((test.p_value <= alpha * (1 + 1e-9)) == test.claim for test in tests)
    anytime = np.array([test.anytime_p_value for test in tests])
    for level in anytime:
        assert np.mean(anytime <= level) <= level * (1 + 1e-9)


@given(st.lists(st.lists(st.floats(-4, 4), min_size=2, max_size=4), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_the_product_is_a_martingale(groups):
    weights = [DEFAULT_CALIBRATOR.weights(g) for g in groups]
    products = [
        math.prod(e_values(w)[t] for w, t in zip(weights, targets, strict=True))
        for targets in itertools.product(*[range(len(w)) for w in weights])
    ]
    assert np.mean(products) == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("calibrator", [DEFAULT_CALIBRATOR, RankCalibrator()])
@pytest.mark.parametrize("labels", [False, True])
def test_false_claims_of_200_000_keys_stopping_at_the_worst_moment(calibrator, labels):
    """One suspect, its answers fixed, 200,000 keys: the worst moment to stop is whenever a rule claims."""
    rng = np.random.default_rng(7)
    groups, keys, alpha = 7, 200_000, 1e-2
    scores = rng.poisson(0.7, (groups, 8)) / 30 if labels else rng.standard_t(2, (groups, 8))
    weights = calibrator.weights(scores, scale_floor=1 / 30 if labels else 0.1)
    targets = rng.integers(0, 8, (keys, groups))
    log_e = np.log(8 * np.take_along_axis(weights, targets.T, axis=1)).cumsum(axis=0)
    ville = int((log_e.max(axis=0) >= -math.log(alpha)).sum())
    sums = np.take_along_axis(np.stack([lattice_steps(w) for w in weights]), targets.T, axis=1).cumsum(axis=0)
    exact = int((sums >= boundaries(weights, alpha)[:, None]).any(axis=0).sum())
    for claims in (ville, exact):
        assert stats.binomtest(claims, keys, alpha, alternative="greater").pvalue > 1e-4
    if not labels:
        assert (
            exact > 0.5 * alpha * keys
        )  # and what may be spent is spent: discreteness aside, no power is given away


def boundaries(weights: np.ndarray, alpha: float) -> np.ndarray:
    """b_1, ..., b_G of the exact rule for given answers, read off a run that never claims."""
    test = SequentialTest(alpha, len(weights))
    found = []
    for group_weights in weights:
        assert not test.add(group_weights, int(np.argmin(group_weights))).claim
        found.append(len(test._alive))
    return np.array(found)


def test_a_vectorised_sample_agrees_with_the_test_itself():
    rng = np.random.default_rng(8)
    weights = DEFAULT_CALIBRATOR.weights(rng.normal(size=(5, 4)))
    for targets in rng.integers(0, 4, (200, 5)):
        sums = np.cumsum([lattice_steps(w)[t] for w, t in zip(weights, targets, strict=True)])
        assert run(list(weights), list(targets), alpha=0.05).claim == bool(
            (sums >= boundaries(weights, 0.05)).any()
        )


def test_perfect_groups_claim_after_the_fourth_for_up_to_eight_groups():
    for groups in range(4, 9):
        test = run(perfect(groups), [0] * groups, alpha=1e-3)
        assert test.claim
        assert len(test.looks) == 4
        assert test.p_value == pytest.approx(1 / 4096)
    assert not run(perfect(3), [0] * 3, alpha=1e-3).claim  # 1/512 is all there is


def test_without_early_claims_the_last_look_is_the_fixed_sample_test():
    rng = np.random.default_rng(9)
    weights, targets = list(DEFAULT_CALIBRATOR.weights(rng.normal(size=(6, 8)))), [3, 1, 4, 1, 5, 2]
    test = run(weights, targets, alpha=1e-9)  # nothing can be spent before the end
    assert test.p_value == pytest.approx(exact_p_value(weights, targets), rel=1e-9)


def test_a_claim_stays_and_its_p_value_with_it():
    test = SequentialTest(1e-3, 8)
    for weights in perfect(4):
        test.add(weights, 0)
    p, looks = test.p_value, len(test.looks)
    for weights in perfect(4):
        assert test.add(weights, 7).claim
    assert test.p_value == p
    assert len(test.looks) == looks + 4
    with pytest.raises(ValueError, match="groups=8 were declared"):
        test.add(perfect(1)[0], 0)


def test_e_process_claims_at_one_over_alpha():
    test = SequentialTest(1e-3, 8, "e-process")
    expected = 1.0
    for weights in perfect(8):
        expected *= 8 * weights[0]
        look = test.add(weights, 0)
        assert look.running_e == pytest.approx(expected)
        assert look.claim == (expected >= 1000)
        assert test.p_value == test.anytime_p_value == pytest.approx(1 / expected)


def test_spending_ends_at_alpha():
    assert spending(1e-3, 7)[-1] == 1e-3
    assert np.all(np.diff(spending(1e-3, 7)) > 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SequentialTest(0.0, 3),
        lambda: SequentialTest(1.0, 3),
        lambda: SequentialTest(0.1, 0),
        lambda: SequentialTest(0.1, 3, "hope"),  # type: ignore[arg-type]
        lambda: SequentialTest(0.1, 3).add([0.5, 0.6], 0),
        lambda: SequentialTest(0.1, 3).add([0.5, 0.5], 2),
        lambda: SequentialTest(0.1, 3).add([1.0, 0.0], 0),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(ValueError):
        make()


def test_what_a_look_inside_a_group_would_do():
    """Why sequential.py has none: a suspect that favours another class in each part of a group.

    Each part alone gives a true e-value, and stopping at the better of the two does not.
    """
    parts = [DEFAULT_CALIBRATOR.weights(np.eye(4)[c]) for c in range(4)]
    best = [max(4 * weights[target] for weights in parts) for target in range(4)]
    assert np.mean(best) > 2
