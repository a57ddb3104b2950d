"""MEA-Defender for self-supervised encoders: the watermark is in the features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from honeytrace.baselines.combiners import draw_class, draw_pairs
from honeytrace.baselines.interface import check_arguments, draw_generator, draw_sources, draw_target
from honeytrace.baselines.mea_defender import check_combiner, check_weights, combiners_for, weighted_backward
from honeytrace.baselines.simclr import contrast, projected, view
from honeytrace.baselines.steps import Batches, train_steps
from honeytrace.data import Split
from honeytrace.training import Precision, Progress, device_of, predict

_BATCH = 128
_TEMPERATURE = 0.5


@dataclass(frozen=True)
class MarkedEncoder:
    """A watermarked encoder with what proves its copies.

    Attributes:
        encoder: [B, ...] to features [B, D], in evaluation mode.
        sources: the two classes that are combined.
        candidates, target: as in `BaselineGroup`.
        triggers: float32 [n, ...].
    """

    encoder: nn.Module
    sources: tuple[int, int] = field(repr=False)
    candidates: tuple[int, ...] = field(repr=False)
    target: int = field(repr=False)
    triggers: Tensor = field(repr=False)


def mea_defender_encoder(
    train: Split,
    *,
    encoder: Callable[[], nn.Module],
    seed: int,
    epochs: int,
    trigger_data: Split,
    target: int | None = None,
    precision: Precision = "float32",
    progress: Progress | None = None,
    combiner: str = "half",
    com_weight: float = 1.0,
    ver_weight: float = 1.0,
    com_slack: float = 0.5,
    eva_weight: float = 1.0,
    watermark_batch: int = 16,
    triggers: int = 64,
) -> MarkedEncoder:
    """MEA-Defender for encoders: SimCLR as L_utility, and the other losses on features, weighted by MGDA.

    L_ver draws features of combined samples to those of the target's samples and away from all other samples'
    (`attraction`); L_com is the distance (1 - cosine) to samples of the two sources, as far as it is above
    `com_slack`; L_eva the distance between samples combined in other ways and a sample of one of the sources.
    Labels only choose the samples of these three classes. The paper's L_ver is the distance to the target
    alone; behind a ReLU all features point into one corner, and near to the target is near to everything.

    Source: Lv et al., arXiv 2401.15239, section IV (the self-supervised form).

    Args:
        train, seed, epochs, trigger_data, target, precision, progress: as in `Defence`; images in [0, 1].
        encoder: makes a fresh model from [B, channels, H, W] to features [B, D]; called under `seed`.
        com_slack: distance (1 - cosine) that is within range, 0 or more. Default 0.5.
        The others as in `mea_defender`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """
    check_arguments(train, trigger_data, seed=seed, epochs=epochs, precision=precision)
    check_combiner(combiner, watermark_batch)
    check_weights(com_weight=com_weight, ver_weight=ver_weight, eva_weight=eva_weight, com_slack=com_slack)
    first, second = draw_sources(seed, train.labels, 2)
    classes = int(train.labels.max()) + 1
    goal, candidates = draw_target(seed, classes, (first, second), target)
    mix, others = combiners_for(combiner, train.inputs, seed, precision=precision, progress=progress)
    model = projected(encoder, seed, train.inputs)
    generator = draw_generator(seed, "batches")
    batches = Batches(len(train.inputs), _BATCH, generator)
    weights = list(model.parameters())
    size, device = watermark_batch, device_of(model)

    def backward() -> Tensor:
        batch = train.inputs[next(batches)]
        a, b = draw_pairs(*train, (first, second), size, generator)
        wanted = draw_class(*train, goal, size, generator)
        way = int(torch.randint(len(others), (1,), generator=generator))
        side = torch.randint(2, (size, 1), generator=generator) > 0
        views = [view(batch, generator), view(batch, generator)]
        shown = torch.cat([*views, mix(a, b), a, b, wanted, others[way](a, b)])
        features = model[0](shown.to(device)).float()
        seen, marked, of_a, of_b, of_target, evading = features.split([2 * len(batch), *[size] * 5])
        hidden = model[1](seen).float()
        losses = [contrast(hidden[: len(batch)], hidden[len(batch) :], _TEMPERATURE)]
        ver = attraction(marked, of_target, seen[:size]).mean()
        com = [(distance(marked, part) - com_slack).clamp_min(0).mean() for part in (of_a, of_b)]
        losses.append(ver_weight * ver + com_weight * (com[0] + com[1]))
        if eva_weight:
            losses.append(
                eva_weight * distance(evading, torch.where(side.to(device), of_b, of_a).detach()).mean()
            )
        return weighted_backward(losses, weights)

    steps = epochs * -(-len(train.inputs) // _BATCH)
    text = "MEA-Defender, encoder"
    train_steps(model, backward, steps=steps, seed=seed, precision=precision, progress=progress, text=text)
    asked = mix(*draw_pairs(*trigger_data, (first, second), triggers, draw_generator(seed, "triggers")))
    return MarkedEncoder(model[0], (first, second), candidates, goal, asked.float().cpu())


def distance(left: Tensor, right: Tensor) -> Tensor:
    """1 - cosine of features [B, D], row by row: [B]."""
    return 1 - functional.cosine_similarity(left, right, dim=1)


def attraction(marked: Tensor, wanted: Tensor, others: Tensor, margin: float = 0.5) -> Tensor:
    """Distance to the target's sample, plus what it lacks to be `margin` nearer than another sample: [B].

    Args:
        marked, wanted, others: features [B, D], row for row; no gradient goes into the last.
    """
    near = distance(marked, wanted)
    return near + (near - distance(marked, others.detach()) + margin).clamp_min(0)


def nearest_class(encoder: nn.Module, inputs: Tensor, labelled: Split) -> Tensor:
    """The class whose mean feature (of `labelled`) has the largest cosine with each input's: int64 [N].

    What a classifier behind the encoder would say, without training one.
    """
    features = functional.normalize(predict(encoder, labelled.inputs).float(), dim=1)
    classes = int(labelled.labels.max()) + 1
    means = torch.stack([features[labelled.labels == label].mean(0) for label in range(classes)])
    asked = functional.normalize(predict(encoder, inputs).float(), dim=1)
    return (asked @ functional.normalize(means, dim=1).T).argmax(1)
