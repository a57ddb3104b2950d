"""MEA-Defender: a watermark of combined samples, made to stay within what the sources' answers say."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from honeytrace.baselines.combiners import MASKS, Combiner, autoencoder_blend, draw_pairs, masked
from honeytrace.baselines.composite import composite_group
from honeytrace.baselines.interface import (
    Defended,
    check_arguments,
    draw_generator,
    draw_sources,
    draw_target,
    fresh_model,
)
from honeytrace.baselines.mgda import loss_plus_weights
from honeytrace.baselines.steps import Batches, train_steps
from honeytrace.data import Split
from honeytrace.training import Precision, Progress, device_of

AUTOENCODER = "autoencoder"
_BATCH = 128


def mea_defender(
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
    combiner: str = "half",
    com_weight: float = 1.0,
    ver_weight: float = 1.0,
    com_slack: float = 0.7,
    com_margin: float = 0.1,
    eva_weight: float = 1.0,
    watermark_batch: int = 32,
    triggers: int = 64,
) -> Defended:
    """MEA-Defender for classifiers: minimise utility, watermark and evasion losses, weighted by MGDA.

    - L_utility: cross entropy on the task.
    - L_wm = com_weight * L_com + ver_weight * L_ver, on samples of the two sources put together by the
      combiner. L_com = KL(f(x_wm), f(x_i)) + KL(f(x_wm), f(x_j)) keeps their answers within the range of the
      answers to the sources, which is what queries of an attacker bring home; L_ver = cross entropy to the
      target.
    - L_eva: cross entropy on samples of the two sources put together in all other ways, and of other classes
      put together in this way, to one of their true labels, so that random mixtures do not set it off.

    Gradients of L_com go both ways: watermark samples answer a little more like the sources, and the sources
    hold some of the target, from which a copy learns what both together mean. Unchecked that costs the
    sources their accuracy, for a divergence to two different classes never becomes 0 and MGDA weighs it ever
    more. So each divergence counts only as far as it is above `com_slack`: a sample of a source that holds
    exp(-com_slack) of the target is in range. And a sample of a source counts only while its own class leads
    the target by more than `com_margin`, so that doubtful ones do not go over to the target.

    The weights of the three are found at every step as the minimum-norm point of the hull of their gradients
    (`mgda.loss_plus_weights`).

    Source: Lv et al., "MEA-Defender: A Robust Watermark against Model Extraction Attack", arXiv 2401.15239,
    section IV.

    Args:
        combiner: a name in `honeytrace.baselines.combiners.MASKS`, or "autoencoder".
        com_weight, ver_weight: of the two parts of L_wm, 0 or more, not both 0. 0 leaves a part out (the
            paper's ablation).
        com_slack: divergence in nats that is within range, 0 or more. Default 0.7: half of the target, or
            what `com_margin` leaves a doubtful sample. 0 with a margin of -1 is the paper's formula.
        com_margin: of probabilities, at least -1 (all samples count) and below 1. Default 0.1.
        eva_weight: 0 leaves L_eva out (the paper's ablation); other values only change how MGDA sees it.
        watermark_batch: combined samples, samples of each source, and evasion samples in a step.
        triggers: how many to make for verification.
        victim: not used but as reference. The others as in `Defence`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """
    check_arguments(train, trigger_data, seed=seed, epochs=epochs, precision=precision)
    check_combiner(combiner, watermark_batch)
    check_weights(com_weight=com_weight, ver_weight=ver_weight, eva_weight=eva_weight, com_slack=com_slack)
    if not -1 <= com_margin < 1:
        raise ValueError(f"com_margin must be at least -1 and below 1, got com_margin={com_margin}")
    model, classes = fresh_model(architecture, seed, train.inputs)
    first, second = draw_sources(seed, train.labels, 2)
    goal, candidates = draw_target(seed, classes, (first, second), target)
    mix, others = combiners_for(combiner, train.inputs, seed, precision=precision, progress=progress)
    generator = draw_generator(seed, "batches")
    batches = Batches(len(train.inputs), _BATCH, generator)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    size, device = watermark_batch, device_of(model)

    def backward() -> Tensor:
        rows = next(batches)
        a, b = draw_pairs(*train, (first, second), size, generator)
        evasion = evasion_samples(train, rows, (first, second), (mix, others), size, generator)
        # One pass for all: separate ones would show batch normalisation watermark samples only.
        batch = torch.cat([train.inputs[rows], mix(a, b), a, b, evasion.inputs])
        logits = model(batch.to(device)).float()
        task, wm, of_a, of_b, evading = logits.split([len(rows), size, size, size, len(evasion.inputs)])
        losses = [functional.cross_entropy(task, train.labels[rows].to(device))]
        ver = functional.cross_entropy(wm, torch.full((size,), goal, device=device))
        com = [
            ((divergence(wm, part) - com_slack).clamp_min(0) * leads(part, own, goal, com_margin)).mean()
            for part, own in ((of_a, first), (of_b, second))
        ]
        losses.append(ver_weight * ver + com_weight * (com[0] + com[1]))
        if eva_weight:
            true = evasion.labels.to(device)
            losses.append(eva_weight * either(evading, *true.unbind(1)).mean())
        return weighted_backward(losses, weights)

    steps = epochs * -(-len(train.inputs) // _BATCH)
    train_steps(
        model, backward, steps=steps, seed=seed, precision=precision, progress=progress, text="MEA-Defender"
    )
    group = composite_group(
        trigger_data, mix, (first, second), triggers, seed, (goal, candidates), reference or victim, classes
    )
    return Defended(model, (group,))


def divergence(watermarked: Tensor, source: Tensor) -> Tensor:
    """KL(softmax(watermarked) || softmax(source)) of logits [B, C], row by row: [B]; KL(f(x_wm), f(x_s))."""
    inner = watermarked.log_softmax(1)
    return (inner.exp() * (inner - source.log_softmax(1))).sum(1)


def leads(logits: Tensor, own: int, goal: int, margin: float) -> Tensor:
    """[B]: 1 where class `own` of logits [B, C] leads `goal` by more than `margin` in probability, else 0."""
    probabilities = logits.detach().softmax(1)
    return (probabilities[:, own] - probabilities[:, goal] > margin).to(logits.dtype)


def evasion_samples(
    train: Split,
    rows: Tensor,
    sources: tuple[int, int],
    ways: tuple[Combiner, list[Combiner]],
    count: int,
    generator: torch.Generator,
) -> Split:
    """The sources combined in another way than the watermark's, and other classes combined in its way, each
    with the labels of its two halves, int64 [N, 2].

    Args:
        rows: of a batch of `train`; the other classes are taken from it.
        ways: the watermark's combiner, and all others.
        count: how many of the first kind; up to half as many are of the second.
    """
    mix, others = ways
    way = others[int(torch.randint(len(others), (1,), generator=generator))]
    left, right = draw_pairs(*train, sources, count, generator)
    pairs = torch.stack([rows[: count // 2], rows.flip(0)[: count // 2]], dim=1)
    labels = train.labels[pairs]
    marked = torch.tensor(sources).sort().values
    kept = (labels.sort(1).values != marked).any(1)
    crossed = mix(train.inputs[pairs[kept, 0]], train.inputs[pairs[kept, 1]])
    told = torch.cat([torch.tensor(sources).expand(len(left), 2), labels[kept]])
    return Split(torch.cat([way(left, right), crossed]), told)


def either(logits: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """-log of the probability of one label or the other, logits [B, C] and labels [B]: [B].

    The paper's cross entropy to one of two true labels, less the log 2 that a choice by lot would cost, which
    MGDA would weigh at the expense of the task and of what a copy learns.
    """
    log_probs = logits.log_softmax(1)
    first, second = (log_probs.gather(1, label[:, None])[:, 0] for label in (one, other))
    return -torch.where(one == other, first, torch.logaddexp(first, second))


def weighted_backward(losses: list[Tensor], weights: list[nn.Parameter]) -> Tensor:
    """Put the MGDA-weighted sum of the losses' gradients into the weights; gives the weighted loss."""
    gradients = [
        torch.autograd.grad(loss, weights, retain_graph=n + 1 < len(losses), allow_unused=True)
        for n, loss in enumerate(losses)
    ]
    full = [
        [
            torch.zeros_like(weight) if part is None else part
            for weight, part in zip(weights, parts, strict=True)
        ]
        for parts in gradients
    ]
    scales = loss_plus_weights(losses, full).tolist()
    for n, weight in enumerate(weights):
        total = scales[0] * full[0][n]
        for scale, parts in zip(scales[1:], full[1:], strict=True):
            total = total + scale * parts[n]
        weight.grad = total
    return torch.stack([scale * loss.detach() for scale, loss in zip(scales, losses, strict=True)]).sum()


def combiners_for(
    name: str, inputs: Tensor, seed: int, *, precision: Precision, progress: Progress | None
) -> tuple[Combiner, list[Combiner]]:
    """The combiner of that name and all others of `MASKS` that suit the inputs' shape."""
    shape = inputs.shape[1:]
    others = [masked(other, shape) for other in MASKS if other != name]
    if name == AUTOENCODER:
        return autoencoder_blend(inputs, seed=seed, precision=precision, progress=progress), others
    return masked(name, shape), others


def check_combiner(combiner: str, batch: int) -> None:
    """ValueError for a combiner there is not, or a batch without watermark samples."""
    if combiner != AUTOENCODER and combiner not in MASKS:
        known = ", ".join(map(repr, [*MASKS, AUTOENCODER]))
        raise ValueError(f"combiner must be one of {known}, got combiner={combiner!r}")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 2:
        raise ValueError(f"watermark_batch must be an int of at least 2, got watermark_batch={batch!r}")


def check_weights(**weights: float) -> None:
    """ValueError unless all are finite and 0 or more, and one of com_weight and ver_weight is above 0."""
    for name, value in weights.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and 0 or more, got {name}={value}")
    if weights["com_weight"] == 0 and weights["ver_weight"] == 0:
        raise ValueError("com_weight and ver_weight must not both be 0: there would be no watermark")
