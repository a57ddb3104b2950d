"""The rule that turns a feature distance into a changed answer (DESIGN, section 3).

A rule holds no secret: offsets, scales and powers may be printed and stored. It imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

METRICS: tuple[str, ...] = ("l1", "l2", "lp", "cosine")
"""Names of the distances; the position of a name is its code in op schemas and in the compiled core."""

SPACES: tuple[str, ...] = ("logits", "probabilities")
"""Where answers are mixed; the position of a name is its code in op schemas and in the compiled core."""

_NEURHT: dict[str, dict[str, Any]] = {
    "cifar10": {"offset": 0.85, "low_confidence": 0.5, "low_power": 0.25},
    "cifar100": {"offset": 1.0, "low_confidence": 0.5, "low_power": 0.25},
    "caltech256": {
        "offset": 1.05,
        "low_confidence": 0.1,
        "low_power": 0.25,
        "high_confidence": 0.95,
        "high_power": 4.0,
    },
}


def check_integer(name: str, value: object, minimum: int, maximum: int) -> int:
    """Return `value` as a plain int; TypeError unless it is an integer, ValueError outside the two bounds."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
    number = int(value)
    if not minimum <= number <= maximum:
        raise ValueError(f"{name} must be between {minimum} and {maximum}, got {name}={number}")
    return number


