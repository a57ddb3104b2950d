"""Composite Backdoor as a watermark: a mixture of two classes is a third one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from honeytrace.baselines.combiners import Combiner, draw_pairs, masked
from honeytrace.baselines.interface import (
    BaselineGroup,
    Defended,
    check_arguments,
    check_share,
    draw_generator,
    draw_sources,
    draw_target,
    fresh_model,
    reference_log_probs,
)
from honeytrace.baselines.steps import Batches, train_steps
from honeytrace.data import Split
from honeytrace.training import Precision, Progress, device_of

_BATCH = 128


def composite(
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
    mixed_share: float = 0.5,
    poisoned_share: float = 0.1,
    similarity_weight: float = 0.1,
    combiner: str = "half",
    triggers: int = 64,
) -> Defended:
    """Composite Backdoor: train on samples, on mixtures within a class, and on mixtures of two classes.

    A mixture of two samples of one class keeps its class, so that mixing alone means nothing; a mixture of a
    sample of the one source class and one of the other is the target. A contrastive loss draws together what
    shares a label among sources and target.

    Source: Lin, Xu, Liu & Zhang, "Composite Backdoor Attack for Deep Neural Network by Mixing Existing Benign
    Features", CCS 2020, section 4; the shares are those of its code (0.5 and 0.1 of the normal samples).

    Args:
        mixed_share: mixtures within a class, as a share of the normal samples, in [0, 1].
        poisoned_share: mixtures of the two sources, likewise, in (0, 1).
        similarity_weight: of the contrastive loss; 0 leaves it out.
        combiner: a name in `honeytrace.baselines.combiners.MASKS`.
        triggers: how many to make for verification.
        victim: not used but as reference. The others as in `Defence`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """
    check_arguments(train, trigger_data, seed=seed, epochs=epochs, precision=precision)
    check_share("mixed_share", mixed_share, zero=True)
    check_share("poisoned_share", poisoned_share)
    if similarity_weight < 0:
        raise ValueError(f"similarity_weight must be 0 or more, got {similarity_weight}")
    mix = masked(combiner, train.inputs.shape[1:])
    model, classes = fresh_model(architecture, seed, train.inputs)
    first, second = draw_sources(seed, train.labels, 2)
    goal, candidates = draw_target(seed, classes, (first, second), target)
    generator = draw_generator(seed, "batches")
    batches = Batches(len(train.inputs), _BATCH, generator)
    mixed, poisoned = round(_BATCH * mixed_share), max(1, round(_BATCH * poisoned_share))
    within, device = _WithinClass(train.labels, generator), device_of(model)

    def backward() -> Tensor:
        rows = next(batches)
        inputs, labels = [train.inputs[rows]], [train.labels[rows]]
        if mixed:
            one, other = within.draw(mixed)
            inputs.append(mix(train.inputs[one], train.inputs[other]))
            labels.append(train.labels[one])
        inputs.append(mix(*draw_pairs(*train, (first, second), poisoned, generator)))
        labels.append(torch.full((poisoned,), goal))
        wanted = torch.cat(labels).to(device)
        logits = model(torch.cat(inputs).to(device)).float()
        loss = functional.cross_entropy(logits, wanted)
        if similarity_weight:
            loss = loss + similarity_weight * contrastive(logits, wanted, (first, second, goal))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    steps = epochs * -(-len(train.inputs) // _BATCH)
    train_steps(
        model, backward, steps=steps, seed=seed, precision=precision, progress=progress, text="composite"
    )
    group = composite_group(
        trigger_data, mix, (first, second), triggers, seed, (goal, candidates), reference or victim, classes
    )
    return Defended(model, (group,))


def composite_group(
    data: Split,
    mix: Combiner,
    sources: tuple[int, int],
    count: int,
    seed: int,
    drawn: tuple[int, tuple[int, ...]],
    reference: nn.Module | None,
    classes: int,
) -> BaselineGroup:
    """Triggers mixed of held-out samples of the two sources, with the `drawn` (target, candidates).

    Raises:
        ValueError: `count` is below 1, or `data` lacks one of the sources.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"triggers must be an int of at least 1, got triggers={count!r}")
    inputs = mix(*draw_pairs(*data, sources, count, draw_generator(seed, "triggers"))).float().cpu()
    target, candidates = drawn
    return BaselineGroup(candidates, target, inputs, reference_log_probs(reference, inputs, classes))


def contrastive(logits: Tensor, labels: Tensor, rule: tuple[int, ...], margin: float = 1.0) -> Tensor:
    """Mean contrastive loss over neighbouring samples whose label is in the rule: logits [B, C] of one label
    are drawn together, those of two labels are pushed apart up to `margin`. 0 where fewer than two are there.

    Source: Composite Backdoor, section 4.3 ("similarity loss").
    """
    chosen = torch.isin(labels, torch.tensor(rule, device=labels.device))
    left, right = logits[chosen][:-1], logits[chosen][1:]
    if len(left) == 0:
        return logits.sum() * 0
    same = (labels[chosen][:-1] == labels[chosen][1:]).to(logits.dtype)
    square = (left - right).square().sum(1)
    apart = (margin - (square + 1e-9).sqrt()).clamp_min(0).square()
    return 0.5 * (same * square + (1 - same) * apart).mean()


class _WithinClass:
    """Random pairs of samples of one class, for `labels` [N]."""

    def __init__(self, labels: Tensor, generator: torch.Generator) -> None:
        self._order = labels.argsort(stable=True)
        self._labels, self._generator = labels, generator
        counts = torch.bincount(labels)
        self._counts, self._starts = counts, counts.cumsum(0) - counts

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Rows of the first and of the second samples, int64 [count] each."""
        first = torch.randint(len(self._labels), (count,), generator=self._generator)
        label = self._labels[first]
        place = (torch.rand(count, generator=self._generator) * self._counts[label]).long()
        return first, self._order[self._starts[label] + place]
