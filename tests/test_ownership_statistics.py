"""The pure statistics: repaired answers, scores, calibrators, ranks, the fixed-sample test, the t-test."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.optimize import minimize_scalar

from honeytrace.ownership import (
    DEFAULT_CALIBRATOR,
    RankCalibrator,
    SoftmaxCalibrator,
    clean_labels,
    clean_scores,
    e_values,
    exact_p_value,
    fitted_reference,
    queries_to_significance,
    rank_p_value,
    score_labels,
    score_probabilities,
    t_test,
    target_rank,
)
from honeytrace.ownership.answers import top_labels
from honeytrace.ownership.calibrator import Calibrator
from honeytrace.ownership.scores import PROBABILITY_FLOOR

CALIBRATORS: list[Calibrator] = [
    DEFAULT_CALIBRATOR,
    SoftmaxCalibrator(lambdas=(50.0,), uniform_share=1e-6),
    RankCalibrator(),
    RankCalibrator(decay=0.9, uniform_share=0.5),
]

nasty = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, 1 / 3, 1e308, -1e308, 5e-324]),
)
score_lists = st.lists(nasty, min_size=1, max_size=12)
# Few distinct values: ties everywhere, as labels give.
tied_lists = st.lists(st.sampled_from([0.0, 1 / 30, 2 / 30, -1 / 30]), min_size=1, max_size=12)
anything = st.floats(allow_nan=True, allow_infinity=True)


def mean_e(weights_for_target: Callable[[int], np.ndarray], candidates: int) -> float:
    """Mean of the group's e-value when the target is a uniform draw: what must not exceed 1."""
    return float(np.mean([e_values(weights_for_target(t))[t] for t in range(candidates)]))


# Answers


@given(
    st.lists(st.lists(anything, min_size=4, max_size=4), max_size=6),
    st.sampled_from(["auto", "probabilities", "logits"]),
)
def test_any_scores_become_distributions(rows, scores_are):
    cleaned = clean_scores(np.array(rows).reshape(-1, 4), num_classes=4, scores_are=scores_are)
    assert cleaned.shape == (len(rows), 4)
    assert np.isfinite(cleaned).all()
    assert (cleaned >= 0).all()
    np.testing.assert_allclose(cleaned.sum(axis=1), 1.0, rtol=1e-12)


@pytest.mark.parametrize(
    ("row", "scores_are", "expected"),
    [
        ([0.2, math.nan, 0.8], "probabilities", [1 / 3, 1 / 3, 1 / 3]),
        ([0.2, math.nan, 0.8], "logits", [1 / 3, 1 / 3, 1 / 3]),
        ([math.inf, 0.5, math.inf], "probabilities", [0.5, 0.0, 0.5]),
        ([math.inf, 0.5, -math.inf], "logits", [1.0, 0.0, 0.0]),
        ([-1.0, 1.0, 3.0], "probabilities", [0.0, 0.25, 0.75]),
        ([1.0, 1.0, 2.0], "probabilities", [0.25, 0.25, 0.5]),
        ([0.0, 0.0, 0.0], "probabilities", [1 / 3, 1 / 3, 1 / 3]),
        ([-math.inf] * 3, "logits", [1 / 3, 1 / 3, 1 / 3]),
        ([1e308, -1e308, 1e308], "logits", [0.5, 0.0, 0.5]),
        ([1e308, 1e308, 0.0], "probabilities", [0.5, 0.5, 0.0]),
        ([math.log(0.1), math.log(0.2), math.log(0.7)], "auto", [0.1, 0.2, 0.7]),
        ([0.1, 0.2, 0.7], "auto", [0.1, 0.2, 0.7]),
    ],
)
def test_the_repair_of_each_kind_of_bad_row_is_fixed(row, scores_are, expected):
    np.testing.assert_allclose(
        clean_scores([row], num_classes=3, scores_are=scores_are)[0], expected, atol=1e-15
    )


def test_auto_takes_the_kind_of_the_majority():
    logits = np.array([[3.0, -1.0, 0.5]] * 3)
    mixed = np.concatenate([logits, [[0.2, 0.3, 0.5]]])
    np.testing.assert_array_equal(clean_scores(mixed, num_classes=3)[:3], clean_scores(logits, num_classes=3))
    rounded = np.array([[0.33, 0.33, 0.33], [0.67, 0.33, 0.01]])
    np.testing.assert_allclose(clean_scores(rounded, num_classes=3)[0], 1 / 3)


