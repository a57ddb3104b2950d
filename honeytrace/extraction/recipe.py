"""`Recipe`: which model the attacker trains as a copy, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from honeytrace.training import Augment, History, Objective, Precision, Progress, check_settings, fit, seeded


@dataclass(frozen=True)
class Recipe:
    """How the attacker makes a copy. Every attack takes one and trains all its models by it.

    Attributes:
        surrogate: makes a fresh model from [B, ...] to logits [B, C]; called under the attack's seed, so that
            the same arguments give the same copy.
        epochs: passes over what was answered, in each training.
        batch_size, learning_rate, augment, precision: as in ``honeytrace.training.fit``.

    Raises:
        TypeError, ValueError: an attribute has a wrong type or value.
    """

    surrogate: Callable[[], nn.Module]
    epochs: int
    batch_size: int = 128
    learning_rate: float = 3e-3
    augment: Augment | None = None
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.surrogate, nn.Module) or not callable(self.surrogate):
            raise TypeError(
                "surrogate must be a callable that makes a fresh model, such as lambda: small_cnn(10, 1, 28),"
                f" got {type(self.surrogate).__name__}"
            )
        check_settings(
            epochs=self.epochs,
            seed=0,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            precision=self.precision,
        )

    def fresh(self, seed: int) -> nn.Module:
        """An untrained model, the same for the same seed."""
        return seeded(self.surrogate, seed)

    def train(
        self, inputs: Tensor, targets: Tensor, *, seed: int, progress: Progress | None = None
    ) -> tuple[nn.Module, History]:
        """A fresh model trained on inputs [N, ...] and targets (labels [N] or probabilities [N, C])."""
        model = self.fresh(seed)
        return model, self.train_on(model, inputs, targets, seed=seed, progress=progress)

    def train_on(
        self,
        model: nn.Module,
        inputs: Tensor,
        targets: Tensor,
        *,
        seed: int,
        epochs: int | None = None,
        objective: Objective | None = None,
        progress: Progress | None = None,
    ) -> History:
        """Train `model` from where it is, in place, for `epochs` (default: the recipe's).

        `objective`: as in ``honeytrace.training.fit``.
        """
        return fit(
            model,
            inputs,
            targets,
            epochs=self.epochs if epochs is None else epochs,
            seed=seed,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            augment=self.augment,
            precision=self.precision,
            objective=objective,
            progress=progress,
        )
