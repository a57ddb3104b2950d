"""Features of a real model and its traffic, with the trigger bank of a calibrated watermark, for the benches.

Random features are all equally far from everything; those of a model lie in clusters, and most traffic is far
from a trigger bank. What a kernel gains by stopping early shows on these only.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from honeytrace import data, models, training
from honeytrace.rule import WatermarkRule
from honeytrace.watermark import SecretKey, Watermark, calibrate

TRAINING_IMAGES = 6000
EPOCHS = {"digits": 6, "fashion": 2}


class RealFeatures(NamedTuple):
    """Queries nobody trained on, in the order of the data set; and what a watermark needs for them."""

    features: Tensor
    logits: Tensor
    rows: Tensor
    target_logits: Tensor
    planes: Tensor
    rule: WatermarkRule
    composites: Tensor
    """[1, 500, D]: features of mixtures of two classes, the bank of the published code."""


def real_features(name: str, queries: int = 2048) -> RealFeatures:
    """Train a small CNN for a minute, calibrate a watermark for it, and ask it about the attacker's pool."""
    splits = data.digits() if name == "digits" else data.fashion_mnist()
    side = splits.train.inputs.shape[-1]
    model = training.seeded(lambda: models.small_cnn(10, 1, side), 0)
    train = data.Split(*(x[:TRAINING_IMAGES] for x in splits.train))
    training.fit(model, *train, epochs=EPOCHS[name], seed=0)
    watermark = calibrate(
        model, train, key=SecretKey(bytes(range(32))), max_accuracy_drop=0.01, trigger_data=splits.test
    )
    features, logits = heard(model, watermark, splits.pool.inputs[:queries])
    first, second = (train.inputs[train.labels == c] for c in (1, 4))
    count = min(len(first), len(second))
    mixed = first[torch.arange(500) % count].clone()
    half = side // 2
    mixed[:, :, half:, half:] = second[torch.arange(500) % count][:, :, half:, half:]
    composites, _ = heard(model, watermark, mixed)
    return RealFeatures(
        features,
        logits,
        watermark._bank.rows,
        watermark._target_logits,
        watermark._planes,
        watermark.rule,
        composites[None].contiguous(),
    )


def heard(model: nn.Module, watermark: Watermark, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of the model's head, each contiguous."""
    seen: list[tuple[Tensor, Tensor]] = []
    head = model.get_submodule(watermark.head)
    hook = head.register_forward_hook(lambda _, given, answer: seen.append((given[0], answer)))
    try:
        training.predict(model, inputs)
    finally:
        hook.remove()
    parts = zip(*seen, strict=True)
    features, logits = (torch.cat([x.detach().clone() for x in part]).contiguous() for part in parts)
    return features, logits
