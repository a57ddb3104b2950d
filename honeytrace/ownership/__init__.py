"""Proof of ownership: exact tests, a sequential claim, and planning, with a stated false-claim probability.

answers -> scores -> calibrator -> rank_test, sequential -> verify -> verdict; power plans beforehand; t_test
is the papers' figure, for comparison only. All statistics are NumPy and SciPy; only `suspect` and `verify`
touch torch.
"""

from __future__ import annotations

from honeytrace.ownership.answers import clean_labels, clean_scores
from honeytrace.ownership.calibrator import DEFAULT_CALIBRATOR, RankCalibrator, SoftmaxCalibrator, e_values
from honeytrace.ownership.power import groups_needed, plan, smallest_p_value
from honeytrace.ownership.rank_test import exact_p_value, rank_p_value, target_rank
from honeytrace.ownership.scores import fitted_reference, score_labels, score_probabilities
from honeytrace.ownership.sequential import Look, SequentialTest, run
from honeytrace.ownership.suspect import keyed_order
from honeytrace.ownership.t_test import TTest, queries_to_significance, t_test
from honeytrace.ownership.verdict import GroupRecord, Verdict
from honeytrace.ownership.verify import TriggerGroup, VerifiableWatermark, verify

__all__ = [
    "DEFAULT_CALIBRATOR",
    "GroupRecord",
    "Look",
    "RankCalibrator",
    "SequentialTest",
    "SoftmaxCalibrator",
    "TTest",
    "TriggerGroup",
    "Verdict",
    "VerifiableWatermark",
    "clean_labels",
    "clean_scores",
    "e_values",
    "exact_p_value",
    "fitted_reference",
    "groups_needed",
    "keyed_order",
    "plan",
    "queries_to_significance",
    "rank_p_value",
    "run",
    "score_labels",
    "score_probabilities",
    "smallest_p_value",
    "t_test",
    "target_rank",
    "verify",
]
