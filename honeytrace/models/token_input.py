"""A Transformers-style text classifier as a model of one input: the token ids."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class TokenInput(nn.Module):
    """Calls a model by keyword with token ids, and with the attention mask that follows from them.

    Calibration, attacks and verification hand a model one tensor. Where a model wants more, this makes it of
    the ids. To serve, `watermark.protect(TokenInput(model, padding)).model` is the protected model itself, of
    the same class and with the same call as before.

    Args:
        model: called as ``model(input_ids=ids, attention_mask=mask, **fixed)``.
        padding: the id that stands where there is no token, ``tokenizer.pad_token_id``. The mask is 0 there.
        fixed: further keyword arguments, the same in every call.

    Raises:
        TypeError: model is no `nn.Module`, or padding no int.
    """

    def __init__(self, model: nn.Module, padding: int, **fixed: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if isinstance(padding, bool) or not isinstance(padding, int):
            raise TypeError(f"padding must be an int, the tokenizer's pad_token_id, got {padding!r}")
        super().__init__()
        self.model = model
        self.padding = padding
        self.fixed = fixed

    def forward(self, ids: Tensor) -> Any:
        """What the model gives for ids [B, T]."""
        return self.model(input_ids=ids, attention_mask=(ids != self.padding).long(), **self.fixed)
