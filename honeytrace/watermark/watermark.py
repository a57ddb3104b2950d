"""`Watermark`: what calibration made, ready to protect a model and to be verified."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from honeytrace.files import write_private
from honeytrace.ops import Bank, WatermarkOutput
from honeytrace.ops import watermark as watermark_op
from honeytrace.ownership.ladder import LADDERS, STEPS
from honeytrace.rule import WatermarkRule
from honeytrace.training import Progress
from honeytrace.watermark import artifact
from honeytrace.watermark.artifact import ArtifactError
from honeytrace.watermark.cost import Cost, measure
from honeytrace.watermark.groups import Family, Mark, TriggerGroup, draw_target
from honeytrace.watermark.key import SecretKey
from honeytrace.watermark.protected import AnswerHook, Answers, Observe, protect
from honeytrace.watermark.summary import Summary

M = TypeVar("M", bound=nn.Module)

PLANES = 16
"""Sign bits of a query's bucket. More bits are finer buckets: two queries that differ a little share 16 bits
far more often than 64, and then get the same answer."""


class Watermark:
    """A calibrated watermark. Made by `calibrate` or `load`; as secret as the key it was made with.

    Attributes:
        rule: the printable part: offsets, scales, strength.
        groups: the trigger groups, each with its secret target.
        num_classes: C.
        head: name of the model's head.
        summary: what calibration chose and what it costs; `print(watermark.summary)`.
        key_identifier: names the key, does not reveal it.
        beacon: the public random value that the targets depend on besides the key; None before `bind`.
    """

    questions_per_group = 8
    """Triggers that `verify` asks of a group by scores, the nearest to its bank first. On Fashion-MNIST four
    show as much as sixteen; where copies are weaker, a group that comes second costs more than the questions.
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
        class_logits: Tensor | None = None,
        beacon: str | None = None,
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
        self._class_logits = class_logits
        self.beacon = beacon

    @classmethod
    def calibrate(cls, model: nn.Module, data: Any, *, key: SecretKey, **settings: Any) -> Watermark:
        """Choose trigger groups, offsets, scales and flips on the owner's data: `honeytrace.calibrate`."""
        from honeytrace.watermark.calibration import calibrate

        return calibrate(model, data, key=key, **settings)

    def protect(
        self,
        model: M,
        *,
        answers: Answers = "logits",
        constant_time: bool = False,
        observe: Observe | None = None,
    ) -> M:
        """The model with the watermark on its answers.

        The result is of the model's own class (the head of a private subclass of its own), takes the same
        call and gives the same kind of output. Parameters and buffers are shared with `model`, which stays
        unprotected: loading weights into the one, training it or moving it to another device or dtype does
        the same to the other. train() and eval() are its own.

        Other state of the modules is copied as `copy.deepcopy` does. A forward pass that reaches the head
        through a closure over the bare model is not seen, and would give unmarked answers.

        Args:
            model: the calibrated classifier, or one of the same head.
            answers: what comes out of the head: "logits" (default), "probabilities", "labels" (one-hot rows).
            constant_time: do the same work for every query, so that the time of a call does not tell which
                answers are bent; the answers are the same. On the CPU only. Default False.
            observe: called with the `WatermarkOutput` of every call, for example to count what is bent. It is
                given the owner's secret; a served model whose clients see what it does is a marked one no
                more. Default None.

        Raises:
            TypeError: model is no plain `nn.Module`, or cannot be copied.
            ValueError: its head is missing or of another size; answers is unknown; it is protected already.
        """
        hook = AnswerHook(
            self._bank,
            self._target_logits,
            self._planes,
            self.rule,
            self._seed,
            answers,
            constant_time,
            observe,
        )
        return protect(model, self.head, hook, self._bank.features, self.num_classes)

    def mark(self, features: Tensor, logits: Tensor) -> WatermarkOutput:
        """The watermark on features [B, D] and logits [B, C], as a protected model's head applies it.

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

    def measure(
        self, model: nn.Module, data: Any, *, batch_size: int = 512, progress: Progress | None = None
    ) -> Cost:
        """What this watermark costs: accuracy of `model` bare and protected, and the answers it touches.

        The summary tells what calibration measured. This measures again: on other data, for weights that
        were trained on, or after `bind` drew other targets.

        Args:
            model: the bare model.
            data: labelled samples, as `calibrate` takes them; best ones the model was not trained on.
            batch_size: inputs put to the model at once.
            progress: told of every batch.

        Raises:
            TypeError, ValueError: as `calibrate`; also when the model has no head of this name and size.
        """
        return measure(self, model, data, batch_size=batch_size, progress=progress)

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
            class_logits=self._class_logits,
            beacon=self.beacon,
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
        if any(g.target != draw_target(key, g.triggers, g.candidates, self.beacon) for g in self.groups):
            raise ValueError("the watermark's targets are not the ones its key draws")

    def bind(self, key: SecretKey, beacon: str) -> Watermark:
        """The same watermark with its targets drawn again, from the key *and* a public random value.

        Commit to the watermark first (`honeytrace.ownership.Commitment`), take a value that became known
        later,
        bind, and serve only the bound watermark: then the targets could be chosen by nobody. Groups, triggers
        and offsets stay as they are. What the marks cost may differ a little from the summary, which was
        measured with the targets of before: `measure` says.

        Raises:
            TypeError: key is no `SecretKey`, or beacon no text.
            ValueError: it is another key; the watermark is bound already, or was made by a version that
                cannot bind; beacon is empty.
        """
        self.opened(key)
        if not isinstance(beacon, str):
            raise TypeError(f"beacon must be a str, got {type(beacon).__name__}")
        if not beacon.strip():
            raise ValueError("beacon must not be empty")
        if self.beacon is not None:
            raise ValueError("the watermark is bound to a beacon already; a second draw would be a choice")
        if self._class_logits is None:
            raise ValueError("the watermark holds no answers for other targets; calibrate it again")
        groups = [
            dataclasses.replace(group, target=draw_target(key, group.triggers, group.candidates, beacon))
            for group in self.groups
        ]
        return Watermark(
            rule=self.rule,
            bank=self._bank,
            target_logits=self._class_logits[[group.target for group in groups]],
            planes=self._planes,
            seed=self._seed,
            groups=groups,
            head=self.head,
            key_identifier=self.key_identifier,
            summary=self.summary,
            class_logits=self._class_logits,
            beacon=beacon,
        )

    def digest(self) -> str:
        """SHA-256, 64 hexadecimal digits, of everything but the targets: rule, bank, every trigger, candidate
        and reference answer, planes, flip seed. The same before and after `bind`."""
        tensors, fields = self._plain()
        del tensors["target_logits"], fields["beacon"], fields["summary"]
        for group in fields["groups"]:
            del group["target"]
        return _hashed(tensors, fields)

    def answering_digest(self) -> str:
        """SHA-256, 64 hexadecimal digits, of what decides the answers of a protected model: rule, bank,
        targets, planes, flip seed, head. Triggers and references have no part in it: a copy made of these
        answers can be asked about others."""
        tensors, fields = self._plain()
        return _hashed(
            {name: tensors[name] for name in ("bank", "target_logits", "planes")},
            {name: fields[name] for name in ("rule", "seed", "head")},
        )

    def verification_seed(self, key: SecretKey) -> int:
        """Fixes the order of the questions. Raises as `opened`."""
        self.opened(key)
        return key.seed("verification order")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file (mode 0600), whole or not at all. Keep it as secret as the key.

        Raises:
            OSError: it cannot be written; an older file of that name is untouched then.
        """
        write_private(path, self.to_bytes(), overwrite=True)

    def to_bytes(self) -> memoryview:
        """The file that `save` writes."""
        return artifact.encode(*self._plain())

    def _plain(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything, as tensors and JSON values."""
        tensors = {
            "bank": self._bank.rows,
            "target_logits": self._target_logits,
            "planes": self._planes,
        }
        for g, group in enumerate(self.groups):
            tensors[f"triggers.{g}"] = group.triggers
            tensors[f"reference_log_probs.{g}"] = group.reference_log_probs
            if group.ends is not None and group.turns is not None:
                # [S * 2, K, ...] and [S * 2, K]. With one start these are the tensors of the first files,
                # which knew no more: so their bytes and the digests committed to stay what they were.
                tensors[f"ends.{g}"] = group.ends.flatten(0, 1)
                tensors[f"turns.{g}"] = group.turns.flatten(0, 1)
        if self._class_logits is not None:
            tensors["class_logits"] = self._class_logits
        fields = {
            "rule": self.rule.to_dict(),
            # A number of 64 bits is more than every JSON reader takes.
            "seed": f"{self._seed:016x}",
            "head": self.head,
            "key_identifier": self.key_identifier,
            "beacon": self.beacon,
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
        return tensors, fields

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Watermark:
        """Read a file that `save` wrote. Runs no code.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: it is damaged, foreign, or of another format version.
        """
        try:
            return cls._of(*artifact.read(path))
        except ArtifactError:
            raise
        except _Damage as error:
            message = str(error)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
            # Not its text: that may quote what the damaged place holds, and it may hold the flip seed.
            message = f"a field is missing or of a wrong kind ({type(error).__name__})"
        raise ArtifactError(f"{path} is damaged: {message}")

    @classmethod
    def _of(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> Watermark:
        """What `_plain` gave. Raises exceptions of many kinds for anything else."""
        groups = [
            TriggerGroup(
                family=group["family"],
                mark=group["mark"],
                sources=_pair(_integers(group["sources"])),
                candidates=_integers(group["candidates"]),
                target=_integers([group["target"]])[0],
                triggers=tensors[f"triggers.{g}"],
                reference_log_probs=tensors[f"reference_log_probs.{g}"],
                ends=_by_start("ends", tensors.get(f"ends.{g}")),
                turns=_by_start("turns", tensors.get(f"turns.{g}")),
            )
            for g, group in enumerate(fields["groups"])
        ]
        for name in ("seed", "head", "key_identifier"):
            _must(isinstance(fields[name], str), f"{name} is no text")
        _must(fields["beacon"] is None or isinstance(fields["beacon"], str), "beacon is no text")
        for name, digits in (("seed", 16), ("key_identifier", 32)):
            hexadecimal = re.fullmatch(f"[0-9a-f]{{{digits}}}", fields[name])
            _must(hexadecimal, f"{name} must have {digits} hexadecimal digits")
        watermark = cls(
            rule=WatermarkRule.from_dict(fields["rule"]),
            bank=Bank(tensors["bank"]),
            target_logits=tensors["target_logits"],
            planes=tensors["planes"],
            seed=int(fields["seed"], 16),
            groups=groups,
            head=fields["head"],
            key_identifier=fields["key_identifier"],
            summary=Summary.from_dict(fields["summary"]),
            class_logits=tensors.get("class_logits"),
            beacon=fields["beacon"],
        )
        watermark._check()
        return watermark

    def _check(self) -> None:
        """Raise _Damage where the parts do not suit the ops and `verify`, or do not fit each other."""
        count, classes = self._bank.groups, self.num_classes
        self.rule.check_groups(count)
        _must(self.rule.k <= self._bank.size, "k is larger than the bank")
        _must(len(self.groups) == count, f"bank and groups must speak of the same {count} groups")
        _check_numbers("target_logits", self._target_logits, (count, classes))
        if self._class_logits is not None:
            _check_numbers("class_logits", self._class_logits, (classes, classes))
            own = self._class_logits[[group.target for group in self.groups]]
            _must(bool((own == self._target_logits).all()), "target_logits are not those of the targets")
        _must(1 <= len(self._planes) <= 64, "planes must be 1 to 64")
        _check_numbers("planes", self._planes, (len(self._planes), self._bank.features))
        for group in self.groups:
            known = group.family in get_args(Family) and group.mark in get_args(Mark)
            _must(known, "a group of unknown kind")
            named = (*group.candidates, *group.sources)
            _must(all(0 <= c < classes for c in named), "a group's classes are no classes of the model")
            _must(
                list(group.candidates) == sorted(set(group.candidates) - set(group.sources)),
                "a group's candidates must be ascending and none of its sources",
            )
            _must(group.target in group.candidates, "a group's target must be one of its candidates")
            shape = self.groups[0].triggers.shape[1:]
            _must(len(group.triggers) > 0 and len(shape) > 0, "a group has no triggers")
            _check_inputs("triggers", group.triggers, (len(group.triggers), *shape), self.groups[0].triggers)
            references = group.reference_log_probs
            several = references.shape[:1] if references.dim() == 3 else ()
            _must(several != (0,), "a group has no reference")
            shape_of_one = (len(group.triggers), classes)
            _check_numbers("reference_log_probs", references, (*several, *shape_of_one))
            _must(group.reference_log_probs.amax() < 1e-3, "reference_log_probs must be of probabilities")
            _must((group.ends is None) == (group.turns is None), "a group's roads are not whole")
            if group.ends is not None and group.turns is not None:
                starts, most = len(group.ends), len(group.triggers)
                _must(starts <= most, f"roads must start at one of {most} triggers each, got {starts} starts")
                roads = (starts, len(LADDERS), len(group.candidates))
                _check_inputs("ends", group.ends, (*roads, *shape), self.groups[0].triggers)
                _must(group.turns.dtype == torch.int64, "turns must be int64")
                _must(tuple(group.turns.shape) == roads, f"turns must have shape {list(roads)}")
                inside = ((group.turns >= 0) & (group.turns <= STEPS + 1)).all()
                _must(inside, f"turns must be steps, 0 to {STEPS + 1}")
        told = [(g.family, g.mark, g.candidates, g.triggers) for g in self.summary.groups]
        held = [(g.family, g.mark, len(g.candidates), len(g.triggers)) for g in self.groups]
        _must(not told or told == held, "the summary speaks of other groups")

    def __repr__(self) -> str:
        flips = sum(group.mark == "flip" for group in self.groups)
        return (
            f"Watermark(graded_groups={len(self.groups) - flips}, flip_groups={flips}, "
            f"classes={self.num_classes}, key={self.key_identifier[:8]}...)"
        )


def _hashed(tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> str:
    found = hashlib.sha256(json.dumps(fields, sort_keys=True).encode("utf-8"))
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous().numpy()
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        found.update(f"\n{name} {little.dtype.str} {little.shape}\n".encode("ascii"))
        found.update(little.tobytes())
    return found.hexdigest()


class _Damage(ValueError):
    """What is wrong with a file, in words that may be shown."""


def _by_start(name: str, roads: Tensor | None) -> Tensor | None:
    """[S * 2, ...] as a file holds it -> [S, 2, ...]."""
    if roads is None:
        return None
    each = len(LADDERS)
    whole = roads.dim() > 0 and len(roads) > 0 and len(roads) % each == 0
    _must(whole, f"{name} must have {each} roads from every start")
    return roads.reshape(len(roads) // each, each, *roads.shape[1:])


def _must(holds: object, otherwise: str) -> None:
    if not holds:
        raise _Damage(otherwise)


def _integers(values: Any) -> tuple[int, ...]:
    _must(isinstance(values, list) and all(type(value) is int for value in values), "a class is no number")
    return tuple(values)


def _pair(values: tuple[int, ...]) -> tuple[int, int]:
    _must(len(values) == 2, "a group must have two sources")
    return values[0], values[1]


def _check_numbers(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    _must(tensor.dtype == torch.float32, f"{name} must be float32")
    _must(tuple(tensor.shape) == shape, f"{name} must have shape {list(shape)}")
    _must(tensor.isfinite().all(), f"{name} must be finite")


def _check_inputs(name: str, tensor: Tensor, shape: tuple[int, ...], first: Tensor) -> None:
    """As `_check_numbers`; or token ids, where the first group's triggers are."""
    if first.is_floating_point():
        return _check_numbers(name, tensor, shape)
    _must(tensor.dtype == torch.int64, f"{name} must all be float32, or all int64")
    _must(tuple(tensor.shape) == shape and len(first.shape) == 2, f"{name} must have shape {list(shape)}")
    return None