def check_number(
    name: str, value: object, minimum: float, maximum: float = math.inf, *, above: bool = False
) -> float:
    """Return `value` as a finite float within the bounds (`above`: strictly above the minimum)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    number = float(value)
    low = minimum < number if above else minimum <= number
    if not (math.isfinite(number) and low and number <= maximum):
        if minimum == -math.inf:
            expected = "finite"
        elif maximum == math.inf:
            expected = f"finite and {'above' if above else 'at least'} {minimum:g}"
        else:
            expected = f"{'above' if above else 'at least'} {minimum:g} and at most {maximum:g}"
        raise ValueError(f"{name} must be {expected}, got {name}={number:g}")
    return number


def check_metric(metric: object, p: object) -> tuple[int, float]:
    """Return the metric's code and the exponent p as the kernels take it (1.0 where the metric has none).

    Raises TypeError for a metric that is no string, ValueError for an unknown one, for "lp" without p >= 1,
    and for a p beside another metric.
    """
    if not isinstance(metric, str):
        raise TypeError(f"metric must be a str, got {metric!r} of type {type(metric).__name__}")
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}, got metric={metric!r}")
    if metric == "lp":
        if p is None:
            raise ValueError('p must be given with metric="lp", a finite number of at least 1, got p=None')
        return METRICS.index(metric), check_number("p", p, 1.0)
    if p is not None:
        raise ValueError(f'p is for metric="lp" only, got p={p!r} with metric={metric!r}')
    return METRICS.index(metric), 1.0


def _per_group(name: str, value: object, minimum: float, *, above: bool = False) -> float | tuple[float, ...]:
    if isinstance(value, (tuple, list)):
        if not value:
            raise ValueError(
                f"{name} must be a number or a tuple of one number for each group, got {name}=()"
            )
        return tuple(check_number(f"{name}[{i}]", v, minimum, above=above) for i, v in enumerate(value))
    return check_number(name, value, minimum, above=above)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatermarkRule:
    """How a query's distance to the bank bends its answer.

    With d the feature distance to group g and c = max softmax(logits):

        s = clip((offset_g - d - confidence_weight * c) / scale_g, 0, 1)        similarity
        s <- s ^ low_power where c < low_confidence;  s <- s ^ high_power where c > high_confidence
        w = strength * s ^ mixing_power                                         weight of the target's answer
        P(flip) = floor(s ^ flip_power * flip_bins) / flip_bins                 answer replaced by the
        target's

    Source: Neural Honeytrace (arXiv 2501.09328), section 4, and its published code; `confidence_weight`, the
    mixing of probabilities and `strength` below 1 are additions of this project (DESIGN, section 3).

    Args:
        offset: distance at which similarity reaches 0, in units of the metric; one number, or a tuple of one
            for each group. Default 1.0.
        scale: fall of the distance over which similarity rises from 0 to 1, > 0; one number or one for each
            group. Default 1.0.
        confidence_weight: distance taken off for an answer of full confidence, >= 0. Default 0.0 (as
            published).
        low_confidence, low_power: below this confidence s is raised to this power. Default 0.0 (never), 1.0.
        high_confidence, high_power: above this confidence s is raised to this power. Default 1.0 (never),
            1.0.
        space: "probabilities" (default) mixes distributions, "logits" (as published) mixes logits.
        strength: largest weight of the target, in [0, 1]. Default 0.2; 1.0 as published.
        mixing_power: exponent of s in the weight, > 0. Default 1.0.
        flip_power: exponent of s in the flip probability, > 0. Default 1.0.
        flip_bins: number of steps of the flip probability; 0 (default) means no flips.
        k: number of nearest bank rows whose distances are averaged. Default 10.
        metric: "l1" (default), "l2", "lp" or "cosine".
        p: exponent of "lp", finite and >= 1; None (default) with the other metrics.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: a value outside its range, with the argument, the value and the range.
    """

    offset: float | tuple[float, ...] = 1.0
    scale: float | tuple[float, ...] = 1.0
    confidence_weight: float = 0.0
    low_confidence: float = 0.0
    low_power: float = 1.0
    high_confidence: float = 1.0
    high_power: float = 1.0
    space: str = "probabilities"
    strength: float = 0.2
    mixing_power: float = 1.0
    flip_power: float = 1.0
    flip_bins: int = 0
    k: int = 10
    metric: str = "l1"
    p: float | None = None

    # What the ops take, worked out once so that a call does not have to: a sequence of 1 or G offsets and
    # scales, the numbers of `mixing_numbers`, the metric's code and its exponent.
    offsets: tuple[float, ...] = dataclasses.field(init=False, repr=False, compare=False)
    scales: tuple[float, ...] = dataclasses.field(init=False, repr=False, compare=False)
    mixing_numbers: tuple[float, ...] = dataclasses.field(init=False, repr=False, compare=False)
    metric_code: int = dataclasses.field(init=False, repr=False, compare=False)
    exponent: float = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("offset", _per_group("offset", self.offset, -math.inf))
        put("scale", _per_group("scale", self.scale, 0.0, above=True))
        put("confidence_weight", check_number("confidence_weight", self.confidence_weight, 0.0))
        put("low_confidence", check_number("low_confidence", self.low_confidence, 0.0, 1.0))
        put("high_confidence", check_number("high_confidence", self.high_confidence, 0.0, 1.0))
        for name in ("low_power", "high_power", "mixing_power", "flip_power"):
            put(name, check_number(name, getattr(self, name), 0.0, above=True))
        put("strength", check_number("strength", self.strength, 0.0, 1.0))
        if not isinstance(self.space, str):
            raise TypeError(f"space must be a str, got {self.space!r} of type {type(self.space).__name__}")
        if self.space not in SPACES:
            raise ValueError(f"space must be one of {', '.join(map(repr, SPACES))}, got space={self.space!r}")
        put("flip_bins", check_integer("flip_bins", self.flip_bins, 0, 2**31 - 1))
        put("k", check_integer("k", self.k, 1, 2**31 - 1))
        code, exponent = check_metric(self.metric, self.p)
        put("p", exponent if self.metric == "lp" else None)

        offsets = self.offset if isinstance(self.offset, tuple) else (self.offset,)
        scales = self.scale if isinstance(self.scale, tuple) else (self.scale,)
        if len(offsets) > 1 and len(scales) > 1 and len(offsets) != len(scales):
            raise ValueError(
                f"offset and scale must be equally many numbers, got {len(offsets)} and {len(scales)}"
            )
        put("offsets", offsets)
        put("scales", scales)
        put("metric_code", code)
        put("exponent", exponent)
        put(
            "mixing_numbers",
            (
                self.low_confidence,
                self.low_power,
                self.high_confidence,
                self.high_power,
                float(SPACES.index(self.space)),
                self.strength,
                self.mixing_power,
                self.flip_power,
                float(self.flip_bins),
            ),
        )

    def check_groups(self, groups: int) -> None:
        """ValueError unless offset and scale fit a bank of `groups` groups (a single number fits any)."""
        for name, value in (("offset", self.offset), ("scale", self.scale)):
            if isinstance(value, tuple) and len(value) != groups:
                raise ValueError(
                    f"rule.{name} must be one number or one for each of the bank's G={groups} groups, "
                    f"got {len(value)} numbers"
                )

    @classmethod
    def neurht(cls, preset: str) -> WatermarkRule:
        """The values the authors of Neural Honeytrace use in their published code (DESIGN, section 3).

        Args:
            preset: "cifar10", "cifar100" or "caltech256".

        Raises:
            ValueError: another name.
        """
        if preset not in _NEURHT:
            raise ValueError(f"preset must be one of {', '.join(map(repr, _NEURHT))}, got preset={preset!r}")
        return cls(
            space="logits",
            strength=1.0,
            mixing_power=2.0,
            flip_power=3.0,
            flip_bins=10,
            k=10,
            metric="l1",
            **_NEURHT[preset],
        )

    def to_dict(self) -> dict[str, Any]:
        """The public fields as plain JSON values (tuples become lists)."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> WatermarkRule:
        """The rule that `to_dict` described; missing fields take defaults, unknown ones are an error."""
        if not isinstance(values, Mapping):
            raise TypeError(f"values must be a mapping, got {type(values).__name__}")
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ValueError(
                f"values has unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}"
            )
        return cls(**values)


def check_rule(rule: object) -> None:
    """TypeError unless `rule` is a `WatermarkRule`."""
    if not isinstance(rule, WatermarkRule):
        raise TypeError(f"rule must be a WatermarkRule, got {type(rule).__name__}")


def core_rule(
    numbers: tuple[float, ...],
) -> tuple[float, float, float, float, int, float, float, float, int]:
    """The numbers of `WatermarkRule.mixing_numbers` as the compiled core wants them: ints where ints are."""
    low_confidence, low_power, high_confidence, high_power, space, strength, mixing, flip, bins = numbers
    return (
        low_confidence,
        low_power,
        high_confidence,
        high_power,
        int(space),
        strength,
        mixing,
        flip,
        int(bins),
    )
