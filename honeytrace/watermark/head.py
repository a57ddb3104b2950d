"""Where a classifier's features and logits are: the input and the output of its last linear layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from honeytrace.training import Progress, device_of, evaluating, logits_of

Head: TypeAlias = nn.Linear | nn.Conv2d
"""A linear layer, or a 1x1 convolution, which is one on [B, D, 1, 1]."""

_ANOTHER = "name another with head="


class Run(NamedTuple):
    """One run of a layer that was watched: what it got (its first argument) and gave."""

    module: nn.Module
    got: Any
    gave: Any


@contextlib.contextmanager
def watched(modules: Iterable[nn.Module]) -> Iterator[list[Run]]:
    """The runs of these layers inside the block, in their order, in a list that grows."""
    runs: list[Run] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        runs.append(Run(module, args[0] if args else None, output))

    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(note).remove)
        yield runs


def find_head(model: nn.Module, example: Tensor) -> str:
    """The name of the classifier head: the linear layer (or 1x1 convolution) that a forward pass runs last.

    The last one *run*, not the last one registered: auxiliary heads are often registered behind the real one.

    Args:
        model: the classifier. Its mode (train or eval) is left as it was.
        example: a batch of inputs, as the model takes them; moved to where it is.

    Returns:
        The name as in `model.named_modules()`; "" if the model itself is the head.

    Raises:
        ValueError: no such layer ran; the last one did not get the features of the answer (see
            `features_and_logits`); the answer is no class scores [B, C], or is made of more than that layer's
            output.
    """
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules() if _is_head(module)}
    with watched(names) as ran, evaluating(model), torch.no_grad():
        answer = model(example.to(device_of(model)))
    if not ran:
        raise ValueError(
            f"model must run an nn.Linear head, but {type(model).__name__} runs none of its {len(names)}; "
            "name the head with head="
        )
    module, features, output = ran[-1]
    _, logits = _rows(module, names[module], features, output, answer, len(example))
    check_answer(answer, logits, names[module])
    return names[module]


def check_head(model: nn.Module, name: str, example: Tensor) -> None:
    """Raise ValueError where the named module is no head, or gets no features, of what the model answers to
    `example` [B, ...]. (What follows a named head is the caller's business.)"""
    features_and_logits(model, name, example)


def get_head(model: nn.Module, name: str) -> Head:
    """The module of that name. Raises ValueError if the model has none, or it is neither an `nn.Linear` nor a
    1x1 convolution."""
    modules = dict(model.named_modules())
    if name not in modules:
        raise ValueError(f"head must name a module of the model, got head={name!r}; it has none of that name")
    module = modules[name]
    if not isinstance(module, (nn.Linear, nn.Conv2d)) or not _is_head(module):
        raise ValueError(
            f"head must name an nn.Linear or a 1x1 nn.Conv2d, but {name!r} is a {type(module).__name__}"
        )
    return module


def linear_head(model: nn.Module, name: str) -> nn.Linear:
    """As `get_head`, for what works with an `nn.Linear` only; a convolution raises ValueError too."""
    module = get_head(model, name)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"head must name an nn.Linear here, but {name!r} is a {type(module).__name__}")
    return module


def sizes_of(head: Head) -> tuple[int, int]:
    """(D, C): features and classes."""
    if isinstance(head, nn.Linear):
        return head.in_features, head.out_features
    return head.in_channels, head.out_channels


