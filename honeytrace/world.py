"""The owner's side of every experiment: data, victim, unmarked reference, watermark; each made once and kept.

    splits -> owned, validation -> victim -> references (an unmarked copy, and it after removals) -> watermark

The demonstration and the evaluation tell different stories in the same world.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from honeytrace import data, models, removal, training
from honeytrace.cache import ModelCache, digest, model_digest
from honeytrace.progress import Stage, silent
from honeytrace.training import Precision
from honeytrace.watermark import SecretKey, Watermark

DataName = Literal["digits", "fashion"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What differs between the data sets.

    Attributes:
        side: height and width of an image, in pixels.
        kept_back: share of the owner's images that the victim is not trained on, to measure accuracy with.
        max_accuracy_drop: the budget of the calibration, a share of answers.
        victim_epochs, reference_epochs, copy_epochs, independent_epochs: of each training.
        removals: that are taken to the reference, for suspects that went through one.
    """

    side: int
    kept_back: float
    max_accuracy_drop: float
    victim_epochs: int
    reference_epochs: int
    copy_epochs: int
    independent_epochs: int
    removals: tuple[str, ...]


SETTINGS: dict[DataName, Settings] = {
    # The few originals are all needed for training, so nothing is kept back.
    "digits": Settings(
        side=8,
        kept_back=0.0,
        max_accuracy_drop=0.006,
        victim_epochs=5,
        reference_epochs=4,
        copy_epochs=8,
        independent_epochs=6,
        # A pruned model of these few channels is like no suspect, and makes claims on top-1 copies rarer.
        removals=(),
    ),
    "fashion": Settings(
        side=28,
        kept_back=0.1,
        max_accuracy_drop=0.005,
        victim_epochs=5,
        reference_epochs=4,
        copy_epochs=4,
        independent_epochs=4,
        removals=removal.USUAL,
    ),
}


class World:
    """Data and the owner's models.

    Args:
        name: the data, "digits" or "fashion".
        seed: fixes the division of the data and all trainings; number n of them has the seed 1000 * seed + n.
        key: the owner's.
        directory: where Fashion-MNIST lies. Default: where Debian's package puts it.
        cache: keeps trained models by content.
        precision: of all trainings.
        device: where models live, train and answer. Data stays on the CPU; batches are moved.
        stage: shows progress.

    Raises:
        MissingDataset: the data is not there; the message says how to get it.
    """

    def __init__(
        self,
        name: DataName,
        *,
        seed: int,
        key: SecretKey,
        directory: str | os.PathLike[str] | None = None,
        cache: ModelCache | None = None,
        precision: Precision = "float32",
        device: str | torch.device = "cpu",
        stage: Stage = silent,
    ) -> None:
        self.name, self.seed, self.key, self.device = name, seed, key, torch.device(device)
        self.settings, self.precision, self.stage = SETTINGS[name], precision, stage
        self.cache = ModelCache(None) if cache is None else cache
        with stage("reading the data"):
            self.splits = data.digits(seed) if name == "digits" else data.fashion_mnist(directory)
        kept = int(self.settings.kept_back * len(self.splits.train.labels))
        owned = len(self.splits.train.labels) - kept
        self.owned = data.Split(self.splits.train.inputs[:owned], self.splits.train.labels[:owned])
        self.validation = (
            data.Split(self.splits.train.inputs[owned:], self.splits.train.labels[owned:]) if kept else None
        )
        self.digest = digest(*self.splits.train, *self.splits.pool, *self.splits.test)

    @property
    def classes(self) -> int:
        """C."""
        return len(self.splits.classes)

    def number(self, number: int) -> int:
        """The seed of training `number` (0 to 999) in this world."""
        return 1000 * self.seed + number

    def large(self) -> nn.Module:
        """A fresh model of the victim's architecture."""
        return models.small_cnn(self.classes, 1, self.settings.side).to(self.device)

    def small(self) -> nn.Module:
        """A fresh model of the architecture of everybody else."""
        return models.tiny_cnn(self.classes, 1, self.settings.side).to(self.device)

    @cached_property
    def victim(self) -> nn.Module:
        """The classifier that is sold."""
        seed = self.number(1)

        def train() -> nn.Module:
            model = training.seeded(self.large, seed)
            with self.stage("training the victim") as report:
                training.fit(
                    model,
                    *self.owned,
                    epochs=self.settings.victim_epochs,
                    seed=seed,
                    precision=self.precision,
                    progress=report,
                )
            return model

        return self.kept("victim", self.large, train, seed=seed, epochs=self.settings.victim_epochs)

    @cached_property
    def reference(self) -> nn.Module:
        """An unmarked copy, made by the owner from the victim's bare answers to the owner's own inputs."""
        seed, epochs = self.number(5), self.settings.reference_epochs
        answers = training.predict(self.victim, self.owned.inputs).float().softmax(1)

        def train() -> nn.Module:
            model = training.seeded(self.small, seed)
            with self.stage("training the owner's unmarked reference") as report:
                training.fit(
                    model,
                    self.owned.inputs,
                    answers,
                    epochs=epochs,
                    seed=seed,
                    precision=self.precision,
                    progress=report,
                )
            return model

        return self.kept("reference", self.small, train, seed=seed, epochs=epochs, answers=digest(answers))

    @cached_property
    def references(self) -> list[nn.Module]:
        """The reference, and what removals make of it: suspects are compared with the nearest mixture."""
        return [self.reference, *(self._after(name) for name in self.settings.removals)]

    def _after(self, name: str) -> nn.Module:
        seed = self.number(6)

        def train() -> nn.Module:
            with self.stage(f"the owner's reference after {name}") as report:
                return removal.after_removals(
                    self.reference,
                    self.owned,
                    seed=seed,
                    names=[name],
                    precision=self.precision,
                    progress=report,
                )[0]

        return self.kept(
            f"reference-{name}", self.small, train, seed=seed, reference=model_digest(self.reference)
        )

    @cached_property
    def watermark(self) -> Watermark:
        """All marks, within the budget of the settings."""
        victim, references = self.victim, self.references
        with self.stage("calibrating the watermark") as report:
            return Watermark.calibrate(
                victim,
                self.owned,
                key=self.key,
                max_accuracy_drop=self.settings.max_accuracy_drop,
                validation=self.validation,
                trigger_data=self.splits.test,
                reference=references,
                progress=report,
            )

    def kept(
        self, name: str, factory: Callable[[], nn.Module], train: Callable[[], nn.Module], **settings: Any
    ) -> nn.Module:
        """`train()`'s model from the cache, named by `settings` and all that is common to this world."""
        return self.cache.model(name, factory, self.described(**settings), train)

    def described(self, **settings: Any) -> dict[str, Any]:
        """`settings`, and all that is common to what is made in this world, for names in the cache."""
        return {
            **settings,
            "data": self.digest,
            "side": self.settings.side,
            "precision": self.precision,
            "device": self.device.type,
            "torch": torch.__version__,
        }
