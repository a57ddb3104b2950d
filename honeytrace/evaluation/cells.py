"""`run_cell`: from the settings of one cell to its figures. A pure function; models are kept by content.

world (data, seed) -> defended model (row) -> copy (column) -> copy after removal -> figures
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from honeytrace import extraction, training
from honeytrace.baselines import DEFENCES, Defended
from honeytrace.baselines.combiners import MASKS, draw_pairs, masked
from honeytrace.cache import ModelCache, digest, kept, model_digest
from honeytrace.data import Split, mnist_digits
from honeytrace.evaluation.kept import kept_defended
from honeytrace.evaluation.names import HONEYTRACE
from honeytrace.evaluation.plan import Cell
from honeytrace.extraction import ATTACKS, Extraction, Recipe
from honeytrace.ownership import Verdict, fitted_reference, t_test, verify
from honeytrace.ownership.verify import TriggerGroup
from honeytrace.removal import REMOVALS
from honeytrace.watermark import ArtifactError, SecretKey, Watermark
from honeytrace.world import DataName, World

MOST_GROUPS = 200
"""Of a defence whose triggers are the attacker's own queries (DAWN) so many are asked."""

_MIXTURES = 200

NOT_A_WATERMARK = "not a watermark: there is nothing to claim by"


class NotApplicable(Exception):
    """A pair that makes no sense, with the reason for the table."""


def run_cell(
    cell: Cell,
    directory: str | os.PathLike[str],
    progress: training.Progress | None = None,
    *,
    device: str = "cpu",
) -> dict[str, Any]:
    """The figures of a cell, as plain values.

    Args:
        cell: what to run.
        directory: trained models are kept in ``models`` below it, and shared by all cells.
        progress: told of the long trainings.
        device: where models train and answer, "cpu" or a GPU such as "cuda".

    Returns:
        ``status`` "done" with all figures, or "not applicable" with the ``reason``; the ``precision`` of the
        trainings; the ``device``, with the GPU's name; ``seconds``.

    Raises:
        MissingDataset: the data is not on this machine.
        ValueError: the cell wants the precision of a GPU, and `device` is none. Whatever attack, defence and
            removal raise.
    """
    began = time.perf_counter()
    precision = training.fastest_precision(device) if cell.precision == "fastest" else cell.precision
    if precision == "tensorfloat32" and torch.device(device).type != "cuda":
        raise ValueError(
            f'precision="tensorfloat32" is for GPUs, and the cell was to run on device={device!r}'
        )
    bench = _bench(cell.data, cell.seed, precision, device, str(directory))
    try:
        # All that is trained here are networks whose forward pass is the same every time.
        with training.recorded_steps():
            found = _figures(bench, cell, progress)
    except NotApplicable as error:
        found = {"status": "not applicable", "reason": str(error)}
    seconds = round(time.perf_counter() - began, 1)
    return {**found, "precision": precision, "device": _device_name(device), "seconds": seconds}


def evaluation_key(seed: int) -> SecretKey:
    """The owner's key of a world. Known to everybody: what is evaluated is no secret."""
    return SecretKey(hashlib.sha256(f"honeytrace evaluation {seed}".encode("ascii")).digest())


@dataclass(kw_only=True)
class _Row:
    """A defended model and how its copies are judged."""

    model: nn.Module
    mark: Any
    """What `verify` takes; None where there is nothing to claim by."""
    defended: Defended | None
    digest: str
    null: bool
    """The model is bare: whatever is claimed of its copies is a false claim."""
    test: Split
    combiner: str | None = None
    """Of a baseline whose triggers are combined samples."""

    @cached_property
    def own_success(self) -> float | None:
        """Share of the triggers that the defended model itself answers with their target."""
        if self.mark is None:
            return None
        groups = self.mark.groups
        return _success([training.predict(self.model, group.triggers) for group in groups], groups)

    @cached_property
    def false_alarms(self) -> float | None:
        """Share of the sources' samples combined in all other ways that the defended model answers with the
        target: what MEA-Defender's paper calls random mixtures. None for watermarks of another kind."""
        if self.combiner is None:
            return None
        (group,) = self.mark.groups
        inputs, labels = self.test
        sources = [label for label in sorted(set(labels.tolist())) if label not in group.candidates]
        pair = draw_pairs(inputs, labels, sources, _MIXTURES, torch.Generator().manual_seed(0))
        ways = [masked(way, inputs.shape[1:]) for way in MASKS if way != self.combiner]
        said = extraction.predicted_labels(self.model, torch.cat([way(*pair) for way in ways]))
        return float((said == group.target).double().mean())

    @cached_property
    def accuracy(self) -> float:
        """Of the model, on the test images."""
        return training.accuracy(self.model, *self.test)

    @cached_property
    def api(self) -> extraction.Api:
        """What the attackers ask."""
        return _Remembering(extraction.api(self.model))


