"""The published code's outputs for its three presets, kept in tests/data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import GOLDEN, GOLDEN_MIXED, assert_close

from honeytrace import WatermarkRule, ops, reference

DATA = Path(__file__).parent / "data"


class Golden:
    def __init__(self, preset: str) -> None:
        with np.load(DATA / f"neurht_{preset}.npz") as arrays:
            for name in arrays.files:
                setattr(self, name, torch.from_numpy(np.asarray(arrays[name])))
        self.target_logits = self.target_logits[None]
        self.rule = WatermarkRule.neurht(preset)


@pytest.fixture(params=["cifar10", "cifar100", "caltech256"])
def golden(request):
    return Golden(request.param)


def clipped_similarity(golden) -> torch.Tensor:
    distance = ops.feature_distance(golden.features, ops.Bank(golden.bank), k=10, metric="l1")
    return reference.similarity(distance, golden.logits, rule=golden.rule)


def test_the_preset_has_the_recorded_offset(golden):
    assert golden.rule.offset == pytest.approx(float(golden.offset), abs=1e-7)


def test_similarity_and_flip_probability(backend, golden):
    shaped = reference.shape_similarity(
        clipped_similarity(golden)[:, 0], reference.confidence(golden.logits), rule=golden.rule
    )
    assert (golden.similarity > 0).sum() > 20
    assert (golden.similarity == 0).any()
    assert golden.flipped.any()
    assert_close(shaped, golden.similarity, GOLDEN)
    assert_close(reference.flip_probability(shaped, rule=golden.rule), golden.flip_probability, GOLDEN)


def test_mixed_logits_with_the_recorded_flips(golden):
    s = reference.similarity(
        reference.feature_distance(golden.features, golden.bank), golden.logits, rule=golden.rule
    )
    mixed, _, flipped = reference.watermark_mix(
        golden.logits,
        s,
        golden.target_logits,
        torch.zeros(len(s), dtype=torch.int64),
        rule=golden.rule,
        seed=0,
        flipped=golden.flipped,
    )
    assert torch.equal(flipped, golden.flipped)
    assert_close(mixed, golden.mixed_logits, GOLDEN_MIXED)
    assert_close(torch.softmax(mixed, 1), golden.probabilities, GOLDEN)


def test_mixed_logits_of_every_backend(backend, golden):
    """With flips off the rows that were not flipped must come out; the flipped ones are the target logits."""
    rule = dataclasses.replace(golden.rule, flip_bins=0)
    output = ops.watermark(
        golden.features,
        golden.logits,
        ops.Bank(golden.bank),
        golden.target_logits,
        torch.ones(1, golden.features.shape[1]),
        rule=rule,
        seed=0,
    )
    kept = ~golden.flipped
    assert_close(output.logits[kept], golden.mixed_logits[kept], GOLDEN_MIXED)
    assert_close(
        golden.mixed_logits[golden.flipped],
        golden.target_logits.expand(int(golden.flipped.sum()), -1),
        GOLDEN,
    )
