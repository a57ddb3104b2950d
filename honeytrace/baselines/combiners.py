"""How two samples become one in Composite Backdoor and MEA-Defender."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from honeytrace.baselines.steps import Batches, train_steps
from honeytrace.ops import compose
from honeytrace.training import Precision, Progress, seeded
from honeytrace.watermark import Mask

Combiner: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Two batches [B, ...] of one shape to their combination [B, ...]."""

MASKS: dict[str, Mask] = {
    "half": Mask("half", (1.0, 1.0)),
    "half-across": Mask("half", (0.0, 1.0)),
    "stripes": Mask("stripes", (1.0, 1 / 7)),
    "crop-and-paste": Mask("paste", (0.25, 0.25, 0.5, 0.5)),
    "blend": Mask("blend", (0.5,)),
    "quadrant": Mask("quadrant", (1.0, 1.0)),
    "diagonal": Mask("diagonal", (1.0,)),
    "donut": Mask("donut", (0.2, 0.4)),
    "band": Mask("band", (1.0, 0.3, 0.4)),
}
"""Combiners that take every pixel from one of the two samples, or a fixed share of both: sections III-B of
MEA-Defender (half, stripes, crop-and-paste, pixel blend) and what its code uses beside them."""


def masked(name: str, shape: Sequence[int]) -> Combiner:
    """The combiner of `MASKS` for samples [...] of this shape.

    Raises:
        ValueError: there is none of that name, or it needs height and width and the shape has none.
    """
    if name not in MASKS:
        raise ValueError(f"combiner must be one of {', '.join(map(repr, MASKS))}, got {name!r}")
    mask = MASKS[name].render(shape)
    return lambda a, b: compose(a, b, mask.to(a.device, a.dtype))


def autoencoder_blend(
    inputs: Tensor,
    *,
    seed: int,
    epochs: int = 1,
    width: int = 8,
    precision: Precision = "float32",
    progress: Progress | None = None,
) -> Combiner:
    """The combiner that blends in the code of an autoencoder: decode(encode(a) / 2 + encode(b) / 2).

    Args:
        inputs: images [N, channels, H, W] in [0, 1] to train the autoencoder on; H and W divisible by 4.
        seed: fixes the autoencoder.
        epochs: passes over `inputs`.
        width: channels of its first layer.

    Raises:
        ValueError: the inputs are no such images.
    """
    if inputs.dim() != 4 or inputs.shape[2] % 4 or inputs.shape[3] % 4:
        raise ValueError(
            f"inputs must be images [N, channels, H, W] with H and W divisible by 4, got {list(inputs.shape)}"
        )
    model = seeded(lambda: Autoencoder(inputs.shape[1], width), seed)
    batches = Batches(len(inputs), 128, torch.Generator().manual_seed(seed % 2**63))

    def backward() -> Tensor:
        batch = inputs[next(batches)]
        loss = functional.mse_loss(model(batch).float(), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    steps = max(1, epochs * len(inputs) // 128)
    train_steps(
        model, backward, steps=steps, seed=seed, precision=precision, progress=progress, text="autoencoder"
    )

    @torch.no_grad()
    def blend(a: Tensor, b: Tensor) -> Tensor:
        code = 0.5 * model.encoder(a) + 0.5 * model.encoder(b)
        decoded: Tensor = model.decoder(code)
        return decoded.clamp(0, 1)

    return blend


class Autoencoder(nn.Module):
    """Two convolutions that halve the image, and their mirror: [B, channels, H, W] to the same."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, channels, H, W] to its reconstruction."""
        decoded: Tensor = self.decoder(self.encoder(inputs))
        return decoded


def draw_pairs(
    inputs: Tensor, labels: Tensor, sources: Sequence[int], count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`count` random samples of each of two classes: two [count, ...].

    Raises:
        ValueError: one of the classes does not occur.
    """
    return draw_class(inputs, labels, sources[0], count, generator), draw_class(
        inputs, labels, sources[1], count, generator
    )


def draw_class(inputs: Tensor, labels: Tensor, label: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` random samples [count, ...] of one class, with repetition only where it has fewer."""
    members = (labels == label).nonzero()[:, 0]
    if len(members) == 0:
        raise ValueError(f"no sample of class {label} is there to combine")
    rounds = -(-count // len(members))
    order = torch.cat([torch.randperm(len(members), generator=generator) for _ in range(rounds)])[:count]
    return inputs[members[order.to(members.device)]]