@torch.no_grad()
def features_and_logits(model: nn.Module, head: str, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, D] and logits [B, C] of one batch, float32, detached, in evaluation mode, on the model's
    device.

    A linear head may also get [B, T, D], where the model then takes the answer of one place in T (the last
    token, as language models do): the features are those of that place. A convolution must get [B, D, 1, 1].

    Raises:
        ValueError: the head did not run, or ran on something else than the features of this batch's answers.
    """
    module = get_head(model, head)
    with watched([module]) as seen, evaluating(model):
        answer = model(batch.to(device_of(model)))
    if not seen:
        raise ValueError(f"the head {head!r} did not run in a forward pass of the model")
    features, logits = _rows(module, head, seen[-1].got, seen[-1].gave, answer, len(batch))
    return features.float(), logits.float()


def features_of_all(
    model: nn.Module,
    head: str,
    inputs: Tensor,
    *,
    batch_size: int = 512,
    progress: Progress | None = None,
    text: str = "features",
) -> tuple[Tensor, Tensor]:
    """Features [N, D] and logits [N, C] as `features_and_logits` gives them, batch by batch, on the device of
    `inputs` [N, ...].

    Args:
        progress: told `text` and how many inputs are through.

    Raises:
        ValueError: as `features_and_logits`.
    """
    features: list[Tensor] = []
    logits: list[Tensor] = []
    done = 0
    for batch in torch.split(inputs, batch_size):
        of_batch, told = features_and_logits(model, head, batch)
        features.append(of_batch.to(inputs.device))
        logits.append(told.to(inputs.device))
        done += len(batch)
        if progress is not None:
            progress(done, len(inputs), text)
    return torch.cat(features), torch.cat(logits)


def check_answer(answer: Any, logits: Tensor, name: str) -> None:
    """Refuse a model whose answer is not that of its head, up to something that keeps the order of classes
    (softmax, a temperature).

    Args:
        answer: what the model returned for B inputs; logits: [B, C], of the head; name: the head's.

    Raises:
        ValueError: the answer is no scores [B, C], is embeddings, or puts the classes in another order.
    """
    scores = logits_of(answer).float()
    if scores.dim() != 2 or len(scores) != len(logits):
        raise ValueError(
            f"model must answer with class scores [B, C] with B={len(logits)}, got {list(scores.shape)}"
        )
    if bool(((scores.norm(dim=1) - 1).abs() < 1e-5).all()) and float(scores.min()) < 0:
        raise ValueError(
            "model must answer with class scores [B, C]; its answers have length 1, as embeddings do. "
            "Embeddings have no classes: put a classifier head on them"
        )
    if scores.shape != logits.shape:
        raise ValueError(
            f"the model gives {scores.shape[1]} scores and its last linear layer {name!r} {logits.shape[1]}: "
            f"that is not the head; {_ANOTHER}"
        )
    along = scores.gather(1, logits.float().argsort(dim=1))
    slack = 1e-5 * float(scores.abs().max())
    if not bool((along.diff(dim=1) >= -slack).all()) and bool(scores.isfinite().all()):
        raise ValueError(
            f"the model's answer is more than that of its last linear layer {name!r}: it puts the classes "
            f"in another order (an average of two heads?); {_ANOTHER}, or wrap the model so that one answers"
        )


def _is_head(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return (
            module.kernel_size == (1, 1)
            and module.stride == (1, 1)
            and module.padding in ((0, 0), 0, "valid", "same")
            and module.groups == 1
        )
    return isinstance(module, nn.Linear)


def _rows(
    module: nn.Module, name: str, features: Any, output: Any, answer: Any, count: int
) -> tuple[Tensor, Tensor]:
    """What the head got and gave as [B, D] and [B, C]."""
    shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
    whole = isinstance(features, Tensor) and features.dim() > 1 and len(features) == count
    if whole and isinstance(module, nn.Conv2d):
        if features.shape[2:] == (1, 1):
            return features.flatten(1), output.flatten(1)
        raise ValueError(
            f"the head {name!r} is a 1x1 convolution and must get features [B, D, 1, 1], got {shape}: the "
            "answers of its places are pooled afterwards, and a mark there would be thinned out. Pool before "
            f"the head, or {_ANOTHER}"
        )
    if whole and features.dim() == 2:
        return features, output
    if whole and features.dim() == 3:
        place = _place(output, logits_of(answer))
        if place is not None:
            rows = torch.arange(count, device=features.device)
            return features[rows, place], output[rows, place]
        raise ValueError(
            f"the head {name!r} must get features [B, D] with B={count}, got {shape}, and the model's "
            "answer is not the head's at one place: what follows mixes them. Pool before the head (a linear "
            f"one then gives the same), or {_ANOTHER}"
        )
    raise ValueError(f"the head {name!r} must get features [B, D] with B={count}, got {shape}; {_ANOTHER}")


def _place(output: Tensor, scores: Tensor) -> Tensor | None:
    """[B]: where in T the head's output [B, T, C] is the model's answer [B, C]; None where it is nowhere."""
    if scores.dim() != 2 or scores.shape != (output.shape[0], output.shape[2]):
        return None
    same = (output.float() == scores.float()[:, None, :]).all(dim=2)
    return same.int().argmax(dim=1) if bool(same.any(dim=1).all()) else None
