"""What all attacks share: the API they ask, the record they leave, and how alike two models are."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from honeytrace.training import History, Progress, predict

Api: TypeAlias = Callable[[Tensor], Tensor]
"""Inputs [B, ...] to probabilities [B, C] (floating point) or labels [B] (integers)."""

Labels: TypeAlias = Literal["soft", "top1"]
"""What a copy learns from: the answers' probabilities, or their most probable class."""

Needs: TypeAlias = Literal["scores", "labels"]
"""What an attack needs of the API: probabilities, or no more than labels."""

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Extraction(NamedTuple):
    """A copy, and the record of how it was made."""

    surrogate: nn.Module
    """The trained copy, in evaluation mode."""
    queries: Tensor
    """What was sent, [n, ...], in the order of sending."""
    answers: Tensor
    """What came back, as it came: probabilities float32 [n, C], or labels int64 [n]."""
    indices: Tensor
    """Row of each query in the attacker's pool, int64 [n]: the row it was made from, where the attack changes
    inputs before it sends them; -1 where it was made from nothing."""
    kept: Tensor
    """Rows of `queries` the surrogate was finally trained on, int64 [m], ascending; all if none left out."""
    targets: Tensor
    """What the surrogate finally learned about the kept rows: probabilities [m, C] or labels int64 [m]."""
    suspected: Tensor
    """Rows of `queries` whose answers the attacker believes bent, int64, ascending; empty where the attack
    does not ask itself that. They were left out, or their targets were changed."""
    history: History
    """The surrogate's training (the last one, where it was trained more than once)."""

    def to_dict(self) -> dict[str, Any]:
        """Counts and the training's course, as JSON values; no query and no answer."""
        return {
            "queries": len(self.queries),
            "kept": len(self.kept),
            "suspected": len(self.suspected),
            "made_from_nothing": int((self.indices < 0).sum()),
            "answers": "labels" if self.answers.dim() == 1 else "probabilities",
            "classes": None if self.answers.dim() == 1 else int(self.answers.shape[1]),
            "parameters": sum(parameter.numel() for parameter in self.surrogate.parameters()),
            "history": {name: list(values) for name, values in self.history._asdict().items()},
        }