class _Remembering:
    """An API that knows its answers by heart: nearly all attacks ask about the same pool.

    That changes nothing, for every defence here is a function of the query alone. Only so many answers are
    kept, since attacks that make up their queries never ask again.
    """

    MOST = 100_000

    def __init__(self, api: extraction.Api) -> None:
        self._api = api
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, inputs: Tensor) -> Tensor:
        names = [hashlib.blake2b(query.tobytes(), digest_size=16).digest() for query in inputs.numpy()]
        new = [place for place, name in enumerate(names) if name not in self._known]
        told = dict(zip((names[place] for place in new), self._api(inputs[new]), strict=True)) if new else {}
        answers = torch.stack([told[name] if name in told else self._known[name] for name in names])
        if len(self._known) + len(told) <= self.MOST:
            self._known.update(told)
        return answers


Trained: TypeAlias = tuple[nn.Module, training.History]


@dataclass(frozen=True, kw_only=True)
class _RememberingRecipe(Recipe):
    """A recipe that trains nothing twice: many attacks begin with the same copy of the same answers.

    Attributes:
        architecture: names the surrogate; trained: what was trained so far, by all it depends on.
    """

    architecture: str
    trained: dict[str, Trained] = field(compare=False)

    def train(
        self, inputs: Tensor, targets: Tensor, *, seed: int, progress: training.Progress | None = None
    ) -> Trained:
        name = _names(self.architecture, repr((self.epochs, seed)), digest(inputs, targets))
        if name not in self.trained:
            self.trained[name] = super().train(inputs, targets, seed=seed, progress=progress)
        model, history = self.trained[name]
        return deepcopy(model), history


