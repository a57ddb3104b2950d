"""Neural Cleanse: find the smallest patch for each class, suspect the class whose patch is too small."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from honeytrace.data import Split
from honeytrace.removal.interface import check_arguments, drawn, twin
from honeytrace.training import Precision, Progress, device_of, evaluating, fit, predict

ANOMALY = 2.0
"""Anomaly index above which a class is suspected: the paper's, 95% of a normal distribution."""

# Mean absolute deviation from the median to standard deviation, for a normal distribution.
_DEVIATION = 1.4826


@dataclass(frozen=True)
class Patches:
    """What was found for each of C classes.

    Attributes:
        masks: float32 [C, 1, H, W] in [0, 1], how much of each pixel is covered ([C, D] for inputs [D]).
        patterns: float32 [C, channels, H, W] ([C, D]), what it is covered with.
        norms: float32 [C], sums of the masks.
        success: float32 [C], share of the samples that the patch turns into the class.
        anomaly: float32 [C], how many deviations (by the median absolute deviation) a norm lies below the
            median; negative above it.
        suspected: classes with an anomaly index above `ANOMALY`, the most anomalous first.
    """

    masks: Tensor
    patterns: Tensor
    norms: Tensor
    success: Tensor
    anomaly: Tensor
    suspected: tuple[int, ...]

    def apply(self, inputs: Tensor, label: int) -> Tensor:
        """`inputs` [B, ...] under the patch of a class."""
        return inputs + self.masks[label] * (self.patterns[label] - inputs)


def find_patches(
    model: nn.Module,
    inputs: Tensor,
    *,
    seed: int,
    steps: int = 200,
    batch_size: int = 32,
    threshold: float = 0.95,
    progress: Progress | None = None,
) -> Patches:
    """For every class the smallest patch that turns samples into it, all classes at once.

    Minimises cross entropy to the class plus lambda times the sum of the mask, by Adam; lambda of each class
    rises while the patch works and falls while it does not. The smallest mask that worked is kept.

    Source: Wang et al., "Neural Cleanse", IEEE S&P 2019, sections IV-B and IV-C.

    Args:
        model: from [B, ...] to logits [B, C]; asked in evaluation mode.
        inputs: clean samples [N, channels, H, W] or [N, D].
        seed: fixes first values and batches.
        steps, batch_size: of the search, for each class.
        threshold: share of a batch from which a patch counts as working.
        progress: told of every step.
    """
    generator, device = torch.Generator().manual_seed(seed % 2**63), device_of(model)
    classes = predict(model, inputs[:2]).shape[1]
    low, high = float(inputs.min()), float(inputs.max())
    shape = inputs.shape[1:]
    mask_shape = [1 if n == 0 and len(shape) > 1 else size for n, size in enumerate(shape)]
    hidden_mask, hidden_pattern = (
        torch.randn(classes, *of, generator=generator).to(device).requires_grad_(True)
        for of in (mask_shape, shape)
    )
    optimizer = torch.optim.Adam([hidden_mask, hidden_pattern], lr=0.1, betas=(0.5, 0.9))
    wanted = torch.arange(classes, device=device).repeat_interleave(batch_size)
    cost = torch.full((classes,), 1e-3, device=device)
    streak = torch.zeros(classes, device=device)
    best_mask = torch.ones_like(hidden_mask.detach())
    best_pattern = torch.zeros_like(hidden_pattern.detach())
    best_norm, best_success = torch.full_like(cost, torch.inf), torch.zeros_like(cost)
    with evaluating(model), torch.enable_grad():
        for step in range(steps):
            rows = torch.randint(len(inputs), (batch_size,), generator=generator)
            batch = inputs[rows.to(inputs.device)].to(device)
            mask = (hidden_mask.tanh() + 1) / 2
            pattern = low + (high - low) * (hidden_pattern.tanh() + 1) / 2
            covered = batch[None] + mask[:, None] * (pattern[:, None] - batch[None])
            logits = model(covered.flatten(0, 1)).float()
            norm = mask.flatten(1).sum(1)
            loss = functional.cross_entropy(logits, wanted, reduction="none").view(classes, -1).mean(1)
            slopes = torch.autograd.grad((loss + cost * norm).sum(), [hidden_mask, hidden_pattern])
            works = (logits.argmax(1) == wanted).view(classes, -1).float().mean(1)
            better = (works >= threshold) & (norm.detach() < best_norm)
            best_mask[better], best_pattern[better] = mask.detach()[better], pattern.detach()[better]
            best_norm[better], best_success[better] = norm.detach()[better], works[better]
            hidden_mask.grad, hidden_pattern.grad = slopes
            optimizer.step()
            streak = torch.where(works >= threshold, streak.clamp_min(0) + 1, streak.clamp_max(0) - 1)
            cost = torch.where(streak >= 5, cost * 1.5, torch.where(streak <= -5, cost / 1.5**1.5, cost))
            streak = torch.where(streak.abs() >= 5, 0, streak)
            if progress is not None:
                progress(step + 1, steps, "looking for patches")
    norms = torch.where(best_norm.isinf(), best_mask.flatten(1).sum(1), best_norm)
    anomaly = anomaly_indices(norms)
    order = anomaly.argsort(descending=True).tolist()
    suspected = tuple(label for label in order if anomaly[label] > ANOMALY)
    here = inputs.device
    return Patches(
        best_mask.to(here),
        best_pattern.to(here),
        norms.to(here),
        best_success.to(here),
        anomaly.to(here),
        suspected,
    )


