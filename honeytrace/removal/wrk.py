"""Boundary repair in the manner of WRK: shift what lies just over a decision boundary, then the features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from honeytrace.data import Split, augment
from honeytrace.removal.interface import check_arguments, drawn, twin
from honeytrace.removal.neural_cleanse import find_patches
from honeytrace.training import Precision, Progress, device_of, evaluating, fit, predict

# Of the most anomalous class, above which it is taken to have a patch: the authors' code.
_PATCH_ANOMALY = 1.0


def repair_boundaries(
    surrogate: nn.Module,
    data: Split,
    *,
    seed: int,
    precision: Precision = "float32",
    progress: Progress | None = None,
    share: float = 0.05,
    step: float = 0.15,
    perturbed: float = 0.2,
    patch_steps: int = 100,
    boundary_epochs: int = 3,
    shift_epochs: int = 15,
    learning_rate: float = 3e-3,
) -> nn.Module:
    """Watermark removal in the manner of WRK, with a few clean samples.

    First a patch is looked for as in Neural Cleanse; where one stands out, clean samples under it, with their
    right labels, take the place of boundary samples. Boundary samples are clean ones moved by one signed
    gradient step towards a random class, with a random wrong label, so that the boundary regions in which
    watermarks live are drawn anew. Both are trained together with the clean samples. Then the features:
    fine-tuning on clean samples under strong random changes (turns, shifts, scales, noise) moves them away
    from where the watermark tied them.

    Changes of colour, which the authors' code makes too, are left out.

    Source: Xiao et al., "Class-feature Watermark", arXiv 2511.07947, the section on WRK, and its code (5% of
    the training data, step 0.15, boundary samples a fifth of the clean ones, an anomaly index above 1
    for a patch, 3 and 15 epochs).

    Args:
        share: of `data` that is used, in (0, 1].
        step: of the signed gradient, as a share of the range of the inputs, above 0.
        perturbed: boundary samples as a share of the clean ones, in (0, 1].
        patch_steps: of the search for a patch; 0 leaves it out.
        boundary_epochs, shift_epochs: of the two trainings.
        learning_rate: the highest of each cycle.
        The others as in `Removal`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """
    check_arguments(
        surrogate,
        data,
        seed=seed,
        precision=precision,
        epochs=boundary_epochs,
        learning_rate=learning_rate,
        share=share,
    )
    check_arguments(surrogate, data, seed=seed, precision=precision, epochs=shift_epochs)
    if not 0 < step < float("inf"):
        raise ValueError(f"step must be finite and above 0, got step={step}")
    if not 0 < perturbed <= 1:
        raise ValueError(f"perturbed must be above 0 and at most 1, got perturbed={perturbed}")
    clean = drawn(data, share, seed)
    model = twin(surrogate)
    chosen = drawn(clean, perturbed, seed + 1)
    boundary = boundary_samples(model, chosen, step=step, seed=seed)
    if patch_steps > 0:
        found = find_patches(model, clean.inputs, seed=seed, steps=patch_steps, progress=progress)
        label = int(found.anomaly.argmax())
        if found.anomaly[label] > _PATCH_ANOMALY and found.success[label] > 0:
            boundary = Split(found.apply(chosen.inputs, label), chosen.labels)
    fit(
        model,
        torch.cat([clean.inputs, boundary.inputs]),
        torch.cat([clean.labels, boundary.labels]),
        epochs=boundary_epochs,
        seed=seed,
        learning_rate=learning_rate,
        precision=precision,
        progress=progress,
    )
    fit(
        model,
        *clean,
        epochs=shift_epochs,
        seed=seed,
        learning_rate=learning_rate,
        augment=_shaken,
        precision=precision,
        progress=progress,
    )
    return model


def boundary_samples(model: nn.Module, clean: Split, *, step: float, seed: int) -> Split:
    """The samples moved by one signed gradient step of a random class's logit, with random wrong labels.

    Args:
        model: in whatever mode; asked in evaluation mode.
        clean: inputs [N, ...] and labels [N].
        step: as a share of the range of the inputs.
        seed: fixes classes and labels.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    classes = predict(model, clean.inputs[:2]).shape[1]
    towards = torch.randint(classes, (len(clean.inputs), 1), generator=generator)
    inputs = clean.inputs.detach().to(device_of(model), copy=True).requires_grad_(True)
    with evaluating(model), torch.enable_grad():
        reached = model(inputs).gather(1, towards.to(inputs.device)).sum()
        (slope,) = torch.autograd.grad(reached, inputs)
    slope = slope.to(clean.inputs.device)
    low, high = float(clean.inputs.min()), float(clean.inputs.max())
    moved = (clean.inputs + step * (high - low) * slope.sign()).clamp(low, high)
    away = torch.randint(1, classes, clean.labels.shape, generator=generator).to(clean.labels.device)
    return Split(moved, (clean.labels + away) % classes)


def _shaken(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Turned, moved, scaled and noisy images; of inputs that are no images, noisy ones."""
    if batch.dim() == 4:
        return augment(batch, generator, rotation=15.0, shift=max(1.0, batch.shape[-1] / 8))
    spread = 0.1 * batch.std()
    return batch + spread * torch.randn(batch.shape, generator=generator, device=batch.device)
