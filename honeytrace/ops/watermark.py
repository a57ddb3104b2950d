"""`watermark`: distance, similarity, sign hash and mixing in one call."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from honeytrace.ops.bank import Bank
from honeytrace.ops.checks import (
    KERNEL_DTYPES,
    check_device,
    check_not_empty,
    check_seed,
    check_size,
    check_tensor,
)
from honeytrace.ops.feature_distance import bank_tensors, check_queries, distance_backward
from honeytrace.ops.feature_distance import op as distance_op
from honeytrace.ops.library import call, define, is_plain, kernel
from honeytrace.ops.reference import WatermarkOutput, check_planes, check_target_logits
from honeytrace.ops.watermark_mix import mix_backward
from honeytrace.rule import METRICS, WatermarkRule, check_rule


def watermark(
    features: Tensor,
    logits: Tensor,
    bank: Bank | Tensor,
    target_logits: Tensor,
    planes: Tensor,
    *,
    rule: WatermarkRule,
    seed: int,
    constant_time: bool = False,
) -> WatermarkOutput:
    """Feature distance, similarity, sign hash and mixing fused; nothing of size [B, M] is ever in memory.

    Args:
        features: [B, D] and logits [B, C], each float32, float16 or bfloat16; B may be 0.
        bank: a `Bank`, or a tensor [G, M, D] or [M, D] (then G = 1), which is packed anew at every call.
        target_logits: [G, C], finite.
        planes: [P, D], 1 <= P <= 64, finite.
        rule: see `WatermarkRule`.
        seed: 64 bits of the secret key, 0 <= seed < 2^64. A traced program (torch.compile, torch.export)
            holds it as
            a constant: keep such programs as secret as the key.
        constant_time: do the same work for every query, so that the time of a call does not tell an answer
            that is bent from one that is not; the results are the same. On the CPU only. Default False.
            docs/serving.md says what it costs, and what still depends on the data.

    Returns:
        `WatermarkOutput`: logits [B, C] in the dtype given, similarity [B, G] float32 (clipped, before
        shaping), group [B] int64, flipped [B] bool. Rows with features or logits that are not finite have
        similarity 0 and come back bit for bit. Logits and similarity are differentiable in features, logits,
        bank and target_logits; the nearest rows, group, confidence thresholds and flips count as constants.

    Raises:
        TypeError: an argument of a wrong type or dtype (float64 is for `honeytrace.reference`).
        ValueError: wrong shape, device, k or seed; a bank, planes or target logits that are not finite.
        BackendUnavailable: constant_time on a backend that has no such kernel (triton, cuda).

    Source: Neural Honeytrace (arXiv 2501.09328), section 4, with the additions of DESIGN, section 3.
    """
    if not torch.compiler.is_compiling():
        quick = _quick_watermark(features, logits, bank, target_logits, planes, rule, seed, constant_time)
        if quick is not None:
            return quick
    check_rule(rule)
    rows, packed, norms = bank_tensors(bank)
    check_queries(features, rows, rule.k)
    rule.check_groups(rows.shape[0])
    check_tensor("logits", logits, 2, "[B, C]")
    check_size("logits", logits, 0, "B", features.shape[0], "features")
    check_device("logits", logits, features.device, "features")
    check_not_empty("logits", logits, 1, "[B, C]")
    check_target_logits(target_logits, logits, rows.shape[0], "bank", KERNEL_DTYPES)
    check_tensor("planes", planes, 2, "[P, D]")
    check_planes(features, planes)
    check_seed(seed)
    if isinstance(bank, Bank) and not torch.compiler.is_compiling():
        _remember(bank, rule, target_logits, planes)
    return WatermarkOutput(
        *call(
            op,
            features.requires_grad
            or logits.requires_grad
            or rows.requires_grad
            or target_logits.requires_grad,
            features,
            logits,
            rows,
            packed,
            norms,
            target_logits,
            planes,
            rule.k,
            rule.metric_code,
            rule.exponent,
            rule.offsets,
            rule.scales,
            rule.confidence_weight,
            rule.mixing_numbers,
            check_seed(seed),
            constant_time,
        )
    )


class _Agreed(NamedTuple):
    """What a bank was once found to fit: checked then, in full, and alike ever since."""

    bank: weakref.ref[Bank]
    rule: WatermarkRule
    target_logits: weakref.ref[Tensor]
    planes: weakref.ref[Tensor]
    versions: tuple[int, int]
    classes: int


# A model is served with the same bank, rule, targets and planes at every call: these are checked once.
_agreed: dict[int, _Agreed] = {}
_AGREED_LIMIT = 64


def _remember(bank: Bank, rule: WatermarkRule, target_logits: Tensor, planes: Tensor) -> None:
    if (
        target_logits.is_inference() or planes.is_inference()
    ):  # without a version there is no telling a change
        return
    if is_plain(bank.rows, target_logits, planes):
        if len(_agreed) >= _AGREED_LIMIT:
            _agreed.clear()
        _agreed[id(bank)] = _Agreed(
            weakref.ref(bank),
            rule,
            weakref.ref(target_logits),
            weakref.ref(planes),
            (target_logits._version, planes._version),
            target_logits.shape[1],
        )


def _quick_watermark(
    features: Tensor,
    logits: Tensor,
    bank: Bank | Tensor,
    target_logits: Tensor,
    planes: Tensor,
    rule: WatermarkRule,
    seed: int,
    constant_time: bool,
) -> WatermarkOutput | None:
    """The output where all but features and logits is as it was at an earlier call, these are as they should
    be, and no gradient is wanted: past the dispatcher. Else None."""
    agreed = _agreed.get(id(bank))
    if (
        agreed is None
        or agreed.bank() is not bank
        or agreed.rule is not rule
        or agreed.target_logits() is not target_logits
        or agreed.planes() is not planes
        or agreed.versions != (target_logits._version, planes._version)
        or not isinstance(features, Tensor)
        or not isinstance(logits, Tensor)
    ):
        return None
    of_features, of_logits = features.shape, logits.shape
    if (
        len(of_features) != 2
        or len(of_logits) != 2
        or of_features[0] != of_logits[0]
        or of_features[1] != bank.features
        or of_logits[1] != agreed.classes
        or features.dtype not in KERNEL_DTYPES
        or logits.dtype not in KERNEL_DTYPES
        or not is_plain(features, logits)
    ):
        return None
    rows = bank.rows
    if torch.is_grad_enabled() and (
        features.requires_grad or logits.requires_grad or rows.requires_grad or target_logits.requires_grad
    ):
        return None
    return WatermarkOutput(
        *kernel("watermark")(
            features,
            logits,
            rows,
            bank.packed,
            bank.norms,
            target_logits,
            planes,
            rule.k,
            rule.metric_code,
            rule.exponent,
            rule.offsets,
            rule.scales,
            rule.confidence_weight,
            rule.mixing_numbers,
            check_seed(seed),
            constant_time,
        )
    )


def _fake(
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
    batch, classes = logits.shape
    return (
        logits.new_empty((batch, classes)),
        logits.new_empty((batch, rows.shape[0]), dtype=torch.float32),
        logits.new_empty((batch,), dtype=torch.int64),
        logits.new_empty((batch,), dtype=torch.bool),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (features, logits, rows, packed, norms, target_logits, _, *numbers) = inputs
    ctx.k, ctx.metric, ctx.p, _, ctx.scale, ctx.confidence_weight, ctx.rule, *_ = numbers
    ctx.save_for_backward(features, logits, rows, packed, norms, target_logits, *output[1:])


def _backward(
    ctx: Any, grad_logits: Tensor, grad_similarity: Tensor, _group: Any, _flipped: Any
) -> tuple[Tensor | None, ...]:
    features, logits, rows, packed, norms, target_logits, similarity, group, flipped = ctx.saved_tensors
    of_logits, of_mixed_similarity, of_target = mix_backward(
        grad_logits, logits, similarity, target_logits, group, flipped, ctx.rule
    )
    inside = (similarity > 0) & (similarity < 1)
    scale = similarity.new_tensor(ctx.scale)
    of_margin = torch.where(inside, grad_similarity + of_mixed_similarity, 0.0) / scale
    if ctx.confidence_weight > 0:
        of_logits = of_logits + confidence_backward(
            -ctx.confidence_weight * of_margin.sum(dim=1), logits, inside.any(dim=1)
        )
    wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    of_features = of_rows = None
    if any(wanted):
        # The fused kernel does not say which rows were the nearest; found again, only when a gradient asks
        # for it.
        indices = distance_op(features, rows, packed, norms, ctx.k, ctx.metric, ctx.p)[1]
        of_features, of_rows = distance_backward(
            -of_margin, features, rows, indices, METRICS[ctx.metric], ctx.p, wanted
        )
    return of_features, of_logits, of_rows, None, None, of_target, *[None] * 10


def confidence_backward(grad: Tensor, logits: Tensor, rows: Tensor) -> Tensor:
    """Gradient of c = max softmax(logits) in logits [B, C] for grad [B], in the rows [B] that are marked."""
    z = torch.where(rows[:, None], logits, 0.0).float()
    probabilities = torch.softmax(z, dim=1)
    c, top = probabilities.max(dim=1, keepdim=True)
    slope = c * (torch.zeros_like(z).scatter(1, top, 1.0) - probabilities)
    return torch.where(rows[:, None], grad[:, None] * slope, 0.0).to(logits.dtype)


op = define(
    "watermark",
    "(Tensor features, Tensor logits, Tensor rows, Tensor? packed, Tensor? norms, Tensor target_logits,"
    " Tensor planes, int k, int metric, float p, float[] offset, float[] scale, float confidence_weight,"
    " float[] rule, int seed, bool constant_time=False)"
    " -> (Tensor mixed, Tensor similarity, Tensor group, Tensor flipped)",
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
