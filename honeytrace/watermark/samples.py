"""The owner's labelled data as the model sees it: inputs, labels, features and logits, held once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from honeytrace.training import Progress
from honeytrace.watermark.head import features_of_all

_IDS = (torch.int8, torch.int16, torch.int32, torch.int64)
_INPUTS = ("input_ids", "pixel_values", "inputs")
_LABELS = ("labels", "label")


@dataclass(frozen=True)
class Samples:
    """N samples with what the model makes of them; everything on the CPU.

    Attributes:
        inputs: [N, ...]; labels: [N] int64; features: [N, D] float32; logits: [N, C] float32.
    """

    inputs: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    features: Tensor = field(repr=False)
    logits: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: Tensor | slice) -> Samples:
        return Samples(self.inputs[index], self.labels[index], self.features[index], self.logits[index])

    @property
    def num_classes(self) -> int:
        """C."""
        return self.logits.shape[1]

    @property
    def probabilities(self) -> Tensor:
        """[N, C]."""
        return self.logits.softmax(dim=1)

    @property
    def confidence(self) -> Tensor:
        """[N]: the largest probability."""
        return self.probabilities.amax(dim=1)

    @property
    def predicted(self) -> Tensor:
        """[N] int64."""
        return self.logits.argmax(dim=1)


def gather(data: Any, name: str) -> tuple[Tensor, Tensor]:
    """All inputs [N, ...] and labels [N] of an iterable of pairs.

    Args:
        data: a pair (inputs [N, ...], labels [N]); or an iterable of pairs: batches (inputs [B, ...],
            labels [B]) as a DataLoader gives them, or single samples (input [...], label) as a Dataset does.
        name: how errors call it.

    Raises:
        TypeError: data is neither; or its inputs are neither float32, as a suspect is asked, nor token ids:
            integers [B, T].
        ValueError: it is empty, inputs and labels differ in number, or inputs are not all of one shape.
    """
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        data = [data]
    if not isinstance(data, Iterable) and not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise TypeError(f"{name} must be an iterable of (input, label), got {type(data).__name__}")
    # A Dataset goes by its length: not all of them end with an IndexError.
    pairs = data if isinstance(data, Iterable) else (data[i] for i in range(len(data)))
    if isinstance(data, Mapping):
        pairs = [data]
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    for pair in pairs:
        if isinstance(pair, Mapping):
            pair = _of_mapping(pair, name)
        if not isinstance(pair, (tuple, list)) or len(pair) < 2:
            raise TypeError(f"{name} must give pairs (input, label), got a {type(pair).__name__}")
        try:
            x, y = torch.as_tensor(pair[0]), torch.as_tensor(pair[1])
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(
                f"{name} must give pairs (input, label) of tensors, arrays or numbers, got "
                f"({type(pair[0]).__name__}, {type(pair[1]).__name__})"
            ) from None
        tokens = x.dtype in _IDS and x.dim() == (1 if y.dim() == 0 else 2)
        if x.dtype != torch.float32 and not tokens:
            raise TypeError(
                f"inputs in {name} must be float32, as a suspect is asked, or token ids: integers [B, T]; "
                f"got {x.dtype} {list(x.shape)}; convert them, and wrap a model that takes another dtype"
            )
        if tokens:
            x = x.long()
        if y.is_floating_point() or y.dim() > 1:
            raise ValueError(
                f"labels in {name} must be class numbers, got {y.dtype} of shape {list(y.shape)}"
            )
        if y.dim() == 0:
            x, y = x[None], y[None]
        if x.dim() < 2:
            raise ValueError(f"{name} must give inputs of at least one dimension each, got single numbers")
        if len(x) != len(y):
            raise ValueError(f"{name} must give one label for each input, got {len(x)} and {len(y)}")
        if inputs and (x.shape[1:] != inputs[0].shape[1:] or x.dtype != inputs[0].dtype):
            raise ValueError(
                f"inputs in {name} must be of one shape, got {list(inputs[0].shape[1:])} and "
                f"{list(x.shape[1:])}{'; pad token ids to one length' if tokens else ''}"
            )
        inputs.append(x.detach().cpu())
        labels.append(y.detach().cpu().long())
    if not inputs or sum(map(len, inputs)) == 0:
        raise ValueError(f"{name} must not be empty")
    return torch.cat(inputs), torch.cat(labels)


def _of_mapping(batch: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """Inputs and labels of a batch as Transformers' data collators give it. An attention mask is left out:
    the model makes it of the ids (`honeytrace.models.TokenInput`)."""
    inputs = [batch[key] for key in _INPUTS if key in batch]
    labels = [batch[key] for key in _LABELS if key in batch]
    if len(inputs) != 1 or len(labels) != 1:
        raise TypeError(
            f"{name} must give pairs (input, label), or mappings with one of {', '.join(_INPUTS)} and "
            f"labels; got a mapping with {', '.join(map(str, batch)) or 'nothing'}"
        )
    others = set(batch) - {*_INPUTS, *_LABELS, "attention_mask"}
    said = [key for key in sorted(others) if torch.as_tensor(batch[key]).ne(0).any()]
    if said:
        raise TypeError(
            f"{name} must give one tensor of inputs for each sample, got {said[0]} besides; make a model of "
            "one input by a wrapper that knows the rest"
        )
    return inputs[0], labels[0]


def look(
    model: nn.Module,
    head: str,
    inputs: Tensor,
    labels: Tensor,
    *,
    batch_size: int,
    progress: Progress | None = None,
    text: str = "features",
) -> Samples:
    """Put the inputs through the model, batch by batch.

    Raises:
        ValueError: a label is no class of the model, or features or logits are not finite.
    """
    features, logits = features_of_all(
        model, head, inputs, batch_size=batch_size, progress=progress, text=text
    )
    samples = Samples(inputs, labels, features.cpu(), logits.cpu())
    if int(labels.min()) < 0 or int(labels.max()) >= samples.num_classes:
        raise ValueError(
            f"labels must be classes of the model, 0 to {samples.num_classes - 1}, "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    if not (samples.features.isfinite().all() and samples.logits.isfinite().all()):
        raise ValueError("the model gives features or logits that are not finite on the data")
    return samples
