"""`watermark_mix`: from similarities to bent answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from honeytrace.ops.checks import KERNEL_DTYPES, check_seed
from honeytrace.ops.library import call, define, is_plain, kernel
from honeytrace.ops.reference import check_mix
from honeytrace.rule import WatermarkRule, check_rule


def watermark_mix(
    logits: Tensor,
    similarity: Tensor,
    target_logits: Tensor,
    bucket: Tensor,
    *,
    rule: WatermarkRule,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Bend each answer towards the target of its nearest group.

    Args:
        logits: [B, C] float32, float16 or bfloat16; B may be 0.
        similarity: [B, G], clipped to [0, 1], before confidence shaping; NaN counts as 0.
        target_logits: [G, C], finite.
        bucket: [B] int64, as `sign_hash` gives it.
        rule: thresholds, powers, strength, space and flips; its offsets, scales and metric are not used here.
        seed: 64 bits of the secret key, 0 <= seed < 2^64. A traced program (torch.compile, torch.export)
            holds it as
            a constant: keep such programs as secret as the key.

    Returns:
        mixed logits [B, C] in the logits' dtype, group [B] int64, flipped [B] bool. A row whose similarity is
        0 in all groups, or whose logits are not finite, comes back bit for bit and is not
        flipped. Differentiable in logits, similarity and target_logits; group, confidence thresholds and
        flips count as constants.

    Raises:
        TypeError: an argument of a wrong type or dtype (float64 is for `honeytrace.reference`).
        ValueError: wrong shape, device or seed, target logits that are not finite.

    Source: Neural Honeytrace (arXiv 2501.09328), section 4; probability space and keyed flips: DESIGN,
    section 3.
    """
    check_mix(logits, similarity, target_logits, bucket, KERNEL_DTYPES)
    check_rule(rule)
    wants_gradient = logits.requires_grad or similarity.requires_grad or target_logits.requires_grad
    if (
        not torch.compiler.is_compiling()
        and not (wants_gradient and torch.is_grad_enabled())
        and is_plain(logits, similarity, target_logits, bucket)
    ):
        mixed: tuple[Tensor, Tensor, Tensor] = kernel("watermark_mix")(
            logits, similarity, target_logits, bucket, rule.mixing_numbers, check_seed(seed)
        )
        return mixed
    outputs: tuple[Tensor, Tensor, Tensor] = call(
        op, wants_gradient, logits, similarity, target_logits, bucket, rule.mixing_numbers, check_seed(seed)
    )
    return outputs


def _fake(
    logits: Tensor,
    similarity: Tensor,
    target_logits: Tensor,
    bucket: Tensor,
    rule: Sequence[float],
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes = logits.shape
    return (
        logits.new_empty((batch, classes)),
        logits.new_empty((batch,), dtype=torch.int64),
        logits.new_empty((batch,), dtype=torch.bool),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, similarity, target_logits, _, ctx.rule, _ = inputs
    ctx.save_for_backward(logits, similarity, target_logits, *output[1:])


def _backward(ctx: Any, grad: Tensor, _group: Any, _flipped: Any) -> tuple[Tensor | None, ...]:
    logits, similarity, target_logits, group, flipped = ctx.saved_tensors
    of_logits, of_similarity, of_target = mix_backward(
        grad, logits, similarity, target_logits, group, flipped, ctx.rule
    )
    return of_logits, of_similarity, of_target, None, None, None


def mix_backward(
    grad: Tensor,
    logits: Tensor,
    similarity: Tensor,
    target_logits: Tensor,
    group: Tensor,
    flipped: Tensor,
    rule: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the mixed logits in logits [B, C], similarity [B, G] and target_logits [G, C].

    Args:
        grad: [B, C]; group [B] and flipped [B] as the forward pass gave them; rule:
            `WatermarkRule.mixing_numbers`.

    Rows that were copied pass the gradient through; flipped rows pass it to their target only.
    """
    low, low_power, high, high_power, space, strength, mixing_power, _, _ = rule
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    finite = torch.isfinite(logits).all(dim=1)
    s = torch.nan_to_num(similarity.gather(1, group[:, None])[:, 0], nan=0.0).double()
    active = finite & (s > 0)
    mixes = active & ~flipped
    z = torch.where(active[:, None], logits, 0.0).to(dtype)
    r = target_logits.to(dtype)[group]
    g = grad.to(dtype)

    # w = strength * s ^ power with one power for the whole chain of powers, since the thresholds are
    # constants
    confidence = torch.softmax(z, dim=1).amax(dim=1).double()
    power = torch.where(confidence < low, low_power, 1.0) * torch.where(confidence > high, high_power, 1.0)
    power = power.double() * mixing_power
    safe = torch.where(active, s, 1.0)
    weight = strength * safe**power
    slope = strength * power * safe ** (power - 1)  # dw/ds

    if space == 0:
        w = weight.to(dtype)[:, None]
        of_z, of_r, of_weight = (1 - w) * g, w * g, (g * (r - z)).sum(dim=1).double()
    else:
        of_z, of_r, of_weight = _probability_backward(g, z, r, weight)
    of_logits = torch.where(mixes[:, None], of_z, torch.where(flipped[:, None], 0.0, g))
    to_target = torch.where(mixes[:, None], of_r, torch.where(flipped[:, None], g, 0.0))
    of_target = torch.zeros_like(target_logits, dtype=dtype).index_add(0, group, to_target)
    of_s = torch.where(mixes & (s <= 1), of_weight * slope, 0.0)
    of_similarity = torch.zeros_like(similarity, dtype=torch.float64).scatter(
        1, group[:, None], of_s[:, None]
    )
    return (
        of_logits.to(logits.dtype),
        of_similarity.to(similarity.dtype),
        of_target.to(target_logits.dtype),
    )


def _probability_backward(g: Tensor, z: Tensor, r: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in z [B, C], r [B, C] and weight [B] of the mixture in probability space."""
    # Shares of the two terms in each class; a share divided by its weight is taken as one exponential.
    taken = torch.logsumexp(z, dim=1, keepdim=True) + torch.log_softmax(r, dim=1)
    log_keep, log_take = torch.log1p(-weight)[:, None].to(z.dtype), torch.log(weight)[:, None].to(z.dtype)
    mixed = torch.logaddexp(z + log_keep, taken + log_take)
    keep_share, take_share = torch.exp(z + log_keep - mixed), torch.exp(taken + log_take - mixed)
    to_taken = g * take_share
    total = to_taken.sum(dim=1, keepdim=True)
    of_z = g * keep_share + torch.softmax(z, dim=1) * total
    of_r = to_taken - torch.softmax(r, dim=1) * total
    inside = (weight < 1)[:, None]  # at weight 1 the model's own share is a constant 0, as in the reference
    ratio = torch.exp((taken - mixed).double()) - torch.where(inside, torch.exp((z - mixed).double()), 0.0)
    return of_z, of_r, (g.double() * torch.where((weight > 0)[:, None], ratio, 0.0)).sum(dim=1)


op = define(
    "watermark_mix",
    "(Tensor logits, Tensor similarity, Tensor target_logits, Tensor bucket, float[] rule, int seed)"
    " -> (Tensor mixed, Tensor group, Tensor flipped)",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
