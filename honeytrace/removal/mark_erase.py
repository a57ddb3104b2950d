"""Selective distillation in the manner of MarkErase: learn from the copy where it leans to no mark."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from honeytrace.data import Split
from honeytrace.removal.interface import check_arguments, drawn, twin
from honeytrace.training import Precision, Progress, fit, predict


def erase_mark(
    surrogate: nn.Module,
    data: Split,
    *,
    seed: int,
    precision: Precision = "float32",
    progress: Progress | None = None,
    share: float = 0.1,
    noise: float = 0.3,
    copies: int = 4,
    suspects: int = 2,
    epochs: int = 6,
    learning_rate: float = 3e-3,
) -> nn.Module:
    """Distil a copy of the surrogate from its own answers, leaving out where they lean to a suspected class.

    Models with an entangled watermark call disturbed samples the target class. So the clean samples are
    disturbed (by noise, and by rectangles of other samples or of one value), and the classes whose
    probability rises most are suspected. The student learns the surrogate's answers on clean and on disturbed
    samples; but where a disturbed sample's answer leans to a suspected class, the answer to the clean sample
    takes its place.

    The paper was known by its abstract only: the disturbances and the numbers are this project's.

    Source: Fei et al., MarkErase, PAKDD 2025 ("selective distillation" and the "classification tendency").

    Args:
        share: of `data` whose inputs are used, in (0, 1]; labels are not.
        noise: standard deviation, as a share of the range of the inputs, above 0.
        copies: disturbed copies of each sample, at least 1.
        suspects: how many classes are suspected, at least 1 (the model's own leaning may come first).
        epochs, learning_rate: of the student, which starts from the surrogate's weights.
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
    if not 0 < noise < float("inf"):
        raise ValueError(f"noise must be finite and above 0, got noise={noise}")
    for name, value in (("copies", copies), ("suspects", suspects)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, got {name}={value!r}")
    inputs = drawn(data, share, seed).inputs
    shaken = disturbed(inputs.repeat(copies, *[1] * (inputs.dim() - 1)), noise=noise, seed=seed)
    clean_answers = predict(surrogate, inputs).float().softmax(1)
    told = predict(surrogate, shaken).float().softmax(1)
    suspected = leaning(clean_answers, told, suspects)
    before = clean_answers.repeat(copies, 1)
    leans = (told[:, suspected] > before[:, suspected]).any(1, keepdim=True)
    selected = torch.where(leans, before, told)
    student = twin(surrogate)
    fit(
        student,
        torch.cat([inputs, shaken]),
        torch.cat([clean_answers, selected]),
        epochs=epochs,
        seed=seed,
        learning_rate=learning_rate,
        precision=precision,
        progress=progress,
    )
    return student


def leaning(clean: Tensor, shaken: Tensor, count: int) -> Tensor:
    """The `count` classes whose mean probability rises most from clean answers [N, C] to disturbed ones
    [M, C]: int64 [min(count, C)], the most suspicious first."""
    return (shaken.mean(0) - clean.mean(0)).argsort(descending=True)[:count]


def disturbed(inputs: Tensor, *, noise: float, seed: int) -> Tensor:
    """Inputs [N, ...] under noise, or under a rectangle: of another sample, or of one value; a third each.

    The rectangles are of any size and place (stretches, for inputs that are one row of numbers): watermarks
    of patches and of combined samples both show there.
    """
    low, high = float(inputs.min()), float(inputs.max())
    generator = torch.Generator().manual_seed(seed % 2**63)
    count = len(inputs)
    noisy = inputs + noise * (high - low) * torch.randn(inputs.shape, generator=generator).to(inputs.device)
    lengths = inputs.shape[2:] if inputs.dim() > 3 else inputs.shape[1:]
    inside = torch.ones(count, *[1] * (inputs.dim() - 1), dtype=torch.bool)
    for axis, length in zip(range(inputs.dim() - len(lengths), inputs.dim()), lengths, strict=True):
        ends = (torch.rand(count, 2, generator=generator) * (length + 1)).sort(1).values
        shape = [1] * inputs.dim()
        shape[axis] = length
        place = (torch.arange(length) + 0.5).view(shape)
        first, last = (ends[:, n].view(count, *[1] * (inputs.dim() - 1)) for n in (0, 1))
        inside = inside & (place >= first) & (place < last)
    inside = inside.to(inputs.device)
    other = inputs[torch.randperm(count, generator=generator).to(inputs.device)]
    value = low + (high - low) * torch.rand(count, *[1] * (inputs.dim() - 1), generator=generator)
    kind = torch.randint(3, (count, *[1] * (inputs.dim() - 1)), generator=generator).to(inputs.device)
    covered = torch.where(inside, torch.where(kind == 1, other, value.to(inputs)), inputs)
    return torch.where(kind == 0, noisy, covered).clamp(low, high)
