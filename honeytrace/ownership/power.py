"""How likely a claim is, before a single query: exact, by counting, not by simulation.

Model of a copy: in each group, independently, the target stands alone ahead of all other candidates with
probability p_first; otherwise one of the other candidates does. That is the clearest outcome and the most
harmful one, nothing between them, so a plan leans to the safe side for copies whose failed groups still rank
second or third.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from honeytrace.ownership.calibrator import DEFAULT_CALIBRATOR, Calibrator
from honeytrace.ownership.rank_test import add_group, lattice_steps, upper_tail
from honeytrace.ownership.sequential import _ROUNDING, RULES, Rule, check_alpha, spending


def plan(
    groups: int,
    candidates: int | Sequence[int],
    p_first: float | Sequence[float],
    alpha: float = 1e-3,
    *,
    rule: Rule = "exact",
    calibrator: Calibrator = DEFAULT_CALIBRATOR,
) -> float:
    """Probability that verification claims.

    Args:
        groups: G >= 1.
        candidates: K of every group, or one number a group; each >= 3.
        p_first: probability that the target ranks first, of every group or one number a group. 1/K is the
            figure of a model that never saw the owner's answers; with it the result is at most alpha.
        alpha: false-claim probability of the verification.
        rule: as in `verify`.
        calibrator: as in `verify`, where it is the default one.

    Returns:
        The probability, exact for the model in the module's text, groups asked in the order given.

    Raises:
        ValueError: a number out of range, or lists whose length is not `groups`.
    """
    sizes, chances = _expand(groups, candidates, p_first)
    check_alpha(alpha)
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}, got {rule!r}")
    budgets = spending(alpha, groups)
    alive_null, spent = np.ones(1), 0.0
    # Under the plan the state is the same sum as under the null, only its probabilities differ.
    alive, claimed = {(0, 0.0): 1.0}, 0.0
    for size, chance, budget in zip(sizes, chances, budgets, strict=True):
        weights = _clear_winner(size, calibrator)
        steps = lattice_steps(weights)
        moves = [
            (int(steps[0]), math.log(size * float(weights[0])), chance),
            (int(steps[1]), math.log(size * float(weights[1])), 1 - chance),
        ]
        following: dict[tuple[int, float], float] = {}
        for (total, log_e), mass in alive.items():
            for step, gain, probability in moves:
                state = (total + step, round(log_e + gain, 9))
                following[state] = following.get(state, 0.0) + mass * probability
        if rule == "exact":
            alive_null = add_group(alive_null, steps)
            tail = upper_tail(alive_null)
            boundary = int(np.searchsorted(-tail, -(budget * (1 + _ROUNDING) - spent)))
            spent += float(tail[boundary]) if boundary < len(tail) else 0.0
            alive_null = alive_null[:boundary]
            over = {state for state in following if state[0] >= boundary}
        else:
            over = {state for state in following if state[1] >= -math.log(alpha) - 1e-8}
        claimed += sum(following.pop(state) for state in over)
        alive = following
    return float(min(1.0, claimed))


def groups_needed(
    candidates: int,
    p_first: float,
    alpha: float = 1e-3,
    *,
    power: float = 0.9,
    at_most: int = 64,
    rule: Rule = "exact",
    calibrator: Calibrator = DEFAULT_CALIBRATOR,
) -> int | None:
    """Smallest number of groups whose plan reaches `power`; None when `at_most` groups do not.

    Raises:
        ValueError: as plan; power not in (0, 1); at_most < 1.
    """
    if not 0 < power < 1:
        raise ValueError(f"power must be between 0 and 1, got {power}")
    if at_most < 1:
        raise ValueError(f"at_most must be at least 1, got {at_most}")
    for groups in range(1, at_most + 1):
        if plan(groups, candidates, p_first, alpha, rule=rule, calibrator=calibrator) >= power:
            return groups
    return None


def smallest_p_value(candidates: Sequence[int]) -> float:
    """The p-value of a copy that ranks every target first: 1 / (product of the candidate counts)."""
    return math.exp(-sum(math.log(size) for size in candidates))


def _clear_winner(size: int, calibrator: Calibrator) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    scores = np.zeros(size)
    scores[0] = 1.0
    return calibrator.weights(scores)


def _expand(
    groups: int, candidates: int | Sequence[int], p_first: float | Sequence[float]
) -> tuple[list[int], list[float]]:
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    sizes = [candidates] * groups if isinstance(candidates, int) else list(candidates)
    chances = [float(p_first)] * groups if isinstance(p_first, (int, float)) else [float(p) for p in p_first]
    for name, values in (("candidates", sizes), ("p_first", chances)):
        if len(values) != groups:
            raise ValueError(f"{name} must be one number or groups={groups} numbers, got {len(values)}")
    if min(sizes) < 3:
        raise ValueError(f"candidates must be at least 3 a group, got {min(sizes)}")
    if not all(0 <= p <= 1 for p in chances):
        raise ValueError(f"p_first must be between 0 and 1, got {p_first}")
    return sizes, chances