def test_scores_of_a_wrong_kind_are_refused_by_name():
    with pytest.raises(ValueError, match=r"scores must have shape \[n, C\] with C=10, got \[2, 9\]"):
        clean_scores(np.zeros((2, 9)), num_classes=10)
    with pytest.raises(ValueError, match="scores_are must be"):
        clean_scores(np.zeros((2, 3)), num_classes=3, scores_are="odds")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scores must be real numbers"):
        clean_scores(np.zeros((2, 3), dtype=complex), num_classes=3)


def test_labels_that_are_no_class_hit_nobody():
    said = clean_labels([0.0, 2.0, math.nan, math.inf, -1.0, 3.0, 1.5], num_classes=3)
    np.testing.assert_array_equal(said, [0, 2, -1, -1, -1, -1, -1])
    with pytest.raises(ValueError, match=r"labels must have shape \[n\]"):
        clean_labels([[1]], num_classes=3)
    with pytest.raises(TypeError, match="labels must be real numbers"):
        clean_labels(["cat"], num_classes=3)


def test_a_shared_maximum_is_no_label():
    np.testing.assert_array_equal(top_labels(np.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])), [-1, 2])


# Scores


def test_score_is_the_mean_log_ratio_with_a_floor():
    suspect, reference = (
        np.array([[0.7, 0.1, 0.2], [0.5, 0.0, 0.5]]),
        np.array([[0.9, 0.0, 0.1], [0.4, 0.2, 0.4]]),
    )
    with np.errstate(divide="ignore"):
        scores = score_probabilities(suspect, np.log(reference), [2, 1])
    floor = PROBABILITY_FLOOR
    expected = [np.mean(np.log(suspect[:, c] + floor) - np.log(reference[:, c] + floor)) for c in (2, 1)]
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    assert np.abs(scores).max() <= math.log(1 + 1 / floor)


def dirichlet(rng: np.random.Generator, *shape: int, concentration: float = 0.3) -> np.ndarray:
    return rng.dirichlet(np.full(6, concentration), shape)


def test_one_reference_is_compared_with_as_it_is():
    rng = np.random.default_rng(0)
    suspect, reference = dirichlet(rng, 7), dirichlet(rng, 7)
    for shaped in (reference, reference[None]):
        np.testing.assert_allclose(fitted_reference(suspect, np.log(shaped)), reference, rtol=1e-12)
    again = score_probabilities(suspect, np.log(np.stack([reference] * 3)), [0, 3])
    np.testing.assert_allclose(score_probabilities(suspect, np.log(reference), [0, 3]), again, rtol=1e-9)


def test_the_fitted_reference_is_the_mixture_of_least_divergence():
    rng = np.random.default_rng(1)
    for _ in range(5):
        suspect, pair = dirichlet(rng, 40), dirichlet(rng, 2, 40)

        def divergence(share: float, pair: np.ndarray = pair, suspect: np.ndarray = suspect) -> float:
            return float(-(suspect * np.log(share * pair[0] + (1 - share) * pair[1])).sum())

        best = minimize_scalar(divergence, bounds=(0, 1), method="bounded").x
        found = fitted_reference(suspect, np.log(pair))
        np.testing.assert_allclose(found, best * pair[0] + (1 - best) * pair[1], atol=2e-3)


def test_a_suspect_is_compared_with_the_reference_that_went_its_way():
    rng = np.random.default_rng(2)
    several = dirichlet(rng, 3, 30, concentration=2.0)
    suspect = several[1].copy()
    suspect[:, 4] += 0.1  # the mark
    suspect /= suspect.sum(1, keepdims=True)
    found = fitted_reference(suspect, np.log(several))
    # The mark itself is nearer to other mixtures, which takes a little of the weight.
    away = np.abs(found - several).mean((1, 2))
    assert away[1] < 0.1 * min(away[0], away[2])
    others = [c for c in range(6) if c != 4]
    noise = score_probabilities(suspect, np.log(several), range(6))[others].std()
    assert noise < score_probabilities(suspect, np.log(several[0]), range(6))[others].std() / 3


def test_references_that_exclude_what_a_suspect_says():
    """Probability 0 wherever the suspect has some: no weight is better than another, and none is NaN."""
    suspect = np.tile([1.0, 0.0, 0.0], (4, 1))
    several = np.stack([np.tile([0.0, 1.0, 0.0], (4, 1)), np.tile([0.0, 0.0, 1.0], (4, 1))])
    with np.errstate(divide="ignore"):
        found = fitted_reference(suspect, np.log(several))
    np.testing.assert_allclose(found, several.mean(0))