def api(
    model: nn.Module,
    *,
    answers: Literal["probabilities", "labels"] = "probabilities",
    gives: Literal["logits", "probabilities"] = "logits",
    batch_size: int = 512,
) -> Api:
    """Put `model` behind an API: evaluation mode, no gradients, no more in the answer than `answers` says.

    Args:
        model: a bare or a protected classifier, from [B, ...] to scores [B, C].
        answers: "probabilities" (float32 [B, C]) or "labels" (int64 [B], the first largest score).
        gives: whether the model's own scores are logits (then the API takes the softmax, in float32) or
            already probabilities.
        batch_size: inputs are put to the model so many at a time.

    Returns:
        The callable; its answers lie on the device of its inputs.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check_choice("answers", answers, ("probabilities", "labels"))
    _check_choice("gives", gives, ("logits", "probabilities"))

    def answer(inputs: Tensor) -> Tensor:
        scores = predict(model, inputs, batch_size=batch_size)
        if answers == "labels":
            return scores.argmax(1)
        return scores.float().softmax(1) if gives == "logits" else scores.float()

    return answer


@torch.no_grad()
def ask(api: Api, queries: Tensor, *, batch_size: int = 256, progress: Progress | None = None) -> Tensor:
    """Send `queries` [n, ...] to the API in batches and collect the answers, checked.

    Args:
        api: any callable; see `Api`.
        queries: n >= 1 inputs.
        batch_size: queries in one call. Default 256.
        progress: told of every batch.

    Returns:
        Probabilities float32 [n, C] or labels int64 [n], on the device of `queries`.

    Raises:
        TypeError: the API gives something other than a tensor of such a dtype.
        ValueError: its answer has a wrong shape, or its rows are no probabilities (below 0, not finite, or a
            sum away from 1 by more than 1e-2, which leaves room for half precision and rounded answers).
    """
    if not isinstance(queries, Tensor):
        raise TypeError(f"queries must be a tensor, got {type(queries).__name__}")
    if queries.dim() < 2 or len(queries) == 0:
        raise ValueError(f"queries must have shape [n, ...] with n >= 1, got {list(queries.shape)}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise TypeError(f"batch_size must be an int, got {type(batch_size).__name__}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got batch_size={batch_size}")
    collected: list[Tensor] = []
    done = 0
    for batch in torch.split(queries, batch_size):
        answers = checked(api(batch), len(batch)).to(queries.device)
        if collected and answers.shape[1:] != collected[0].shape[1:]:
            raise ValueError(
                f"api changed the shape of its answers on the way: after {list(collected[0].shape)} "
                f"came {list(answers.shape)}"
            )
        collected.append(answers)
        done += len(batch)
        if progress is not None:
            progress(done, len(queries), "asking")
    return torch.cat(collected)


def predicted_labels(model: nn.Module | Api, inputs: Tensor, *, batch_size: int = 512) -> Tensor:
    """The label a model or an API gives each input: int64 [N], the first largest score (or the label itself).

    Raises:
        TypeError, ValueError: wrong inputs, or an answer that is neither [B, C] nor integer [B].
    """
    if isinstance(model, nn.Module):
        return predict(model, inputs, batch_size=batch_size).argmax(1)
    return best_class(ask(model, inputs, batch_size=batch_size))


def fidelity(
    surrogate: nn.Module | Api, victim: nn.Module | Api, inputs: Tensor, *, batch_size: int = 512
) -> float:
    """Share in [0, 1] of `inputs` on which copy and victim give the same label.

    Source: Jagielski et al., "High Accuracy and High Fidelity Extraction of Neural Networks",
    arXiv 1909.01838, section 3.

    Raises:
        TypeError, ValueError: as `predicted_labels`.
    """
    first = predicted_labels(surrogate, inputs, batch_size=batch_size)
    return agreement(first, predicted_labels(victim, inputs, batch_size=batch_size))


def agreement(first: Tensor, second: Tensor) -> float:
    """Share in [0, 1] of places in which two rows of labels (integer [N], N >= 1) are equal.

    Raises:
        ValueError: the shapes are not one and the same [N].
    """
    if first.dim() != 1 or first.shape != second.shape or len(first) == 0:
        raise ValueError(
            f"first and second must be labels of one shape [N] with N >= 1, "
            f"got {list(first.shape)} and {list(second.shape)}"
        )
    return float((first == second.to(first.device)).double().mean())


def checked(answers: Tensor, count: int) -> Tensor:
    """The answers to `count` queries as float32 [count, C] or int64 [count]; anything else raises."""
    if not isinstance(answers, Tensor):
        raise TypeError(f"api must give a tensor, got {type(answers).__name__}")
    if answers.dim() not in (1, 2) or len(answers) != count:
        raise ValueError(
            f"api must give probabilities [B, C] or labels [B] with B={count}, got {list(answers.shape)}"
        )
    if answers.dim() == 1:
        if answers.dtype not in _INTEGERS:
            raise TypeError(f"api gave shape [B]: that must be integer labels, got {answers.dtype}")
        if answers.min() < 0:
            raise ValueError(f"api must give labels of 0 or more, got {int(answers.min())}")
        return answers.long()
    if not answers.is_floating_point():
        raise TypeError(f"api gave shape [B, C]: that must be probabilities, got {answers.dtype}")
    answers = answers.float()
    off = (answers.sum(1) - 1).abs().max().item()
    if not off <= 1e-2 or answers.min() < 0:
        raise ValueError(
            "api must give probabilities (0 or more, rows that sum to 1 within 0.01); smallest entry "
            f"{answers.min().item():.3g}, largest error of a row's sum {off:.3g}"
        )
    return answers


def best_class(answers: Tensor) -> Tensor:
    """Labels [N] as they are; of probabilities [N, C] the first largest."""
    return answers if answers.dim() == 1 else answers.argmax(1)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {name}={value!r}")
