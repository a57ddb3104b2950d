"""The backend `reference`: `honeytrace.ops.reference` behind the op schemas, on every device torch has."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from honeytrace.ops import reference
from honeytrace.ops.checks import unsigned_seed
from honeytrace.rule import METRICS, SPACES, WatermarkRule


def unavailable(device_type: str) -> str | None:
    """Never: plain torch runs everywhere."""
    return None


@functools.lru_cache(maxsize=64)
def _rule(
    numbers: tuple[float, ...],
    offset: tuple[float, ...] = (1.0,),
    scale: tuple[float, ...] = (1.0,),
    confidence_weight: float = 0.0,
) -> WatermarkRule:
    low_confidence, low_power, high_confidence, high_power, space, strength, mixing, flip, bins = numbers
    return WatermarkRule(
        offset=offset if len(offset) > 1 else offset[0],
        scale=scale if len(scale) > 1 else scale[0],
        confidence_weight=confidence_weight,
        low_confidence=low_confidence,
        low_power=low_power,
        high_confidence=high_confidence,
        high_power=high_power,
        space=SPACES[int(space)],
        strength=strength,
        mixing_power=mixing,
        flip_power=flip,
        flip_bins=int(bins),
    )


def feature_distance(
    features: Tensor, rows: Tensor, packed: Tensor | None, norms: Tensor | None, k: int, metric: int, p: float
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        distance, indices = reference.nearest(features.float(), rows, k=k, metric=METRICS[metric], p=p)
    return distance, indices.to(torch.int32)


def sign_hash(features: Tensor, planes: Tensor) -> Tensor:
    return reference.sign_hash(features, planes)


def watermark_mix(
    logits: Tensor,
    similarity: Tensor,
    target_logits: Tensor,
    bucket: Tensor,
    rule: Sequence[float],
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        return reference.watermark_mix(
            logits, similarity, target_logits, bucket, rule=_rule(tuple(rule)), seed=unsigned_seed(seed)
        )


def watermark(
    features: Tensor,
    logits: Tensor,
    rows: Tensor,
    packed: Tensor | None,
    norms: Tensor | None,
    target_logits: Tensor,
    planes: Tensor,
    k: int,
    metric: int,
    p: float,
    offset: Sequence[float],
    scale: Sequence[float],
    confidence_weight: float,
    rule: Sequence[float],
    seed: int,
    constant_time: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    built = _rule(tuple(rule), tuple(offset), tuple(scale), confidence_weight)
    with torch.no_grad():
        distance = feature_distance(features, rows, packed, norms, k, metric, p)[0]
        similarity = reference.similarity(distance, logits, rule=built)
        bucket = reference.sign_hash(features, planes)
        mixed, group, flipped = reference.watermark_mix(
            logits, similarity, target_logits, bucket, rule=built, seed=unsigned_seed(seed)
        )
    return mixed, similarity, group, flipped


def compose(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        return reference.compose(a, b, mask)


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "feature_distance": feature_distance,
    "sign_hash": sign_hash,
    "watermark_mix": watermark_mix,
    "watermark": watermark,
    "compose": compose,
}
