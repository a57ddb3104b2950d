"""`Watermark`: what calibration made, ready to protect a model and to be verified."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from honeytrace.ops import Bank, WatermarkOutput
from honeytrace.ops import watermark as watermark_op
from honeytrace.ops.rule import WatermarkRule
from honeytrace.watermark import artifact
from honeytrace.watermark.artifact import ArtifactError
from honeytrace.watermark.groups import TriggerGroup, draw_target
from honeytrace.watermark.key import SecretKey
from honeytrace.watermark.protected import AnswerHook, Answers, protect
from honeytrace.watermark.summary import Summary

M = TypeVar("M", bound=nn.Module)

PLANES = 16
"""Sign bits of a query's bucket. More bits are finer buckets: two queries that differ a little share 16 bits far more
often than 64, and then get the same answer."""


class Watermark:
    """A calibrated watermark. Made by `calibrate` or `load`; as secret as the key it was made with.

    Attributes:
        rule: the printable part: offsets, scales, strength.
        groups: the trigger groups, each with its secret target.
        num_classes: C.
        head: name of the model's head.
        summary: what calibration chose and what it costs; `print(watermark.summary)`.
        key_identifier: names the key, does not reveal it.
    """

    def __init__(
        self,
        *,
        rule: WatermarkRule,
        bank: Bank,
        target_logits: Tensor,
        planes: Tensor,
        seed: int,
        groups: Sequence[TriggerGroup],
        head: str,
        key_identifier: str,
        summary: Summary,
    ) -> None:
        self.rule = rule
        self.groups = tuple(groups)
        self.num_classes = target_logits.shape[1]
        self.head = head
        self.key_identifier = key_identifier
        self.summary = summary
        self._bank = bank
        self._target_logits = target_logits
        self._planes = planes
        self._seed = seed

    @classmethod
    def calibrate(cls, model: nn.Module, data: Any, *, key: SecretKey, **settings: Any) -> Watermark:
        """Choose trigger groups, offsets, scales and flips on the owner's data; see `honeytrace.calibrate`."""
        from honeytrace.watermark.calibration import calibrate

        return calibrate(model, data, key=key, **settings)

    def protect(self, model: M, *, answers: Answers = "logits") -> M:
        """The model with the watermark on its answers.

        The result is of the model's own class, takes the same call and gives the same kind of output; weights are
        shared with `model`, which stays unprotected. Gradients, devices, dtypes, train/eval and state_dict are the
        model's own.

        Args:
            model: the calibrated classifier, or one of the same head.
            answers: what comes out of the head: "logits" (default), "probabilities", or "labels" (one-hot rows).

        Raises:
            TypeError: model is no plain `nn.Module`.
            ValueError: its head is missing or of another size; answers is unknown; it is protected already.
        """
        hook = AnswerHook(self._bank, self._target_logits, self._planes, self.rule, self._seed, answers)
        return protect(model, self.head, hook, self._bank.features, self.num_classes)

    def mark(self, features: Tensor, logits: Tensor) -> WatermarkOutput:
        """The watermark on features [B, D] and logits [B, C] themselves, as the protected model's head applies it.

        Raises:
            TypeError, ValueError: as `honeytrace.ops.watermark`.
        """
        device = features.device
        return watermark_op(
            features,
            logits,
            self._bank.to(device),
            self._target_logits.to(device),
            self._planes.to(device),
            rule=self.rule,
            seed=self._seed,
        )

    def without_flips(self) -> Watermark:
        """The graded mark alone: no answer's label is overwritten, the flip groups are gone."""
        kept = [g for g, group in enumerate(self.groups) if group.mark == "graded"]
        if not kept:
            raise ValueError("the watermark has no graded groups to keep")
        rule = dataclasses.replace(
            self.rule,
            flip_bins=0,
            offset=tuple(self.rule.offsets[g] for g in kept),
            scale=tuple(self.rule.scales[g] for g in kept),
        )
        return Watermark(
            rule=rule,
            bank=Bank(self._bank.rows[kept]),
            target_logits=self._target_logits[kept],
            planes=self._planes,
            seed=self._seed,
            groups=[self.groups[g] for g in kept],
            head=self.head,
            key_identifier=self.key_identifier,
            summary=self.summary.without_flips(),
        )

    def opened(self, key: SecretKey) -> None:
        """Check that the key is the one this watermark was made with, and that it gives these targets.

        Raises:
            TypeError: key is no `SecretKey`.
            ValueError: it is another key, or the targets are not the ones it draws.
        """
        if not isinstance(key, SecretKey):
            raise TypeError(f"key must be a SecretKey, got {type(key).__name__}")
        if key.identifier != self.key_identifier:
            raise ValueError("key is not the one this watermark was made with")
        if any(g.target != draw_target(key, g.triggers, g.candidates) for g in self.groups):
            raise ValueError("the watermark's targets are not the ones its key draws")

    def verification_seed(self, key: SecretKey) -> int:
        """Fixes the order of the questions. Raises as `opened`."""
        self.opened(key)
        return key.seed("verification order")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file (mode 0600), whole or not at all. Keep it as secret as the key.

        Raises:
            OSError: it cannot be written.
        """
        tensors = {
            "bank": self._bank.rows,
            "target_logits": self._target_logits,
            "planes": self._planes,
        }
        for g, group in enumerate(self.groups):
            tensors[f"triggers.{g}"] = group.triggers
            tensors[f"reference_log_probs.{g}"] = group.reference_log_probs
        fields = {
            "rule": self.rule.to_dict(),
            # A number of 64 bits is more than every JSON reader takes.
            "seed": f"{self._seed:016x}",
            "head": self.head,
            "key_identifier": self.key_identifier,
            "summary": self.summary.to_dict(),
            "groups": [
                {
                    "family": group.family,
                    "mark": group.mark,
                    "sources": list(group.sources),
                    "candidates": list(group.candidates),
                    "target": group.target,
                }
                for group in self.groups
            ],
        }
        artifact.write(path, tensors, fields)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Watermark:
        """Read a file that `save` wrote. Runs no code.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: it is damaged, foreign, or of another format version.
        """
        tensors, fields = artifact.read(path)
        try:
            groups = [
                TriggerGroup(
                    family=group["family"],
                    mark=group["mark"],
                    sources=(int(group["sources"][0]), int(group["sources"][1])),
                    candidates=tuple(int(c) for c in group["candidates"]),
                    target=int(group["target"]),
                    triggers=tensors[f"triggers.{g}"],
                    reference_log_probs=tensors[f"reference_log_probs.{g}"],
                )
                for g, group in enumerate(fields["groups"])
            ]
            watermark = cls(
                rule=WatermarkRule.from_dict(fields["rule"]),
                bank=Bank(tensors["bank"]),
                target_logits=tensors["target_logits"],
                planes=tensors["planes"],
                seed=int(fields["seed"], 16),
                groups=groups,
                head=str(fields["head"]),
                key_identifier=str(fields["key_identifier"]),
                summary=Summary.from_dict(fields["summary"]),
            )
            watermark._check()
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ArtifactError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        return watermark

    def _check(self) -> None:
        """ValueError where the parts do not fit each other: then a file was damaged or made up."""
        count = self._bank.groups
        self.rule.check_groups(count)
        if len(self.groups) != count or self._target_logits.shape != (count, self.num_classes):
            raise ValueError(f"bank, targets and groups must speak of the same {count} groups")
        if self._planes.shape != (len(self._planes), self._bank.features):
            raise ValueError("planes must have as many features as the bank")
        if not (self._target_logits.isfinite().all() and self._planes.isfinite().all()):
            raise ValueError("target logits and planes must be finite")
        for group in self.groups:
            if group.target not in group.candidates or not all(
                0 <= c < self.num_classes for c in (*group.candidates, *group.sources)
            ):
                raise ValueError("a group's classes are no classes of the model")
            if group.reference_log_probs.shape != (len(group.triggers), self.num_classes):
                raise ValueError("a group's reference answers do not fit its triggers")

    def __repr__(self) -> str:
        flips = sum(group.mark == "flip" for group in self.groups)
        return (
            f"Watermark(graded_groups={len(self.groups) - flips}, flip_groups={flips}, "
            f"classes={self.num_classes}, key={self.key_identifier[:8]}...)"
        )
