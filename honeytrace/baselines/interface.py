"""What all baseline defences share: their call, what they give back, and how their secrets are drawn."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from honeytrace.data import Split
from honeytrace.ownership.verify import TriggerGroup
from honeytrace.training import Precision, Progress, check_settings, fit, predict, seeded
from honeytrace.watermark import SecretKey


@dataclass(frozen=True)
class BaselineGroup:
    """Triggers with one target, as `honeytrace.ownership` tests them. Nothing secret is in the repr.

    Attributes:
        candidates: classes the target was drawn from, ascending.
        target: the class the watermark bends answers to; a uniform draw from the candidates that nothing
            else in the group depends on.
        triggers: float32 [n, ...], what a suspect will be asked.
        reference_log_probs: float32 [n, C], an unmarked reference on the triggers.
    """

    candidates: tuple[int, ...] = field(repr=False)
    target: int = field(repr=False)
    triggers: Tensor = field(repr=False)
    reference_log_probs: Tensor = field(repr=False)


@dataclass(frozen=True)
class Defended:
    """A served model with what proves its copies.

    Attributes:
        model: float32 inputs [B, ...] to logits [B, C], in evaluation mode: what the API answers with.
        groups: trigger groups; empty for defences that are no watermark.
        changed: for watermarks whose triggers are the queries themselves (DAWN): gives, for all queries
            [N, ...] that a customer sent, one group for each query that was answered with a changed label.
            None for all others.
    """

    model: nn.Module
    groups: tuple[TriggerGroup, ...] = field(default=(), repr=False)
    changed: Callable[[Tensor], tuple[TriggerGroup, ...]] | None = field(default=None, repr=False)


class Defence(Protocol):
    """A defence by its common arguments; each function has settings of its own beside them."""

    def __call__(
        self,
        train: Split,
        *,
        architecture: Callable[[], nn.Module],
        seed: int,
        epochs: int,
        trigger_data: Split,
        victim: nn.Module | None = None,
        reference: nn.Module | None = None,
        target: int | None = None,
        precision: Precision = "float32",
        progress: Progress | None = None,
    ) -> Defended:
        """Protect a classifier of `train`.

        Args:
            train: what the owner trains on.
            architecture: makes a fresh model from [B, ...] to logits [B, C]; called under `seed`.
            seed: 0 to 2**64 - 1; fixes the weights, the secrets and the target.
            epochs: passes over `train`, where the defence trains.
            trigger_data: labelled samples that neither the owner's training nor the attacker sees; triggers
                for verification are made of them.
            victim: an unmarked model trained already. Defences that sit on the answers wrap it (its weights
                are shared, it stays as it was) and train one where it is None; those that train the watermark
                into the model start afresh and do not look at it.
            reference: an unmarked model for `reference_log_probs`. Default: `victim`; a uniform
                distribution where that is None too.
            target: the watermark's class. Default: drawn from `seed` uniformly among the candidates. Only a
                drawn one makes the exact rank test valid. Defences without a target of their own ignore it.
            precision: as in ``honeytrace.training.fit``.
            progress: told of every batch.

        Raises:
            TypeError, ValueError: an argument has a wrong type or value.
        """


def stream_key(seed: int) -> SecretKey:
    """The key all secrets of a baseline are drawn from: SHA-256 of the seed, so that a seed repeats a run."""
    return SecretKey(hashlib.sha256(f"honeytrace baseline {seed}".encode("ascii")).digest())


def draw_generator(seed: int, purpose: str) -> torch.Generator:
    """A generator of its own for each purpose: what one part draws does not move the draws of another."""
    return torch.Generator().manual_seed(stream_key(seed).seed(purpose) % 2**63)


def draw_sources(seed: int, labels: Tensor, count: int) -> tuple[int, ...]:
    """`count` distinct classes among those that occur in `labels` [N], uniformly."""
    present = sorted(set(labels.tolist()))
    if len(present) < count + 1:
        raise ValueError(f"train must have at least {count + 1} classes, got {len(present)}")
    order = stream_key(seed).stream("sources").permutation(len(present))
    return tuple(present[place] for place in order[:count])


def draw_target(
    seed: int, classes: int, sources: Sequence[int], target: int | None
) -> tuple[int, tuple[int, ...]]:
    """The target and its candidates (all classes but the sources), from a stream that fixes nothing else.

    Raises:
        TypeError, ValueError: a given `target` is no candidate.
    """
    candidates = tuple(c for c in range(classes) if c not in sources)
    if target is None:
        return stream_key(seed).stream("target").choice(candidates), candidates
    if isinstance(target, bool) or not isinstance(target, int):
        raise TypeError(f"target must be an int or None, got {type(target).__name__}")
    if target not in candidates:
        raise ValueError(f"target must be one of the candidates {candidates}, got target={target}")
    return target, candidates


def check_arguments(
    train: Split, trigger_data: Split, *, seed: int, epochs: int, precision: Precision
) -> None:
    """Raise TypeError or ValueError for what every defence would refuse."""
    check_settings(epochs=epochs, seed=seed, precision=precision)
    for name, split in (("train", train), ("trigger_data", trigger_data)):
        if not (
            isinstance(split, tuple) and len(split) == 2 and all(isinstance(part, Tensor) for part in split)
        ):
            raise TypeError(f"{name} must be a pair (inputs, labels) of tensors, got {type(split).__name__}")
        inputs, labels = split
        if not inputs.is_floating_point() or labels.is_floating_point():
            raise TypeError(
                f"{name} must hold floating-point inputs and integer labels, "
                f"got {inputs.dtype} and {labels.dtype}"
            )
        if inputs.dim() < 2 or len(inputs) == 0 or labels.shape != inputs.shape[:1]:
            raise ValueError(
                f"{name} must hold inputs [N, ...] and labels [N] with N >= 1, "
                f"got {list(inputs.shape)} and {list(labels.shape)}"
            )
    if train[0].shape[1:] != trigger_data[0].shape[1:]:
        raise ValueError(
            f"trigger_data must hold inputs of train's shape {list(train[0].shape[1:])}, "
            f"got {list(trigger_data[0].shape[1:])}"
        )


def check_share(name: str, value: float, *, zero: bool = False) -> None:
    """ValueError unless 0 < value < 1 (`zero`: 0 <= value <= 1)."""
    inside = 0 <= value <= 1 if zero else 0 < value < 1
    if not inside:
        bounds = "between 0 and 1" if zero else "above 0 and below 1"
        raise ValueError(f"{name} must be {bounds}, got {name}={value}")


def fresh_model(architecture: Callable[[], nn.Module], seed: int, example: Tensor) -> tuple[nn.Module, int]:
    """A model with first weights from `seed`, and its number of classes C as seen on `example` [B, ...]."""
    if isinstance(architecture, nn.Module) or not callable(architecture):
        raise TypeError(
            "architecture must be a callable that makes a fresh model, such as lambda: small_cnn(10, 1, 28), "
            f"got {type(architecture).__name__}"
        )
    model = seeded(architecture, seed)
    return model, predict(model, example[:2]).shape[1]


def unmarked_victim(
    victim: nn.Module | None,
    train: Split,
    architecture: Callable[[], nn.Module],
    *,
    seed: int,
    epochs: int,
    precision: Precision,
    progress: Progress | None,
) -> tuple[nn.Module, int]:
    """The model that a plug-and-play defence wraps, trained if there is none, and its number of classes."""
    if victim is not None:
        if not isinstance(victim, nn.Module):
            raise TypeError(f"victim must be a torch.nn.Module or None, got {type(victim).__name__}")
        return victim, predict(victim, train.inputs[:2]).shape[1]
    model, classes = fresh_model(architecture, seed, train.inputs)
    fit(model, *train, epochs=epochs, seed=seed, precision=precision, progress=progress)
    return model, classes


def reference_log_probs(reference: nn.Module | None, triggers: Tensor, classes: int) -> Tensor:
    """[n, C] log-probabilities of the reference, or of the uniform distribution where there is none."""
    if reference is None:
        return torch.full((len(triggers), classes), 1 / classes).log()
    return predict(reference, triggers).float().log_softmax(1).cpu()