class _Bench:
    """The world of one seed, and what was made in it so far in this process."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.key = world.key
        self._rows: dict[str, _Row] = {}
        self._trained: dict[str, Trained] = {}

    @cached_property
    def bare_labels(self) -> Tensor:
        """What the bare victim says about the test images, int64 [N]."""
        return extraction.predicted_labels(self.world.victim, self.world.splits.test.inputs)

    @cached_property
    def watermark(self) -> Watermark:
        """The world's, from the file of an earlier run where there is one: its key is secret from nobody."""
        world = self.world
        settings = world.described(
            key=self.key.identifier,
            victim=model_digest(world.victim),
            references=[model_digest(reference) for reference in world.references],
        )
        path = world.cache.file("watermark", settings)

        def read() -> Watermark | None:
            try:
                return Watermark.load(path)
            except ArtifactError:
                return None

        def make() -> Watermark:
            world.watermark.save(path)
            return world.watermark

        return kept(path, read, make)

    def row(self, settings: dict[str, Any]) -> _Row:
        name = repr(sorted(settings.items()))
        if name not in self._rows:
            self._rows[name] = self._make_row(settings)
        return self._rows[name]

    def _make_row(self, settings: dict[str, Any]) -> _Row:
        world, own = self.world, {k: v for k, v in settings.items() if k not in ("defence", "epochs")}
        if settings["defence"] == HONEYTRACE:
            served = self.watermark if own.pop("flips", True) else self.watermark.without_flips()
            if own:
                raise ValueError(f"the row of {HONEYTRACE} knows the setting flips, got {sorted(own)}")
            return _Row(
                model=served.protect(world.victim),
                mark=served,
                defended=None,
                digest=_names(model_digest(world.victim), served.answering_digest()),
                null=False,
                test=world.splits.test,
            )
        if settings["defence"] == "none":
            return _Row(
                model=world.victim,
                mark=self.watermark,
                defended=None,
                digest=model_digest(world.victim),
                null=True,
                test=world.splits.test,
            )
        defended = self._defended(settings["defence"], settings.get("epochs"), own)
        mark = _Groups(defended.groups, world.classes, world.seed) if defended.groups else None
        described = f"{settings['defence']} {sorted(settings.items())}"
        return _Row(
            model=defended.model,
            mark=mark,
            defended=defended,
            digest=_names(model_digest(defended.model), described),
            null=False,
            test=world.splits.test,
            combiner=own.get("combiner", _default(DEFENCES[settings["defence"]], "combiner")),
        )

    def _defended(self, name: str, epochs: int | None, own: dict[str, Any]) -> Defended:
        """A baseline. Those that train a model of their own leave it in the cache."""
        world = self.world
        settings: dict[str, Any] = {
            "architecture": world.large,
            "seed": world.number(40),
            "epochs": epochs or world.settings.victim_epochs,
            "trigger_data": world.splits.test,
            "victim": world.victim,
            "reference": world.reference,
            "precision": world.precision,
        }

        def make() -> Defended:
            with world.stage(f"defending: {name}") as report:
                return DEFENCES[name](world.owned, **settings, progress=report, **own)

        if world.cache.directory is None:
            return make()
        described = [
            name,
            world.digest,
            world.precision,
            settings["seed"],
            settings["epochs"],
            sorted(own.items()),
        ]
        file = f"defended-{name}-{_names(repr(described), model_digest(world.victim))[:32]}.safetensors"
        return kept_defended(world.cache.directory / file, world.large, make)

    def pool(self, settings: dict[str, Any]) -> Tensor:
        if settings.get("pool", "in-distribution") == "in-distribution":
            return self.world.splits.pool.inputs
        if self.world.name != "fashion":
            raise NotApplicable("there is no other data of this form to ask about")
        return mnist_digits().inputs

    def surrogate(self, column: dict[str, Any]) -> Callable[[], nn.Module]:
        """What the attacker of a column trains."""
        return self.world.large if column.get("surrogate") == "victim's" else self.world.small

    def copy(
        self, row: _Row, column: dict[str, Any], progress: training.Progress | None
    ) -> tuple[nn.Module, Extraction | None]:
        """The copy of a column; with its record unless it comes from the cache."""
        world = self.world
        own = {
            k: v for k, v in column.items() if k not in ("attack", "labels", "pool", "surrogate", "epochs")
        }
        attack, labels, pool = ATTACKS[column["attack"]], column.get("labels", "soft"), self.pool(column)
        surrogate = self.surrogate(column)
        recipe = _RememberingRecipe(
            surrogate,
            column.get("epochs", world.settings.copy_epochs),
            precision=world.precision,
            architecture=column.get("surrogate", ""),
            trained=self._trained,
        )
        if "pretraining" in attack.wants:
            own["pretraining"] = self._other_task()
        record: list[Extraction] = []

        def make() -> nn.Module:
            with world.stage(f"attack: {column['attack']}") as report:
                record.append(
                    attack(
                        row.api,
                        pool,
                        recipe,
                        seed=world.number(9),
                        labels=labels,
                        progress=progress or report,
                        **own,
                    )
                )
            return record[0].surrogate

        needs_record = row.defended is not None and row.defended.changed is not None
        if needs_record:
            make()
            return record[0].surrogate, record[0]
        copy = world.kept(
            f"copy-{column['attack']}",
            surrogate,
            make,
            asked=row.digest,
            column=column,
            seed=world.number(9),
            pool=digest(pool[:64]),
        )
        return copy, record[0] if record else None

    def _other_task(self) -> tuple[Tensor, Tensor]:
        """A labelled task of the same form: digits for clothes; for digits, the brightest quarter."""
        if self.world.name == "fashion":
            return tuple(mnist_digits())  # type: ignore[return-value]
        inputs = self.world.splits.pool.inputs
        quarters = inputs[:, 0, :8, :8].reshape(-1, 2, 4, 2, 4).mean(dim=(2, 4)).flatten(1)
        return inputs, quarters.argmax(1)

    def removed(
        self,
        copy: nn.Module,
        column: dict[str, Any],
        settings: dict[str, Any],
        progress: training.Progress | None,
    ) -> nn.Module:
        """The copy after a removal with clean labelled samples of the attacker's pool."""
        world = self.world
        own = {k: v for k, v in settings.items() if k != "removal"}

        def make() -> nn.Module:
            with world.stage(f"removal: {settings['removal']}") as report:
                return REMOVALS[settings["removal"]](
                    copy,
                    world.splits.pool,
                    seed=world.number(60),
                    precision=world.precision,
                    progress=progress or report,
                    **own,
                )

        return world.kept(
            f"removal-{settings['removal']}",
            self.surrogate(column),
            make,
            copy=model_digest(copy),
            own=own,
            seed=world.number(60),
        )


@dataclass(frozen=True)
class _Groups:
    """A baseline's trigger groups, as `verify` wants them."""

    groups: Sequence[TriggerGroup]
    num_classes: int
    seed: int

    def opened(self, key: Any) -> None:
        """There is no key to open: a baseline's secrets follow from its seed."""

    def verification_seed(self, key: Any) -> int:
        """The order of the questions."""
        return self.seed


