"""Fine-pruning: switch off what clean samples do not use, then fine-tune."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from honeytrace.data import Split
from honeytrace.removal.interface import check_arguments, drawn, twin
from honeytrace.training import Precision, Progress, fit, predict


def fine_prune(
    surrogate: nn.Module,
    data: Split,
    *,
    seed: int,
    precision: Precision = "float32",
    progress: Progress | None = None,
    pruned: float = 0.4,
    share: float = 0.1,
    epochs: int = 10,
    learning_rate: float = 1e-3,
) -> nn.Module:
    """Set the channels of the last convolution that clean samples excite least to 0, and train further.

    A network without convolutions loses units of its last hidden linear layer instead. What is pruned stays
    0 through the fine-tuning.

    Source: Liu, Dolan-Gavitt & Garg, "Fine-Pruning", arXiv 1805.12185, sections 3.1 and 3.3.

    Args:
        pruned: share of the channels, in [0, 1); at least one is kept.
        share: of `data` that ranks the channels and trains, in (0, 1].
        epochs, learning_rate: of the fine-tuning.
        The others as in `Removal`.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value, or there is no layer to prune.
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
    if not 0 <= pruned < 1:
        raise ValueError(f"pruned must be in [0, 1), got pruned={pruned}")
    clean = drawn(data, share, seed)
    model = twin(surrogate)
    layer = _prunable(model)
    activity = channel_activity(model, layer, clean.inputs)
    kept = torch.ones_like(activity)
    kept[activity.argsort(stable=True)[: min(int(pruned * len(kept)), len(kept) - 1)]] = 0

    def silence(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * kept.to(output.dtype).view(1, -1, *[1] * (output.dim() - 2))

    # A hook while it trains, for the optimiser would bring zeroed weights back; zeroed weights afterwards, so
    # that the state_dict is the whole model.
    hook = layer.register_forward_hook(silence)
    fit(
        model,
        *clean,
        epochs=epochs,
        seed=seed,
        learning_rate=learning_rate,
        precision=precision,
        progress=progress,
    )
    hook.remove()
    with torch.no_grad():
        for weight in layer.parameters():
            weight[kept == 0] = 0
    return model


def channel_activity(model: nn.Module, layer: nn.Module, inputs: Tensor) -> Tensor:
    """Mean activation [channels] of a layer's output after a ReLU, over samples and places."""
    sums: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        sums.append(
            output.detach().float().clamp_min(0).flatten(2).mean(2).sum(0)
            if output.dim() > 2
            else output.detach().float().clamp_min(0).sum(0)
        )

    hook = layer.register_forward_hook(note)
    try:
        predict(model, inputs)
    finally:
        hook.remove()
    return torch.stack(sums).sum(0) / len(inputs)


def _prunable(model: nn.Module) -> nn.Module:
    """What follows the last convolution (its batch normalisation) or itself; without convolutions the last
    linear layer but the head."""
    modules = [module for module in model.modules() if not list(module.children())]
    convolutions = [n for n, module in enumerate(modules) if isinstance(module, nn.Conv2d)]
    if convolutions:
        last = modules[convolutions[-1]]
        behind = [m for m in modules[convolutions[-1] :] if isinstance(m, nn.BatchNorm2d) and m.affine]
        # The ranking must see what the ReLU sees.
        return behind[0] if behind else last
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    if len(linears) < 2:
        raise ValueError("surrogate must have a convolution, or two linear layers, to prune; it has neither")
    return linears[-2]