def anomaly_indices(norms: Tensor) -> Tensor:
    """How many deviations each of C norms lies below their median, by the median absolute deviation: [C].

    Source: Neural Cleanse, section IV-C.
    """
    off = norms.median() - norms
    return off / (_DEVIATION * off.abs().median()).clamp_min(1e-9)


def cleanse(
    surrogate: nn.Module,
    data: Split,
    *,
    seed: int,
    precision: Precision = "float32",
    progress: Progress | None = None,
    share: float = 0.1,
    patched: float = 0.2,
    steps: int = 200,
    epochs: int = 5,
    learning_rate: float = 1e-3,
) -> nn.Module:
    """Neural Cleanse as a removal: find the patches, then teach that they mean nothing.

    A part of the clean samples gets the patch of the suspected class (of each in turn, where there are
    several; of the most anomalous one where none is suspected: an attacker who knows that the copy is marked
    has nothing to lose), with their right labels.

    Source: Wang et al., "Neural Cleanse", IEEE S&P 2019, sections IV and VI-C (unlearning: 10% of the data,
    a fifth of it patched).

    Args:
        share: of `data` that is used, in (0, 1].
        patched: share of those that gets a patch, in (0, 1].
        steps: of the search; see `find_patches`.
        epochs, learning_rate: of the unlearning.
        The others as in `Removal`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """
    check_arguments(
        surrogate,
        data,
        seed=seed,
        precision=precision,
        epochs=epochs,
        learning_rate=learning_rate,
        share=share,
    )
    if not 0 < patched <= 1:
        raise ValueError(f"patched must be above 0 and at most 1, got patched={patched}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an int of at least 1, got steps={steps!r}")
    clean = drawn(data, share, seed)
    found = find_patches(surrogate, clean.inputs, seed=seed, steps=steps, progress=progress)
    labels = found.suspected or (int(found.anomaly.argmax()),)
    inputs = clean.inputs.clone()
    count = max(1, round(patched * len(inputs)))
    for n, label in enumerate(labels):
        inputs[n : count : len(labels)] = found.apply(inputs[n : count : len(labels)], label)
    model = twin(surrogate)
    fit(
        model,
        inputs,
        clean.labels,
        epochs=epochs,
        seed=seed,
        learning_rate=learning_rate,
        precision=precision,
        progress=progress,
    )
    return model