def test_label_score_is_the_difference_of_hits():
    scores = score_labels([1, 1, 2, 9], [0, 1, 0, 0], [0, 1, 2], num_classes=4)
    np.testing.assert_array_equal(scores, [-0.75, 0.25, 0.25])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score_probabilities(np.ones((2, 3)), np.zeros((3, 3)), [0]), "one shape"),
        (lambda: score_probabilities(np.ones((0, 3)), np.zeros((0, 3)), [0]), "n >= 1"),
        (lambda: score_probabilities(np.ones((2, 3)), np.full((2, 3), np.nan), [0]), "reference_log_probs"),
        (lambda: score_probabilities(np.ones((2, 3)), np.zeros((2, 3)), [3]), "C=3"),
        (lambda: score_probabilities(np.ones((2, 3)), np.zeros((2, 3)), [1, 1]), "distinct"),
        (lambda: score_probabilities(np.ones((2, 3)), np.zeros((2, 3)), [1], floor=0), "floor"),
        (lambda: fitted_reference(np.ones((2, 3)), np.zeros((4, 2, 2))), "for R references"),
        (lambda: fitted_reference(np.ones((2, 3)), np.zeros((0, 2, 3))), "n >= 1"),
        (lambda: score_labels([0], [0, 1], [0], num_classes=2), "one shape"),
    ],
)
def test_scores_refuse_bad_input_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Calibrators and e-values


@pytest.mark.parametrize("calibrator", CALIBRATORS)
@given(scores=st.one_of(score_lists, tied_lists), scale_floor=st.sampled_from([0.0, 0.1, 1 / 30, 1e300]))
@settings(max_examples=150)
def test_mean_e_over_targets_is_one_for_any_scores(calibrator, scores, scale_floor):
    weights = calibrator.weights(scores, scale_floor=scale_floor)
    assert (weights > 0).all()
    assert mean_e(lambda target: weights, len(scores)) == pytest.approx(1.0, abs=1e-12)


def test_the_check_of_the_mean_catches_a_calibrator_that_peeks():
    scores = np.random.default_rng(0).normal(size=8)

    def peeking(target: int) -> np.ndarray:
        favoured = scores.copy()
        favoured[target] += 0.05
        return DEFAULT_CALIBRATOR.weights(favoured)

    assert mean_e(peeking, 8) > 1.001


@pytest.mark.parametrize("calibrator", CALIBRATORS)
@given(scores=st.one_of(score_lists, tied_lists), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=80)
def test_calibrators_are_symmetric_in_the_candidates(calibrator, scores, seed):
    order = np.random.default_rng(seed).permutation(len(scores))
    f = np.array(scores)
    weights = calibrator.weights(f)
    np.testing.assert_allclose(calibrator.weights(f[order]), weights[order], rtol=1e-6, atol=1e-12)
    for value in np.unique(f):
        assert np.ptp(weights[f == value]) <= 1e-15  # ties share equally


def test_tied_ranks_share_what_they_hold_together():
    calibrator = RankCalibrator(decay=0.5, uniform_share=0.2)
    ranked, tied = calibrator.weights([4, 3, 2, 1]), calibrator.weights([4, 2, 2, 1])
    np.testing.assert_allclose(tied, [ranked[0], *[(ranked[1] + ranked[2]) / 2] * 2, ranked[3]], rtol=1e-12)


@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_a_silent_group_costs_nothing_and_a_failed_one_a_known_factor(calibrator):
    np.testing.assert_allclose(e_values(calibrator.weights(np.full(8, 0.1))), 1.0, rtol=1e-12)
    failed = e_values(calibrator.weights([0.0] + [1e9] + [0.0] * 6))[0]
    assert failed >= calibrator.uniform_share - 1e-12  # type: ignore[attr-defined]


def test_the_scale_floor_keeps_noise_from_being_a_bet():
    whisper = [1e-6] + [0.0] * 7
    assert e_values(DEFAULT_CALIBRATOR.weights(whisper))[0] > 5
    assert e_values(DEFAULT_CALIBRATOR.weights(whisper, scale_floor=0.1))[0] == pytest.approx(1.0, abs=1e-3)


def test_calibrators_work_on_stacks_and_refuse_bad_parameters():
    stack = np.random.default_rng(1).normal(size=(5, 3, 6))
    for calibrator in CALIBRATORS:
        np.testing.assert_allclose(
            calibrator.weights(stack)[2, 1], calibrator.weights(stack[2, 1]), rtol=1e-12
        )
    for make in (
        lambda: SoftmaxCalibrator(lambdas=()),
        lambda: SoftmaxCalibrator(lambdas=(-1.0,)),
        lambda: SoftmaxCalibrator(uniform_share=0.0),
        lambda: RankCalibrator(decay=1.0),
        lambda: DEFAULT_CALIBRATOR.weights([1.0, math.nan]),
        lambda: DEFAULT_CALIBRATOR.weights([]),
        lambda: DEFAULT_CALIBRATOR.weights([1.0], scale_floor=-1),
    ):
        with pytest.raises(ValueError):
            make()


