"""`watermark_mix`: one program for each answer finds the strongest group, shapes, draws, and mixes.

An answer is read once where its classes fit a tile, twice otherwise. Shaping, weight and flip are float64
scalars, as in the reference and the compiled core; the rule comes as a tensor of float64, because Triton
takes float arguments as float32.

With FUSED, the similarities are computed here from the distances, which is the last third of `watermark`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .language import OPTIONS, jit, jit_unspecialized, power_of_two, tl
from .numerics import is_finite, shaped_power
from .philox import flip_uniform

LARGEST_TILE = 4096
"""Classes that are held in registers at once."""


@jit
def _logits(ptr: tl.tensor, c: tl.tensor, classes: tl.tensor) -> tl.tensor:
    return tl.load(ptr + c, mask=c < classes, other=0.0)


@jit
def _log_sum(
    ptr: tl.tensor, classes: tl.tensor, BLOCK_C: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Largest logit, sum of exp(logit - largest), and whether all logits are finite. Tile by tile."""
    step = tl.arange(0, BLOCK_C)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    broken = tl.full((), 0, tl.int32)
    for start in range(0, classes, BLOCK_C):
        c = start + step
        valid = c < classes
        x = _logits(ptr, c, classes).to(tl.float32)
        finite = is_finite(x)
        broken = tl.maximum(broken, tl.max(tl.where(finite, 0, 1), axis=0))
        x = tl.where(finite, x, 0.0)
        higher = tl.maximum(top, tl.max(tl.where(valid, x, float("-inf")), axis=0))
        part = tl.sum(tl.where(valid, tl.exp(x - higher), 0.0), axis=0)
        total = total * tl.exp(top - higher) + part
        top = higher
    return top, total, broken == 0


