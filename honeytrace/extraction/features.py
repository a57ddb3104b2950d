"""The features of the attacker's own models: what comes into their head."""

import torch
from torch import Tensor, nn

from honeytrace.watermark.head import features_and_logits, get_head

_BATCH = 512


def features_of(model: nn.Module, head: str, batch: Tensor) -> Tensor:
    """Features [B, D] of a batch, with gradients, in the mode the model is in."""
    seen: list[Tensor] = []
    hook = get_head(model, head).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        model(batch)
    finally:
        hook.remove()
    return seen[-1].flatten(1)  # a convolution gets [B, D, 1, 1]


def all_features(model: nn.Module, head: str, inputs: Tensor) -> Tensor:
    """Features float32 [N, D] of all inputs, in evaluation mode, without gradients."""
    batches = [features_and_logits(model, head, batch)[0] for batch in torch.split(inputs, _BATCH)]
    return torch.cat(batches).to(inputs.device)