@lru_cache(maxsize=4)
def _bench(data: DataName, seed: int, precision: training.Precision, device: str, directory: str) -> _Bench:
    if torch.device(device).type == "cuda":
        # Answers are float32 that is float32, as on the CPU; trainings have the precision of the plan. And
        # what attacks and removals do with gradients outside of trainings must give the same bits again.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    cache, key = ModelCache(Path(directory) / "models"), evaluation_key(seed)
    return _Bench(World(data, seed=seed, key=key, cache=cache, precision=precision, device=device))


def _default(function: Callable[..., Any], name: str) -> Any:
    """The default of a setting; None where the function has no such setting."""
    setting = inspect.signature(function).parameters.get(name)
    return None if setting is None else setting.default


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def _figures(bench: _Bench, cell: Cell, progress: training.Progress | None) -> dict[str, Any]:
    world = bench.world
    row = bench.row(cell.row_settings)
    copy, record = bench.copy(row, cell.column_settings, progress)
    inputs, known = world.splits.test
    before = said = extraction.predicted_labels(copy, inputs)
    if cell.removal:
        copy = bench.removed(copy, cell.column_settings, cell.removal_settings, progress)
        said = extraction.predicted_labels(copy, inputs)
    found: dict[str, Any] = {
        "status": "done",
        "null": row.null,
        "accuracy_bare": extraction.agreement(bench.bare_labels, known),
        "accuracy_protected": row.accuracy,
        "success_protected": row.own_success,
        "false_alarms": row.false_alarms,
        "accuracy_copy": extraction.agreement(said, known),
        "accuracy_copy_before_removal": extraction.agreement(before, known),
        "fidelity": extraction.agreement(said, bench.bare_labels),
    }
    mark = row.mark
    if row.defended is not None and row.defended.changed is not None:
        assert record is not None
        mark = _Groups(row.defended.changed(record.queries)[:MOST_GROUPS], world.classes, world.seed)
    if mark is None or not mark.groups:
        return {
            **found,
            "claims": None,
            "why_no_claim": NOT_A_WATERMARK if mark is None else "no query was bent",
        }
    return {**found, **_ownership(copy, mark, bench.key, cell)}


def _ownership(copy: nn.Module, mark: Any, key: SecretKey, cell: Cell) -> dict[str, Any]:
    """Verdicts by scores and by labels, the papers' t-test, success rate and mean target probability."""
    verdicts = {
        answers: verify(copy, mark, key, alpha=cell.alpha, answers=answers, stop_at_claim=False)
        for answers in ("scores", "labels")
    }
    groups = list(mark.groups)
    flips = [group for group in groups if getattr(group, "mark", "flip") == "flip"]
    learned = flips if cell.column_settings.get("labels") == "top1" and flips else groups
    logits = [training.predict(copy, g.triggers) for g in learned]
    probabilities = [of_group.double().softmax(1) for of_group in logits]
    said = np.concatenate([p[:, g.target].numpy() for p, g in zip(probabilities, learned, strict=True)])
    nearest = [
        fitted_reference(p, g.reference_log_probs) for p, g in zip(probabilities, learned, strict=True)
    ]
    expected = np.concatenate([p[:, g.target] for p, g in zip(nearest, learned, strict=True)])
    return {
        "claims": {answers: _told(verdict) for answers, verdict in verdicts.items()},
        "smallest_p_value": verdicts["scores"].smallest_p_value,
        "success_rate": _success(logits, learned),
        "target_probability": float(said.mean()),
        "target_probability_reference": float(expected.mean()),
        "t_test_queries": t_test(said, expected).queries_to_significance if said.size > 1 else None,
    }


def _success(logits: Sequence[Tensor], groups: Sequence[TriggerGroup]) -> float:
    """Share of the groups' triggers whose answer, `logits` [N, C] for each group, is the target."""
    hits = [told.argmax(1) == group.target for told, group in zip(logits, groups, strict=True)]
    return float(torch.cat(hits).double().mean())


def _told(verdict: Verdict) -> dict[str, Any]:
    asked, curve = 0, []
    for record in verdict.groups:
        asked += record.queries
        curve.append([asked, record.running_e if math.isfinite(record.running_e) else None])
    return {
        "claim": verdict.claim,
        "queries": verdict.queries,
        "queries_total": asked,
        "p_value": verdict.p_value,
        "ranks": [record.target_rank for record in verdict.groups],
        "candidates": [record.candidates for record in verdict.groups],
        "curve": curve,
    }


def _names(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8")).hexdigest()