@jit
def _decide(
    s: tl.tensor,
    confidence: tl.tensor,
    rule_ptr: tl.tensor,
    seed: tl.tensor,
    bucket: tl.tensor,
    group: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Mixing weight (float64) and flip of a similarity in (0, 1]."""
    low_confidence, low_power = tl.load(rule_ptr), tl.load(rule_ptr + 1)
    high_confidence, high_power = tl.load(rule_ptr + 2), tl.load(rule_ptr + 3)
    strength, mixing_power = tl.load(rule_ptr + 5), tl.load(rule_ptr + 6)
    flip_power, bins = tl.load(rule_ptr + 7), tl.load(rule_ptr + 8)
    c = confidence.to(tl.float64)
    shaped = s.to(tl.float64)
    if c < low_confidence:
        shaped = shaped_power(shaped, low_power)
    if c > high_confidence:
        shaped = shaped_power(shaped, high_power)
    weight = strength * shaped_power(shaped, mixing_power)
    steps = tl.floor(shaped_power(shaped, flip_power) * bins)
    probability = steps / tl.where(bins > 0, bins, 1.0)
    flipped = (bins > 0) & (flip_uniform(seed, bucket, group) < probability)
    return weight, flipped


@jit
def _mix(
    z: tl.tensor,
    r: tl.tensor,
    weight: tl.tensor,
    log_keep: tl.tensor,
    shift: tl.tensor,
    target_log_sum: tl.tensor,
    SPACE: tl.constexpr,
) -> tl.tensor:
    """Mixed logits of a tile, float32; shift is log-sum-exp of the logits plus log of the weight."""
    if SPACE == 0:
        w = weight.to(tl.float32)
        mixed = (1.0 - w) * z + w * r
    else:
        own = z + log_keep
        taken = (r - target_log_sum) + shift
        top = tl.maximum(own, taken)
        gap = tl.where(is_finite(top), tl.abs(own - taken), float("inf"))
        mixed = top + tl.log(1.0 + tl.exp(-gap))
    return mixed


@jit
def _similarity(
    distance: tl.tensor,
    offset: tl.tensor,
    scale: tl.tensor,
    confidence: tl.tensor,
    confidence_weight: tl.tensor,
) -> tl.tensor:
    """clip((offset - distance - confidence_weight * confidence) / scale, 0, 1) in float32; 0 for
    infinities."""
    raw = tl.div_rn((offset - distance) - confidence_weight * confidence, scale)
    return tl.where(is_finite(distance) & (raw > 0), tl.minimum(raw, 1.0), 0.0)


@jit_unspecialized("seed", "confidence_weight")
def watermark_mix_kernel(
    logits_ptr: tl.tensor,
    stride: tl.tensor,
    similarity_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    target_ptr: tl.tensor,
    bucket_ptr: tl.tensor,
    rule_ptr: tl.tensor,
    seed: tl.tensor,
    mixed_ptr: tl.tensor,
    clipped_ptr: tl.tensor,
    group_ptr: tl.tensor,
    flipped_ptr: tl.tensor,
    classes: tl.tensor,
    groups: tl.tensor,
    confidence_weight: tl.tensor,
    largest: tl.tensor,
    FUSED: tl.constexpr,
    SPACE: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """One answer. similarity holds distances where FUSED; clipped then receives the similarities.

    WHOLE: one tile of BLOCK_C holds all classes, and the logits stay in registers between the two looks.
    """
    row = tl.program_id(0).to(tl.int64)
    source, target_row = logits_ptr + row * stride, mixed_ptr + row * classes
    step = tl.arange(0, BLOCK_C)
    if WHOLE:
        raw = _logits(source, step, classes)
        z = raw.to(tl.float32)
        finite_tile = is_finite(z)
        finite = tl.max(tl.where(finite_tile, 0, 1), axis=0) == 0
        z = tl.where(finite_tile, z, 0.0)
        top = tl.max(tl.where(step < classes, z, float("-inf")), axis=0)
        total = tl.sum(tl.where(step < classes, tl.exp(z - top), 0.0), axis=0)
    else:
        top, total, finite = _log_sum(source, classes, BLOCK_C)
    confidence = tl.div_rn(tl.full((), 1.0, tl.float32), total)

    g = tl.arange(0, BLOCK_G)
    s = tl.load(similarity_ptr + row * groups + g, mask=g < groups, other=0.0).to(tl.float32)
    if FUSED:
        offset = tl.load(offset_ptr + g, mask=g < groups, other=0.0)
        scale = tl.load(scale_ptr + g, mask=g < groups, other=1.0)
        s = tl.where(finite, _similarity(s, offset, scale, confidence, confidence_weight), 0.0)
        tl.store(clipped_ptr + row * groups + g, s, mask=g < groups)
    s = tl.where((g < groups) & (s > 0), tl.minimum(s, 1.0), 0.0)  # NaN is not above 0
    strongest = tl.max(s, axis=0)
    group = tl.min(tl.where(s == strongest, g, BLOCK_G), axis=0)
    active = finite & (strongest > 0)
    group = tl.where(finite, group, 0)

    weight, flipped = _decide(
        tl.where(active, strongest, 1.0),
        confidence,
        rule_ptr,
        seed.to(tl.int64),
        tl.load(bucket_ptr + row),
        group.to(tl.int64),
    )
    flipped = flipped & active
    tl.store(group_ptr + row, group.to(tl.int64))
    tl.store(flipped_ptr + row, flipped.to(tl.int8))

    target = target_ptr + group.to(tl.int64) * classes
    log_keep = tl.where(weight < 1, tl.log(1.0 - tl.where(weight < 1, weight, 0.0)), float("-inf")).to(
        tl.float32
    )
    log_take = tl.where(weight > 0, tl.log(tl.where(weight > 0, weight, 1.0)), float("-inf")).to(tl.float32)
    shift = (top + tl.log(total)) + log_take
    if WHOLE:
        r = _logits(target, step, classes)
        target_log_sum = tl.full((), 0.0, tl.float32)
        if SPACE == 1:
            target_top = tl.max(tl.where(step < classes, r, float("-inf")), axis=0)
            target_total = tl.sum(tl.where(step < classes, tl.exp(r - target_top), 0.0), axis=0)
            target_log_sum = target_top + tl.log(target_total)
        mixed = tl.where(flipped, r, _mix(z, r, weight, log_keep, shift, target_log_sum, SPACE))
        mixed = tl.minimum(tl.maximum(mixed, -largest), largest).to(raw.dtype)
        tl.store(target_row + step, tl.where(active, mixed, raw), mask=step < classes)
    else:
        target_log_sum = tl.full((), 0.0, tl.float32)
        if SPACE == 1:
            target_top, target_total, _ = _log_sum(target, classes, BLOCK_C)
            target_log_sum = target_top + tl.log(target_total)
        for start in range(0, classes, BLOCK_C):
            c = start + step
            raw = _logits(source, c, classes)
            z = raw.to(tl.float32)
            r = _logits(target, c, classes)
            mixed = tl.where(flipped, r, _mix(z, r, weight, log_keep, shift, target_log_sum, SPACE))
            mixed = tl.minimum(tl.maximum(mixed, -largest), largest).to(raw.dtype)
            tl.store(target_row + c, tl.where(active, mixed, raw), mask=c < classes)


def warps(block: int) -> int:
    """Warps of a program that holds `block` classes."""
    return 1 if block <= 256 else 4 if block <= 2048 else 8


def watermark_mix(
    logits: Tensor,
    similarity: Tensor,
    target_logits: Tensor,
    bucket: Tensor,
    rule: Tensor,
    space: int,
    seed: int,
    *,
    offset: Tensor | None = None,
    scale: Tensor | None = None,
    confidence_weight: float = 0.0,
    tile: int = LARGEST_TILE,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mixed logits, similarity, group and flipped.

    Args:
        logits: [B, C] float32, float16 or bfloat16 with adjacent columns.
        similarity: [B, G] float32, contiguous; distances where offset and scale ([G] float32) are given.
        target_logits: [G, C] float32, contiguous. bucket: [B] int64, contiguous.
        rule: the numbers of `WatermarkRule.mixing_numbers`, float64, on the device. space: their fifth.
        seed: signed 64 bits.
        confidence_weight: of the similarity, where it is computed here.
        tile: classes that one program holds at once; more are taken in several tiles.
    """
    batch, classes = logits.shape
    groups = similarity.shape[1]
    mixed = logits.new_empty((batch, classes))
    group = logits.new_empty(batch, dtype=torch.int64)
    flipped = logits.new_empty(batch, dtype=torch.bool)
    fused = offset is not None
    clipped = torch.empty_like(similarity) if fused else similarity
    if batch > 0:
        block = min(power_of_two(classes), tile)
        watermark_mix_kernel[(batch,)](
            logits,
            logits.stride(0),
            similarity,
            offset if offset is not None else similarity,
            scale if scale is not None else similarity,
            target_logits,
            bucket,
            rule,
            seed,
            mixed,
            clipped,
            group,
            flipped.view(torch.int8),
            classes,
            groups,
            confidence_weight,
            torch.finfo(logits.dtype).max,
            FUSED=fused,
            SPACE=space,
            WHOLE=classes <= block,
            BLOCK_C=block,
            BLOCK_G=power_of_two(groups),
            num_warps=warps(block),
            **OPTIONS,
        )
    return mixed, clipped, group, flipped
