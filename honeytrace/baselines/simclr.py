"""SimCLR: an encoder trained without labels, for the self-supervised form of MEA-Defender."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from honeytrace.baselines.steps import Batches, train_steps
from honeytrace.data import augment
from honeytrace.training import Precision, Progress, device_of, predict, seeded

PROJECTION = 64


def simclr(
    inputs: Tensor,
    *,
    encoder: Callable[[], nn.Module],
    seed: int,
    epochs: int,
    temperature: float = 0.5,
    batch_size: int = 128,
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> nn.Module:
    """Train an encoder so that two random views of one image lie together and apart from all others.

    Source: Chen, Kornblith, Norouzi & Hinton, "A Simple Framework for Contrastive Learning of Visual
    Representations", arXiv 2002.05709, section 2.1. The views are turned, scaled, moved and noisy images
    (`honeytrace.data.augment`): grey images of 8 or 28 pixels have no colour to jitter, and no room to crop.

    Args:
        inputs: images [N, channels, H, W] in [0, 1].
        encoder: makes a fresh model from [B, channels, H, W] to features [B, D]; called under `seed`.
        seed: fixes everything.
        epochs: passes over `inputs`.
        temperature: of the loss, above 0.
        batch_size: images in a step, each seen twice.
        precision, progress: as in ``honeytrace.training.fit``.

    Returns:
        The encoder without the projection it was trained through, in evaluation mode.
    """
    model = projected(encoder, seed, inputs)
    generator = torch.Generator().manual_seed(seed % 2**63)
    batches = Batches(len(inputs), batch_size, generator)
    device = device_of(model)

    def backward() -> Tensor:
        batch = inputs[next(batches)]
        views = torch.cat([view(batch, generator), view(batch, generator)])
        hidden = model(views.to(device)).float()
        loss = contrast(hidden[: len(batch)], hidden[len(batch) :], temperature)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    steps = epochs * -(-len(inputs) // batch_size)
    train_steps(
        model, backward, steps=steps, seed=seed, precision=precision, progress=progress, text="SimCLR"
    )
    return model[0]


def projected(encoder: Callable[[], nn.Module], seed: int, inputs: Tensor) -> nn.Sequential:
    """A fresh encoder, and behind it the two-layer projection that the contrastive loss is taken through."""

    def factory() -> nn.Sequential:
        made = encoder()
        width = predict(made, inputs[:2]).shape[1]
        layers = nn.Linear(width, width), nn.ReLU(), nn.Linear(width, PROJECTION)
        return nn.Sequential(made, nn.Sequential(*layers).to(device_of(made)))

    return seeded(factory, seed)


def view(batch: Tensor, generator: torch.Generator) -> Tensor:
    """One random view of each image."""
    return augment(batch, generator, rotation=20.0, scale=0.25, shift=batch.shape[-1] / 7, noise=0.05)


def contrast(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent: mean cross entropy of finding each view's partner among all other 2B - 1 views, by cosine.

    Args:
        first, second: [B, P], row for row two views of one image.
        temperature: cosines are divided by it, above 0.

    Source: arXiv 2002.05709, equation 1.
    """
    both = functional.normalize(torch.cat([first, second]), dim=1)
    alike = both @ both.T / temperature
    alike = alike.masked_fill(torch.eye(len(both), dtype=torch.bool, device=both.device), -torch.inf)
    partner = torch.arange(len(both), device=both.device).roll(len(first))
    return functional.cross_entropy(alike, partner)
