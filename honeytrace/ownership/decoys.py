"""The test for tasks with too few classes to draw a target from: decoy places instead of other classes.

A group has K places, each with trigger inputs and a target class of its own, all made alike. One of them,
drawn uniformly by the key (and the beacon) after the places were fixed, is marked; the others are decoys. For
a suspect made without the owner's answers the marked place is a uniform draw that is independent of
everything it says. So its rank among the places is an exact p-value, two classes or two hundred, and groups
combine as they do in `verify`.

With one group of K places the smallest p-value is 1 / K; G groups of K places reach K^-G.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from honeytrace.ownership.answers import ScoreKind, clean_labels, clean_scores
from honeytrace.ownership.calibrator import DEFAULT_CALIBRATOR
from honeytrace.ownership.scores import SCORE_NOISE, score_labels, score_probabilities
from honeytrace.ownership.sequential import Rule, SequentialTest
from honeytrace.ownership.suspect import Suspect, ask, keyed_order, quiet


@dataclass(frozen=True)
class Place:
    """Somewhere a mark could be.

    Attributes:
        triggers: float32 [n, ...] or int64 [n, T].
        reference_log_probs: [n, C], the owner's unmarked reference on them.
        target: the class that answers would be bent to here.
    """

    triggers: Tensor = field(repr=False)
    reference_log_probs: Tensor = field(repr=False)
    target: int = field(repr=False)


@dataclass(frozen=True)
class DecoyGroup:
    """K >= 3 places made alike, and which of them is marked: a uniform draw that nothing else depends on."""

    places: Sequence[Place] = field(repr=False)
    marked: int = field(repr=False)


def verify_decoys(
    suspect: Suspect,
    groups: Sequence[DecoyGroup],
    *,
    seed: int,
    alpha: float = 1e-3,
    rule: Rule = "exact",
    scores_are: ScoreKind = "auto",
) -> SequentialTest:
    """Ask about all places of a group, then of the next, until the rule claims.

    Args:
        suspect: as in `verify`.
        groups: G groups of places.
        seed: of the order of the questions; it must not depend on what is marked.
        alpha, rule, scores_are: as in `verify`.

    Returns:
        The test; its `claim`, `p_value` and `e_value` say what was found.

    Raises:
        ValueError: a group has fewer than 3 places, `marked` is none of them, or as `verify`.
    """
    for index, group in enumerate(groups):
        if len(group.places) < 3:
            raise ValueError(f"group {index} must have at least 3 places, got {len(group.places)}")
        if not 0 <= group.marked < len(group.places):
            raise ValueError(f"group {index}: the marked place must be one of the group's")
    test = SequentialTest(alpha, len(groups), rule)
    for index in keyed_order(seed, "decoy groups", len(groups)):
        group = groups[index]
        scores, noise = np.zeros(len(group.places)), SCORE_NOISE
        for k in keyed_order(seed, f"places of group {index}", len(group.places)):
            scores[k], noise = _lean(suspect, group.places[k], scores_are)
        if test.add(DEFAULT_CALIBRATOR.weights(scores, scale_floor=noise), group.marked).claim:
            break
    return test


def _lean(suspect: Suspect, place: Place, scores_are: ScoreKind) -> tuple[float, float]:
    """How far the suspect leans to the place's target, compared with the reference; size of what is noise."""
    reference = place.reference_log_probs.detach().cpu().double().numpy()
    classes = reference.shape[1]
    with quiet(suspect), torch.no_grad():
        rows = ask(suspect, place.triggers)
    if rows.ndim == 1:
        labels = clean_labels(rows, num_classes=classes)
        expected = reference.argmax(axis=1)
        found = score_labels(labels, expected, [place.target], num_classes=classes)
        return float(found[0]), 1 / len(labels)
    probabilities = clean_scores(rows, num_classes=classes, scores_are=scores_are)
    return float(score_probabilities(probabilities, reference, [place.target])[0]), SCORE_NOISE
