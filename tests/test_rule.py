from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from honeytrace import WatermarkRule


def test_defaults():
    assert WatermarkRule().to_dict() == {
        "offset": 1.0,
        "scale": 1.0,
        "confidence_weight": 0.0,
        "low_confidence": 0.0,
        "low_power": 1.0,
        "high_confidence": 1.0,
        "high_power": 1.0,
        "space": "probabilities",
        "strength": 0.2,
        "mixing_power": 1.0,
        "flip_power": 1.0,
        "flip_bins": 0,
        "k": 10,
        "metric": "l1",
        "p": None,
    }


@pytest.mark.parametrize(
    ("preset", "offset", "low", "high"),
    [
        ("cifar10", 0.85, (0.5, 0.25), (1.0, 1.0)),
        ("cifar100", 1.0, (0.5, 0.25), (1.0, 1.0)),
        ("caltech256", 1.05, (0.1, 0.25), (0.95, 4.0)),
    ],
)
def test_presets(preset, offset, low, high):
    rule = WatermarkRule.neurht(preset)
    assert (rule.offset, rule.scale, rule.confidence_weight) == (offset, 1.0, 0.0)
    assert (rule.low_confidence, rule.low_power) == low
    assert (rule.high_confidence, rule.high_power) == high
    assert (rule.space, rule.strength, rule.mixing_power) == ("logits", 1.0, 2.0)
    assert (rule.flip_power, rule.flip_bins, rule.k, rule.metric, rule.p) == (3.0, 10, 10, "l1", None)


def test_unknown_preset():
    with pytest.raises(ValueError, match=r"preset must be one of 'cifar10', .* got preset='mnist'"):
        WatermarkRule.neurht("mnist")


positive = st.floats(1e-3, 1e3)


@given(
    offset=st.one_of(st.floats(-5, 5), st.lists(st.floats(-5, 5), min_size=3, max_size=3)),
    scale=st.one_of(positive, st.lists(positive, min_size=3, max_size=3)),
    strength=st.floats(0, 1),
    power=positive,
    bins=st.integers(0, 100),
    p=st.floats(1, 50),
)
def test_round_trip_through_json(offset, scale, strength, power, bins, p):
    rule = WatermarkRule(
        offset=offset, scale=scale, strength=strength, flip_power=power, flip_bins=bins, metric="lp", p=p
    )
    again = WatermarkRule.from_dict(json.loads(json.dumps(rule.to_dict())))
    assert again == rule
    assert hash(again) == hash(rule)
    assert again.offsets == rule.offsets
    assert again.mixing_numbers == rule.mixing_numbers


def test_numbers_of_other_libraries_become_plain():
    rule = WatermarkRule(offset=np.float32(0.5), k=np.int64(3), scale=(np.float64(2), 1))
    assert type(rule.offset) is float
    assert type(rule.k) is int
    assert rule.scale == (2.0, 1.0)
    json.dumps(rule.to_dict())


def test_from_dict_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="values has unknown fields colour"):
        WatermarkRule.from_dict({"colour": 1})
    with pytest.raises(TypeError, match="values must be a mapping, got list"):
        WatermarkRule.from_dict([1])
    assert WatermarkRule.from_dict({}) == WatermarkRule()


def test_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        WatermarkRule().k = 3
    with pytest.raises(TypeError):
        WatermarkRule(1.0)
    assert dataclasses.replace(WatermarkRule(), k=3).k == 3


@pytest.mark.parametrize(
    ("field", "value", "error", "text"),
    [
        ("offset", math.nan, ValueError, "offset must be finite, got offset=nan"),
        ("offset", "1", TypeError, "offset must be a number, got '1' of type str"),
        ("offset", (), ValueError, "offset must be a number or a tuple"),
        ("offset", (1.0, math.inf), ValueError, r"offset\[1\] must be finite"),
        ("scale", 0.0, ValueError, "scale must be finite and above 0, got scale=0"),
        ("scale", (1.0, -1.0), ValueError, r"scale\[1\] must be finite and above 0"),
        ("confidence_weight", -0.1, ValueError, "confidence_weight must be finite and at least 0"),
        (
            "low_confidence",
            1.1,
            ValueError,
            "low_confidence must be at least 0 and at most 1, got low_confidence=1.1",
        ),
        ("high_confidence", -0.1, ValueError, "high_confidence must be at least 0 and at most 1"),
        ("low_power", 0.0, ValueError, "low_power must be finite and above 0"),
        ("high_power", math.inf, ValueError, "high_power must be finite and above 0"),
        ("mixing_power", -1, ValueError, "mixing_power must be finite and above 0"),
        ("flip_power", None, TypeError, "flip_power must be a number, got None of type NoneType"),
        ("strength", 1.01, ValueError, "strength must be at least 0 and at most 1"),
        ("strength", True, TypeError, "strength must be a number, got True of type bool"),
        ("space", "logit", ValueError, "space must be one of 'logits', 'probabilities', got space='logit'"),
        ("space", 0, TypeError, "space must be a str"),
        ("flip_bins", -1, ValueError, "flip_bins must be between 0 and"),
        ("flip_bins", 2.0, TypeError, "flip_bins must be an int, got 2.0 of type float"),
        ("k", 0, ValueError, "k must be between 1 and"),
        ("metric", "hamming", ValueError, "metric must be one of"),
        ("metric", "lp", ValueError, 'p must be given with metric="lp"'),
        ("p", 3.0, ValueError, 'p is for metric="lp" only'),
    ],
)
def test_a_bad_field_is_named(field, value, error, text):
    with pytest.raises(error, match=text):
        WatermarkRule(**{field: value})


def test_offset_and_scale_of_different_lengths():
    with pytest.raises(ValueError, match="offset and scale must be equally many numbers, got 2 and 3"):
        WatermarkRule(offset=(1.0, 2.0), scale=(1.0, 2.0, 3.0))


def test_a_tuple_must_fit_the_groups():
    WatermarkRule(offset=(1.0, 2.0)).check_groups(2)
    WatermarkRule().check_groups(7)
    with pytest.raises(
        ValueError, match=r"rule\.offset must be one number or one for each of the bank's G=3 groups"
    ):
        WatermarkRule(offset=(1.0, 2.0)).check_groups(3)
    with pytest.raises(ValueError, match=r"rule\.scale must be one number"):
        WatermarkRule(scale=(1.0,)).check_groups(3)