# Ranks and the fixed-sample test


@given(st.one_of(score_lists, tied_lists))
def test_rank_p_value_is_valid_for_any_scores(scores):
    p = np.array([rank_p_value(scores, t) for t in range(len(scores))])
    for level in p:
        assert np.mean(p <= level) <= level + 1e-12
    if len(set(scores)) == len(scores):
        np.testing.assert_allclose(np.sort(p), np.arange(1, len(p) + 1) / len(p))


def test_ties_count_against_the_owner():
    assert target_rank([3, 3, 1], 0) == 2
    assert rank_p_value([1, 1, 1, 1], 2) == 1.0
    with pytest.raises(ValueError, match="K=3"):
        target_rank([1, 2, 3], 3)


@given(st.lists(st.lists(st.floats(-3, 3), min_size=2, max_size=4), min_size=1, max_size=4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_exact_p_value_equals_enumeration_and_is_valid(groups, tied):
    weights = [DEFAULT_CALIBRATOR.weights(np.round(g) if tied else g) for g in groups]
    combinations = list(itertools.product(*[range(len(w)) for w in weights]))
    p = np.array([exact_p_value(weights, combination) for combination in combinations])
    for level in np.unique(p):
        assert np.mean(p <= level) <= level * (1 + 1e-9)  # P(p <= t) <= t
        assert np.mean(p <= level) >= level * (1 - 1e-9)  # and each value is attained exactly
    e = np.array([np.prod([e_values(w)[t] for w, t in zip(weights, c, strict=True)]) for c in combinations])
    assert (p <= 1 / e * 1.05 + 1e-12).all()  # Markov, up to the lattice


def test_exact_p_value_of_perfect_groups_of_different_size():
    weights = [DEFAULT_CALIBRATOR.weights(np.eye(k)[0]) for k in (8, 5, 3)]
    assert exact_p_value(weights, [0, 0, 0]) == pytest.approx(1 / 120)
    for bad in ([], [0, 0]):
        with pytest.raises(ValueError):
            exact_p_value(weights[: len(bad)] if not bad else weights, bad)
    with pytest.raises(ValueError, match="weights"):
        exact_p_value([[0.0, 1.0]], [0])


# The papers' figure


def test_t_test_is_welchs_and_counts_queries():
    rng = np.random.default_rng(3)
    x, y = rng.beta(1, 4, 300), rng.beta(1, 9, 300)
    result = t_test(x, y)
    known = stats.ttest_ind(x, y, equal_var=False, alternative="greater")
    assert (result.statistic, result.p_value) == (pytest.approx(known.statistic), pytest.approx(known.pvalue))
    n = result.queries_to_significance
    assert n is not None
    assert 2 <= n < 300
    moments = result.suspect_mean, x.std(ddof=1), n, result.reference_mean, y.std(ddof=1), n
    assert stats.ttest_ind_from_stats(*moments, equal_var=False, alternative="greater").pvalue < 0.05
    fewer = (*moments[:2], n - 1, *moments[3:5], n - 1)
    assert stats.ttest_ind_from_stats(*fewer, equal_var=False, alternative="greater").pvalue >= 0.05


def test_t_test_at_the_edges():
    assert t_test([0.5, 0.5], [0.5, 0.5]).queries_to_significance is None
    sure = t_test([1.0, 1.0], [0.0, 0.0])
    assert (sure.p_value, sure.queries_to_significance) == (0.0, 2)
    assert t_test([0.0, 0.0], [1.0, 1.0]).p_value == 1.0
    assert queries_to_significance(1e-9, 1.0, 1.0) is None
    for bad in (([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, math.nan], [0.0, 0.0])):
        with pytest.raises(ValueError):
            t_test(*bad)


def test_t_test_accuses_an_innocent_that_the_exact_test_does_not():
    # Why it is no proof: two honest models that differ a little in one class, and enough queries.
    rng = np.random.default_rng(4)
    honest, reference = rng.dirichlet([2, 2, 2, 2.3], 20_000), rng.dirichlet([2, 2, 2, 2], 20_000)
    assert t_test(honest[:, 3], reference[:, 3]).p_value < 1e-12
    p = rank_p_value(score_probabilities(honest, np.log(reference), [0, 1, 2, 3]), 3)
    assert p == 0.25  # all that one group of four candidates can ever say
