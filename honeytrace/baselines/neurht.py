"""Neural Honeytrace as published: one group, one composite bank, one target, logits mixed and flipped."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor, nn

from honeytrace.baselines.combiners import draw_pairs, masked
from honeytrace.baselines.composite import composite_group
from honeytrace.baselines.interface import (
    Defended,
    check_arguments,
    draw_generator,
    draw_sources,
    draw_target,
    stream_key,
    unmarked_victim,
)
from honeytrace.data import Split
from honeytrace.ops import Bank, feature_distance
from honeytrace.rule import WatermarkRule
from honeytrace.training import Precision, Progress
from honeytrace.watermark.head import features_of_all, find_head
from honeytrace.watermark.protected import AnswerHook, protect
from honeytrace.watermark.watermark import PLANES

_MEDIAN_DISTANCE = 1.35


def neurht_published(
    train: Split,
    *,
    architecture: Callable[[], nn.Module],
    seed: int,
    epochs: int,
    trigger_data: Split,
    victim: nn.Module | None = None,
    reference: nn.Module | None = None,
    target: int | None = None,
    precision: Precision = "float32",
    progress: Progress | None = None,
    combiner: str = "quadrant",
    preset: str = "cifar10",
    unit: float | None = None,
    bank_size: int = 200,
    triggers: int = 64,
) -> Defended:
    """The published watermark with the values of its authors' code.

    The bank holds the victim's features of composites: a sample of one source class with a quadrant of a
    sample of another. Queries near them get logits mixed with the target's, and flips.

    Published offset and scale are distances in the features of the authors' networks, and features of other
    networks are larger or smaller. So distances are measured in a unit of their own here.

    Source: arXiv 2501.09328, section 4, and its code (target class 9; here drawn, unless `target` says so).

    Args:
        combiner: of bank and triggers, a name in `combiners.MASKS`. Default: the published one.
        preset: as in `WatermarkRule.neurht`.
        unit: distance (mean absolute difference of features) that the rule counts as 1, above 0. Default: the
            one that makes the median distance of the training samples to the bank 1.35, as it is without any
            unit for `small_cnn` on Fashion-MNIST, where the published values cost 0.01 points of accuracy.
        bank_size: composites in the bank, at least the rule's k = 10.
        triggers: how many to make for verification.
        The others as in `Defence`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """
    check_arguments(train, trigger_data, seed=seed, epochs=epochs, precision=precision)
    rule = WatermarkRule.neurht(preset)
    if bank_size < rule.k:
        raise ValueError(f"bank_size must be at least {rule.k}, got bank_size={bank_size}")
    if unit is not None and not 0 < unit < float("inf"):
        raise ValueError(f"unit must be finite and above 0, got unit={unit}")
    model, classes = unmarked_victim(
        victim, train, architecture, seed=seed, epochs=epochs, precision=precision, progress=progress
    )
    sources = draw_sources(seed, train.labels, 2)
    pair = (sources[0], sources[1])
    drawn = draw_target(seed, classes, pair, target)
    mix = masked(combiner, train.inputs.shape[1:])
    head = find_head(model, train.inputs[:2])
    composites = mix(*draw_pairs(*train, pair, bank_size, draw_generator(seed, "bank")))
    bank = Bank(features_of_all(model, head, composites)[0])
    features, logits = features_of_all(model, head, train.inputs)
    if unit is None:
        distances = feature_distance(features, bank, k=rule.k, metric=rule.metric)
        unit = float(distances.median()) / _MEDIAN_DISTANCE
    rule = dataclasses.replace(rule, offset=rule.offsets[0] * unit, scale=rule.scales[0] * unit)
    hook = AnswerHook(
        bank,
        class_logits(logits, train.labels, drawn[0])[None],
        stream_key(seed).stream("planes").signs(PLANES, features.shape[1]),
        rule,
        stream_key(seed).seed("flips"),
        "logits",
    )
    served = protect(model, head, hook, features.shape[1], classes).eval()
    group = composite_group(trigger_data, mix, pair, triggers, seed, drawn, reference or model, classes)
    return Defended(served, (group,))


def class_logits(logits: Tensor, labels: Tensor, label: int) -> Tensor:
    """Mean logits [C] of the samples of one class that are classified correctly.

    Raises:
        ValueError: there is none.
    """
    right = (labels == label) & (logits.argmax(1) == label)
    if not right.any():
        raise ValueError(f"the victim classifies no training sample of class {label} correctly")
    return logits[right].mean(0)
