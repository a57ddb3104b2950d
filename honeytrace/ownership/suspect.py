"""Putting questions to a suspect: the only place where torch meets a stranger's code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from honeytrace.training import device_of, evaluating

Suspect = Callable[[Tensor], Any]
"""From inputs float32 [n, ...] (or token ids int64 [n, T]) to scores [n, C] or labels [n]: a tensor, an
array, or nested lists; scores also in a dict or object with `logits`, or as the first of a tuple."""


def keyed_order(seed: int, purpose: str, length: int) -> list[int]:
    """A permutation of range(length) drawn from the key's seed.

    The items are sorted by SHA-256 of (seed, purpose, item), so that the order can be derived again on any
    machine with any version of any library; no generator's stream promises that.

    Args:
        seed: integer >= 0 of any size.
        purpose: names the draw; other purposes give unrelated orders.
        length: >= 0.
    """
    prefix = f"honeytrace verification order\n{seed}\n{purpose}\n".encode()
    return sorted(range(length), key=lambda item: hashlib.sha256(prefix + str(item).encode()).digest())


@contextmanager
def quiet(suspect: Suspect) -> Iterator[None]:
    """No gradients; an nn.Module is in eval mode inside, and each submodule gets its own mode back."""
    with evaluating(suspect) if isinstance(suspect, nn.Module) else nullcontext(), torch.no_grad():
        yield


def as_asked(inputs: Tensor) -> Tensor:
    """Inputs in the dtype a suspect gets them in: float32, or int64 for integers (token ids)."""
    return inputs.to(torch.float32 if inputs.is_floating_point() else torch.int64)


def input_bytes(inputs: Tensor) -> bytes:
    """What hashes of inputs are taken of: float32 values, little-endian; or int64 ones behind a word that no
    float can be mistaken for."""
    values = as_asked(inputs.detach().cpu()).contiguous().numpy()
    if values.dtype == np.int64:
        return b"int64\n" + values.astype("<i8", copy=False).tobytes()
    return values.astype("<f4", copy=False).tobytes()


def ask(suspect: Suspect, inputs: Tensor) -> npt.NDArray[np.generic]:
    """One batch of questions: [n, ...] float32 or int64 inputs -> the answers as an array with n rows.

    The suspect gets a copy of the inputs, on the device of its first parameter if it is an nn.Module.

    Raises:
        TypeError: the answer is no tensor, array or nested list of real numbers.
        ValueError: its shape is neither [n, C] nor [n].
    """
    device = torch.device("cpu")
    if isinstance(suspect, nn.Module):
        device = device_of(suspect)
    answer = _scores_in(suspect(as_asked(inputs).to(device=device, copy=True)))
    if isinstance(answer, Tensor):
        answer = answer.detach().cpu()
        # NumPy has no bfloat16.
        answer = (answer.double() if answer.is_floating_point() else answer).numpy()
    try:
        rows = np.asarray(answer)
    except ValueError:
        raise ValueError(
            "suspect must return scores [n, C] or labels [n], got rows of different lengths"
        ) from None
    if rows.dtype.kind not in "fiu":
        raise TypeError(
            f"suspect must return scores [n, C] or labels [n] as real numbers, got {type(answer).__name__} "
            f"of dtype {rows.dtype}"
        )
    if rows.ndim not in (1, 2) or rows.shape[0] != inputs.shape[0]:
        raise ValueError(
            f"suspect must return scores [n, C] or labels [n] for n={inputs.shape[0]} inputs, got shape "
            f"{list(rows.shape)}"
        )
    return rows


def _scores_in(answer: Any) -> Any:
    """What a model of a library wraps its scores in, taken off; anything else as it is."""
    if isinstance(answer, Mapping):
        found = answer.get("logits", answer)
    elif isinstance(answer, tuple) and not hasattr(answer, "logits"):
        found = answer[0] if answer else answer
        if not isinstance(found, Tensor) or found.dim() != 2:
            return answer  # rows, one by one
    else:
        found = getattr(answer, "logits", answer)
    return found if isinstance(found, Tensor) else answer
