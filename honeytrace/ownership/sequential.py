"""The sequential claim: look after every group, stop at enough evidence, keep the false-claim rate.

Two pre-declared rules, and a verification uses one of them:

"exact" (the default): an exact group-sequential randomisation test. Let S_g be the sum of the log-weights of
the first g targets. Given the answers, all combinations of targets are equally likely, so the probability
that an uninvolved suspect crosses a boundary b_1, ..., b_g is a finite count. The boundary is put where this
probability, over all looks so far, stays within alpha * (g / G)^2 - the share of alpha that may be spent by
look g of G. What a look cannot spend (ranks are discrete) is left to the later ones.

"e-process": claim when the product of the groups' e-values reaches 1 / alpha. The product is a test
martingale, so by Ville's inequality P(it ever reaches 1 / alpha) <= alpha. It needs no number of groups fixed
beforehand and its value may be multiplied with other evidence; it pays for that freedom with power. Rates of
claims at 1e-3 on simulated copies (tests/test_ownership_power.py: 8 candidates, two groups failed), mean
number of groups asked in brackets:

    ===========  ==========  ==========  ==========
    rule         6 groups    7 groups    8 groups
    ===========  ==========  ==========  ==========
    exact        0.76 (5.2)  0.93 (5.3)  0.98 (5.4)
    e-process    0.53 (5.6)  0.81 (5.8)  0.93 (5.9)
    ===========  ==========  ==========  ==========

A fixed-sample test that always asks all groups claims in 0.80, 0.95 and 0.98: looking early costs next to
nothing.

Why both hold for suspects that remember, adapt or change their mind. Let A be the answers the suspect *would*
give if it were asked everything. The verifier's questions and their order do not depend on the targets; only
the moment it stops does, and a suspect that is asked on learns nothing but that it is asked on. So A is
independent of the targets, what is seen is a prefix of A, and given A both rules are statements about
independent uniform draws. The boundary at look g needs the answers of groups 1..g only.

Why there is no look *inside* a group. The target of a group is one draw. Once a part of the group's answers
has been weighed against it, the verifier knows something about that draw, and a second look at the same
target is no fresh
bet: a suspect that favours class 0 in the first triggers and class 1 in the next would be "caught" in the
first look for target 0 and in the second for target 1. Fewer triggers in more groups save queries honestly.

Sources: Lan and DeMets, "Discrete sequential boundaries for clinical trials" (1983), for spending alpha;
Armitage's stagewise order for the p-value; Ville (1939), Vovk and Wang (2021) and Ramdas et al.,
"Game-theoretic statistics and safe anytime-valid inference" (2023), for the e-process. REFERENCES names the
same tool for text watermarks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from honeytrace.ownership.answers import FloatArray
from honeytrace.ownership.rank_test import add_group, lattice_steps, upper_tail

Rule = Literal["exact", "e-process"]
RULES: tuple[Rule, ...] = ("exact", "e-process")

SPENDING_POWER = 2.0
"""alpha * (g / G)^2 may be spent by look g. 1 claims a little earlier, 3 a little more often; 2 lets four
perfect groups of 8 candidates (p = 1/4096) claim at 1e-3 up to G = 8."""

# Sums of probabilities are rounded; a boundary that spends exactly its share must not be lost to that.
_ROUNDING = 1e-12


def spending(alpha: float, groups: int) -> list[float]:
    """How much of alpha may have been spent after look 1, ..., groups; the last entry is alpha."""
    return [alpha * ((g + 1) / groups) ** SPENDING_POWER for g in range(groups)]


def check_alpha(alpha: float) -> None:
    """Raises ValueError for a false-claim probability that is not strictly between 0 and 1."""
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha}")


@dataclass(frozen=True)
class Look:
    """The state after a group.

    Attributes:
        e_value: the group's own e-value.
        running_e: product of the e-values so far.
        p_value: see SequentialTest.p_value.
        claim: whether the rule has claimed by now; once True it stays.
    """

    e_value: float
    running_e: float
    p_value: float
    claim: bool


@dataclass
class SequentialTest:
    """Evidence over groups, one `add` a group.

    Attributes:
        alpha: false-claim probability, in (0, 1).
        groups: G, the number of groups that may be asked; fixed beforehand.
        rule: "exact" or "e-process".

    Raises:
        ValueError: alpha, groups or rule out of range.
    """

    alpha: float
    groups: int
    rule: Rule = "exact"
    looks: list[Look] = field(default_factory=list, init=False)
    _log_e: float = field(default=0.0, init=False, repr=False)
    _largest_log_e: float = field(default=0.0, init=False, repr=False)
    _alive: FloatArray = field(default_factory=lambda: np.ones(1), init=False, repr=False)
    _observed: int = field(default=0, init=False, repr=False)
    _spent: float = field(default=0.0, init=False, repr=False)
    _p_exact: float = field(default=1.0, init=False, repr=False)
    _claimed: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        if self.groups < 1:
            raise ValueError(f"groups must be at least 1, got {self.groups}")
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {RULES}, got {self.rule!r}")

    @property
    def claim(self) -> bool:
        """Whether the rule has claimed."""
        return self._claimed

    @property
    def e_value(self) -> float:
        """Product of the e-values of the groups so far: mean at most 1 for an uninvolved suspect."""
        return math.exp(self._log_e)

    @property
    def anytime_p_value(self) -> float:
        """min(1, 1 / largest running product): valid at any time, for any alpha chosen later (Ville)."""
        return math.exp(-self._largest_log_e)

    @property
    def p_value(self) -> float:
        """The p-value that belongs to the rule: at most alpha if and only if the rule has claimed.

        "e-process": anytime_p_value. "exact": outcomes are ordered by the look at which they claim, then by
        S_g; the p-value is the probability of an outcome at least as early and as large (final once claimed,
        or after the last group; before that it is the one that would hold if this look were the last).
        """
        return self.anytime_p_value if self.rule == "e-process" else self._p_exact

    def add(self, weights: npt.ArrayLike, target_index: int) -> Look:
        """Take the next group's weights [K] and the target's position among its candidates.

        Raises:
            ValueError: more than `groups` groups, weights not positive, not summing to one, index out of
                range.
        """
        if len(self.looks) >= self.groups:
            raise ValueError(f"groups={self.groups} were declared beforehand and all of them have been added")
        w = np.asarray(weights, dtype=np.float64)
        steps = lattice_steps(w)
        if abs(float(w.sum()) - 1) > 1e-9:
            raise ValueError(f"weights must sum to 1, got {float(w.sum())}")
        if not 0 <= target_index < w.size:
            raise ValueError(f"target_index must be one of the K={w.size} candidates of the group")
        e_value = float(w[target_index]) * w.size
        self._log_e += math.log(e_value)
        self._largest_log_e = max(self._largest_log_e, self._log_e)
        if self.rule == "e-process":
            self._claimed = self._claimed or self._log_e >= -math.log(self.alpha) - _ROUNDING
        elif not self._claimed:
            self._look_exactly(steps, target_index)
        look = Look(e_value=e_value, running_e=self.e_value, p_value=self.p_value, claim=self._claimed)
        self.looks.append(look)
        return look

    def _look_exactly(self, steps: npt.NDArray[np.int64], target_index: int) -> None:
        self._alive = add_group(self._alive, steps)
        self._observed += int(steps[target_index])
        tail = upper_tail(self._alive)
        self._p_exact = float(min(1.0, self._spent + tail[self._observed]))
        budget = spending(self.alpha, self.groups)[len(self.looks)] * (1 + _ROUNDING) - self._spent
        boundary = int(np.searchsorted(-tail, -budget))  # the first sum whose tail is within the budget
        if self._observed >= boundary:
            self._claimed = True
            return
        if boundary < len(tail):
            self._spent += float(tail[boundary])
        self._alive = self._alive[:boundary]


def run(
    weights: Sequence[npt.ArrayLike], target_indices: Sequence[int], *, alpha: float, rule: Rule = "exact"
) -> SequentialTest:
    """SequentialTest over recorded groups, stopping at the claim."""
    test = SequentialTest(alpha, len(weights), rule)
    for group_weights, index in zip(weights, target_indices, strict=True):
        if test.add(group_weights, index).claim:
            break
    return test
