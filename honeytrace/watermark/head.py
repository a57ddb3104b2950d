"""Where a classifier's features and logits are: the input and the output of its last linear layer."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from honeytrace.training import evaluating


def find_head(model: nn.Module, example: Tensor) -> str:
    """The name of the classifier head: the `nn.Linear` that a forward pass runs last.

    The last one *run*, not the last one registered: auxiliary heads are often registered behind the real one.

    Args:
        model: the classifier. Its mode (train or eval) is left as it was.
        example: a batch of inputs, as the model takes them.

    Returns:
        The name as in `model.named_modules()`; "" if the model itself is the head.

    Raises:
        ValueError: no linear layer ran, or the last one did not get features [B, D].
    """
    linears: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    ran: list[tuple[str, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        ran.append((linears[module], args[0] if args else None))

    with contextlib.ExitStack() as stack:
        for module in linears:
            stack.callback(module.register_forward_hook(note).remove)
        with evaluating(model), torch.no_grad():
            model(example)
    if not ran:
        raise ValueError(
            f"model must run an nn.Linear head, but {type(model).__name__} runs none of its {len(linears)}; "
            "name the head with head="
        )
    name, features = ran[-1]
    if not isinstance(features, Tensor) or features.dim() != 2:
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"the head {name!r} must get features [B, D], got {shape}; name another with head=")
    return name


def get_head(model: nn.Module, name: str) -> nn.Linear:
    """The module of that name. Raises ValueError if the model has none or it is no `nn.Linear`."""
    modules = dict(model.named_modules())
    if name not in modules:
        raise ValueError(f"head must name a module of the model, got head={name!r}; it has none of that name")
    module = modules[name]
    if not isinstance(module, nn.Linear):
        raise ValueError(f"head must name an nn.Linear, but {name!r} is a {type(module).__name__}")
    return module


@torch.no_grad()
def features_and_logits(model: nn.Module, head: str, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, D] and logits [B, C] of one batch, float32, detached, in evaluation mode.

    Raises:
        ValueError: the head did not run, or ran on something else than features [B, D] of this batch.
    """
    seen: list[tuple[Any, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append((args[0] if args else None, output))

    hook = get_head(model, head).register_forward_hook(note)
    try:
        with evaluating(model):
            model(batch)
    finally:
        hook.remove()
    if not seen:
        raise ValueError(f"the head {head!r} did not run in a forward pass of the model")
    features, logits = seen[-1]
    if not isinstance(features, Tensor) or features.dim() != 2 or len(features) != len(batch):
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(f"the head {head!r} must get features [B, D] with B={len(batch)}, got {shape}")
    return features.float(), logits.float()
